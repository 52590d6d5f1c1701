import json
from pathlib import Path

import pytest

from adapterd.errors import ConfigError
from adapterd.evaluation.formats import JsonFormat, RegexFormat, read_format

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "items": {"type": "array", "items": {"type": "integer"}}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "answer.json"
    path.write_text(json.dumps(SCHEMA))
    return path


def test_a_pattern_matches_from_end_to_end() -> None:
    form = RegexFormat([r"(?P<kind>[a-z]+): (?P<n>\d+)"])
    assert form.is_valid("spam: 3\n")
    assert not form.is_valid("spam: 3 and more")
    assert form.slots("spam: 3") == {"kind": "spam", "n": "3"}
    assert form.slots("x") is None


def test_the_first_pattern_that_matches_gives_the_slots() -> None:
    form = RegexFormat([r"(?P<a>\d+)", r"(?P<b>\w+)"])
    assert (form.slots("12"), form.slots("ab")) == ({"a": "12"}, {"b": "ab"})


def test_a_bad_pattern_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'\(' is no regular expression"):
        RegexFormat(["("])


def test_json_is_held_against_the_schema(schema: Path) -> None:
    form = JsonFormat(schema)
    assert form.is_valid('{"city": "Oslo"}')
    for text in ('{"city": 1}', '{"town": "Oslo"}', '{"city": "Oslo"', "", "null", '{"city": NaN}'):
        assert not form.is_valid(text)


def test_leaves_of_json_are_slots_and_order_means_nothing(schema: Path) -> None:
    form = JsonFormat(schema)
    assert form.slots('{"items": [4, 5], "city": "Oslo"}') == {
        "items.0": "4",
        "items.1": "5",
        "city": '"Oslo"',
    }
    assert form.same('{ "items": [4],\n"city": "Oslo" }', '{"city": "Oslo", "items": [4]}')
    assert not form.same('{"city": "Oslo"}', '{"city": "Oslo", "items": [4]}')


def test_null_is_a_value_and_not_a_failure_to_parse(tmp_path: Path) -> None:
    path = tmp_path / "any.json"
    path.write_text('{"type": ["null", "integer"]}')
    assert JsonFormat(path).is_valid("null")
    assert JsonFormat(path).same("null", " null ")
    assert not JsonFormat(path).same("no json", "null")


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [
        ('{"urgent": 1}', '{"urgent": true}', False),  # Python calls them equal
        ('{"urgent": [0]}', '{"urgent": [false]}', False),
        ('{"urgent": 1.0}', '{"urgent": 1}', True),
        ('{"a.b": 1}', '{"a": {"b": 1}}', False),
    ],
)
def test_the_same_is_the_same_value_of_json(text: str, reference: str, same: bool, tmp_path: Path) -> None:
    path = tmp_path / "any.json"
    path.write_text("{}")
    assert JsonFormat(path).same(text, reference) is same


def test_an_answer_that_is_not_valid_is_never_the_same(tmp_path: Path) -> None:
    path = tmp_path / "flag.json"
    path.write_text('{"properties": {"urgent": {"type": "boolean"}}}')
    form = JsonFormat(path)
    assert form.same('{"urgent": true}', '{ "urgent":true }')
    assert not form.same('{"urgent": 1}', '{"urgent": 1}')


def test_what_is_no_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    with pytest.raises(ConfigError, match="cannot read"):
        JsonFormat(path)
    for text in ("{", '{"type": "nonsense"}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="no JSON schema"):
            JsonFormat(path)


def test_one_form_at_most(schema: Path) -> None:
    assert read_format((), None) is None
    with pytest.raises(ConfigError, match="give one"):
        read_format(("x",), schema)
