import random
from collections import Counter

from adapterd.core import AdapterDigest, AdapterId, AdapterMix
from adapterd.engine.blocks import BlockPool, hash_blocks

SIZE = 4


def mix(*parts: tuple[str, float]) -> AdapterMix:
    return tuple((AdapterId(AdapterDigest(digest), "name"), factor) for digest, factor in parts)


def hashes(adapter_mix: AdapterMix, tokens: list[int], scope: bytes = b"") -> list[bytes]:
    found: list[bytes] = []
    hash_blocks(adapter_mix, scope, tokens, SIZE, found)
    return found


def test_hash_counts_full_blocks_and_extends_what_is_known() -> None:
    tokens = list(range(11))
    known = hashes(mix(), tokens[:7])
    assert len(known) == 1
    hash_blocks(mix(), b"", tokens, SIZE, known)
    assert known == hashes(mix(), tokens)
    assert len(known) == 2


def test_hash_tells_apart_mix_factor_scope_token_position_and_everything_before() -> None:
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    seen = [
        hashes(mix(), tokens),
        hashes(mix(("a", 1.0)), tokens),
        hashes(mix(("b", 1.0)), tokens),
        hashes(mix(("a", 0.5)), tokens),
        hashes(mix(), tokens, b"1"),
        hashes(mix(), tokens, b"2"),
        hashes(mix(("a", 1.0)), tokens, b"1"),
        hashes(mix(("a", 1.0), ("b", 1.0)), tokens),
        hashes(mix(), [9, *tokens[1:]]),
        hashes(mix(), tokens[4:] + tokens[:4]),
    ]
    assert len({found[1] for found in seen}) == len(seen)
    assert hashes(mix(), tokens)[0] == hashes(mix(), [*tokens[:4], 0, 0, 0, 0])[0]


def test_name_of_an_adapter_takes_no_part() -> None:
    digest = AdapterDigest("a")
    one, other = ((AdapterId(digest, "old"), 1.0),), ((AdapterId(digest, "new"), 1.0),)
    assert hashes(one, [1, 2, 3, 4]) == hashes(other, [1, 2, 3, 4])


def test_longest_known_prefix_is_found_and_nothing_behind_a_gap() -> None:
    pool = BlockPool(8, SIZE)
    known = hashes(mix(), list(range(16)))
    blocks = pool.take(4)
    for index in (0, 1, 3):
        pool.publish(blocks[index], known[index])
    assert pool.match(known) == blocks[:2]


def test_tail_is_reused_before_the_head_and_cached_blocks_after_the_others() -> None:
    pool = BlockPool(6, SIZE)
    known = hashes(mix(), list(range(12)))
    blocks = pool.take(4)
    for block, block_hash in zip(blocks, known, strict=False):
        pool.publish(block, block_hash)
    pool.release(blocks)
    assert pool.take(3) == [blocks[3], 4, 5]
    assert pool.match(known) == blocks[:3]
    pool.take(1)
    assert pool.match(known) == blocks[:2]


def test_books_balance_and_content_is_never_mistaken_on_a_long_random_walk() -> None:
    """A mirror keeps what each block really holds; a match must give back exactly that content."""
    generator = random.Random(0)
    pool = BlockPool(24, SIZE)
    content: dict[int, bytes | None] = {}
    tables: list[list[int]] = []
    num_hits = 0
    for _ in range(6000):
        if tables and generator.random() < 0.45:
            pool.release(tables.pop(generator.randrange(len(tables))))
        else:
            tokens = [generator.randrange(2) for _ in range(generator.randint(1, 7) * SIZE)]
            known = hashes(mix((generator.choice("ab"), 1.0)), tokens)
            cached = pool.match(known)
            assert [content[block] for block in cached] == known[: len(cached)]
            num_new = len(known) - len(cached)
            if num_new > pool.num_free - pool.num_free_among(cached):
                continue
            num_hits += len(cached)
            pool.hold(cached)
            new = pool.take(num_new)
            assert not {*new} & {block for table in [*tables, cached] for block in table}
            for block in new:
                content[block] = None
            for block, block_hash in zip(new, known[len(cached) :], strict=True):
                content[block] = block_hash
                if generator.random() < 0.8:
                    pool.publish(block, block_hash)
            tables.append(cached + new)
        pool.check_integrity()
        held = Counter(block for table in tables for block in table)
        assert pool.num_held == len(held)
        assert pool.num_free + pool.num_held == pool.num_blocks
    assert num_hits > 300
    for table in tables:
        pool.release(table)
    assert pool.num_held == 0
