#!/usr/bin/env bash
# triton 3.6.0 (what torch 2.11 installs) with numpy 2.4, TRITON_INTERPRET=1 on a CPU: a loop whose bound a kernel has
# loaded or computed raises "only 0-dimensional arrays can be converted to Python scalars", because the interpreter calls
# int() on arrays of one element, which numpy 2.4 no longer allows. With numpy 2.3 the same kernel runs, with a
# DeprecationWarning. Exits 0 while that is so, 1 when it changes. Needs pip and a network; uses a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q triton==3.6.0
cat > "$folder/loop.py" <<'PY'
import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def total(values, count, out):
    answer = 0.0
    for i in range(0, tl.load(count)):
        answer += tl.load(values + i)
    tl.store(out, answer)


out = torch.zeros(1)
try:
    total[(1,)](torch.arange(5.0), torch.tensor([4], dtype=torch.int32), out)
    result = f"sum {out.item()}"
except Exception as error:
    result = str(error)
print("triton", triton.__version__, "numpy", numpy.__version__, "->", result)
PY
export TRITON_INTERPRET=1
for pair in "2.3.5:sum 6.0" "2.4.6:only 0-dimensional arrays can be converted"; do
  "$folder/venv/bin/pip" install -q "numpy==${pair%%:*}"
  found=$("$folder/venv/bin/python" -W ignore "$folder/loop.py" 2>&1 | tail -1)
  echo "$found"
  [[ "$found" == *"${pair#*:}"* ]] || exit 1
done
