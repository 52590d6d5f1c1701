"""The frozen base with A and B beside its linears, ready to be trained: as the recipe says, or refused by name."""

import contextlib
import importlib.util
import logging
import resource
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from adapterd.adapter_writer import base_fingerprint
from adapterd.core import BaseSpec
from adapterd.errors import BaseRefused, ConfigError, InvalidRequest
from adapterd.model.attention import ATTENTION_NAME, register_attention
from adapterd.model.base import choose_device
from adapterd.model.base_config import exact_context, read_config
from adapterd.model.checkpoint import load_weights
from adapterd.model.find import find_base
from adapterd.render import Renderer
from adapterd.training.batches import Batch, collate, micro_batches, num_labels, pack, summed_loss
from adapterd.training.data import Example
from adapterd.training.lora import copy_matrices, linears_of, lora_config, read_warm_start
from adapterd.training.packing import packing_problem
from adapterd.training.recipe import Recipe
from adapterd.training.stop_token import check_stop_token

_logger = logging.getLogger(__name__)


@dataclass
class Network:
    """A base on its device with one trainable adapter, and how rows go through it.

    model: the base, its linears wrapped by PEFT. trainable: name -> parameter, float32. `scale` is what
    B A x is multiplied with. `packed`: rows go end to end rather than padded. `micro_batch_tokens` shrinks when
    memory does not suffice; before that activations are computed again, if `may_checkpoint`. `start_digest` is the
    warm start's content.
    """

    model: Any
    spec: BaseSpec
    directory: Path
    fingerprint: str
    device: torch.device
    dtype: torch.dtype
    config: LoraConfig
    scale: float
    trainable: dict[str, torch.nn.Parameter]
    pad_id: int
    packed: bool
    micro_batch_tokens: int
    quantization: str
    start_digest: str | None
    may_checkpoint: bool
    checkpointed: bool = False

    @property
    def num_base_parameters(self) -> int:
        """Of the base as it is stored, however few bits it is held in."""
        counted = (p for name, p in self.model.named_parameters() if name not in self.trainable)
        return sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in counted)

    @property
    def num_trainable(self) -> int:
        return sum(p.numel() for p in self.trainable.values())

    def parts(self, examples: Sequence[Example]) -> Iterator[list[Example]]:
        """The examples of each forward that they are computed in."""
        return micro_batches(
            examples,
            max_tokens=self.micro_batch_tokens,
            vocab_size=self.spec.vocab_size,
            packed=self.packed,
        )

    def batch(self, part: Sequence[Example]) -> Batch:
        """One forward."""
        if self.packed:
            return pack(part, device=self.device)
        return collate(part, pad_id=self.pad_id, device=self.device)

    def compute(self) -> contextlib.AbstractContextManager[None]:
        """Around every forward: a 16-bit base multiplies A and B in its own type, while they stay float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def gradient(self, examples: Sequence[Example]) -> tuple[float, float]:
        """Mean loss in nats and share of first-ranked labels; the mean's gradient is left in the parameters.

        One mean over all labels, however the rows are cut into forwards. If CUDA has no memory for it, the
        forwards take less, for good, and the rows are computed again. Raises InvalidRequest for a row that does not
        fit alone.
        """
        labels = num_labels(examples)
        part: list[Example] = []
        while True:
            loss_sum, right = 0.0, 0
            try:
                for part in self.parts(examples):
                    part_sum, part_right = self._add_gradient(part, labels)
                    loss_sum, right = loss_sum + part_sum, right + part_right
                return loss_sum / labels, right / labels
            except torch.cuda.OutOfMemoryError:
                pass  # while it is held, so are the forward's tensors
            self._take_less_than(part)

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example]) -> tuple[float, float]:
        """Mean loss in nats and share of first-ranked labels, over all labels of `examples`. No logits are kept."""
        loss_sum, right = 0.0, 0
        for part in self.parts(examples):
            with self.compute():
                loss, part_right = summed_loss(self.model, self.batch(part))
            loss_sum, right = loss_sum + loss.item(), right + part_right
        labels = num_labels(examples)
        return loss_sum / labels, right / labels

    def checkpoint_activations(self) -> None:
        """Keep each layer's input alone, and compute the rest again in the backward pass."""
        # transformers 5.23 has renamed the one that 5.17 has.
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        (enable or self.model.gradient_checkpointing_enable)({"use_reentrant": False})
        for layer in _checkpointing_layers(self.model):
            # The layer alone is in training mode, which is when it recomputes; what is in it drops nothing out.
            layer.training = True
        self.checkpointed = True

    def matrices(self, weights: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Module path -> (A, B) out of parameters by name."""
        paths = sorted({name.partition(".lora_")[0] for name in weights})
        return {
            path: (weights[f"{path}.lora_A.default.weight"], weights[f"{path}.lora_B.default.weight"])
            for path in paths
        }

    def magnitudes(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Module path -> DoRA's magnitude [d_out], if it is trained."""
        ending = ".lora_magnitude_vector.default.weight"
        return {name.removesuffix(ending): w for name, w in weights.items() if name.endswith(ending)}

    def peak_bytes(self) -> int:
        """The most memory held so far: the device's, or the process's on a CPU."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _add_gradient(self, part: Sequence[Example], labels: int) -> tuple[float, int]:
        """One forward's summed loss and first-ranked labels; its share of the mean's gradient is added."""
        with self.compute():
            loss, right = summed_loss(self.model, self.batch(part))
        (loss / labels).backward()  # type: ignore[no-untyped-call]
        return loss.item(), right

    def _take_less_than(self, part: Sequence[Example]) -> None:
        """For a forward that memory did not suffice for: forget its gradient, and take less memory from here on.

        Forwards become smaller each time, so this ends with single rows. Raises InvalidRequest for one of those.
        """
        for parameter in self.trainable.values():
            parameter.grad = None
        torch.cuda.empty_cache()
        tokens = sum(example.num_tokens for example in part)
        if self.may_checkpoint and not self.checkpointed:
            self.checkpoint_activations()
            _logger.warning("out of memory at %d tokens; activations are computed again from here on", tokens)
        elif len(part) > 1:
            self.micro_batch_tokens = tokens // 2
            _logger.warning("out of memory; at most %d tokens at once from here on", self.micro_batch_tokens)
        else:
            is_told_to_keep = not self.checkpointed and _checkpointing_layers(self.model)
            way_out = "--gradient-checkpointing auto, " if is_told_to_keep else ""
            raise InvalidRequest(
                f"the device has no memory for the {tokens} tokens of the row in line {part[0].line}; use {way_out}"
                "a smaller --max-length with --on-too-long drop, --quantization bnb-4bit or a smaller base"
            )


def build_network(recipe: Recipe, renderer: Renderer) -> Network:
    """Load the base frozen, prove that its rows can be packed, and put a new adapter beside its linears.

    The same recipe gives the same matrices. Raises BaseRefused, ConfigError, InvalidRequest or AdapterRefused.
    """
    transformers.utils.logging.disable_progress_bar()  # one bar is enough, and a log is for lines
    directory = find_base(recipe.base)
    fingerprint = base_fingerprint(directory)
    config = read_config(directory, recipe.base)
    device = choose_device(recipe.device)
    dtype = _compute_dtype(recipe.dtype, device)
    packed = _is_packed(recipe, config)
    _check_quantization(recipe, device)
    register_attention()
    model: Any = load_weights(
        directory,
        recipe.base,
        "float32" if dtype == torch.float32 else "bfloat16",
        device,
        recipe.quantization,
        attention=ATTENTION_NAME if packed else None,
    )
    if recipe.quantization == "none":  # bitsandbytes has placed its own
        model.to(device)
    if base_fingerprint(directory) != fingerprint:
        raise BaseRefused(f"the base in {directory} was rewritten while it was read; start again")
    model.requires_grad_(False)
    check_stop_token(model.get_output_embeddings(), renderer)
    spec = BaseSpec(
        name=recipe.base,
        root=recipe.base,
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=int(config.get_text_config().vocab_size),
        max_model_len=exact_context(config, None),
        lora_targets=linears_of(model),
        eos_token_ids=renderer.eos_token_ids,
        quantization=recipe.quantization,
    )
    start = read_warm_start(recipe, spec, renderer, fingerprint)
    lora, scale = lora_config(recipe, spec, start)
    torch.manual_seed(recipe.seed)
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 by a name that is on its way out.
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        peft_model = get_peft_model(model, lora)
    # Inference mode of the modules: the frozen base must not drop out what it will not drop when served.
    peft_model.eval()
    inner = peft_model.base_model.model
    trainable = {name: p for name, p in inner.named_parameters() if p.requires_grad}
    for module in inner.modules():
        if isinstance(module, BaseTunerLayer):
            # Autocast turns A and B to 16 bits; PEFT would turn all activations to 32 instead.
            module.cast_input_dtype_enabled = dtype == torch.float32
    adapted = {name.partition(".lora_")[0] for name in trainable}
    network = Network(
        model=inner,
        spec=replace(
            spec, lora_targets={path: shape for path, shape in spec.lora_targets.items() if path in adapted}
        ),
        directory=directory,
        fingerprint=fingerprint,
        device=device,
        dtype=dtype,
        config=lora,
        scale=scale,
        trainable=trainable,
        pad_id=renderer.stop_token_id,
        packed=packed,
        micro_batch_tokens=recipe.micro_batch_tokens,
        quantization=recipe.quantization,
        start_digest=None if start is None else start.id.digest,
        may_checkpoint=recipe.gradient_checkpointing != "off" and bool(_checkpointing_layers(inner)),
    )
    if start is not None:
        copy_matrices(start, trainable)
    if recipe.gradient_checkpointing == "on":
        if not network.may_checkpoint:
            raise ConfigError(
                f"{type(inner).__name__} has no gradient checkpointing; leave --gradient-checkpointing on out",
                param="gradient_checkpointing",
            )
        network.checkpoint_activations()
    return network


def _checkpointing_layers(model: Any) -> list[GradientCheckpointingLayer]:
    """Those whose activations can be computed again; a family may have none."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _compute_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.float32 if dtype == "float32" else torch.bfloat16


def _is_packed(recipe: Recipe, config: Any) -> bool:
    if recipe.packing == "off":
        return False
    problem = packing_problem(config)
    if problem is None:
        return True
    if recipe.packing == "on":
        raise ConfigError(f"--packing on: {problem}; use auto or off", param="packing")
    _logger.warning("%s; rows of like length are padded side by side instead", problem)
    return False


def _check_quantization(recipe: Recipe, device: torch.device) -> None:
    """QLoRA (Dettmers et al., arXiv 2305.14314) needs bitsandbytes' kernels; whether they are there is known now."""
    if recipe.quantization == "none":
        return
    if device.type != "cuda":
        raise ConfigError(
            f"--quantization {recipe.quantization} needs a CUDA device to train on: bitsandbytes has no fast kernels"
            " for others. Leave it out; on a CPU --dtype bfloat16 halves the base's memory",
            param="quantization",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"--quantization {recipe.quantization} needs the package bitsandbytes: pip install 'adapterd[bnb]'",
            param="quantization",
        )
    if recipe.dtype == "float32":
        raise ConfigError(
            f"--quantization {recipe.quantization} computes in bfloat16; leave --dtype float32 out",
            param="dtype",
        )
