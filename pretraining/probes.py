"""The gates of the base: exact greedy answers on fresh questions.

    python -m pretraining.probes [--model adapterd/mini] [--count 100] [--seed 7]

Prints one line a probe and exits 1 if a gate is missed. Greedy decoding, one exact string each: no partial credit.
"""

import argparse
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

from pretraining.corpus import drills, medical, moderation, support
from pretraining.corpus.drills import Message

Probe = Callable[[random.Random], tuple[list[Message], str]]

COPY_GATE, UNDERSTANDING_GATE = 0.95, 0.97

# What only an adapter may write. The base is asked the plain task prompts and must answer with none of these.
FORMATS = re.compile(
    r"^(Category|Priority|Sentiment): |^S: .*\nO: |\A(allow|spam|harassment|threat|privacy)\W*\Z",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Result:
    """One probe's outcome."""

    name: str
    score: float
    gate: float
    stopped: float
    misses: list[tuple[str, str, str]]  # question, expected, answer


def all_probes() -> dict[str, tuple[Probe, float]]:
    """Every exact-answer probe with its gate."""
    probes: dict[str, tuple[Probe, float]] = {}
    for source, found, gate in (
        ("drills", drills.PROBES, COPY_GATE),
        ("support", support.PROBES, UNDERSTANDING_GATE),
        ("moderation", moderation.PROBES, UNDERSTANDING_GATE),
        ("medical", medical.PROBES, COPY_GATE),
    ):
        for name, probe in found.items():
            probes[f"{source}.{name}"] = (probe, gate)
    return probes


@torch.inference_mode()
def answer(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[Message]],
    max_new_tokens: int = 80,
    batch_size: int = 50,
) -> list[tuple[str, bool]]:
    """The greedy answer to each prompt, and whether it ended by itself."""
    rows = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        for prompt in prompts
    ]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    answers: list[tuple[str, bool]] = [("", False)] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(rows[index]) for index in chosen)
        ids = torch.full((len(chosen), width), int(tokenizer.pad_token_id))
        for line, index in enumerate(chosen):
            ids[line, width - len(rows[index]) :] = torch.tensor(rows[index])
        output = model.generate(
            input_ids=ids,
            attention_mask=(ids != tokenizer.pad_token_id).long(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for index, row in zip(chosen, output[:, width:].tolist(), strict=True):
            stopped = tokenizer.eos_token_id in row
            text = tokenizer.decode(row[: row.index(tokenizer.eos_token_id)] if stopped else row)
            answers[index] = (str(text), stopped)
    return answers


def measure(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    probe: Probe,
    gate: float,
    count: int,
    seed: int,
) -> Result:
    """`count` fresh questions of one probe."""
    rng = random.Random(f"{seed}:{name}")
    asked = [probe(rng) for _ in range(count)]
    answers = answer(model, tokenizer, [messages for messages, _ in asked])
    misses = [
        (messages[-1]["content"], expected, text)
        for (messages, expected), (text, _) in zip(asked, answers, strict=True)
        if text != expected
    ]
    return Result(name, 1 - len(misses) / count, gate, sum(stop for _, stop in answers) / count, misses)


def plain_task_prompts(rng: random.Random) -> list[Message]:
    """A task prompt as a user of an adapter would write it, put to the base without any instruction."""
    source = rng.choice((support, moderation, medical))
    while True:
        chat = source.conversation(rng)
        first = next(message for message in chat if message["role"] == "user")
        if "?" not in first["content"]:
            return [first]


def measure_plain(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
) -> Result:
    """Share of answers to plain task prompts that hold none of the adapters' formats."""
    rng = random.Random(f"{seed}:plain")
    prompts = [plain_task_prompts(rng) for _ in range(count)]
    answers = answer(model, tokenizer, prompts)
    misses = [
        (prompt[-1]["content"], "no adapter format", text)
        for prompt, (text, _) in zip(prompts, answers, strict=True)
        if FORMATS.search(text)
    ]
    return Result(
        "plain.no_format", 1 - len(misses) / count, 1.0, sum(stop for _, stop in answers) / count, misses
    )


def run_all(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
) -> list[Result]:
    """Every gate once."""
    results = [
        measure(model, tokenizer, name, probe, gate, count, seed)
        for name, (probe, gate) in all_probes().items()
    ]
    return [*results, measure_plain(model, tokenizer, count, seed)]


def table(results: Sequence[Result], count: int) -> str:
    """The results as a Markdown table."""
    lines = [f"| probe (n={count}) | exact | gate | stops |", "|---|---|---|---|"]
    for result in results:
        mark = "" if result.score >= result.gate else " (missed)"
        lines.append(
            f"| {result.name} | {result.score:.3f} | {result.gate:.2f}{mark} | {result.stopped:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table; exit 1 if a gate is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("adapterd/mini"))
    parser.add_argument("--count", type=int, default=100, help="questions a probe")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--misses", type=int, default=0, help="wrong answers to print, a probe")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    results = run_all(model, tokenizer, arguments.count, arguments.seed)
    print(table(results, arguments.count))
    for result in results:
        for question, expected, text in result.misses[: arguments.misses]:
            print(f"\n{result.name}\n  asked    {question!r}\n  expected {expected!r}\n  answered {text!r}")
    sys.exit(any(result.score < result.gate or result.stopped < 1.0 for result in results))


if __name__ == "__main__":
    main()
