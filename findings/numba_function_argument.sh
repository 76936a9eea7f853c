#!/usr/bin/env bash
# numba 0.68.1: a compiled function that takes another compiled function, as an argument of a declared FunctionType, is
# expensive to call from Python: turning the dispatcher into a first-class function takes some 18 microseconds at every
# call, where an integer in its place takes 0.1, although it is the same object each time and was compiled long before.
# (Inside compiled code the pointer costs nothing.) Who hands over the address of the code, and makes a function of it
# in an intrinsic, does not pay.
# Exits 0 while it costs more than 20 times as much, 1 when that changes. Needs pip and a network; uses a temporary
# folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numba==0.68.1 numpy==2.4.6
cat > "$folder/call.py" <<'PY'
import statistics
import sys
import time

import numba
from numba import types

SIGNATURE = types.int64(types.int64)


@numba.njit(SIGNATURE)
def double(x):
    return 2 * x


@numba.njit(types.int64(types.FunctionType(SIGNATURE), types.int64))
def apply(function, x):
    return function(x)


@numba.njit(types.int64(types.int64, types.int64))
def plain(factor, x):
    return factor * x


def microseconds(call, argument):
    rounds = []
    for _ in range(7):
        begin_s = time.perf_counter()
        for i in range(500):
            assert call(argument, i) == 2 * i
        rounds.append((time.perf_counter() - begin_s) / 500 * 1e6)
    return statistics.median(rounds)


function, integer = microseconds(apply, double), microseconds(plain, 2)
print(f"numba {numba.__version__}: a function as argument {function:.1f} us a call, an integer {integer:.2f} us")
sys.exit(0 if function > 20 * integer else 1)
PY
"$folder/venv/bin/python" "$folder/call.py"
