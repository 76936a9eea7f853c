"""Seconds that one decision of a policy takes, measured before its folder is written."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.config import EnvConfig
from llmsched_gym.engine import Engine
from llmsched_gym.policies import LoadedPolicy, PolicySpec, write_folder
from llmsched_gym.scheduler import install
from llmsched_gym.workload import RequestTable


def measure_decision_s(scheduler: Any, decisions: int = 2000) -> dict[str, float]:
    """Seconds that forming one batch takes with 128 running and 256 waiting requests: mean, p50, p99."""
    engine = _busy_engine(scheduler.config, running=128, waiting=256)
    install(scheduler, engine.state)
    times_s = np.zeros(decisions)
    for i in range(decisions):
        scheduler.reset(0)  # drop what action_repeat would reuse
        start = time.perf_counter()
        scheduler.decide(engine)
        times_s[i] = time.perf_counter() - start
    times_s = times_s[decisions // 10 :]
    p50, p99 = np.quantile(times_s, [0.5, 0.99])
    return {"mean_s": float(times_s.mean()), "p50_s": float(p50), "p99_s": float(p99)}


def _busy_engine(config: EnvConfig, running: int, waiting: int) -> Engine:
    """An engine whose state has so many requests in either queue."""
    n = running + waiting
    table = RequestTable.of(
        np.concatenate([np.zeros(running), np.full(waiting, 0.2)]),
        np.linspace(20, 200, n).astype(np.int32),
        3000,
        slo_class=np.arange(n) % 20 != 0,
        ttft_slo_s=1e6,
        tbt_slo_s=0.5,
        qps=1.0,
    )
    from llmsched_gym.registry import make_scheduler

    world = dataclasses.replace(config, jitter=0.0, num_requests=n, warmup_s=0.0)
    engine = Engine(world, n)
    engine.reset(table)
    filler = make_scheduler("sarathi[budget=8192]")
    install(filler, engine.state)
    for _ in range(200):
        sim = engine.state.sims[0]
        if sim.num_running == running and sim.num_waiting == waiting:
            break
        engine.step(filler)
    return engine


def finish(folder: str | Path, spec: PolicySpec, tensors: dict[str, np.ndarray]) -> Path:
    """Write the folder with its decision time measured."""
    measured = measure_decision_s(LoadedPolicy(spec, tensors))
    training = {**spec.training, "decision_time": measured}
    return write_folder(folder, dataclasses.replace(spec, decision_s=measured["p50_s"], training=training), tensors)
