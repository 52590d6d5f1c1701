"""Pages fit usual ranks closely, and an adapter pays for no more of them than it needs."""

import pytest

from adapterd.model.pages import PageGeometry

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
