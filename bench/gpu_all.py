"""All that can be shown on a CUDA device in one command: tests, decoding, uploads, 8 bits, the daemon over HTTP.

Each part is a process of its own with a time limit, so that one that fails or hangs costs the others nothing; what
a part finds out is written as it comes. The summaries stand last, those of parts that were cut short too. Limits add
up to what all may take, and the parts that say most stand first.

A part of tests that all skip is "skipped", not passed, and the reasons stand in the summary. The exit status is 1 if a
part failed, was cut short or left out, and 3 if parts were only skipped. `http` needs the server's packages; where the
device's machine has no network, bench/gpu_wheels.py carries them there.

    python -m bench.gpu_all --out DIRECTORY                    # nine minutes at most, on a device with 40 GB
    python -m bench.gpu_all --out DIRECTORY --only decode --profile
    python -m bench.gpu_all --out DIRECTORY --only tests,http --minutes 4
    python -m bench.gpu_all --out DIRECTORY --try-out           # on a CPU with a tiny model: does each part run?

DIRECTORY gets one JSON file for each part with figures, `log.txt`, and `summary.txt`.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

import torch

from bench import gpu_figures, gpu_linear, gpu_upload, kernels
from bench.gpu_device import describe
from bench.report import machine

ROOT = Path(__file__).parent.parent
PARTS = ("upload", "http", "int8", "tests", "decode", "linear", "kernels")
_TINY = ("--device", "cpu", "--shape", "tiny", "--dtype", "float32", "--kernels", "torch")
_TINY_DECODE = (
    *_TINY,
    "--prompt-tokens",
    "20",
    "--output-tokens",
    "8",
    "--megabytes",
    "1",
    "--prefill",
    "32",
)
_MIN_SECONDS = 20.0
"""No part begins with less than this left for all."""

_LAST_WORDS_SECONDS = 8.0
_ONLY_SKIPPED = 3
"""Exit status, since a part that was skipped has shown nothing. argparse takes 2."""

TABLES = {
    "gpu_decode": gpu_figures.table,
    "gpu_upload": gpu_upload.table,
    "gpu_linear": gpu_linear.table,
    "kernels": kernels.table,
}
"""By the name under which a bench keeps its figures."""


@dataclass(frozen=True)
class Part:
    """A command, how long it may take, and the file of its figures."""

    name: str
    command: list[str]
    limit_seconds: float
    figures: Path | None = None


def parts_of(names: Sequence[str], out: Path, *, profile: bool, try_out: bool) -> list[Part]:
    """The commands, in the order in which they are asked for."""
    decode = [sys.executable, "-m", "bench.gpu_decode", "--out", str(out / "decode.json")]
    upload = [sys.executable, "-m", "bench.gpu_upload", "--out", str(out / "upload.json")]
    int8 = [sys.executable, "-m", "bench.gpu_decode", "--out", str(out / "int8.json")]
    int8 += ["--quantization", "int8", "--cases", "1:base,32:base,32:distinct", "--prefill", "512"]
    linear = [sys.executable, "-m", "bench.gpu_linear", "--out", str(out / "linear.json"), "--tokens", "1,32"]
    operators = [sys.executable, "-m", "bench.kernels", "--out", str(out / "kernels.json"), "--ranks", "16"]
    if try_out:
        linear += ["--device", "cpu", "--shape", "tiny", "--dtype", "float32", "--megabytes", "1"]
        linear += ["--products", "qkv"]
        operators += ["--shape", "tiny", "--dtype", "float32", "--kernels", "torch"]
        decode += [*_TINY_DECODE, "--cases", "1:base,2:distinct"]
        upload += [*_TINY, "--others", "2", "--newcomers", "3"]
        int8 += [*_TINY_DECODE, "--cases", "1:base"]
    else:
        operators += ["--device", "cuda", "--shape", "llama-3-8b"]
    if profile:
        decode.append("--profile")
        int8 += ["--profile", "--profile-cases", "1:base"]
    tests = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/gpu/test_*.py"))
    http = [path for path in tests if path.endswith("test_http.py")]
    device_tests = [path for path in tests if path not in http]
    # The tests of Triton's kernels that otherwise run in its interpreter, here on the device.
    device_tests += sorted(
        str(path.relative_to(ROOT))
        for path in ROOT.glob("tests/model/test_*.py")
        if "tests.triton_kernels" in path.read_text()
    )
    if try_out:
        device_tests = [path for path in device_tests if path.endswith("test_pointwise_triton.py")]
    known = [
        Part("upload", upload, 70, out / "upload.json"),
        Part("http", _pytest(http, in_parallel=False), 95),
        Part("int8", int8, 60, out / "int8.json"),
        Part("tests", _pytest(device_tests, in_parallel=not try_out), 105),
        Part("decode", decode, 105, out / "decode.json"),
        Part("linear", linear, 60, out / "linear.json"),
        Part("kernels", operators, 45, out / "kernels.json"),
    ]
    if try_out:  # a CPU may be busy with other things
        known = [replace(part, limit_seconds=5 * part.limit_seconds) for part in known]
    by_name = {part.name: part for part in known}
    return [by_name[name] for name in names]


def _pytest(files: Sequence[str], *, in_parallel: bool) -> list[str]:
    # Another version of Python, torch or transformers warns of other things.
    command = [sys.executable, "-m", "pytest", "-v", "-rfEs", "--tb=short", "-W", "default"]
    command += ["-p", "no:cacheprovider", "-p", "no:benchmark", "--durations=8"]
    if find_spec("pytest_timeout") is not None:
        command += ["--timeout", "100"]
    if in_parallel and find_spec("xdist") is not None:
        command += ["-n", "8"]
    return [*command, *files]


def run(part: Part, log: TextIO, seconds_left: float) -> str:
    """Run a part to its end or limit, its output shown and kept; how it ended, in a few words."""
    limit = min(part.limit_seconds, seconds_left)
    if seconds_left < _MIN_SECONDS:
        return "left out: no time"
    print(f"== {part.name}: {' '.join(part.command[1:])}", flush=True)
    log.write(f"== {part.name}: {' '.join(part.command[1:])}\n")
    log.flush()
    began = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        part.command,
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        status = process.wait(limit)
        ended = "passed" if status == 0 else f"exit status {status}"
    except subprocess.TimeoutExpired:
        ended = f"stopped at {limit:.0f} s"
        # pytest then names what has failed so far.
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(_LAST_WORDS_SECONDS)
    _end_group(process)
    return f"{ended}, {time.monotonic() - began:.0f} s"


def judged(part: Part, ended: str, output: str) -> str:
    """How it ended, where tests that were skipped are not taken for some that passed."""
    if part.figures is not None or not ended.startswith(("passed", "exit status 5,")):  # 5: pytest found none
        return ended
    last = output.rstrip().rpartition("\n")[2]
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|skipped)", last)}
    took = ended.rpartition(", ")[2]
    if not counts.get("passed"):
        return f"skipped: none of {counts.get('skipped', 0)} tests ran, {took}"
    return f"passed: {counts['passed']} tests, {counts.get('skipped', 0)} skipped, {took}"


def status_of(endings: Sequence[str], *, try_out: bool) -> int:
    """Of the whole: 0 if every part passed, 3 if some were skipped, 1 if anything else happened. Trying out on a CPU,
    what needs a device is skipped as it should be."""
    kinds = {re.split("[:,]", ended)[0] for ended in endings}
    if kinds - {"passed", "skipped"}:
        return 1
    return _ONLY_SKIPPED if "skipped" in kinds and not try_out else 0


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """What the part has started ends with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def summary_of(part: Part, ended: str, output: str) -> str:
    """The part's table, from its figures if it was cut short; of tests, what failed and the last line."""
    lines = [f"== {part.name}: {ended}"]
    figures = None
    if part.figures is not None and part.figures.exists():
        figures = json.loads(part.figures.read_text())
    if figures is not None:
        lines.append(TABLES[figures["bench"]](figures))
    elif part.figures is not None:
        lines += output.splitlines()[-12:]
    else:
        marks = ("FAILED ", " FAILED", "ERROR ", "SKIPPED [", "E  ")
        found = [line[:200] for line in output.splitlines() if any(mark in line for mark in marks)]
        lines += list(dict.fromkeys(found))[:30]
        lines += [line[:200] for line in output.splitlines()[-2:]]
    return "\n".join(lines)


def compare_int8(out: Path) -> str:
    """The decode step in 8 bits against 16, of the same run; empty if either is not there."""
    files = [out / "decode.json", out / "int8.json"]
    if not all(file.exists() for file in files):
        return ""
    wide, narrow = (json.loads(file.read_text()).get("decode", {}) for file in files)
    ratios = {
        name: wide[name]["step_seconds"] / narrow[name]["step_seconds"] for name in wide if name in narrow
    }
    return "\n".join(f"tokens/s of int8 over bfloat16, {name}: {ratio:.2f}" for name, ratio in ratios.items())


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    device = torch.device("cpu" if arguments.try_out else "cuda")
    gpu = describe(device)
    head = f"{gpu['name']}, driver {gpu.get('driver', '-')}, {gpu['packages']}, {machine()['date']}"
    print(head, flush=True)
    if arguments.try_out:
        os.environ["TRITON_INTERPRET"] = "1"
    summaries = [head]
    endings: list[str] = []
    names = arguments.only.split(",")
    parts = parts_of(names, out, profile=arguments.profile, try_out=arguments.try_out)
    for part in parts:
        if part.figures is not None:
            part.figures.unlink(
                missing_ok=True
            )  # of a run before: they would be shown for a part that did not come
    with (out / "log.txt").open("w+", encoding="utf-8", errors="replace") as log:
        for part in parts:
            start = log.tell()
            ended = run(part, log, 60 * arguments.minutes - (time.monotonic() - began))
            log.seek(start)
            output = log.read()
            ended = judged(part, ended, output)
            endings.append(ended)
            if not arguments.quiet:
                print(output[-arguments.tail :], flush=True)
            summaries.append(summary_of(part, ended, output))
            (out / "summary.txt").write_text("\n".join(summaries) + "\n")
    if {"decode", "int8"} <= set(names):
        summaries += filter(None, [compare_int8(out)])
    (out / "summary.txt").write_text("\n".join(summaries) + "\n")
    print("\n".join(["", *summaries]), flush=True)
    return status_of(endings, try_out=arguments.try_out)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_all",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="directory to write into")
    add("--only", default=",".join(PARTS), help="some of the parts, in this order")
    add("--minutes", type=float, default=9.0, help="of all parts together")
    add("--profile", action="store_true", help="kernels and Python's functions by time")
    add("--quiet", action="store_true", help="print the summaries alone; log.txt has the rest")
    add("--tail", type=int, default=4000, help="characters shown of each part's output")
    add("--try-out", action="store_true", help="a tiny model on the CPU")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.only.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--only {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
