"""The tensors of a PEFT directory become what they change: deltas on linears, and edits of everything else.

Names and shapes were checked before (`peft_targets.py`). Where PEFT's own forward needs the base's weights (DoRA's
norms, the bias that a trained one replaces), they are read here, once, so that serving never does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from adapterd.core import BaseSpec
from adapterd.deltas import (
    Edit,
    EmbeddingMatrices,
    ExpertMatrices,
    LoraMatrices,
    OutputAffine,
    ReplacedParameters,
    ReplacedRows,
)
from adapterd.errors import AdapterRefused
from adapterd.peft_config import PeftConfig
from adapterd.peft_targets import PREFIX, Targets, expert_shape

BaseWeights = Callable[[str], torch.Tensor]
"""A tensor of the base by its name, on whatever device it is; see BaseModules.parameters."""

_NORM_ROWS = 1024
"""Rows of a weight to turn to float32 at a time."""


@dataclass(frozen=True)
class Source:
    """Where a delta's factors come from: tensors of the file, and the name by which PEFT looks up rank and alpha."""

    a: str
    b: str
    key: str


@dataclass(frozen=True)
class Deltas:
    """`modules`: LoRA on the linears that segments share; `edits`: all else. `unchanged` names tensors of the file
    that say what the base says already, and so change nothing. `sources`: by `source_key` of each delta with factors.
    """

    modules: tuple[LoraMatrices, ...]
    edits: tuple[Edit, ...]
    unchanged: frozenset[str]
    sources: Mapping[str, Source]


def source_key(delta: LoraMatrices | EmbeddingMatrices | ExpertMatrices) -> str:
    return f"{delta.module}.{delta.parameter}" if isinstance(delta, ExpertMatrices) else delta.module


def make_deltas(
    tensors: Mapping[str, torch.Tensor],
    targets: Targets,
    config: PeftConfig,
    spec: BaseSpec,
    base_weights: BaseWeights | None,
    *,
    adapter: str,
) -> Deltas:
    """Raises AdapterRefused."""
    maker = _Maker(tensors, targets, config, spec, base_weights, adapter)
    modules: list[LoraMatrices] = []
    edits: list[Edit] = []
    for path in sorted(targets.linears):
        if PREFIX + f"{path}.lora_A.weight" in tensors:
            (modules if path in spec.lora_targets else edits).append(maker.linear(path))
    edits += maker.embedding()
    for path, names in targets.parameters.items():
        for depth, name in enumerate(reversed(names)):
            made = maker.parameter(path, name, depth)
            if isinstance(made, LoraMatrices):
                modules.append(made)
            else:
                edits.append(made)
    modules.sort(key=lambda matrices: matrices.module)
    edits += maker.affines()
    edits += maker.replaced()
    edits += maker.rows()
    maker.check_base_copies()
    maker.check_ties()
    return Deltas(tuple(modules), tuple(edits), frozenset(maker.unchanged), maker.sources)


class _Maker:
    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        targets: Targets,
        config: PeftConfig,
        spec: BaseSpec,
        base_weights: BaseWeights | None,
        adapter: str,
    ) -> None:
        self._tensors = tensors
        self._targets = targets
        self._config = config
        self._spec = spec
        self._base_weights = base_weights
        self._adapter = adapter
        self.unchanged: set[str] = set()
        self.sources: dict[str, Source] = {}

    def linear(self, path: str) -> LoraMatrices:
        a, b = (f"{PREFIX}{path}.lora_{side}.weight" for side in "AB")
        self.sources[path] = Source(a, b, path)
        return LoraMatrices(path, self._tensors[a], self._tensors[b], self._config.scale(path))

    def embedding(self) -> list[Edit]:
        path = self._targets.embedding
        if path is None:
            return []
        a, b = (f"{PREFIX}{path}.lora_embedding_{side}" for side in "AB")
        self.sources[path] = Source(a, b, path)
        return [EmbeddingMatrices(path, self._tensors[a], self._tensors[b], self._config.scale(path))]

    def parameter(self, path: str, name: str, depth: int) -> Edit:
        """PEFT's `ParamWrapper`: factors of all experts side by side, by expert in A's rows, by rank in B's columns."""
        key = f"{PREFIX}{path}{'.base_layer' * depth}"
        a, b = self._tensors[f"{key}.lora_A.weight"], self._tensors[f"{key}.lora_B.weight"]
        full_name = f"{path}.{name}"
        scale = self._config.scale(full_name)
        source = Source(f"{key}.lora_A.weight", f"{key}.lora_B.weight", full_name)
        if len(self._spec.modules.parameters[full_name]) == 3:
            num_experts, d_out, d_in = expert_shape(self._spec.modules, path, name)
            self.sources[full_name] = source
            return ExpertMatrices(
                path,
                name,
                a.view(num_experts, -1, d_in),
                b.view(d_out, -1, num_experts).permute(2, 0, 1).contiguous(),
                scale,
            )
        is_linear = self._spec.lora_targets.get(path) == self._spec.modules.parameters[full_name]
        # PEFT adds B A to the weight as it is stored: to a transposed one that is no LoRA on the linear.
        if is_linear and path not in self._spec.modules.transposed:
            self.sources[path] = source
            return LoraMatrices(path, a, b, scale)
        weight = self._base(full_name)
        merged = weight.float().cpu() + scale * (b.float() @ a.float())
        return ReplacedParameters(path, "target_parameters", {name: merged.to(weight.dtype)}, scale)

    def check_base_copies(self) -> None:
        """PEFT saves the base's own embedding beside adapters of it. It must still be the base's."""
        for path in (self._spec.modules.embedding, self._spec.modules.head):
            name = f"{PREFIX}{path}.base_layer.weight"
            if name not in self._tensors:
                continue
            saved, own = self._tensors[name], self._base(f"{path}.weight")
            self.unchanged.add(name)
            if not _same(saved, own):
                raise AdapterRefused(
                    f"adapter {self._adapter!r}: {name!r} is another weight than the base's: the embedding was"
                    " trained or resized before the adapter was. Serve that base, or list the module in"
                    " modules_to_save instead of target_modules"
                )

    def affines(self) -> list[Edit]:
        """DoRA's magnitudes, biases of lora_B, and trained biases of linears, one edit for each module."""
        edits: list[Edit] = []
        trained = {name.rpartition(".")[0]: name for name in self._targets.biases}
        linears = {**self._spec.lora_targets, **self._targets.linears}
        for path in sorted(linears):
            adapted = path in self._targets.linears and f"{PREFIX}{path}.lora_A.weight" in self._tensors
            dora = self._config.use_dora and adapted
            lora_bias = self._config.lora_bias and adapted
            if not dora and not lora_bias and path not in trained:
                continue
            factor = self._dora_factor(path) if dora else None
            offset: torch.Tensor | None = None
            if f"{path}.bias" in self._spec.modules.parameters and (dora or path in trained):
                own = self._base(f"{path}.bias").float().cpu()
                new = self._trained_bias(path, trained[path]) if path in trained else own
                offset = new - (own if factor is None else own * factor)
            if lora_bias:
                bias = self._tensors[f"{PREFIX}{path}.lora_B.bias"].float() * self._config.scale(path)
                offset = bias if offset is None else offset + bias
            if offset is not None and not offset.any():
                offset = None
            if factor is not None or offset is not None:
                field = "use_dora" if dora else "lora_bias" if lora_bias else "bias"
                edits.append(OutputAffine(path, field, factor, offset))
        if self._config.use_dora and self._targets.embedding is not None:
            path = self._targets.embedding
            edits.append(OutputAffine(path, "use_dora", self._dora_embedding_factor(path), None))
        return edits

    def replaced(self) -> list[Edit]:
        """modules_to_save, and trained biases of what is no linear: norms and routers."""
        found: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
        for name in self._targets.saved:
            path, _, parameter = name.rpartition(".")
            found.setdefault((path, "modules_to_save"), {})[parameter] = self._tensors[PREFIX + name]
        linears = {**self._spec.lora_targets, **self._targets.linears}
        for name in self._targets.biases:
            path, _, parameter = name.rpartition(".")
            if path in linears:
                continue
            values, own = self._tensors[PREFIX + name], self._base(name)
            if _same(values, own):
                self.unchanged.add(PREFIX + name)
            elif path not in self._spec.modules.input_axes:
                raise AdapterRefused(
                    f"adapter {self._adapter!r}: bias: {name!r} was trained, and {path!r} cannot run with another"
                    " bias for some tokens of a batch"
                )
            else:
                found.setdefault((path, "bias"), {})[parameter] = values
        return [ReplacedParameters(path, field, tensors) for (path, field), tensors in found.items()]

    def rows(self) -> list[Edit]:
        edits: list[Edit] = []
        modules = self._spec.modules
        for path, token_ids in self._targets.rows.items():
            rows = self._tensors[f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"]
            edits.append(ReplacedRows(path, "trainable_token_indices", token_ids, rows))
            if self._targets.ties_rows and path == modules.embedding and modules.head is not None:
                edits.append(ReplacedRows(modules.head, "trainable_token_indices", token_ids, rows))
        return edits

    def check_ties(self) -> None:
        """What PEFT keeps in one place under ensure_weight_tying must be one thing in the file as well."""
        modules, tensors = self._spec.modules, self._tensors
        pairs: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        if self._targets.ties_factors:
            head, embedding = f"{PREFIX}{modules.head}", f"{PREFIX}{modules.embedding}"
            for side, other in ("AB", "BA"):
                name = f"{head}.lora_{side}.weight"
                pairs.append((name, tensors[name], tensors[f"{embedding}.lora_embedding_{other}"].T))
        if self._targets.ties_saved:
            name = f"{PREFIX}{modules.head}.weight"
            pairs.append((name, tensors[name], tensors[f"{PREFIX}{modules.embedding}.weight"]))
        for name, of_head, of_embedding in pairs:
            if not torch.equal(of_head, of_embedding):
                raise AdapterRefused(
                    f"adapter {self._adapter!r}: ensure_weight_tying=true, but {name!r} is not the embedding's"
                )

    def _trained_bias(self, path: str, name: str) -> torch.Tensor:
        key = f"{PREFIX}{path}.base_layer.bias" if path in self._targets.linears else PREFIX + name
        return self._tensors[key].float()

    def _dora_factor(self, path: str) -> torch.Tensor:
        """magnitude / ||W + scale * B A|| by row of W. Source: DoRA, arXiv 2402.09353, section 4.3."""
        matrices = self.linear(path)
        weight = self._base(f"{path}.weight")
        if path in self._spec.modules.transposed:
            weight = weight.T
        return self._magnitude(path) / _row_norms(weight, matrices.a, matrices.b, matrices.scale)

    def _dora_embedding_factor(self, path: str) -> torch.Tensor:
        """The same over columns: an embedding's output has the weight's columns."""
        a, b = (self._tensors[f"{PREFIX}{path}.lora_embedding_{side}"] for side in "AB")
        weight = self._base(f"{path}.weight").T
        return self._magnitude(path) / _row_norms(weight, a, b, self._config.scale(path))

    def _magnitude(self, path: str) -> torch.Tensor:
        return self._tensors[f"{PREFIX}{path}.lora_magnitude_vector"].float()

    def _base(self, name: str) -> torch.Tensor:
        if self._base_weights is None:
            raise AdapterRefused(
                f"adapter {self._adapter!r}: it changes {name!r}, which can only be read beside the base's weights"
            )
        return self._base_weights(name).detach()


def _same(values: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether values are the base's, in the base's own type."""
    return torch.equal(values.to(own.device, own.dtype), own)


def _row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """||weight + scale * b @ a|| by row, float32 on the CPU, a piece at a time. weight: [d_out, d_in]."""
    a = a.to(weight.device, torch.float32)
    norms = torch.empty(weight.shape[0])
    for start in range(0, weight.shape[0], _NORM_ROWS):
        part = slice(start, start + _NORM_ROWS)
        merged = weight[part].float() + scale * (b[part].to(weight.device, torch.float32) @ a)
        norms[part] = torch.linalg.vector_norm(merged, dim=1).cpu()
    return norms
