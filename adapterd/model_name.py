"""The `model` field of a request, as a string: BASE, BASE:ADAPTER, BASE:ADAPTER@VERSION, BASE:a*0.7+b*0.3.

VERSION is a number (`@3`), an alias (`@stable`), or at least six digits of a digest (`@3fa94c`).

Grammar only; whether such adapters exist is `resolving.py`'s to say.
"""

import difflib
import itertools
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from adapterd.errors import InvalidRequest, ModelNotFound

BASE_ALIAS = "base"
MAX_PARTS = 8
MIN_VERSION_LENGTH = 6
_MAX_WEIGHT = 1000.0
_MAX_NAMES_SHOWN = 20
_MAX_NAMES_COMPARED = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NUMBER = re.compile(r"[1-9][0-9]{0,4}")
_HEX = re.compile(r"[0-9a-f]{1,64}")
_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
_PART = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,127})"
    r"(?:@(?P<version>[A-Za-z0-9][A-Za-z0-9._-]{0,63}))?"
    r"(?:\*(?P<weight>-?[0-9]{1,16}(?:\.[0-9]{1,16})?))?"
)


@dataclass(frozen=True)
class Part:
    """One adapter of a composition. `version` is a number, an alias, or the beginning of a digest."""

    name: str
    version: str | None
    weight: float


def is_adapter_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def is_version_number(version: str) -> bool:
    return _NUMBER.fullmatch(version) is not None


def is_version_digest(version: str) -> bool:
    """Long enough to be the beginning of a digest; a shorter one is a number or nothing."""
    return len(version) >= MIN_VERSION_LENGTH and _HEX.fullmatch(version) is not None


def check_alias(alias: str) -> None:
    """An alias begins with a letter and cannot be mistaken for a digest. Raises InvalidRequest."""
    if _ALIAS.fullmatch(alias) is None:
        raise InvalidRequest(
            f"{shown(alias)} is no alias: a letter, then letters, digits, '.', '_' and '-', at most 64",
            param="alias",
        )
    if _HEX.fullmatch(alias):
        raise InvalidRequest(
            f"the alias {alias!r} would be read as the beginning of a digest; use a letter beyond f",
            param="alias",
        )


def parse_model_name(model: str, *, base_name: str) -> tuple[Part, ...]:
    """The adapters a model string names, in its order; none for the base itself.

    `base` always stands for the served base, and a bare adapter name needs no base before it. Raises
    ModelNotFound for another base or what can be no name, InvalidRequest for a bad composition.
    """
    if model in (base_name, BASE_ALIAS):
        return ()
    expression = model
    # The base's own name may hold a colon, so it is taken off whole rather than split at one.
    for prefix in (f"{base_name}:", f"{BASE_ALIAS}:"):
        if model.startswith(prefix):
            expression = model[len(prefix) :]
            break
    else:
        if ":" in model:
            raise ModelNotFound(
                f"the model {shown(model)} does not exist: the base served here is {base_name!r}",
                param="model",
            )
    pieces = expression.split("+")
    if len(pieces) > MAX_PARTS:
        raise InvalidRequest(
            f"a composition has at most {MAX_PARTS} adapters, not {len(pieces)}", param="model"
        )
    return tuple(_parse_part(piece, model) for piece in pieces)


def _parse_part(piece: str, model: str) -> Part:
    match = _PART.fullmatch(piece)
    if match is None:
        if "*" in piece:
            raise InvalidRequest(
                f"{shown(piece)} in the model {shown(model)} is not NAME*WEIGHT with a decimal weight",
                param="model",
            )
        raise ModelNotFound(f"the model {shown(model)} does not exist", param="model")
    version, weight = match["version"], float(match["weight"] or 1)
    is_hex = version is not None and _HEX.fullmatch(version) is not None
    if version is not None and is_hex and not is_version_number(version) and not is_version_digest(version):
        raise InvalidRequest(
            f"the version {version!r} is too short: give at least {MIN_VERSION_LENGTH} digits of the digest",
            param="model",
        )
    if weight == 0 or not math.isfinite(weight) or abs(weight) > _MAX_WEIGHT:
        raise InvalidRequest(
            f"the weight of {match['name']!r} must not be 0 or beyond {_MAX_WEIGHT:g}; leave out what has no weight",
            param="model",
        )
    return Part(match["name"], version, weight)


def shown(text: str) -> str:
    """What a client sent, quoted for a message: no control characters, no novel."""
    quoted = repr(text)
    return quoted if len(quoted) <= 160 else f"{quoted[:157]}...'"


def nearest_names(wanted: str, names: Collection[str]) -> Sequence[str]:
    """At most 20 of the names, the most alike first. Of very many only some that begin alike are compared."""
    candidates: Iterable[str] = names
    if len(names) > _MAX_NAMES_COMPARED:
        begin_alike = (name for name in names if name[:1] == wanted[:1])
        candidates = itertools.islice(itertools.chain(begin_alike, names), _MAX_NAMES_COMPARED)
    return difflib.get_close_matches(wanted, list(dict.fromkeys(candidates)), n=_MAX_NAMES_SHOWN, cutoff=0.0)
