"""How settings are declared and read: one declaration gives flag, variable, TOML key, default and help.

`max_queue` is `--max-queue`, `ADAPTERD_MAX_QUEUE` and `max_queue = 1024` in the file named by `--config`.
A flag wins over a variable, a variable over the file, the file over the default. An unknown key or variable
is an error: a setting that is ignored is worse than one that is refused.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from adapterd.errors import ConfigError

ENV_PREFIX = "ADAPTERD_"
CONFIG_VARIABLE = ENV_PREFIX + "CONFIG"

_BYTE_UNITS = {
    "": 1,
    **{unit: 1000**power for power, unit in enumerate(("b", "kb", "mb", "gb", "tb"))},
    **{unit: 1024**power for power, unit in enumerate(("kib", "mib", "gib", "tib"), start=1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(value: object) -> object:
    """A number of bytes from "512MiB", "2GB", "1048576" or an integer."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    unit = match[2].lower() if match else None
    if match is None or unit not in _BYTE_UNITS:
        raise ValueError("is not a size; write bytes or a unit, as in 512MiB or 2GB")
    return int(float(match[1]) * _BYTE_UNITS[unit])


def _split(separator: str) -> BeforeValidator:
    """A variable holds one string where a flag repeats and a file has a list."""

    def split(value: object) -> object:
        return tuple(part for part in value.split(separator) if part) if isinstance(value, str) else value

    return BeforeValidator(split)


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Paths = Annotated[tuple[Path, ...], _split(os.pathsep)]
Names = Annotated[tuple[str, ...], _split(",")]
Sources = Annotated[Names, "SOURCE"]  # what the help calls one of them
Patterns = Annotated[Names, "PATTERN"]
Expressions = Annotated[tuple[str, ...], _split("\n"), "REGEX"]
Device = Literal["auto", "cpu", "cuda"]
MAP = "what the columns are called: prompt=COLUMN completion=COLUMN system=COLUMN"
LogLevel = Literal["debug", "info", "warning", "error"]


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    command: ClassVar[str]
    positional: ClassVar[str | None] = None
    """The field that is given without a flag."""

    log_level: LogLevel = Field("info", description="how much is logged, to stderr")


S = TypeVar("S", bound=Settings)


def flag(field: str) -> str:
    return "--" + public_name(field).replace("_", "-")


def variable(field: str) -> str:
    return ENV_PREFIX + public_name(field).upper()


def public_name(field: str) -> str:
    """A field whose name pydantic keeps for itself (`json`) carries an underscore that nobody else sees."""
    return field.rstrip("_")


def takes_many(annotation: object) -> bool:
    """Whether a field's flag repeats: `--adapters a b --adapters c`."""
    return get_origin(annotation) is tuple or any(get_origin(part) is tuple for part in get_args(annotation))


def read_settings(
    settings: type[S],
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    config: Path | None,
    *,
    known_fields: Iterable[str],
) -> S:
    """Settings from flags, variables and the TOML file; a variable of none of `known_fields` is refused.

    Raises ConfigError: a line for each thing that is wrong, naming the flag, variable or key it came from.
    """
    if config is None and environ.get(CONFIG_VARIABLE):
        config = Path(environ[CONFIG_VARIABLE])
    values: dict[str, object] = {}
    origin: dict[str, str] = {}
    for source, names in (
        (_read_toml(settings, config), lambda field: f"{field!r} in {config}"),
        (_read_environment(settings, environ, known_fields), variable),
        (dict(flags), flag),
    ):
        values |= source
        origin |= {field: names(field) for field in source}
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        lines = [_sentence(item, origin) for item in error.errors(include_url=False)]
        location = error.errors()[0]["loc"]
        raise ConfigError("\n".join(lines), param=str(location[0]) if location else None) from None


def _sentence(error: Mapping[str, Any], origin: Mapping[str, str]) -> str:
    if not error["loc"]:  # a check over several settings: its message names them
        return str(error["msg"])
    field = str(error["loc"][0])
    if error["type"] == "missing":
        return f"{flag(field)} is required"
    reason = error["msg"].removeprefix("Value error, ").removeprefix("Input ").removeprefix("String ")
    return f"{origin[field]}: {error['input']!r} {reason}"


def _read_toml(settings: type[Settings], config: Path | None) -> dict[str, object]:
    if config is None:
        return {}
    try:
        with config.open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {config}: {error.strerror}", param="config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config} is not TOML: {error}", param="config") from None
    fields = {public_name(field): field for field in settings.model_fields}
    for key in table:
        if key not in fields:
            raise ConfigError(f"unknown key {key!r} in {config}{_near(key, fields)}", param=key)
    return {fields[key]: _beside(config, settings, fields[key], value) for key, value in table.items()}


def _beside(config: Path, settings: type[Settings], field: str, value: object) -> object:
    """Relative paths in a file are relative to that file, so that a recipe can live beside its rows."""
    annotation = settings.model_fields[field].annotation
    if Path not in (annotation, *get_args(annotation)):
        return value
    if isinstance(value, list):
        return tuple(config.parent / part if isinstance(part, str) else part for part in value)
    return config.parent / value if isinstance(value, str) else value


def _read_environment(
    settings: type[Settings], environ: Mapping[str, str], known_fields: Iterable[str]
) -> dict[str, object]:
    known = {variable(field) for field in known_fields} | {CONFIG_VARIABLE}
    for name in environ:
        if name.startswith(ENV_PREFIX) and name not in known:
            raise ConfigError(f"unknown variable {name}{_near(name, known)}", param=name)
    return {field: environ[variable(field)] for field in settings.model_fields if variable(field) in environ}


def _near(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=2, cutoff=0.85)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""
