"""The engine's Python face: hold the state, load requests, step or run a scheduler, execute on any backend."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from llmsched_gym.config import ConfigError, Scenario
from llmsched_gym.cost import Profile, load_profile
from llmsched_gym.engine import run as kernels
from llmsched_gym.engine.load import append_request, load_table
from llmsched_gym.engine.places import cached_blocks
from llmsched_gym.engine.saved import Copier, Saved
from llmsched_gym.engine.state import Replica, State, aligned, allocate, grow, make_handle
from llmsched_gym.engine.told import ScheduledBatch, apply_told, tell
from llmsched_gym.engine.view import Batch, View, has_arrived, submit
from llmsched_gym.workload import NOISE_BLOCK, Request, RequestTable, noise_block

RUN_CHUNK = 1 << 14  # steps between two looks at the clock of a caller who wants to interrupt
MAX_IDLE_STEPS = 1_000_000


class StalledScheduler(RuntimeError):
    """A scheduler returns empty batches for ever while work is pending and nobody else will arrive."""


class Execution(NamedTuple):
    """What a backend reports of one batch.

    `ended` are requests whose token in this batch was their last, whatever their `output_tokens` said.
    """

    duration_s: float  # measured
    tokens: dict[int, int] | None = None  # by request, if it is a real one
    ended: Collection[int] = ()


class Backend(Protocol):
    """Executes batches: the simulated device, a GPU, or a recording.

    Optional attributes: ``reset(table)`` (called before each run), ``num_kv_blocks`` (what its memory holds; counts
    where the scenario names no number), ``fill(request, position, place)`` (called behind reset where the cache begins
    with what is past: int32 arrays, the block at `position` of `request`, whose last token is its own, is to lie at
    `place`).
    """

    def execute(self, batch: ScheduledBatch) -> Execution:
        """Run a batch, which has one item at least, and say how long it took."""


class Engine:
    """One or more environments on one compiled engine.

    Args:
        scenario: limits, SLOs, profiles, noise.
        num_envs: environments side by side.
        capacity: requests an environment can hold.
        backend: executes batches; None is the simulated device, whose steps stay in compiled code.
        profile, own_profile: executing and scheduler-side cost profile, instead of the scenario's.
        num_gaps, num_steps: room for recorded token gaps and for the log of batches, per environment.
    """

    def __init__(
        self,
        scenario: Scenario,
        capacity: int,
        *,
        num_envs: int = 1,
        backend: Backend | None = None,
        profile: Profile | None = None,
        own_profile: Profile | None = None,
        num_gaps: int = 0,
        num_steps: int = 0,
    ) -> None:
        self.scenario = scenario
        self.profile = profile or load_profile(scenario.profile)
        if own_profile is None:
            own_profile = load_profile(scenario.scheduler_profile) if scenario.scheduler_profile else self.profile
        own_blocks = getattr(backend, "num_kv_blocks", None)
        self.num_kv_blocks = scenario.num_kv_blocks or own_blocks or scenario.blocks(self.profile.num_kv_blocks)
        self._replicas = (Replica(self.num_kv_blocks, scenario.max_num_seqs or self.profile.device.max_num_seqs),)
        self.backend = backend
        self.noisy = scenario.jitter > 0 or (scenario.straggler_share > 0 and scenario.straggler_factor != 1)
        self.state: State = allocate(
            num_envs,
            capacity,
            scenario,
            (self.profile,),
            (own_profile,),
            self._replicas,
            noise_size=2 * NOISE_BLOCK if self.noisy else 1,
            num_gaps=num_gaps,
            num_steps=num_steps,
        )
        self._record_gaps = num_gaps > 0
        self._noise_seeds = [0] * num_envs
        self._point()

    def _point(self) -> None:
        """Refer to the arrays of the state."""
        self.handle, self._copier = make_handle(self.state), Copier(self.state)

    def __getstate__(self) -> dict[str, Any]:
        self._check_backend()
        return {name: value for name, value in vars(self).items() if name not in ("handle", "_copier")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.state = aligned(self.state)
        self._point()

    def _check_backend(self) -> None:
        if self.backend is not None:
            what = "expected the simulated device for saved states, pickles and copies"
            raise ConfigError(f"backend: {what}, got {type(self.backend).__name__}, which holds a state of its own")

    def save(self, env: int = 0) -> Saved:
        """Environment `env` as it is now, to be put back with :meth:`restore`. ConfigError on a real backend."""
        self._check_env(env)
        self._check_backend()
        return self._copier.take(env, self._noise_seeds[env])

    def restore(self, saved: Saved, env: int = 0, noise_seed: int | None = None) -> None:
        """Make environment `env` what `saved`, of an engine of the same scenario and profiles, is.

        The noise on the batches to come is that which it would have been, or is drawn from `noise_seed`.
        """
        self._check_env(env)
        self._check_backend()
        self.reserve(saved.given.num_requests, saved.given.num_gaps)
        self._copier.put(env, saved)
        self._noise_seeds[env] = saved.noise_seed if noise_seed is None else noise_seed
        self._fill_noise(env)

    def reserve(self, capacity: int, num_gaps: int = 0) -> None:
        """Make room for so many requests and recorded gaps an environment; if the arrays grow, the handle changes."""
        if capacity > self.state.requests.shape[1] or num_gaps > self.state.gaps.shape[1]:
            self.state = grow(self.state, capacity, num_gaps)
            self._point()

    def adopt(self, env: int, noise_seed: int) -> None:
        """Go on from what was written into the arrays of environment `env`, with the noise of `noise_seed`."""
        self._copier.forget(env)
        self._noise_seeds[env] = noise_seed

    def _check_env(self, env: int) -> None:
        """Compiled code does not notice an index outside its arrays."""
        num_envs = len(self.state.sims)
        if not hasattr(env, "__index__") or not 0 <= env < num_envs:
            raise IndexError(f"env: expected 0 to {num_envs - 1}, got {env!r}")

    def reset(self, table: RequestTable, env: int = 0) -> None:
        """Put environment `env` at time 0 before `table`."""
        self._check_env(env)
        load_table(self.state, env, table, self.scenario, self._replicas, record_gaps=self._record_gaps)
        self._copier.forget(env)
        self._noise_seeds[env] = table.seed
        forget = getattr(self.backend, "reset", None)
        if forget is not None:
            forget(table)
        self._fill_noise(env)
        kernels.start(self.handle, env)
        fill = getattr(self.backend, "fill", None)
        if fill is not None and self.scenario.prefix_caching and table.num_past > 0:
            fill(*cached_blocks(self.state, env))

    def enter(self, request: Request, env: int = 0) -> int:
        """Let a request come that no table foresaw, between two steps; returns its index.

        It counts among the measured ones where these are the last of the environment's requests.
        """
        self._check_env(env)
        state, clock_s = self.state, float(self.state.sims[env].clock_s)
        arrival_s = clock_s if request.arrival_s is None else request.arrival_s
        if not 0.0 <= arrival_s <= clock_s:
            raise ValueError(f"arrival_s: expected 0 to {clock_s:g}, the engine's clock, got {arrival_s!r}")
        self._check_shares(request, env)
        r = int(state.worlds[env].num_requests)
        room = state.requests.shape[1]
        gaps = int(state.output_tokens[env, :r].sum()) + request.output_tokens - r if self._record_gaps else 0
        self.reserve(room if r < room else 2 * room, gaps if gaps <= state.gaps.shape[1] else 2 * gaps)
        append_request(self.state, env, request, arrival_s)
        self._copier.forget(env)
        kernels.enter_env(self.handle, env, r)
        return r

    def _check_shares(self, request: Request, env: int) -> None:
        """What a request has in common with another must be known when it comes."""
        with_, state = request.shares_with, self.state
        if with_ >= 0 and not has_arrived(state, env, with_):
            raise ConfigError(f"shares_with: expected a request that has arrived or -1, got {with_}")
        total = state.arrivals[env, with_].prompt_tokens + state.output_tokens[env, with_] if with_ >= 0 else 0
        most = min(int(total), request.prompt_tokens)
        if request.shared_tokens > most:
            raise ConfigError(f"shared_tokens: expected 0 to {most}, got {request.shared_tokens}")

    def _fill_noise(self, env: int) -> None:
        """The noise block in use, and the one after it."""
        if self.noisy:
            block = int(self.state.sims["num_batches"][env]) // NOISE_BLOCK
            for each in (block, block + 1):
                self._draw_noise(env, each)

    def _draw_noise(self, env: int, block: int) -> None:
        start = (block % 2) * NOISE_BLOCK
        self.state.noise[env, start : start + NOISE_BLOCK] = noise_block(self.scenario, self._noise_seeds[env], block)

    def noise_due(self, env: int) -> bool:
        """Whether the batch just done was the last of its noise block."""
        return self.noisy and int(self.state.sims[env].num_batches) % NOISE_BLOCK == 0

    def refill_noise(self, env: int = 0) -> None:
        """Draw the noise block after the one in use; call it whenever a block has been used up."""
        block = int(self.state.sims[env].num_batches) // NOISE_BLOCK
        if block >= 1:
            self._draw_noise(env, block + 1)

    def is_over(self, env: int = 0) -> bool:
        """Whether the run has ended: its cohort is resolved, or its time is up."""
        self._check_env(env)
        return bool(kernels.is_over_env(self.handle, env))

    def has_work(self, env: int = 0) -> bool:
        """Whether any request of environment `env` waits or runs."""
        sim = self.state.sims[env]
        return bool(sim.num_waiting + sim.num_running)

    def view(self, env: int = 0) -> View:
        """What a plain-Python scheduler may see now."""
        self._check_env(env)
        return View(self.state, self.handle, env)

    def submit(self, batch: Batch, env: int = 0) -> None:
        """Take a batch formed outside, instead of one that was not run; an illegal one raises :class:`IllegalBatch`."""
        self._check_env(env)
        if self.scenario.prefix_caching or self.state.batches[env].is_marked:
            kernels.clear_batch_env(self.handle, env)  # one that was formed and not run has marks, and may hold blocks
        with self._foreseen(env):
            submit(self.state, batch, env)

    @contextmanager
    def _foreseen(self, env: int) -> Iterator[None]:
        """A batch is formed as if the one in flight had landed; if none comes of it, nothing is foreseen."""
        if not self.scenario.async_lag:
            yield
            return
        kernels.see_flight_env(self.handle, env)
        try:
            yield
        except BaseException:
            kernels.forget_flight_env(self.handle, env)
            raise

    def decide(self, scheduler: Any, env: int = 0) -> None:
        """Let the scheduler form the next batch: compiled, plain Python, or one that works on the engine itself."""
        self._check_env(env)
        compiled = getattr(scheduler, "kernel", None)
        if hasattr(scheduler, "decide"):
            scheduler.decide(self, env)
        elif compiled is not None:
            kernels.schedule_at(self.handle, env, kernels.address_of(compiled))
        else:
            kernels.clear_batch_env(self.handle, env)
            if self.has_work(env):
                with self._foreseen(env):
                    self.submit(scheduler.schedule(self.view(env)), env)

    def execute(self, env: int = 0) -> Execution:
        """Apply the decided batch, run it on the backend and commit it; an empty one, or none, idles."""
        self._check_env(env)
        if not self.state.batches[env].is_marked:
            kernels.clear_batch_env(self.handle, env)  # that of the step before
        handle, execution = self.handle, Execution(0.0)
        if self.backend is None:
            if kernels.apply_env(handle, env):
                execution = Execution(float(kernels.execute_env(handle, env)))
        elif (scheduled := apply_told(self.state, handle, env)) is not None:
            execution = self.backend.execute(scheduled)
            if not 0.0 <= execution.duration_s < math.inf:
                raise ValueError(f"backend: expected a duration in seconds >= 0, got {execution.duration_s!r}")
            self._end(env, scheduled, execution.ended)
        if kernels.commit_env(handle, env, execution.duration_s) and self.noise_due(env):
            self.refill_noise(env)
        return execution

    def _end(self, env: int, scheduled: ScheduledBatch, ended: Collection[int]) -> None:
        """Let the token that comes now be the last of those requests."""
        if not ended:
            return
        if self.scenario.async_lag:
            raise ConfigError("async_lag: expected False with a backend that ends requests, got True")
        emitting = set(scheduled.request[scheduled.emits].tolist())
        for r in ended:
            if r not in emitting:
                raise ValueError(f"backend: expected ended requests to emit a token in this batch, got {r!r}")
            self.state.output_tokens[env, r] = self.state.requests[env, r]["num_output_tokens"] + 1

    def step(self, scheduler: Any, env: int = 0) -> Execution:
        """One step: decide, execute, commit."""
        self.decide(scheduler, env)
        return self.execute(env)

    def prepare(self, scheduler: Any) -> None:
        """Compile, or load from the cache, what :meth:`run` needs, so that its time is not counted as the run's."""
        if getattr(scheduler, "kernel", None) is not None and self.backend is None:
            kernels.with_scheduler("run")(self.handle, 0, scheduler.kernel, 0, MAX_IDLE_STEPS)

    def run(self, scheduler: Any, env: int = 0, max_steps: int | None = None) -> bool:
        """Step until the run is over or `max_steps` are done; returns whether it is over."""
        compiled = getattr(scheduler, "kernel", None)
        left = max_steps if max_steps is not None else 1 << 62
        while left > 0 and not self.is_over(env):
            if compiled is not None and self.backend is None:
                run = kernels.with_scheduler("run")
                left -= run(self.handle, env, compiled, min(RUN_CHUNK, left), MAX_IDLE_STEPS)
                if self.noise_due(env):
                    self.refill_noise(env)
            elif env == 0 and self.backend is None and hasattr(scheduler, "run_steps"):
                left -= scheduler.run_steps(self, left, MAX_IDLE_STEPS)
                if self.noise_due(env):
                    self.refill_noise(env)
            else:
                self.step(scheduler, env)
                left -= 1
            if self.state.sims[env].num_idle_steps > MAX_IDLE_STEPS:
                raise StalledScheduler(f"no batch in {MAX_IDLE_STEPS} steps although work is pending")
        return self.is_over(env)

    def scheduled(self, env: int = 0) -> ScheduledBatch:
        """The applied batch, evicted requests left out; of those preempted for it nothing is told."""
        self._check_env(env)
        return tell(self.state, self.handle, env)
