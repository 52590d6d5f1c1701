"""The C++ operators are built once for each state of their sources, found again, and never needed."""

import logging
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from adapterd.errors import BaseRefused
from adapterd.model import native
from adapterd.model.kernels import NATIVE_KERNELS, TORCH_KERNELS, choose_kernels
from adapterd.model.native.__main__ import main
from tests.native_kernels import require_native_kernels

CPU = torch.device("cpu")


def run_in_new_process(code: str, **environment: str) -> str:
    """Operators stay loaded for the life of a process, so what comes before loading needs one of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    return done.stdout


def test_a_second_build_finds_the_first() -> None:
    require_native_kernels()
    before = native.library_path().stat().st_mtime_ns
    assert native.build() == native.library_path()
    assert native.library_path().stat().st_mtime_ns == before


def test_cache_directory_is_the_one_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.library_path().parent == tmp_path / "adapterd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert native.library_path().parent == tmp_path / ".cache" / "adapterd"


def test_without_a_compiler_building_fails_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(native.BuildFailed, match="install one"):
        native.build()
    assert not native.library_path().exists()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'no such instruction set' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(native.BuildFailed, match="no such instruction set"):
        native.build()
    assert list((tmp_path / "adapterd").iterdir()) == []


_LOAD = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
from adapterd.model import native
print(native.load(), native.is_loaded(), native.library_path().exists())
"""


def test_loading_never_compiles_and_says_how_to_build(tmp_path: Path) -> None:
    said = run_in_new_process(_LOAD, XDG_CACHE_HOME=str(tmp_path), PATH="/usr/bin:/bin")
    assert "INFO running without the C++ operators; `python -m adapterd.model.native` builds them" in said
    assert "False False False" in said


def test_a_library_that_is_damaged_is_left_alone_with_a_warning(tmp_path: Path) -> None:
    damage = (
        "from adapterd.model import native; path = native.library_path(); path.parent.mkdir(); path.touch()"
    )
    said = run_in_new_process(damage + _LOAD, XDG_CACHE_HOME=str(tmp_path))
    assert "WARNING the C++ operators cannot be loaded and are not used" in said
    assert "False False True" in said


def test_kernels_are_chosen_by_device_and_dtype() -> None:
    require_native_kernels()
    assert choose_kernels("auto", CPU, torch.float32) is NATIVE_KERNELS
    assert choose_kernels("auto", CPU, torch.bfloat16) is NATIVE_KERNELS
    assert choose_kernels("auto", CPU, torch.float16) is TORCH_KERNELS
    on_cuda = choose_kernels("auto", torch.device("cuda"), torch.bfloat16)
    assert (on_cuda is TORCH_KERNELS) == (find_spec("triton") is None)
    assert not on_cuda.is_native
    assert choose_kernels("auto", torch.device("cuda"), torch.float64) is TORCH_KERNELS
    assert choose_kernels("torch", CPU, torch.float32) is TORCH_KERNELS
    with pytest.raises(BaseRefused, match=r"torch\.float16 on cpu"):
        choose_kernels("native", CPU, torch.float16)


def test_float16_on_a_cpu_runs_without_them_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_kernels("auto", CPU, torch.float16) is TORCH_KERNELS
    (line,) = caplog.messages
    assert "do not run float16" in line
    assert "--dtype bfloat16" in line
    caplog.clear()
    choose_kernels("torch", CPU, torch.float16)  # as asked for
    assert not caplog.messages


def test_what_is_not_built_can_be_demanded_but_not_had(tmp_path: Path) -> None:
    code = """
import torch
from adapterd.errors import BaseRefused
from adapterd.model.kernels import TORCH_KERNELS, choose_kernels
cpu = torch.device("cpu")
assert choose_kernels("auto", cpu, torch.float32) is TORCH_KERNELS
try:
    choose_kernels("native", cpu, torch.float32)
except BaseRefused as error:
    print(error)
"""
    assert "python -m adapterd.model.native" in run_in_new_process(code, XDG_CACHE_HOME=str(tmp_path))


def test_loading_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    require_native_kernels()
    with caplog.at_level(logging.INFO, logger="adapterd"):
        assert native.load()
    assert caplog.records == []


LATEST, OLDER, OLD = (" ".join(sorted(level.features | {"sse2"})) for level in native.LEVELS)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (LATEST, ["x86-64-v4-bf16", "x86-64-v4", "x86-64-v3"]),
        (OLDER, ["x86-64-v4", "x86-64-v3"]),
        (OLD, ["x86-64-v3"]),
        ("sse2 avx", []),
    ],
)
def test_a_processor_may_use_the_levels_it_belongs_to_the_fastest_first(flags: str, names: list[str]) -> None:
    cpuinfo = f"processor\t: 0\nmodel name\t: any\nflags\t\t: {flags}\n"
    assert [level.name for level in native.usable_levels(cpuinfo)] == names


def test_a_processor_that_lists_no_features_uses_none() -> None:
    assert native.usable_levels("processor : 0\nFeatures : fp asimd\n") == []
    assert native.usable_levels("") == []


def test_portable_libraries_differ_by_level() -> None:
    paths = {native.portable_path(Path("/share"), level) for level in native.LEVELS}
    assert len(paths) == len(native.LEVELS)
    assert {path.parent for path in paths} == {Path("/share/adapterd")}


def test_a_portable_library_is_loaded_where_none_was_built_for_the_processor(tmp_path: Path) -> None:
    require_native_kernels()
    cpuinfo = Path("/proc/cpuinfo").read_text()
    if not native.usable_levels(cpuinfo):
        pytest.skip("this processor belongs to none of the levels")
    share = tmp_path / "share"
    # Not compiled for the level here, which takes half a minute: the library of this very processor in its place.
    place = native.portable_path(share, native.usable_levels(cpuinfo)[0])
    place.parent.mkdir(parents=True)
    shutil.copy(native.library_path(), place)
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "XDG_DATA_DIRS": f"/usr/share:{share}"}
    said = run_in_new_process(_LOAD, **environment)
    assert f"INFO C++ operators loaded from {place}" in said
    assert "True True False" in said


def test_the_builder_says_how_it_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--portabel"]) == 2
    assert "--portable DIR" in capsys.readouterr().err
