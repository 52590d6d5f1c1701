"""What the base's tokenizer and template make of the rows. No torch."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from adapterd.errors import InvalidRequest
from adapterd.render import Renderer
from adapterd.training.data import Example, encode_row, opens_thought
from adapterd.training.messages import message_text
from adapterd.training.problems import MAX_EXAMPLES, Finding, count
from adapterd.training.rows import Row


def encode_all(
    rows: Sequence[Row], renderer: Renderer, context: int
) -> tuple[dict[int, list[Example]], list[Finding]]:
    """The examples of each row that can be rendered, by line, and findings on the others."""
    examples: dict[int, list[Example]] = {}
    refused: dict[str, list[int]] = defaultdict(list)
    too_long: dict[int, int] = {}
    for row in rows:
        try:
            examples[row.line] = encode_row(row, renderer)
        except InvalidRequest as error:
            refused[error.message].append(row.line)
            continue
        longest = max(example.num_tokens for example in examples[row.line])
        if longest > context:
            too_long[row.line] = longest
    findings = [Finding("error", "template", reason, "", tuple(lines)) for reason, lines in refused.items()]
    if too_long:
        some = tuple(f"line {line}: {n} tokens" for line, n in list(too_long.items())[:MAX_EXAMPLES])
        findings.append(
            Finding(
                "error",
                "too_long",
                f"{count(too_long)} with more than the {context} tokens of the context: nothing is ever cut",
                "shorten them, or leave them out: --fix here, --on-too-long drop in training",
                tuple(too_long),
                some,
            )
        )
    return examples, findings


def rendering_findings(
    rows: Sequence[Row], examples: Mapping[int, Sequence[Example]], renderer: Renderer
) -> Iterator[Finding]:
    """Thoughts that are never closed, tools that the template does not show, and roles that repeat."""
    thoughtless = [
        row.line
        for row in rows
        for index, example in zip(_trained(row), examples.get(row.line, ()), strict=False)
        if opens_thought(example.prompt_ids, renderer) and "</think>" not in message_text(row.messages[index])
    ]
    if thoughtless:
        yield Finding(
            "warning",
            "thought",
            "the base's template opens a thought before each answer, which the answers of"
            f" {count(set(thoughtless))} never close",
            "begin the answers with </think>, or with a thought and </think>: else the answer is learnt as a thought",
            tuple(dict.fromkeys(thoughtless)),
        )
    with_tools = tuple(row.line for row in rows if row.tools)
    first = next((row for row in rows if row.tools and row.line in examples), None)
    if first is not None and not _shows_tools(first, renderer):
        yield Finding(
            "warning",
            "tools_unseen",
            "the base's template says nothing of the tools that a row lists, in training as in serving",
            "describe them in the system message, or take a base whose template knows tools",
            with_tools,
        )
    if with_tools:
        yield Finding(
            "note",
            "tools",
            f"{count(with_tools)} with tools, rendered by the base's template",
            "adapterd's own /v1/chat/completions takes no tools yet; such an adapter also runs in vLLM",
            with_tools,
        )
    repeated = tuple(
        row.line
        for row in rows
        if any(a["role"] == b["role"] != "tool" for a, b in zip(row.messages, row.messages[1:], strict=False))
    )
    if repeated:
        yield Finding(
            "note", "order", f"{count(repeated)} with two messages of one role in a row", "", repeated
        )


def _shows_tools(row: Row, renderer: Renderer) -> bool:
    before = row.messages[: _trained(row)[0]]
    return renderer.render(before, tools=row.tools) != renderer.render(before)


def _trained(row: Row) -> list[int]:
    return [index for index, trained in enumerate(row.trained) if trained]
