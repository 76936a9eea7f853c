"""What writes scenarios, request tables and replicas into the engine's arrays: an episode before its first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmsched_gym.config import ADMISSIONS, MOST, Scenario
from llmsched_gym.engine.blocks import load_blocks, table_size
from llmsched_gym.engine.records import BATCH, EPISODE, FLIGHT, NONE, PREFIX, REPLICA, REQUEST
from llmsched_gym.engine.state import Replica, State, empty_line, row_blocks
from llmsched_gym.workload import Request, RequestTable

TABLE_COLUMNS = ("arrival_s", "ttft_slo_s", "tbt_slo_s", "length_hint", "session_id", "prompt_tokens", "slo_class")
"""Of a request table and of ARRIVAL: what becomes known of a request when it arrives."""
IDENTITY_COLUMNS = ("shares_with", "shared_tokens")
TURN_COLUMNS = ("parent", "think_s", "turn", "first_turn", "next_turn")
ROOT = (NONE, 0.0, 0, NONE, NONE)  # of a request that stands alone


def _to_come() -> np.ndarray:
    """The row of a request that has not arrived; shape () REQUEST."""
    row = np.zeros((), REQUEST)
    for name in ("first_scheduled_s", "first_token_s", "last_token_s", "resolved_s", "lst_s"):
        row[name] = np.nan
    row["deadline_miss_s"] = -np.inf
    return row


TO_COME = _to_come()
NOTHING_SHARED = np.array((NONE, 0, NONE, *[0] * (len(PREFIX.fields or ()) - 3)), PREFIX)


def load_table(
    state: State,
    env: int,
    table: RequestTable,
    scenario: Scenario,
    replicas: Sequence[Replica],
    *,
    record_gaps: bool = False,
) -> None:
    """Put environment `env` at time 0 before the requests of `table`; a table larger than the arrays is an error."""
    n = len(table)
    if n > state.requests.shape[1]:
        raise ValueError(f"table: expected at most {state.requests.shape[1]} requests, got {n}")
    state.requests[env, :n] = TO_COME
    state.prefixes[env, :n] = NOTHING_SHARED
    arrivals = state.arrivals[env]
    for name in TABLE_COLUMNS:
        arrivals[name][:n] = getattr(table, name)
    for name, column in zip(IDENTITY_COLUMNS, table.identity(), strict=True):
        arrivals[name][:n] = column
    arrivals["gap_start"][:n] = table.gap_start
    state.output_tokens[env, :n] = table.output_tokens
    turns: tuple[Any, ...] = ROOT if table.parent is None else _turns(table)
    for name, values in zip(TURN_COLUMNS, turns, strict=True):
        arrivals[name][:n] = values
    arrivals["is_cancelled"][:n] = 0
    arrivals["max_output_tokens"][:n] = MOST if table.max_output_tokens is None else table.max_output_tokens
    _load_episode(state, env, table, scenario, record_gaps)
    for k, replica in enumerate(replicas, env * len(replicas)):
        load_replica(state, k, scenario, replica)
        state.episodes[env].largest_request = max(state.episodes[env].largest_request, state.sims[k].largest_request)


def _turns(table: RequestTable) -> tuple[np.ndarray, ...]:
    """TURN_COLUMNS of a table with sessions; each of shape (num_requests,)."""
    parent, n = table.parent, len(table)
    turn, first, following = np.zeros(n, np.int32), np.full(n, NONE, np.int32), np.full(n, NONE, np.int32)
    assert parent is not None
    for r in range(n - 1, -1, -1):  # from the last, so that each parent's first turn is linked first
        if parent[r] >= 0:
            following[r] = first[parent[r]]
            first[parent[r]] = r
    for r in np.flatnonzero(parent >= 0).tolist():
        turn[r] = turn[parent[r]] + 1
    return parent, np.zeros(n) if table.think_s is None else table.think_s, turn, first, following


def _load_episode(state: State, env: int, table: RequestTable, scenario: Scenario, record_gaps: bool) -> None:
    n = len(table)
    state.episodes[env] = np.zeros((), EPISODE)
    episode, world = state.episodes[env], state.worlds[env]
    episode.patience_s = scenario.patience_s
    episode.strict_tbt_slo_s = scenario.strict_tbt_slo_s
    world.cost_scale = table.cost_scale
    world.num_requests = world.table_size = n
    world.next_arrival = world.num_past = table.num_past
    world.has_turns = table.parent is not None
    world.num_due = world.num_followed = world.num_cancelled = 0
    world.next_arrival_s = table.arrival_s[table.num_past] if n > table.num_past else math.inf
    world.records_gaps = record_gaps
    world.cohort_start, world.cohort_stop = table.cohort_start, table.cohort_stop
    world.num_unresolved = table.cohort_stop - table.cohort_start
    world.drain_all = scenario.num_requests is not None
    if scenario.num_requests is None:
        world.stop_s = scenario.horizon_s
    else:
        world.stop_s = table.last_root_s + table.longest_session_s + scenario.drain_s


def load_replica(state: State, k: int, scenario: Scenario, replica: Replica) -> None:
    """Put lane `k` at time 0: nobody is there, nothing is cached."""
    state.sims[k] = np.zeros((), REPLICA)
    sim, num_kv_blocks = state.sims[k], replica.num_kv_blocks
    sim.profile = replica.profile
    sim.block_size, sim.block_bits = scenario.block_size, scenario.block_size.bit_length() - 1
    sim.total_blocks = sim.free_blocks = num_kv_blocks
    sim.watermark_blocks = int(scenario.watermark * num_kv_blocks)
    sim.max_model_len = scenario.max_model_len
    sim.max_num_seqs = replica.max_num_seqs
    sim.max_num_batched_tokens = scenario.max_num_batched_tokens
    sim.admission = ADMISSIONS.index(scenario.admission)
    sim.allow_refusal = scenario.allow_refusal
    sim.prefix_caching = scenario.prefix_caching
    sim.async_lag = scenario.async_lag
    if scenario.prefix_caching:
        sim.blocks_version = sim.users_version = 1  # 0 is that of requests that have not been looked up
        sim.table_mask = table_size(num_kv_blocks) - 1
        sim.row_blocks = row_blocks(scenario, num_kv_blocks)
        load_blocks(state.blocks[k], num_kv_blocks, int(sim.max_num_seqs), int(sim.row_blocks))
    sim.idle_step_s = scenario.idle_step_s
    sim.next_departure_s = sim.next_expiry_s = math.inf
    empty_line(sim)
    sim.cost_ratio = 1.0
    sim.largest_request = min(sim.max_model_len, int(sim.total_blocks - sim.watermark_blocks) * int(sim.block_size))
    state.memory[k] = 0.0
    state.batches[k] = np.zeros((), BATCH)
    state.flights[k] = np.zeros((), FLIGHT)


def append_request(state: State, env: int, request: Request, arrival_s: float) -> int:
    """Write a request behind those that environment `env` has; returns its index. It is still to enter."""
    world, arrivals, outputs = state.worlds[env], state.arrivals[env], state.output_tokens[env]
    r = int(world.num_requests)
    state.requests[env, r] = TO_COME
    state.prefixes[env, r : r + 1] = NOTHING_SHARED
    for name in (*TABLE_COLUMNS, *IDENTITY_COLUMNS):
        arrivals[name][r] = getattr(request, name)
    for name, value in zip(TURN_COLUMNS, ROOT, strict=True):
        arrivals[name][r] = value
    arrivals["is_cancelled"][r] = 0
    arrivals["max_output_tokens"][r] = MOST
    arrivals[r].arrival_s = arrival_s
    arrivals[r].gap_start = arrivals[r - 1].gap_start + outputs[r - 1] - 1 if r > 0 else 0
    outputs[r] = request.output_tokens
    world.num_requests += 1
    if world.cohort_stop == r:
        world.cohort_stop += 1
        world.num_unresolved += 1
    return r
