import random

import torch

from adapterd.model.kv import KV_BLOCK_SIZE, KVPool, KVShape, kv_block_bytes

SHAPES = {0: KVShape(2, 8, 4), 3: KVShape(1, 16, 16)}


def test_block_bytes_are_the_bytes_of_the_pool() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        pool = KVPool(SHAPES, 5, dtype, torch.device("cpu"))
        tensors = [*pool.keys.values(), *pool.values.values()]
        assert sum(tensor.nbytes for tensor in tensors) == 5 * kv_block_bytes(SHAPES, dtype)
        assert {tensor.shape[0] for tensor in tensors} == {5 * KV_BLOCK_SIZE}


def test_written_slots_hold_what_was_written_and_no_other_slot_changes() -> None:
    pool = KVPool(SHAPES, 4, torch.float32, torch.device("cpu"))
    mirror = {layer: (pool.keys[layer].clone(), pool.values[layer].clone()) for layer in SHAPES}
    generator = random.Random(0)
    for _ in range(40):
        layer = generator.choice(list(SHAPES))
        slots = generator.sample(range(4 * KV_BLOCK_SIZE), generator.randint(1, 9))
        shape = SHAPES[layer]
        key = torch.randn(len(slots), shape.num_heads, shape.key_dim)
        value = torch.randn(len(slots), shape.num_heads, shape.value_dim)
        pool.write(layer, torch.tensor(slots), key, value)
        for row, slot in enumerate(slots):
            mirror[layer][0][slot], mirror[layer][1][slot] = key[row], value[row]
        for other, (keys, values) in mirror.items():
            assert torch.equal(pool.keys[other], keys)
            assert torch.equal(pool.values[other], values)
