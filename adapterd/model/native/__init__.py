"""The operators in C++ (torch.ops.adapterd): where they are kept, how they are built, and loading them.

`python -m adapterd.model.native` compiles the sources of this folder with the system's C++ compiler, once for each
state of the sources, torch and the processor. Nothing needs them: without a compiler the same work is done by
torch's own operators. A server only loads what was built before; it never compiles.

With `--portable DIR` it compiles one library for each of LEVELS instead, below DIR: for images, which are built on one
machine and run on another that has no compiler. They are found in the directories of XDG_DATA_DIRS; the library that
was built for the very processor wins.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_X86 = ("x86_64", "AMD64")
BUILD_COMMAND = "python -m adapterd.model.native"
_SOURCES = Path(__file__).parent
_FLAGS = (
    "-std=c++20",
    "-O3",
    # Where 512-bit vectors exist, compilers still prefer 256 bits unless told.
    "-mprefer-vector-width=512",
    # Fused multiply-add, but no reordering: with -ffast-math the tiles' sums are regrouped and spill (half the speed).
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-pthread",
    "-fPIC",
    "-Wall",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
)


@dataclass(frozen=True)
class Level:
    """A kind of processor: what the compiler is told, and what /proc/cpuinfo says of each that belongs to it."""

    name: str
    flags: tuple[str, ...]
    features: frozenset[str]


_V3 = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"])
_V4 = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
LEVELS = (
    Level("x86-64-v4-bf16", ("-march=x86-64-v4", "-mavx512bf16"), _V4 | {"avx512_bf16"}),
    Level("x86-64-v4", ("-march=x86-64-v4",), _V4),
    Level("x86-64-v3", ("-march=x86-64-v3",), _V3),
)
"""The fastest first: those that the sources tell apart."""


class BuildFailed(Exception):
    """The operators could not be compiled; the message holds the compiler's own words."""


def library_path() -> Path:
    """Where the library for these sources, this torch and this processor is, or would be."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "adapterd" / f"native-{_digest(_processor())}.so"


def portable_path(directory: Path, level: Level) -> Path:
    """Where below `directory` the library for these sources, this torch and a level is, or would be."""
    return directory / "adapterd" / f"native-{_digest(*level.flags)}-{level.name}.so"


def usable_levels(cpuinfo: str) -> list[Level]:
    """Those that a processor belongs to, by the text of its /proc/cpuinfo; the fastest first."""
    lines = [line.partition(":")[2].split() for line in cpuinfo.splitlines() if line.startswith("flags")]
    features = frozenset(lines[0]) if lines else frozenset()
    return [level for level in LEVELS if level.features <= features]


def built_path() -> Path:
    """The library to load: this processor's own, else the best portable one, else where its own would be."""
    own = library_path()
    if own.exists():
        return own
    directories = [Path(name) for name in os.environ.get("XDG_DATA_DIRS", "").split(os.pathsep) if name]
    levels = usable_levels(_cpuinfo())
    found = (portable_path(directory, level) for level in levels for directory in directories)
    return next((path for path in found if path.exists()), own)


def _digest(*target: str) -> str:
    digest = hashlib.sha256()
    for source in sorted([*_SOURCES.glob("*.h"), *_SOURCES.glob("*.cpp")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update("\0".join([*_flags(), torch.__version__, *target]).encode())
    return digest.hexdigest()[:16]


def find_compiler() -> str | None:
    """Path of the C++ compiler: what CXX names, else the system's."""
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["c++", "g++", "clang++"]:
        found = shutil.which(candidate)
        if found:
            return found
    return None


def build() -> Path:
    """Compile the library for this processor unless it is there; returns its path. Raises BuildFailed."""
    return _build(library_path(), ("-march=native",))


def build_portable(directory: Path) -> list[Path]:
    """Compile a library for each level, whatever this machine is; returns their paths. Raises BuildFailed."""
    if platform.machine() not in _X86:
        raise BuildFailed(
            f"there are levels of x86-64 processors only, and this machine is {platform.machine()}"
        )
    return [_build(portable_path(directory, level), level.flags) for level in LEVELS]


def _build(target: Path, architecture: tuple[str, ...]) -> Path:
    if target.exists():
        return target
    compiler = find_compiler()
    if compiler is None:
        raise BuildFailed("no C++ compiler found; install one (Debian: apt install g++) or name it with CXX")
    torch_root = Path(torch.__file__).parent
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        # Built beside its place and moved there in one step: no one ever loads half a library.
        unfinished, objects = Path(scratch) / target.name, Path(scratch) / "ops.o"
        headers = [torch_root / "include", torch_root / "include" / "torch" / "csrc" / "api" / "include"]
        include = [argument for header in headers for argument in ("-isystem", str(header))]
        _run(
            [
                compiler,
                *_flags(),
                *architecture,
                *include,
                "-c",
                str(_SOURCES / "ops.cpp"),
                "-o",
                str(objects),
            ]
        )
        libraries = [f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        _run([compiler, "-shared", str(objects), *libraries, "-o", str(unfinished)])
        unfinished.rename(target)
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildFailed(f"{' '.join(command)}\n{done.stderr}")


def load() -> bool:
    """Make torch.ops.adapterd available if its library was built; says once why not."""
    if is_loaded():
        return True
    path = built_path()
    if not path.exists():
        logger.info(
            "running without the C++ operators; `%s` builds them if there is a compiler", BUILD_COMMAND
        )
        return False
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        logger.warning("the C++ operators cannot be loaded and are not used: %s", error)
        return False
    logger.info("C++ operators loaded from %s", path)
    return True


def is_loaded() -> bool:
    return hasattr(torch.ops.adapterd, "rms_norm")


def _flags() -> tuple[str, ...]:
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    x86 = platform.machine() in _X86
    return (*(flag for flag in _FLAGS if x86 or not flag.startswith("-mprefer")), abi)


def _processor() -> str:
    """What -march=native depends on: a cache directory may be shared by unlike machines."""
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = sorted({line for line in _cpuinfo().splitlines() if line.startswith(wanted)})
    return "\n".join(lines) or platform.platform()


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""
