"""The requests that lm-evaluation-harness sends, byte for byte what its clients of 0.4 write, against the real daemon.

`docs/evaluation.md` has the commands that run the harness itself.
"""

from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapterd.render import Renderer
from adapterd.training.data import read_rows
from tests.serving import served

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "adapterd" / "mini"
ADAPTER = ROOT / "adapters" / "moderation"
LABELS = ("allow", "spam", "harassment", "threat", "privacy")
ROWS = read_rows(ADAPTER / "heldout.jsonl")[:3]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    arguments = ("--adapters", str(ADAPTER), "--dtype", "float32")
    with served(*arguments, cwd=ROOT) as url, httpx.Client(base_url=url, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer.load(BASE)


def choices(
    client: httpx.Client, body: dict[str, Any], path: str = "/v1/completions"
) -> list[dict[str, Any]]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return sorted(answer.json()["choices"], key=itemgetter("index"))


def expected(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logprobs = model(torch.tensor([[*context, *continuation]])).logits[0].log_softmax(-1)
    rows = logprobs[len(context) - 1 : -1]
    ids = torch.tensor(continuation)
    return float(rows.gather(1, ids[:, None]).sum()), bool((rows.argmax(-1) == ids).all())


@pytest.mark.parametrize("name", ["mini", "mini:moderation"])
def test_loglikelihoods_of_token_prompts_are_those_of_peft(
    client: httpx.Client, renderer: Renderer, name: str
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    if name != "mini":
        model = PeftModel.from_pretrained(model, ADAPTER)
    model.eval()
    pairs = [(renderer.render(row.prompt), renderer.encode_answer(label)) for row in ROWS for label in LABELS]
    # As the harness batches them: whole requests of unequal length in one call.
    body = {
        "model": name,
        "prompt": [context + continuation for context, continuation in pairs],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    found = choices(client, body)
    assert len(found) == len(pairs)
    for choice, (context, continuation) in zip(found, pairs, strict=True):
        # The harness's own reading: after the context, without the one token that was generated.
        own = choice["logprobs"]["token_logprobs"][len(context) : -1]
        top = choice["logprobs"]["top_logprobs"][len(context) : -1]
        assert len(own) == len(continuation)
        total, is_greedy = expected(model, context, continuation)
        assert sum(own) == pytest.approx(total, abs=1e-3)
        assert all(logprob == max(best.values()) for logprob, best in zip(own, top, strict=True)) == is_greedy


def test_a_prompt_may_be_scored_without_generating(client: httpx.Client, renderer: Renderer) -> None:
    context, continuation = renderer.render(ROWS[0].prompt), renderer.encode_answer("allow")
    body = {
        "model": "mini:moderation",
        "prompt": context + continuation,
        "logprobs": 1,
        "echo": True,
        "temperature": 0,
    }
    (none,) = choices(client, body | {"max_tokens": 0})
    (one,) = choices(client, body | {"max_tokens": 1})
    length = len(context) + len(continuation)
    assert len(none["logprobs"]["token_logprobs"]) == length
    assert len(one["logprobs"]["token_logprobs"]) == length + 1
    assert none["logprobs"]["token_logprobs"][0] is None
    assert none["logprobs"]["token_logprobs"][1:] == pytest.approx(
        one["logprobs"]["token_logprobs"][1:-1], abs=1e-4
    )


def test_text_prompts_with_stops_are_completed(client: httpx.Client, renderer: Renderer) -> None:
    """generate_until of local-completions: text prompts, several in one call."""
    prompts = [renderer.render_text(row.prompt) for row in ROWS]
    body = {
        "prompt": prompts,
        "model": "mini:moderation",
        "max_tokens": 12,
        "temperature": 0,
        "stop": ["\n", "<|im_end|>"],
        "seed": 1234,
    }
    texts = [choice["text"] for choice in choices(client, body)]
    assert all(text in LABELS for text in texts)
    # And of local-chat-completions, one chat a call.
    for row, text in zip(ROWS, texts, strict=True):
        chat = {
            "messages": [dict(message) for message in row.prompt],
            "model": "mini:moderation",
            "max_tokens": 12,
            "temperature": 0,
            "stop": ["\n"],
            "seed": 1234,
        }
        (choice,) = choices(client, chat, "/v1/chat/completions")
        assert choice["message"]["content"] == text
