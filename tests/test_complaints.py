"""The table of complaints names tests that exist, and every complaint once."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"^\| (\d+) \| .+ \| (impossible|refused|open) \| ?(?:`(.+)::(.+)`)? ?\|$", re.MULTILINE)
ROWS = ROW.findall((ROOT / "docs" / "complaints.md").read_text(encoding="utf-8"))


def test_every_complaint_stands_there_once() -> None:
    assert [int(number) for number, *_ in ROWS] == list(range(1, 41))


def test_what_is_claimed_is_tested_by_a_test_that_exists() -> None:
    for number, state, path, name in ROWS:
        assert bool(path) == (state != "open"), number
        if path:
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (
                number,
                name,
            )
