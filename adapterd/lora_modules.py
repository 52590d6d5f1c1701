"""vLLM's `--lora-modules`, as people and as KServe write it: NAME=PATH, or a JSON object with `name` and `path`.

KServe names each adapter twice, plainly and as `publishers/NAMESPACE/models/NAME`, with the same path. The second can
be no adapter's name here; it becomes another spelling of the first.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapterd.errors import ConfigError
from adapterd.model_name import is_adapter_name, shown

_KEYS = {"name", "path"}
_OTHER_KEYS = {
    "base_model_name": "the base is the one that is served",
    "is_3d_lora_weight": "it is found out",
}


@dataclass(frozen=True)
class LoraModule:
    name: str
    path: Path


@dataclass(frozen=True)
class LoraModules:
    """`folders`: adapter name -> its folder. `spellings`: what else a request's `model` may be -> adapter name."""

    folders: Mapping[str, Path]
    spellings: Mapping[str, str]


NO_MODULES = LoraModules({}, {})


def parse_lora_module(text: str) -> LoraModule:
    """Raises ValueError, in the words of a setting's error."""
    # Where a shell was meant to take the quotes off, and there was none.
    text = text[1:-1] if len(text) > 1 and text[0] == text[-1] == "'" else text
    if text.lstrip().startswith("{"):
        return _from_json(text)
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise ValueError('is neither NAME=PATH nor {"name": NAME, "path": PATH}')
    return LoraModule(name, Path(path))


def _from_json(text: str) -> LoraModule:
    try:
        module = json.loads(text)
    except ValueError as error:
        raise ValueError(f"is no JSON: {error}") from None
    if not isinstance(module, dict) or not all(isinstance(module.get(key), str) for key in _KEYS):
        raise ValueError("has to have a text as 'name' and as 'path'")
    for key in module.keys() - _KEYS:
        raise ValueError(f"has the key {key!r}: {_OTHER_KEYS.get(key, 'it is not known')}; leave it out")
    if not module["name"] or not module["path"]:
        raise ValueError("has an empty 'name' or 'path'")
    return LoraModule(module["name"], Path(module["path"]))


def sort_out(modules: Sequence[LoraModule]) -> LoraModules:
    """Raises ConfigError for a name that comes twice, or that can be neither an adapter's nor another spelling."""
    folders: dict[str, Path] = {}
    names: dict[Path, str] = {}
    for module in modules:
        if not is_adapter_name(module.name):
            continue
        if folders.setdefault(module.name, module.path) != module.path:
            raise ConfigError(
                f"--lora-modules gives {module.name!r} two paths: {folders[module.name]} and {module.path}",
                param="lora_modules",
            )
        names.setdefault(module.path, module.name)
    spellings: dict[str, str] = {}
    for module in modules:
        if is_adapter_name(module.name):
            continue
        if module.path not in names:
            raise ConfigError(
                f"--lora-modules: {shown(module.name)} is no adapter name (letters, digits, '.', '_' and '-'), and no"
                f" other module has the path {module.path} under one",
                param="lora_modules",
            )
        spellings[module.name] = names[module.path]
    return LoraModules(folders, spellings)
