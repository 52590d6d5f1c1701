"""What is put beside the base's linears: PEFT's configuration, and the matrices to begin with."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig

from adapterd.adapter import Adapter, read_adapter
from adapterd.core import BaseSpec
from adapterd.errors import InvalidRequest
from adapterd.render import Renderer
from adapterd.training.recipe import Recipe
from adapterd.training.rules import ALPHA_PER_RANK, DEFAULT_RANK


def linears_of(model: Any) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of every linear that takes adapters, by path: all but the head, as in serving."""
    head = model.get_output_embeddings()
    return {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def read_warm_start(recipe: Recipe, spec: BaseSpec, renderer: Renderer, fingerprint: str) -> Adapter | None:
    """The adapter to go on from, read as serving reads it: of this base, whole, and finite."""
    if recipe.warm_start is None:
        return None
    adapter = read_adapter(
        recipe.warm_start,
        name=recipe.warm_start.name,
        spec=spec,
        tokenizer=renderer.identity,
        base_fingerprint=fingerprint,
    )
    ranks = {matrices.rank for matrices in adapter.modules}
    scales = {matrices.scale for matrices in adapter.modules}
    if len(ranks) > 1 or len(scales) > 1:
        raise InvalidRequest(
            f"--warm-start {recipe.warm_start}: its linears have ranks {sorted(ranks)} and scales"
            f" {sorted(scales)}; only an adapter with one rank and one scale can be trained on",
            param="warm_start",
        )
    return adapter


def lora_config(recipe: Recipe, spec: BaseSpec, start: Adapter | None) -> tuple[LoraConfig, float]:
    """PEFT's configuration, and the scale that it comes to."""
    if start is not None:
        return _warm_config(recipe, start)
    rank = recipe.rank or DEFAULT_RANK
    alpha = recipe.alpha or ALPHA_PER_RANK * rank
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        target_modules=_check_targets(spec.lora_targets, recipe.target_modules),
        task_type="CAUSAL_LM",
    )
    return config, alpha / (math.sqrt(rank) if recipe.use_rslora else rank)


def _warm_config(recipe: Recipe, start: Adapter) -> tuple[LoraConfig, float]:
    """Rank, scale and targets are the adapter's; a recipe that says otherwise is refused."""
    rank, scale = start.modules[0].rank, start.modules[0].scale
    for name, told, found in (
        ("rank", recipe.rank, rank),
        ("alpha", recipe.alpha, scale * rank),
        ("use_rslora", recipe.use_rslora or None, None),
        ("use_dora", recipe.use_dora or None, None),
    ):
        if told is not None and (found is None or not math.isclose(told, found)):
            kept = "what the adapter has" if found is None else f"the adapter's {found:g}"
            raise InvalidRequest(
                f"{name}={told:g} cannot be changed with --warm-start: {kept} stays; leave it out", param=name
            )
    if list(recipe.target_modules) != ["all-linear"]:
        raise InvalidRequest(
            "target_modules cannot be changed with --warm-start: the adapter's linears are trained; leave it out",
            param="target_modules",
        )
    modules = [matrices.module for matrices in start.modules]
    config = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=modules, task_type="CAUSAL_LM")
    return config, scale


def _check_targets(linears: Mapping[str, tuple[int, int]], names: Sequence[str]) -> list[str] | str:
    """PEFT's `target_modules`. PEFT passes over a name that matches nothing if another does; here it is refused."""
    if list(names) == ["all-linear"]:
        return "all-linear"
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in linears):
            known = sorted({path.rpartition(".")[2] for path in linears})
            raise InvalidRequest(
                f"target_modules: the base has no linear {name!r} that takes adapters; it has"
                f" {', '.join(known)} (or use all-linear)",
                param="target_modules",
            )
    return list(names)


@torch.no_grad()
def copy_matrices(start: Adapter, trainable: Mapping[str, torch.nn.Parameter]) -> None:
    """Begin where the warm start ended."""
    for matrices in start.modules:
        for side, tensor in (("A", matrices.a), ("B", matrices.b)):
            trainable[f"{matrices.module}.lora_{side}.default.weight"].copy_(tensor)
