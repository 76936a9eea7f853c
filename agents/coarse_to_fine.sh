#!/usr/bin/env bash
# PPO from scratch, with knobs that are held for shorter and shorter times: docs/agents_scratch.md, "From coarse to fine".
# Ten minutes of a core for each training seed; the last stage's policy is runs/fine/8-SEED/policy. The same command goes
# on after an interruption.
#     agents/coarse_to_fine.sh runs/fine "0 1 2 3 4" --suite default --set qps=1.8
set -euo pipefail
out=${1:?folder for the runs}
seeds=${2:?training seeds, in quotes}
shift 2
python=${PYTHON:-python}
export OMP_NUM_THREADS=1

stage() {  # name of the stage, of the one before it or "", batches that an action holds, options
  local folder=$out/$1-$seed before=() resume=()
  if [ -d "$folder/policy" ]; then return; fi
  if [ -n "$2" ]; then before=(--warm-start "$out/$2-$seed"); fi
  if [ -f "$folder/config.json" ]; then resume=(--resume); fi
  "$python" -m agents.ppo "${world[@]}" --action knobs --num-envs 128 --group 16 --average --reward-scale 0.05 --eval-seeds 8 \
    --seed "$seed" "${before[@]}" --action-repeat "$3" --out "$folder" "${resume[@]}" "${@:4}"
}

world=("$@")
for seed in $seeds; do
  stage 256 "" 256 --n-steps 16 --batch-size 512 --learning-rate 1e-3 --entropy 0.01 --steps 393216 --eval-every 32768
  stage 32 256 32 --n-steps 128 --batch-size 4096 --gae-lambda 0.995 --learning-rate 5e-4 --entropy 0.003 --steps 1572864 \
    --eval-every 262144
  fine=(--n-steps 256 --batch-size 8192 --gae-lambda 0.998)
  stage 8-first 32 8 "${fine[@]}" --learning-rate 3e-4 --entropy 0.001 --steps 3145728 --eval-every 524288
  stage 8 8-first 8 "${fine[@]}" --learning-rate 5e-4 --entropy 0.0005 --steps 10485760 --eval-every 1048576
done
