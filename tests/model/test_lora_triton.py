"""Triton's adapter products equal the reference for any mix of segments, ranks and extents, step after step."""

import random
from collections.abc import Iterable

import pytest
import torch

from adapterd.model.lora import LoraBank, LoraProduct, LoraStep, Products, Segment
from adapterd.model.pages import PageGeometry
from tests.model.test_lora_cpu import LINEARS, in_double, make_products
from tests.triton_kernels import DEVICE, IS_INTERPRETED

from adapterd.model.lora_triton import TritonLoraStep  # isort: skip  (needs the interpreter's setting)

GROUPS = (("q",), ("q", "odd_k"), ("q", "odd_k", "v"))
GROUP_LINEARS = {"q": (64, 48), "odd_k": (19, 48), "v": (150, 48)}  # one input, three outputs


def on_device(products: Products) -> Products:
    return {
        path: tuple(LoraProduct(p.a.to(DEVICE), p.b_t.to(DEVICE), p.scale) for p in parts)
        for path, parts in products.items()
    }


def random_products(paths: Iterable[str], ranks: list[int], dtype: torch.dtype, seed: int) -> Products:
    return on_device(make_products(list(paths), ranks, dtype, seed))


def group_products(paths: Iterable[str], ranks: list[int], dtype: torch.dtype, seed: int) -> Products:
    generator = torch.Generator().manual_seed(seed)

    def extent(path: str, rank: int) -> LoraProduct:
        d_out, d_in = GROUP_LINEARS[path]
        a = torch.randn(rank, d_in, generator=generator) * d_in**-0.5
        b_t = torch.randn(rank, d_out, generator=generator)
        return LoraProduct(a.to(dtype), b_t.to(dtype), 0.25 + seed % 3)

    return on_device({path: tuple(extent(path, rank) for rank in ranks) for path in paths})


def fixed_tables(step: TritonLoraStep) -> tuple[torch.Tensor, ...]:
    """What a captured kernel has the addresses of."""
    tables = step._tables
    return step._tiles, tables.bounds, tables.addresses, tables.scales


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Sums in float32, one rounding of the result. The interpreter cuts off where a GPU rounds to bfloat16."""
    bfloat16 = 2.0**-7 if IS_INTERPRETED else 2.0**-8
    rounding = {torch.float32: 1e-6, torch.bfloat16: bfloat16, torch.float16: 2.0**-11}[dtype]
    return {"rtol": rounding, "atol": 3e-5 if dtype == torch.float32 else 2e-4}


def check(
    step: TritonLoraStep,
    segments: tuple[Segment, ...],
    num_tokens: int,
    dtype: torch.dtype,
    paths: Iterable[str] = tuple(LINEARS),
    is_fixed: bool = False,
) -> None:
    """Every linear against LoraStep in float64. What no segment covers is untouched, bit for bit."""
    reference = LoraStep()
    if is_fixed:
        step.begin_fixed(segments, num_tokens)
    else:
        step.begin(segments, num_tokens)
    reference.begin(in_double(segments), num_tokens)
    untouched = torch.ones(num_tokens, dtype=torch.bool)
    for segment in segments:
        untouched[segment.start : segment.end] = False
    for path in paths:
        d_out, d_in = LINEARS[path]
        x = torch.randn(num_tokens, d_in).to(DEVICE, dtype)
        y = torch.randn(num_tokens, d_out).to(DEVICE, dtype)
        found, expected = y.clone(), y.double()
        step.add(path, found, x)
        reference.add(path, expected, x.double())
        torch.testing.assert_close(found.double(), expected, **tolerance(dtype))
        assert torch.equal(found[untouched], y[untouched])


@pytest.mark.parametrize(
    ("rank", "dtype"),
    [
        *((rank, torch.float32) for rank in (1, 16, 17, 64)),
        *((17, dtype) for dtype in (torch.bfloat16, torch.float16)),
    ],
    ids=str,
)
def test_every_rank_at_few_and_many_tokens(rank: int, dtype: torch.dtype) -> None:
    products = random_products(LINEARS, [rank], dtype, seed=rank)
    step = TritonLoraStep(DEVICE)
    for num_tokens in (1, 18, 70):
        check(step, (Segment(0, num_tokens, products),), num_tokens, dtype)


@pytest.mark.parametrize("is_fixed", [False, True], ids=["launched", "fixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_segments_step_after_step(dtype: torch.dtype, is_fixed: bool) -> None:
    """Adapters of other targets, ranks and extents come and go between steps, with tokens of the base between."""
    generator = random.Random(5)
    mixes = [
        random_products(
            generator.sample(list(LINEARS), generator.randint(1, 3)),
            [generator.choice([1, 2, 8, 16, 17]) for _ in range(generator.randint(1, 3))],
            dtype,
            seed,
        )
        for seed in range(7)
    ]
    step = TritonLoraStep(DEVICE)
    for _ in range(5):
        row, segments = 0, []
        for products in generator.sample(mixes, generator.randint(1, 6)):
            row += generator.choice([0, 0, 1, 3])
            # One mix may run in two segments of a step, and a segment may be empty.
            length = generator.choice([0, 1, 1, 2, 20])
            segments.append(Segment(row, row + length, products))
            row += length
        check(step, tuple(segments), row + 2, dtype, is_fixed=is_fixed)


@pytest.mark.parametrize("paths", GROUPS, ids=len)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_group_of_linears_is_as_each_alone(paths: tuple[str, ...], dtype: torch.dtype) -> None:
    """Outputs side by side in one tensor; an adapter may have any of the group's linears."""
    segments = (
        Segment(0, 2, group_products(["v"], [3], dtype, 1)),
        Segment(3, 8, group_products(["q", "odd_k"], [16, 9], dtype, 2)),
        Segment(8, 9, group_products(GROUP_LINEARS, [32], dtype, 3)),
    )
    sizes = [GROUP_LINEARS[path][0] for path in paths]
    x, y = torch.randn(10, 48).to(DEVICE, dtype), torch.randn(10, sum(sizes)).to(DEVICE, dtype)
    found, expected = y.clone(), y.double()
    step, reference = TritonLoraStep(DEVICE), LoraStep()
    step.begin(segments, 10)
    group = step.group(paths, sizes, x)
    assert group is not None
    group.shrink()
    group.expand(found)
    reference.begin(in_double(segments), 10)
    for path, part in zip(paths, expected.split(sizes, dim=1), strict=True):
        reference.add(path, part, x.double())
    torch.testing.assert_close(found.double(), expected, **tolerance(dtype))


def test_fixed_steps_of_other_adapters_change_tables_and_nothing_that_a_launch_fixes() -> None:
    """What a CUDA graph records: the same tensors, grids and numbers, whoever's turn it is."""
    step = TritonLoraStep(DEVICE)
    step.begin_fixed((), 4)
    check(step, (), 4, torch.float32, is_fixed=True)  # nobody's turn: kernels run and change nothing
    recorded = fixed_tables(step)
    generation, places = step.generation, [table.data_ptr() for table in recorded]
    generator = random.Random(0)
    for seed in range(12):
        ranks = [generator.choice([2, 16, 64])]
        products = [random_products(LINEARS, ranks, torch.float32, 2 * seed + i) for i in range(2)]
        segments = Segment(0, 1, products[0]), Segment(2, 4, products[1])
        check(step, segments, 4, torch.float32, ["q"], is_fixed=True)
        assert [table.data_ptr() for table in fixed_tables(step)] == places
        assert (step._num_tiles, step._block_tokens, step.generation) == (4, 16, generation)


def test_tables_that_must_grow_say_so_and_stay_right() -> None:
    step = TritonLoraStep(DEVICE)
    wide = random_products(["q"], [64, 30], torch.float32, 0)
    check(step, (Segment(0, 2, wide),), 2, torch.float32, ["q"])
    assert step.generation == 0  # a step that is launched takes the width that it needs
    check(step, (Segment(0, 2, wide),), 2, torch.float32, ["q"], is_fixed=True)
    assert step.generation == 1  # more rank rows in one linear than any mix had
    many = [Segment(i, i + 1, random_products(["q"], [1 + i % 3], torch.float32, i)) for i in range(70)]
    check(step, tuple(many), 70, torch.float32, ["q"])
    assert step.generation == 2  # more mixes at once than there was room for
    deep = {f"layer{i}": random_products(["q"], [4], torch.float32, i)["q"] for i in range(300)}
    segments = (Segment(0, 2, deep), many[3])
    step.begin(segments, 4)
    y, x = torch.zeros(4, 64, device=DEVICE), torch.randn(4, 48, device=DEVICE)
    step.add("layer299", y, x)
    expected = torch.zeros(4, 64, dtype=torch.double, device=DEVICE)
    reference = LoraStep()
    reference.begin(in_double(segments), 4)
    reference.add("layer299", expected, x.double())
    torch.testing.assert_close(y.double(), expected, atol=3e-5, rtol=1e-6)
    assert step.generation == 3  # more linears than there was room for


SIZES = {f"layers.{layer}.{name}": (5, 6) for layer in range(32) for name in "qkvogud"}
"""path -> (d_out, d_in): as many linears as Llama-3-8B has."""


def bank_of(num_adapters: int) -> LoraBank:
    """Room for so many adapters of rank 16 on every linear."""
    geometry = PageGeometry.choose(SIZES)
    num_pages = num_adapters * geometry.num_pages((path, 16) for path in SIZES)
    return LoraBank(SIZES, 4 * geometry.page_elements * num_pages, torch.float32, DEVICE)


def deep_products(rank: int, seed: int, paths: Iterable[str] = SIZES) -> Products:
    a = torch.randn(len(SIZES), rank, 6, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    b_t = torch.randn(len(SIZES), rank, 5, generator=torch.Generator().manual_seed(-seed)).to(DEVICE)
    chosen = set(paths)
    return {
        path: (LoraProduct(a[i], b_t[i], 0.5 + seed % 3),) for i, path in enumerate(SIZES) if path in chosen
    }


def check_fixed(step: TritonLoraStep, mixes: list[Products], path: str) -> None:
    """A captured step of one token a mix, on one linear, against the reference."""
    segments = tuple(Segment(row, row + 1, products) for row, products in enumerate(mixes))
    reference = LoraStep()
    step.begin_fixed(segments, len(mixes))
    reference.begin(segments, len(mixes))
    x, y = torch.randn(len(mixes), 6, device=DEVICE), torch.randn(len(mixes), 5, device=DEVICE)
    found = y.clone()
    step.add(path, found, x)
    reference.add(path, y, x)
    torch.testing.assert_close(found, y, atol=3e-5, rtol=1e-5)


def test_newcomers_beyond_the_tables_leave_captured_kernels_as_they_are() -> None:
    """32 distinct adapters of rank 16 on 224 linears in every step, and one after another is replaced."""
    step = TritonLoraStep(DEVICE)
    step.reserve(bank_of(32), max_num_seqs=32, max_rank=0)
    step.begin_fixed((), 32)
    places = [table.data_ptr() for table in fixed_tables(step)]
    room = len(step._tables.addresses) // (16 * len(SIZES))
    assert room < 32 + 14
    running = [deep_products(16, seed) for seed in range(1, 33)]
    paths = random.Random(0).sample(list(SIZES), 15)
    check_fixed(step, running, paths[0])
    for turn in range(14):
        running = [*running[1:], deep_products(16, 100 + turn)]
        check_fixed(step, running, paths[turn])
    assert step.generation == 0
    assert [table.data_ptr() for table in fixed_tables(step)] == places
    assert len(step._tables._mixes) <= room


def test_reserved_tables_take_what_the_bank_holds_whatever_its_ranks_and_targets() -> None:
    """Gaps that others left lie apart: mixes are moved together, and read right where they lie then."""
    step = TritonLoraStep(DEVICE)
    step.reserve(bank_of(1), max_num_seqs=8, max_rank=0)
    capacity = len(step._tables.addresses)
    generator = random.Random(3)
    num_rows, seed = 0, 1
    running: list[Products] = []
    moved = 0
    for turn in range(60):
        while True:
            rank = generator.choice([16, 64, 130])
            paths = generator.sample(list(SIZES), generator.randint(150, 224))
            if num_rows + rank * len(paths) > capacity or len(running) == 8:
                break
            running.append(deep_products(rank, seed, paths))
            num_rows, seed = num_rows + rank * len(paths), seed + 1
        before = [mix.first for mix in step._tables._mixes.values()]
        path = generator.choice(list(SIZES))
        if turn % 4 == 0:
            check_fixed(step, running, path)
        else:
            step.begin_fixed(tuple(Segment(i, i + 1, p) for i, p in enumerate(running)), len(running))
        moved += before != [mix.first for mix in step._tables._mixes.values()][: len(before)]
        gone = running.pop(generator.randrange(len(running)))
        num_rows -= sum(part.a.shape[0] for parts in gone.values() for part in parts)
    assert moved
    assert step.generation == 0


def test_the_mix_that_was_longest_unused_makes_room() -> None:
    step = TritonLoraStep(DEVICE)
    mixes = [random_products(["q"], [2], torch.float32, seed) for seed in range(70)]
    for products in mixes[:64]:
        check(step, (Segment(0, 1, products),), 1, torch.float32, [])
    check(step, (Segment(0, 1, mixes[0]),), 1, torch.float32, ["q"])
    for products in mixes[64:]:
        check(step, (Segment(0, 1, products),), 1, torch.float32, ["q"])
    kept = [mixes[0], *mixes[7:]]
    assert set(step._tables._mixes) == {id(products) for products in kept}
    assert step.generation == 0


def test_linear_that_no_adapter_of_the_step_has_runs_no_kernel() -> None:
    step = TritonLoraStep(DEVICE)
    step.begin((Segment(0, 2, random_products(["odd"], [4], torch.float32, 0)),), 2)
    y = torch.zeros(2, 64, device=DEVICE)
    step.add("q", y, torch.full((2, 48), float("nan"), device=DEVICE))
    assert not y.any()


def test_an_adapter_that_returns_elsewhere_in_memory_is_found_there() -> None:
    """Products made anew, even if Python gives them the place of old ones, never meet the old addresses."""
    step = TritonLoraStep(DEVICE)
    for seed in range(20):
        products = random_products(["q"], [3, 2], torch.float32, seed)
        check(step, (Segment(0, 3, products),), 3, torch.float32, ["q"])
        check(step, (), 3, torch.float32, ["q"])


def test_types_of_x_and_y_must_agree() -> None:
    step = TritonLoraStep(DEVICE)
    step.begin((Segment(0, 3, random_products(["q"], [4], torch.float32, 0)),), 3)
    with pytest.raises(RuntimeError, match="added in one type"):
        step.add("q", torch.zeros(3, 64, dtype=torch.bfloat16), torch.ones(3, 48))
