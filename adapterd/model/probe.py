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

from adapterd.errors import BaseRefused
from adapterd.model.attention import ATTENTION_NAME
from adapterd.model.kernels import TORCH_KERNELS, Kernels
from adapterd.model.kv import KV_BLOCK_SIZE, KVPool
from adapterd.model.lora import LoraProduct, LoraStep, Products, Segment
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


def probe_family(config: Any, max_position: int, kernels: Kernels = TORCH_KERNELS) -> float:
    """Largest difference over the logits' spread; raises BaseRefused naming the family if it is not small.

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
            difference = _largest_difference(eager, paged, max_position, kernels)
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
    logger.debug("%s: packed and paged equals alone within %.1e", family, difference)
    return difference


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


def _largest_difference(eager: Any, paged: Any, max_position: int, kernels: Kernels) -> float:
    lengths = (7, 11, 3)
    adapted = 1
    tokens = [torch.randint(0, _VOCAB_SIZE, (length,)) for length in lengths]
    pool, step, products = _seams(paged, kernels)
    # Chunks that end in mid-sequence, single tokens, and neighbours that come and go.
    steps = [
        [_Piece(0, 0, 7), _Piece(1, 0, 4), _Piece(2, 0, 2)],
        [_Piece(1, 4, 10), _Piece(2, 2, 3)],
        # A far position beside them must not change how the others are rotated.
        [_Piece(1, 10, 11), _Piece(0, 0, 1, shift=max_position)],
    ]
    found: dict[tuple[int, int], torch.Tensor] = {}
    for pieces in steps:
        logits = _run_paged(paged, kernels, pool, step, products, tokens, pieces, adapted)
        row = 0
        for piece in pieces:
            for position in range(piece.start, piece.end):
                if piece.shift == 0:
                    found[piece.index, position] = logits[row]
                row += 1

    expected = {i: _run_eager(eager, tokens[i]) for i in range(len(tokens)) if i != adapted}
    _merge(eager, products)
    expected[adapted] = _run_eager(eager, tokens[adapted])
    worst = max((logits - expected[i][p]).abs().max().item() for (i, p), logits in found.items())
    if len(found) != sum(lengths) or worst != worst:
        return float("nan")
    return worst / torch.cat(list(expected.values())).std().item()


def _seams(paged: Any, kernels: Kernels) -> tuple[KVPool, LoraStep, Products]:
    seams = attach_seams(paged, kernels)
    pool = KVPool(seams.kv_shapes, num_blocks=4, dtype=torch.float32, device=torch.device("cpu"))
    products: Products = {
        path: (LoraProduct(torch.randn(2, d_in) * d_in**-0.5, torch.randn(2, d_out) * 0.3, 1.0),)
        for path, (d_out, d_in) in seams.targets.items()
    }
    return pool, seams.lora_step, products


def _run_paged(
    model: Any,
    kernels: Kernels,
    pool: KVPool,
    step: LoraStep,
    products: Products,
    tokens: list[torch.Tensor],
    pieces: list[_Piece],
    adapted: int,
) -> torch.Tensor:
    slots, segments, row = [], [], 0
    for piece in pieces:
        # Probe sequence i owns block i; the far token borrows the last block, so that it overwrites nobody.
        block = 3 if piece.shift else piece.index
        slots.append(block * KV_BLOCK_SIZE + torch.arange(piece.end))
        length = piece.end - piece.start
        if piece.index == adapted:
            segments.append(Segment(row, row + length, products))
        row += length
    step.begin(tuple(segments), row)
    context = kernels.paged_context(pool, slots, [piece.end - piece.start for piece in pieces])
    ids = torch.cat([tokens[piece.index][piece.start : piece.end] for piece in pieces])
    positions = torch.cat([torch.arange(piece.start, piece.end) + piece.shift for piece in pieces])
    # Backwards, so that a model that returns all rows whatever it is asked for does not look right.
    keep = torch.arange(row).flip(0)
    output = model(
        input_ids=ids[None],
        position_ids=positions[None],
        use_cache=False,
        logits_to_keep=keep,
        paged=context,
    )
    logits: torch.Tensor = output.logits[0]
    if logits.shape[0] != row:
        raise BaseRefused(f"{type(model).__name__} does not honour logits_to_keep; it cannot be served")
    return logits.flip(0)


def _run_eager(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=tokens[None], use_cache=False).logits[0]
    return logits


def _merge(model: Any, products: Products) -> None:
    for path, parts in products.items():
        weight = model.get_submodule(path).weight
        for part in parts:
            weight.add_(part.b_t.T @ part.a, alpha=part.scale)
