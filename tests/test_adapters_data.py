"""The rows of the shipped adapters: valid, in their format, apart from each other, and made by their script.

What differs between the adapters is in TASKS; every check runs for every one of them.
"""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from adapterd.adapter_writer import base_fingerprint
from adapterd.file_names import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from pretraining.corpus import conversation

ROOT = Path(__file__).parent.parent
SPLITS = ("train", "heldout")
BYTES_PER_TOKEN = 3.6  # of the embedded tokenizer on this kind of text
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Task:
    """What the rows of one adapter must be. A named group of `answers` is a label, and `labels` its allowed values."""

    name: str
    answers: tuple[str, ...]
    """Regular expressions: every assistant message matches exactly one of them, from end to end."""
    labels: dict[str, tuple[str, ...]]


TASKS = {
    task.name: task
    for task in (
        Task(
            "support",
            answers=(
                r"Category: (?P<category>\w+)\nPriority: (?P<priority>\w+)\nSentiment: (?P<sentiment>\w+)",
                r"Thanks for reaching out\. We are [^.\n]+ about [^.\n]+ and will [^.\n]+\. We are here to help\.",
                r"Thanks for reaching out\. We are happy to help with [^.\n]+ and will [^.\n]+\. We are here to help\.",
            ),
            labels={
                "category": ("Billing", "Shipping", "Account", "Technical", "Refund", "Other"),
                "priority": ("High", "Medium", "Low"),
                "sentiment": ("Angry", "Worried", "Neutral", "Happy"),
            },
        ),
        Task(
            "moderation",
            answers=(r"(?P<label>\w+)",),
            labels={"label": ("allow", "spam", "harassment", "threat", "privacy")},
        ),
        Task(
            "medical",
            answers=(
                r"The [a-z]+ (reports [^\n0-9]+|was seen)\. "
                r"(The findings may fit ([^\n0-9]|type 2)+, but it is only one possible cause"
                r"|The cause is not recorded)\.",
                r"This does not look like a clinical note\.",
            ),
            labels={},
        ),
    )
}


@cache
def read_rows(name: str, split: str) -> list[dict[str, object]]:
    lines = (ROOT / "adapters" / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def chats(name: str, split: str) -> list[Messages]:
    return [row["messages"] for row in read_rows(name, split)]  # type: ignore[misc]


def prompt(messages: Messages) -> str:
    """What the customer, the poster or the clinician wrote before the last answer."""
    return "\n".join(message["content"] for message in messages[:-1] if message["role"] == "user")


def trigrams(text: str) -> frozenset[str]:
    words = re.findall(r"\w+", text.lower())
    return frozenset(" ".join(words[index : index + 3]) for index in range(max(1, len(words) - 2)))


@cache
def corpus_chats() -> list[Messages]:
    rng = random.Random("held-out check")
    return [conversation(rng) for _ in range(12000)]


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_chat_rows(task: Task, split: str) -> None:
    for row in read_rows(task.name, split):
        assert set(row) == ({"messages", "tags"} if split == "heldout" else {"messages"})
    for messages in chats(task.name, split):
        assert all(set(message) == {"role", "content"} and message["content"].strip() for message in messages)
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert turns


def test_row_counts(task: Task) -> None:
    assert 600 <= len(read_rows(task.name, "train")) <= 10_000
    assert len(read_rows(task.name, "heldout")) == 150


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_in_the_format(task: Task, split: str) -> None:
    for messages in chats(task.name, split):
        for message in messages:
            if message["role"] == "assistant":
                matching = [form for form in task.answers if re.fullmatch(form, message["content"])]
                assert len(matching) == 1, message["content"]


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_the_allowed_ones_and_none_is_rare(task: Task, split: str) -> None:
    counts: dict[str, Counter[str]] = {name: Counter() for name in task.labels}
    for messages in chats(task.name, split):
        for form in task.answers:
            if match := re.fullmatch(form, messages[-1]["content"]):
                for name, label in match.groupdict().items():
                    counts[name][label] += 1
    for name, allowed in task.labels.items():
        assert set(counts[name]) == set(allowed)
        assert min(counts[name].values()) >= 0.4 * counts[name].total() / len(allowed)


@pytest.mark.parametrize("split", SPLITS)
def test_no_prompt_comes_twice(task: Task, split: str) -> None:
    prompts = Counter(prompt(messages).lower() for messages in chats(task.name, split))
    assert [text for text, count in prompts.items() if count > 1] == []


def test_no_heldout_prompt_is_near_a_training_prompt(task: Task) -> None:
    training = [(trigrams(prompt(messages)), prompt(messages)) for messages in chats(task.name, "train")]
    for messages in chats(task.name, "heldout"):
        own = trigrams(prompt(messages))
        near = [text for other, text in training if len(own & other) >= 0.5 * len(own | other)]
        assert near == [], prompt(messages)


def test_no_longer_heldout_sentence_occurs_in_the_pretraining_corpus(task: Task) -> None:
    def sentences(text: str) -> set[str]:
        parts = (re.findall(r"\w+", part.lower()) for part in re.split(r"[.?!:\n]", text))
        return {" ".join(words) for words in parts if len(words) >= 6}

    corpus = set().union(*(sentences(m["content"]) for messages in corpus_chats() for m in messages))
    heldout = set().union(*(sentences(prompt(messages)) for messages in chats(task.name, "heldout")))
    assert heldout & corpus == set()


def test_the_base_learns_every_frequent_answer_word(task: Task) -> None:
    """A LoRA leaves the tied embedding alone: a word the base never had to say stays unlikely for the adapter."""

    def answered(messages: Messages) -> set[str]:
        return {w for m in messages if m["role"] == "assistant" for w in re.findall(r"\w+", m["content"])}

    spoken = set().union(*(answered(messages) for messages in corpus_chats()))
    training = chats(task.name, "train")
    counts = Counter(word for messages in training for word in answered(messages))
    assert {word for word, count in counts.items() if 60 * count >= len(training)} - spoken == set()


def test_the_base_never_sees_the_whole_format(task: Task) -> None:
    forms = [form for form in task.answers if r"\n" in form or " " in form]
    said = (m["content"] for messages in corpus_chats() for m in messages if m["role"] == "assistant")
    assert [text for text in said if any(re.fullmatch(form, text) for form in forms)] == []


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_short(task: Task, split: str) -> None:
    for messages in chats(task.name, split):
        *before, answer = (len(message["content"].encode()) for message in messages)
        assert sum(before) < 160 * BYTES_PER_TOKEN
        assert answer < 90 * BYTES_PER_TOKEN


def test_the_script_writes_the_committed_rows(task: Task, tmp_path: Path) -> None:
    copy = tmp_path / "adapters" / task.name
    shutil.copytree(
        ROOT / "adapters" / task.name, copy, ignore=shutil.ignore_patterns("*.jsonl", "__pycache__")
    )
    # Both trees form one namespace package; the copy comes first, so the script writes beside the copy.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    module = f"adapters.{task.name}.rows"
    subprocess.run([sys.executable, "-m", module], cwd=tmp_path, env=environment, check=True, timeout=120)
    for split in SPLITS:
        committed = ROOT / "adapters" / task.name / f"{split}.jsonl"
        assert (copy / f"{split}.jsonl").read_bytes() == committed.read_bytes()


def test_recipe_and_card_belong_to_the_rows(task: Task) -> None:
    folder = ROOT / "adapters" / task.name
    recipe = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
    assert (recipe["name"], recipe["base"]) == (task.name, "mini")
    assert (folder / recipe["data"], folder / recipe["heldout"]) == tuple(
        folder / f"{s}.jsonl" for s in SPLITS
    )
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert re.search(r"<!-- results:begin -->.*<!-- results:end -->", card, re.DOTALL)
    assert "Apache-2.0" in card


def test_the_weights_are_what_the_recipe_made_of_these_rows_on_this_base(task: Task) -> None:
    folder = ROOT / "adapters" / task.name
    recipe = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
    seal = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))
    assert seal["base_fingerprint"] == base_fingerprint(ROOT / "adapterd" / "mini")
    assert seal["data_sha256"] == sha256(folder / "train.jsonl")
    assert seal["files"] == {name: sha256(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    assert (seal["learning_rate"], seal["seed"]) == (recipe["learning_rate"], recipe["seed"])
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (recipe["rank"], recipe["alpha"])
    assert seal["round_trip"]["largest_difference"] < 1e-3
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"adapterd train adapters/{task.name}/recipe.toml" in card


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
