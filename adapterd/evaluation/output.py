"""The files that an evaluation leaves: whether they can be written, asked before any work; and the writing."""

import os
from pathlib import Path

from adapterd.errors import ConfigError
from adapterd.training.card import RESULTS_BEGIN, RESULTS_END


def check_place(path: Path) -> None:
    """Raises ConfigError for a file that cannot be written. Makes its folder, not the file."""
    _make_folder(path)
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a directory")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"cannot write {path}: no permission")


def write_file(path: Path, text: str) -> None:
    """Raises ConfigError for a file that cannot be written."""
    _make_folder(path)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def check_card(path: Path) -> None:
    """Raises ConfigError for a model card that has no place for results, or cannot be written."""
    _around_results(path)
    check_place(path)


def write_card(path: Path, block: str) -> None:
    """Replace what stands between the result markers of a model card. Raises ConfigError if it has none."""
    head, tail = _around_results(path)
    write_file(path, f"{head}{RESULTS_BEGIN}\n{block}\n{RESULTS_END}{tail}")


def _around_results(path: Path) -> tuple[str, str]:
    """What stands before the results of a card, and behind them."""
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    head, begin, rest = text.partition(RESULTS_BEGIN)
    _, end, tail = rest.partition(RESULTS_END)
    if not begin or not end:
        raise ConfigError(f"{path} has no {RESULTS_BEGIN} ... {RESULTS_END} to write the results between")
    return head, tail


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
