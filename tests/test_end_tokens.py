"""Ends of an answer that the base names and its vocabulary does not have: they end nothing, and hurt nobody."""

import json
import logging
from pathlib import Path

import pytest

from adapterd.config import EngineSettings
from adapterd.core import BASE_MIX, Request, RequestId, SamplingParams
from adapterd.daemon import Daemon
from tests.tiny import tiny_llama

GREEDY = SamplingParams(max_tokens=4, temperature=0.0)
HELD_BACK = SamplingParams(max_tokens=4, min_tokens=4, temperature=0.0)


def test_holding_back_end_tokens_changes_no_other_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Regression: -inf for an id beyond a row's end fell on the next row's token, or beyond the last row's end."""
    vocab_size = tiny_llama(tmp_path).config.vocab_size
    settings = EngineSettings(base=str(tmp_path), dtype="float32", device="cpu", kv_memory=2**20)

    def daemon(*more: int) -> Daemon:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, *more]}))
        return Daemon.build(settings)

    def request(name: str, prompt: tuple[int, ...], params: SamplingParams, to: Daemon) -> Request:
        return Request(RequestId(name), prompt, params, BASE_MIX, to.spec.eos_token_ids, 0.0)

    alone = daemon()
    assert alone.spec.eos_token_ids == {2}
    (answer,) = alone.generate([request("b", (7, 8, 9), GREEDY, alone)]).values()
    # The one token of the next row, and of the row before, that an id beyond a row's end would fall on.
    first = answer.token_ids[0]
    with caplog.at_level(logging.WARNING, logger="adapterd.daemon"):
        told = daemon(vocab_size + first, first - vocab_size)
    assert told.spec.eos_token_ids == {2}
    assert f"{[first - vocab_size, vocab_size + first]} as ends of an answer" in caplog.text
    requests = [
        request(name, prompt, params, told)
        for name, prompt, params in (
            ("a", (5, 6), HELD_BACK),
            ("b", (7, 8, 9), GREEDY),
            ("c", (3, 4), HELD_BACK),
        )
    ]
    found = told.generate(requests)
    assert found[RequestId("b"), 0].token_ids == answer.token_ids
    assert all(len(found[RequestId(name), 0].token_ids) == 4 for name in "ac")
