"""`check` finds what is wrong, says where, and finds nothing in rows that are right."""

import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapterd.cli import EXIT_ERROR, EXIT_USAGE, main
from adapterd.render import Renderer
from adapterd.training.check import Report, check_rows
from adapterd.training.check_view import as_json, as_text, histogram, wants_colour
from adapterd.training.fix import write_fixed
from adapterd.training.rows import read_rows
from tests.tiny import byte_level_tokenizer
from tests.training.families import FAMILIES, renderer_of

ROOT = Path(__file__).parent.parent.parent
NAMES = ("Ann", "Bob", "Cid", "Dora", "Eli")
THINGS = (
    "lamp",
    "parcel",
    "invoice",
    "phone",
    "garden table",
    "password",
    "refund",
    "printer",
    "chair",
    "ticket",
)
EVENTS = (
    "never came although it was promised for Monday",
    "broke on the very first day of use",
    "was charged twice on my card this month",
    "has the wrong colour and I want another one",
    "cannot be found anywhere in my account",
    "makes a strange noise whenever I touch it",
    "was delivered to my neighbour who is abroad",
    "shows an error that nobody can explain to me",
)
LABELS = ("Shipping", "Billing", "Technical")


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(byte_level_tokenizer(), eos_token_ids=frozenset({2}))


def good_rows(count: int = 60) -> list[dict[str, Any]]:
    """Varied tickets with a two-line answer; the label follows from the event."""
    rng = random.Random(5)
    rows = []
    for number in range(count):
        event = number % len(EVENTS)
        words = " ".join(rng.sample(WORDS, 8))
        question = f"{rng.choice(NAMES)} here. {words}: my {rng.choice(THINGS)} {EVENTS[event]}."
        rows.append(chat(question, f"Category: {LABELS[event % 3]}\nPriority: {('High', 'Low')[event % 2]}"))
    return rows


WORDS = [
    f"{a}{b}"
    for a in ("ka", "mo", "ri", "tu", "ven", "sol", "pa", "lin")
    for b in ("do", "ra", "sti", "mel", "gu", "fan", "zo", "bri", "tek", "hu")
]


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        **more,
    }


def written(path: Path, rows: list[Any]) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def checked(path: Path, renderer: Renderer, *, context: int = 256, heldout: Path | None = None) -> Report:
    return check_rows(path, renderer, base="tiny", context=context, heldout=heldout)


def found(report: Report) -> dict[str, tuple[int, ...]]:
    return {finding.code: finding.lines for finding in report.findings}


def test_nothing_is_found_in_rows_that_are_right(tmp_path: Path, renderer: Renderer) -> None:
    report = checked(written(tmp_path / "f", good_rows(500)), renderer)
    assert report.is_usable
    assert found(report) == {}
    assert report.shapes == {"the lines Category:, Priority:": 500}
    assert [(labels.key, sum(labels.counts.values())) for labels in report.labels] == [
        ("Category", 500),
        ("Priority", 500),
    ]


@pytest.mark.parametrize(
    ("row", "code", "level"),
    [
        ("{", "row_json", "error"),
        ({"messages": []}, "row_messages", "error"),
        (chat("What is wrong with it?", " "), "row_empty", "error"),
        (chat("word " * 300, "Category: Billing\nPriority: Low"), "too_long", "error"),
        (good_rows()[3], "duplicate", "warning"),
        (
            chat(good_rows()[3]["messages"][0]["content"], "Category: Other\nPriority: Low"),
            "contradiction",
            "warning",
        ),
        (
            chat(good_rows()[3]["messages"][0]["content"] + " OK?", "Category: Shipping\nPriority: Low"),
            "near_duplicate",
            "warning",
        ),
        (chat("Anything else to be said?", "I think it is about shipping."), "format", "warning"),
        (chat("Anything else to be said?", "Category: Shiping\nPriority: Low"), "near_label", "warning"),
        (chat("Anything else to be said?", "Category: Legal\nPriority: Low"), "imbalance", "warning"),
        (chat("Anything else to be said?", "Category: Billing\nPriority: Low\n"), "edges", "warning"),
        (chat("my key is AKIAABCDEFGHIJKLMNOP", "Category: Billing\nPriority: Low"), "secret", "warning"),
        (chat("write to eve@acme.org", "Category: Billing\nPriority: Low"), "personal_data", "note"),
        (chat("the cafÃ© is closed", "Category: Billing\nPriority: Low"), "encoding", "warning"),
    ],
)
def test_one_bad_row_is_found_by_its_line(
    row: Any, code: str, level: str, tmp_path: Path, renderer: Renderer
) -> None:
    report = checked(written(tmp_path / "f", [*good_rows(), row]), renderer)
    (finding,) = (finding for finding in report.findings if finding.code == code)
    assert finding.level == level
    assert code == "imbalance" or 61 in finding.lines
    assert report.is_usable == (level != "error")
    others = {f.code for f in report.findings} - {code, "few"}
    assert others <= {"imbalance", "near_contradiction"}, others


def test_openai_s_wording_for_a_line_that_is_no_dictionary(tmp_path: Path, renderer: Renderer) -> None:
    report = checked(written(tmp_path / "f", ['["a", 1]', *good_rows()]), renderer)
    assert report.findings[0].message.startswith(
        "Expected file to have JSONL format, where every line is a JSON dictionary. Line 1 is not a dictionary"
        ' (HINT: line starts with: "'
    )
    assert "jq -c" in report.findings[0].hint


@pytest.mark.parametrize(
    ("count", "code", "level"),
    [(9, "too_few", "error"), (10, "few", "warning"), (49, "few", "warning"), (50, "few", "note")],
)
def test_the_number_of_rows_is_judged(
    count: int, code: str, level: str, tmp_path: Path, renderer: Renderer
) -> None:
    report = checked(written(tmp_path / "f", good_rows(count)), renderer)
    (finding,) = (finding for finding in report.findings if finding.code == code)
    assert (finding.level, report.is_usable) == (level, level != "error")


def test_rows_that_are_held_out_too_are_found(tmp_path: Path, renderer: Renderer) -> None:
    rows = good_rows()
    near = chat(rows[7]["messages"][0]["content"] + " Please.", "Category: Billing\nPriority: Low")
    heldout = written(
        tmp_path / "heldout",
        [rows[4], near, chat("Something else altogether", "Category: Billing\nPriority: Low")],
    )
    report = checked(written(tmp_path / "f", rows), renderer, heldout=heldout)
    assert found(report)["leak"] == (5,)
    assert found(report)["near_leak"] == (8,)
    assert not report.is_usable


def test_what_is_held_out_is_found_in_an_earlier_turn_too(tmp_path: Path, renderer: Renderer) -> None:
    rows, more = good_rows(), chat("And what about that?", "Category: Billing\nPriority: Low")
    heldout = written(tmp_path / "heldout", [rows[4]])
    rows[4] = {"messages": [*rows[4]["messages"], *more["messages"]]}
    report = checked(written(tmp_path / "f", rows), renderer, heldout=heldout)
    assert found(report)["leak"] == (5,)
    assert not report.is_usable
    rows[4]["messages"][1]["weight"] = 0  # then it is not trained
    assert "leak" not in found(checked(written(tmp_path / "f", rows), renderer, heldout=heldout))


def test_low_diversity_and_facts_are_said(tmp_path: Path, renderer: Renderer) -> None:
    same = [
        chat(f"What is the number of item {i * 7919}?", f"The number is {i * 104729}.") for i in range(40)
    ]
    report = checked(written(tmp_path / "f", same), renderer)
    assert {"diversity", "facts"} <= found(report).keys()
    assert "retrieval" in next(f.message for f in report.findings if f.code == "facts")


def test_a_template_that_opens_a_thought_is_warned_of(tmp_path: Path) -> None:
    family = next(f for f in FAMILIES if f.name == "deepseek_r1_distill")
    report = checked(written(tmp_path / "f", good_rows()), renderer_of(family))
    assert len(found(report)["thought"]) == 60


def test_a_row_that_the_template_refuses_is_an_error_in_its_own_words(tmp_path: Path) -> None:
    family = next(f for f in FAMILIES if f.name == "gemma")
    row = {"messages": [{"role": "system", "content": "Be kind."}, *good_rows()[0]["messages"]]}
    report = checked(written(tmp_path / "f", [*good_rows()[1:], row]), renderer_of(family))
    (finding,) = report.of("error")
    assert (finding.code, finding.lines) == ("template", (60,))
    assert "System role not supported" in finding.message


def test_the_text_holds_all_and_steers_no_terminal(tmp_path: Path, renderer: Renderer) -> None:
    evil = chat("\x1b[2J is it gone?", "Category: \x1b[31mred\nPriority: Low")
    report = checked(written(tmp_path / "f", [*good_rows(), evil, "{"]), renderer)
    text = as_text(report, colour=False)
    assert "\x1b" not in text
    assert "61 rows, 1 rows that cannot be read: not usable" in text
    assert "[line 62]" in text
    assert "in one epoch" in text
    assert "\x1b[31m" in as_text(report, colour=True)
    assert json.loads(json.dumps(as_json(report)))["usable"] is False


def test_histogram_counts_every_row() -> None:
    values = [1, 1, 2, 50, 99, 100]
    counts = [int(line.split()[3]) for line in histogram(values)]
    assert sum(counts) == len(values)
    assert len(counts) == 10
    assert histogram([7])[0].split()[:4] == ["7", "to", "7", "1"]


def test_colour_is_for_terminals_that_want_it() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert wants_colour(Terminal(), {})
    assert wants_colour(Terminal(), {"NO_COLOR": ""})
    assert not wants_colour(Terminal(), {"NO_COLOR": "1"})
    assert not wants_colour(Terminal(), {"TERM": "dumb"})
    assert not wants_colour(io.StringIO(), {})


# From here on as a person meets it: the command on the embedded base.


def test_exit_code_says_whether_the_rows_can_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = written(tmp_path / "good.jsonl", good_rows())
    assert main(["check", str(good)]) == 0
    assert main(["check", str(good), "--strict"]) == 0
    written(good, [*good_rows(), good_rows()[0]])
    assert main(["check", str(good), "--strict"]) == EXIT_ERROR
    assert main(["check", str(written(tmp_path / "bad.jsonl", [*good_rows(), "{"]))]) == EXIT_ERROR
    assert main(["check", str(tmp_path / "nowhere.jsonl")]) == EXIT_ERROR
    assert main(["check"]) == EXIT_USAGE
    assert main(["check", str(good), "--map", "answer=x"]) == EXIT_USAGE
    assert "--data is required" in capsys.readouterr().err


def test_fix_writes_a_usable_copy_and_says_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        *good_rows(),
        "{",
        good_rows()[0],
        chat("the cafÃ© is closed", "Category: Billing\nPriority: Low"),
        chat("my key is AKIAABCDEFGHIJKLMNOP", "Category: Billing\nPriority: Low"),
    ]
    bad, out = written(tmp_path / "bad.jsonl", rows), tmp_path / "good.jsonl"
    before = bad.read_bytes()
    assert main(["check", str(bad), "--fix", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not report["usable"]
    assert report["fix"]["report"]["usable"]
    assert (report["fix"]["num_kept"], report["fix"]["num_dropped"], report["fix"]["num_repaired"]) == (
        61,
        3,
        1,
    )
    kept = read_rows(out)
    assert [row.answer for row in kept[:60]] == [row["messages"][1]["content"] for row in good_rows()]
    assert kept[60].prompt_text == "the café is closed"
    dropped = [json.loads(line) for line in (tmp_path / "good.jsonl.dropped.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in dropped] == [61, 62, 64]
    assert dropped[0]["row"] == "{"
    assert "copy" in dropped[1]["reason"]
    assert bad.read_bytes() == before
    assert main(["check", str(bad), "--fix", str(bad)]) == EXIT_USAGE
    assert bad.read_bytes() == before


def test_a_table_becomes_rows_that_can_be_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "tickets.csv"
    lines = ["Id,Ticket,Reply"]
    lines += [
        '{},"{}","{}"'.format(i, *(m["content"] for m in row["messages"]))
        for i, row in enumerate(good_rows())
    ]
    table.write_text("\n".join(lines), encoding="utf-8")
    assert main(["check", str(table)]) == EXIT_ERROR
    assert "no column 'prompt'; the header has 'Id', 'Ticket', 'Reply'" in capsys.readouterr().err
    out = tmp_path / "train.jsonl"
    assert main(["check", str(table), "--map", "prompt=Ticket", "completion=Reply", "--fix", str(out)]) == 0
    assert "columns that nobody reads: 'Id'" in capsys.readouterr().out
    assert [row.answer for row in read_rows(out)] == [row["messages"][1]["content"] for row in good_rows()]


def test_tools_weights_and_tags_survive_a_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "track", "arguments": '{"order": "é"}'}}
    whole = {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Yes?", "weight": 0},
            {"role": "user", "content": "Where is it?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "Oslo"},
            {"role": "assistant", "content": "In Oslo."},
        ],
        "tools": [{"type": "function", "function": {"name": "track", "parameters": {}}}],
        "tags": ["edge"],
    }
    path = written(tmp_path / "f.jsonl", [whole])
    main(["check", str(path), "--fix", str(tmp_path / "out.jsonl"), "--json"])
    # The embedded base's template knows no tools: the row is refused for it, and listed.
    (entry,) = [json.loads(line) for line in (tmp_path / "out.jsonl.dropped.jsonl").read_text().splitlines()]
    assert "template" in entry["reason"]

    from adapterd.training.fix import as_openai_row

    (row,) = read_rows(path)
    written(tmp_path / "again.jsonl", [as_openai_row(row)])
    assert read_rows(tmp_path / "again.jsonl") == [row]
    capsys.readouterr()


def test_mask_shows_exactly_the_tokens_with_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "f.jsonl", [chat("Where is it?", "Category: Shipping")])
    assert main(["check", str(path), "--show-mask", "1", "--json"]) == 0
    (tokens,) = json.loads(capsys.readouterr().out)["answers"]
    assert "".join(token["text"] for token in tokens if token["loss"]) == "Category: Shipping<|im_end|>"
    assert [token["loss"] for token in tokens] == sorted(token["loss"] for token in tokens)
    assert main(["check", str(path), "--show-mask", "1"]) == 0
    text = capsys.readouterr().out
    assert text.replace("⟧⟦", "").endswith("assistant\\n\n⟦Category: Shipping<|im_end|>⟧\n")
    assert main(["check", str(path), "--show-mask", "2"]) == EXIT_ERROR
    assert "no usable row stands in line 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "is_mended"),
    [("the cafÃ© is closed", True), ("the caf\ufffd is closed", False), ("a &amp; b", False)],
)
def test_a_damaged_text_is_said_to_be_mended_only_if_it_is(
    words: str, is_mended: bool, tmp_path: Path, renderer: Renderer
) -> None:
    row = chat(words, "Category: Billing\nPriority: Low")
    report = checked(written(tmp_path / "f", [*good_rows(), row]), renderer)
    (finding,) = (finding for finding in report.findings if finding.code == "encoding")
    assert (finding.hint == "--fix mends it") is is_mended
    write_fixed(tmp_path / "f", tmp_path / "g", drops=report.drops)
    again = checked(tmp_path / "g", renderer)
    assert ("encoding" in {finding.code for finding in again.findings}) is not is_mended


def test_check_imports_no_torch(tmp_path: Path) -> None:
    path = written(tmp_path / "f.jsonl", good_rows())
    code = (
        "import sys, adapterd.cli\n"
        f"code = adapterd.cli.main(['check', {str(path)!r}])\n"
        "loaded = [name for name in sys.modules if name.partition('.')[0] == 'torch' and sys.modules[name]]\n"
        "sys.exit(f'{code} {loaded}' if code or loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "60 rows: usable" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["support", "moderation", "medical"])
def test_the_shipped_rows_are_clean(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ROOT / "adapters" / name
    assert (
        main(["check", str(folder / "train.jsonl"), "--heldout", str(folder / "heldout.jsonl"), "--strict"])
        == 0
    )
    assert "warning" not in capsys.readouterr().out
