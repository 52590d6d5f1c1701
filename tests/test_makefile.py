"""What make remembers between its runs, tried on a copy whose Python only notes that it was called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_operators_that_could_not_be_built_are_tried_again(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python, calls, status = tmp_path / ".venv/bin/python", tmp_path / "calls", tmp_path / "status"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexit $(cat {status})\n')
    python.chmod(0o755)
    (tmp_path / ".venv/.installed").touch()

    def make() -> int:
        """How often Python has been called by now; make itself has nothing to complain of."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        command = ["make", "--silent", ".venv/.native"]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        return calls.read_text().count("-m adapterd.model.native")

    status.write_text("1")  # no compiler
    assert [make(), make()] == [1, 2]
    status.write_text("0")
    assert [make(), make()] == [3, 3]
