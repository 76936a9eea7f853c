#!/usr/bin/env bash
# Makes the policies of llmsched_gym/data/policies and the tables of docs/agents_results.md, about an hour on two cores.
#     agents/shipped.sh runs/shipped
set -euo pipefail
out=${1:?folder for the runs}
python=${PYTHON:-python}
export OMP_NUM_THREADS=1
judged="--eval-seeds 8 --eval-requests 1000"

# opponents: more simulated decisions than the agents get; the shipped linear rule five times as many again
$python -m agents.tune --kind constant --suite drift --steps 4e6 --seed 1 --out "$out/tuned-constant"
linear="$python -m agents.tune --kind linear --suite drift --seed 2 --sigma 0.05"
$linear --action-repeat 8 --steps 4e6 --out "$out/tuned-linear-8"
$linear --action-repeat 1 --steps 4e6 --out "$out/tuned-linear-4m"
$linear --action-repeat 1 --steps 2e7 --out "$out/tuned-linear"

# agents: students of on-time, one decision a batch
student="--suite drift --action-repeat 1 --rounds 5 --steps 600 --epochs 10 $judged"
agents=""
for seed in 1 2 3 4 5; do
  $python -m agents.imitate --teacher on-time --seed $seed $student --out "$out/on-time-$seed"
  agents="$agents,$out/on-time-$seed/policy"
done

# the shipped one: a student on profiles of both kinds
$python -m agents.imitate --teacher on-time --seed 1 --worlds "$(dirname "$0")/shipped_worlds.json" --action-repeat 1 \
  --rounds 5 --steps 600 --epochs 10 $judged --out "$out/learned"

$python -m agents.headroom --constant "$out/tuned-constant/policy" --settings 100 --out "$out/headroom.json"
$python -m agents.compare --agents "${agents#,}" --beside "on-time,$out/tuned-linear/policy" --out "$out/compare" \
  --opponents "$out/tuned-constant/policy,$out/tuned-linear-4m/policy,$out/tuned-linear-8/policy,slai,sarathi"

# the other criteria, and worlds that nobody was trained for; "learned" of these tables is the student of drift alone
alone="$out/on-time-3/policy"
$python -m agents.robustness --policy $alone,on-time,tuned-constant,slai --out "$out/robustness.json"
capacity="llmsched capacity --first-seed 3000 --policy"
$capacity "slai,slai[hold=true],tuned-constant,tuned-linear,on-time,$alone" --suite default --criterion serve-all:0.9 \
  --qps 0.8,2.6
$python -m agents.imitate --teacher "on-time[quiet=1000,stretch=1.6]" --seed 1 $student --out "$out/lenient"
$capacity "sarathi[order=feasible,hold=true,cap=0.7],on-time[quiet=1000],$out/lenient/policy" --suite default \
  --criterion serve-all:0.9 --qps 0.8,2.6
$capacity "slai,tuned-constant,tuned-linear,on-time,$alone" --suite paper --criterion paper --qps 0.9,2.6
llmsched evaluate --suite paper --qps 1.6 --first-seed 3000 --policy slai,tuned-constant,tuned-linear,on-time,$alone

# with the right to refuse: constants tuned on all rates, and on the rates where the criterion is decided
refusing="--suite default --set allow_refusal=True"
$python -m agents.tune --kind constant $refusing --steps 3e6 --seed 1 --out "$out/refusing-constant"
$python -m agents.tune --kind constant $refusing --set "qps_range=(2.1,2.5)" --set beta=0.0 --steps 3e6 --seed 1 \
  --out "$out/refusing-constant-loaded"
$python -m agents.imitate --teacher "on-time[refuse=true,stretch=1.5,limit=6500]" $refusing --set "qps_range=(1.6,2.6)" \
  --action-repeat 1 --seed 1 --rounds 5 --steps 600 --epochs 10 $judged --out "$out/refusing"
$capacity "slai,$out/refusing-constant/policy,$out/refusing-constant-loaded/policy,$out/refusing/policy,$alone" \
  --suite default --criterion attainment:0.9 --allow-refusal --qps 0.8,3
