"""Whether the rows ask for behaviour, which an adapter learns, or for facts, which it does not. Plain Python.

A style, a format, a label, a field copied from the question: their words stand in the prompt or in the answers
that were trained on. A fact about the world stands in neither, and so can only be guessed.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from adapterd.training.rows import Row

_FACT_SHARE = 0.3
_MIN_FACT_ROWS = 3
_SHORT_ANSWER_WORDS = 5
_STEM = 5
_WORD = re.compile(r"\d+(?:[.,:/-]\d+)*|[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_SENTENCE_START = re.compile(r"(?:^|[.!?:\n]\s*|[\"\u201c(*#-]\s*)$")


@dataclass(frozen=True)
class UnknownContent:
    """What the answer of a held-out row says that nothing it could be learnt from says."""

    line: int
    words: tuple[str, ...]


@dataclass(frozen=True)
class FactAdvice:
    """How many of the held-out answers hold content that stands neither in their prompt nor in a trained answer."""

    num_rows: int
    unknown: tuple[UnknownContent, ...]

    @property
    def share(self) -> float:
        return len(self.unknown) / self.num_rows if self.num_rows else 0.0

    @property
    def use_retrieval(self) -> bool:
        return self.share >= _FACT_SHARE and len(self.unknown) >= _MIN_FACT_ROWS

    @property
    def sentence(self) -> str:
        """One paragraph for people; what to do, if there is anything to do."""
        if not self.use_retrieval:
            return (
                f"{self.num_rows - len(self.unknown)} of {self.num_rows} held-out answers are made of what their"
                " prompts and the trained answers hold: this is behaviour, which an adapter learns"
            )
        examples = "; ".join(f"line {one.line}: {', '.join(one.words[:3])}" for one in self.unknown[:3])
        return (
            f"{len(self.unknown)} of {self.num_rows} held-out answers say things that stand neither in their prompt"
            f" nor in any trained answer ({examples}). These are facts, and an adapter trained on other rows can"
            " only invent them: put them into the prompt (retrieval), and train the behaviour alone"
        )


def facts_beyond_rows(training: Sequence[Row], heldout: Sequence[Row]) -> FactAdvice:
    """Look for telling content (numbers, names, the words of short answers) that no row gives away."""
    trained = set(_stems(word for row in training for word in _WORD.findall(row.answer)))
    unknown = []
    for row in heldout:
        known = trained.union(_stems(_WORD.findall(row.prompt_text)))
        words = tuple(word for word in _telling_words(row.answer) if _stem(word) not in known)
        if words:
            unknown.append(UnknownContent(row.line, tuple(dict.fromkeys(words))))
    return FactAdvice(len(heldout), tuple(unknown))


def _telling_words(answer: str) -> Iterator[str]:
    """Numbers, and words with a capital inside a sentence; of an answer of a few words, all longer ones."""
    found = list(_WORD.finditer(answer))
    is_short = len(found) <= _SHORT_ANSWER_WORDS
    for match in found:
        word = match[0]
        inside = word[0].isupper() and not _SENTENCE_START.search(answer[: match.start()][-3:])
        if word[0].isdigit() or inside or (is_short and len(word) > 2):
            yield word


def _stems(words: Iterable[str]) -> Iterator[str]:
    return (_stem(word) for word in words)


def _stem(word: str) -> str:
    """Enough of a word to know it in another form: `shipped` and `shipping`. A number is itself."""
    return word if word[0].isdigit() else word.casefold()[:_STEM]
