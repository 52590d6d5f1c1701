#!/usr/bin/env bash
# llama.cpp's server, built for this machine, and the benchmark's models as GGUF:
#   bench/peers/setup_llamacpp.sh DIRECTORY MODELS      (MODELS: the --out of bench.models)
# Then BENCH_LLAMACPP=DIRECTORY, and bench/peers/llamacpp.toml starts it. Needs cmake and a C++ compiler; run it in
# the repository's root with adapterd's environment active.
# The sources are those inside llama-cpp-python's source package.
set -euo pipefail

directory=${1:?usage: setup_llamacpp.sh DIRECTORY MODELS}
models=${2:?usage: setup_llamacpp.sh DIRECTORY MODELS}
version=0.3.36

mkdir -p "$directory"
python=${PYTHON:-python3}
pip=("$python" -m pip --disable-pip-version-check)
"${pip[@]}" download --no-deps --no-binary llama-cpp-python --dest "$directory" "llama-cpp-python==$version"
tar -xzf "$directory"/llama_cpp_python-"$version".tar.gz -C "$directory"
source=$directory/llama_cpp_python-$version/vendor/llama.cpp
cmake -S "$source" -B "$directory/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
    -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
cmake --build "$directory/build" --target llama-server --parallel "$(nproc)"

# Beside adapterd's own environment, whose torch and safetensors read the models.
"${pip[@]}" install --no-deps --target "$directory/gguf" gguf
PYTHONPATH=$directory/gguf "$python" -m bench.peers.to_gguf --models "$models"
