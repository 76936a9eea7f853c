"""The single environment. Its docstring is the public specification; docs/environment.md is made from it."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from llmsched_gym.config import env_config
from llmsched_gym.env.base import NO_EPISODE, SimulatedEnv, check_render_mode
from llmsched_gym.env.core import EnvCore
from llmsched_gym.scheduler import install


class LLMSchedEnv(SimulatedEnv):
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
    hidden cost scale. With ``mask_in_observation="rllib"``, ``"torchrl"``, ``"tianshou"`` or two names it is a Dict
    that has the mask of legal actions beside it, under the names where these look.

    **Reward** (``reward=``). ``"slo"``: with U_i = 1[nothing late so far, first token out] - beta * min(1, L_i /
    patience) and L_i request i's late seconds, a step pays the sum of the changes of U_i: +1 at an on-time first token,
    -1 at that request's first late token (when its deadline passes), -beta dL / patience in between, -beta for a
    refusal; times ``reward_scale``. The undiscounted return over a resolved cohort is the sum of the final utilities.
    ``credit="finish"`` pays each U_i at the end of its request. Or a callable on a
    :class:`~llmsched_gym.env.reward.Transition`.

    **Info.** The same keys at every reset and step, all NumPy scalars: see the table. ``episode_metrics=True`` adds the
    episode's figures, nan until its end. ``episode_metrics()`` has them at any time, ``reward_terms()`` the reward's.

    **Time.** Steps last different times: ``info["duration_s"]`` and ``info["discount"] = exp(-duration / tau_s)``. An
    empty batch moves the clock to the next arrival, or by ``idle_step_s`` while work is pending.

    **Start.** ``reset(seed=s)`` draws the requests that ``llmsched evaluate`` draws for seed s; without a seed the
    next seed comes from ``np_random``. Continuing episodes begin with a random backlog. ``options={"qps": rate}`` fixes
    the mean arrival rate of the episode that begins, as a curriculum needs it; it is the only option.

    **End.** Continuing episodes (the default) are truncated at ``horizon_s``. With ``num_requests`` the episode
    terminates when all measured requests are resolved, and is truncated ``drain_s`` after the last one's arrival.
    A step beyond the end raises ``gymnasium.error.ResetNeeded``.

    Args:
        suite: scenario to start from: default, paper, drift, burst, tenants, tight, chat, agents, or a TOML file.
        render_mode: None, "ansi", "rgb_array" or "human".
        fields: any field of :class:`~llmsched_gym.config.EnvConfig`; a bad one raises a one-line ``ConfigError``.
    """

    def __init__(self, suite: str = "default", render_mode: str | None = None, **fields: Any) -> None:
        check_render_mode(render_mode)
        self._stand_on(EnvCore(env_config(suite, **fields)), 0, render_mode)

    def restart(self, seed: int | None, qps: float | None = None) -> None:
        """What :meth:`reset` does to the state."""
        super().restart(seed, qps)
        self._scheduler = self._next_scheduler = None

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One batch, or `action_repeat` of them, under `action`. ResetNeeded where no episode is under way."""
        if self._is_over:
            raise gym.error.ResetNeeded(NO_EPISODE)
        scheduler = self._next_scheduler or getattr(action, "scheduler", None)
        if scheduler is not None:
            self._next_scheduler = None
            return self.step_scheduler(scheduler)
        if self._scheduler is not None:
            self._install(None)
            self.core.reopen(0)
        self.core.act(action)
        return self._outcome()

    def decide_by(self, scheduler: Any) -> None:
        """Let a scheduler form the batches of the next step, whatever action comes with it through the wrappers."""
        self._next_scheduler = scheduler

    def _install(self, scheduler: Any) -> None:
        install(scheduler, self.core.engine.state, 0, int(self.core.seeds[0]))
        self._scheduler = scheduler

    def step_scheduler(self, scheduler: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step whose batches, `action_repeat` of them, are formed by a scheduler instead of an action."""
        if self._is_over:
            raise gym.error.ResetNeeded(NO_EPISODE)
        core = self.core
        if scheduler is not self._scheduler:
            self._install(scheduler)
        state = core.engine.state
        start_s, resolved = float(state.sims[0].clock_s), int(state.episodes[0].num_resolved)
        for _ in range(self.config.action_repeat):
            core.engine.step(scheduler)
            knobs, memory = state.knobs[0].copy(), state.memory[0].copy()  # the scheduler's, for its next batch
            core.reopen(0)
            state.knobs[0], state.memory[0] = knobs, memory
            core.noticed(0)
            if core.engine.is_over(0):
                break
        core.settle(0, start_s, resolved)
        return self._outcome()
