"""The load generator: its arithmetic, and whole runs against a server that answers without a model."""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.client import LoadRequest, Record
from bench.report import median_of, meets, parse_objective, percentile, ratios, summarise
from bench.serve import main
from bench.target import Target, read_target
from bench.workload import (
    Lengths,
    arrival_seconds,
    assign_adapters,
    read_trace,
    requests_by_adapter,
    text_prompt,
    token_prompt,
)

from .fake_openai import TOKEN_SECONDS, fake_openai


@pytest.mark.parametrize("percent", [0, 50, 95, 99, 100])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_percentiles_are_numpys(percent: float, count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    assert percentile(list(values), percent) == pytest.approx(np.percentile(values, percent))


def test_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


# Punica's own get_lora_lens gives these.
@pytest.mark.parametrize(
    ("num_requests", "popularity", "expected"),
    [
        (32, "identical", [32]),
        (4, "distinct", [1, 1, 1, 1]),
        (32, "uniform", [6, 6, 5, 5, 5, 5]),
        (16, "uniform", [4, 4, 4, 4]),
        (1, "uniform", [1]),
        (32, "zipf:1.5", [11, 7, 5, 3, 2, 2, 1, 1]),
        (1, "zipf:1.5", [1]),
    ],
)
def test_popularity_deals_requests_as_punica_does(
    num_requests: int, popularity: str, expected: list[int]
) -> None:
    assert requests_by_adapter(num_requests, popularity) == expected


@pytest.mark.parametrize("popularity", ["identical", "distinct", "uniform", "zipf:1.5"])
def test_every_request_has_an_adapter(popularity: str) -> None:
    chosen = assign_adapters(1000, 1000, popularity, seed=3)
    counts = sorted((chosen.count(adapter) for adapter in set(chosen)), reverse=True)
    assert counts == requests_by_adapter(1000, popularity)


def test_distinct_never_repeats_an_adapter_within_as_many_requests_as_there_are() -> None:
    chosen = assign_adapters(40, 8, "distinct", seed=0)
    assert all(len(set(chosen[i : i + 8])) == 8 for i in range(33))


def test_assignments_depend_on_the_seed_alone() -> None:
    assert assign_adapters(100, 8, "zipf:1.5", seed=1) == assign_adapters(100, 8, "zipf:1.5", seed=1)
    assert assign_adapters(100, 8, "zipf:1.5", seed=1) != assign_adapters(100, 8, "zipf:1.5", seed=2)


@pytest.mark.parametrize("popularity", ["zipf:1", "zipf", "zipf:x", "even", ""])
def test_an_unknown_popularity_is_refused_by_name(popularity: str) -> None:
    with pytest.raises(ValueError, match="allowed are identical"):
        requests_by_adapter(8, popularity)


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_gaps_between_arrivals_have_the_mean_and_variation_asked_for(cv: float) -> None:
    moments = arrival_seconds(20_000, rate=10.0, cv=cv, seed=1)
    gaps = np.diff(moments)
    assert moments[0] == 0
    assert gaps.mean() == pytest.approx(0.1, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_arrivals_depend_on_the_seed_alone() -> None:
    assert arrival_seconds(50, 2.0, 1.0, seed=7) == arrival_seconds(50, 2.0, 1.0, seed=7)
    assert arrival_seconds(50, 2.0, 1.0, seed=7) != arrival_seconds(50, 2.0, 1.0, seed=8)


def test_prompts_have_their_length_and_are_new_for_every_seed() -> None:
    assert len(token_prompt(128, range(10, 20), "a")) == 128
    assert set(token_prompt(128, range(10, 20), "a")) <= set(range(10, 20))
    assert token_prompt(128, range(1000), "a") != token_prompt(128, range(1000), "b")
    assert len(text_prompt(7, ["x", "y"], "a").split()) == 8


def test_a_trace_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"prompt_tokens": 5, "output_tokens": 2}\n{"prompt_tokens": 7, "output_tokens": 1}\n')
    assert read_trace(path) == [Lengths(5, 2), Lengths(7, 1)]
    path.write_text('{"prompt_tokens": 5, "output_tokens": 2, "adapter": "a"}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_trace(path)
    path.write_text('{"prompt_tokens": 5, "output_tokens": 0}\n')
    with pytest.raises(ValueError, match="at least 1"):
        read_trace(path)


def _record(start: float, chunks: list[float], tokens: int | None = None, error: str | None = None) -> Record:
    request = LoadRequest("/v1/completions", {}, prompt_tokens=10, output_tokens=len(chunks))
    end = chunks[-1] if chunks else start
    count = len(chunks) if tokens is None else tokens
    return Record(request, start, chunks, end, prompt_tokens=10, completion_tokens=count, error=error)


def test_a_run_is_summed_up() -> None:
    figures = summarise([_record(0.0, [1.0, 1.5, 2.0]), _record(1.0, [3.0, 4.0, 5.0])], {})
    assert figures["wall_seconds"] == 5.0
    assert figures["output_tokens_per_second"] == pytest.approx(6 / 5)
    assert figures["requests_per_second"] == pytest.approx(2 / 5)
    assert figures["ttft_seconds"]["p50"] == pytest.approx(1.5)
    assert figures["itl_seconds"]["p50"] == pytest.approx(0.75)
    assert figures["tpot_seconds"]["p50"] == pytest.approx(0.75)
    assert figures["chunks_per_token"] == 1


def test_a_failed_request_is_counted_and_its_tokens_are_not() -> None:
    figures = summarise([_record(0.0, [1.0, 2.0]), _record(0.0, [1.0], error="cut off")], {})
    assert figures["num_errors"] == 1
    assert figures["errors"] == {"cut off": 1}
    assert figures["output_tokens"] == 2


def test_goodput_counts_the_requests_that_met_every_bound() -> None:
    records = [
        _record(0.0, [1.0, 1.1, 1.2]),
        _record(0.0, [3.0, 3.1, 3.2]),  # first token late
        _record(0.0, [1.0, 1.1, 4.0]),  # one gap too long
        _record(0.0, [], error="HTTP 500"),
    ]
    objective = parse_objective("ttft=2,itl=0.5")
    assert [meets(record, objective) for record in records] == [True, False, False, False]
    figures = summarise(records, objective)
    assert figures["objective_met"] == 0.25
    assert figures["goodput_requests_per_second"] == pytest.approx(1 / 4.0)


def test_an_unknown_objective_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'latency=3'"):
        parse_objective("ttft=1,latency=3")


def test_a_median_run_hides_no_error() -> None:
    runs = [summarise([_record(0.0, [1.0, 2.0]), _record(0.0, [], error="x")], {})] + [
        summarise([_record(0.0, [1.0, 2.0]), _record(0.0, [1.0, last])], {}) for last in (2.0, 4.0)
    ]
    merged = median_of(runs)
    assert merged["num_errors"] == 1
    assert merged["errors"] == {"x": 1}
    assert merged["wall_seconds"] == statistics.median([2.0, 2.0, 4.0])


def test_ratios_are_taken_round_by_round() -> None:
    first = [{"output_tokens_per_second": value} for value in (10.0, 20.0, 40.0)]
    second = [{"output_tokens_per_second": value} for value in (5.0, 10.0, 10.0)]
    assert ratios(first, second) == {"output tokens/s": 2.0}


def test_a_target_names_its_adapters() -> None:
    target = Target(model="qwen", adapter_model="{model}:{adapter}")
    assert target.body(None, 0, 2) == {"model": "qwen"}
    assert target.body("sql", 1, 2) == {"model": "qwen:sql"}
    by_number = Target(model="qwen", adapter_field="lora")
    assert by_number.body("sql", 1, 2)["lora"] == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 1.0}]
    assert all(entry["scale"] == 0 for entry in by_number.body(None, 0, 2)["lora"])


def test_an_unknown_key_of_a_description_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "peer.toml"
    path.write_text('url = "http://127.0.0.1:1"\nmodle = "x"\n')
    with pytest.raises(ValueError, match="modle"):
        read_target(path)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "bench" / "peers").glob("*.toml")))
def test_the_peers_descriptions_can_be_read(path: Path) -> None:
    assert read_target(path).start


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--prompt-tokens", "20", "--output-tokens", "10"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_a_closed_loop_reports_what_the_server_did(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_openai() as (url, seen):
        result = _run(capsys, "--url", url, "--adapters", "a,b", "--concurrency", "2", "--requests", "6")
    figures = result["runs"][0]
    assert figures["num_requests"] == 6
    assert figures["num_errors"] == 0
    assert figures["output_tokens"] == 60
    assert figures["prompt_tokens"] == 120
    assert figures["chunks_per_token"] == 1
    assert figures["itl_seconds"]["p50"] >= 0.9 * TOKEN_SECONDS
    assert figures["ttft_seconds"]["p50"] >= 0.9 * TOKEN_SECONDS
    measured = seen[-6:]
    assert sorted(body["model"] for body in measured) == ["a", "a", "a", "b", "b", "b"]
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in measured)
    assert len({tuple(body["prompt"]) for body in measured}) == 6


def test_an_open_loop_sends_at_its_own_pace(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_openai() as (url, _):
        result = _run(capsys, "--url", url, "--rate", "50", "--requests", "10", "--slo", "ttft=5")
    figures = result["runs"][0]
    assert figures["num_errors"] == 0
    assert figures["objective_met"] == 1
    assert figures["wall_seconds"] >= arrival_seconds(10, 50, 1.0, seed=0)[-1]


def test_texts_have_the_length_asked_for_whatever_the_template_adds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with fake_openai() as (url, seen):
        chat = _run(capsys, "--url", url, "--prompt", "chat", "--requests", "2")
        text = _run(capsys, "--url", url, "--model", "no-ids", "--requests", "2")
    for result, form in ((chat, "chat"), (text, "text")):
        assert result["runs"][0]["prompt_form"] == form
        assert result["runs"][0]["num_wrong_prompt_length"] == 0
    assert seen[-1]["path"] == "/v1/completions"


@pytest.mark.parametrize(
    ("model", "key", "value"),
    [("short", "num_wrong_output_length", 2), ("pairs", "chunks_per_token", 0.5)],
)
def test_counts_that_do_not_agree_are_shown(
    capsys: pytest.CaptureFixture[str], model: str, key: str, value: float
) -> None:
    with fake_openai() as (url, _):
        assert main(["--url", url, "--model", model, "--requests", "2", "--output-tokens", "10"]) == 0
    shown = capsys.readouterr().out
    assert "WARNING" in shown
    assert json.loads(shown.splitlines()[-1])["runs"][0][key] == value


def test_a_server_that_fails_every_request_fails_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_openai() as (url, _):
        assert main(["--url", url, "--model", "broken"]) == 1
        assert "HTTP 400" in capsys.readouterr().err
        assert main(["--url", url, "--model", "cut"]) == 1
        assert "cut off" in capsys.readouterr().err
