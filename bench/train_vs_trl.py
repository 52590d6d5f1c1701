"""Training speed and memory against TRL's SFTTrainer: the same base, rows, LoRA and machine, in one session.

    bench/peers/setup_trl.sh DIRECTORY
    python -m bench.train_vs_trl --trl DIRECTORY

Both train in turn (A B A B), each in a process of its own, packing on, float32, both counting real tokens: prompts
and answers, no padding. Timed are optimiser steps alone: forward, backward, clipping, AdamW, after a warm-up of one
step (TRL: two); loading, evaluation and checkpoints are in neither. Both learn from answers only, rank 16 on all
linears, no gradient checkpointing. A step is the same number of tokens on average, `--step-tokens`, and neither
computes more than those at once: TRL packs rows into lines of that length, adapterd cuts a step of more into two
forwards.

The base has a Llama's shape with random weights: 38 million parameters, of which 8 are the embedding. Rows are
random words; prompts of 30 to 500 tokens and answers of 5 to 120, most of them short, as tickets are.

The last line of stdout is JSON.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from bench.models import make_base, make_tokenizer
from bench.report import emit, machine

RANK = 16
SHAPE = {
    "vocab_size": 16_384,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def write_rows(path: Path, count: int, seed: int = 0) -> None:
    """Chat rows whose lengths are log-normal: a median prompt of about 90 tokens, a median answer of about 25."""
    rng = random.Random(seed)
    words = [
        token[1:] for token in make_tokenizer(16_384).get_vocab() if token.startswith("Ġ") and len(token) == 5
    ]
    words.sort()

    def text(median: float, low: int, high: int) -> str:
        length = min(max(int(rng.lognormvariate(0, 0.7) * median), low), high)
        return "".join(f" {rng.choice(words)}" for _ in range(length))

    with path.open("w") as file:
        for _ in range(count):
            messages = [
                {"role": "user", "content": text(90, 30, 500)},
                {"role": "assistant", "content": text(25, 5, 120)},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def train_ours(work: Path, seconds: float, step_tokens: int) -> dict[str, Any]:
    """In this process: the trainer's own network and step."""
    from adapterd.config import TrainSettings
    from adapterd.render import Renderer
    from adapterd.training.data import encode_rows, read_rows
    from adapterd.training.measure import measure_training

    renderer = Renderer.load(work / "base")
    rows = work / "rows.jsonl"
    examples = encode_rows(read_rows(rows), renderer, max_length=2048, path=rows)
    batch_size = round(step_tokens * len(examples) / sum(example.num_tokens for example in examples))
    settings = TrainSettings.model_validate(
        {
            "base": str(work / "base"),
            "data": rows,
            "name": "bench",
            "rank": RANK,
            "batch_size": batch_size,
            "micro_batch_tokens": step_tokens,
            "packing": "on",
            "gradient_checkpointing": "off",
            "device": "cpu",
        }
    )
    measured = measure_training(settings, renderer, examples, max_seconds=seconds)
    return {
        "tokens_per_second": measured.tokens_per_second,
        "peak_bytes": measured.peak_bytes,
        "rows_per_step": batch_size,
        "num_trainable": measured.num_trainable,
    }


def run(command: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.ours_in is not None:
        print(json.dumps(train_ours(arguments.ours_in, arguments.seconds, arguments.step_tokens)))
        return 0
    result: dict[str, Any] = {"bench": "train_vs_trl", "machine": machine()}
    runs: dict[str, list[dict[str, Any]]] = {"adapterd": [], "trl": []}
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        make_base(LlamaConfig(**SHAPE), work / "base")
        write_rows(work / "rows.jsonl", arguments.rows)
        common = ["--seconds", str(arguments.seconds), "--step-tokens", str(arguments.step_tokens)]
        theirs = [str(arguments.trl / "bin" / "python"), str(Path(__file__).parent / "peers" / "trl_sft.py")]
        for _ in range(arguments.rounds):
            runs["adapterd"].append(
                run([sys.executable, "-m", "bench.train_vs_trl", "--ours-in", str(work), *common])
            )
            runs["trl"].append(run([*theirs, "--work", str(work), "--rank", str(RANK), *common]))
            for name, found in runs.items():
                one = found[-1]
                print(
                    f"{name:>8}: {one['tokens_per_second']:7.1f} tokens/s, peak {one['peak_bytes'] / 2**20:6.0f} MiB",
                    flush=True,
                )
    medians = {
        name: {
            key: statistics.median(one[key] for one in found) for key in ("tokens_per_second", "peak_bytes")
        }
        for name, found in runs.items()
    }
    ours, trl = medians["adapterd"], medians["trl"]
    result |= {
        "shape": SHAPE,
        "rank": RANK,
        "step_tokens": arguments.step_tokens,
        "runs": runs,
        "medians": medians,
        "speed_ratio": ours["tokens_per_second"] / trl["tokens_per_second"],
        "memory_ratio": ours["peak_bytes"] / trl["peak_bytes"],
    }
    print(f"adapterd / TRL: {result['speed_ratio']:.2f} x tokens/s at {result['memory_ratio']:.2f} x memory")
    emit(result, arguments.out)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.train_vs_trl",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--trl", type=Path, help="the directory that bench/peers/setup_trl.sh made")
    add("--rounds", type=int, default=2, help="of A B; the medians are kept")
    add("--seconds", type=float, default=20.0, help="of training in each run")
    add("--step-tokens", type=int, default=1024, help="tokens in an optimiser step, about")
    add("--rows", type=int, default=800)
    add("--ours-in", type=Path, help=argparse.SUPPRESS)
    add("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args(argv)
    if arguments.trl is None and arguments.ours_in is None:
        parser.error("--trl is required")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
