"""One row's messages, checked and put into the form that chat templates read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterd.messages import join_text_parts, template_message
from adapterd.training.problems import Problems
from adapterd.training.tables import Columns

ROLES = ("system", "developer", "user", "assistant", "tool")
_CHAT_KEYS = ("messages", "tools", "parallel_tool_calls", "tags")
_MESSAGE_KEYS = ("role", "content", "name", "weight", "tool_calls", "tool_call_id")
_ROLE_OF: Mapping[str, str] = {
    **dict.fromkeys(("human", "customer", "question", "prompter"), "user"),
    **dict.fromkeys(("gpt", "bot", "model", "ai", "chatbot", "agent"), "assistant"),
    **dict.fromkeys(("function", "observation", "ipython"), "tool"),
}
_KEY_HINTS: Mapping[str, str] = {
    "reasoning_content": "write <think>...</think> into the content if the base thinks so",
    "thinking": "write <think>...</think> into the content if the base thinks so",
    "function_call": "it is called tool_calls now",
    "from": "messages have role and content",
    "value": "messages have role and content",
    "train": "weight 0 leaves an answer untrained",
}


@dataclass(frozen=True)
class Parsed:
    """A row's content, without its line."""

    messages: tuple[Mapping[str, Any], ...]
    trained: tuple[bool, ...]
    tags: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()


def message_text(message: Mapping[str, Any]) -> str:
    """A message's words, and its calls of tools as JSON, a line each."""
    words = [message["content"]] if message["content"] else []
    for call in message.get("tool_calls", ()):
        function = call["function"]
        plain = {"name": function["name"], "arguments": function["arguments"]}
        words.append(json.dumps(plain, ensure_ascii=False))
    return "\n".join(words)


def parse_pair(value: Mapping[str, Any], columns: Columns, problems: Problems) -> Parsed | None:
    """A row of prompt and completion, each a text, or (TRL's conversational form) a list of messages."""
    prompt, completion = value.get(columns.prompt), value.get(columns.completion)
    system = value.get(columns.system)
    unknown = sorted(set(value) - {columns.prompt, columns.completion, columns.system, "tools", "tags"})
    if unknown:
        problems.add(
            "key", f"{unknown[0]!r} is not supported beside {columns.prompt!r}", "leave it out, or say --map"
        )
    messages: list[Any] = []
    if system is not None and system != "":
        messages.append({"role": "system", "content": system})
    for key, part, role in ((columns.prompt, prompt, "user"), (columns.completion, completion, "assistant")):
        if isinstance(part, list):
            untrained = [{**m, "weight": 0} if _is_answer(m) and role == "user" else m for m in part]
            messages += untrained
        elif isinstance(part, str) and part.strip():
            messages.append({"role": role, "content": part})
        else:
            is_blank = part is None or (isinstance(part, str) and not part.strip())
            what = "is missing" if key not in value else "is empty" if is_blank else "is no text"
            problems.add("empty", f"{key!r} {what}")
    if problems.found:
        return None
    extra = {key: value[key] for key in ("tools", "tags") if key in value}
    return parse_chat({"messages": messages, **extra}, problems)


def parse_chat(value: Mapping[str, Any], problems: Problems) -> Parsed | None:
    """OpenAI's chat row. None, or a row that must not be used, if `problems` has found anything."""
    value = {key: part for key, part in value.items() if part is not None or key == "messages"}
    unknown = sorted(set(value) - set(_CHAT_KEYS))
    if unknown:
        problems.add("key", f"{unknown[0]!r} is not supported; a row has {', '.join(_CHAT_KEYS)}")
    if not isinstance(value["messages"], list) or not value["messages"]:
        problems.add("messages", "'messages' is no list, or an empty one, so there is nothing to learn")
        return None
    tags = value.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        problems.add("tags", "'tags' is no list of strings")
        tags = []
    tools = _parse_tools(value.get("tools", []), problems)
    messages = [_parse_message(index, part, problems) for index, part in enumerate(value["messages"])]
    if any(message is None for message in messages):
        return None
    whole = [message for message in messages if message is not None]
    trained = [
        message["role"] == "assistant" and raw.get("weight") != 0
        for message, raw in zip(whole, value["messages"], strict=True)
    ]
    _check_order(whole, trained, problems)
    _check_calls(whole, tools, value.get("parallel_tool_calls", True), problems)
    return Parsed(tuple(whole), tuple(trained), tuple(tags), tools)


def _is_answer(message: object) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _parse_message(index: int, raw: Any, problems: Problems) -> dict[str, Any] | None:
    """None if the message cannot even be looked at further."""
    where = f"message {index}"
    if not isinstance(raw, dict):
        problems.add("messages", f"{where} is no object")
        return None
    # JSON null equals absent, as in requests: exported rows are full of it.
    raw = {key: part for key, part in raw.items() if part is not None}
    for key in sorted(set(raw) - set(_MESSAGE_KEYS)):
        problems.add("key", f"{where}: {key!r} is not supported", _KEY_HINTS.get(key, ""))
    role = raw.get("role")
    if role not in ROLES:
        near = _ROLE_OF.get(str(role).lower()) or (str(role).lower() if str(role).lower() in ROLES else None)
        hint = f"perhaps {near!r}" if near else ""
        problems.add("role", f"{where}: role {role!r} is none of {', '.join(ROLES)}", hint)
        return None
    weight = raw.get("weight", 1)
    if "weight" in raw and (role != "assistant" or isinstance(weight, bool) or weight not in (0, 1)):
        problems.add("weight", f"{where}: 'weight' is 0 or 1, on assistant messages")
    if "name" in raw and (not isinstance(raw["name"], str) or not raw["name"]):
        problems.add("key", f"{where}: 'name' is no text")
    if ("tool_call_id" in raw) != (role == "tool"):
        problems.add("tools", f"{where}: 'tool_call_id' stands on every tool message and on no other")
    calls = _parse_calls(where, role, raw.get("tool_calls", []), problems)
    content = _parse_content(where, raw.get("content"), problems)
    if content is None or not content.strip():
        if content is not None and role == "tool":
            pass  # a tool may have nothing to say
        elif calls:
            content = None
        else:
            problems.add(
                "empty",
                f"{where}: content is empty or no text",
                "an empty answer teaches to say nothing; leave the row out" if role == "assistant" else "",
            )
            return None
    return template_message(
        role=role,
        content=content,
        name=raw.get("name"),
        tool_calls=calls,
        tool_call_id=raw.get("tool_call_id"),
    )


def _parse_content(where: str, content: Any, problems: Problems) -> str | None:
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            problems.add(
                "parts", f"{where}: content holds a part that is no text ({kind!r})", "text parts only"
            )
        else:
            texts.append(part["text"])
    return join_text_parts(texts)


def _parse_calls(where: str, role: str, calls: Any, problems: Problems) -> list[dict[str, Any]]:
    if calls == []:
        return []
    if role != "assistant" or not isinstance(calls, list):
        problems.add("tools", f"{where}: 'tool_calls' is a list, on assistant messages")
        return []
    parsed = []
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not function["name"]
        ):
            problems.add(
                "tools",
                f"{where}: call {number} has no function with a name",
                'a call is {"id": ..., "type": "function", "function": {"name": ..., "arguments": "{...}"}}',
            )
            continue
        extra = sorted(
            (set(call) - {"id", "type", "function", "index"}) | (set(function) - {"name", "arguments"})
        )
        if extra or call.get("type", "function") != "function":
            problems.add(
                "tools", f"{where}: call {number}: {extra[0] if extra else call['type']!r} is not supported"
            )
        arguments = _parse_arguments(function.get("arguments", "{}"))
        if arguments is None:
            problems.add(
                "tools",
                f"{where}: call {number}: 'arguments' is no JSON object",
                "write it as text, as OpenAI does",
            )
        parsed.append(
            {
                "id": call.get("id", ""),
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments or {}},
            }
        )
    return parsed


def _parse_arguments(arguments: Any) -> dict[str, Any] | None:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return arguments if isinstance(arguments, dict) else None


def _parse_tools(tools: Any, problems: Problems) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(tools, list):
        problems.add("tools", "'tools' is no list")
        return ()
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or tool.get("type") != "function"
        ):
            problems.add(
                "tools",
                f"tool {number} is no function with a name",
                'a tool is {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}',
            )
            return ()
    return tuple(tools)


def _check_order(messages: Sequence[Mapping[str, Any]], trained: Sequence[bool], problems: Problems) -> None:
    """What no template could make sense of. The rest (two questions in a row) is the template's own affair."""
    if messages[-1]["role"] != "assistant":
        problems.add("order", "the last message is not the assistant's, so there is nothing to learn from it")
    elif not any(trained):
        problems.add("weight", "every assistant message has weight 0, so there is nothing to learn")
    if trained[0]:
        problems.add(
            "order",
            "message 0 is the assistant's, and nothing stands before it that it could answer",
            "weight 0 leaves a greeting untrained",
        )


def _check_calls(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    parallel: Any,
    problems: Problems,
) -> None:
    """Every call names a tool of the row and is answered before anybody else speaks."""
    known = {tool["function"]["name"] for tool in tools}
    waiting: set[str] = set()
    for index, message in enumerate(messages):
        where = f"message {index}"
        if message["role"] == "tool":
            identity = message.get("tool_call_id")
            if identity not in waiting:
                problems.add(
                    "tools", f"{where}: it answers the call {identity!r}, which nobody made or waits for"
                )
            waiting.discard(str(identity))
            continue
        if waiting:
            problems.add(
                "tools", f"{where}: the call {min(waiting)!r} has not been answered by a tool message"
            )
            waiting = set()
        calls = message.get("tool_calls", ())
        if len(calls) > 1 and parallel is False:
            problems.add("tools", f"{where}: {len(calls)} calls at once, and 'parallel_tool_calls' is false")
        for call in calls:
            if call["function"]["name"] not in known:
                names = ", ".join(sorted(known)) or "none"
                problems.add(
                    "tools",
                    f"{where}: it calls {call['function']['name']!r}, and the row's tools are {names}",
                    "list it in 'tools' beside 'messages'",
                )
            if message is not messages[-1]:
                waiting.add(str(call["id"]))
    if not isinstance(parallel, bool):
        problems.add("tools", "'parallel_tool_calls' is true or false")
