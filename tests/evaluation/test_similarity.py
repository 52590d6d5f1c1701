"""The libraries' figures reach the report as they are."""

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.chrf import CHRF

from adapterd.evaluation.similarity import chrf, rouge_l

PAIRS = [
    ("the cat sat on the mat", "the cat lay on the mat"),
    ("nothing alike", "some other words"),
    ("same words", "same words"),
]


def test_chrf_is_sacrebleus() -> None:
    found = chrf(PAIRS)
    assert found == [CHRF().sentence_score(text, [reference]).score / 100 for text, reference in PAIRS]
    assert found is not None
    assert found[2] == 1


def test_rouge_l_is_rouge_scores_where_its_letters_suffice() -> None:
    scorer = RougeScorer(["rougeL"])
    assert rouge_l(PAIRS) == [scorer.score(r, t)["rougeL"].fmeasure for t, r in PAIRS]


def test_words_of_other_alphabets_count() -> None:
    assert rouge_l([("größer als früher", "größer als sonst"), ("привет мир", "привет мир")]) == [2 / 3, 1.0]
