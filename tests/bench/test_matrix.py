"""The comparison in one command: its plan, whole runs against servers that answer without a model, tables, picture."""

import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from bench import matrix, plot, table
from bench.daemon import free_port
from bench.target import read_target

_ROOT = Path(__file__).parents[2]

_MATRIX = """
order = ["good", "absent", "good anchor"]
[traffic]
base = { adapters = 0, popularity = "identical" }
mixed = { adapters = 2, popularity = "distinct" }
[servers.good]
start_seconds = 1
cells = [
    { traffic = "mixed", concurrency = 2, requests = 4, expect = 1000 },
    { traffic = "base", concurrency = 1, requests = 2, expect = 1000, warmup = 1, mark = "anchor" },
    { traffic = "base", concurrency = 2, requests = 2, expect = 1000, mark = "late" },
]
[servers.absent]
start_seconds = 1
cells = [{ traffic = "base", concurrency = 1, requests = 2, expect = 1000 }]
"""


@pytest.fixture
def comparison(tmp_path: Path) -> list[str]:
    """Arguments for a matrix of one server that works and one that does not start."""
    (tmp_path / "matrix.toml").write_text(_MATRIX)
    port = free_port()
    (tmp_path / "good.toml").write_text(
        f'url = "http://127.0.0.1:{port}"\n'
        f'start = "$PYTHON -m tests.bench.fake_openai {port}"\n'
        f'[env]\nPYTHONPATH = "{_ROOT}"\n'
    )
    (tmp_path / "absent.toml").write_text(
        f'url = "http://127.0.0.1:{free_port()}"\nstart = "$PYTHON -c \'raise SystemExit(7)\'"\n'
    )
    files = ["--matrix", str(tmp_path / "matrix.toml"), "--peers", str(tmp_path)]
    return [*files, "--out", str(tmp_path / "results"), "--output-tokens", "4"]


def _run(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, dict[str, Any]]:
    status = matrix.main(arguments)
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return status, result


def test_a_server_that_does_not_start_costs_the_others_nothing_and_what_is_there_is_not_measured_again(
    comparison: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, result = _run(capsys, comparison)
    assert status == 1
    assert result["failed"] == ["absent.0"]
    results = tmp_path / "results"
    names = ["good.base.c1.0.json", "good.base.c1.1.json", "good.mixed.c2.0.json"]
    assert sorted(path.name for path in results.iterdir()) == names
    before = {path: path.stat().st_mtime_ns for path in results.iterdir()}
    (results / names[1]).unlink()
    status, result = _run(capsys, [*comparison, "--only", "^good"])
    assert status == 0
    assert result["num_files"] == 3
    again = {path for path in results.iterdir() if path.stat().st_mtime_ns != before[path]}
    assert again == {results / names[1]}


def test_a_result_says_what_was_asked_and_on_what(
    comparison: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(capsys, [*comparison, "--only", "good.mixed"])
    result = json.loads((tmp_path / "results" / "good.mixed.c2.0.json").read_text())
    assert result["cell"] == {"server": "good", "traffic": "mixed", "concurrency": 2}
    assert result["load"]["adapters"] == ["adapter-00", "adapter-01"]
    assert result["median"]["num_requests"] == 4
    assert result["median"]["output_tokens"] == 16
    assert result["machine"]["num_cpus"] == len(os.sched_getaffinity(0))
    assert sys.executable not in json.dumps(result)


def test_a_server_is_started_as_another_description_says(
    comparison: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.toml").rename(tmp_path / "better.toml")
    status, result = _run(capsys, [*comparison, "--only", "good.mixed", "--instead", "good=better"])
    assert (status, result["num_files"]) == (0, 1)
    assert (
        json.loads((tmp_path / "results" / "good.mixed.c2.0.json").read_text())["target"]["name"] == "better"
    )
    assert "good's is better." in table.machine_line(tmp_path / "results")
    assert matrix.main([*comparison, "--instead", "godo=better"]) == 1
    assert "--instead names godo; " in capsys.readouterr().err


def test_what_does_not_fit_the_budget_is_left_out_and_said(
    comparison: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, result = _run(capsys, [*comparison, "--budget", "0.001"])
    assert status == 0
    assert result["num_left_out"] == 4
    assert not (tmp_path / "results").exists()


def test_a_plan_runs_nothing(
    comparison: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert matrix.main([*comparison, "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == ["good", "absent", "good", "together,"]
    assert not (tmp_path / "results").exists()


def test_a_server_without_cells_in_the_order_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "matrix.toml"
    path.write_text(_MATRIX.replace('"absent", ', '"absnet", '))
    with pytest.raises(ValueError, match=r"'absnet'.*allowed are good, absent"):
        matrix.read_matrix(path)
    path.write_text(_MATRIX.replace('traffic = "mixed"', 'traffic = "mixde"'))
    with pytest.raises(ValueError, match="'mixde'; allowed are base, mixed"):
        matrix.read_matrix(path)


def test_every_row_of_the_tables_is_measured_by_the_matrix_and_ours_three_times() -> None:
    visits = matrix.read_matrix(_ROOT / "bench" / "matrix.toml")
    cells = [table.Key(c.server, c.traffic, c.concurrency) for visit in visits for c in visit.cells]
    for traffic, concurrency, peers, _ in table.VERSUS:
        assert cells.count(table.Key("adapterd", traffic, concurrency)) >= 3
        for peer in peers:
            assert table.Key(peer, traffic, concurrency) in cells
    for _, server, traffic, concurrency, _, _ in table.TAX:
        assert table.Key(server, traffic, concurrency) in cells
        assert cells.count(table.Key("adapterd", "base", concurrency)) >= 3
    for server in {key.server for key in cells}:
        assert read_target(_ROOT / "bench" / "peers" / f"{server}.toml").name == server


def test_a_step_with_eight_adapters_of_rank_16_reads_17_percent_more() -> None:
    assert 1 / table.byte_ratio((16,) * 8) == pytest.approx(1.17, abs=0.005)
    assert table.byte_ratio(()) == 1


def _write(directory: Path, server: str, traffic: str, concurrency: int, rates: list[float]) -> None:
    directory.mkdir(exist_ok=True)
    for visit, rate in enumerate(rates):
        spread = {"p50": 0.5, "p95": 1.0, "p99": 1.0}
        result = {
            "cell": {"server": server, "traffic": traffic, "concurrency": concurrency},
            "visit": visit,
            "machine": {
                "date": "2026-11-23T15:00Z", "cpu": "Some CPU", "cpu_flags": ["avx512f"], "num_cpus": 2,
                "busy_cpus": 0.01, "packages": {"torch": "2.13.0"},
            },
            "target": {"name": server},
            "median": {
                "output_tokens_per_second": rate, "ttft_seconds": spread, "itl_seconds": spread,
                "peak_rss_bytes": 2e9, "startup_seconds": 5.0, "num_errors": 0,
            },
        }  # fmt: skip
        (directory / f"{server}.{traffic}.c{concurrency}.{visit}.json").write_text(json.dumps(result))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    directory = tmp_path / "results"
    _write(directory, "adapterd", "base", 8, [50.0, 60.0, 40.0])
    _write(directory, "adapterd", "mixed8", 8, [40.0, 36.0, 36.0])
    _write(directory, "adapterd-base", "base", 8, [50.0])
    _write(directory, "vllm", "base", 8, [40.0])
    _write(directory, "llamacpp-base", "base", 8, [20.0])
    _write(directory, "vllm-lora", "mixed8", 8, [8.0])
    return directory


def test_the_table_compares_medians_with_the_better_peer(results: Path) -> None:
    lines = table.versus_table(table.read_results(results))
    (base,) = [line for line in lines if line.startswith("| base | 8 |")]
    assert base == "| base | 8 | 50.0 | 20.0 | 40.0 | **1.25** | 1 | 0.50, 0.50 s |"
    (mixed,) = [line for line in lines if line.startswith("| 8 mixed | 8 |")]
    assert "**4.50** | 4 |" in mixed
    (missing,) = [line for line in lines if line.startswith("| 32 mixed | 16 |")]
    assert missing.count("not measured") == 3


def test_the_tax_is_held_against_what_bytes_allow(results: Path) -> None:
    lines = table.tax_table(table.read_results(results))
    (row,) = [line for line in lines if line.startswith("| 8 distinct | 8 |")]
    assert row == "| 8 distinct | 8 | 36.0 | 0.80 | 0.85 | **0.94** | 0.9 |"
    (holding,) = [
        line for line in lines if line.startswith("| base traffic, 32 adapters held, over none held | 8 ")
    ]
    assert "**1.00** | 0.99 |" in holding


def test_tables_go_between_their_markers_and_nowhere_else(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    (begin, end), (other_begin, other_end) = table.markers(), table.markers("other")
    page.write_text(f"before\n{begin}\nold\n{end}\n{other_begin}\nstays\n{other_end}\nafter\n")
    assert table.main([str(results), "--into", str(page)]) == 0
    first = page.read_text()
    assert first.startswith("before\n")
    assert first.endswith("\nafter\n")
    assert "old" not in first
    assert "| 8 mixed | 8 |" in first
    assert "\nstays\n" in first
    assert table.main([str(results), "--into", str(page)]) == 0
    assert page.read_text() == first
    assert table.main([str(results), "--into", str(page), "--markers", "other"]) == 0
    assert page.read_text().count("| traffic | at once |") == 2
    page.write_text("no markers")
    assert table.main([str(results), "--into", str(page)]) == 1
    assert page.read_text() == "no markers"


def test_the_picture_shows_every_figure_and_no_bar_for_what_is_missing(results: Path, tmp_path: Path) -> None:
    peft = tmp_path / "peft.json"
    runs = [{"batch": 8, "adapters": count, "output_tokens_per_second": 13.4} for count in (0, 8)]
    peft.write_text(json.dumps({"runs": runs}))
    out = tmp_path / "docs" / "speed.svg"
    assert plot.main([str(results), "--peft", str(peft), "--out", str(out)]) == 0
    picture = ElementTree.fromstring(out.read_text())
    texts = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"50.0", "40.0", "20.0", "8.0", "13.4", "PEFT, offline", "32 mixed, 16 at once"} <= set(texts)
    colours = [rect.get("fill") for rect in picture.iter("{http://www.w3.org/2000/svg}rect")]
    assert colours.count(plot.SERIES["adapterd"][1]) == 2 + 1  # two loads and the legend
    assert colours.count(plot.SERIES["peft"][1]) == 2 + 1


def test_a_directory_without_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main([str(tmp_path)]) == 1
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "x.svg")]) == 1
    assert "has no results of bench.matrix" in capsys.readouterr().err


def test_no_prompt_is_asked_twice_in_a_visit_and_every_server_is_asked_the_same() -> None:
    cells = [
        matrix.Cell("ours", "base", 0, "identical", concurrency=1, requests=3, expect=10.0),
        matrix.Cell("ours", "base", 0, "identical", concurrency=8, requests=3, expect=10.0),
        matrix.Cell("ours", "one", 1, "identical", concurrency=8, requests=3, expect=10.0),
    ]
    seeds = [cell.load(visit).seed for cell in cells for visit in (0, 1)]
    assert len(set(seeds)) == len(seeds)
    theirs = matrix.Cell("theirs", "base", 0, "identical", concurrency=8, requests=3, expect=99.0)
    assert theirs.load(1).seed == cells[1].load(1).seed
