"""The environments agents train in: episodes are drawn from the training seeds, and the whole state can be saved."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from llmsched_gym.agents.seeds import SeededVectorEnv
from llmsched_gym.env.core import EnvCore
from llmsched_gym.env.sb3 import LLMSchedVecEnv
from llmsched_gym.workload import make_table


class TrainingEnv(LLMSchedVecEnv):
    """`num_envs` environments on episodes of the training seeds, chosen by `seed`.

    The state of all between two steps is a dict of arrays (:meth:`save`), which a checkpoint keeps without a pickle; an
    environment of the same settings goes on from it as if nothing had happened (:meth:`restore`).
    """

    def __init__(self, num_envs: int, suite: str, seed: int, **fields: Any) -> None:
        # The spaces need no model: it is loaded once.
        super().__init__(1, suite, **{**fields, "backend": "simulated", "model": None, "count_host_time": False})
        self.env: SeededVectorEnv = SeededVectorEnv(num_envs, suite, autoreset_mode="same_step", **fields)
        self.num_envs = num_envs
        self._returns, self._lengths = np.zeros(num_envs), np.zeros(num_envs, np.int64)
        self.start_over(seed)

    def start_over(self, seed: int) -> None:
        """Choose episodes by `seed` from the next reset on."""
        self.env.episodes = np.random.default_rng([seed, 1])
        self._seeds = [None] * self.num_envs
        self._options = [{} for _ in range(self.num_envs)]

    def save(self) -> dict[str, Any]:
        return save_core(self.env.core) | {
            "returns": self._returns.copy(),
            "lengths": self._lengths.copy(),
            "episodes": json.dumps(self.env.episodes.bit_generator.state),
        }

    def restore(self, state: dict[str, Any]) -> None:
        restore_core(self.env.core, state)
        self.env._is_over[:], self.env._any_over = False, False
        self._returns[:], self._lengths[:] = state["returns"], state["lengths"]
        self.env.episodes.bit_generator.state = json.loads(state["episodes"])


def save_core(core: EnvCore) -> dict[str, Any]:
    """The state of all environments of a core, each in an episode, as arrays."""
    tables = [table.seed for table in core.tables if table is not None]
    return {
        "arrays": {name: array.copy() for name, array in core.engine.state._asdict().items()},
        "outputs": {name: array.copy() for name, array in core.arrays._asdict().items()},
        "tables": np.array(tables),
    }


def restore_core(core: EnvCore, state: dict[str, Any]) -> None:
    """Let a core of the same settings go on from what :func:`save_core` made."""
    core.engine.reserve(state["arrays"]["requests"].shape[1], state["arrays"]["gaps"].shape[1])
    for arrays, saved in ((core.engine.state, state["arrays"]), (core.arrays, state["outputs"])):
        for name, array in arrays._asdict().items():
            array[...] = saved[name].view(array.dtype)
    for env, seed in enumerate(state["tables"].tolist()):
        core.tables[env] = table = make_table(core.config, seed)
        core.seeds[env], core.qps[env] = seed, table.qps
        core.engine.adopt(env, seed)
