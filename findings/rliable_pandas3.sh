#!/usr/bin/env bash
# rliable 1.2.0 with what pip installs for it today, arch 7.2.0 and pandas 3.1.1: `import rliable.library`, which has the
# interval estimates, is a TypeError, for arch calls a helper of pandas (deprecate_kwarg) that takes another argument
# since pandas 3. Nothing in either's requirements keeps the two apart. With pandas 2 it imports and works.
# Exits 0 while that is so, 1 when it changes. Needs pip and a network; uses a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q rliable==1.2.0 arch==7.2.0 pandas==3.1.1
cat > "$folder/scores.py" <<'PY'
from importlib.metadata import version

import numpy as np

print(", ".join(f"{name} {version(name)}" for name in ("rliable", "arch", "pandas", "numpy")))
try:
    from rliable import library, metrics

    scores = {"learner": np.random.default_rng(0).random((5, 3))}  # runs x tasks
    points, intervals = library.get_interval_estimates(scores, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=50)
    print("intervals of shape", intervals["learner"].shape)
except TypeError as error:
    print("TypeError:", error)
PY
cd "$folder"
today=$(venv/bin/python -W ignore scores.py)
"$folder/venv/bin/pip" install -q "pandas<3"
before=$(venv/bin/python -W ignore scores.py)
printf '%s\n%s\n' "$today" "$before"
[[ "$today" == *"TypeError: deprecate_kwarg()"* ]] && [[ "$before" == *"intervals of shape (2, 1)"* ]]
