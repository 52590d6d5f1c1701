"""A checked body, or the one error that says which field is wrong, in OpenAI's words."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from adapterd.errors import InvalidRequest
from adapterd.server.protocol import UNSUPPORTED

M = TypeVar("M", bound=BaseModel)

_MAX_SHOWN = 64
"""Characters of a client's own value that an error repeats."""


def validate(model: type[M], data: Mapping[str, Any]) -> M:
    """Raises InvalidRequest for the first field at fault, with `param` and `code`."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        # Without the url, the input and the cause: none of them is for clients.
        raise _explain(model, error.errors(include_url=False)[0]) from None


def _explain(model: type[BaseModel], error: Mapping[str, Any]) -> InvalidRequest:
    kind = str(error["type"])
    location: Sequence[str | int] = error["loc"]
    param = _param(location)
    if kind == "extra_forbidden":
        return _unknown(model, param, top_level=len(location) == 1)
    if kind == "missing":
        return InvalidRequest(
            f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
        )
    if not location:
        # Raised by a check over several fields: its type is the name of the field to blame.
        return InvalidRequest(f"{error['msg']}.", param=kind, code="invalid_value")
    if kind == "too_long" and error["ctx"]["max_length"] == 0:
        return _unsupported(param, "only an empty list is accepted")
    code = "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
    if kind == "literal_error":
        code = "unsupported_value"
    reason = str(error["msg"]).removeprefix("Input ").removeprefix("Value ")
    reason = reason.replace("valid tuple", "list").replace(" or instance of", ", that is a")
    return InvalidRequest(
        f"Invalid value for '{param}': {reason}{_shown(error['input'])}.", param=param, code=code
    )


def _unknown(model: type[BaseModel], param: str, *, top_level: bool) -> InvalidRequest:
    if top_level and param in UNSUPPORTED:
        return _unsupported(param, UNSUPPORTED[param])
    near = difflib.get_close_matches(param, list(model.model_fields), n=1) if top_level else []
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return InvalidRequest(f"Unknown parameter: '{param}'.{hint}", param=param, code="unknown_parameter")


def _unsupported(param: str, way_out: str) -> InvalidRequest:
    message = f"Unsupported parameter: '{param}'; {way_out}."
    return InvalidRequest(message, param=param, code="unsupported_parameter")


def _param(location: Sequence[str | int]) -> str:
    """("messages", 0, "content") -> "messages[0].content"."""
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name if len(name) <= 2 * _MAX_SHOWN else name[: 2 * _MAX_SHOWN] + "..."


def _shown(value: object) -> str:
    if isinstance(value, bool | int | float | str) and len(repr(value)) <= _MAX_SHOWN:
        return f", not {value!r}"
    return ""
