"""Train the tokenizer and the base model `mini` from scratch, in one command.

    python -m pretraining.pretrain --minutes 60 --out adapterd/mini --work build/mini
    python -m pretraining.pretrain --tokens 8000000 --seed 1 ...
    python -m pretraining.pretrain --resume --work build/mini ...

Four phases. Words: bare words said again; drills: copying under instructions; both in short rows, each until its copy
probe passes (a gate; a cap keeps a failure from eating the budget, and the record shows it). Mixture: the whole corpus
at a constant rate. Decay: the same, the rate going linearly to zero. The seed and the token budget fix the data; with
--minutes the clock decides where the decay begins.
"""

import argparse
import itertools
import json
import logging
import math
import os
import random
import shutil
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from pretraining import corpus, probes, rows
from pretraining import tokenizer as tokenizers
from pretraining.corpus import drills
from pretraining.corpus.drills import Message
from pretraining.recipe import Recipe, build_model, build_optimizers

logger = logging.getLogger("pretraining")


@dataclass
class Progress:
    """What a checkpoint holds beside the tensors."""

    phase: str = "words"
    step: int = 0
    block: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    record: list[dict[str, Any]] = field(default_factory=list)


def make_block(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, progress: Progress, seed: int
) -> list[rows.Row]:
    """The rows of the next `steps_per_block` steps, in random order: a function of seed, phase and block number."""
    induction = progress.phase in ("words", "drills")
    source: corpus.Source = corpus.conversation
    if progress.phase == "words":
        source = partial(drills.repeat_bare, words=tokenizers.whole_words(tokenizer))
    elif progress.phase == "drills":
        source = drills.induction
    length = recipe.induction_length if induction else recipe.row_length
    wanted = (recipe.induction_rows if induction else recipe.row_count) * recipe.steps_per_block
    name = f"{seed}:{'mixture' if progress.phase == 'decay' else progress.phase}:{progress.block}"
    stream = corpus.stream(source, name)
    packed: list[rows.Row] = []
    encoded: list[rows.Encoded] = []
    while len(packed) < wanted:
        encoded += rows.encode(tokenizer, itertools.islice(stream, wanted * length // 50), recipe.user_weight)
        if sum(len(chat.ids) for chat in encoded if len(chat.ids) <= length) >= wanted * length:
            packed = list(rows.pack(encoded, length, tokenizer.pad_token_id))
    random.Random(name).shuffle(packed)
    return packed[:wanted]


def loss_of(
    model: Qwen3ForCausalLM, batch: list[rows.Row], recipe: Recipe, seed: int
) -> tuple[Tensor, float]:
    """Weighted mean cross entropy over the scored tokens, and the unweighted mean over the answers alone."""
    ids = torch.stack([row.ids for row in batch])
    weights = torch.stack([row.weights for row in batch])
    hidden = model.model(
        input_ids=ids,
        attention_mask=rows.mask(torch.stack([row.chats for row in batch])),
        position_ids=torch.stack([row.positions for row in batch]),
        use_cache=False,
    ).last_hidden_state
    targets, weights = ids[:, 1:], weights[:, 1:]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(weights.shape, generator=generator) < recipe.user_share
    answers = weights == 1.0
    scored = answers | ((weights > 0) & drawn)
    weights = torch.where(answers, weights, weights / recipe.user_share)[scored]
    logits = model.lm_head(hidden[:, :-1][scored])
    losses = functional.cross_entropy(logits, targets[scored], reduction="none")
    return (losses * weights).sum() / weights.sum(), float(losses.detach()[answers[scored]].mean())


def set_rates(
    recipe: Recipe, optimizers: list[torch.optim.Optimizer], progress: Progress, done: float
) -> None:
    """Warm-up over the first steps, then constant, then linear to zero; `done` is the spent share of the budget."""
    scale = min(1.0, (progress.step + 1) / recipe.warmup_steps)
    if done > 1 - recipe.decay_share:
        scale *= max(0.02, (1 - done) / recipe.decay_share)
    for optimizer, rate in zip(optimizers, (recipe.muon_lr, recipe.adam_lr), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * scale


def export(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model as bfloat16 safetensors with its tokenizer, each file replaced by one rename."""
    staging = out.parent / f".{out.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    copy = Qwen3ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(staging)
    tokenizers.save(tokenizer, staging)
    out.mkdir(parents=True, exist_ok=True)
    for path in staging.iterdir():
        os.replace(path, out / path.name)
    staging.rmdir()


def save_checkpoint(
    path: Path, model: Qwen3ForCausalLM, optimizers: list[torch.optim.Optimizer], progress: Progress
) -> None:
    """Write everything a resumed run needs; a reader sees the old file or the new one, never a part."""
    partial = path.with_suffix(".partial")
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": asdict(progress),
    }
    torch.save(state, partial)
    os.replace(partial, path)


def note(progress: Progress, log: Path, **values: Any) -> None:
    """Add one line to the record (kept in checkpoints, written to `log`)."""
    entry = {
        "phase": progress.phase,
        "step": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds),
        **values,
    }
    progress.record.append(entry)
    logger.info("%s", json.dumps(entry))
    log.write_text("".join(json.dumps(line) + "\n" for line in progress.record), encoding="utf-8")


def check_gate(
    recipe: Recipe, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, phase: str, seed: int
) -> float:
    """The share of exact copies in the phase's own task, on questions fresh for this seed."""
    words = tokenizers.whole_words(tokenizer)

    def bare(rng: random.Random) -> tuple[list[Message], str]:
        question, answer = drills.repeat_bare(rng, words)
        return [question], answer["content"]

    probe = bare if phase == "words" else drills.probe_repeat
    model.eval()
    result = probes.measure(model, tokenizer, phase, probe, recipe.copy_gate, 40, seed)
    model.train()
    return result.score


# Watched during the run, a few questions each; the full table is `python -m pretraining.probes`.
WATCHED = (
    "drills.copy", "drills.lookup", "support.topic", "support.mood", "moderation.moderation_rule",
    "medical.blood_pressure", "medical.drug_and_dose",
)  # fmt: skip


def run_watched(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, float]:
    """Exact-answer scores of the watched probes on 20 questions each."""
    known = probes.all_probes()
    model.eval()
    scores = {name: probes.measure(model, tokenizer, name, *known[name], 20, seed).score for name in WATCHED}
    model.train()
    return {name: round(score, 3) for name, score in scores.items()}


def train(arguments: argparse.Namespace, recipe: Recipe) -> Progress:
    """The whole run; returns the final progress with its record."""
    torch.manual_seed(arguments.seed)
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    checkpoint, log = work / "checkpoint.pt", work / "log.jsonl"
    progress = Progress()
    if arguments.resume:
        tokenizer = tokenizers.load(work / "tokenizer")
    else:
        chats = corpus.stream(corpus.conversation, f"{arguments.seed}:tokenizer")
        sample = itertools.islice(chats, recipe.tokenizer_chats)
        tokenizer = tokenizers.train(message["content"] for chat in sample for message in chat)
        tokenizers.save(tokenizer, work / "tokenizer")
    model = build_model(recipe, tokenizer)
    optimizers = build_optimizers(recipe, model)
    if arguments.resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        progress = Progress(**state["progress"])
    logger.info("%d parameters", model.num_parameters())
    started = time.monotonic() - progress.seconds
    exported = progress.seconds

    def done() -> float:
        if arguments.tokens is not None:
            return progress.tokens / int(arguments.tokens)
        return progress.seconds / (60 * float(arguments.minutes))

    while done() < 1.0 and progress.tokens < (arguments.stop_after or math.inf):
        block = make_block(recipe, tokenizer, progress, arguments.seed)
        per_step = len(block) // recipe.steps_per_block
        for at in range(0, len(block), per_step):
            batch = block[at : at + per_step]
            set_rates(recipe, optimizers, progress, done())
            loss, answer_loss = loss_of(model, batch, recipe, progress.step)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            progress.step += 1
            progress.tokens += sum(row.ids.numel() for row in batch)
            progress.seconds = time.monotonic() - started
            smooth = 0.95 if progress.loss else 0.0
            progress.loss = smooth * progress.loss + (1 - smooth) * answer_loss
            if progress.step % recipe.log_steps == 0:
                note(progress, log, loss=round(progress.loss, 4))
        progress.block += 1
        if progress.phase in ("words", "drills"):
            if progress.step % recipe.gate_steps == 0:
                score = check_gate(recipe, model, tokenizer, progress.phase, progress.step)
                note(progress, log, gate=round(score, 3))
                if score >= recipe.copy_gate or done() > recipe.induction_cap:
                    progress.phase = "drills" if progress.phase == "words" else "mixture"
        elif progress.step % recipe.probe_steps == 0:
            note(progress, log, probes=run_watched(model, tokenizer, progress.step))
        if progress.phase == "mixture" and done() > 1 - recipe.decay_share:
            progress.phase = "decay"
            note(progress, log, loss=round(progress.loss, 4))
        if progress.seconds - exported > 60 * arguments.checkpoint_minutes:
            exported = progress.seconds
            save_checkpoint(checkpoint, model, optimizers, progress)
            export(model, tokenizer, arguments.out)
    if done() >= 1.0:
        note(progress, log, loss=round(progress.loss, 4), finished=True)
    save_checkpoint(checkpoint, model, optimizers, progress)
    export(model, tokenizer, arguments.out)
    return progress


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=60.0, help="wall-clock budget")
    budget.add_argument("--tokens", type=int, help="token budget instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("adapterd/mini"))
    parser.add_argument("--work", type=Path, default=Path("build/mini"), help="checkpoint and log")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint-minutes", type=float, default=4.0)
    parser.add_argument("--stop-after", type=int, help="pause after this many tokens; --resume goes on")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --work")
    return parser.parse_args(argv)


def main() -> None:
    """Train by the command line's arguments and the default recipe."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)  # AdamW's moments of rare tokens would otherwise slow the CPU down
    train(arguments, Recipe())


if __name__ == "__main__":
    main()
