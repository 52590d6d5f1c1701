"""One timed run of TRL's SFTTrainer, in TRL's own environment; bench/train_vs_trl.py starts it and reads its JSON.

Packing as TRL does it by default (best-fit, rows of one bin kept apart by their positions), on PyTorch's own
attention, since there is no FlashAttention on a CPU. Loss on the answers alone.
"""

import argparse
import json
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

WARM_UP_STEPS = 2


class Clock(TrainerCallback):
    """Stops after the given seconds of steps, the first ones not counted."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.tokens = self.began_tokens = 0
        self.began = self.ended = 0.0
        self.ended_tokens = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if state.global_step == WARM_UP_STEPS:
            self.began, self.began_tokens = now, self.tokens
        if state.global_step > WARM_UP_STEPS:
            self.ended, self.ended_tokens = now, self.tokens
            if now - self.began >= self.seconds:
                control.should_training_stop = True


class Counted(SFTTrainer):
    """Counts the tokens of each batch; TRL's packing leaves no padding in them."""

    clock: Clock

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        self.clock.tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        return super().compute_loss(model, inputs, *args, **kwargs)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--step-tokens", type=int, required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [json.loads(line)["messages"] for line in (arguments.work / "rows.jsonl").open()]
    dataset = Dataset.from_list([{"prompt": row[:1], "completion": row[1:]} for row in rows])
    clock = Clock(arguments.seconds)
    trainer = Counted(
        model=AutoModelForCausalLM.from_pretrained(arguments.work / "base", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(arguments.work / "base"),
        train_dataset=dataset,
        peft_config=LoraConfig(
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[clock],
        args=SFTConfig(
            output_dir=str(arguments.work / "trl"),
            packing=True,
            max_length=arguments.step_tokens,
            per_device_train_batch_size=1,
            num_train_epochs=100,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            max_grad_norm=1.0,
            save_strategy="no",
            report_to=[],
            logging_steps=50,
            disable_tqdm=True,
        ),
    )
    trainer.clock = clock
    trainer.train()
    result = {
        "tokens_per_second": (clock.ended_tokens - clock.began_tokens) / (clock.ended - clock.began),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "num_trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "steps": trainer.state.global_step,
        "trl": trl.__version__,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
