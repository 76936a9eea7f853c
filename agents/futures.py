"""Futures of a run drawn from what a scheduler may know: who will come, how long answers get, what noise there is.

What has happened stays: requests that have come keep their prompts and what they have emitted. Drawn are

- arrivals, with gaps of the suite's shape at the rate of the last minute (``arrivals_60s``, the middle of the suite's
  rates standing for the time before the start), with prompts and outputs of the workload's distribution and the suite's
  shares of classes;
- the outputs of requests that wait or run, from the workload's outputs for prompts like theirs, given that they are
  longer than what has been emitted, and given their hints, where the suite has any: an oracle's are the outputs;
- noise on batch times; and the device's speed, where the suite hides it, is what batches have taken lately against the
  scheduler's own profile, which executes.
"""

from __future__ import annotations

import math

import numpy as np

from llmsched_gym.config import MOST, ConfigError, Scenario
from llmsched_gym.cost import load_profile
from llmsched_gym.engine import Engine
from llmsched_gym.engine.load import NOTHING_SHARED, ROOT, TO_COME, TURN_COLUMNS
from llmsched_gym.engine.records import ARRIVAL, NONE, RUNNING, WAITING
from llmsched_gym.engine.saved import Saved
from llmsched_gym.engine.state import State
from llmsched_gym.workload.generate import has_turns, length_hints
from llmsched_gym.workload.lengths import LengthTable, load_lengths

REMEMBERED_S = 60.0
"""Of the average that arrivals are drawn by, ``arrivals_60s``."""
CANDIDATES = 64
"""Outputs drawn for each that a noisy hint chooses."""


def is_drawable(scenario: Scenario) -> bool:
    """Whether futures can be drawn: requests stand alone, of a length distribution."""
    return scenario.trace is None and not has_turns(scenario)


def check_drawable(scenario: Scenario) -> None:
    """Raise :class:`ConfigError` for a scenario whose futures cannot be drawn."""
    if not is_drawable(scenario):
        raise ConfigError("futures: expected a suite without sessions or trace, whose futures can be drawn")


def remaining(
    lengths: LengthTable, prompt_tokens: np.ndarray, emitted: np.ndarray, most: np.ndarray, uniforms: np.ndarray
) -> np.ndarray:
    """Output tokens in all of requests that have emitted so many, int32 (n,), from uniforms in [0, 1).

    Inverse CDF of the outputs of prompts in the same range, given more than `emitted`; at most `most`, where that is
    more than `emitted`. All arrays have shape (n,).
    """
    share = np.interp(prompt_tokens, lengths.prompt_tokens, lengths.prompt_probs)
    bins = np.minimum((share * lengths.num_bins).astype(int), lengths.num_bins - 1)
    knots = lengths.output_tokens.reshape(lengths.num_bins, -1)
    probs = lengths.output_keys.reshape(lengths.num_bins, -1)
    drawn = np.zeros(len(prompt_tokens), np.int64)
    for i, b in enumerate(bins.tolist()):
        # a draw is rounded, so more than `emitted` begins half a token above it
        below = np.interp(emitted[i] + 0.5, knots[b], probs[b] - b, left=0.0) if emitted[i] > 0 else 0.0
        drawn[i] = np.rint(np.interp(b + below + (1.0 - below) * uniforms[i], probs[b], knots[b]))
    return np.maximum(np.minimum(drawn, most), emitted + 1).astype(np.int32)


def hinted(
    lengths: LengthTable,
    prompt_tokens: np.ndarray,
    emitted: np.ndarray,
    most: np.ndarray,
    hints: np.ndarray,
    sigma: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """As :func:`remaining`, of requests whose outputs times a log-normal error of `sigma` are `hints`, int32 (n,).

    One of `CANDIDATES` draws without the hint each, by the likelihood of the hint given the draw (importance
    resampling: Rubin, 1987). With `sigma` 0 the hint is the output.
    """
    if sigma == 0.0:
        return np.maximum(np.minimum(np.rint(hints), most), emitted + 1).astype(np.int32)
    n = len(prompt_tokens)
    prompts, emits, mosts = (np.repeat(values, CANDIDATES) for values in (prompt_tokens, emitted, most))
    drawn = remaining(lengths, prompts, emits, mosts, rng.random(n * CANDIDATES)).reshape(n, CANDIDATES)
    off = (np.log(np.maximum(hints, 1e-9))[:, None] - np.log(drawn)) / sigma
    # the largest of log-likelihoods with Gumbel noise is a draw by likelihood, however small they are
    return drawn[np.arange(n), np.argmax(-0.5 * off * off + rng.gumbel(size=drawn.shape), axis=1)]


class Futures:
    """Draws the futures of a run's decisions and holds the engine that they are tried on.

    Args:
        scenario, seed: the run's.
        count: futures of a decision.
        horizon_s: how far arrivals are drawn.
        num_steps: room for the log of batches, the run's.

    Raises :class:`ConfigError` for a scenario that they cannot be drawn for.
    """

    def __init__(self, scenario: Scenario, seed: int, count: int, horizon_s: float, num_steps: int = 0) -> None:
        check_drawable(scenario)
        self._scenario, self._seed, self._horizon_s = scenario, seed, horizon_s
        self._lengths = load_lengths(scenario.workload)
        own = load_profile(scenario.scheduler_profile or scenario.profile)
        blocks = scenario.num_kv_blocks or scenario.blocks(load_profile(scenario.profile).num_kv_blocks)
        self.engine = Engine(
            scenario.replace(num_kv_blocks=blocks), 1, num_envs=count, profile=own, num_steps=num_steps
        )

    def draw(self, engine: Engine, state: Saved, decision: int) -> list[Saved]:
        """Futures of environment 0 of `engine`, whose present is `state`; the i-th can be tried in environment i."""
        found = []
        for env in range(len(self.engine.state.sims)):
            rng = np.random.default_rng((self._seed, decision, env))
            self.engine.restore(state, env)
            rows, outputs = self._arrivals(self.engine.state, env, rng)
            self.engine.reserve(int(self.engine.state.worlds[env].next_arrival) + len(rows))
            self._write(self.engine.state, env, rows, outputs, rng)
            self.engine.adopt(env, int(rng.integers(1 << 31)))
            found.append(self.engine.save(env))
        return found

    def rate(self, state: State, env: int) -> float:
        """Arrivals per second as they are expected to go on."""
        low, high = self._scenario.qps_range
        usual = self._scenario.qps if self._scenario.qps is not None else 0.5 * (low + high)
        sim = state.sims[env]
        return float(sim.arrivals_60s) + usual * math.exp(-float(sim.clock_s) / REMEMBERED_S)

    def _arrivals(self, state: State, env: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Requests to come up to the horizon, ARRIVAL (n,), and their output tokens, int32 (n,)."""
        scenario, rate = self._scenario, self.rate(state, env)
        shape = scenario.burstiness if scenario.arrivals == "gamma" else 1.0
        expected = rate * self._horizon_s
        gaps = rng.standard_gamma(shape, int(expected + 6.0 * math.sqrt(expected / shape)) + 8) / (shape * rate)
        since_s = np.cumsum(gaps)
        n = int(np.searchsorted(since_s, self._horizon_s, "right"))
        rows = np.zeros(n, ARRIVAL)
        prompt, output = self._lengths.draw(rng.random((n, 2)))
        share = scenario.strict_share
        relaxed = rng.random(n) >= (share if isinstance(share, float | int) else 0.5 * (share[0] + share[1]))
        rows["arrival_s"] = float(state.sims[env].clock_s) + since_s[:n]
        rows["prompt_tokens"] = prompt
        rows["slo_class"] = relaxed
        rows["tbt_slo_s"] = np.where(relaxed, scenario.relaxed_tbt_slo_s, scenario.strict_tbt_slo_s)
        scales = np.asarray(scenario.ttft_class_scales, float)
        rows["ttft_slo_s"] = scenario.ttft_slo_s + scenario.ttft_slo_per_token_s * prompt
        rows["ttft_slo_s"] *= scales[rng.integers(len(scales), size=n)]
        rows["length_hint"] = length_hints(scenario, rng, output)
        rows["session_id"], rows["shares_with"] = NONE, NONE
        rows["max_output_tokens"] = MOST
        for name, value in zip(TURN_COLUMNS, ROOT, strict=True):
            rows[name] = value
        return rows, output

    def _write(self, state: State, env: int, rows: np.ndarray, outputs: np.ndarray, rng: np.random.Generator) -> None:
        """Put who is to come behind those who have, and draw how long the answers under way get."""
        world = state.worlds[env]
        come = int(world.next_arrival)
        stop = come + len(rows)
        state.requests[env, come:stop] = TO_COME
        state.prefixes[env, come:stop] = NOTHING_SHARED
        state.arrivals[env, come:stop] = rows
        state.output_tokens[env, come:stop] = outputs
        requests = state.requests[env, :come]
        live = np.flatnonzero((requests["phase"] == WAITING) | (requests["phase"] == RUNNING))
        prompt, emitted = requests["prompt_tokens"][live], requests["num_output_tokens"][live]
        most = min(int(state.episodes[env].largest_request), self._lengths.max_total_tokens) - prompt
        most = np.minimum(most, requests["max_output_tokens"][live])
        state.output_tokens[env, live] = self._outputs(requests["length_hint"][live], prompt, emitted, most, rng)
        world.num_requests = world.table_size = stop
        world.next_arrival_s = float(rows["arrival_s"][0]) if len(rows) else math.inf
        scale = self._scenario.cost_scale
        world.cost_scale = state.sims[env].cost_ratio if isinstance(scale, tuple) else scale

    def _outputs(
        self, hints: np.ndarray, prompt: np.ndarray, emitted: np.ndarray, most: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Output tokens in all of requests under way, int32 (n,)."""
        sigma = self._scenario.hint_sigma
        if sigma is None:
            return remaining(self._lengths, prompt, emitted, most, rng.random(len(prompt)))
        return hinted(self._lengths, prompt, emitted, most, hints, sigma, rng)
