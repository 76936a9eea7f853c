"""Records of the engine's arrays: requests, episodes, replicas, settings, the batch being formed, lines of the log."""

from __future__ import annotations

from typing import Any

import numpy as np

# Phases of a request. The first is of those that have not arrived, the last of turns that never will: somebody before
# them in their session did not finish. The four before it are resolved. To schedulers the last is the first: how many
# turns a lost session would have had is nothing that they may know.
PENDING, WAITING, RUNNING, FINISHED, REJECTED, REFUSED, ABANDONED, CANCELLED = range(8)
PHASES = ("pending", "waiting", "running", "finished", "rejected", "refused", "abandoned", "cancelled")

NONE = -1  # no request, no block, no row
CACHE_LINE = 64  # bytes


def has_come(phase: Any) -> Any:
    """Whether a request of that phase, or each of an array of phases, has arrived."""
    return (phase != PENDING) & (phase != CANCELLED)


def record_dtype(fields: list[Any]) -> np.dtype:
    """The dtype of a record with such fields, (name, format) or (name, format, shape), aligned as in C."""
    # np.record, so that the same attribute access works with and without compilation
    return np.dtype((np.record, np.dtype(fields, align=True)))


REQUEST = record_dtype(
    [
        # what every step reads comes first: it fits two of three cache lines
        ("last_token_s", "f8"),  # nan until emitted
        ("tbt_slo_s", "f8"),
        ("lst_s", "f8"),  # SLAI's last schedulable time; nan until keyed; of who waits, its scheduler's own note
        ("num_computed_tokens", "i4"),  # tokens whose KV is held
        ("prefill_tokens", "i4"),  # prompt to compute: the prompt, after a preemption with the emitted tokens
        ("num_output_tokens", "i4"),  # emitted so far
        ("num_blocks", "i4"),  # KV blocks held
        ("num_scheduled_tokens", "i4"),  # tokens in the batch being formed
        ("num_late_gaps", "i4"),
        ("slo_class", "i1"),
        ("phase", "i1"),
        ("ttft_missed", "i1"),
        ("has_expired", "i1"),  # of a waiting request: which part of the line it stands in, see engine.queue
        ("later", "i4"),  # the next in that part; -1: it is the last
        ("arrival_s", "f8"),
        ("ttft_slo_s", "f8"),
        ("lateness_s", "f8"),  # late seconds of all closed waits, at most the patience
        ("paid_attained", "f8"),  # the utility paid out as reward so far, and what it was computed from
        ("paid_lateness_s", "f8"),
        ("paid_utility", "f8"),
        ("max_gap_s", "f8"),
        ("deadline_miss_s", "f8"),  # largest lateness of a token against TTFT SLO + k * TBT; -inf before the first
        ("first_scheduled_s", "f8"),  # nan until scheduled
        ("first_token_s", "f8"),  # nan until emitted
        ("resolved_s", "f8"),  # nan until finished, rejected, refused or abandoned
        ("length_hint", "f8"),  # predicted output tokens; nan without a hint
        ("session_id", "i8"),
        ("prompt_tokens", "i4"),
        ("num_cached_tokens", "i4"),  # of the prompt, found in the prefix cache at the first admission
        ("num_preemptions", "i4"),
        # links of engine.queue, of waiting requests
        ("place", "i4"),  # grows along the waiting list; of running ones a note of engine.lag
        ("earlier", "i4"),  # the one before it in its part of the line; -1: it is the first
        ("shorter", "i4"),  # children in the tree of expired requests; -1: none
        ("longer", "i4"),
        ("max_output_tokens", "i4"),  # the most that its client accepts; with it the size is a multiple of a cache line
    ]
)

# What of a request only prefix caching needs.
PREFIX = record_dtype(
    [
        ("shares_with", "i4"),  # the request with whose tokens the prompt begins; NONE
        ("shared_tokens", "i4"),  # so many of them
        ("row", "i4"),  # where the blocks that it holds are listed; NONE
        ("turn", "i4"),  # how many requests of its session came before it
        ("num_recached_tokens", "i4"),  # found in the cache at admissions after a preemption
        # what was found cached when it was last looked up, see engine.blocks
        ("found_version", "i4"),  # the lane's blocks_version then; 0: never
        ("found_blocks", "i4"),
        ("found_left", "i4"),  # the first release that left some of it, or could
        ("found_in_use", "i4"),  # of it, what somebody held
        ("users_version", "i4"),  # the lane's then
    ]
)

# What the client of a request asks for: hidden until it arrives, then copied into the request's row.
ARRIVAL = record_dtype(
    [
        ("arrival_s", "f8"),
        ("ttft_slo_s", "f8"),
        ("tbt_slo_s", "f8"),
        ("length_hint", "f8"),
        ("session_id", "i8"),
        ("gap_start", "i8"),  # where its gaps between tokens are recorded, if they are
        ("prompt_tokens", "i4"),
        ("shares_with", "i4"),
        ("shared_tokens", "i4"),
        ("max_output_tokens", "i4"),
        # sessions, see engine.turns; requests, -1: none
        ("think_s", "f8"),  # from the end of its parent to its arrival
        ("parent", "i4"),
        ("turn", "i4"),  # how many of its session came before it
        ("first_turn", "i4"),  # whose parent it is
        ("next_turn", "i4"),  # the next of the same parent
        ("is_cancelled", "i1"),  # whether it will never come
        ("slo_class", "i1"),
    ]
)

# What an environment's requests have in common, whichever replica serves them.
EPISODE = record_dtype(
    [
        ("patience_s", "f8"),
        ("strict_tbt_slo_s", "f8"),
        ("arrived_tokens", "i8"),  # prompt tokens of everybody who has arrived
        ("largest_request", "i4"),  # tokens of prompt and output that any replica can hold: larger ones are rejected
        ("num_arrived", "i4"),
        ("num_rejected", "i4"),
        ("num_resolved", "i4"),
        ("num_settled", "i4"),  # resolved requests whose utility has been paid as reward
    ]
)

# One engine: its clock, its memory, its queues.
REPLICA = record_dtype(
    [
        ("clock_s", "f8"),
        ("mean_batch_s", "f8"),  # running mean of the duration of all non-empty batches
        ("last_batch_s", "f8"),
        ("last_predicted_s", "f8"),  # what the scheduler's own profile said of the last batch
        ("kv_cache_usage", "f8"),  # of the last non-empty batch: after scheduling, before its frees; 0 to 1
        ("kv_cache_usage_max", "f8"),
        ("busy_s", "f8"),
        ("output_length_sum", "f8"),  # of finished requests
        ("next_departure_s", "f8"),  # no client's patience ends before this
        ("idle_step_s", "f8"),
        ("decision_s", "f8"),  # what one decision of this policy costs
        ("cost_ratio", "f8"),  # measured over predicted batch time, moving average over batches
        ("num_batches", "i8"),  # non-empty ones
        ("num_idle_steps", "i8"),  # empty batches in a row
        ("batch_tokens_sum", "i8"),
        ("tokens_emitted", "i8"),
        ("waiting_tokens", "i8"),  # prompt tokens to compute of all waiting requests
        ("arrivals_10s", "f8"),  # arrivals per second, exponentially averaged over 10 and 60 s
        ("arrivals_60s", "f8"),
        ("arrived_tokens_10s", "f8"),  # prompt tokens per second, likewise
        ("arrived_tokens_60s", "f8"),
        ("new_tokens", "i8"),  # prompt tokens of those who came since the averages were taken
        ("new_arrivals", "i4"),  # their number
        ("last_batch_tokens", "i4"),
        ("last_batch_decodes", "i4"),
        ("free_blocks", "i4"),
        ("total_blocks", "i4"),
        ("watermark_blocks", "i4"),
        ("max_model_len", "i4"),
        ("largest_request", "i4"),  # tokens of prompt and output that it can hold
        ("max_num_seqs", "i4"),
        ("max_num_batched_tokens", "i4"),
        ("num_waiting", "i4"),
        ("num_running", "i4"),
        ("num_finished", "i4"),
        ("num_refused", "i4"),
        ("num_abandoned", "i4"),
        ("num_preemptions", "i4"),
        ("vain_preemptions", "i4"),  # up to the last one, since the last token before it
        ("admission", "i1"),  # see config.ADMISSIONS
        ("allow_refusal", "i1"),
        ("prefix_caching", "i1"),
        ("async_lag", "i1"),  # whether batches are formed while the one before them executes, see engine.lag
        ("preempted_at_token", "i8"),  # tokens_emitted at the last preemption
        ("profile", "i4"),  # which row of the cost arrays it runs on
        ("block_size", "i4"),  # tokens in a KV block, a power of two
        ("block_bits", "i4"),  # its logarithm: a division takes longer than all else that a decode costs
        ("blocks_version", "i4"),  # with prefix caching: changes when blocks are lost that nobody evicted
        ("users_version", "i4"),  # likewise: when somebody begins or ceases to hold blocks
        ("num_releases", "i4"),  # likewise: how often somebody ceased to
        ("last_evicted", "i4"),  # likewise: the latest of the releases that left blocks that were evicted since
        ("free_row", "i4"),  # likewise: the first list of held blocks that nobody has
        ("last_to_find", "i4"),  # likewise: the request whose cached blocks were looked up last
        ("table_mask", "i4"),  # likewise: slots of the table of identities, less one
        ("row_blocks", "i4"),  # likewise: most blocks of a request, length of each list
        # of the waiting list's index, see engine.queue; requests, -1: nobody
        ("next_expiry_s", "f8"),  # no request of the open part expires before this
        ("first_place", "i4"),  # of the waiting list; the next preempted request takes the one before it
        ("last_place", "i4"),
        ("first_open", "i4"),
        ("last_open", "i4"),
        ("first_expired", "i4"),  # by TTFT deadline
        ("last_expired", "i4"),
        ("expired_strict", "i4"),  # root of the tree of expired requests of class 0, by length
        ("expired_others", "i4"),  # of all other classes
        # with async_lag
        ("num_ending", "i4"),  # running requests that end with the batch in flight, behind the others in their list
        ("in_flight", "i1"),  # whether there is one
    ]
)

# What of an episode a scheduler must not see.
WORLD = record_dtype(
    [
        ("cost_scale", "f8"),
        ("next_arrival_s", "f8"),  # when the next request of the table arrives; inf after the last
        ("stop_s", "f8"),  # the run ends when the clock reaches this
        ("num_requests", "i4"),  # rows in use: those of the table, then those that were entered at run time
        ("table_size", "i4"),  # requests of the table
        ("next_arrival", "i4"),  # the next of the table to arrive; with sessions, of their roots
        ("num_past", "i4"),  # the first so many are over when the episode starts
        ("num_cancelled", "i4"),  # turns that will never come
        ("num_due", "i4"),  # turns whose arrival is known
        ("num_followed", "i4"),  # resolved requests whose turns are due or cancelled
        ("has_turns", "i1"),  # whether there are sessions
        ("cohort_start", "i4"),
        ("cohort_stop", "i4"),
        ("num_unresolved", "i4"),  # of the cohort
        ("drain_all", "i1"),  # whether a resolved cohort ends the run
        ("records_gaps", "i1"),  # whether gaps between tokens are kept
    ]
)

OWN_KNOBS = 8

# Settings of the packing kernel, and what every other scheduler honours of them.
KNOBS = record_dtype(
    [
        ("token_budget", "i4"),
        ("order", "i4"),  # of prompts, see pack.ORDERS
        ("victim", "i4"),  # who is evicted when blocks run out, see step.VICTIMS
        ("limit", "i4"),  # largest prompt admitted while other work waits
        ("evict", "i1"),  # which cached blocks go first, see eviction.EVICTIONS
        ("hold", "i1"),  # whether hopeless prompts wait for other work, see pack.HOLDS
        ("refuse", "i1"),  # hopeless waiting prompts are refused (needs allow_refusal)
        ("cap", "f8"),  # of predicted batch time, as a share of the smallest TBT SLO among running decodes
        ("offset", "f8"),  # SLAI's, in mean batches; inf: no decode is ever deferred
        ("offset_full", "f8"),  # the offset when KV use is at least usage_switch
        ("usage_switch", "f8"),
        ("margin", "f8"),  # in capped batches: a decode is critical so long before its deadline; nan: use the LST
        ("own", "f8", (OWN_KNOBS,)),  # what one scheduler alone knows, in the order in which it declares them
    ]
)

# The batch being formed.
BATCH = record_dtype(
    [
        ("num_items", "i4"),
        ("num_tokens", "i4"),
        ("num_decodes", "i4"),
        ("num_admitted", "i4"),
        ("num_preempt", "i4"),
        ("num_refuse", "i4"),
        ("is_marked", "i4"),  # whether requests carry marks of this batch
        ("num_started", "i4"),  # running prompts, as the packing kernel found them; -1: not counted
        ("first_started", "i4"),  # the one admitted first
        ("num_deferred", "i4"),  # decodes that were not critical
        ("token_room", "i4"),  # tokens that may still be added
        ("free_blocks", "i4"),  # blocks left after what was added; below 0 the engine evicts
        ("pairs", "f8"),  # query-key pairs of the prefill chunks
        ("kv_tokens", "f8"),  # KV tokens read
        ("cap_s", "f8"),  # limit on the predicted time
        ("smallest_tbt_slo_s", "f8"),  # of the running decodes; below 0: not looked for yet
        ("deadline_s", "f8"),  # seconds to the first deadline of theirs that can be met, looked for with it
        # the knobs of this batch: a scheduler that plans ahead changes them between opening and filling it
        ("cap", "f8"),
        ("margin", "f8"),
        ("order", "i4"),
        ("limit", "i4"),
        ("hold", "i1"),
        # counted where the scheduler's profile has a surface
        ("longest", "i4"),  # KV tokens read by the decode that reads most
        ("num_chunks", "i4"),
        ("chunk_kv_tokens", "f8"),  # of kv_tokens, those that chunks read
        ("chunks_s", "f8"),  # attention of the chunks, the kernels' launch left out
        ("price_s", "f8"),  # what the profile said when the batch was executed; below 0: not asked yet
    ]
)

ITEM = record_dtype([("request", "i4"), ("tokens", "i4")])

# The batch that executes while the next one is formed, and its items.
FLIGHT = record_dtype(
    [
        ("duration_s", "f8"),
        ("price_s", "f8"),  # what the scheduler's own profile says of it
        ("kv_cache_usage", "f8"),
        ("num_items", "i4"),
        ("num_tokens", "i4"),  # computed, those computed in vain included
        ("num_decodes", "i4"),
        ("is_foreseen", "i1"),  # whether requests look as if it had landed
    ]
)
FLYING = record_dtype(
    [
        ("last_token_s", "f8"),  # the request's, while its token is foreseen
        ("request", "i4"),
        ("emits", "i1"),
    ]
)

# One line of the log of batches.
STEP = record_dtype(
    [
        ("start_s", "f8"),
        ("duration_s", "f8"),
        ("predicted_s", "f8"),
        ("kv_cache_usage", "f8"),
        ("decode_tokens", "i4"),
        ("prefill_tokens", "i4"),
        ("num_running", "i4"),
        ("num_waiting", "i4"),
    ]
)
