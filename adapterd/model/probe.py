"""A family proves itself at load: a few float32 layers of its own config, packed and paged against alone and eager.

The clone keeps the family's widths and heads and shrinks layers, vocabulary, feed-forward size and window. The
reference is transformers' eager attention over one sequence at a time, with an adapter merged into the weights:
none of our code. What a difference means: the family reads neighbours in a packed row, keeps state between
tokens outside attention, or calls a linear with something other than all tokens in order.
"""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from adapterd.core import BaseModules
from adapterd.deltas import Edit, EmbeddingMatrices, LoraMatrices, ReplacedParameters, tensors_of
from adapterd.errors import BaseRefused
from adapterd.model.attention import ATTENTION_NAME
from adapterd.model.editor import Editor
from adapterd.model.edits import Edits, num_edit_pages, upload_edits
from adapterd.model.kernels import TORCH_KERNELS, Kernels
from adapterd.model.kv import KV_BLOCK_SIZE, KVPool
from adapterd.model.lora import LoraProduct, Products, Segment
from adapterd.model.pages import PageWriter
from adapterd.model.seams import attach_seams

logger = logging.getLogger(__name__)

_VOCAB_SIZE = 96
_TOLERANCE = 1e-3
"""Of the logits' spread: float32 sums in another order differ by some 1e-6, a wrong mask by some 1e-1."""


@dataclass(frozen=True)
class _Piece:
    """Tokens [start, end) of probe sequence `index`, computed in one step; `shift` moves their positions."""

    index: int
    start: int
    end: int
    shift: int = 0


@dataclass(frozen=True)
class Probed:
    """Largest differences over the logits' spread: with LoRA on linears, and with edits of embedding, head and norms.

    A family may stand the first and not the second: then it is served, without adapters that bring edits.
    """

    difference: float
    difference_with_edits: float

    @property
    def takes_edits(self) -> bool:
        return self.difference_with_edits <= _TOLERANCE


def probe_family(config: Any, max_position: int, kernels: Kernels = TORCH_KERNELS) -> Probed:
    """Raises BaseRefused naming the family if it is not exact with LoRA on linears.

    Runs on the CPU in float32 with `kernels`, so that they too prove themselves on this processor.
    """
    family = config.model_type
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        try:
            small = shrink_config(config)
            eager, paged = build_model(small, "eager"), build_model(small, ATTENTION_NAME)
            spread_weights(eager)
            paged.load_state_dict(eager.state_dict())
            clones = _Clones(eager, paged, kernels, max_position)
            difference = clones.largest_difference()
            with_edits = clones.largest_difference_with_edits() if difference <= _TOLERANCE else float("nan")
        except BaseRefused:
            raise
        except Exception as error:  # whatever a family's own code raises, it is that family that is refused
            raise BaseRefused(
                f"the {family} family cannot be run packed and paged: {type(error).__name__}: {error}"
            ) from error
    if not difference <= _TOLERANCE:
        raise BaseRefused(
            f"the {family} family gives other logits packed and paged than alone "
            f"(difference {difference:.2g} of their spread); it cannot be served exactly"
        )
    logger.debug(
        "%s: packed and paged equals alone within %.1e, with edits %.1e", family, difference, with_edits
    )
    return Probed(difference, with_edits)


def build_model(config: Any, attention: str) -> Any:
    # A copy, since transformers notes the attention's name in the config that the model keeps.
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention
    )
    return model.eval()


def shrink_config(config: Any) -> Any:
    """The same family with few layers (one of each kind at least) and a small vocabulary."""
    small = copy.deepcopy(config.get_text_config())
    num_layers = small.num_hidden_layers
    kinds = getattr(small, "layer_types", None) or ["attention"] * num_layers
    chosen = sorted({kinds.index(kind) for kind in kinds} | set(range(min(2, num_layers))))
    for name, value in vars(config.get_text_config()).items():
        if isinstance(value, list) and len(value) == num_layers:
            setattr(small, name, [value[layer] for layer in chosen])
    small.num_hidden_layers = len(chosen)
    small.vocab_size = _VOCAB_SIZE
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    if isinstance(getattr(small, "intermediate_size", None), int):
        small.intermediate_size = min(small.intermediate_size, 256)
    if getattr(small, "sliding_window", None):
        # Shorter than the probe's sequences, so that the window is seen to act.
        small.sliding_window = min(small.sliding_window, 4)
    return small


def spread_weights(model: Any) -> None:
    """Weights large enough that attention matters: initialisers leave logits near zero."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)


class _Clones:
    """The family's small model twice: run eager, alone and merged; and packed, paged and adapted."""

    def __init__(self, eager: Any, paged: Any, kernels: Kernels, max_position: int) -> None:
        self._eager = eager
        self._paged = paged
        self._kernels = kernels
        self._max_position = max_position
        self._tokens = [torch.randint(0, _VOCAB_SIZE, (length,)) for length in (7, 11, 3)]
        self._adapted = 1
        self._seams = attach_seams(paged, kernels)
        self._editor = Editor(paged, self._seams.lora_step, self._seams.modules)
        self._products: Products = {
            path: (LoraProduct(torch.randn(2, d_in) * d_in**-0.5, torch.randn(2, d_out) * 0.3, 1.0),)
            for path, (d_out, d_in) in self._seams.targets.items()
        }
        self._base = [_run_eager(eager, tokens) for tokens in self._tokens]
        _merge(eager, self._products)

    def largest_difference(self) -> float:
        return self._largest_difference({})

    def largest_difference_with_edits(self) -> float:
        """The same with factors on embedding and head, and other weights for every norm, for the adapted sequence.

        What goes wrong in a family that does not work token by token is a difference like any other.
        """
        try:
            edits = _random_edits(self._paged, self._seams.modules)
            _merge_edits(self._eager, edits, self._seams.modules)
            page = max(tensor.numel() for edit in edits for tensor in tensors_of(edit))
            num_pages = num_edit_pages(edits, page, itemsize=4)
            writer = PageWriter(torch.empty(num_pages * page), page, range(num_pages))
            return self._largest_difference(upload_edits(edits, writer))
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            logger.debug("edits: %s", error)
            return float("nan")

    def _largest_difference(self, edits: Edits) -> float:
        pool = KVPool(self._seams.kv_shapes, num_blocks=4, dtype=torch.float32, device=torch.device("cpu"))
        # Chunks that end in mid-sequence, single tokens, and neighbours that come and go.
        steps = [
            [_Piece(0, 0, 7), _Piece(1, 0, 4), _Piece(2, 0, 2)],
            [_Piece(1, 4, 10), _Piece(2, 2, 3)],
            # A far position beside them must not change how the others are rotated.
            [_Piece(1, 10, 11), _Piece(0, 0, 1, shift=self._max_position)],
        ]
        found: dict[tuple[int, int], torch.Tensor] = {}
        for pieces in steps:
            logits = self._run_paged(pool, pieces, edits)
            row = 0
            for piece in pieces:
                for position in range(piece.start, piece.end):
                    if piece.shift == 0:
                        found[piece.index, position] = logits[row]
                    row += 1
        self._editor.begin((), 0, ())
        adapted = _run_eager(self._eager, self._tokens[self._adapted])
        expected = [adapted if i == self._adapted else logits for i, logits in enumerate(self._base)]
        worst = max((logits - expected[i][p]).abs().max().item() for (i, p), logits in found.items())
        if len(found) != sum(len(tokens) for tokens in self._tokens) or worst != worst:
            return float("nan")
        return worst / torch.cat(expected).std().item()

    def _run_paged(self, pool: KVPool, pieces: list[_Piece], edits: Edits) -> torch.Tensor:
        slots, segments, row = [], [], 0
        for piece in pieces:
            # Probe sequence i owns block i; the far token borrows the last block, so that it overwrites nobody.
            block = 3 if piece.shift else piece.index
            slots.append(block * KV_BLOCK_SIZE + torch.arange(piece.end))
            length = piece.end - piece.start
            if piece.index == self._adapted:
                segments.append(Segment(row, row + length, self._products, edits))
            row += length
        # Backwards, so that a model that returns all rows whatever it is asked for does not look right.
        keep = list(reversed(range(row)))
        self._editor.begin(segments, row, keep)
        self._seams.lora_step.begin(tuple(segments), row)
        context = self._kernels.paged_context(pool, slots, [piece.end - piece.start for piece in pieces])
        ids = torch.cat([self._tokens[piece.index][piece.start : piece.end] for piece in pieces])
        positions = torch.cat([torch.arange(piece.start, piece.end) + piece.shift for piece in pieces])
        output = self._paged(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=torch.tensor(keep),
            paged=context,
        )
        logits: torch.Tensor = output.logits[0]
        if logits.shape[0] != row:
            name = type(self._paged).__name__
            raise BaseRefused(f"{name} does not honour logits_to_keep; it cannot be served")
        return logits.flip(0)


def _run_eager(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=tokens[None], use_cache=False).logits[0]
    return logits


def _merge(model: Any, products: Products) -> None:
    for path, parts in products.items():
        module = model.get_submodule(path)
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        for part in parts:
            weight.add_(part.b_t.T @ part.a, alpha=part.scale)


def _random_edits(model: Any, modules: BaseModules) -> list[Edit]:
    edits: list[Edit] = []
    if modules.embedding is not None:
        vocab_size, d = modules.parameters[f"{modules.embedding}.weight"]
        a, b = torch.randn(2, vocab_size) * 0.3, torch.randn(d, 2) * d**-0.5
        edits.append(EmbeddingMatrices(modules.embedding, a, b, 1.0))
    if modules.head is not None:
        vocab_size, d = modules.parameters[f"{modules.head}.weight"]
        edits.append(
            LoraMatrices(modules.head, torch.randn(2, d) * d**-0.5, torch.randn(vocab_size, 2) * 0.3, 1.0)
        )
    for name, shape in modules.parameters.items():
        path, _, parameter = name.rpartition(".")
        if path in modules.input_axes and len(shape) == 1 and parameter == "weight":
            weight = model.get_submodule(path).weight
            edits.append(
                ReplacedParameters(path, "modules_to_save", {"weight": weight + torch.randn(shape) * 0.3})
            )
    return edits


def _merge_edits(model: Any, edits: list[Edit], modules: BaseModules) -> None:
    if modules.is_tied:
        head = model.get_submodule(modules.head)
        head.weight = torch.nn.Parameter(head.weight.clone())
    for edit in edits:
        weight = model.get_submodule(edit.module).weight
        match edit:
            case LoraMatrices():
                weight.add_(edit.b @ edit.a, alpha=edit.scale)
            case EmbeddingMatrices():
                weight.add_(edit.a.T @ edit.b.T, alpha=edit.scale)
            case ReplacedParameters():
                weight.copy_(edit.tensors["weight"])
