"""Which texts are near-duplicates: those that share half or more of their word 3-grams. For the rows' scripts."""

import re
from collections import Counter, defaultdict

MAX_SHARED = 0.5  # Jaccard of the word 3-grams; from here on two texts count as near-duplicates


def trigrams(text: str) -> frozenset[str]:
    """The word 3-grams of a text; of a text below three words, the text itself."""
    words = re.findall(r"\w+", text.lower())
    return frozenset(" ".join(words[index : index + 3]) for index in range(max(1, len(words) - 2)))


class Seen:
    """The texts so far. An index from 3-gram to texts, since each is held against all before it."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._holders: defaultdict[str, list[int]] = defaultdict(list)

    def add(self, text: str) -> bool:
        """Record `text`, or return False if it is too near to one that is recorded."""
        own = trigrams(text)
        shared = Counter(holder for gram in own for holder in self._holders[gram])
        for holder, count in shared.items():
            if count >= MAX_SHARED * (len(own) + self._sizes[holder] - count):
                return False
        for gram in own:
            self._holders[gram].append(len(self._sizes))
        self._sizes.append(len(own))
        return True
