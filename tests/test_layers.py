"""The layers of the package: nothing imports upward, and what decides or serves imports no torch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import adapterd

PACKAGE = Path(adapterd.__file__).parent

# From the bottom up. A module may import from its own layer and from those below. Of the two in the middle,
# what decides (engine) and what computes (model), neither may know the other.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        *("control_groups", "core", "errors", "file_names", "first_process", "host_memory", "polling"),
        *("published", "retries", "stages", "token_counts", "__init__"),
    ),
    ("busiest", "exposition", "router_view", "series", "request_record", "metrics"),
    (
        *("config", "lora_modules", "peft_fields", "deltas", "proof", "model_name"),
        "messages",
    ),
    ("peft_config", "peaks", "sidecars", "tensor_file", "token_table"),
    ("sources.source", "sources.allow", "sources.partial"),
    ("manifest", "sources"),
    ("adapter_files", "peft_targets", "peft_deltas", "peft_proof"),
    ("adapter", "adapter_writer", "render"),
    ("composition", "versions", "watch"),
    ("names",),
    ("database", "folders", "reading", "reading_queue"),
    ("catalog",),
    ("changes", "readings", "lookup", "entries", "device_pins"),
    ("first_use", "folder_names", "loading", "manifest_owner"),
    ("resolving",),
    ("registry",),
    ("engine.waiting",),
    (
        *("engine.slots", "engine.residency", "engine.blocks", "engine.step_room", "engine.scheduler"),
        *("engine.detokenizer", "engine.outputs", "model"),
    ),
    ("engine",),
    ("daemon", "idle_proofs"),
    ("server", "training", "adapter_commands", "daemon_client", "full_proof"),
    ("evaluation",),
    ("cli",),
    ("__main__",),
)
NO_TORCH = (
    *("core", "config", "errors", "metrics", "series", "router_view", "messages", "server", "cli"),
    *(
        "engine.slots",
        "engine.residency",
        "engine.waiting",
        "engine.blocks",
        "engine.step_room",
        "engine.scheduler",
    ),
    *("engine.detokenizer", "engine.outputs"),
    *("control_groups", "file_names", "host_memory", "manifest", "published", "sources"),
    *("stages", "token_counts"),
    *("adapter_commands", "daemon_client"),
    *("engine.checks", "engine.engine", "engine.inbox", "engine.offline", "engine.seams"),
    "model.base_config",
)


def modules() -> list[tuple[str, ast.Module]]:
    """("engine.blocks", its tree) for every file of the package."""
    return [
        (
            ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"),
            ast.parse(path.read_text()),
        )
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names of all that a module imports, wherever in it, `from a import b` as "a.b"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_in(name: str, group: str) -> bool:
    return name == group or name.startswith(f"{group}.")


def layer_of(name: str) -> int:
    found = [
        (len(group), layer) for layer, groups in enumerate(LAYERS) for group in groups if is_in(name, group)
    ]
    assert found, f"adapterd.{name} stands in no layer of this test"
    return max(found)[1]


def inner_imports(tree: ast.Module) -> set[str]:
    """What a module imports of this package, as module names: "engine.blocks"."""
    inner = set()
    for name in imports(tree):
        if is_in(name, "adapterd"):
            target = name.removeprefix("adapterd").removeprefix(".")
            while target and target not in NAMES:
                target = target.rpartition(".")[0]
            inner.add(target or "__init__")
    return inner


MODULES = modules()
NAMES = {name for name, _ in MODULES}
every_module = pytest.mark.parametrize(("name", "tree"), MODULES, ids=[name for name, _ in MODULES])


@every_module
def test_nothing_imports_upward(name: str, tree: ast.Module) -> None:
    upward = {target for target in inner_imports(tree) if layer_of(target) > layer_of(name)}
    assert not upward, f"adapterd.{name} imports from layers above it: {sorted(upward)}"


def test_what_decides_and_what_computes_do_not_know_each_other() -> None:
    middle = layer_of("model")
    for name, tree in MODULES:
        if layer_of(name) == middle:
            for target in inner_imports(tree):
                assert layer_of(target) < middle or is_in(name, "model") == is_in(target, "model"), (
                    name,
                    target,
                )


@every_module
def test_what_decides_or_serves_imports_no_torch(name: str, tree: ast.Module) -> None:
    if any(is_in(name, group) for group in NO_TORCH):
        assert not [target for target in imports(tree) if is_in(target, "torch")]


def test_what_runs_on_the_device_imports_nothing_of_http() -> None:
    for name, tree in MODULES:
        if not any(is_in(name, group) for group in ("server", "cli", "config")):
            outside = {target.partition(".")[0] for target in imports(tree)}
            assert not outside & {"starlette", "uvicorn", "pydantic", "pydantic_settings", "httpx"}, name


def test_the_test_itself_sees_an_upward_import() -> None:
    tree = ast.parse("from adapterd.server.app import create_app\nimport adapterd.errors")
    assert inner_imports(tree) == {"server.app", "errors"}
    assert layer_of("server.app") > layer_of("engine.blocks") > layer_of("errors")
