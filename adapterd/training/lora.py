"""What is put beside the base's linears: PEFT's configuration, and the matrices to begin with."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig

from adapterd.adapter import Adapter, read_adapter
from adapterd.core import BaseSpec
from adapterd.deltas import field_that_cannot_be_added
from adapterd.errors import InvalidRequest
from adapterd.render import Renderer
from adapterd.training.recipe import Recipe
from adapterd.training.rules import ALPHA_PER_RANK, DEFAULT_RANK

_logger = logging.getLogger(__name__)


def linears_of(model: Any) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of every linear that takes adapters, by path: all but the head, as in serving."""
    head = model.get_output_embeddings()
    return {
        path: (module.out_features, module.in_features)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def read_warm_start(recipe: Recipe, spec: BaseSpec, renderer: Renderer, fingerprint: str) -> Adapter | None:
    """The adapter to go on from, read as serving reads it: of this base, whole, and finite.

    Raises InvalidRequest if it is more than A and B of one rank and scale, or asks and stops as the base does not:
    rows become tokens as the base's template says, and all else would be lost without a word.
    """
    if recipe.warm_start is None:
        return None
    adapter = read_adapter(
        recipe.warm_start,
        name=recipe.warm_start.name,
        spec=spec,
        tokenizer=renderer.identity,
        base_fingerprint=fingerprint,
    )
    problem = _why_not(adapter, spec, renderer)
    if problem is not None:
        raise InvalidRequest(f"--warm-start {recipe.warm_start}: {problem}", param="warm_start")
    if adapter.generation_defaults:
        _logger.warning(
            "--warm-start %s: its generation defaults (%s) are not carried over",
            recipe.warm_start,
            ", ".join(adapter.generation_defaults),
        )
    return adapter


def _why_not(start: Adapter, spec: BaseSpec, renderer: Renderer) -> str | None:
    """Why an adapter cannot be trained on; None if it can."""
    if start.edits:
        more = sorted({field_that_cannot_be_added(edit) or edit.module for edit in start.edits})
        return f"it changes more than its linears' A and B ({', '.join(more)}), which training would not keep"
    if start.chat_template not in (None, renderer.chat_template):
        return (
            "it brings a chat template other than the base's, and rows are rendered with the base's. If that is what"
            " you want, remove its chat_template.jinja, or the key in its tokenizer_config.json"
        )
    if start.eos_token_ids is not None:
        return (
            f"it ends on tokens {sorted(start.eos_token_ids)}, and rows are trained to end as the base does, on"
            f" {sorted(spec.eos_token_ids)}. If that is what you want, remove eos_token_id from its"
            " generation_config.json and eos_token from its tokenizer_config.json"
        )
    ranks = {matrices.rank for matrices in start.modules}
    scales = {matrices.scale for matrices in start.modules}
    if len(ranks) > 1 or len(scales) > 1:
        return (
            f"its linears have ranks {sorted(ranks)} and scales {sorted(scales)}; only an adapter with one rank and"
            " one scale can be trained on"
        )
    return None


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
