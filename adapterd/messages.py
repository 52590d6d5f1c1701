"""The OpenAI API's chat messages as chat templates read them. The server and the training rows agree here.

No torch and no tokenizer: plain data in, plain data out.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def template_role(role: str) -> str:
    """`developer` is the newer name of `system`, which is what templates know."""
    return "system" if role == "developer" else role


def join_text_parts(texts: Iterable[str]) -> str:
    """Content that comes as a list of text parts: a line each, as vLLM joins them."""
    return "\n".join(texts)


def template_message(
    *,
    role: str,
    content: str | None,
    name: str | None = None,
    tool_calls: Sequence[Mapping[str, Any]] = (),
    tool_call_id: str | None = None,
) -> dict[str, Any]:
    """One message for a chat template; what is absent has no key, since templates ask `is defined`.

    content: None only beside tool calls, where there are no words.
    tool_calls: OpenAI's, but with `arguments` as an object, which is what templates write out as JSON.
    """
    message: dict[str, Any] = {"role": template_role(role), "content": content}
    if name is not None:
        message["name"] = name
    if tool_calls:
        message["tool_calls"] = [dict(call) for call in tool_calls]
    if tool_call_id is not None:
        message["tool_call_id"] = tool_call_id
    return message
