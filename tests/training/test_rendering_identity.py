"""What is trained is what is asked, token for token, for the templates of real families."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from adapterd.errors import InvalidRequest
from adapterd.render import Renderer
from adapterd.server.chat import prompts
from adapterd.server.protocol import ChatCompletionRequest
from adapterd.training.data import Example, encode_row, opens_thought
from adapterd.training.messages import parse_chat
from adapterd.training.problems import Problems
from adapterd.training.rows import Row
from tests.training.families import FAMILIES, Family, renderer_of

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
FIRST, SECOND = "It is on its way.", "Tomorrow, by noon."
TOOL = {
    "type": "function",
    "function": {
        "name": "track_parcel",
        "description": "Where a parcel is.",
        "parameters": {
            "type": "object",
            "properties": {"order": {"type": "string", "description": "Its number."}},
        },
    },
}
CALL = {
    "id": "abcdef123",
    "type": "function",
    "function": {"name": "track_parcel", "arguments": '{"order": "A-17"}'},
}


def chat(family: Family) -> list[dict[str, Any]]:
    """Two turns, in the spellings that clients use: `developer`, a list of text parts."""
    system = [{"role": "developer", "content": "Be brief."}] if family.has_system else []
    parts = [{"type": "text", "text": "And when"}, {"type": "text", "text": "will it come?"}]
    return [
        *system,
        {"role": "user", "content": "Where is my parcel?"},
        {"role": "assistant", "content": FIRST},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": SECOND},
    ]


def parsed(messages: list[dict[str, Any]], **more: Any) -> Row:
    problems = Problems(1)
    row = parse_chat({"messages": messages, **more}, problems)
    assert row is not None
    assert not problems.found
    return Row(1, row.messages, row.trained, row.tags, row.tools)


def asked(messages: list[dict[str, Any]], renderer: Renderer) -> list[int]:
    """The prompt that /v1/chat/completions gives to the engine."""
    body = ChatCompletionRequest.model_validate({"model": "m", "messages": messages})
    (prompt,) = prompts(body, renderer, SimpleNamespace(chat_template=None))  # type: ignore[arg-type]
    return list(prompt.token_ids)


def text(ids: tuple[int, ...] | list[int], renderer: Renderer) -> str:
    return renderer.decode(ids, skip_special_tokens=False)


@every_family
def test_the_prompt_that_is_trained_is_the_prompt_that_is_served(family: Family) -> None:
    renderer = renderer_of(family)
    messages = chat(family)
    trained = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    examples = encode_row(parsed(messages), renderer)
    for index, example in zip(trained, examples, strict=True):
        assert list(example.prompt_ids) == asked(messages[:index], renderer)


@every_family
def test_loss_is_on_the_answer_and_the_token_that_ends_it_and_on_nothing_else(family: Family) -> None:
    renderer = renderer_of(family)
    first, second = encode_row(parsed(chat(family)), renderer)
    assert text(first.answer_ids, renderer) == FIRST + family.end
    assert text(second.answer_ids, renderer) == SECOND + family.end
    for example in (first, second):
        assert example.answer_ids[-1] == renderer.stop_token_id
        assert renderer.stop_token_id in renderer.eos_token_ids
        assert renderer.stop_token_id not in example.answer_ids[:-1]


@every_family
def test_the_template_itself_writes_the_same_conversation(family: Family) -> None:
    """Prompt and answer are what the template makes of the whole chat, but for what it adds by itself."""
    renderer = renderer_of(family)
    row = parsed(chat(family))
    whole = text(renderer.render(row.messages, add_generation_prompt=False), renderer)
    example = encode_row(row, renderer)[-1]
    end = "" if family.name == "glm4moe" else family.end  # GLM ends an answer with whoever speaks next
    prompt = text(example.prompt_ids, renderer).removesuffix("<think>\n" if family.opens_thought else "")
    if not family.keeps_prompt:  # Mistral moves the system prompt to the last question
        assert not whole.startswith(prompt)
        prompt = prompt[-20:]
    assert prompt + family.adds + SECOND + end in whole


@every_family
def test_there_is_one_beginning_of_text(family: Family) -> None:
    renderer = renderer_of(family)
    for example in encode_row(parsed(chat(family)), renderer):
        found = text(example.prompt_ids, renderer).startswith(2 * (family.bos or "never"))
        assert not found
        if family.bos and family.bos != family.end:
            assert text(example.prompt_ids, renderer).count(family.bos) == 1


def tool_chat() -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "Where is my parcel A-17?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": CALL["id"], "content": '{"place": "Oslo"}'},
        {"role": "assistant", "content": FIRST},
    ]


@every_family
def test_tool_calls_are_learnt_in_the_template_s_own_words_or_refused(family: Family) -> None:
    renderer = renderer_of(family)
    row = parsed(tool_chat(), tools=[TOOL])
    if not family.has_tools:
        with pytest.raises(InvalidRequest, match="chat template"):
            encode_row(row, renderer)
        return
    called, answered = encode_row(row, renderer)
    for index, example in ((1, called), (3, answered)):
        assert list(example.prompt_ids) == renderer.render(row.messages[:index], tools=[TOOL])
    assert ("its number" in text(called.prompt_ids, renderer).casefold()) is family.shows_tools
    call = text(called.answer_ids, renderer)
    assert "track_parcel" in call
    assert "A-17" in call
    assert "<think>" not in call
    assert called.answer_ids[-1] == renderer.stop_token_id
    assert "Oslo" in text(answered.prompt_ids, renderer)
    assert text(answered.answer_ids, renderer) == FIRST + family.end
    # The call is said as the next prompt repeats it.
    assert call.removesuffix(family.end).strip() in text(answered.prompt_ids, renderer)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.drops_thought], ids=lambda family: family.name)
def test_thoughts_are_learnt_where_they_are_thought_and_gone_where_the_template_drops_them(
    family: Family,
) -> None:
    renderer = renderer_of(family)
    messages = chat(family)
    thought = "<think>\nThe parcel left on Monday.\n</think>\n\n"
    first = 2 if family.has_system else 1
    messages[first] = {"role": "assistant", "content": thought + FIRST}
    one, two = encode_row(parsed(messages), renderer)
    for index, example in ((first, one), (first + 2, two)):
        assert list(example.prompt_ids) == asked(messages[:index], renderer)
    whole = text(one.prompt_ids, renderer)[-10:] + text(one.answer_ids, renderer)
    assert whole.endswith(thought + FIRST + family.end)
    assert whole.count("<think>") == 1
    assert "left on Monday" not in text(two.prompt_ids, renderer)
    assert FIRST in text(two.prompt_ids, renderer)


@every_family
def test_a_prompt_that_opens_a_thought_is_known(family: Family) -> None:
    (example, *_) = encode_row(parsed(chat(family)), renderer_of(family))
    assert opens_thought(example.prompt_ids, renderer_of(family)) is family.opens_thought


def test_arguments_reach_a_template_that_wants_them_as_text() -> None:
    family = next(f for f in FAMILIES if f.name == "deepseekv3")
    called, _ = encode_row(parsed(tool_chat(), tools=[TOOL]), renderer_of(family))
    assert json.dumps({"order": "A-17"}) in text(called.answer_ids, renderer_of(family))


@every_family
def test_an_untrained_turn_is_read_and_not_learnt(family: Family) -> None:
    renderer = renderer_of(family)
    messages = chat(family)
    first = 2 if family.has_system else 1
    messages[first] = {**messages[first], "weight": 0}
    examples: list[Example] = encode_row(parsed(messages), renderer)
    assert [text(e.answer_ids, renderer) for e in examples] == [SECOND + family.end]
    assert FIRST in text(examples[0].prompt_ids, renderer)
