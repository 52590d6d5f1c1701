"""Pages fit usual ranks closely, an adapter pays for no more of them than it needs, and they may lie anywhere."""

import pytest
import torch
from torch import nn

from adapterd.deltas import ReplacedRows
from adapterd.model.edits import Call, num_edit_pages, upload_edits
from adapterd.model.pages import PageGeometry, PageWriter

LLAMA_8B = {
    f"layers.{layer}.{name}": shape
    for layer in range(32)
    for name, shape in {
        "q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096),
        "gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336),
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("rank", [8, 16, 32, 64])
def test_usual_ranks_waste_little_of_their_pages(rank: int) -> None:
    """At the widths of an 8-billion Llama, all seven linears; at the least 70 % of the pages' bytes are matrices."""
    geometry = PageGeometry.choose(LLAMA_8B)
    pages = geometry.num_pages((module, rank) for module in LLAMA_8B)
    used = sum(rank * (d_in + d_out) for d_out, d_in in LLAMA_8B.values())
    assert used / (pages * geometry.page_elements) >= 0.7


def test_adapter_pays_for_its_rank_and_its_targets_alone() -> None:
    geometry = PageGeometry.choose(LLAMA_8B)

    def pages(rank: int, *names: str) -> int:
        return geometry.num_pages((m, rank) for m in LLAMA_8B if m.rpartition(".")[2] in names)

    everything = ("q", "k", "v", "o", "gate", "up", "down")
    assert pages(64, *everything) == pytest.approx(8 * pages(8, *everything), rel=0.15)
    assert pages(8, *everything) == pages(8, "q", "v") + pages(8, "k", "o", "gate", "up", "down")
    assert pages(8, "q", "v") < 0.25 * pages(8, *everything)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_trained_tokens_lie_in_pages_that_do_not_adjoin(dtype: torch.dtype) -> None:
    """Regression: their ids, where they take several pages, could be uploaded into neighbours alone."""
    page, num_tokens, d = 64, 50, 8
    token_ids = tuple(range(9, 49))
    generator = torch.Generator().manual_seed(0)
    trained = torch.randn(len(token_ids), d, generator=generator).to(dtype)
    edit = ReplacedRows("embedding", "trainable_token_indices", token_ids, trained)
    num_pages = num_edit_pages([edit], page, dtype.itemsize)
    assert num_pages > 1 + -(-trained.numel() // page)  # the ids' alone are several
    pages = range(2 * num_pages - 1, 0, -2)
    writer = PageWriter(torch.full((2 * num_pages * page,), 7.0, dtype=dtype), page, pages)
    (rows,) = upload_edits([edit], writer)["embedding"]
    embedding, head = nn.Embedding(num_tokens, d, dtype=dtype), nn.Linear(d, num_tokens, dtype=dtype)
    ids = torch.arange(num_tokens)
    with torch.no_grad():
        embedded = embedding(ids)
        rows.apply(Call(embedding, (ids,), embedded, 0, slice(0, num_tokens)))
        expected = embedding.weight.clone()
        expected[list(token_ids)] = trained
        assert torch.equal(embedded, expected)
        states = torch.randn(3, d, generator=generator).to(dtype)
        logits = head(states)
        expected = logits.clone()
        expected[:, list(token_ids)] = states @ trained.T
        rows.apply(Call(head, (states,), logits, 0, slice(0, 3)))
        torch.testing.assert_close(logits, expected)
