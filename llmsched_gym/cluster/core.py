"""A cluster's Python face: replicas of one episode behind a router, stepped decision by decision or run to the end."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llmsched_gym.cluster import kernels
from llmsched_gym.cluster.events import CHANGE, FORM, MORE, OVER, REFILL, ROOM, ROUTE, STALLED
from llmsched_gym.cluster.records import NODE
from llmsched_gym.cluster.records import ROUTE as ROUTE_RECORD
from llmsched_gym.cluster.router import (
    CompiledRouter,
    RouterView,
    check_replica,
    make_router,
    seed_dice,
)
from llmsched_gym.cluster.saved import NodeCopier, SavedCluster
from llmsched_gym.cluster.state import DECODES, Nodes, allocate, handle_of
from llmsched_gym.config import ROLES, ClusterScenario, ConfigError
from llmsched_gym.cost import Profile, load_profile
from llmsched_gym.engine import StalledScheduler
from llmsched_gym.engine.blocks import NUM_COLUMNS, load_blocks, table_size
from llmsched_gym.engine.core import MAX_IDLE_STEPS
from llmsched_gym.engine.load import load_table
from llmsched_gym.engine.records import NONE
from llmsched_gym.engine.saved import Copier
from llmsched_gym.engine.state import Replica, State, aligned, grow, make_handle
from llmsched_gym.engine.state import allocate as allocate_state
from llmsched_gym.engine.view import View, submit
from llmsched_gym.scheduler import install, make_scheduler
from llmsched_gym.workload import NOISE_BLOCK, RequestTable, noise_block

EVENTS = 1 << 18  # between two looks at the clock of a caller who wants to interrupt
PREFILL_CHUNK = 2048  # tokens of the batches by which a replica's rate of prompts is told
FIRST_ROOM = 1024  # requests that can wait at a replica, at first


class Cluster:
    """Replicas of one or more episodes on the compiled engine.

    Args:
        scenario: replicas, their profiles, limits, SLOs, noise.
        capacity: requests an environment can hold.
        num_envs: environments side by side.
        scheduler: who forms the batches of all replicas: a name or a scheduler; None: the scenario's. A plain Python
            one is made once for each replica if it is given by name.
        profiles: executing cost profiles, one a replica, instead of the scenario's.
        num_gaps, num_steps: room for recorded token gaps of an environment, and for the log of batches of a replica.
    """

    def __init__(
        self,
        scenario: ClusterScenario,
        capacity: int,
        *,
        num_envs: int = 1,
        scheduler: str | Any | None = None,
        profiles: Sequence[Profile] | None = None,
        num_gaps: int = 0,
        num_steps: int = 0,
    ) -> None:
        self.scenario = self._given = scenario
        self.num_envs, self.num_replicas = num_envs, scenario.num_replicas
        self.profiles = list(profiles or map(load_profile, scenario.profiles))
        distinct = list(dict.fromkeys(self.profiles))
        own = [load_profile(scenario.scheduler_profile) if scenario.scheduler_profile else p for p in distinct]
        self.replicas = [_replica(scenario, p, distinct.index(p)) for p in self.profiles]
        self.noisy = scenario.jitter > 0 or (scenario.straggler_share > 0 and scenario.straggler_factor != 1)
        self.state: State = allocate_state(
            num_envs,
            capacity,
            scenario,
            distinct,
            own,
            self.replicas,
            noise_size=2 * NOISE_BLOCK if self.noisy else 1,
            num_gaps=num_gaps,
            num_steps=num_steps,
            room=min(capacity, FIRST_ROOM),
        )
        reported = scenario.prefix_caching and scenario.router_staleness_s > 0.0
        changes = [sum(failure[0] == j for failure in scenario.replica_failures) for j in range(self.num_replicas)]
        self.nodes: Nodes = allocate(
            num_envs,
            self.num_replicas,
            capacity,
            num_changes=2 * max(changes),
            num_moving=capacity if "prefill" in scenario.roles else 0,
            num_records=max(table_size(r.num_kv_blocks) for r in self.replicas) if reported else 0,
            columns=NUM_COLUMNS,
        )
        self._point()
        self._record_gaps = num_gaps > 0
        self._seeds, self._noise_seeds = [0] * num_envs, [0] * num_envs
        self.decode_router = make_router(scenario.decode_router)
        if not isinstance(self.decode_router, CompiledRouter):
            raise ConfigError(f"decode_router: expected a compiled router, got {scenario.decode_router!r}")
        self.set_scheduler(scenario.replica_scheduler if scheduler is None else scheduler)

    def _point(self) -> None:
        """Refer to the arrays."""
        self.handle, self.nodes_handle = make_handle(self.state), handle_of(self.nodes)
        self._copier, self._node_copier = Copier(self.state), NodeCopier(self.nodes)

    def __getstate__(self) -> dict[str, Any]:
        derived = ("handle", "nodes_handle", "_copier", "_node_copier", "compiled")
        return {name: value for name, value in vars(self).items() if name not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.state = aligned(self.state)
        self.compiled = getattr(state["schedulers"][0], "kernel", None)
        self._point()

    def save(self, env: int = 0) -> SavedCluster:
        """Environment `env` as it is now, to be put back with :meth:`restore`; so are schedulers in Python."""
        saved = self._copier.take(env, self._noise_seeds[env])
        schedulers = [] if self.compiled is not None else [self.schedulers[k] for k in self.lanes(env)]
        return self._node_copier.take(env, saved, tuple(copy.deepcopy(schedulers)), self._seeds[env])

    def restore(self, saved: SavedCluster, env: int = 0, noise_seed: int | None = None) -> None:
        """Make environment `env` what `saved`, of a cluster of the same scenario and profiles, is.

        The noise on the batches to come is that which it would have been, or is drawn from `noise_seed`.
        """
        self.reserve(saved.saved.given.num_requests, saved.saved.given.num_gaps)
        while self.state.waiting.shape[1] < saved.room:
            self._make_room()
        self._copier.put(env, saved.saved)
        self._node_copier.put(env, saved)
        for k, scheduler in zip(self.lanes(env), copy.deepcopy(list(saved.schedulers)), strict=False):
            self.schedulers[k] = scheduler
            if hasattr(scheduler, "stand_at"):
                scheduler.stand_at(k, len(self.schedulers))
        self._seeds[env] = saved.seed
        self._noise_seeds[env] = saved.saved.noise_seed if noise_seed is None else noise_seed
        self._fill_noise(env)

    def set_scheduler(self, scheduler: str | Any) -> None:
        """Let `scheduler` form the batches of all replicas, by its admission rule, from the next reset on."""
        is_name = isinstance(scheduler, str)
        first = make_scheduler(scheduler) if is_name else scheduler
        admission = getattr(first, "admission", None)
        self.scenario = self._given.replace(admission=admission) if admission else self._given
        self.compiled = getattr(first, "kernel", None)
        alike = self.compiled is not None or not is_name
        lanes = self.num_envs * self.num_replicas
        self.schedulers = [first if alike or k == 0 else make_scheduler(scheduler) for k in range(lanes)]
        for k, one in enumerate(self.schedulers if self.compiled is None else ()):
            if hasattr(one, "stand_at"):  # a policy, which looks for a lane's features and actions in its own arrays
                if not is_name:
                    raise ConfigError("scheduler: expected the name of a policy, which is made for each replica")
                one.stand_at(k, lanes)

    def reserve(self, capacity: int, num_gaps: int = 0) -> None:
        """Make room for so many requests and recorded gaps an environment; if the arrays grow, the handles change."""
        if capacity > self.state.requests.shape[1] or num_gaps > self.state.gaps.shape[1]:
            room = self.state.waiting.shape[1]
            self.state = grow(self.state, capacity, num_gaps, room=room)
            fields = self.nodes._asdict()
            for name in ("replica_of", "before", "held", "moving"):
                old = fields[name]
                if old.shape[1] > 0:
                    fields[name] = np.zeros((len(old), max(capacity, old.shape[1])), old.dtype)
                    fields[name][:, : old.shape[1]] = old
            self.nodes = Nodes(**fields)
            self._point()

    def reset(self, table: RequestTable, env: int = 0) -> None:
        """Put environment `env` at time 0 before `table`."""
        scenario, state, nodes = self.scenario, self.state, self.nodes
        load_table(state, env, table, scenario, self.replicas, record_gaps=self._record_gaps)
        ends = [k for k, role in zip(self.lanes(env), scenario.roles, strict=False) if role != "prefill"]
        if ends:
            state.episodes[env].largest_request = state.sims["largest_request"][ends].max()
        self._copier.forget(env)
        self._node_copier.forget(env)
        self._seeds[env] = self._noise_seeds[env] = table.seed
        n = len(table)
        nodes.replica_of[env, :n] = NONE
        nodes.replica_of[env, : table.num_past] = table.session_id[: table.num_past] % self.num_replicas
        nodes.before[env, :n] = _before(table.session_id)
        nodes.moving[env] = np.zeros((), nodes.moving.dtype)
        nodes.routes[env] = np.zeros((), ROUTE_RECORD)
        route = nodes.routes[env]
        route.deciding = route.last_replica = NONE
        route.staleness_s = scenario.router_staleness_s
        seed_dice(nodes, env, table.seed)
        self.decode_router.install(nodes, env, DECODES)
        self._load_nodes(env)
        self._fill_noise(env)
        for k in self.lanes(env):
            install(self.schedulers[k], state, k, table.seed)
        kernels.start(self.handle, self.nodes_handle, env, self.num_replicas)

    def _load_nodes(self, env: int) -> None:
        scenario, nodes = self.scenario, self.nodes
        route = nodes.routes[env]
        nodes.changes_s[env] = np.inf
        for j in range(self.num_replicas):
            times = [t for r, *pair in scenario.failures_by_time() for t in pair if r == j]
            nodes.changes_s[env, j, : len(times)] = times
        for j, k in enumerate(self.lanes(env)):
            nodes.nodes[k] = np.zeros((), NODE)
            node, profile = nodes.nodes[k], self.state.sims[k].profile
            node.event_s, node.report = math.inf, -1
            node.change_s = nodes.changes_s[env, j, 0]
            node.role = ROLES.index(scenario.roles[j]) if scenario.roles else 0
            chunk = min(PREFILL_CHUNK, scenario.max_num_batched_tokens)
            node.tokens_per_s = chunk / self.state.own_linear_s[profile, chunk]
            nodes.reports[k] = np.zeros((), nodes.reports.dtype)
            nodes.reports[k].free_blocks = self.state.sims[k].total_blocks
        route.next_change_s = nodes.changes_s[env, :, 0].min()
        bytes_per_token = self.profiles[0].model.kv_bytes_per_token
        route.link_s_per_token = bytes_per_token / scenario.kv_link_bytes_per_s

    def lanes(self, env: int) -> range:
        """The indices of an environment's replicas among all lanes."""
        return range(env * self.num_replicas, (env + 1) * self.num_replicas)

    def _fill_noise(self, env: int) -> None:
        """Of each replica the noise block in use, and the one after it."""
        for k in self.lanes(env) if self.noisy else ():
            block = int(self.state.sims["num_batches"][k]) // NOISE_BLOCK
            for each in (block, block + 1):
                self._draw_noise(k, each)

    def _draw_noise(self, k: int, block: int) -> None:
        env, replica = divmod(k, self.num_replicas)
        start = (block % 2) * NOISE_BLOCK
        draws = noise_block(self.scenario, self._noise_seeds[env], block, replica)
        self.state.noise[k, start : start + NOISE_BLOCK] = draws

    def view(self, env: int = 0) -> RouterView:
        """What a router sees of the request that is to be routed."""
        return RouterView(self.state, self.nodes, env)

    def deciding(self, env: int = 0) -> int:
        """The request that is to be routed; -1: none."""
        return int(self.nodes.routes[env].deciding)

    def send(self, replica: int, env: int = 0) -> None:
        """Deliver the request that is to be routed."""
        r = self.deciding(env)
        if not kernels.send(self.handle, self.nodes_handle, env, r, replica):
            self._make_room()
            kernels.send(self.handle, self.nodes_handle, env, r, replica)

    def _make_room(self) -> None:
        """Let twice as many requests wait at a replica."""
        state = self.state
        self.state = grow(state, state.requests.shape[1], room=2 * state.waiting.shape[1])
        self._point()

    @property
    def loop_args(self) -> tuple[Any, bool]:
        """Who forms batches as compiled loops take it: a kernel, and whether it is to be called."""
        return self.compiled or _nobody().kernel, self.compiled is not None

    def help(self, env: int, code: int) -> bool:
        """Do what the loop of events has asked Python for; returns whether it is to go on."""
        route = self.nodes.routes[env]
        if code == FORM:
            self._form(env, int(route.lane))
        elif code == REFILL:
            k = int(route.lane)
            self._draw_noise(k, int(self.state.sims[k].num_batches) // NOISE_BLOCK + 1)
        elif code == ROOM:
            self.send(int(route.lane), env)
        elif code == CHANGE:
            self._change(env)
        elif code == STALLED:
            raise StalledScheduler(f"no batch in {MAX_IDLE_STEPS} steps although work is pending")
        else:
            return False
        return True

    def advance(self, env: int = 0, router: Any = None, *, to_the_end: bool = False, max_events: int = EVENTS) -> int:
        """Run on until a request is to be routed (ROUTE), the run is over (OVER) or `max_events` are done (MORE).

        A compiled `router` routes by itself. With `to_the_end` requests enter as long as any batch is under way.
        """
        loop, routes = kernels.advancing(), isinstance(router, CompiledRouter)
        decode = self.decode_router.kernel
        while True:
            code = int(
                loop(
                    self.handle,
                    self.nodes_handle,
                    env,
                    *self.loop_args,
                    router.kernel if routes else decode,
                    routes,
                    decode,
                    to_the_end,
                    MAX_IDLE_STEPS,
                    max_events,
                )
            )
            if self.help(env, code):
                continue
            if code == ROUTE and routes:
                refused = int(self.nodes.routes[env].lane)
                check_replica(router.name, refused, self.view(env).legal)  # raises
            return code

    def _form(self, env: int, k: int) -> None:
        """Let a Python scheduler or a policy form the batch of lane `k`, and begin it."""
        scheduler: Any = self.schedulers[k]
        if hasattr(scheduler, "decide"):
            scheduler.decide(_Lanes(self.state, self.handle), k)
        else:
            submit(self.state, scheduler.schedule(View(self.state, self.handle, k)), k)
        kernels.begin(self.handle, self.nodes_handle, env, k)

    def _change(self, env: int) -> None:
        """Replicas fail, or are back, as was planned."""
        nodes, route = self.nodes, self.nodes.routes[env]
        for j, k in enumerate(self.lanes(env)):
            node = nodes.nodes[k]
            if node.change_s > route.next_change_s:
                continue
            if node.is_down:
                kernels.come_back(self.handle, self.nodes_handle, env, k)
            else:
                kernels.hand_back(self.handle, self.nodes_handle, env, k)
                self._lose_cache(k)
            node.next_change += 1
            node.change_s = nodes.changes_s[env, j, min(node.next_change, nodes.changes_s.shape[2] - 1)]
        route.next_change_s = min(float(nodes.nodes[k].change_s) for k in self.lanes(env))

    def _lose_cache(self, k: int) -> None:
        sim = self.state.sims[k]
        sim.free_blocks = sim.total_blocks
        if sim.prefix_caching:
            sim.blocks_version += 1
            sim.free_row = 0
            load_blocks(self.state.blocks[k], int(sim.total_blocks), int(sim.max_num_seqs), int(sim.row_blocks))

    def run(self, router: Any, env: int = 0) -> None:
        """Run environment `env` to the end under a router, compiled or plain Python."""
        name = getattr(router, "name", type(router).__name__)
        if isinstance(router, CompiledRouter):
            router.install(self.nodes, env)
        elif hasattr(router, "reset"):
            router.reset(self._seeds[env])
        while True:
            code = self.advance(env, router, to_the_end=True)
            if code == OVER:
                return
            if code == ROUTE:
                view = self.view(env)
                self.send(check_replica(name, router.route(view), view.legal), env)
            else:
                assert code == MORE


class _Lanes(NamedTuple):
    """What policies need of an engine."""

    state: State
    handle: Any

    def view(self, k: int) -> View:
        """What a scheduler may see of lane `k`."""
        return View(self.state, self.handle, k)


def _replica(scenario: ClusterScenario, profile: Profile, index: int) -> Replica:
    blocks = scenario.num_kv_blocks or scenario.blocks(profile.num_kv_blocks)
    return Replica(blocks, scenario.max_num_seqs or profile.device.max_num_seqs, index)


def _before(session_id: np.ndarray) -> np.ndarray:
    """The request of the same session before each, by index; NONE for the first and for those of no session."""
    order = np.argsort(session_id, kind="stable")
    before = np.full(len(session_id), NONE, np.int32)
    sessions = session_id[order]
    follows = np.flatnonzero((sessions[1:] == sessions[:-1]) & (sessions[1:] >= 0)) + 1
    before[order[follows]] = order[follows - 1]
    return before


def _nobody() -> Any:
    """A compiled scheduler for where the loop wants one that it does not call."""
    return make_scheduler("sarathi")
