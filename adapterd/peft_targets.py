"""What a PEFT configuration asks of one base: which modules and parameters it changes, and the tensors it then needs.

Shapes and names only. PEFT decides by name; each rule here says which of its functions it follows.
"""

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from adapterd.core import BaseModules, BaseSpec
from adapterd.errors import AdapterRefused
from adapterd.file_names import CONFIG_FILE
from adapterd.peft_config import PeftConfig, parse_peft_config

PREFIX = "base_model.model."
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")
"""The names by which PEFT knows embeddings when it ties adapters (its EMBEDDING_LAYER_NAMES)."""
_MAX_LAYOUTS = 32


@dataclass(frozen=True)
class Targets:
    """linears: path -> (d_out, d_in), the head among them; parameters: module -> bare parameters that get factors, in
    the base's order; saved: names of base tensors with a trained copy; biases: names of trained biases; rows: module
    -> token ids with trained rows. With `ties_factors`, `ties_saved` or `ties_rows` the head's are the embedding's.
    `are_required`: without target_modules PEFT picks them by model type, so what the file has is what is meant.
    """

    linears: Mapping[str, tuple[int, int]]
    embedding: str | None = None
    parameters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ties_factors: bool = False
    ties_saved: bool = False
    ties_rows: bool = False
    are_required: bool = True


@dataclass(frozen=True)
class ExpectedTensor:
    """rank is what the shape follows from, for the error; None if no rank enters it."""

    shape: tuple[int, ...]
    rank: int | None = None
    is_required: bool = True


@dataclass(frozen=True)
class Layout:
    """A configuration, what it changes in one base, and every tensor that PEFT would read for it."""

    config: PeftConfig
    targets: Targets
    expected: Mapping[str, ExpectedTensor]


class Layouts:
    """Layouts for one base. Adapters of one kind have one configuration, byte for byte, and it is worked out once.

    Callable from any thread.
    """

    def __init__(self, spec: BaseSpec) -> None:
        self._spec = spec
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, Layout] = OrderedDict()

    def of(self, config_bytes: bytes, *, adapter: str) -> Layout:
        """Raises AdapterRefused, naming `adapter` and the field, for what cannot be applied."""
        with self._lock:
            layout = self._known.get(config_bytes)
        if layout is None:
            config = parse_peft_config(config_bytes, adapter=adapter)
            targets = find_targets(config, self._spec, adapter=adapter)
            layout = Layout(config, targets, expected_tensors(targets, config, self._spec))
        with self._lock:
            self._known[config_bytes] = layout
            self._known.move_to_end(config_bytes)
            if len(self._known) > _MAX_LAYOUTS:
                self._known.popitem(last=False)
        return layout


Refuse = Callable[[str], AdapterRefused]


def find_targets(config: PeftConfig, spec: BaseSpec, *, adapter: str) -> Targets:
    """Raises AdapterRefused, naming the field, for what cannot be applied to this base."""
    modules = spec.modules

    def refuse(reason: str) -> AdapterRefused:
        return AdapterRefused(f"adapter {adapter!r}: {CONFIG_FILE}: {reason}")

    has_embedding = config.target_modules is not None and config.target_modules != "all-linear"
    embedding = modules.embedding if has_embedding and _targets(config, modules.embedding) else None
    linears = {path: shape for path, shape in spec.lora_targets.items() if config.targets(path)}
    # all-linear leaves the output head out, as PEFT does.
    head = modules.head if has_embedding and _targets(config, modules.head) else None
    ties_saved = config.ensure_weight_tying and modules.is_tied and _names_embedding(config.modules_to_save)
    ties_factors = (
        config.ensure_weight_tying
        and modules.is_tied
        and not ties_saved
        and _targets_embedding_by_name(config)
    )
    if ties_factors:
        embedding, head = modules.embedding, modules.head
    if head is not None and head not in linears:
        vocab_size, d_in = modules.parameters[f"{head}.weight"]
        linears[head] = (vocab_size, d_in)
    if ties_factors and embedding and head and config.rank(embedding) != config.rank(head):
        raise refuse("ensure_weight_tying=true with another rank for the head than for the embedding")
    if embedding is not None and config.lora_bias:
        raise refuse("lora_bias=true with an embedding among target_modules, which PEFT cannot make")
    parameters = _parameters(config, spec, linears, refuse)
    saved = _saved(config, modules, ties_saved, [*linears, *parameters], refuse)
    rows, ties_rows = _rows(config, modules, embedding, saved, refuse)
    return Targets(
        linears=linears,
        embedding=embedding,
        parameters=parameters,
        saved=saved,
        biases=_biases(config, modules, linears, saved, refuse),
        rows=rows,
        ties_factors=ties_factors,
        ties_saved=ties_saved,
        ties_rows=ties_rows,
        are_required=config.target_modules is not None,
    )


def expected_tensors(targets: Targets, config: PeftConfig, spec: BaseSpec) -> dict[str, ExpectedTensor]:
    """Every tensor that PEFT would read for these targets, by its name in the file."""
    modules = spec.modules
    found: dict[str, ExpectedTensor] = {}

    def expect(name: str, *shape: int, rank: int | None = None, is_required: bool = True) -> None:
        found[PREFIX + name] = ExpectedTensor(shape, rank, is_required)

    for path, (d_out, d_in) in targets.linears.items():
        rank, is_required = config.rank(path), targets.are_required
        expect(f"{path}.lora_A.weight", rank, d_in, rank=rank, is_required=is_required)
        expect(f"{path}.lora_B.weight", d_out, rank, rank=rank, is_required=is_required)
        if config.lora_bias:
            expect(f"{path}.lora_B.bias", d_out, is_required=is_required)
        if config.use_dora:
            expect(f"{path}.lora_magnitude_vector", d_out, is_required=is_required)
    if targets.embedding is not None:
        path = targets.embedding
        rank = config.rank(path)
        vocab_size, d = modules.parameters[f"{path}.weight"]
        expect(f"{path}.lora_embedding_A", rank, vocab_size, rank=rank)
        expect(f"{path}.lora_embedding_B", d, rank, rank=rank)
        if config.use_dora:
            expect(f"{path}.lora_magnitude_vector", d)
    for copied in (targets.embedding, modules.head if modules.head in targets.linears else None):
        if copied is not None:
            # PEFT saves the base's own weight beside adapters of embeddings, unless it is told not to.
            expect(f"{copied}.base_layer.weight", *modules.parameters[f"{copied}.weight"], is_required=False)
    for path, names in targets.parameters.items():
        for depth, name in enumerate(reversed(names)):
            key = f"{path}{'.base_layer' * depth}"
            rank = config.rank(f"{path}.{name}")
            num_experts, d_out, d_in = expert_shape(modules, path, name)
            expect(f"{key}.lora_A.weight", num_experts * rank, d_in, rank=rank)
            expect(f"{key}.lora_B.weight", d_out, num_experts * rank, rank=rank)
    for name in targets.saved:
        expect(name, *modules.parameters[name])
    for name in targets.biases:
        path = name.rpartition(".")[0]
        key = f"{path}.base_layer.bias" if path in targets.linears else name
        expect(key, *modules.parameters[name])
    for path, token_ids in targets.rows.items():
        d = modules.parameters[f"{path}.weight"][1]
        expect(f"{path}.token_adapter.trainable_tokens_delta", len(token_ids), d)
    return found


def expert_shape(modules: BaseModules, path: str, parameter: str) -> tuple[int, int, int]:
    """(num_experts, d_out, d_in) of a bare parameter; one expert for a plain matrix, which is [d_out, d_in]."""
    shape = modules.parameters[f"{path}.{parameter}"]
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    num_experts, first, second = shape
    return (num_experts, second, first) if modules.experts[path] else (num_experts, first, second)


def _targets(config: PeftConfig, path: str | None) -> bool:
    return path is not None and config.targets(path)


def _names_embedding(names: tuple[str, ...]) -> bool:
    return any(name.rpartition(".")[2] in _EMBEDDING_NAMES for name in names)


def _targets_embedding_by_name(config: PeftConfig) -> bool:
    """PEFT's `_check_tied_modules`."""
    targets = config.target_modules
    if targets is None:
        return False
    if isinstance(targets, str):
        return any(re.fullmatch(targets, name) for name in _EMBEDDING_NAMES)
    return _names_embedding(targets)


def _parameters(
    config: PeftConfig, spec: BaseSpec, linears: Mapping[str, tuple[int, int]], refuse: Refuse
) -> dict[str, tuple[str, ...]]:
    """PEFT's `_inject_parameters`: wrappers are nested in the order in which a module holds its parameters."""
    modules = spec.modules
    found: dict[str, tuple[str, ...]] = {}
    for full_name, shape in modules.parameters.items():
        if not config.targets_parameter(full_name):
            continue
        path, _, name = full_name.rpartition(".")
        if len(shape) == 3 and path not in modules.experts:
            raise refuse(
                f"target_parameters: {full_name!r} is of no mixture that transformers' interface runs"
            )
        if len(shape) not in (2, 3) or path in (modules.embedding, modules.head):
            raise refuse(f"target_parameters: {full_name!r} of shape {list(shape)} takes no factors here")
        if len(shape) == 2 and name != "weight":
            raise refuse(f"target_parameters: {full_name!r} is a plain matrix of another name than 'weight'")
        if path in linears:
            raise refuse(f"target_parameters: {full_name!r} is also among target_modules")
        if path not in modules.input_axes:
            raise refuse(f"target_parameters: {full_name!r} belongs to no module that works token by token")
        if config.lora_bias or config.use_dora:
            raise refuse("target_parameters go neither with lora_bias nor with use_dora, in PEFT as well")
        found[path] = (*found.get(path, ()), name)
    for wanted in config.target_parameters:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in modules.parameters):
            raise refuse(f"target_parameters: the base has no parameter {wanted!r}")
    return found


def _saved(
    config: PeftConfig, modules: BaseModules, is_tied: bool, adapted: list[str], refuse: Refuse
) -> tuple[str, ...]:
    """PEFT's `_set_trainable` over modules_to_save: every tensor below a module that is matched."""
    if not config.modules_to_save:
        return ()
    paths = dict.fromkeys(
        ".".join(parts[:length])
        for parts in (name.split(".") for name in modules.parameters)
        for length in range(1, len(parts))
    )
    matched = [path for path in paths if config.saves(path)]
    for wanted in config.modules_to_save:
        if not any(path.endswith(wanted) for path in paths):
            raise refuse(f"modules_to_save: the base has no module {wanted!r} with weights")
    if is_tied and modules.embedding is not None and modules.head is not None:
        matched += [path for path in (modules.embedding, modules.head) if path not in matched]
    for path in matched:
        inside = next((other for other in [*matched, *adapted] if other.startswith(f"{path}.")), None)
        if inside is not None:
            raise refuse(f"modules_to_save: {path!r} holds {inside!r}, which is adapted by itself")
    saved = [
        name
        for name in modules.parameters
        if any(name.startswith(f"{path}.") for path in matched)
    ]  # fmt: skip
    for name in saved:
        path, _, parameter = name.rpartition(".")
        if path not in modules.input_axes or path in modules.experts:
            raise refuse(
                f"modules_to_save: a copy of {path!r} cannot run for some tokens of a batch; embeddings, the head,"
                " norms, linears and routers can"
            )
        if is_tied and path == modules.head and parameter != "weight":
            raise refuse("ensure_weight_tying=true drops the bias of this base's head")
    return tuple(saved)


def _biases(
    config: PeftConfig,
    modules: BaseModules,
    linears: Mapping[str, tuple[int, int]],
    saved: tuple[str, ...],
    refuse: Refuse,
) -> tuple[str, ...]:
    """PEFT's `_get_learnable_bias_state_dict`."""
    if config.bias == "none":
        return ()
    names = tuple(
        name
        for name in modules.parameters
        if name.endswith(".bias") and (config.bias == "all" or name.rpartition(".")[0] in linears)
    )
    twice = next((name for name in names if name in saved), None)
    if twice is not None:
        raise refuse(f"bias={config.bias!r} beside a copy of {twice!r} in modules_to_save")
    return names


def _rows(
    config: PeftConfig,
    modules: BaseModules,
    embedding: str | None,
    saved: tuple[str, ...],
    refuse: Refuse,
) -> tuple[dict[str, tuple[int, ...]], bool]:
    """PEFT's `set_additional_trainable_modules`: module -> token ids, and whether the head follows the embedding."""
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}, False
    if modules.embedding is None:
        raise refuse("trainable_token_indices: this base's embedding cannot run for some tokens of a batch")
    if not isinstance(wanted, Mapping):
        wanted = {modules.embedding: wanted}
    rows: dict[str, tuple[int, ...]] = {}
    for name, token_ids in wanted.items():
        paths = [path for path in (modules.embedding, modules.head) if path and path.endswith(name)]
        if len(paths) != 1:
            raise refuse(f"trainable_token_indices: {name!r} is neither the embedding nor the head")
        path = paths[0]
        vocab_size = modules.parameters[f"{path}.weight"][0]
        beyond = next((token_id for token_id in token_ids if token_id >= vocab_size), None)
        if beyond is not None:
            raise refuse(
                f"trainable_token_indices: the base has {vocab_size} tokens, and {beyond} is none of them; new tokens"
                " need a base whose embedding has been resized for them"
            )
        if path == embedding or f"{path}.weight" in saved or path in rows:
            raise refuse(f"trainable_token_indices: {path!r} is changed by another field as well")
        if f"{path}.bias" in modules.parameters:
            raise refuse(f"trainable_token_indices: PEFT leaves the bias of {path!r} out of its forward")
        rows[path] = token_ids
    of_head = rows.get(modules.head) if modules.head is not None else None
    of_embedding = rows.get(modules.embedding)
    differ = of_head is not None and of_head != of_embedding
    is_tied = modules.is_tied and of_embedding is not None
    if is_tied and differ and config.ensure_weight_tying:
        raise refuse(
            "trainable_token_indices: other tokens for the head than for the embedding it is tied to"
        )
    if is_tied and not differ and modules.head is not None:
        rows.pop(modules.head, None)
        return rows, True
    return rows, False
