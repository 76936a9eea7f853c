#!/usr/bin/env bash
# Makes the tables of ablations and the learning curves of docs/agents_results.md, about half an hour on two cores.
#     agents/ablations.sh runs/ablations runs/shipped
set -euo pipefail
out=${1:?folder for the runs}
shipped=${2:?folder that agents/shipped.sh wrote}
python=${PYTHON:-python}
export OMP_NUM_THREADS=1
base="--suite drift --seed 1 --eval-seeds 4 --eval-requests 500"

mlp() { $python -m agents.train $base --steps 1e6 "${@:2}" --out "$out/$1"; }
rows() { $python -m agents.train $base --steps 1e5 --eval-every 50000 --checkpoint-every 50000 "${@:2}" --out "$out/$1"; }
tuned() {  # PPO on top of a student
  $python -m agents.train --suite drift --action-repeat 1 --steps 2e6 --seed "$1" --critic-warmup 500000 --entropy 0 \
    --warm-start "$shipped/on-time-$1/weights.pt" --learning-rate 5e-5 --n-steps 256 --batch-size 8192 --gae-lambda 0.99 \
    --eval-seeds 8 --eval-requests 1000 --out "$out/ppo-$1"
}
student() {
  $python -m agents.imitate --teacher on-time --suite drift --action-repeat 1 --seed 1 --eval-seeds 8 \
    --eval-requests 1000 "${@:2}" --out "$out/$1"
}

(mlp scratch; mlp every-batch --action-repeat 1; mlp per-step --discount step; tuned 1; tuned 3) &
(mlp credit-at-finish --set credit=finish; mlp priority --action priority; rows scratch-short; rows slots --observation slots
 tuned 2) &
wait
(student told --told --rounds 5 --steps 600 --epochs 10) &
(student cloned --rounds 0 --steps 3600 --epochs 60; student attention --observation slots --rounds 3 --steps 150 --epochs 6) &
wait
names="scratch every-batch per-step credit-at-finish priority scratch-short slots ppo-1 ppo-2 ppo-3 told cloned attention"
agents=$(for name in $names; do printf ',%s' "$out/$name/policy"; done)
$python -m agents.compare --agents "${agents#,},$shipped/on-time-1/policy" --seeds 10 --requests 500 --out "$out/compare"
level=$($python -c "import json; print(json.load(open('$shipped/tuned-constant/policy/policy.json'))['training']['selection']['mean_utility'])")
$python -m agents.curves --runs "$out/ppo-1,$out/ppo-2,$out/ppo-3" --level "$level" --out "$out/learned_curves.png"

# a decision per request: some 40 of them to a batch
$python -m agents.train $base --steps 1e5 --eval-every 1e5 --eval-seeds 1 --eval-requests 50 --action request \
  --algorithm maskable --observation slots --out "$out/request"
$python -m agents.compare --agents "$out/request/policy" --seeds 10 --requests 50 --out "$out/compare-request"
