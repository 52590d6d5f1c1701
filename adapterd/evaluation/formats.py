"""What form an answer must have, when one is given: regular expressions, or a JSON schema. And the slots in it."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from adapterd.errors import ConfigError

Slots = Mapping[str, str | None]
"""Slot -> what stands in it. None: the form has a place for it that this answer leaves out."""


class AnswerFormat(Protocol):
    """A form that answers are held against. `describe` names it for the report."""

    @property
    def describe(self) -> str: ...
    def is_valid(self, text: str) -> bool: ...
    def slots(self, text: str) -> Slots | None:
        """The slots of a valid answer; None of one that is not valid."""
        ...

    def same(self, text: str, reference: str) -> bool:
        """Whether two answers say the same, in this form's own sense."""
        ...


class RegexFormat:
    """Valid is what one of the patterns matches from end to end; its named groups are the slots."""

    def __init__(self, patterns: Sequence[str]) -> None:
        """Raises ConfigError for a pattern that is no regular expression."""
        self._patterns: list[re.Pattern[str]] = []
        for pattern in patterns:
            try:
                self._patterns.append(re.compile(pattern))
            except re.error as error:
                raise ConfigError(
                    f"--format-regex: {pattern!r} is no regular expression: {error}", param="format_regex"
                ) from None

    @property
    def describe(self) -> str:
        return "the given regular expressions" if len(self._patterns) > 1 else "the given regular expression"

    def is_valid(self, text: str) -> bool:
        return self.slots(text) is not None

    def slots(self, text: str) -> Slots | None:
        for pattern in self._patterns:
            match = pattern.fullmatch(text.strip())
            if match is not None:
                return match.groupdict()
        return None

    def same(self, text: str, reference: str) -> bool:
        return " ".join(text.split()) == " ".join(reference.split())


class JsonFormat:
    """Valid is JSON that satisfies the schema. Its leaves are the slots, by path: `items.0.price`."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a file that is no JSON schema, or without the package that checks schemas."""
        try:
            import jsonschema
        except ImportError:
            raise ConfigError(
                "--json-schema needs the package jsonschema: pip install 'adapterd[eval]'",
                param="json_schema",
            ) from None
        try:
            schema = json.loads(path.read_bytes())
            kind = jsonschema.validators.validator_for(schema)
            kind.check_schema(schema)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}", param="json_schema") from None
        except (ValueError, jsonschema.SchemaError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{path} is no JSON schema: {reason}", param="json_schema") from None
        self._validator: Any = kind(schema)
        self._name = path.name

    @property
    def describe(self) -> str:
        return f"the JSON schema {self._name}"

    def is_valid(self, text: str) -> bool:
        return self.slots(text) is not None

    def slots(self, text: str) -> Slots | None:
        parsed = self._valid(text)
        return None if parsed is None else dict(_leaves(parsed[0], ""))

    def same(self, text: str, reference: str) -> bool:
        """Both valid, and the same value: the order of keys, white space and 1.0 for 1 mean nothing in JSON."""
        given, wanted = self._valid(text), self._valid(reference)
        return given is not None and wanted is not None and _written(given[0]) == _written(wanted[0])

    def _valid(self, text: str) -> tuple[Any] | None:
        """The value in a tuple, since null is a value too; None where it is no JSON or does not satisfy the schema."""
        parsed = _parse(text)
        return parsed if parsed is not None and self._validator.is_valid(parsed[0]) else None


def read_format(patterns: Sequence[str], json_schema: Path | None) -> AnswerFormat | None:
    """The form that the settings ask for; None: it is told from the references. Raises ConfigError for both."""
    if patterns and json_schema is not None:
        raise ConfigError(
            "--format-regex and --json-schema both say what a valid answer is; give one", param="json_schema"
        )
    if patterns:
        return RegexFormat(patterns)
    return JsonFormat(json_schema) if json_schema is not None else None


def _parse(text: str) -> tuple[Any] | None:
    """The value in a tuple, since null is a value too; None for what is no JSON (NaN is none)."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        return (json.loads(text, parse_constant=refuse, parse_float=_number),)
    except (ValueError, RecursionError):
        return None


def _number(text: str) -> float | int:
    """1.0 and 1 are one number in JSON."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _written(value: Any) -> str:
    """One text for each value. Compared as Python has them, true would be 1."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _leaves(value: Any, path: str) -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        parts = value.items()
    elif isinstance(value, list) and value:
        parts = ((str(index), item) for index, item in enumerate(value))  # type: ignore[assignment]
    else:
        return [(path, _written(value))]
    return [leaf for key, item in parts for leaf in _leaves(item, f"{path}.{key}".removeprefix("."))]
