"""Memory for keys, values and adapters is what the settings say, or a share of what is free."""

from pathlib import Path

from adapterd.model.base import load_base
from adapterd.model.device_memory import free_bytes, size_adapter_memory, size_kv_pool
from adapterd.model.kv import KV_BLOCK_SIZE, kv_block_bytes
from tests.exactness.families import save_model


def test_memory_is_what_was_asked_for_or_a_share_of_what_is_free(tmp_path: Path) -> None:
    save_model("gemma2", tmp_path)
    base = load_base(str(tmp_path))
    block_bytes = kv_block_bytes(base.kv_shapes, base.dtype)
    assert size_kv_pool(base, 10 * block_bytes + block_bytes // 2, 16) == 10
    assert size_kv_pool(base, 1, 16) == 1
    wanted = 16 * base.spec.max_model_len // KV_BLOCK_SIZE
    assert size_kv_pool(base, None, 16) == min(wanted, int(free_bytes(base.device) * 0.25) // block_bytes)
    assert size_adapter_memory(base, 12345) == 12345
    assert 0 < size_adapter_memory(base, None) <= 2**30
