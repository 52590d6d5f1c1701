"""KV blocks: which are free, held or cached, and the prefix cache. Bookkeeping only; no torch.

A full block is known by a hash of what is in it: the mix that computed it, the tokens, and all tokens before; and of
whom it may be shown to. So a prefix is reused by the same adapter content alone, a new version under an old name finds
nothing stale, and nobody learns by the time that an answer takes what another has asked.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from adapterd.core import AdapterMix

BlockHash = bytes


def hash_blocks(
    mix: AdapterMix, scope: bytes, token_ids: Sequence[int], block_size: int, known: list[BlockHash]
) -> None:
    """Extend `known`, in place, to one hash for each full block of `token_ids`. `scope`: of its request."""
    for index in range(len(known), len(token_ids) // block_size):
        if index:
            parent = known[index - 1]
        else:
            parent = repr((scope, [(adapter_id.digest, factor) for adapter_id, factor in mix])).encode()
        tokens = array("q", token_ids[index * block_size : (index + 1) * block_size])
        # SHA-256: a collision would show one request's context to another, so a fast weak hash will not do.
        known.append(hashlib.sha256(parent + tokens.tobytes()).digest())


class BlockPool:
    """A block is held (some sequence counts on it) or free; a free one may still be cached until it is taken."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_holders = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to be taken first
        self._block_of: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._block_of)

    def match(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The cached blocks of the longest known prefix. Changes nothing."""
        found = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_among(self, blocks: Iterable[int]) -> int:
        """How many of these cached blocks `hold` would take from the free ones."""
        return sum(1 for block in blocks if self._num_holders[block] == 0)

    def hold(self, blocks: Iterable[int]) -> None:
        """Count on cached blocks that `match` found."""
        for block in blocks:
            if self._num_holders[block] == 0:
                del self._free[block]
            self._num_holders[block] += 1

    def take(self, count: int) -> list[int]:
        """Blocks to write to, the longest unused first; what they cached is forgotten. Needs count <= num_free."""
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            block_hash = self._hash_of.pop(block, None)
            if block_hash is not None:
                del self._block_of[block_hash]
            self._num_holders[block] = 1
            taken.append(block)
        return taken

    def publish(self, block: int, block_hash: BlockHash) -> None:
        """A held block is full, or will be by the step that is being decided: others may find it. A second block of
        equal content stays private."""
        if block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def forget(self, blocks: Iterable[int]) -> None:
        """Whatever these blocks hold is not to be found again. Those that count on them are not disturbed."""
        for block in blocks:
            block_hash = self._hash_of.pop(block, None)
            if block_hash is not None:
                del self._block_of[block_hash]

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each of a sequence's blocks; its tail is reused before its shared head."""
        for block in reversed(blocks):
            self._num_holders[block] -= 1
            if self._num_holders[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def check_integrity(self) -> None:
        """free + held = total, and the cache's two tables mirror each other."""
        assert all((block in self._free) == (count == 0) for block, count in enumerate(self._num_holders))
        assert all(self._hash_of[block] == block_hash for block_hash, block in self._block_of.items())
        assert len(self._hash_of) == len(self._block_of)
