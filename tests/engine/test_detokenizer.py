"""Text as it comes: every split of characters and stop strings over tokens gives the same text."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterd.engine.detokenizer import Detokenizer, Vocabulary
from adapterd.token_table import TokenTable

BYTES = tuple(bytes([byte]) for byte in range(256))


def detokenizer(
    table: tuple[bytes, ...] = BYTES,
    *,
    stop: tuple[str, ...] = (),
    include_stop: bool = False,
    skip_special_tokens: bool = True,
    special: frozenset[int] = frozenset(),
    strips_leading_space: bool = False,
    continues_prompt: bool = False,
) -> Detokenizer:
    return Detokenizer(
        Vocabulary(TokenTable(table, strips_leading_space), special),
        stop=stop,
        include_stop=include_stop,
        skip_special_tokens=skip_special_tokens,
        continues_prompt=continues_prompt,
    )


def cut(data: bytes, places: tuple[int, ...]) -> tuple[bytes, ...]:
    return tuple(data[a:b] for a, b in itertools.pairwise((0, *sorted(places), len(data))))


def shown(pieces: tuple[bytes, ...], **options: object) -> tuple[list[str], str | None]:
    """What each token shows, then the rest; ends at a stop string."""
    subject = detokenizer(pieces, **options)  # type: ignore[arg-type]
    texts = []
    for token in range(len(pieces)):
        delta = subject.push(token)
        texts.append(delta.text)
        if delta.stop is not None:
            return texts, delta.stop
    delta = subject.flush()
    return [*texts, delta.text], delta.stop


@given(
    st.text(max_size=12).flatmap(lambda t: st.tuples(st.just(t), st.sets(st.integers(0, len(t.encode())))))
)
def test_any_split_into_tokens_gives_the_text_and_never_half_a_character(case: tuple[str, set[int]]) -> None:
    text, places = case
    pieces = cut(text.encode(), tuple(places))
    texts, stop = shown(pieces)
    assert "".join(texts) == text
    assert stop is None
    sent = b""
    for token, piece in enumerate(pieces):
        sent += piece
        assert "".join(texts[: token + 1]) == sent.decode(errors="ignore")


@given(st.lists(st.binary(max_size=5), max_size=8))
def test_pushing_token_by_token_equals_one_decode_whatever_the_bytes(pieces: list[bytes]) -> None:
    texts, _ = shown(tuple(pieces))
    assert "".join(texts) == b"".join(pieces).decode("utf-8", "replace")


def test_half_a_character_at_the_end_is_shown_as_the_replacement_character() -> None:
    subject = detokenizer()
    assert subject.push(0xE6).text == ""
    assert subject.push(0x97).text == ""
    assert subject.flush().text == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("include_stop", [False, True])
@pytest.mark.parametrize("stop", ["STOP", "é日", "aab", "\n\n", "x"])
def test_stop_string_is_found_at_every_split_and_never_shown_in_part(stop: str, include_stop: bool) -> None:
    before, after = "word aa", "tail"
    text = before + stop + after
    at = text.index(stop)
    data = text.encode()
    end_of_stop = len(text[: at + len(stop)].encode())
    for places in itertools.combinations(range(1, len(data)), 2):
        texts, found = shown(cut(data, places), stop=(stop,), include_stop=include_stop)
        assert found == stop
        assert "".join(texts) == (text[: at + len(stop)] if include_stop else text[:at])
        # It ends with the token that completes it, not later.
        assert len(texts) == 1 + sum(place < end_of_stop for place in places)


@pytest.mark.parametrize(
    ("stops", "text", "shows", "found"),
    [
        (("aab",), "aaab!", "a", "aab"),  # a failed start overlaps the true one
        (("aab",), "aaaaaab", "aaaa", "aab"),
        (("abab",), "aabababc", "a", "abab"),
        (("END", "ND"), "xENDy", "x", "END"),
        (("b", "ab"), "xabx", "x", "ab"),  # whole text at once: the earliest start wins
        (("no", "yes"), "say yes, no", "say ", "yes"),
        (("zz",), "pizza", "pi", "zz"),
    ],
)
def test_earliest_of_several_stop_strings_wins(
    stops: tuple[str, ...], text: str, shows: str, found: str
) -> None:
    assert shown((text.encode(),), stop=stops) == ([shows], found)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_is_shown_up_to_the_first_stop_that_completes(text: str, stops: list[str]) -> None:
    texts, found = shown(tuple(character.encode() for character in text), stop=tuple(stops))
    ends = {text.find(stop) + len(stop) for stop in stops if stop in text}
    if not ends:
        assert (found, "".join(texts)) == (None, text)
        return
    end = min(ends)
    begin = min(end - len(stop) for stop in stops if text[:end].endswith(stop))
    assert "".join(texts) == text[:begin]
    assert found == text[begin:end]


def test_beginning_of_a_stop_string_is_held_back_and_shown_when_it_comes_to_nothing() -> None:
    subject = detokenizer((b"Yes. ST", b"O", b"CK", b" ST"), stop=("STOP",))
    assert [subject.push(token).text for token in range(4)] == ["Yes. ", "", "STOCK", " "]
    assert subject.flush().text == "ST"


def test_stop_string_below_min_tokens_is_shown_like_other_text() -> None:
    subject = detokenizer((b"STOP", b" go ", b"STOP"), stop=("STOP",))
    first, second = subject.push(0, check_stop=False), subject.push(1, check_stop=False)
    assert first.text + second.text == "STOP go "
    assert (first.stop, second.stop) == (None, None)
    assert subject.push(2).stop == "STOP"


def test_special_tokens_are_skipped_unless_asked_for() -> None:
    table = (b"<s>", b"Hi", b"</s>")
    special = frozenset({0, 2})
    for skip, text in ((True, "Hi"), (False, "<s>Hi</s>")):
        subject = detokenizer(table, special=special, skip_special_tokens=skip)
        assert "".join(subject.push(token).text for token in (0, 1, 2)) + subject.flush().text == text


def test_one_leading_space_is_dropped_once_where_the_tokenizer_does_so() -> None:
    table = (b" ", b" Hello", b" there", b"<s>")
    for tokens, text in (((1, 2), "Hello there"), ((0, 1), " Hello"), ((3, 1, 2), "Hello there")):
        subject = detokenizer(table, strips_leading_space=True, special=frozenset({3}))
        assert "".join(subject.push(token).text for token in tokens) == text
    plain = detokenizer(table)
    assert "".join(plain.push(token).text for token in (1, 2)) == " Hello there"
    continued = detokenizer(table, strips_leading_space=True, continues_prompt=True)
    assert "".join(continued.push(token).text for token in (1, 2)) == " Hello there"


def test_ids_beyond_the_tokenizer_say_nothing() -> None:
    subject = detokenizer((b"a",))
    assert subject.push(7).text == ""
    assert subject.push(0).text == "a"


def test_long_random_answer_equals_its_decode_with_stops_that_never_come() -> None:
    generator = random.Random(0)
    table = tuple("".join(generator.choices("ab é日😀", k=3)).encode()[:7] for _ in range(200))
    tokens = [generator.randrange(200) for _ in range(2000)]
    subject = detokenizer(table, stop=("aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb"))
    text = "".join(subject.push(token).text for token in tokens) + subject.flush().text
    assert text == b"".join(table[token] for token in tokens).decode("utf-8", "replace")
