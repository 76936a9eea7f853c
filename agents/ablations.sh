#!/usr/bin/env bash
# Makes the table of ablations of docs/agents.md, some six minutes on two cores.
#     agents/ablations.sh runs/ablations runs/shipped
set -euo pipefail
out=${1:?folder for the runs}
shipped=${2:?folder that agents/shipped.sh wrote}
python=${PYTHON:-python}
export OMP_NUM_THREADS=1
base="--suite drift --seed 1 --eval-seeds 4 --eval-requests 500"

mlp() { $python -m agents.train $base --steps 1e6 "${@:2}" --out "$out/$1"; }
rows() { $python -m agents.train $base --steps 1e5 --eval-every 50000 --checkpoint-every 50000 "${@:2}" --out "$out/$1"; }

(mlp scratch; mlp per-step --discount step; rows scratch-short) &
(mlp credit-at-finish --set credit=finish; mlp priority --action priority; rows slots --observation slots) &
wait
names="scratch per-step credit-at-finish priority scratch-short slots"
agents=$(for name in $names; do printf ',%s' "$out/$name/policy"; done)
$python -m agents.compare --agents "${agents#,},$shipped/told-1/policy,$shipped/drift-1/policy" --seeds 10 --requests 500 \
  --out "$out/compare"
