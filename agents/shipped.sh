#!/usr/bin/env bash
# Makes the policies of llmsched_gym/data/policies and the tables of docs/agents.md, about an hour on two cores.
#     agents/shipped.sh runs/shipped
set -euo pipefail
out=${1:?folder for the runs}
python=${PYTHON:-python}
export OMP_NUM_THREADS=1
judged="--eval-seeds 8 --eval-requests 1000"

# opponents: as many simulated decisions as the agents get at most
$python -m agents.tune --kind constant --suite drift --steps 4e6 --seed 1 --out "$out/tuned-constant"
$python -m agents.tune --kind linear --suite drift --steps 4e6 --seed 2 --sigma 0.05 --out "$out/tuned-linear"

# agents: a teacher that knows the device's hidden cost scale, then PPO
agents=""
for seed in 1 2 3 4 5; do
  $python -m agents.imitate --teacher "sarathi[order=feasible,hold=true,cap=0.8,budget=768]" --told --suite drift \
    --seed $seed --rounds 3 --steps 150 --epochs 6 $judged --out "$out/told-$seed"
  $python -m agents.train --suite drift --steps 2e6 --seed $seed --warm-start "$out/told-$seed/weights.pt" \
    --critic-warmup 250000 --learning-rate 1e-4 --entropy 0 --n-steps 128 --batch-size 4096 $judged \
    --out "$out/drift-$seed"
  agents="$agents,$out/drift-$seed/policy"
done

# the agent with the highest mean utility on selection seeds is the shipped one: see "selection" in policy.json
$python -m agents.headroom --constant "$out/tuned-constant/policy" --settings 100 --out "$out/headroom.json"
$python -m agents.compare --agents "${agents#,}" --out "$out/compare" \
  --opponents "$out/tuned-constant/policy,$out/tuned-linear/policy,slai,sarathi"
