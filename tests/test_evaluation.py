import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from adapterd.adapter_writer import write_adapter
from adapterd.core import Request, RequestId, SamplingParams
from adapterd.daemon import Daemon
from adapterd.errors import AdapterRefused, ConfigError, ModelNotFound
from adapterd.evaluation import CARD_BEGIN, CARD_END, evaluate, write_card
from adapterd.peft_config import CONFIG_FILE
from adapterd.scoring import Answer, score
from adapterd.training.data import read_rows
from tests.offline import OfflineSettings
from tests.tiny import tiny_llama

MODULES = {f"model.layers.{layer}.mlp.down_proj": (32, 48) for layer in range(2)}


@dataclass(frozen=True)
class Told(OfflineSettings):
    adapter: tuple[str, ...] = ()
    data: Path | None = None
    limit: int | None = None
    max_tokens: int = 12
    json_out: Path | None = None
    write_card: bool = False


def write_random_adapter(directory: Path, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        module: (torch.randn(4, d_in, generator=generator), torch.randn(d_out, 4, generator=generator))
        for module, (d_out, d_in) in MODULES.items()
    }
    targets = ["down_proj"]
    write_adapter(
        directory, tensors, r=4, lora_alpha=8, target_modules=targets, base_name="t", base_fingerprint=None
    )


@pytest.fixture
def told(tmp_path: Path) -> Told:
    tiny_llama(tmp_path / "base")
    for seed, name in enumerate(("one", "two"), 1):
        write_random_adapter(tmp_path / "adapters" / name, seed=seed)
        with (tmp_path / "adapters" / name / "heldout.jsonl").open("w") as file:
            for i in range(5 + seed):
                messages = [
                    {"role": "user", "content": f"Ticket {i}"},
                    {"role": "assistant", "content": "A: 1\nB: 2"},
                ]
                file.write(json.dumps({"messages": messages, "tags": ["edge"] if i == 0 else []}) + "\n")
        card = f"# {name}\n\n{CARD_BEGIN}\nold\n{CARD_END}\n\nAfter.\n"
        (tmp_path / "adapters" / name / "README.md").write_text(card)
    return Told(base=str(tmp_path / "base"), adapters=(tmp_path / "adapters",))


def test_report_holds_what_base_and_adapter_really_answer(told: Told, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    evaluate(replace(told, json_out=out))
    report = json.loads(out.read_text())
    assert [(result["adapter"], result["num_rows"]) for result in report] == [("one", 6), ("two", 7)]

    daemon = Daemon.build(told)
    daemon.registry.start()
    assert daemon.registry.wait_loaded(30)
    for result in report:
        rows = read_rows(tmp_path / "adapters" / result["adapter"] / "heldout.jsonl")
        for arm, model in (("base", "base"), ("adapter", result["adapter"])):
            resolved = daemon.registry.resolve(model)
            lease = daemon.registry.lease(resolved.mix)
            answers = []
            for row in rows:
                request = Request(
                    id=RequestId("alone"),
                    prompt_token_ids=tuple(daemon.renderer.render(row.prompt)),
                    params=SamplingParams(max_tokens=12, temperature=0.0),
                    mix=resolved.mix,
                    eos_token_ids=resolved.eos_token_ids,
                    arrival_seconds=0.0,
                )
                one = daemon.generate([request])[RequestId("alone"), 0]
                stopped = one.finish_reason == "stop"
                answers.append(Answer("", row.answer, one.text, len(one.token_ids), stopped, row.tags))
            lease.release()
            assert [a[arm] for a in result["answers"]] == [a.text for a in answers]
            expected = score(answers)
            measured = result[f"{arm}_scores"]
            assert (measured["exact"]["count"], measured["exact"]["total"]) == (0, len(rows))
            assert measured["stopped"]["count"] == expected.stopped.count
            assert measured["median_tokens"] == expected.median_tokens
        assert any(a["base"] != a["adapter"] for a in result["answers"])
        assert result["digest"] == daemon.registry.resolve(result["adapter"]).digest
    daemon.registry.stop()


def test_report_and_cards_show_the_table(told: Told, tmp_path: Path) -> None:
    text = evaluate(replace(told, write_card=True))
    for name in ("one", "two"):
        card = (tmp_path / "adapters" / name / "README.md").read_text()
        assert card.startswith(f"# {name}\n\n{CARD_BEGIN}\n")
        assert card.endswith(f"{CARD_END}\n\nAfter.\n")
        assert "old" not in card
        assert f"| | `base` | `base:{name}` |" in card
        assert "| edge | 1 |" in card
        block = card.partition(f"{CARD_BEGIN}\n")[2].partition(f"\n{CARD_END}")[0]
        assert block in text
    again = evaluate(replace(told, write_card=True))
    assert again == text


def test_only_the_adapters_and_rows_asked_for(told: Told, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    data = tmp_path / "adapters" / "two" / "heldout.jsonl"
    evaluate(replace(told, adapter=("one",), data=data, limit=3, json_out=out))
    (result,) = json.loads(out.read_text())
    assert (result["adapter"], result["num_rows"]) == ("one", 3)


def test_a_single_adapter_folder_may_be_given(told: Told, tmp_path: Path) -> None:
    text = evaluate(replace(told, adapters=(tmp_path / "adapters" / "one",)))
    assert text.startswith("one\n")


def test_what_cannot_be_evaluated_is_refused(told: Told, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name their folders"):
        evaluate(replace(told, adapters=()))
    with pytest.raises(ModelNotFound, match=r"no adapter 'three'.*one, two"):
        evaluate(replace(told, adapter=("three",)))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="hold no adapter"):
        evaluate(replace(told, adapters=(empty,)))
    (tmp_path / "adapters" / "one" / CONFIG_FILE).write_text("{")
    with pytest.raises(AdapterRefused, match="cannot be read as JSON"):
        evaluate(told)


def test_card_without_markers_is_refused_and_left_alone(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"{CARD_END} {CARD_BEGIN}")
    with pytest.raises(ConfigError, match="results:begin"):
        write_card(card, "block")
    assert card.read_text() == f"{CARD_END} {CARD_BEGIN}"
    with pytest.raises(ConfigError, match="results:begin"):
        write_card(tmp_path / "missing.md", "block")
