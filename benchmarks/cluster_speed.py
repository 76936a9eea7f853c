"""What a request costs behind a router: the loop of events, the router's look at all replicas, memory, environments.

    python -m benchmarks.cluster_speed [--replicas 1,4,16,64] [--requests 1000000] [--load 0.6] [--router NAME]
                                       [--scheduler slai] [--envs 1,16] [--steps 20000]

Replicas: conversations (`chat`, contexts of 2,400 tokens in the mean, 440 tokens of output, prefix caching) at a share
of the fluid capacity, as many requests for each replica whatever their number; `--requests` is of the last number.
Each number runs in a process of its own. Seconds are of the processor, so that others on the machine disturb less.
Environments: LLMRoute-v0 under random replicas, alone and side by side. Prints Markdown.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median
from typing import Any

import gymnasium as gym

import llmsched_gym  # noqa: F401  registers the environments
from benchmarks import whole
from llmsched_gym.cluster import Cluster
from llmsched_gym.cluster.events import MORE, OVER, ROUTE
from llmsched_gym.cluster.kernels import look_again
from llmsched_gym.config import ClusterScenario, ConfigError, scenario
from llmsched_gym.fluid import fluid_capacity
from llmsched_gym.registry import make_router
from llmsched_gym.scheduler import PolicyError
from llmsched_gym.text import counted, table
from llmsched_gym.workload import make_table

LOOKS, REPEATS = 40, 200  # moments at which the router's look is timed, and how often at each


def memory_mb() -> float:
    """The most that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure(num_replicas: int, num_requests: int, load: float, router: str, scheduler: str) -> dict[str, float]:
    """Processor time of a whole run, of one look at all replicas, and memory."""
    one = scenario("chat", num_requests=num_requests, warmup_s=0.0, arrivals_continue=False)
    qps = load * fluid_capacity(one).qps * num_replicas
    world = ClusterScenario(**one.replace(qps=qps).to_dict(), num_replicas=num_replicas)
    routes = make_router(router)
    small = make_table(world.replace(num_requests=200), 0)
    warm = Cluster(world, len(small), scheduler=scheduler)
    warm.reset(small)
    warm.run(routes)  # loads code

    requests = make_table(world, 0)
    cluster = Cluster(world, len(requests), scheduler=scheduler)
    cluster.reset(requests)
    before_mb = memory_mb()
    start = time.process_time()
    cluster.run(routes)
    cpu_s = time.process_time() - start
    after_mb, num_batches = memory_mb(), int(cluster.state.sims["num_batches"].sum())
    cached = cluster.state.requests[0]["num_cached_tokens"].sum() / requests.prompt_tokens.sum()
    return {
        "replicas": num_replicas,
        "requests": len(requests),
        "cpu_s": cpu_s,
        "request_us": 1e6 * cpu_s / len(requests),
        "look_us": look_us(cluster, requests, routes),
        "batch_us": 1e6 * cpu_s / num_batches,
        "hit_rate": float(cached),
        "before_mb": before_mb,
        "grown_mb": after_mb - before_mb,
    }


def look_us(cluster: Cluster, requests: Any, routes: Any) -> float:
    """Microseconds that filling what the router sees takes, the median over moments of a run's first part."""
    cluster.reset(requests)
    routes.install(cluster.nodes, 0)
    found: list[float] = []
    while len(found) < LOOKS:
        code = cluster.advance(0, routes, max_events=500 * cluster.num_replicas)
        if code == MORE:
            code = cluster.advance(0, None)
        if code == OVER:
            break
        assert code == ROUTE
        start = time.process_time()
        for _ in range(REPEATS):
            look_again(cluster.handle, cluster.nodes_handle, 0)
        found.append(1e6 * (time.process_time() - start) / REPEATS)
        cluster.send(int(cluster.view().legal.argmax()))
    return median(found)


def env_steps_per_s(num_envs: int, steps: int) -> float:
    """Decisions per second of processor time, of all environments together, under random replicas."""
    if num_envs == 1:
        env: Any = gym.make("LLMRoute-v0")
    else:
        env = gym.make_vec("LLMRoute-v0", num_envs=num_envs, vectorization_mode="vector_entry_point")
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(64)]
    env.reset(seed=0)
    calls = max(64, steps // num_envs)
    for i in range(calls // 4):
        env.step(actions[i % 64])
    start = time.process_time()
    for i in range(calls):
        over = env.step(actions[i % 64])[2:4]
        if num_envs == 1 and any(over):
            env.reset()
    return calls * num_envs / (time.process_time() - start)


def replicas_text(found: list[dict[str, float]]) -> str:
    """A line for each number of replicas; the loop is what is left without the look."""
    lines = []
    for f in found:
        loop = f["request_us"] - f["look_us"]
        times = [
            f"{f['cpu_s']:.1f}",
            *(f"{us:.1f}" for us in (f["request_us"], f["look_us"], loop)),
            f"{f['batch_us']:.2f}",
        ]
        memory = [f"{f['before_mb']:,.0f}", f"{f['grown_mb']:+,.0f}"]
        lines.append([f"{f['replicas']:g}", f"{f['requests']:,.0f}", *times, f"{100 * f['hit_rate']:.0f}", *memory])
    head = ["replicas", "requests", "CPU s", "us/request", "its look", "the loop", "us/batch", "hits, %", "MB", "grown"]
    return table(head, lines, 0)


def numbers(text: str) -> list[int]:
    """Whole numbers from 1 on."""
    found = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in found):
        raise argparse.ArgumentTypeError(f"expected whole numbers >= 1 with commas between, got {text!r}")
    return [int(part) for part in found]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster_speed", description=__doc__.split("\n\n")[0])
    parser.add_argument("--replicas", type=numbers, default=[1, 4, 16, 64], help="how many, by default 1,4,16,64")
    parser.add_argument("--requests", type=whole, default=1_000_000, help="of the last number of replicas")
    parser.add_argument("--load", type=float, default=0.6, help="share of the fluid capacity")
    parser.add_argument("--router", default="prefix-affinity")
    parser.add_argument("--scheduler", default="slai")
    parser.add_argument("--envs", type=numbers, default=[1, 16], help="environments side by side, by default 1,16")
    parser.add_argument("--steps", type=whole, default=20_000, help="decisions of a number of environments")
    args = parser.parse_args(argv)
    found = []
    try:
        for number in args.replicas:
            settings = (max(1, args.requests * number // args.replicas[-1]), args.load, args.router, args.scheduler)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
                found.append(alone.submit(measure, number, *settings).result())
            print(f"{counted(number, 'replica')} done", file=sys.stderr, flush=True)
    except (ConfigError, PolicyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(replicas_text(found) + "\n")
    rates = [[f"{number:,}", f"{env_steps_per_s(number, args.steps):,.0f}"] for number in args.envs]
    print(table(["environments", "decisions per CPU second"], rates, 0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
