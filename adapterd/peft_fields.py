"""Typed access to the keys of one adapter_config.json; each error names the key and the value found.

Knows types and what a stranger's regular expression may be, and nothing of what a key means.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from adapterd.errors import AdapterRefused
from adapterd.file_names import CONFIG_FILE

_MAX_PATTERN_LENGTH = 4096
_MAX_PATTERN_REPEATS = 6
_REPEAT = re.compile(r"[*+]|\{\d*,\d*\}|\{\d+\}")


class Fields:
    """One config; `adapter` is whose, for the errors."""

    def __init__(self, fields: Mapping[str, Any], adapter: str) -> None:
        self._fields = fields
        self._adapter = adapter

    def rank(self, key: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refusal(key, "a rank is a whole number of at least 1", value)
        return value

    def number(self, key: str, value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refusal(key, "it must be a number", value)
        try:
            number = float(value)
        except OverflowError as error:
            raise self.refusal(key, "the number is too large", "...") from error
        if not math.isfinite(number):
            raise self.refusal(key, "the number must be finite", value)
        return number

    def boolean(self, key: str) -> bool:
        value = self._fields.get(key, False)
        if not isinstance(value, bool):
            raise self.refusal(key, "it must be true or false")
        return value

    def text(self, key: str) -> str | None:
        value = self._fields.get(key)
        if value is not None and not isinstance(value, str):
            raise self.refusal(key, "it must be a string")
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self._fields.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.refusal(key, "it must be an object of patterns and values")
        return value

    def names(self, key: str) -> str | tuple[str, ...] | None:
        value = self._fields.get(key)
        if value is None or isinstance(value, str):
            return value
        return self._strings(key, value)

    def patterns(self, key: str) -> tuple[str, ...]:
        value = self._fields.get(key)
        if not value:
            return ()
        return (value,) if isinstance(value, str) else self._strings(key, value)

    def list_of_names(self, key: str) -> tuple[str, ...]:
        value = self._fields.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise self.refusal(key, "it must be a list of names")
        return tuple(value)

    def token_indices(self, key: str) -> tuple[int, ...] | Mapping[str, tuple[int, ...]] | None:
        """Token ids, or module name -> token ids; each id once. An empty list is no list."""
        value = self._fields.get(key)
        if not value:
            return None
        if isinstance(value, dict):
            return {name: self._token_ids(key, ids) for name, ids in value.items()}
        return self._token_ids(key, value)

    def _token_ids(self, key: str, value: object) -> tuple[int, ...]:
        if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
            raise self.refusal(key, "it must be a list of token ids, or module names with such lists")
        if len(set(value)) != len(value):
            raise self.refusal(key, "a token id occurs twice, and which row of it counts is not said")
        return tuple(value)

    def layers(self) -> tuple[int, ...] | None:
        value = self._fields.get("layers_to_transform")
        if value is None:
            return None
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
            raise self.refusal("layers_to_transform", "it must be a whole number or a list of them")
        return tuple(values)

    def _strings(self, key: str, value: object) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.refusal(key, "it must be a string or a list of strings")
        return tuple(value)

    def check_pattern(self, pattern: str) -> None:
        """Patterns are regular expressions of strangers: one that ran for ever would stop the daemon."""
        if len(pattern) > _MAX_PATTERN_LENGTH:
            raise self.problem(f"a pattern has {len(pattern)} characters; {_MAX_PATTERN_LENGTH} are allowed")
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise self.problem(f"the pattern {pattern[:80]!r} is no regular expression: {error}") from error
        if _could_run_for_ever(pattern):
            raise self.problem(
                f"the pattern {pattern[:80]!r} could take exponential time: write it without repeats of"
                f" groups that repeat or choose, and with at most {_MAX_PATTERN_REPEATS} repeats"
            )

    def refusal(self, key: str, reason: str, *value: object) -> AdapterRefused:
        shown = value[0] if value else self._fields.get(key)
        return self.problem(f"{key}={_short(shown)}: {reason}")

    def problem(self, reason: str) -> AdapterRefused:
        return AdapterRefused(f"adapter {self._adapter!r}: {CONFIG_FILE}: {reason}")


def _could_run_for_ever(pattern: str) -> bool:
    """Whether a repeat stands around another or a choice, `(a+)+` or `(a|b)*`, or there are too many."""
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern, flags=re.DOTALL)
    open_groups = [False]  # for each open group: whether it repeats or chooses inside
    num_repeats = 0
    for position, character in enumerate(plain):
        repeated = _REPEAT.match(plain, position + 1) is not None
        num_repeats += repeated
        if character == "(":
            open_groups.append(False)
            continue
        branches = character == "|"
        if character == ")" and len(open_groups) > 1:
            branches = open_groups.pop()
            if branches and repeated:
                return True
        open_groups[-1] |= branches or repeated
    return num_repeats > _MAX_PATTERN_REPEATS


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
