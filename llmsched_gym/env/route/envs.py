"""The routing environments, single and native vector. The docstring of the single one is the public specification."""

from __future__ import annotations

from typing import Any

from gymnasium.vector import AutoresetMode

from llmsched_gym.config import route_config
from llmsched_gym.env.base import SimulatedEnv, check_render_mode
from llmsched_gym.env.route.core import RouteCore
from llmsched_gym.env.vector import SimulatedVectorEnv, together


class LLMRouteEnv(SimulatedEnv):
    """Route requests to the replicas of an LLM service: one step is one request.

    Requests enter as clients send them, turns of sessions when the answer before them has been read. Each is sent to
    one of several replicas at once; each replica is an engine of its own, on its own clock, whose batches a scheduler
    forms (``replica_scheduler``). What a request's utility is, and what of the engine is simulated, is as in
    :class:`~llmsched_gym.env.single.LLMSchedEnv`.

    **Step.** Step k begins when request k enters, at t_k: it arrives, or a replica that failed hands it back. It ends
    when the next one does. At equal times requests enter before batches end. The last step runs until the measured
    requests are resolved, or to the horizon.

    **Action.** ``Discrete(num_replicas)``: the replica. ``action_masks()`` leaves out those that are down, do other
    work (`roles`) or can never hold the request; where one of them is named, the request goes to the next one in order
    that may take it.

    **Observation** (``observation=``). ``"features"``, the default: a flat float32 Box of the request's entries and of
    each replica's, named in ``feature_names``. ``"replicas"``: Dict of ``request`` and ``replicas``, one row a replica.
    Or an object with ``space`` and ``observe(view)`` on a :class:`~llmsched_gym.cluster.router.RouterView`. Replicas
    *report*: at multiples of ``router_staleness_s`` each at its own phase; 0: always. What was dispatched since counts.
    ``mask_in_observation`` as in LLMSchedEnv.

    **Reward** (``reward=``). ``"slo"``: the changes of the measured requests' utilities in (t_k, t_k+1], tokens at the
    ends of batches; the undiscounted return over a resolved cohort is the sum of the final utilities. ``credit``,
    ``reward_scale`` and callables as in LLMSchedEnv.

    **Info**, **Start**, **End**: as in LLMSchedEnv; ``duration_s`` is t_k+1 - t_k, so that it can be 0.

    Args:
        suite: scenario to start from: cluster, hetero, disagg, or a TOML file of one with replicas.
        render_mode: None, "ansi", "rgb_array" or "human".
        fields: any field of :class:`~llmsched_gym.config.RouteConfig`; a bad one raises a one-line ``ConfigError``.
    """

    def __init__(self, suite: str = "cluster", render_mode: str | None = None, **fields: Any) -> None:
        check_render_mode(render_mode)
        self._stand_on(RouteCore(route_config(suite, **fields)), 0, render_mode)


class RouteMember(LLMRouteEnv):
    """One environment of a vector environment: all that a single one is, but they are stepped and reset together."""

    def __init__(self, core: RouteCore, index: int, render_mode: str | None) -> None:
        self._stand_on(core, index, render_mode)

    step = reset = get_state = set_state = together  # type: ignore[assignment]


class LLMRouteVectorEnv(SimulatedVectorEnv):
    """`num_envs` environments of :class:`LLMRouteEnv`, see :class:`~llmsched_gym.env.vector.SimulatedVectorEnv`.

    Args:
        num_envs: environments side by side.
        suite, fields: as of the single environment.
        render_mode, autoreset_mode, max_episode_steps, num_threads: as of ``SimulatedVectorEnv``.
    """

    def __init__(
        self,
        num_envs: int = 1,
        suite: str = "cluster",
        render_mode: str | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        num_threads: int = 1,
        **fields: Any,
    ) -> None:
        super().__init__(
            lambda n, threads: RouteCore(route_config(suite, **fields), n, threads),
            *(RouteMember, num_envs, render_mode, autoreset_mode, max_episode_steps, num_threads),
        )
