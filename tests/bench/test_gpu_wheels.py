"""The wheels that travel to a machine without a network: all that the server needs, pinned, for another Python."""

import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bench import gpu_wheels

_PYPROJECT = tomllib.loads((gpu_wheels.CONSTRAINTS.parent / "pyproject.toml").read_text())
_KNOWN = {canonicalize_name(name) for name in (*gpu_wheels.PACKAGES, *gpu_wheels.PRESENT)}


def _unknown(lines: list[str]) -> set[str]:
    """Names of what is required on Python 3.12 and neither travels nor is there."""
    wanted = [Requirement(line) for line in lines]
    on_3_12 = {"python_version": "3.12", "python_full_version": "3.12.3", "extra": ""}
    return {
        canonicalize_name(one.name) for one in wanted if one.marker is None or one.marker.evaluate(on_3_12)
    } - _KNOWN


def test_everything_that_the_package_needs_travels_or_is_there() -> None:
    assert not _unknown(_PYPROJECT["project"]["dependencies"])


@pytest.mark.parametrize("package", gpu_wheels.PACKAGES)
def test_what_travels_needs_nothing_else(package: str) -> None:
    assert not _unknown(requires(package) or [])


def test_versions_are_those_of_the_constraints() -> None:
    pins = gpu_wheels.pins_of(["pydantic-core", "H11"], "# why\nh11==0.16.0\npydantic_core==2.50.4\n")
    assert pins == ["pydantic_core==2.50.4", "h11==0.16.0"]
    assert gpu_wheels.pins_of(gpu_wheels.PACKAGES, gpu_wheels.CONSTRAINTS.read_text())


def test_a_package_without_a_pin_is_refused_before_anything_is_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_wheels.main(["--out", str(tmp_path / "wheels"), "--packages", "h11,no-such"]) == 1
    assert "pins no no-such" in capsys.readouterr().err
    assert not (tmp_path / "wheels").exists()


def test_torch_is_not_among_what_travels() -> None:
    assert not {"torch", "triton", "numpy"} & set(gpu_wheels.PACKAGES)
    assert "--no-deps" in gpu_wheels.download_command(Path("requirements.txt"), Path("wheels"), "3.12")
