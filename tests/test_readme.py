"""The README is true: its transcript is made again, and each of its commands is run as it stands there."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.check.manifests import render
from tests.serving import served
from tests.transcript import README, ROOT, make_transcript, transcript_in

TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
NEEDS_SERVER = [code for language, code in BLOCKS if language == "sh" and "localhost:8000" in code]
STANDS_ALONE = [
    line.partition("#")[0].strip()
    for language, code in BLOCKS
    if language == "sh" and "localhost:8000" not in code
    for line in code.strip().splitlines()
]
PYTHON = [code for language, code in BLOCKS if language == "python"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served("--adapters", str(ROOT / "adapters"), "--allow-runtime-adapters", cwd=ROOT) as address:
        yield address


def run(command: list[str], *, cwd: Path = ROOT) -> str:
    """In a shell whose `adapterd` and `python` are those under test."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_transcript_is_what_the_models_say(url: str) -> None:
    assert make_transcript(url) == transcript_in(TEXT)


@pytest.mark.parametrize("code", NEEDS_SERVER)
def test_commands_to_a_running_daemon_work(code: str, url: str) -> None:
    out = run(["bash", "-euc", code.replace("http://localhost:8000", url)])
    assert '"error"' not in out


@pytest.mark.parametrize("code", PYTHON)
def test_python_examples_work(code: str, url: str) -> None:
    assert run([sys.executable, "-W", "error", "-c", code.replace("http://localhost:8000", url)])


CUT_SHORT = {
    "train": "--epochs 0.05",
    "eval": "--limit 10",
    "estimate": "--probe-seconds 1",
    "serve": "--help",
}


@pytest.mark.parametrize("command", STANDS_ALONE)
def test_other_commands_work_on_a_copy(command: str, tmp_path: Path) -> None:
    """Training and evaluation, cut short; `make` targets are looked up, not run, since one of them runs this; what
    needs Docker or a cluster is looked up too."""
    for name in ("adapters", "adapterd", "Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    program, *arguments = command.split()
    if program == "make":
        run(["make", "--dry-run", *arguments], cwd=tmp_path)
    elif command.startswith("docker compose -f "):
        assert "services:" in (ROOT / arguments[2]).read_text()
    elif command.startswith("kubectl apply -k "):
        assert render(ROOT / arguments[2]).of("Deployment")
    else:
        assert program == "adapterd"
        run(["bash", "-euc", f"{command} {CUT_SHORT.get(arguments[0], '')}"], cwd=tmp_path)
