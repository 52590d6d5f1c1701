"""The command line, as a person meets it."""

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import adapterd
from adapterd.cli import EXIT_USAGE, build_parser, main
from adapterd.config import COMMANDS, Settings, flag


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAPTERD_CONFIG", raising=False)


@pytest.mark.parametrize("settings", COMMANDS)
def test_help_lists_every_setting(settings: type[Settings], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*settings.command.split(), "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert all(flag(field) in text for field in settings.model_fields.keys() - {settings.positional})


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"adapterd {adapterd.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["serve", "--port", "x"], "adapterd: --port: 'x' should be a valid integer"),
        (["serve", "--host", "0.0.0.0"], "adapterd: --host 0.0.0.0 can be reached from other machines"),
        (["serve", "--api-key-file", "nowhere"], "adapterd: cannot read nowhere: No such file"),
        (["serve", "--config", "nowhere.toml"], "adapterd: cannot read nowhere.toml: No such file"),
        (["train", "--name", "x"], "adapterd: --data is required"),
        (["train", "nowhere.toml"], "adapterd: cannot read nowhere.toml: No such file"),
        (["eval", "nowhere", "--limit", "0"], "adapterd: --limit: '0' should be greater than or equal to 1"),
    ],
)
def test_a_mistake_is_one_line_and_no_traceback(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == EXIT_USAGE
    error = capsys.readouterr().err
    assert error.startswith(line)
    assert error.count("\n") == 1


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["serve", "--prot", "1"])
    assert left.value.code == EXIT_USAGE


def test_a_message_names_no_flag_that_does_not_exist() -> None:
    known = {option for parser in _parsers(build_parser()) for option in parser._option_string_actions}
    package = Path(adapterd.__file__).parent
    named = {
        (found, path.name)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for found in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", node.value)
    }
    others = {("--portable", "__main__.py"), ("--portable", "__init__.py")}  # of adapterd.model.native
    assert {(option, path) for option, path in named if option not in known} == others


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _parsers(child)


@pytest.mark.parametrize("command", ["serve", "check", "estimate", "train", "eval"])
def test_help_loads_no_model_library(command: str) -> None:
    code = (
        "import sys, adapterd.cli\n"
        f"try: adapterd.cli.main([{command!r}, '--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    root = Path(adapterd.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"adapterd {command}" in done.stdout
