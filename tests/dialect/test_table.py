"""The table in docs/dialect.md has a row for every field of PEFT's LoraConfig, and the reader knows each."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from peft import LoraConfig

from adapterd.errors import AdapterRefused
from adapterd.peft_config import parse_peft_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "dialect.md"


def rows() -> dict[str, str]:
    """field -> what the table's row says happens."""
    found: dict[str, str] = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 3:
            for name in re.findall(r"`(\w+)`", cells[0]):
                found[name] = cells[2]
    return found


def test_every_field_of_pefts_config_has_a_row_and_no_row_is_of_a_field_that_is_gone() -> None:
    theirs = {field.name for field in fields(LoraConfig) if not field.name.startswith("_")}
    assert rows().keys() == theirs


def test_no_row_says_ignored() -> None:
    assert not [name for name, says in rows().items() if "ignored" in says]


@pytest.mark.parametrize("field", sorted(name for name, says in rows().items() if says.startswith("refused")))
def test_a_field_whose_row_says_refused_is_refused_by_name(field: str) -> None:
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], field: {"any": "thing"}}
    with pytest.raises(AdapterRefused, match=field):
        parse_peft_config(json.dumps(config).encode(), adapter="support")
