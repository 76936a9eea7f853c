"""gymnasium's vector wrappers on the native vector environment, and its statistics of episodes, beside the truth.

    python benchmarks/peers/gymnasium_wrappers.py

needs nothing but the package; prints what it ran with and one line a check. Exit status 1 if one is wrong.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

import llmsched_gym

NUM_ENVS, STEPS = 3, 400
FIELDS: dict[str, Any] = {"horizon_s": 5.0, "max_backlog": 8}


def versions(*names: str) -> str:
    """Python, this package and its peers."""
    found = [f"{name} {importlib.metadata.version(name)}" for name in names]
    return ", ".join([f"python {platform.python_version()}", f"llmsched-gym {llmsched_gym.__version__}", *found])


def report(checks: dict[str, Any]) -> int:
    """Print each check with what was found and what is right, or what it raised; the exit status.

    A check is the pair of them, or a function that returns it.
    """
    wrong = 0
    for name, check in checks.items():
        try:
            found, right = check() if callable(check) else check
        except Exception as error:
            wrong += 1
            print(f"WRONG  {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        same = np.allclose(found, right, rtol=1e-5, atol=1e-6) if np.shape(found) == np.shape(right) else False
        wrong += not same
        print(f"{'right' if same else 'WRONG'}  {name}" + ("" if same else f": {found}, expected {right}"))
    return int(wrong > 0)


def vector(mode: str) -> Any:
    return gym.make_vec("LLMSched-v0", NUM_ENVS, vectorization_mode="vector_entry_point", autoreset_mode=mode, **FIELDS)


def true_episodes(mode: str) -> list[tuple[float, int]]:
    """Return and length of every episode that ends within STEPS calls, from single environments."""
    episodes, seen = [], STEPS
    for i in range(NUM_ENVS):
        env = gym.make("LLMSched-v0", **FIELDS).unwrapped
        env.reset(seed=i)
        total, length, calls = 0.0, 0, 0
        while calls < seen:
            _, reward, terminated, truncated, _ = env.step(np.zeros(7, np.int64))
            total, length, calls = total + reward, length + 1, calls + 1
            if terminated or truncated:
                episodes.append((calls, i, total, length))
                env.reset()
                total, length = 0.0, 0
                calls += mode == "next_step"  # the reset takes a call of its own
    return [(total, length) for _, _, total, length in sorted(episodes)]


def statistics(mode: str) -> list[tuple[float, int]]:
    """The same from RecordEpisodeStatistics."""
    envs = gym.wrappers.vector.RecordEpisodeStatistics(vector(mode))
    envs.reset(seed=0)
    found = []
    for _ in range(STEPS):
        *_, info = envs.step(np.zeros((NUM_ENVS, 7), np.int64))
        if "episode" in info:
            for i in np.flatnonzero(info["_episode"]):
                found.append((float(info["episode"]["r"][i]), int(info["episode"]["l"][i])))
    return found


def wrapped(wrap: Callable[[Any], Any], expect: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """A figure of all observations under a wrapper, and of the plain ones after `expect`."""
    plain, other, sums = vector("next_step"), wrap(vector("next_step")), [0.0, 0.0]
    observations, seen = plain.reset(seed=0)[0], other.reset(seed=0)[0]
    for _ in range(STEPS):
        sums[0] += float(np.abs(np.asarray(seen, np.float64)).sum())
        sums[1] += float(np.abs(np.asarray(expect(observations), np.float64)).sum())
        actions = np.zeros((NUM_ENVS, 7), np.int64)
        observations, seen = plain.step(actions)[0], other.step(actions)[0]
    return sums[0], sums[1]


class Normaliser:
    """Running mean and variance as Welford has them, for comparison."""

    def __init__(self) -> None:
        self.rms = gym.wrappers.utils.RunningMeanStd(shape=(llmsched_features(),))

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        self.rms.update(observations)
        return (observations - self.rms.mean) / np.sqrt(self.rms.var + 1e-8)


def llmsched_features() -> int:
    from llmsched_gym.env.features import NUM_FEATURES

    return NUM_FEATURES


def main() -> int:
    print(versions("gymnasium", "numpy"))
    vectors = gym.wrappers.vector
    checks: dict[str, Any] = {
        "NormalizeObservation": wrapped(vectors.NormalizeObservation, Normaliser()),
        "FlattenObservation": wrapped(vectors.FlattenObservation, lambda o: o),
        "RescaleObservation": wrapped(lambda e: vectors.RescaleObservation(e, -1.0, 1.0), lambda o: 2.0 * o - 1.0),
        "DtypeObservation": wrapped(lambda e: vectors.DtypeObservation(e, np.float16), lambda o: o.astype(np.float16)),
    }
    # before 1.4 these statistics are of next_step alone: in another mode they drop each later episode's first step
    counts = importlib.metadata.version("gymnasium") >= "1.4"
    for mode in ("next_step", "same_step") if counts else ("next_step",):
        checks[f"RecordEpisodeStatistics, {mode}"] = (statistics(mode), true_episodes(mode))
    return report(checks)


if __name__ == "__main__":
    sys.exit(main())
