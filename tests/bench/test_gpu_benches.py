"""The benches for a CUDA device run whole on a CPU, with a tiny model and torch's operators; a part fails alone."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench import gpu_all, gpu_decode, gpu_linear, gpu_upload
from bench.gpu_device import read_kernel
from bench.gpu_report import Report
from bench.gpu_trace import short_name, trace_of

TINY = ["--device", "cpu", "--shape", "tiny", "--dtype", "float32", "--kernels", "torch"]


def test_decode_bench_holds_every_mix_against_its_floor(tmp_path: Path) -> None:
    out = tmp_path / "decode.json"
    sizes = ["--prompt-tokens", "12", "--output-tokens", "6", "--prefill", "24", "--megabytes", "1"]
    cases = [
        "--cases",
        "2:base,2:distinct,4:zipf:1.5,4:uniform",
        "--profile",
        "--profile-cases",
        "2:distinct",
    ]
    assert gpu_decode.main([*TINY, *sizes, *cases, "--rounds", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["errors"] == {}
    decode = found["decode"]
    assert {name: mix["num_adapters"] for name, mix in decode.items()} == {
        "2:base": 0,
        "2:distinct": 2,
        "4:zipf:1.5": 3,
        "4:uniform": 2,
    }
    assert decode["2:distinct"]["floor_bytes"] > decode["2:base"]["floor_bytes"]
    assert decode["2:distinct"]["of_bytes_ratio"] > decode["2:distinct"]["of_base"]
    assert "of_base" not in decode["4:uniform"]  # its base was not asked for
    assert set(found["prefill"]) == {"24 tokens", "24 tokens, 1 adapter"}
    assert "function calls" in found["profiles"]["2:distinct"]["python"]


def test_upload_bench_sees_every_newcomer(tmp_path: Path) -> None:
    out = tmp_path / "upload.json"
    few = ["--others", "2", "--newcomers", "3", "--rounds", "1", "--period-ms", "20"]
    assert gpu_upload.main([*TINY, *few, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["errors"] == {}
    phases = found["phases"]
    assert [phases[kind]["num_newcomers"] for kind in gpu_upload.PHASES] == [0, 3, 3, 3]
    assert phases["new"]["use_ms"]["p50"] <= phases["new"]["first_token_ms"]["p50"]
    assert phases["new"]["upload_ms"]["p50"] > 0
    assert phases["prefetch"]["upload_ms"]["p50"] > 0


def test_bandwidth_kernel_reads_every_block_once() -> None:
    data = torch.arange(5 * 64, dtype=torch.float32)
    sums = torch.zeros(3)
    read_kernel[(3,)](data, sums, 5, BLOCK=64)
    assert float(sums.sum()) == float(data.sum())


def test_a_part_that_fails_is_kept_by_name_and_the_next_one_runs(tmp_path: Path) -> None:
    report = Report(tmp_path / "figures.json", bench="any")
    with report.part("first"):
        raise RuntimeError("no such device")
    with report.part("second"):
        report.keep("answer", 42)
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["errors"] == {"first": "RuntimeError: no such device"}
    assert found["answer"] == 42
    assert report.failed


def test_a_trace_is_by_step() -> None:
    events = [(0.0, 4.0, "gemm"), (5.0, 6.0, "norm"), (20.0, 24.0, "gemm"), (25.0, 27.0, "norm")]
    trace = trace_of(events, 2)
    assert [(kernel.name, kernel.count, kernel.us) for kernel in trace.kernels] == [
        ("gemm", 1.0, 4.0),
        ("norm", 1.0, 1.5),
    ]
    assert (trace.busy_us, trace.span_us) == (5.5, 13.5)
    assert trace.order == [(0.0, 4.0, "gemm"), (5.0, 2.0, "norm")]


def test_long_kernel_names_keep_their_start_and_end() -> None:
    name = short_name(
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, x, y, z>(int)"
    )
    assert name.startswith("vectorized_elementwise_kernel<4")
    assert len(name) == 64


def test_what_a_part_prints_and_how_it_ends_is_kept(tmp_path: Path) -> None:
    python = [
        sys.executable,
        "-c",
        "print('FAILED tests/gpu/test_x.py'); print('1 failed'); raise SystemExit(1)",
    ]
    part = gpu_all.Part("tests", python, 30)
    with (tmp_path / "log.txt").open("w+") as log:
        ended = gpu_all.run(part, log, 100)
        assert ended.startswith("exit status 1")
        log.seek(0)
        assert "FAILED tests/gpu/test_x.py" in gpu_all.summary_of(part, ended, log.read())
        assert gpu_all.run(part, log, 1) == "left out: no time"


def test_a_part_that_takes_too_long_is_interrupted_and_may_say_what_it_has(tmp_path: Path) -> None:
    program = (
        "import time\n"
        "try: print('started', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt: print('tests/gpu/test_x.py::test_y FAILED')"
    )
    part = gpu_all.Part("tests", [sys.executable, "-c", program], 1.5)
    with (tmp_path / "log.txt").open("w+") as log:
        ended = gpu_all.run(part, log, 100)
        log.seek(0)
        assert "test_y FAILED" in gpu_all.summary_of(part, ended, log.read())
    assert ended.startswith("stopped at 2 s")


@pytest.mark.parametrize(
    ("last", "kind", "said"),
    [
        ("= 4 skipped in 6.56s =", "skipped", "none of 4 tests ran"),
        ("= 119 passed, 2 skipped in 62.83s (0:01:02) =", "passed", "119 tests, 2 skipped"),
        ("= 27 passed in 7.65s =", "passed", "27 tests, 0 skipped"),
    ],
)
def test_tests_that_were_all_skipped_have_not_passed(last: str, kind: str, said: str) -> None:
    part = gpu_all.Part("http", [], 30)
    reason = "SKIPPED [4] tests/gpu/test_http.py:106: the server needs starlette"
    ended = gpu_all.judged(part, "passed, 7 s", f"{reason}\n{last}\n")
    assert ended == f"{kind}: {said}, 7 s"
    assert reason in gpu_all.summary_of(part, ended, f"{reason}\n{last}\n")


def test_a_failure_stays_one_whatever_was_skipped() -> None:
    ended = "exit status 1, 7 s"
    assert gpu_all.judged(gpu_all.Part("tests", [], 30), ended, "= 1 failed, 4 skipped in 6.5s =") == ended


@pytest.mark.parametrize(
    ("endings", "status", "tried_out"),
    [
        (["passed, 3 s", "passed: 4 tests, 0 skipped, 9 s"], 0, 0),
        (["passed, 3 s", "skipped: none of 4 tests ran, 9 s"], 3, 0),
        (["skipped: none of 4 tests ran, 9 s", "exit status 1, 3 s"], 1, 1),
        (["left out: no time"], 1, 1),
        (["stopped at 70 s, 70 s"], 1, 1),
    ],
)
def test_the_exit_status_tells_skipped_from_passed_and_failed(
    endings: list[str], status: int, tried_out: int
) -> None:
    assert gpu_all.status_of(endings, try_out=False) == status
    assert gpu_all.status_of(endings, try_out=True) == tried_out


def test_all_parts_fit_the_time_of_a_run(tmp_path: Path) -> None:
    minutes = gpu_all.parse_arguments(["--out", str(tmp_path)]).minutes
    parts = gpu_all.parts_of(gpu_all.PARTS, tmp_path, profile=False, try_out=False)
    assert sum(part.limit_seconds for part in parts) <= 60 * minutes


@pytest.mark.parametrize("try_out", [False, True])
@pytest.mark.parametrize("name", gpu_all.PARTS)
def test_every_part_is_a_command_that_its_program_takes(name: str, try_out: bool, tmp_path: Path) -> None:
    [part] = gpu_all.parts_of([name], tmp_path, profile=True, try_out=try_out)
    assert part.command[1] == "-m"
    if part.figures is None:
        files = [Path(word) for word in part.command if word.startswith("tests/")]
        assert files
        assert all((gpu_all.ROOT / file).exists() for file in files)
    else:
        program = importlib.import_module(part.command[2])
        assert program.parse_arguments(part.command[3:]).out == part.figures


def test_a_try_out_runs_parts_on_a_cpu_and_keeps_their_figures(tmp_path: Path) -> None:
    status = gpu_all.main(["--out", str(tmp_path), "--only", "http,kernels", "--try-out", "--quiet"])
    summary = (tmp_path / "summary.txt").read_text()
    assert status == 0, summary
    if not torch.cuda.is_available():
        assert "== http: skipped: none of" in summary
        assert "needs a CUDA device" in summary
    figures = json.loads((tmp_path / "kernels.json").read_text())
    assert figures["errors"] == {}
    assert {timing["workload"].partition(",")[0] for timing in figures["timings"]} == {
        "add_lora",
        "attention",
    }


def test_a_part_that_did_not_come_shows_no_figures_of_a_run_before(tmp_path: Path) -> None:
    (tmp_path / "kernels.json").write_text('{"bench": "kernels"}')
    (tmp_path / "decode.json").write_text('{"bench": "gpu_decode"}')
    assert gpu_all.main(["--out", str(tmp_path), "--only", "kernels", "--try-out", "--minutes", "0"]) == 1
    assert "== kernels: left out: no time" in (tmp_path / "summary.txt").read_text()
    assert not (tmp_path / "kernels.json").exists()
    assert (tmp_path / "decode.json").exists()


def test_products_are_timed_under_every_tiling_that_fits(tmp_path: Path) -> None:
    out = tmp_path / "made" / "linear.json"
    tiny = ["--device", "cpu", "--shape", "tiny", "--dtype", "float32", "--megabytes", "1"]
    assert gpu_linear.main([*tiny, "--products", "qkv", "--tokens", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["errors"] == {}
    [result] = found["results"]
    assert (result["product"], result["tokens"], result["left_out"]) == ("qkv", 2, [])
    assert set(result["gb_per_second"]) >= {"library", "library, adding", "64x64/1 s8 w4"}
    assert {"machine", "gpu", "settings", "gb_per_second"} <= found.keys()
