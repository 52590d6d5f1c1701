"""What a base loses when its linears are kept in 8 bits: mean loss on held-out text, before and after.

The texts are the shipped adapters' held-out conversations, rendered as they are served, which neither the base nor
the rounding has seen. Every token after the first counts, so this is the base's loss on the whole text, not an
adapter's on its answer.

    python -m bench.int8_loss                                  # the embedded base
    python -m bench.int8_loss --base Qwen/Qwen3-0.6B --dtype bfloat16

The last line of stdout is JSON.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from adapterd.model.find import find_base
from adapterd.model.int8 import quantize_linears
from adapterd.render import Renderer
from adapterd.training.data import read_rows
from bench.report import emit, machine

_ROOT = Path(__file__).resolve().parents[1]


@torch.inference_mode()
def loss(model: torch.nn.Module, texts: Sequence[Sequence[int]]) -> tuple[float, torch.Tensor]:
    """(nats a token, the likeliest token at each place) over all texts."""
    total, count, likeliest = 0.0, 0, []
    for ids in texts:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
        count += len(ids) - 1
        likeliest.append(logits.argmax(-1))
    return total / count, torch.cat(likeliest)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.int8_loss",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base", default="mini")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", type=int, default=100, help="held-out rows of each shipped adapter")
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args(argv)
    directory = find_base(arguments.base)
    renderer = Renderer.load(directory)
    texts = []
    for name in ("support", "moderation", "medical"):
        for row in read_rows(_ROOT / "adapters" / name / "heldout.jsonl")[: arguments.rows]:
            prompt = renderer.render(row.prompt)
            texts.append([*prompt, *renderer.encode(row.answer), renderer.stop_token_id])
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, arguments.dtype)).eval()
    before, first = loss(model, texts)
    saved = quantize_linears(model)
    after, second = loss(model, texts)
    same = float((first == second).float().mean())
    print(f"{len(texts)} texts, {sum(map(len, texts))} tokens; {saved / 1e6:.1f} MB less")
    print(f"loss {before:.4f} -> {after:.4f} nats a token (perplexity x {math.exp(after - before):.4f})")
    print(f"the likeliest next token is the same at {same:.2%} of all places")
    result = {
        "bench": "int8_loss",
        "machine": machine(),
        "base": arguments.base,
        "dtype": arguments.dtype,
        "num_texts": len(texts),
        "loss": before,
        "int8_loss": after,
        "same_likeliest": same,
        "saved_bytes": saved,
    }
    emit(result, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
