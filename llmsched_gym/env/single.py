"""The single environment. Its docstring is the public specification; docs/environment.md is made from it."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from llmsched_gym.config import ConfigError, env_config
from llmsched_gym.env.core import EnvCore
from llmsched_gym.env.features import FEATURES
from llmsched_gym.env.reward import TERMS
from llmsched_gym.env.spec import JsonSpec
from llmsched_gym.scheduler import install
from llmsched_gym.workload import check_seed

RENDER_MODES = ("ansi", "rgb_array", "human")


class LLMSchedEnv(JsonSpec, gym.Env):
    """Schedule the batches of one LLM inference engine: one step is one forward pass.

    Requests arrive with a prompt; the engine computes prompts in chunks (prefill) and then emits one token a pass
    (decode), many requests side by side in a hybrid batch. The action decides what goes into the next batch; the batch
    takes the time that the cost profile, or a GPU, says. A request attains if its first token comes within its TTFT SLO
    and every later token within its TBT SLO.

    **Action** (``action=``). ``"knobs"``, the default: MultiDiscrete over the settings of a packing kernel (token
    budget, cap on the predicted time, offset or margin by which decodes are deferred, order of prompts, holding back
    hopeless prompts, a limit on prompt length, and refusal where it is allowed). Every combination is legal; the
    reference schedulers are among them. ``"priority"``: Box, one score in [-1, 1] per visible slot; requests are packed
    greedily from the highest score, those below 0 are left out. ``"request"``: Discrete, add the request of one slot or
    close the batch (the last action); ``action_masks()`` says what is legal, and time passes on closing only. With
    ``action_repeat=n`` a knobs or priority action decides n batches.

    **Observation** (``observation=``). ``"features"``, the default: a flat float32 Box, each entry named in
    ``feature_names``. ``"slots"``: Dict of 64 request rows, a mask of those in use, and the features. Or an object with
    ``space`` and ``observe(view)``. Nothing in it depends on output lengths, later arrivals, the true rate or the
    hidden cost scale.

    **Reward** (``reward=``). ``"slo"``: with U_i = 1[nothing late so far, first token out] - beta * min(1, L_i /
    patience) and L_i request i's late seconds, a step pays the sum of the changes of U_i: +1 at an on-time first token,
    -1 at that request's first late token (when its deadline passes), -beta dL / patience in between, -beta for a
    refusal; times ``reward_scale``. The undiscounted return over a resolved cohort is the sum of the final utilities.
    ``credit="finish"`` pays each U_i at the end of its request. Or a callable on a
    :class:`~llmsched_gym.env.reward.Transition`.

    **Time.** Steps last different times: ``info["duration_s"]`` and ``info["discount"] = exp(-duration / tau_s)``. An
    empty batch moves the clock to the next arrival, or by ``idle_step_s`` while work is pending.

    **Start.** ``reset(seed=s)`` draws the requests that ``llmsched evaluate`` draws for seed s; without a seed the
    next seed comes from ``np_random``. Continuing episodes begin with a random backlog.

    **End.** Continuing episodes (the default) are truncated at ``horizon_s``. With ``num_requests`` the episode
    terminates when all measured requests are resolved, and is truncated ``drain_s`` after the last one's arrival.

    Args:
        suite: scenario to start from: default, paper, drift, burst, tenants.
        render_mode: None, "ansi", "rgb_array" or "human".
        fields: any field of :class:`~llmsched_gym.config.EnvConfig`; a bad one raises a one-line ``ConfigError``.
    """

    metadata: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 20}  # noqa: RUF012

    def __init__(self, suite: str = "default", render_mode: str | None = None, **fields: Any) -> None:
        if render_mode is not None and render_mode not in RENDER_MODES:
            raise ConfigError(f"render_mode: expected one of {', '.join(RENDER_MODES)}, got {render_mode!r}")
        self.config = env_config(suite, **fields)
        self.render_mode = render_mode
        self.core = EnvCore(self.config, 1)
        self.action_space = self.core.action_space
        self.observation_space = self.core.observation_space
        self._viewer: Any = None
        self._scheduler: Any = None  # whose settings the engine holds
        self._next_scheduler: Any = None  # who forms the next step's batches, see decide_by

    @property
    def feature_names(self) -> list[str]:
        """Names of the entries of the features observation."""
        return [feature.name for feature in FEATURES]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        seed = None if seed is None else check_seed(seed)
        super().reset(seed=seed)
        episode = int(self.np_random.integers(2**62)) if seed is None else seed
        self.core.reset(0, episode)
        self._scheduler = self._next_scheduler = None
        if self.render_mode == "human":
            self.render()
        return self.core.observation(0), {"seed": episode, "qps": self._qps()}

    def _qps(self) -> float:
        """The true rate, for logs: an agent is not to use it."""
        table = self.core.tables[0]
        return float(table.qps) if table is not None else float("nan")

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        core = self.core
        scheduler = self._next_scheduler or getattr(action, "scheduler", None)
        if scheduler is not None:
            self._next_scheduler = None
            return self.step_scheduler(scheduler)
        if self._scheduler is not None:
            self._install(None)
        core.actions[0] = action
        core.step()
        return self._outcome()

    def decide_by(self, scheduler: Any) -> None:
        """Let a scheduler form the batches of the next step, whatever action comes with it through the wrappers."""
        self._next_scheduler = scheduler

    def _install(self, scheduler: Any) -> None:
        table = self.core.tables[0]
        install(scheduler, self.core.engine.state, 0, table.seed if table is not None else 0)
        self._scheduler = scheduler

    def step_scheduler(self, scheduler: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step whose batches, `action_repeat` of them, are formed by a scheduler instead of an action."""
        core = self.core
        if scheduler is not self._scheduler:
            self._install(scheduler)
        sim = core.engine.state.sims[0]
        start_s, resolved = float(sim.clock_s), int(sim.num_resolved)
        for _ in range(self.config.action_repeat):
            core.engine.step(scheduler)
            core.reopen(0)
            if core.engine.is_over(0):
                break
        core.settle(0, start_s, resolved)
        return self._outcome()

    def _outcome(self) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward, duration_s, discount, terminated, truncated, *terms = self.core.arrays.outcomes[0].tolist()
        info = {"duration_s": duration_s, "discount": discount, "reward_terms": dict(zip(TERMS, terms, strict=True))}
        if self.render_mode == "human":
            self.render()
        return self.core.observation(0), reward, terminated != 0.0, truncated != 0.0, info

    def action_masks(self) -> np.ndarray:
        """Legal actions, bool: shape (65,) for request actions, (sum of choices,) for knobs."""
        return self.core.action_masks()[0]

    def render(self) -> Any:
        if self.render_mode is None:
            gym.logger.warn("render() needs a render_mode: ansi, rgb_array or human")
            return None
        if self._viewer is None:
            from llmsched_gym.env.render import Viewer

            self._viewer = Viewer(self.core)
        return self._viewer.render(self.render_mode)

    def close(self) -> None:
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None
