import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapterd.cli import EXIT_USAGE, main
from adapterd.config import EvalSettings
from adapterd.core import Request, RequestId, SamplingParams
from adapterd.daemon import Daemon
from adapterd.errors import AdapterRefused, ConfigError, InvalidRequest, ModelNotFound
from adapterd.evaluation.output import write_card
from adapterd.evaluation.run import evaluate
from adapterd.evaluation.task import answer_ids
from adapterd.file_names import CONFIG_FILE
from adapterd.render import Renderer
from adapterd.training.card import RESULTS_BEGIN, RESULTS_END
from adapterd.training.data import read_rows
from tests.evaluation.folders import evaluate_and_write, make_folders, row, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("evaluation")
    make_folders(directory)
    return directory


def told(folder: Path, **values: Any) -> EvalSettings:
    """Settings for the tiny base; cheap by default, and only what is given counts as given."""
    cheap = {"dtype": "float32", "device": "cpu", "adapter_memory": 8 << 20, "max_num_batched_tokens": 512}
    general = folder / "general.txt"
    general.write_text("The parcel has not arrived.\n\nHello there, how are you today?\n")
    defaults = {
        "base": str(folder / "base"),
        "adapters": (folder / "adapters",),
        "max_tokens": 12,
        "samples": 0,
        "shots": 2,
        "general": general,
    }
    return EvalSettings.model_validate(cheap | defaults | values)


def report_of(folder: Path, tmp_path: Path, **values: Any) -> list[dict[str, Any]]:
    out = tmp_path / "report.json"
    evaluate_and_write(told(folder, json_out=out, **values))
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def test_every_arm_is_reported_with_what_it_really_answers(folder: Path, tmp_path: Path) -> None:
    report = report_of(folder, tmp_path, system_prompt="Answer in two lines.")
    assert [(result["adapter"], result["num_rows"]) for result in report] == [("one", 6), ("two", 7)]
    daemon = Daemon.build(told(folder))
    daemon.registry.start()
    assert daemon.registry.wait_loaded(30)
    system = {"role": "system", "content": "Answer in two lines."}
    for result in report:
        name = result["adapter"]
        rows = read_rows(folder / "adapters" / name / "heldout.jsonl")
        lines = result["arms"]["shots"]["shots"]
        trained = {one.line: one for one in read_rows(folder / "adapters" / name / "train.jsonl")}
        shots = [message for line in lines for message in trained[line].messages]
        assert len(lines) == 2
        for arm, model, before in (
            ("base", "base", []),
            ("prompt", "base", [system]),
            ("shots", "base", shots),
            ("prompt+shots", "base", [system, *shots]),
            ("adapter", name, []),
        ):
            resolved = daemon.registry.resolve(model)
            lease = daemon.registry.lease(resolved.mix)
            texts, num_tokens = [], 0
            for one in rows:
                prompt = tuple(daemon.renderer.render([*before, *one.prompt]))
                request = Request(
                    id=RequestId("alone"),
                    prompt_token_ids=prompt,
                    params=SamplingParams(max_tokens=12, temperature=0.0),
                    mix=resolved.mix,
                    eos_token_ids=resolved.eos_token_ids,
                    arrival_seconds=0.0,
                )
                texts.append(daemon.generate([request])[RequestId("alone"), 0].text)
                num_tokens += len(prompt)
            lease.release()
            assert [asked["answers"][arm] for asked in result["rows"]] == texts
            assert result["arms"][arm]["cost"]["prompt_tokens"] == num_tokens
        assert result["digest"] == daemon.registry.resolve(name).digest
        assert set(result["arms"]) == {"base", "prompt", "shots", "prompt+shots", "adapter"}
        assert any(asked["answers"]["base"] != asked["answers"]["adapter"] for asked in result["rows"])
    daemon.registry.stop()


def test_losses_are_those_of_the_model_itself(folder: Path, tmp_path: Path) -> None:
    (result, _) = report_of(folder, tmp_path)
    settings = told(folder)
    daemon = Daemon.build(settings)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).requires_grad_(False)
    nats, count = 0.0, 0
    for one in read_rows(folder / "adapters" / "one" / "heldout.jsonl"):
        answer = [*daemon.renderer.encode_answer(one.answer), daemon.renderer.stop_token_id]
        ids = torch.tensor([[*daemon.renderer.render(one.prompt), *answer]])
        logprobs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        nats, count = nats - float(logprobs[-len(answer) :].sum()), count + len(answer)
    assert result["arms"]["base"]["loss"]["value"] == pytest.approx(nats / count, abs=1e-4)
    nats, count = 0.0, 0
    assert settings.general is not None
    for text in settings.general.read_text().strip().split("\n\n"):
        ids = torch.tensor([daemon.renderer.encode(text)])
        logprobs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        nats, count = nats - float(logprobs.sum()), count + ids.shape[1] - 1
    general = {arm: found["general_loss"] for arm, found in result["arms"].items()}
    assert general["base"]["value"] == pytest.approx(nats / count, abs=1e-4)
    assert general["adapter"]["value"] != pytest.approx(general["base"]["value"], abs=1e-3)
    assert general["shots"] is None  # a prompt takes no part in it
    assert not math.isnan(result["arms"]["adapter"]["loss"]["value"])


def test_agreement_over_seeds_is_a_share_of_pairs(folder: Path, tmp_path: Path) -> None:
    (cold,) = report_of(folder, tmp_path, adapter=("one",), samples=3, temperature=1e-5)
    (hot,) = report_of(folder, tmp_path, adapter=("one",), samples=3, temperature=5.0)
    assert cold["arms"]["base"]["scores"]["consistency"]["value"] > 0.9
    assert hot["arms"]["base"]["scores"]["consistency"]["value"] == 0
    assert hot["arms"]["base"]["scores"]["consistency"]["n"] == 6


def test_cards_reports_and_pages_show_the_same_and_no_time_in_a_card(folder: Path, tmp_path: Path) -> None:
    pages = {"markdown_out": tmp_path / "deep" / "report.md", "html_out": tmp_path / "report.html"}
    found = evaluate_and_write(told(folder, write_card=True, **pages))
    assert found.missed == ()
    text = found.report
    blocks = []
    for name in ("one", "two"):
        card = (folder / "adapters" / name / "README.md").read_text()
        assert card.startswith(f"# {name}\n\n{RESULTS_BEGIN}\n")
        assert card.endswith(f"{RESULTS_END}\n\nAfter.\n")
        assert "old" not in card.replace("Old", "")
        assert f"| `base` | `base + 2 shots` | `base:{name}` |" in card
        assert "| edge | 1 |" in card
        blocks.append(card.partition(f"{RESULTS_BEGIN}\n")[2].partition(f"\n{RESULTS_END}")[0])
        assert blocks[-1] in text
        assert not re.search(r"\d ms", blocks[-1])
    assert "| one request alone, median |" in text
    assert pages["markdown_out"].read_text() == text
    html = pages["html_out"].read_text()
    assert "base + 2 shots" in html
    assert "A: 1" in html
    assert "http" not in html.replace("http-equiv", "")
    evaluate_and_write(told(folder, write_card=True))
    again = [(folder / "adapters" / name / "README.md").read_text() for name in ("one", "two")]
    assert all(block in card for block, card in zip(blocks, again, strict=True))


def test_answers_in_a_page_are_text_and_never_markup(folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [row("<script>alert(1)</script>", "<b>x</b> | y")])
    out = tmp_path / "report.html"
    text = evaluate_and_write(told(folder, adapter=("one",), data=data, html_out=out, max_tokens=20)).report
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in out.read_text()
    assert "<script" not in out.read_text()
    assert "<b>x</b> \\| y" in text


def test_only_the_adapters_and_rows_asked_for(folder: Path, tmp_path: Path) -> None:
    data = folder / "adapters" / "two" / "heldout.jsonl"
    (result,) = report_of(folder, tmp_path, adapter=("one",), data=data, limit=3)
    assert (result["adapter"], result["num_rows"]) == ("one", 3)


def test_a_single_adapter_folder_may_be_given(folder: Path) -> None:
    found = evaluate(told(folder, adapters=(folder / "adapters" / "one",)))
    assert found.report.startswith("# one\n")


def test_examples_that_do_not_fit_the_context_are_left_out_and_said(folder: Path, tmp_path: Path) -> None:
    long = write_rows(tmp_path / "long.jsonl", [row("parcel " * 60, "A: 1\nB: 2"), row("Hi", "A: 2\nB: 2")])
    (result,) = report_of(folder, tmp_path, adapter=("one",), train=long, max_model_len=128)
    assert len(result["arms"].get("shots", {"shots": []})["shots"]) < 2
    assert any("of 2 examples fit the base's context" in note for note in result["notes"])


def test_heldout_prompts_that_were_trained_on_are_told(folder: Path, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "leak.jsonl", [row("ticket  3", "A: 1\nB: 2"), row("Other", "A: 2\nB: 2")])
    (result,) = report_of(folder, tmp_path, adapter=("one",), train=train)
    assert any(note.startswith("1 of the 6 held-out prompts") for note in result["notes"])
    assert result["arms"]["shots"]["shots"] == [2]


def test_rows_that_ask_for_facts_are_told_to_use_retrieval(folder: Path, tmp_path: Path) -> None:
    capitals = ["Oslo", "Lima", "Quito", "Accra", "Hanoi"]
    asked = [row(f"What is the capital of country {i}?", name) for i, name in enumerate(capitals)]
    data = write_rows(tmp_path / "facts.jsonl", asked)
    (result,) = report_of(folder, tmp_path, adapter=("one",), data=data)
    assert any(sentence.startswith("Use retrieval: 5 of 5") for sentence in result["verdict"])
    (result,) = report_of(folder, tmp_path, adapter=("one",))
    assert not any("retrieval" in sentence for sentence in result["verdict"])


def test_a_row_whose_reference_the_context_has_no_room_for_is_refused_by_line(folder: Path) -> None:
    renderer = Renderer.load(folder / "base")
    asked = read_rows(folder / "adapters" / "one" / "heldout.jsonl")[0]
    needed = len(renderer.render(asked.prompt)) + len(answer_ids(asked, renderer))
    some = {"adapter": ("one",), "limit": 1, "shots": 0}
    evaluate(told(folder, **some, max_model_len=needed))
    with pytest.raises(
        InvalidRequest, match=r"prompts of lines 1 leave no room in the context of \d+ tokens"
    ):
        evaluate(told(folder, **some, max_model_len=needed - 1))


def test_a_missed_limit_is_told_and_a_kept_one_is_not(folder: Path) -> None:
    found = evaluate(told(folder, adapter=("one",), fail_under=("exact=0.5", "general=0.0001")))
    assert found.missed == ("one: exact is 0.0000, under 0.5",)


def test_what_cannot_be_evaluated_is_refused(folder: Path, tmp_path: Path) -> None:
    for values, error, message in (
        ({"adapters": ()}, ConfigError, "name their folders"),
        ({"adapter": ("three",)}, ModelNotFound, r"no adapter 'three'.*one, two"),
        ({"adapters": (tmp_path,)}, ConfigError, "hold no adapter"),
        ({"metric": "chrf"}, ConfigError, "have no 'chrf'"),
        ({"metric": "nonsense"}, ConfigError, "'nonsense' is none of exact"),
        ({"peer_url": "http://localhost:1/v1"}, ConfigError, "--peer-model belong together"),
        ({"judge_model": "x"}, ConfigError, "--judge-model belong together"),
        ({"peer_price_in": 1.0}, ConfigError, "--peer-price-in means nothing without --peer-url"),
        ({"fail_under": ("exact",)}, ConfigError, "'exact' is not METRIC=VALUE"),
        ({"general": tmp_path / "none.txt"}, ConfigError, "cannot read"),
        ({"max_model_len": 16}, InvalidRequest, r"prompts of lines 1, 2, .* leave no room"),
    ):
        with pytest.raises(error, match=message):
            evaluate(told(folder, **values))


def test_what_the_settings_get_wrong_is_refused_before_anybody_is_asked(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="adapterd.evaluation")
    (tmp_path / "file").write_text("")
    labels = write_rows(tmp_path / "labels.jsonl", [row(f"Post {i}", "ab"[i % 2]) for i in range(6)])
    make_folders(tmp_path / "more")
    write_rows(tmp_path / "more" / "adapters" / "two" / "heldout.jsonl", [row("Hello", "Fine.")])
    two = {"base": str(tmp_path / "more" / "base"), "adapters": (tmp_path / "more" / "adapters",)}
    cards = make_folders_without_cards(tmp_path / "cards")
    for values, error, message in (
        ({"json_out": tmp_path}, ConfigError, "cannot write .*: it is a directory"),
        ({"html_out": tmp_path / "file" / "report.html"}, ConfigError, "cannot write .*report.html: "),
        ({"fail_under": ("chrf=0.5",), "data": labels}, ConfigError, "the rows of one have no 'chrf'"),
        ({"fail_under": ("exact@none=0.5",)}, ConfigError, "have no 'exact@none'"),
        ({"fail_under": ("judge=0.5",)}, ConfigError, "have no 'judge'"),
        ({"metric": "slots", **two}, ConfigError, "the rows of two have no 'slots'"),
        ({"metric": "consistency"}, ConfigError, "have no 'consistency'"),
        ({"write_card": True, **cards}, ConfigError, r"README.md has no .*results:begin"),
    ):
        with pytest.raises(error, match=message):
            evaluate(told(folder, **values))
    assert "asking" not in caplog.text
    evaluate(told(folder, adapter=("one",), samples=2, metric="consistency"))
    assert "asking base: 6 rows" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file that is always full")
def test_a_report_is_shown_though_a_file_of_it_cannot_be_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cheap = ["--device", "cpu", "--samples", "0", "--shots", "0", "--max-tokens", "12"]
    asked = ["eval", str(folder / "adapters" / "one"), "--base", str(folder / "base"), *cheap]
    assert main([*asked, "--json-out", "/dev/full"]) == EXIT_USAGE
    shown = capsys.readouterr()
    assert shown.out.startswith("# one\n")
    assert "cannot write /dev/full: No space left" in shown.err


def make_folders_without_cards(directory: Path) -> dict[str, Any]:
    make_folders(directory)
    (directory / "adapters" / "two" / "README.md").write_text("# two\n")
    return {"base": str(directory / "base"), "adapters": (directory / "adapters",)}


def test_an_adapter_that_does_not_load_is_refused(tmp_path: Path) -> None:
    make_folders(tmp_path)
    (tmp_path / "adapters" / "one" / CONFIG_FILE).write_text("{")
    with pytest.raises(AdapterRefused, match="cannot be read as JSON"):
        evaluate(told(tmp_path))


def test_card_without_markers_is_refused_and_left_alone(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"{RESULTS_END} {RESULTS_BEGIN}")
    with pytest.raises(ConfigError, match="results:begin"):
        write_card(card, "block")
    assert card.read_text() == f"{RESULTS_END} {RESULTS_BEGIN}"
    with pytest.raises(ConfigError, match="results:begin"):
        write_card(tmp_path / "missing.md", "block")
