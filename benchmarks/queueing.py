"""Routers against queueing theory: replicas as single servers, first come first served, without any engine overhead.

    python -m benchmarks.queueing [--replicas 128] [--seeds 10] [--requests 300000] [--load 0.8]

Each replica runs one request at a time (max_num_seqs 1), a request is a prompt and one output token, and a batch's
time is linear in its tokens. With prompts of exponential length and Poisson arrivals at `load` a replica, the
share of replicas with at least i requests is

- load^i where requests are split at random (M/M/1), whatever the number of replicas,
- load^(2^i - 1) with the shorter of two, as the number of replicas grows (Mitzenmacher, IEEE TPDS 2001). Some hundred
  replicas have more of the longest queues than that, where these are rare: at 0.7 a fifth more with 4 or more requests.

With prompts of one length the mean wait under join-the-shortest-queue lies between that of one queue for all (M/D/c,
which no router beats, and round-robin attains as all take equally long) and that of a random split (M/D/1:
load / (2 (1 - load)) of a service time).

Lengths are whole numbers of tokens, of mean `MEAN_TOKENS`, drawn geometrically: the exponential's in discrete time.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmsched_gym.cluster.core import Cluster
from llmsched_gym.config import ClusterScenario
from llmsched_gym.cost import TableLinear, load_profile
from llmsched_gym.registry import make_router
from llmsched_gym.workload import RequestTable

MEAN_TOKENS = 1000
MOST_TOKENS = 1 << 15  # longer prompts would be refused: one in 10^14
TOKEN_S = 1e-3  # so that a prompt of mean length takes a second
WARMUP = 0.2  # share of the run before anything is counted; a queue settles within some 1 / (1 - sqrt(load))^2 seconds
MOST_QUEUED = 6  # shares are given of replicas with 1 to so many requests


def world(replicas: int, folder: Path) -> ClusterScenario:
    """Replicas that serve one request at a time, a token a millisecond."""
    device = dataclasses.replace(
        load_profile("rtx6000ada-mistral-7b"),
        name="linear",
        linear=TableLinear((1, MOST_TOKENS), (1e3 * TOKEN_S, 1e3 * TOKEN_S * MOST_TOKENS)),
        overhead_ms=0.0,
        pair_ms=0.0,
        kv_ms=0.0,
    )
    path = folder / "linear.json"
    device.to_json(path)
    return ClusterScenario(
        profile=str(path),
        num_replicas=replicas,
        max_num_seqs=1,
        max_num_batched_tokens=MOST_TOKENS,
        max_model_len=MOST_TOKENS,
        router_staleness_s=0.0,
        jitter=0.0,
        patience_s=math.inf,
        replica_scheduler=f"sarathi[budget={MOST_TOKENS}]",
        num_requests=1,
        drain_s=math.inf,
        arrivals_continue=False,
    )


def requests(replicas: int, load: float, num_requests: int, seed: int, constant: bool) -> RequestTable:
    """Poisson arrivals at `load` a replica, prompts of exponential or of one length, outputs of one token."""
    draws = np.random.default_rng(seed)
    qps = load * replicas / (MEAN_TOKENS * TOKEN_S)
    arrival_s = np.cumsum(draws.standard_exponential(num_requests)) / qps
    tokens = np.full(num_requests, MEAN_TOKENS) if constant else draws.geometric(1.0 / MEAN_TOKENS, num_requests)
    return RequestTable.of(arrival_s, tokens, 1, qps=qps, seed=seed)


def run(cluster: Cluster, table: RequestTable, router: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which replica served each request, when it was done, and how long it waited; each (num_requests,)."""
    cluster.reset(table)
    cluster.run(make_router(router))
    n = len(table)
    done_s = cluster.state.requests["resolved_s"][0, :n].copy()
    wait_s = done_s - table.arrival_s - TOKEN_S * table.prompt_tokens
    return cluster.nodes.replica_of[0, :n].copy(), done_s, wait_s


def shares(table: RequestTable, replica: np.ndarray, done_s: np.ndarray, replicas: int) -> np.ndarray:
    """Share of the replicas with at least i = 1 .. MOST_QUEUED requests, averaged over time behind the warm-up."""
    n = len(table)
    end_s = float(table.arrival_s[-1])
    begin_s = WARMUP * end_s
    time_s = np.concatenate([table.arrival_s, done_s])
    step = np.repeat([1, -1], n)
    # one replica behind the other, each by time
    order = np.lexsort((time_s, np.tile(replica, 2)))
    queue, of, at = np.cumsum(step[order]), np.tile(replica, 2)[order], np.clip(time_s[order], begin_s, end_s)
    lasts_s = np.where(of[1:] == of[:-1], np.diff(at), 0.0)
    total = (end_s - begin_s) * replicas
    return np.array([lasts_s[queue[:-1] >= i].sum() for i in range(1, MOST_QUEUED + 1)]) / total


def one_queue_wait_s(arrival_s: np.ndarray, servers: int, service_s: float) -> np.ndarray:
    """Waits in one queue for all servers with constant service (M/D/c), where each server takes every c-th request."""
    free_s, wait_s = np.zeros(servers), np.empty(len(arrival_s))
    for k, at in enumerate(arrival_s):
        start_s = max(at, free_s[k % servers])
        wait_s[k] = start_s - at
        free_s[k % servers] = start_s + service_s
    return wait_s


def tails(router: str, replicas: int, load: float, num_requests: int, seeds: Sequence[int]) -> np.ndarray:
    """Shares of replicas with at least i requests by seed, (num_seeds, MOST_QUEUED), prompts of exponential length."""
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(world(replicas, Path(folder)), num_requests)
    found = []
    for seed in seeds:
        table = requests(replicas, load, num_requests, seed, constant=False)
        replica, done_s, _ = run(cluster, table, router)
        found.append(shares(table, replica, done_s, replicas))
    return np.array(found)


def waits(routers: Sequence[str], replicas: int, load: float, num_requests: int, seeds: Sequence[int]) -> np.ndarray:
    """Mean waits by seed, seconds, (num_seeds, 1 + num_routers), prompts of one length: one queue, then each router."""
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(world(replicas, Path(folder)), num_requests)
    found = []
    for seed in seeds:
        table = requests(replicas, load, num_requests, seed, constant=True)
        counted = table.arrival_s >= WARMUP * table.arrival_s[-1]
        shared = one_queue_wait_s(table.arrival_s, replicas, MEAN_TOKENS * TOKEN_S)
        each = [shared, *(run(cluster, table, router)[2] for router in routers)]
        found.append([wait_s[counted].mean() for wait_s in each])
    return np.array(found)


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds, axis 0, and its standard error."""
    return values.mean(axis=0), values.std(axis=0, ddof=1) / math.sqrt(len(values))


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=128)
    parser.add_argument("--load", type=float, default=0.8)
    parser.add_argument("--requests", type=int, default=300_000)
    parser.add_argument("--seeds", type=int, default=10)
    given = parser.parse_args()
    seeds = range(given.seeds)
    laws = {"power-of-two": lambda i: given.load ** (2**i - 1), "random": lambda i: given.load**i}
    for router, law in laws.items():
        mean, error = mean_and_error(tails(router, given.replicas, given.load, given.requests, seeds))
        print(f"{router}, {given.replicas} replicas, load {given.load:g}: share with at least i requests")
        for i, (share, off) in enumerate(zip(mean, error, strict=True), start=1):
            expected = law(i)
            print(f"  i={i}  {share:.5f} +- {off:.5f}  theory {expected:.5f}  {(share - expected) / off:+.2f} errors")
    names = ("jsq", "power-of-two", "round-robin", "random")
    mean, error = mean_and_error(waits(names, given.replicas, given.load, given.requests, seeds))
    print(f"mean wait in service times, prompts of one length; M/D/1 {given.load / (2 * (1 - given.load)):.4f}")
    for name, wait_s, off in zip(("one queue (M/D/c)", *names), mean, error, strict=True):
        print(f"  {name:18s} {wait_s:.5f} +- {off:.5f}")


if __name__ == "__main__":
    main()
