"""Policies inside live vLLM servers under load, on the same requests by turns, beside what the gym says of them.

    python -m benchmarks.vllm_live --out out/live [--policies stock,slai,on-time] [--seeds 5] [--num-requests 200]
                                   [--qps 4] [--profile FILE] [--servers .venv-vllm/bin/python]

A server for each policy: `stock` is vLLM's own scheduler, the others run in it by the plug-in. All stay up on this
machine's loopback, with a tiny random model on one core; `llmsched serve-bench` offers each of them the requests of a
seed, then of the next seed, in an order that turns, so that what else the machine does hits all alike. 30 % of the
users are strict, the server is told each request's SLOs, and latencies are held against the server's own histograms.

With `--profile`, a profile of the same model (`llmsched calibrate --backend vllm --model OUT/model`), the same requests
run in the gym, and Kendall's tau says how far both agree on the order of the policies.

Prints the tables in Markdown, the second time without measuring again; results lie in OUT/seed-N, server logs beside
them. A run that was interrupted goes on.
The client needs ``pip install '.[serve]'``, the servers an environment of `benchmarks/vllm_env.sh`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks import whole
from llmsched_gym.config import Scenario, scenario, split_names
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.help_text import place
from llmsched_gym.report import intervals
from llmsched_gym.serving.bench import Server, serve_bench
from llmsched_gym.text import between, number, table

STOCK = "stock"
IN_THE_GYM = {STOCK: "vllm-v1"}
BATCH_TOKENS, MAX_SEQS, KV_BLOCKS, BLOCK_SIZE, CONTEXT = 2048, 128, 400, 128, 4096
START_S = 300.0
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FIGURES = {  # of rows: what it is called in tables, and how many digits it has
    "strict_attainment": ("strict users within SLOs (%)", 1, 100.0),
    "slo_attainment": ("all users (%)", 1, 100.0),
    "strict_itl_p99_s": ("p99 ITL strict (ms)", 0, 1e3),
    "ttft_p50_s": ("TTFT p50 (ms)", 0, 1e3),
    "ttft_p99_s": ("TTFT p99 (ms)", 0, 1e3),
}


def write_trace(path: Path, num_requests: int = 2000) -> None:
    """Prompts and answers of a chat service, log-normal."""
    rng = np.random.default_rng(1)
    prompt = 8 + rng.lognormal(5.3, 0.9, num_requests).astype(int)
    output = 2 + rng.lognormal(3.6, 0.6, num_requests).astype(int)
    frame = {"arrived_at": np.cumsum(rng.exponential(0.25, num_requests)).round(3), "num_prefill_tokens": prompt}
    pd.DataFrame({**frame, "num_decode_tokens": output}).to_csv(path, index=False)


def world_of(args: argparse.Namespace) -> Scenario:
    """What is asked of the servers, and in the gym."""
    trace = args.out / "trace.csv"
    if not trace.exists():
        write_trace(trace)
    return scenario(
        "default",
        trace=str(trace),
        trace_arrivals="poisson",
        qps=args.qps,
        num_requests=args.num_requests,
        strict_share=0.3,
        warmup_s=5.0,
        max_model_len=CONTEXT,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=BATCH_TOKENS,
        block_size=BLOCK_SIZE,
        num_kv_blocks=KV_BLOCKS,
    )


class LiveServer:
    """One vLLM server on the loopback, up while the block lasts."""

    def __init__(self, python: str, policy: str, out: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.policy, self.url = policy, f"http://127.0.0.1:{port}"
        self.command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(out / "model")]
        self.command += ["--served-model-name", "tiny", "--load-format", "dummy", "--skip-tokenizer-init"]
        self.command += ["--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
        self.command += ["--max-model-len", str(CONTEXT), "--max-num-batched-tokens", str(BATCH_TOKENS)]
        self.command += ["--max-num-seqs", str(MAX_SEQS), "--num-gpu-blocks-override", str(KV_BLOCKS + 1)]
        if policy != STOCK:
            self.command += ["--scheduler-cls", "llmsched_gym.real_backend.vllm_plugin.Scheduler"]
        threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
        offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "LLMSCHED_POLICY": policy}
        self.env = {**os.environ, **threads, **offline}
        self.label = policy.replace("[", "-").replace("]", "").replace(",", "+")
        self.log = out / f"server-{self.label}.log"

    def __enter__(self) -> LiveServer:
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(self.command, env=self.env, stdout=log, stderr=subprocess.STDOUT)
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/v1/models", timeout=5).close()
                return self
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(0.5)
        self.__exit__()
        sys.exit(f"error: the server with {self.policy} did not start; see {self.log}")

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def live(args: argparse.Namespace, world: Scenario) -> pd.DataFrame:
    """Rows of all runs on the servers."""
    (args.out / "model").mkdir(exist_ok=True)
    (args.out / "model" / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        servers = [stack.enter_context(LiveServer(args.servers, policy, args.out)) for policy in args.policies]
        for seed in range(args.seeds):
            first = seed % len(servers)
            for server in servers[first:] + servers[:first]:
                asked = Server(server.url, server.label, send_slos=server.policy != STOCK, check_metrics=True)
                folder = args.out / f"seed-{seed}"
                done = serve_bench(world, asked, seeds=1, first_seed=seed, out=folder)
                rows += [{**found, "policy": server.policy} for found in done]
                share = number(100.0 * rows[-1]["slo_attainment_by_class"]["strict"], 1)
                print(f"seed {seed}, {server.policy}: strict users within SLOs {share} %", file=sys.stderr)
    return frame(rows)


def kept(args: argparse.Namespace) -> pd.DataFrame | None:
    """Rows of an earlier call that ran all that is asked for."""
    path = args.out / "served.csv"
    served = pd.read_csv(path) if path.exists() else None
    if served is None or set(args.policies) - set(served["policy"]) or set(range(args.seeds)) - set(served["seed"]):
        return None
    return served[served["policy"].isin(args.policies) & (served["seed"] < args.seeds)]


def frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a table, with the strict users' figures in columns of their own."""
    own = {"strict_attainment": "slo_attainment_by_class", "strict_itl_p99_s": "itl_p99_s_by_class"}
    return pd.DataFrame([done | {name: done[column]["strict"] for name, column in own.items()} for done in rows])


def in_the_gym(args: argparse.Namespace, world: Scenario) -> pd.DataFrame:
    """Rows of the same runs on the cost model."""
    world = world.replace(profile=args.profile)
    rows = []
    for policy in args.policies:
        for seed in range(args.seeds):
            rows.append(row(simulate(world, IN_THE_GYM.get(policy, policy), seed)) | {"policy": policy})
    return frame(rows)


def values(rows: pd.DataFrame, policy: str, column: str) -> list[float]:
    """A figure of a policy, one a seed."""
    chosen = rows[rows["policy"] == policy].sort_values("seed")[column]
    return [float(value) for value in chosen.fillna(np.inf)]


def tell(rows: pd.DataFrame, policies: Sequence[str], what: str) -> None:
    """The figures, and differences to the first policy by seed."""
    print(f"\n{what}: mean over {rows['seed'].nunique()} seeds\n")
    header = ["policy", *(name for name, _, _ in FIGURES.values())]
    lines = []
    for policy in policies:
        cells = [number(by * float(np.mean(values(rows, policy, c))), d) for c, (_, d, by) in FIGURES.items()]
        lines.append([f"`{policy}`", *cells])
    print(table(header, lines))
    base = policies[0]
    for policy in policies[1:]:
        for column in ("strict_attainment", "slo_attainment"):
            apart = 100.0 * (np.array(values(rows, policy, column)) - values(rows, base, column))
            bounds = intervals.interval(apart.tolist())
            told = between(*bounds, 1) if bounds else f"by seed {', '.join(f'{a:+.1f}' for a in apart)}"
            print(f"`{policy}` less `{base}`, {column}: {apart.mean():+.1f} points ({told})")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=place, default=Path("out/live"))
    parser.add_argument("--policies", type=lambda text: split_names([text]), default=[STOCK, "slai", "on-time"])
    parser.add_argument("--seeds", type=whole, default=5)
    parser.add_argument("--num-requests", type=whole, default=200)
    parser.add_argument("--qps", type=float, default=4.0)
    parser.add_argument("--profile", help="of the same model on the same machine")
    parser.add_argument("--servers", default=".venv-vllm/bin/python", help="Python of an environment with vLLM")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left
    args.out = args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    world = world_of(args)
    served = kept(args)
    if served is None:
        served = live(args, world)
        served.to_csv(args.out / "served.csv", index=False)
    tell(served, args.policies, "Servers")
    agree = served["metrics_agree"].astype(bool)
    print(f"\nlatencies are the server's own, within its buckets, in {agree.sum()} of {len(agree)} runs")
    print(f"{int(served['num_failed'].sum())} of {int(served['num_requests'].sum())} requests failed")
    if args.profile:
        simulated = in_the_gym(args, world)
        simulated.to_csv(args.out / "simulated.csv", index=False)
        tell(simulated, args.policies, "The gym")
        for column in FIGURES:
            both = [{p: values(rows, p, column) for p in args.policies} for rows in (served, simulated)]
            tau, bounds = intervals.rank_agreement(*both)
            told = f" {between(*bounds, 2)}" if bounds else ""
            print(f"Kendall's tau by {column}: {tau:.2f}{told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
