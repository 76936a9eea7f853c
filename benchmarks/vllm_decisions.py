"""Compare the batches of the vLLM plug-in with the gym's, one by one, on one clock: that of the cost model.

    benchmarks/vllm_env.sh DIR
    DIR/bin/python -m benchmarks.vllm_decisions --policy slai --qps 1.8 --requests 400 --seed 0

prints one JSON line: ``{"policy": p, "batches": n, "mismatches": m, "first_mismatch": i or null, "preemptions": k,
"rebooked": b}``; without ``--policy`` one for each of five policies at 1.2, 1.8 and 2.4 requests per second. vLLM's
scheduler runs without a model, synchronously. Batches are sets of (request, computed tokens, tokens); `rebooked` counts
those that vLLM did not run as the plug-in had formed them.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from benchmarks.conformance import next_batch
from benchmarks.conformance_vllm import Watched, seconds
from benchmarks.prefix_tables import tokens_of
from benchmarks.vllm_scheduler import VLLM, Settings
from llmsched_gym.config import BLOCK_SIZE, SLO_CLASSES, ConfigError, scenario
from llmsched_gym.cost import load_profile
from llmsched_gym.engine import Engine
from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import PolicyError, install
from llmsched_gym.workload import make_table

POLICIES = ("slai", "sarathi", "vllm-v1", "on-time", "learned")
QPS = (1.2, 1.8, 2.4)


def run_cell(policy: str, qps: float, requests: int, seed: int, kv_blocks: int, budget: int) -> dict[str, Any]:
    """The comparison on `requests` requests of the paper suite."""
    from llmsched_gym.real_backend.vllm_plugin import SyncScheduler

    scheduler = make_scheduler(policy)
    world = scenario(
        "paper",
        qps=qps,
        num_requests=requests,
        num_kv_blocks=kv_blocks,
        watermark=0.0,
        max_num_seqs=128,
        max_num_batched_tokens=budget,
        admission=getattr(scheduler, "admission", "prompt"),
    )
    table, profile, recording = make_table(world, seed), load_profile(world.profile), Watched([])
    engine = Engine(world, len(table), backend=recording)
    engine.reset(table)
    install(scheduler, engine.state)
    engine.state.sims[0].decision_s = 0.0  # of learned: on this clock both decide in no time
    engine.state.own_coef_s[:, 3] = budget  # vLLM's budget for the device is the server's, here as there
    install(scheduler, engine.state)
    engine.state.sims[0].decision_s = 0.0

    told = {"policy": policy, "profile": world.profile, "strict_tbt_slo_s": world.strict_tbt_slo_s}
    settings = Settings(budget=budget, max_num_seqs=128)
    real = VLLM(settings, kv_blocks, world.max_model_len, SyncScheduler, {"llmsched": told})
    plugin: Any = real.scheduler
    now = [0.0]
    plugin.clock, plugin.zero_s, plugin.wall_zero_s = lambda: now[0], 0.0, 0.0
    plugin.lane.engine.state.episodes[0].patience_s = world.patience_s
    rebooked = [0]
    rebook = plugin._rebook
    plugin._rebook = lambda *args: (rebooked.__setitem__(0, rebooked[0] + 1), rebook(*args))

    tokens, prompt = tokens_of(table), table.prompt_tokens
    total = prompt + table.output_tokens
    fits = (total <= world.max_model_len) & (-(-total // BLOCK_SIZE) <= kv_blocks)
    arrived, differing, batches = 0, [], 0
    clock_s = 0.0
    while arrived < len(table) or plugin.has_unfinished_requests():
        if not plugin.has_unfinished_requests():
            clock_s = max(clock_s, float(table.arrival_s[arrived]))
        now[0] = clock_s
        while arrived < len(table) and table.arrival_s[arrived] <= clock_s:
            r = arrived
            if fits[r]:
                slos = {"ttft_slo_s": float(table.ttft_slo_s[r]), "tbt_slo_s": float(table.tbt_slo_s[r])}
                slos["slo_class"] = SLO_CLASSES[int(table.slo_class[r])]
                real.add(r, int(prompt[r]), tokens[r], float(table.arrival_s[r]), slos)
            arrived += 1
        if not plugin.has_unfinished_requests():
            continue
        formed = real.form()
        if not formed.items:
            real.end(formed)
            following = float(table.arrival_s[arrived]) if arrived < len(table) else clock_s + world.idle_step_s
            clock_s = min(following, clock_s + world.idle_step_s)
            continue
        end_s = clock_s + seconds(profile, prompt, formed.items)
        recording.durations_s.append(end_s - clock_s)  # adding it to the clock gives the same end on both sides
        if not next_batch(engine, scheduler) or set(formed.items) != recording.batch:
            differing.append(batches)
        now[0] = clock_s = end_s
        real.end(formed)
        batches += 1
    while next_batch(engine, scheduler):
        differing.append(batches)
        batches += 1
    return {
        "policy": policy,
        "qps": qps,
        "seed": seed,
        "kv_blocks": kv_blocks,
        "batches": batches,
        "mismatches": len(differing),
        "first_mismatch": differing[0] if differing else None,
        "preemptions": int(engine.state.requests[0]["num_preemptions"].sum()),
        "rebooked": rebooked[0],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_decisions", description=__doc__.split("\n")[0])
    parser.add_argument("--policy", help=f"a name of `llmsched policies` (all of {', '.join(POLICIES)})")
    parser.add_argument("--qps", type=float, help=f"requests per second of the paper suite (all of {QPS})")
    parser.add_argument("--requests", type=int, default=400, help="how many (400)")
    parser.add_argument("--kv-blocks", type=int, default=14_733, help="usable KV blocks of 16 tokens (14733)")
    parser.add_argument("--budget", type=int, default=2048, help="max_num_batched_tokens (2048)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    mismatches = 0
    try:
        for policy in [args.policy] if args.policy else POLICIES:
            for qps in [args.qps] if args.qps else QPS:
                found = run_cell(policy, qps, args.requests, args.seed, args.kv_blocks, args.budget)
                mismatches += found["mismatches"]
                print(json.dumps(found), flush=True)
    except ModuleNotFoundError as error:
        print(f"error: {error}; `benchmarks/vllm_env.sh DIR` makes an environment with vLLM", file=sys.stderr)
        return 2
    except (ConfigError, PolicyError, ValueError) as error:
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    return 1 if mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
