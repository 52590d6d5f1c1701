"""vLLM's --lora-modules."""

from pathlib import Path

import pytest

from adapterd.errors import ConfigError
from adapterd.lora_modules import LoraModule, parse_lora_module, sort_out

SQL = LoraModule("sql", Path("/mnt/lora/sql"))


@pytest.mark.parametrize(
    "text",
    [
        "sql=/mnt/lora/sql",
        '{"name":"sql","path":"/mnt/lora/sql"}',
        """'{"name":"sql","path":"/mnt/lora/sql"}'""",
    ],
)
def test_the_forms_it_has(text: str) -> None:
    assert parse_lora_module(text) == SQL


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sql", "neither NAME=PATH nor"),
        ("=x", "neither NAME=PATH nor"),
        ("sql=", "neither NAME=PATH nor"),
        ("{sql", "is no JSON"),
        ('{"name":"sql"}', "a text as 'name' and as 'path'"),
        ('{"name":"sql","path":7}', "a text as 'name' and as 'path'"),
        ('{"name":"sql","path":"x","base_model_name":"y"}', "'base_model_name': the base is the one"),
        ('{"name":"sql","path":"x","rank":"y"}', "'rank': it is not known"),
        ('{"name":"","path":"x"}', "empty"),
    ],
)
def test_what_it_cannot_be_is_said(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_lora_module(text)


def test_a_name_that_no_adapter_can_have_is_another_spelling_of_the_one_with_its_path() -> None:
    qualified = LoraModule("publishers/ns/models/sql", SQL.path)
    for modules in ([SQL, qualified], [qualified, SQL]):
        sorted_out = sort_out(modules)
        assert sorted_out.folders == {"sql": SQL.path}
        assert sorted_out.spellings == {"publishers/ns/models/sql": "sql"}


def test_one_folder_may_have_two_names_but_one_name_no_two_folders() -> None:
    assert sort_out([SQL, LoraModule("sql2", SQL.path), SQL]).folders == {"sql": SQL.path, "sql2": SQL.path}
    with pytest.raises(ConfigError, match="two paths"):
        sort_out([SQL, LoraModule("sql", Path("/elsewhere"))])
    with pytest.raises(ConfigError, match="no adapter name"):
        sort_out([LoraModule("a/b", Path("/x"))])
