"""The engine that most tests turn."""

from collections.abc import Iterator

import pytest

from adapterd.engine.engine import Engine
from tests.engine.fake_runner import FakeRunner, make_engine


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def engine(runner: FakeRunner) -> Iterator[Engine]:
    engine = make_engine(runner)
    yield engine
    if runner.gate is not None:
        runner.gate.set()
    engine.stop()
