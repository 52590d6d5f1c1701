"""How near a free text is to its reference: chrF by sacrebleu, ROUGE-L by rouge-score. 0 to 1 for each row."""

import logging
import re
from collections.abc import Sequence

_logger = logging.getLogger(__name__)

_WORD = re.compile(r"\w+")


class Words:
    """Words as rouge-score wants them. Its own tokenizer knows the letters a to z only: "größer" would be two."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.casefold())


def chrf(pairs: Sequence[tuple[str, str]]) -> list[float] | None:
    """chrF2 of each (text, reference), as sacrebleu counts it; None without the package. Source: Popovic 2015."""
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        _logger.warning("chrF is not measured: pip install 'adapterd[eval]'")
        return None
    metric = CHRF()
    return [metric.sentence_score(text, [reference]).score / 100 for text, reference in pairs]


def rouge_l(pairs: Sequence[tuple[str, str]]) -> list[float] | None:
    """F1 of the longest common subsequence of words; None without the package. Source: Lin 2004."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        _logger.warning("ROUGE-L is not measured: pip install 'adapterd[eval]'")
        return None
    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    return [float(scorer.score(reference, text)["rougeL"].fmeasure) for text, reference in pairs]
