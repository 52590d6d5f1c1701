"""The operators in C++ (torch.ops.adapterd): where they are kept, how they are built, and loading them.

`python -m adapterd.model.native` compiles the sources of this folder with the system's C++ compiler, once for each
state of the sources, torch and the processor. Nothing needs them: without a compiler the same work is done by
torch's own operators. A server only loads what was built before; it never compiles.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

BUILD_COMMAND = "python -m adapterd.model.native"
_SOURCES = Path(__file__).parent
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
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


class BuildFailed(Exception):
    """The operators could not be compiled; the message holds the compiler's own words."""


def library_path() -> Path:
    """Where the library for these sources, this torch and this processor is, or would be."""
    digest = hashlib.sha256()
    for source in sorted([*_SOURCES.glob("*.h"), *_SOURCES.glob("*.cpp")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update("\0".join([*_flags(), torch.__version__, _processor()]).encode())
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "adapterd" / f"native-{digest.hexdigest()[:16]}.so"


def find_compiler() -> str | None:
    """Path of the C++ compiler: what CXX names, else the system's."""
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["c++", "g++", "clang++"]:
        found = shutil.which(candidate)
        if found:
            return found
    return None


def build() -> Path:
    """Compile the library unless it is there; returns its path. Raises BuildFailed."""
    target = library_path()
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
        _run([compiler, *_flags(), *include, "-c", str(_SOURCES / "ops.cpp"), "-o", str(objects)])
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
    path = library_path()
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
    x86 = platform.machine() in ("x86_64", "AMD64")
    return (*(flag for flag in _FLAGS if x86 or not flag.startswith("-mprefer")), abi)


def _processor() -> str:
    """What -march=native depends on: a cache directory may be shared by unlike machines."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.platform()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in cpuinfo.read_text().splitlines() if line.startswith(wanted)}))
