"""From a torch model to a policy folder: ``python -m agents.export MODEL.zip FOLDER`` for SB3 zips of one's own.

And back: :func:`load_actor` lets a training go on from a folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llmsched_gym.agents.networks import ACTIVATIONS, Normaliser, RowsExtractor
from llmsched_gym.agents.options import fail_in_one_line
from llmsched_gym.config import EnvConfig
from llmsched_gym.engine import Engine
from llmsched_gym.env.features import NUM_FEATURES
from llmsched_gym.policies import LoadedPolicy, PolicySpec, write_folder
from llmsched_gym.policies.folder import read_folder, spec_for
from llmsched_gym.scheduler import PolicyError, install
from llmsched_gym.workload import RequestTable


def export(policy: Any, config: EnvConfig, **fields: Any) -> tuple[PolicySpec, dict[str, np.ndarray]]:
    """Spec and tensors of an SB3 policy trained on `config`; `fields` (training, decision_s) go into the spec."""
    architecture, tensors = _actor(policy)
    arrays = {name: tensor.detach().cpu().numpy().astype(np.float32) for name, tensor in tensors.items()}
    return spec_for(config, architecture, **fields), arrays


def load_actor(policy: Any, config: EnvConfig, folder: str | Path) -> None:
    """Give an SB3 policy for `config` the decisions of a policy folder; the critic, which folders lack, stays as it is.

    Raises :class:`PolicyError` with one line if the folder's actions, observations or network are others.
    """
    spec, arrays = read_folder(folder)
    architecture, tensors = _actor(policy)
    wanted = spec_for(config, architecture)
    for name in ("action", "observation", "architecture"):
        theirs, ours = dict(getattr(spec, name)), dict(getattr(wanted, name))
        for key in sorted({*theirs, *ours}, key=lambda key: (key != "kind", key)):
            if theirs.get(key) != ours.get(key):
                differs = f"{name}.{key} is {theirs.get(key)!s:.60}, this training's {ours.get(key)!s:.60}"
                raise PolicyError(f"policy {str(folder)!r}: {differs}")
    for name, tensor in tensors.items():
        if name not in arrays or arrays[name].shape != tuple(tensor.shape):
            got = arrays[name].shape if name in arrays else None
            raise PolicyError(f"policy {str(folder)!r}: {name} is {got}, this training's network {tuple(tensor.shape)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(arrays[name]))


def _actor(policy: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Architecture and weights of what decides, by their names in a folder; the tensors are the policy's own."""
    return _rows(policy) if isinstance(policy.features_extractor, RowsExtractor) else _mlp(policy)


def _linear(name: str, layer: nn.Linear) -> dict[str, torch.Tensor]:
    found = {f"{name}.weight": layer.weight}
    return found if layer.bias is None else found | {f"{name}.bias": layer.bias}


def _normaliser(module: Any) -> dict[str, torch.Tensor]:
    if isinstance(module, Normaliser):
        return {"normalise.mean": module.mean, "normalise.scale": module.scale}
    return {"normalise.mean": torch.zeros(NUM_FEATURES), "normalise.scale": torch.ones(NUM_FEATURES)}


def _mlp(policy: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    modules = list(policy.mlp_extractor.policy_net)
    layers = [m for m in modules if isinstance(m, nn.Linear)]
    kinds = {type(m) for m in modules} - {nn.Linear} or {nn.Tanh}
    names = [name for name, cls in ACTIVATIONS.items() if {cls} == kinds]
    if not names or not isinstance(policy.action_net, nn.Linear):
        raise PolicyError("model: expected an MLP with tanh or relu between its layers")
    tensors = _normaliser(policy.features_extractor) | _linear("out", policy.action_net)
    for i, layer in enumerate(layers):
        tensors |= _linear(f"hidden.{i}", layer)
    return {"kind": "mlp", "layers": len(layers), "activation": names[0]}, tensors


def _rows(policy: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    body, head = policy.features_extractor, policy.action_net
    tensors = _normaliser(body.normalise)
    for name in ("row", "context", "mix", "pool"):
        tensors |= _linear(name, getattr(body, name))
    for i, (qkv, mixed) in enumerate(zip(body.qkv, body.mixed, strict=True)):
        tensors |= _linear(f"attention.{i}.qkv", qkv) | _linear(f"attention.{i}.out", mixed)
    if hasattr(head, "row"):
        for name in ("row", "pool", "out"):
            tensors |= _linear(f"score.{name}", getattr(head, name))
        if head.close is not None:
            tensors |= _linear("out", head.close)
    else:
        tensors |= _linear("out", head.out)
    return {"kind": "rows", **body.settings}, tensors


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
    prompts = np.linspace(20, 200, n).astype(np.int32)
    table = RequestTable(
        arrival_s=np.concatenate([np.zeros(running), np.full(waiting, 0.2)]),
        prompt_tokens=prompts,
        output_tokens=np.full(n, 3000, np.int32),
        slo_class=(np.arange(n) % 20 != 0).astype(np.int8),
        ttft_slo_s=np.full(n, 1e6),
        tbt_slo_s=np.full(n, 0.5),
        length_hint=np.full(n, np.nan),
        session_id=np.full(n, -1, np.int64),
        cohort_start=0,
        cohort_stop=n,
        qps=1.0,
        cost_scale=1.0,
        seed=0,
    )
    from llmsched_gym.scheduler import make_scheduler

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    return fail_in_one_line(lambda: _convert(argv))


def _convert(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="SB3 zip of PPO or MaskablePPO; only one you trust: it holds pickles")
    parser.add_argument("folder", help="policy folder to write")
    parser.add_argument("--repeat", type=int, default=1, help="action_repeat it was trained with")
    args = parser.parse_args(argv)
    from llmsched_gym.policies.sb3_zip import _config, _load

    model = _load(args.model)
    config = _config(model, {"repeat": args.repeat, "token_budget": 512})
    print(finish(args.folder, *export(model.policy, config, training={"source": Path(args.model).name})))


if __name__ == "__main__":
    from llmsched_gym.agents import export as module  # under its one name, not this copy of it

    sys.exit(module.main())
