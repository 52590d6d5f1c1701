#!/usr/bin/env bash
# TRL's SFTTrainer in an environment of its own: bench/peers/setup_trl.sh DIRECTORY
# Then python -m bench.train_vs_trl --trl DIRECTORY compares with it. Takes a few minutes and 2 GB.
set -euo pipefail

venv=${1:?usage: setup_trl.sh DIRECTORY}

"${PYTHON:-python3}" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
# torch first and alone, so that the same CPU build is compared as adapterd runs on.
"${pip[@]}" install torch==2.13.0
"${pip[@]}" install trl==1.16.0 peft==0.21.2 transformers==5.23.0 torch==2.13.0
"$venv/bin/python" -c 'import trl; print("trl", trl.__version__)'
