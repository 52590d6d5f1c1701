"""Every command of bench/README.md is one that its program takes, about files that are there."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from bench import serve, table
from bench.target import read_target

_ROOT = Path(__file__).parents[2]
_README = (_ROOT / "bench" / "README.md").read_text()
_BLOCKS = "\n".join(re.findall(r"^```sh\n(.*?)^```", _README, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
COMMANDS: list[tuple[str, str]] = re.findall(r"python -m (bench\.[\w.]+)([^\n]*)", _BLOCKS)


def _parsed(module: str, line: str) -> Any:
    if module.startswith("bench.gpu_"):
        pytest.importorskip("triton")
    return importlib.import_module(module).parse_arguments(shlex.split(line, comments=True))


def test_no_command_is_overlooked() -> None:
    assert len(COMMANDS) == _README.count("python -m bench.")


@pytest.mark.parametrize(("module", "line"), COMMANDS)
def test_commands_are_taken(module: str, line: str) -> None:
    assert vars(_parsed(module, line))


@pytest.mark.parametrize("line", [line for module, line in COMMANDS if module == "bench.serve"])
def test_loads_and_servers_can_be_read(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(_ROOT)
    arguments = _parsed("bench.serve", line)
    for path in [arguments.server, *(arguments.compare or ())]:
        assert path is None or read_target(path).start
    assert serve.load_of(arguments).num_requests > 0


@pytest.mark.parametrize("line", [line for module, line in COMMANDS if module == "bench.table"])
def test_files_for_tables_have_the_markers(line: str) -> None:
    arguments = _parsed("bench.table", line)
    assert arguments.into
    begin, end = table.markers(arguments.markers)
    for file in arguments.into:
        text = table.write_between_markers((_ROOT / file).read_text(), "a table", arguments.markers)
        assert f"{begin}\na table\n{end}" in text


@pytest.mark.parametrize("script", sorted(set(re.findall(r"bench/peers/\w+\.sh", _BLOCKS))))
def test_scripts_are_there(script: str) -> None:
    assert (_ROOT / script).is_file()
