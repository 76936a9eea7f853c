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
curves=$(for seed in 1 2 3 4 5; do printf ',%s' "$out/drift-$seed"; done)
level=$($python -c "import json; print(json.load(open('$out/tuned-constant/policy/policy.json'))['training']['selection']['mean_utility'])")
$python -m agents.curves --runs "${curves#,}" --level "$level" --out "$out/learned_curves.png"

# the other criteria, and worlds that nobody was trained for: with the policies that the package ships
$python -m agents.robustness --policy learned,tuned-constant,slai --out "$out/robustness.json"
capacity="llmsched capacity --first-seed 3000 --policy"
$capacity "slai,slai[hold=true],tuned-constant,tuned-linear,learned" --suite default --criterion serve-all:0.9 --qps 0.8,2.6
$capacity "slai,tuned-constant,srpt-capped,learned" --suite paper --criterion paper --qps 0.9,2.6
$python -m agents.tune --kind constant --suite default --set allow_refusal=True --steps 3e6 --seed 1 --out "$out/refusing"
$capacity "slai,$out/refusing/policy,tuned-constant,learned" --suite default --criterion attainment:0.9 --allow-refusal \
  --qps 0.8,3
llmsched evaluate --suite paper --qps 1.6 --first-seed 3000 --policy slai,tuned-constant,learned
