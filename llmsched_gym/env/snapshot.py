"""One moment of an environment, as pictures of it need it: nothing in it is hidden from a scheduler."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from llmsched_gym.engine.due import open_wait, open_waits
from llmsched_gym.engine.handles import unpack
from llmsched_gym.engine.jit import entry
from llmsched_gym.engine.records import FINISHED, RUNNING, WAITING, has_come
from llmsched_gym.engine.state import lane_of
from llmsched_gym.env.core import EnvCore
from llmsched_gym.env.reward import attains

ATTAINMENT_WINDOW_S = 60.0  # age of the arrivals that the attainment counts


class Shown(NamedTuple):
    """One request in a frame."""

    request: int
    tokens: int  # a decode's emitted tokens; a prompt's tokens to compute
    computed_tokens: int
    left_s: float  # to the next deadline; negative when overdue
    slo_s: float
    is_strict: bool
    is_late: bool  # a token was late: it can no longer attain

    @property
    def left(self) -> float:
        """Share of the SLO that is left, from -1 to 1."""
        return max(-1.0, min(1.0, self.left_s / self.slo_s)) if self.slo_s > 0.0 else -1.0

    @property
    def level(self) -> int:
        """Index into SLACK_COLOURS."""
        return 0 if self.left_s < 0.0 else 1 + (self.left >= 0.2) + (self.left >= 0.5)


class Snapshot(NamedTuple):
    """One moment of an environment."""

    clock_s: float
    num_batches: int
    used_blocks: int
    total_blocks: int
    spare_blocks: int  # that admission leaves free
    last_usage: float  # KV use of the last batch before its frees
    decode_tokens: int  # of the last batch
    chunks: tuple[int, ...]  # prompt tokens of the last batch, by request where known
    duration_s: float
    predicted_s: float
    forming: tuple[int, int] | None  # decodes and prompt tokens of a batch being formed by request actions
    decodes: tuple[Shown, ...]
    started: tuple[Shown, ...]  # running prompts
    waiting: tuple[Shown, ...]
    max_num_seqs: int
    max_model_len: int
    counts: dict[str, int]
    attainment: float  # share on time so far of recent arrivals whose first token came or is late; nan without any

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens in the last batch."""
        return sum(self.chunks)


@entry()
def _attaining(s, env, rules, out):
    lane = lane_of(unpack(s), env)
    for r in range(out.shape[0]):
        out[r] = attains(lane.requests[r], rules[0], lane.sim.clock_s)


class Verdicts(NamedTuple):
    """Who is on time so far; arrays of (num_requests,) bool."""

    on_time: np.ndarray
    is_late: np.ndarray
    stayed: np.ndarray
    attained: float  # share of recent arrivals about whom something is known; nan without any


def _verdicts(core: EnvCore, env: int) -> Verdicts:
    state = core.engine.state
    clock_s = float(state.sims[env].clock_s)
    rows = state.requests[env, : state.worlds[env].num_requests]
    arrived = has_come(rows["phase"])
    attaining = np.zeros(len(rows))
    _attaining(core.engine.handle, env, core.arrays.rules, attaining)
    on_time = attaining > 0.0
    since_s, slo_s = open_waits(rows)
    has_verdict = arrived & ((rows["num_output_tokens"] > 0) | (clock_s - since_s > slo_s))
    is_late = has_verdict & ~on_time
    stayed = np.isin(rows["phase"], (WAITING, RUNNING, FINISHED))
    gone = arrived & ~stayed & ~is_late
    recent = arrived & (rows["arrival_s"] >= clock_s - ATTAINMENT_WINDOW_S)
    judged = np.count_nonzero(recent & (has_verdict | gone))
    return Verdicts(on_time, is_late, stayed, np.count_nonzero(on_time & recent) / judged if judged else math.nan)


def attainment(core: EnvCore, env: int = 0) -> float:
    """:attr:`Snapshot.attainment` by itself."""
    return _verdicts(core, env).attained


def snapshot(core: EnvCore, env: int = 0) -> Snapshot:
    """What a frame shows of environment `env`."""
    state = core.engine.state
    sim, batch, episode = state.sims[env], state.batches[env], state.episodes[env]
    clock_s = float(sim.clock_s)
    on_time, is_late, stayed, attained = _verdicts(core, env)

    num_running = sim.num_running + sim.num_ending
    running = [_shown(state, env, r, clock_s, is_late) for r in state.running[env, :num_running].tolist()]
    is_prompt = [s.computed_tokens < s.tokens for s in running]
    requests = state.requests[env]
    decodes = tuple(
        s._replace(tokens=int(requests["num_output_tokens"][s.request]))
        for s, p in zip(running, is_prompt, strict=True)
        if not p
    )
    prefill_tokens = int(sim.last_batch_tokens - sim.last_batch_decodes)
    chunks = [n for n in state.items[env, : batch.num_items]["tokens"].tolist() if n > 1]
    if sum(chunks) != prefill_tokens:
        chunks = [prefill_tokens] if prefill_tokens else []
    forming = None
    if core.kind.by_item:
        forming = (int(batch.num_decodes), int(batch.num_tokens - batch.num_decodes))
    return Snapshot(
        clock_s=clock_s,
        num_batches=int(sim.num_batches),
        used_blocks=int(sim.total_blocks - sim.free_blocks),
        total_blocks=int(sim.total_blocks),
        spare_blocks=int(sim.watermark_blocks),
        last_usage=float(sim.kv_cache_usage),
        decode_tokens=int(sim.last_batch_decodes),
        chunks=tuple(chunks),
        duration_s=float(sim.last_batch_s),
        predicted_s=float(sim.last_predicted_s),
        forming=forming,
        decodes=decodes,
        started=tuple(s for s, p in zip(running, is_prompt, strict=True) if p),
        waiting=tuple(_shown(state, env, r, clock_s, is_late) for r in state.waiting[env, : sim.num_waiting].tolist()),
        max_num_seqs=int(sim.max_num_seqs),
        max_model_len=int(sim.max_model_len),
        counts={
            "arrived": int(episode.num_arrived),
            "finished": int(sim.num_finished),
            "on time": int(np.count_nonzero(on_time)),
            "late": int(np.count_nonzero(is_late & stayed)),
            "abandoned": int(sim.num_abandoned),
            "refused": int(sim.num_refused),
            "rejected": int(episode.num_rejected),
            "cancelled": int(state.worlds[env].num_cancelled),
        },
        attainment=attained,
    )


def _shown(state: Any, env: int, r: int, clock_s: float, is_late: np.ndarray) -> Shown:
    request = state.requests[env, r]
    since_s, slo_s = open_wait(request)
    return Shown(
        request=r,
        tokens=int(request.prefill_tokens),
        computed_tokens=int(request.num_computed_tokens),
        left_s=float(slo_s - (clock_s - since_s)),
        slo_s=float(slo_s),
        is_strict=bool(request.slo_class == 0),
        is_late=bool(is_late[r]),
    )
