"""Many registered adapters, in small: what bench/registry.py measures with 2,000."""

import sys
from pathlib import Path

import pytest

from adapterd.database import Database
from adapterd.reading import AdaptedBase
from adapterd.registry import AdapterRegistry
from adapterd.sources.places import AdapterPlaces
from adapterd.token_table import TokenizerIdentity
from tests.adapters_on_disk import NO_TOKENIZER, SPEC, value_of, write

NUM_ADAPTERS = 100
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("many") / "adapters"
    for number in range(NUM_ADAPTERS):
        folder = write(directory / f"a{number}", float(number + 1))
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def registry(root: Path, state: Path, tokenizer: TokenizerIdentity = NO_TOKENIZER) -> AdapterRegistry:
    host_bytes = 10 * 128  # ten adapters' worth
    made = AdapterRegistry(
        AdaptedBase(SPEC, tokenizer),
        AdapterPlaces([root]),
        poll_seconds=0.05,
        database=Database(state),
        host_bytes=host_bytes,
    )
    made.start()
    assert made.wait_loaded(60)
    return made


def test_a_restart_reads_nothing_and_memory_stays_within_its_bound(root: Path, tmp_path: Path) -> None:
    first = registry(root, tmp_path)
    assert first.stats().num_reads == NUM_ADAPTERS
    before = {entry.name: entry.id for entry in first.list()}
    first.stop()
    second = registry(root, tmp_path)
    try:
        assert {entry.name: entry.id for entry in second.list()} == before
        assert (second.stats().num_ready, second.stats().num_reads) == (NUM_ADAPTERS, 0)
        for number in range(0, NUM_ADAPTERS, 7):
            assert value_of(second, f"a{number}") == number + 1
            assert second.stats().host_bytes <= 10 * 128
        assert second.stats().num_reads == len(range(0, NUM_ADAPTERS, 7))
        second.check_integrity()
    finally:
        second.stop()


def test_what_adapters_share_is_kept_once(root: Path, tmp_path: Path) -> None:
    made = registry(root, tmp_path)
    try:
        templates = {id(made.resolve_waiting(f"a{number}", 20).chat_template) for number in range(20)}
        assert templates == {id(sys.intern(TEMPLATE))}
    finally:
        made.stop()
