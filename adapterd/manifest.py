"""adapters.yaml: which adapters there shall be, where each comes from, and what its aliases mean.

    version: 1
    adapters:
      support:
        source: hf://acme/support@4f1c20...        # any source; see sources/source.py
        sha256: 9b0e...                            # of its weights, or file -> sha256 of all its files
        pinned: true                               # stays in host memory
        aliases:
          stable: current
          canary: {source: s3://models/support/v8, sha256: 77aa...}

Read strictly: a key that is not known, or occurs twice, is an error. Grammar only.
"""

import hashlib
import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adapterd.errors import AdapterdError, ConfigError
from adapterd.model_name import BASE_ALIAS, check_alias, is_adapter_name
from adapterd.sources.source import Hashes, Source, hashes_text, parse_declared

MAX_BYTES = 16 << 20
CURRENT = "current"
_KEYS = ("source", "sha256", "pinned", "aliases")


@dataclass(frozen=True)
class Declared:
    """One content: where it comes from and what its files hash to, if that was said."""

    source: Source
    hashes: Hashes

    @property
    def text(self) -> list[str | None]:
        return [str(self.source), hashes_text(self.hashes)]


@dataclass(frozen=True)
class ManifestAdapter:
    """One name. An alias that means None follows the current version."""

    name: str
    current: Declared
    is_pinned: bool
    aliases: Mapping[str, Declared | None]

    @property
    def text(self) -> str:
        """Everything above, to tell whether it has changed."""
        aliases = {alias: None if what is None else what.text for alias, what in sorted(self.aliases.items())}
        return json.dumps([self.current.text, self.is_pinned, aliases])


@dataclass(frozen=True)
class Manifest:
    """`sha256` is that of the file."""

    adapters: Mapping[str, ManifestAdapter]
    sha256: str


def read_manifest(path: Path) -> Manifest:
    """Raises ConfigError, naming the file, the adapter and the key at fault."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the manifest {path}: {error.strerror}", param="manifest") from None
    try:
        if len(data) > MAX_BYTES:
            raise _Wrong(f"it has more than {MAX_BYTES} bytes")
        return Manifest(_adapters(yaml.load(data, _StrictLoader)), hashlib.sha256(data).hexdigest())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "no YAML"
        raise ConfigError(f"the manifest {path}{where}: {problem}", param="manifest") from None
    except _Wrong as error:
        raise ConfigError(f"the manifest {path}: {error}", param="manifest") from None
    except RecursionError:
        raise ConfigError(f"the manifest {path} is nested too deeply", param="manifest") from None


class _Wrong(Exception):
    """What is wrong, to be said after the name of the file."""


class _StrictLoader(yaml.SafeLoader):
    """YAML's plain types alone, and no key twice: the library would take the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} occurs twice", key_node.start_mark
                )
            seen.add(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


def _adapters(document: object) -> Mapping[str, ManifestAdapter]:
    if not isinstance(document, dict):
        raise _Wrong("it must be a mapping with 'version: 1' and 'adapters'")
    _check_keys(document, ("version", "adapters"), "it")
    if document.get("version") != 1 or isinstance(document.get("version"), bool):
        raise _Wrong(f"it has version {document.get('version')!r}; this adapterd reads 'version: 1'")
    adapters = document.get("adapters")
    if not isinstance(adapters, dict):
        raise _Wrong("it must have 'adapters': a mapping of names ('adapters: {}' for none)")
    return {name: _adapter(name, entry) for name, entry in adapters.items()}


def _adapter(name: object, entry: object) -> ManifestAdapter:
    if not isinstance(name, str) or not is_adapter_name(name) or name == BASE_ALIAS:
        raise _Wrong(
            f"it names an adapter {name!r}: letters, digits, '.', '_' and '-', at most 128, and not {BASE_ALIAS!r}"
            " (put names that are numbers in quotes)"
        )
    where = f"adapter {name!r}"
    if not isinstance(entry, dict):
        raise _Wrong(f"{where} must be a mapping with 'source'")
    _check_keys(entry, _KEYS, where)
    pinned = entry.get("pinned", False)
    if not isinstance(pinned, bool):
        raise _Wrong(f"{where}: pinned must be true or false, not {pinned!r}")
    aliases = entry.get("aliases", {})
    if not isinstance(aliases, dict):
        raise _Wrong(f"{where}: aliases must be a mapping of names to {CURRENT!r} or a source")
    return ManifestAdapter(
        name,
        _declared(entry, where),
        pinned,
        {alias: _alias(alias, what, where) for alias, what in aliases.items()},
    )


def _alias(alias: object, what: object, where: str) -> Declared | None:
    where = f"{where}, alias {alias!r}"
    try:
        check_alias(str(alias) if isinstance(alias, str) else "")
    except AdapterdError as error:
        raise _Wrong(f"{where}: {error.message}") from None
    if what == CURRENT:
        return None
    if not isinstance(what, dict):
        raise _Wrong(f"{where} must be {CURRENT!r} or a mapping with 'source', not {what!r}")
    _check_keys(what, ("source", "sha256"), where)
    return _declared(what, where)


def _declared(entry: Mapping[str, object], where: str) -> Declared:
    source = entry.get("source")
    if not isinstance(source, str):
        raise _Wrong(f"{where}: 'source' is missing, or no text")
    try:
        return Declared(*parse_declared(source, entry.get("sha256")))
    except AdapterdError as error:
        raise _Wrong(f"{where}: {error.message}") from None


def _check_keys(mapping: Mapping[Any, Any], known: tuple[str, ...], where: str) -> None:
    for key in mapping:
        if key not in known:
            raise _Wrong(f"{where} has an unknown key {key!r}; known are {', '.join(known)}")
