"""The package that a quantised base is loaded through is refused by name if it is too old."""

import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from adapterd.model.checkpoint import MIN_BITSANDBYTES

ROOT = Path(__file__).parents[2]

# In a process of its own: transformers looks for a package once. No device is touched before the refusal.
LOAD = """
import sys
from pathlib import Path
import torch
from adapterd.errors import BaseRefused
from adapterd.model.checkpoint import load_weights
try:
    load_weights(Path(sys.argv[1]), "tiny", "auto", torch.device("cuda"), "bnb-8bit")
except BaseRefused as error:
    print(error)
"""


def test_the_extra_asks_for_what_loading_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extra,) = project["optional-dependencies"]["bnb"]
    assert [(one.operator, one.version) for one in Requirement(extra).specifier] == [(">=", MIN_BITSANDBYTES)]


def test_bitsandbytes_that_cannot_move_8_bits_is_refused(tmp_path: Path) -> None:
    """As installed, but empty: only its version is read."""
    (tmp_path / "model.safetensors").touch()
    package, about = tmp_path / "bitsandbytes", tmp_path / "bitsandbytes-0.47.0.dist-info"
    package.mkdir()
    (package / "__init__.py").touch()
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.47.0\n")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]{LOAD}",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert "needs the package bitsandbytes 0.48 or later: pip install 'adapterd[bnb]'" in done.stdout
