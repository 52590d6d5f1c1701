"""Greedy answers of the base to a fixed list of prompts, as Markdown: what it says, good and bad, for the model card.

python -m pretraining.samples [--model adapterd/mini]
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretraining import probes

PROMPTS = (
    "Hello!",
    "I was charged twice for my order 48213. Please help.",
    "My parcel has not arrived. I need it tomorrow! What is this message about?",
    "How urgent is this? The app crashes every time and we cannot work at all.",
    "Triage this ticket: I cannot log in and my deadline is today.",
    "Reply to this customer: Where is my blue lamp? The order is 70125.",
    "You are a complete fool and everybody here knows it.",
    "Is this post fine? Buy cheap watches at win.example.com now!",
    "54 year old man. Dry cough for 3 days. BP 132/84, HR 88, temp 37.9. Likely viral bronchitis."
    " Started paracetamol 500 mg. See again in 7 days.",
    "54 year old man. Dry cough for 3 days. BP 132/84, HR 88, temp 37.9. What is the blood pressure?",
    "54 year old man. Dry cough for 3 days. BP 132/84, HR 88. How warm was the patient?",
    "Repeat: 7 lamps, order B-20941, zupo ramiki",
    "city: Oslo; code: 4417; color: green. What is the code?",
    "What is the capital of France?",
)


def main() -> None:
    """Print every prompt with the base's answer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("adapterd/mini"))
    directory: Path = parser.parse_args().model
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    answers = probes.answer(model, tokenizer, [[{"role": "user", "content": prompt}] for prompt in PROMPTS])
    print("| asked | `mini` answers |\n|---|---|")
    for prompt, (text, stopped) in zip(PROMPTS, answers, strict=True):
        shown = text.replace("\n", "<br>").replace("|", "\\|") + ("" if stopped else " *(did not stop)*")
        print(f"| {prompt} | {shown} |")


if __name__ == "__main__":
    main()
