"""Wheels of what `adapterd serve` needs beside torch and transformers, for a machine with a device and no network.

A machine for models often has torch, transformers and PEFT and none of a server's packages, so that `bench.gpu_all`
skips its part over HTTP. Fetched here, at the versions of constraints.txt, for the Python that is there:

    python -m bench.gpu_wheels --out build/gpu-wheels --python 3.12

Carry the folder with the repository. There, before bench.gpu_all:

    python -m pip install --no-index --no-deps --find-links build/gpu-wheels -r build/gpu-wheels/requirements.txt

`--no-deps` leaves all else as it is, torch and its CUDA libraries first of all. The last line of stdout is JSON.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"
PACKAGES = (
    "starlette", "uvicorn", "httptools", "h11", "click", "anyio", "sniffio", "idna",
    "pydantic", "pydantic-core", "typing-inspection", "typing-extensions", "annotated-types",
    "httpx2", "httpcore2", "truststore", "prometheus-client", "ftfy", "wcwidth", "datasketch",
)  # fmt: skip
"""What pyproject.toml asks for beside `PRESENT`, with what these need in turn."""

PRESENT = (
    "torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "fsspec", "peft", "numpy", "scipy",
    "pyyaml", "jinja2", "psutil", "tqdm",
)  # fmt: skip
"""What a machine for models has."""

PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")


def pins_of(packages: Sequence[str], constraints: str) -> list[str]:
    """`name==version` of each, as the constraints pin it. Raises ValueError for one that they do not."""
    pinned = {
        _normalised(line.partition("==")[0]): line.strip()
        for line in constraints.splitlines()
        if "==" in line and not line.startswith("#")
    }
    missing = [name for name in packages if _normalised(name) not in pinned]
    if missing:
        raise ValueError(f"{CONSTRAINTS.name} pins no {', '.join(missing)}; name packages that it pins")
    return [pinned[_normalised(name)] for name in packages]


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def download_command(requirements: Path, out: Path, python: str) -> list[str]:
    """pip's, for another Python than this one: wheels alone, and nothing that they ask for."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    return [
        *command,
        "--constraint",
        str(CONSTRAINTS),
        "--requirement",
        str(requirements),
        "--dest",
        str(out),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    out: Path = arguments.out
    try:
        pins = pins_of(arguments.packages.split(","), CONSTRAINTS.read_text())
    except ValueError as error:
        print(f"bench.gpu_wheels: {error}", file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    for wheel in out.glob("*.whl"):  # of another Python, or of other versions
        wheel.unlink()
    requirements = out / "requirements.txt"
    requirements.write_text("\n".join(pins) + "\n")
    status = subprocess.run(download_command(requirements, out, arguments.python), check=False).returncode
    if status != 0:
        return status
    wheels = sorted(out.glob("*.whl"))
    print(
        json.dumps(
            {
                "bench": "gpu_wheels",
                "python": arguments.python,
                "num_bytes": sum(wheel.stat().st_size for wheel in wheels),
                "wheels": [wheel.name for wheel in wheels],
            }
        )
    )
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_wheels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="directory for the wheels and requirements.txt")
    add("--python", default="3.12", metavar="VERSION", help="of the machine with the device (default: 3.12)")
    add("--packages", default=",".join(PACKAGES), help="others than the server's, with commas")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
