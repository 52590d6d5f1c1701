"""Each adapted module proven when it is read: PEFT's own layer against our product, on random activations.

Reads the adapter's bytes alone. PEFT itself parses the configuration, resolves ranks, alphas and scales, and
computes; the layer it adapts is silent, so that nothing of the base is needed. Linears of one shape and scale are
computed together, each with its own factors: an adapter is proven while others wait for tokens. What replaces values
rather than adding products (saved modules, trained tokens, biases, magnitudes) is shown by the full proof (`adapterd
adapters prove`). PEFT is imported at the first proof: it takes a second.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from adapterd.core import AdapterDigest, BaseSpec
from adapterd.deltas import EmbeddingMatrices, ExpertMatrices, LoraMatrices
from adapterd.errors import AdapterRefused
from adapterd.peft_deltas import Deltas, source_key
from adapterd.proof import Proof, Verdict

_NUM_TOKENS = 3
_NUM_PROJECTED = 8
"""Experts are compared through random projections of both sides of their products to so many dimensions."""
_EXACT = 1e-5
"""Of a module's largest output: float32 sums in another order differ by some 1e-7, a wrong scale by more than 1e-2."""
_BOUND = {"float32": _EXACT, "float16": 2.0**-7, "bfloat16": 2.0**-4}
"""What rounding both factors to the base's type may change of a module's largest output."""
_MAX_KEPT = 4096
_MAX_TOGETHER = 1 << 22
"""Elements of factors that are computed together: what a proof takes of memory is a few times their float32."""

_Factors = LoraMatrices | EmbeddingMatrices | ExpertMatrices


class AdapterProver:
    """Proofs for one base, each made once for a digest. Callable from any thread, never the engine's: one at a time."""

    def __init__(self, spec: BaseSpec) -> None:
        self._spec = spec
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._lock = threading.Lock()
        self._layers: dict[tuple[object, ...], Any] = {}
        self._inputs: dict[int, torch.Tensor] = {}
        self._proofs: OrderedDict[AdapterDigest, Proof] = OrderedDict()

    def prove(
        self,
        digest: AdapterDigest,
        config_fields: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        deltas: Deltas,
        *,
        has_effect: bool,
        adapter: str,
    ) -> Proof:
        """`tensors` are the file's. Raises AdapterRefused, naming the module, where our product is not PEFT's."""
        with self._lock:
            known = self._proofs.get(digest)
            if known is None:
                known = self._proofs[digest] = self._make(config_fields, tensors, deltas, has_effect, adapter)
                if len(self._proofs) > _MAX_KEPT:
                    self._proofs.popitem(last=False)
            return known

    @torch.inference_mode()
    def _make(
        self,
        config_fields: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        deltas: Deltas,
        has_effect: bool,
        adapter: str,
    ) -> Proof:
        import peft

        began = time.perf_counter()
        known = {
            name: value
            for name, value in config_fields.items()
            if name in peft.LoraConfig.__dataclass_fields__
        }
        # Random factors are about to be overwritten; magnitudes and biases act on sums, not on products.
        neutral = {"init_lora_weights": False, "use_dora": False, "lora_bias": False}
        config = peft.LoraConfig(**{**known, **neutral})
        bound = _BOUND[self._spec.dtype]
        worst, num_modules = 0.0, 0
        for delta, error in self._errors(config, tensors, deltas):
            if not error <= bound:
                raise AdapterRefused(
                    f"adapter {adapter!r}: the product of {delta.module!r} differs from that of PEFT's own layer by"
                    f" {error:.2g} of its largest value, and {bound:.2g} is allowed; this is a fault of adapterd or of"
                    " this version of PEFT, please report it"
                )
            worst, num_modules = max(worst, error), num_modules + 1
        verdict: Verdict = "exact" if worst <= _EXACT else "within bound"
        return Proof(verdict, worst, num_modules, has_effect, time.perf_counter() - began)

    def _errors(
        self, config: Any, tensors: Mapping[str, torch.Tensor], deltas: Deltas
    ) -> Iterator[tuple[_Factors, float]]:
        """Each delta with factors, and by how much of PEFT's largest value our product differs from PEFT's."""
        alike: dict[tuple[object, ...], list[LoraMatrices]] = {}
        layers: dict[tuple[object, ...], Any] = {}
        for delta in (*deltas.modules, *deltas.edits):
            if isinstance(delta, LoraMatrices):
                source = deltas.sources[source_key(delta)]
                layer = self._layer("linear", config, source.key, delta.a.shape[1], delta.b.shape[0])
                dtypes = tensors[source.a].dtype, tensors[source.b].dtype, delta.a.dtype, delta.b.dtype
                key: tuple[object, ...] = (layer, *dtypes)
                alike.setdefault(key, []).append(delta)
                layers[key] = layer
            elif isinstance(delta, _Factors):
                theirs, ours = self._products(delta, config, tensors, deltas)
                yield delta, float(_error(theirs[None], ours[None]))
        for key, members in alike.items():
            size = max(_MAX_TOGETHER // (members[0].a.numel() + members[0].b.numel()), 1)
            for start in range(0, len(members), size):
                part = members[start : start + size]
                theirs, ours = self._linears(layers[key], part, tensors, deltas)
                yield from zip(part, _error(theirs, ours).tolist(), strict=True)

    def _linears(
        self, layer: Any, members: Sequence[LoraMatrices], tensors: Mapping[str, torch.Tensor], deltas: Deltas
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(PEFT's, ours), [modules, tokens, d_out], for linears to which PEFT gives one shape and scale."""
        sources = [deltas.sources[source_key(delta)] for delta in members]
        raw_a, a = _stacked([tensors[source.a] for source in sources], [delta.a for delta in members])
        raw_b, b = _stacked([tensors[source.b] for source in sources], [delta.b for delta in members])
        theirs = {"lora_A.proof.weight": raw_a.float(), "lora_B.proof.weight": raw_b.float()}
        a, b = a.to(self._dtype).float(), b.to(self._dtype).float()
        scales = torch.tensor([delta.scale for delta in members])
        x = self._input(a.shape[2])
        # PEFT's own forward, run once for all of them, each with its own factors.
        products = torch.vmap(lambda weights: functional_call(layer, weights, (x,)))(theirs)
        return products, (x @ a.mT) @ b.mT * scales[:, None, None]

    def _products(
        self,
        delta: EmbeddingMatrices | ExpertMatrices,
        config: Any,
        tensors: Mapping[str, torch.Tensor],
        deltas: Deltas,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(PEFT's, ours) for one module: [tokens, d_out], or projections of experts' products."""
        generator = torch.Generator().manual_seed(0)
        source = deltas.sources[source_key(delta)]
        raw_a, raw_b = tensors[source.a].float(), tensors[source.b].float()
        a, b = (tensor.to(self._dtype).float() for tensor in (delta.a, delta.b))
        match delta:
            case EmbeddingMatrices():
                ids = torch.randint(0, a.shape[1], (_NUM_TOKENS * 4,), generator=generator)
                layer = self._layer("embedding", config, source.key, a.shape[1], b.shape[0])
                weights = {"lora_embedding_A.proof": raw_a, "lora_embedding_B.proof": raw_b}
                return functional_call(layer, weights, (ids,)), a.T[ids] @ b.T * delta.scale
            case ExpertMatrices():
                num_experts, size = len(a), _NUM_PROJECTED
                into = torch.randn(a.shape[2], size, generator=generator)
                out = torch.randn(size, b.shape[1], generator=generator)
                layer = self._layer("experts", config, source.key, size, size, num_experts)
                layer.lora_A["proof"].weight.data = raw_a @ into
                layer.lora_B["proof"].weight.data = out @ raw_b
                return layer.get_delta_weight("proof"), (out @ b) @ (a @ into) * delta.scale

    def _input(self, width: int) -> torch.Tensor:
        """Random activations [tokens, width], the same for every module that takes so many."""
        if width not in self._inputs:
            self._inputs[width] = torch.randn(_NUM_TOKENS, width, generator=torch.Generator().manual_seed(0))
        return self._inputs[width]

    def _layer(self, kind: str, config: Any, key: str, d_in: int, d_out: int, num_experts: int = 1) -> Any:
        """PEFT's layer with the rank, alpha and scale that PEFT gives this module; one for all that have them alike."""
        import peft
        from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper
        from peft.utils.other import get_pattern_key

        r = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), key), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), key), config.lora_alpha)
        found = kind, d_in, d_out, num_experts, r, alpha, config.use_rslora
        if found not in self._layers:
            if len(self._layers) >= _MAX_KEPT:
                self._layers.clear()
            own = peft.LoraConfig(
                r=r, lora_alpha=alpha, use_rslora=config.use_rslora, init_lora_weights=False
            )
            settings = {"adapter_name": "proof", "config": own, "r": r, "lora_alpha": alpha}
            with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
                match kind:
                    case "linear":
                        layer = Linear(_SilentLinear(d_in, d_out), **settings)
                    case "embedding":
                        layer = Embedding(_SilentEmbedding(d_in, d_out), **settings)
                    case _:
                        silent = _SilentExperts(num_experts, d_in, d_out)
                        layer = ParamWrapper(silent, parameter_name="stacked", **settings)
            # What is proven brings its own factors: those made here would only be kept.
            for name, parameter in layer.named_parameters():
                if name.startswith("lora_"):
                    parameter.data = torch.empty(0)
            self._layers[found] = layer.eval()
        return self._layers[found]


def _stacked(raw: Sequence[torch.Tensor], ours: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Both stacked; in one where ours are the file's own tensors, as nearly always."""
    stacked = torch.stack(list(raw))
    is_same = all(one is other for one, other in zip(raw, ours, strict=True))
    return stacked, stacked if is_same else torch.stack(list(ours))


def _error(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """[modules]: the largest difference of each, over PEFT's largest value. Both [modules, rows, columns, ...]."""
    differences, sizes = (theirs - ours).abs().flatten(1), theirs.abs().flatten(1)
    return differences.amax(1) / sizes.amax(1).clamp_min(1e-30)


class _SilentLinear(nn.Linear):
    """A linear of any size that answers zero and holds one number."""

    def __init__(self, d_in: int, d_out: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = d_in, d_out
        self.weight, self.bias = nn.Parameter(torch.zeros(1)), None  # type: ignore[assignment]

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # the name is nn.Linear's
        return input.new_zeros(*input.shape[:-1], self.out_features)


class _SilentEmbedding(nn.Embedding):
    """The same for an embedding."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # the name is nn.Embedding's
        return torch.zeros(*input.shape, self.embedding_dim)


class _SilentExperts(nn.Module):
    """Stacked parameters [num_experts, d_out, d_in] of the size of the projections."""

    def __init__(self, num_experts: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.stacked = nn.Parameter(torch.zeros(num_experts, d_out, d_in))
