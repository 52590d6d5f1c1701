"""The C++ operators share their work among threads that any caller may find busy, asleep or not there."""

import os
import threading

import pytest
import torch

from adapterd.model.linear_cpu import native_linear
from tests.native_kernels import require_native_kernels

WEIGHT = torch.randn(700, 1200, generator=torch.Generator().manual_seed(0))
X = torch.randn(5, 1200, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _native() -> None:
    require_native_kernels()


def multiply_often(results: list[torch.Tensor], times: int) -> None:
    results.extend(native_linear(X, WEIGHT, None) for _ in range(times))


def test_callers_at_the_same_time_get_their_own_answers() -> None:
    expected = native_linear(X, WEIGHT, None)
    results: list[torch.Tensor] = []
    callers = [threading.Thread(target=multiply_often, args=(results, 200)) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 800
    assert all(torch.equal(found, expected) for found in results)


def test_the_number_of_threads_changes_no_result() -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5, 3):
            torch.set_num_threads(count)
            found.append(native_linear(X, WEIGHT, None))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    expected = native_linear(X, WEIGHT, None)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(native_linear(X, WEIGHT, None), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
