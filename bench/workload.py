"""What a load run asks: which adapter, how long, when, with which prompt. Pure functions of a seed.

Popularity has Punica's names and meaning (arXiv 2310.18547, section 7): the requests of a run are dealt to
adapters, most popular first, and shuffled. Arrivals are S-LoRA's (arXiv 2311.03285): Gamma gaps, Poisson at cv 1.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

POPULARITIES = ("identical", "distinct", "uniform", "zipf:ALPHA")


@dataclass(frozen=True)
class Lengths:
    """Of one request, in tokens."""

    prompt_tokens: int
    output_tokens: int


def requests_by_adapter(num_requests: int, popularity: str) -> list[int]:
    """How many of the requests run each adapter, most popular first; their sum is `num_requests`.

    identical: one adapter. distinct: one request each. uniform: ceil(sqrt(n)) adapters, evenly. zipf:ALPHA: each
    adapter is asked ALPHA times as often as the next, the rarest once. Raises ValueError for another name.
    """
    if num_requests < 1:
        raise ValueError(f"num_requests is {num_requests}; at least 1 is needed")
    if popularity == "identical":
        return [num_requests]
    if popularity == "distinct":
        return [1] * num_requests
    if popularity == "uniform":
        num_adapters = math.isqrt(num_requests - 1) + 1
        share, rest = divmod(num_requests, num_adapters)
        return [share + 1] * rest + [share] * (num_adapters - rest)
    kind, _, exponent = popularity.partition(":")
    if kind == "zipf" and (alpha := _float(exponent)) is not None and alpha > 1:
        counts: list[int] = []
        size = 1.0
        while sum(counts) + int(size) < num_requests:
            counts.append(int(size))
            size *= alpha
        counts.append(num_requests - sum(counts))
        return sorted(counts, reverse=True)
    raise ValueError(f"popularity {popularity!r}: allowed are {', '.join(POPULARITIES)} with ALPHA above 1")


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def assign_adapters(num_requests: int, num_adapters: int, popularity: str, seed: int) -> list[int]:
    """The adapter of each request, an index below `num_adapters`.

    A popularity that wants more adapters than there are uses them again from the first, as Punica does.
    `distinct` is not shuffled: any `num_adapters` requests in a row are of different adapters.
    """
    if num_adapters < 1:
        raise ValueError(f"num_adapters is {num_adapters}; at least 1 is needed")
    counts = requests_by_adapter(num_requests, popularity)
    chosen = [index % num_adapters for index, count in enumerate(counts) for _ in range(count)]
    if popularity != "distinct":
        random.Random(seed).shuffle(chosen)
    return chosen


def arrival_seconds(num_requests: int, rate: float, cv: float, seed: int) -> list[float]:
    """When each request arrives: Gamma gaps of mean 1/rate and coefficient of variation cv; the first at 0."""
    if rate <= 0 or cv <= 0:
        raise ValueError(f"rate {rate} and cv {cv} must both be positive")
    draw = random.Random(seed)
    moments = [0.0]
    for _ in range(num_requests - 1):
        moments.append(moments[-1] + draw.gammavariate(1 / cv**2, cv**2 / rate))
    return moments


def read_trace(path: Path) -> list[Lengths]:
    """A JSONL file, a request a line: {"prompt_tokens": 128, "output_tokens": 64}; other keys are an error."""
    lengths = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            lengths.append(Lengths(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if min(lengths[-1].prompt_tokens, lengths[-1].output_tokens) < 1:
            raise ValueError(f"{path}, line {number}: both lengths must be at least 1")
    if not lengths:
        raise ValueError(f"{path} is empty")
    return lengths


def token_prompt(num_tokens: int, token_ids: range, seed: str) -> list[int]:
    """Random token ids. Every seed gives another prompt, so that no server answers from its prefix cache."""
    draw = random.Random(seed)
    return [draw.randrange(token_ids.start, token_ids.stop) for _ in range(num_tokens)]


def text_prompt(num_words: int, words: Sequence[str], seed: str) -> str:
    """Random words with a space before each: one token a word wherever `words` are such.

    It begins with the same word each time, since a first word has no space and may take any number of tokens.
    """
    draw = random.Random(seed)
    return "Hello" + "".join(f" {draw.choice(words)}" for _ in range(num_words))


def single_token_words(tokenizer_file: Path, limit: int = 4096) -> list[str]:
    """Words that a byte-level BPE tokenizer.json encodes, with their space, as one token each, in any company."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    found = []
    for token in tokenizer.get_vocab(with_added_tokens=False):
        word = token.removeprefix("Ġ")  # byte-level BPE writes a space so
        if token != word and word.isascii() and word.isalpha():
            found.append(word)
    found.sort(key=lambda word: (len(word), word))
    words = [word for word in found[:limit] if len(tokenizer.encode(f" {word} {word}").tokens) == 2]
    if not words:
        raise ValueError(f"{tokenizer_file} has no words of one token; is it byte-level BPE?")
    return words


_COMMON = (
    "the of and to in is that for it with as was on be at by have from or an they which one you were all "
    "her she there would their we him been has when who will no more if out so said what up its about than "
    "into them can only other time new some could these two may first then do any like my now over such our"
)
COMMON_WORDS = tuple(_COMMON.split())
"""One token each, with their space, in current vocabularies; for servers whose tokenizer is not at hand."""
