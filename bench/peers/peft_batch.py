"""PEFT's own mixed batch: transformers `generate` with `adapter_names`, offline, one static batch, no server.

The best case for PEFT: all prompts of one length, all there at once, and all answers of one length. Adapters are in
the base's type, as ours are (PEFT's default casts them to float32).

    python -m bench.peers.peft_batch --models OUT --batch 8,16 --adapters 0,1,8
    python -m bench.peers.peft_batch --models OUT --dtype float32     # quicker on a processor without AVX-512

The last line of stdout is JSON.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bench.report import emit, machine
from bench.workload import token_prompt


def load(models: Path, num_adapters: int, attention: str, dtype: str) -> Any:
    """The base with the first `num_adapters` adapters under their directories' names; bare if there are none."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        models / "base", dtype=getattr(torch, dtype), attn_implementation=attention
    )
    for path in sorted((models / "adapters").iterdir())[:num_adapters]:
        if isinstance(model, PeftModel):
            model.load_adapter(path, adapter_name=path.name, autocast_adapter_dtype=False)
        else:
            model = PeftModel.from_pretrained(
                model, path, adapter_name=path.name, autocast_adapter_dtype=False
            )
    return model.eval()


def generate_seconds(
    model: Any, names: Sequence[str], batch: int, prompt: int, output: int, seed: str
) -> float:
    """One static batch. With several names, row i runs names[i mod len(names)]."""
    first, end = model.config.vocab_size // 4, model.config.vocab_size
    ids = torch.tensor([token_prompt(prompt, range(first, end), f"{seed}/{i}") for i in range(batch)])
    mixed = {"adapter_names": [names[i % len(names)] for i in range(batch)]} if len(names) > 1 else {}
    began = time.perf_counter()
    with torch.inference_mode():
        answer = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=output,
            min_new_tokens=output,
            do_sample=False,
            **mixed,
        )
    seconds = time.perf_counter() - began
    if answer.shape != (batch, prompt + output):
        raise RuntimeError(f"generate gave {tuple(answer.shape)} tokens, not {(batch, prompt + output)}")
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    result: dict[str, Any] = {"bench": "peft_batch", "machine": machine()}
    runs = []
    for count in (int(part) for part in arguments.adapters.split(",")):
        model = load(arguments.models, count, arguments.attention, arguments.dtype)
        names = [path.name for path in sorted((arguments.models / "adapters").iterdir())[:count]]
        for batch in (int(part) for part in arguments.batch.split(",")):
            generate_seconds(model, names, batch, arguments.prompt_tokens, 2, "warm-up")
            seconds = statistics.median(
                generate_seconds(
                    model, names, batch, arguments.prompt_tokens, arguments.output_tokens, f"{count} {i}"
                )
                for i in range(arguments.repeats)
            )
            rate = batch * arguments.output_tokens / seconds
            runs.append(
                {"batch": batch, "adapters": count, "seconds": seconds, "output_tokens_per_second": rate}
            )
            print(f"batch {batch:2}, {count:2} adapters: {rate:7.2f} output tokens/s", flush=True)
        del model
    result |= {
        "attention": arguments.attention,
        "dtype": arguments.dtype,
        "num_threads": torch.get_num_threads(),
        "prompt_tokens": arguments.prompt_tokens,
        "output_tokens": arguments.output_tokens,
        "runs": runs,
    }
    emit(result, arguments.out)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers.peft_batch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", type=Path, required=True, help="the --out of bench.models")
    add("--batch", default="8", help="sizes of the static batch")
    add("--adapters", default="0,1,8", help="how many different ones in the batch; 0 is the bare base")
    add("--prompt-tokens", type=int, default=128)
    add("--output-tokens", type=int, default=64)
    add("--attention", choices=("eager", "sdpa"), default="eager")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--repeats", type=int, default=3, help="the median is kept")
    add("--out", type=Path, help="write the result here too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
