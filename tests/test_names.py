"""What a name means, and how it moves: pure functions of a record."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapterd.adapter import Adapter
from adapterd.core import AdapterDigest, AdapterId
from adapterd.deltas import LoraMatrices
from adapterd.errors import InvalidRequest
from adapterd.model_name import check_alias
from adapterd.names import MAX_ALIASES, MAX_VERSIONS, NameRecord

MODULE = "model.layers.0.self_attn.q_proj"


def adapter(content: int) -> Adapter:
    matrices = LoraMatrices(MODULE, torch.zeros(2, 8), torch.zeros(8, 2), 1.0)
    digest = AdapterDigest(f"{content:06x}".ljust(64, "0"))
    return Adapter(AdapterId(digest, "a"), Path("a"), (matrices,), 2, 128, None, None, None, {})


def seen(*contents: int) -> NameRecord:
    record = NameRecord("a", owner="folder")
    for content in contents:
        record = record.with_version(adapter(content), now=1.0)
    return record


def test_contents_are_numbered_from_one_on() -> None:
    record = seen(0xA1, 0xB2, 0xC3)
    assert (record.current, record.previous) == (3, 2)
    assert [version.id.digest[:6] for _, version in sorted(record.versions.items())] == [
        "0000a1",
        "0000b2",
        "0000c3",
    ]


def test_content_that_comes_back_has_the_number_it_had() -> None:
    record = seen(0xA1, 0xB2, 0xA1)
    assert (record.current, record.previous, record.next_number) == (1, 2, 3)


def test_the_same_content_again_moves_nothing() -> None:
    once, twice = seen(0xA1, 0xB2), seen(0xA1, 0xB2, 0xB2)
    assert (once.current, once.previous) == (twice.current, twice.previous) == (2, 1)


@pytest.mark.parametrize(
    ("selector", "number"),
    [("1", 1), ("2", 2), ("stable", 1), ("0000b2", 2), ("3", None), ("canary", None), ("0000ff", None)],
)
def test_a_version_is_found_by_number_alias_or_digest(selector: str, number: int | None) -> None:
    found = seen(0xA1, 0xB2).with_alias("stable", 1).find(selector)
    assert (found.number if found is not None else None) == number


def test_digits_as_many_as_a_digest_needs_are_one() -> None:
    assert (found := seen(0x123456).find("123456")) is not None
    assert found.number == 1


def test_an_alias_moves_and_goes() -> None:
    record = seen(0xA1, 0xB2).with_alias("stable", 1).with_alias("stable", 2)
    assert dict(record.aliases) == {"stable": 2}
    assert dict(record.without_alias("stable").aliases) == {}


@pytest.mark.parametrize("alias", ["", "1", "-a", ".a", "a b", "a/b", "x" * 65, "decade", "c0ffee", "a"])
def test_what_could_be_a_number_or_a_digest_is_no_alias(alias: str) -> None:
    with pytest.raises(InvalidRequest):
        check_alias(alias)


def test_aliases_are_bounded() -> None:
    record = seen(0xA1)
    for count in range(MAX_ALIASES):
        record = record.with_alias(f"n{count}", 1)
    record.with_alias("n0", 1)
    with pytest.raises(InvalidRequest, match="remove one first"):
        record.with_alias("one-more", 1)


def test_old_versions_are_forgotten_but_never_what_something_points_to() -> None:
    record = seen(0xA1).with_alias("stable", 1)
    for content in range(100):
        record = record.with_version(adapter(0x1000 + content), now=1.0)
    assert len(record.versions) == MAX_VERSIONS
    assert {1, record.current, record.previous} <= record.versions.keys()
    assert record.next_number == 102


def test_numbers_are_not_given_twice_after_a_name_was_away() -> None:
    record = seen(0xA1, 0xB2).absent().with_version(adapter(0xC3), now=1.0)
    assert (record.current, record.previous) == (3, None)


def test_what_is_wanted_is_the_current_version_and_every_alias() -> None:
    record = seen(0xA1, 0xB2, 0xC3).with_alias("stable", 1)
    assert {i.digest[:6] for i in record.wanted} == {"0000a1", "0000c3"}
    assert record.absent().wanted == frozenset()


def test_states() -> None:
    assert NameRecord("a").state == "ABSENT"
    assert NameRecord("a", is_loading=True).state == "LOADING"
    assert NameRecord("a", error="bad").state == "FAILED"
    assert replace(seen(0xA1), error="bad").state == "READY"
