"""Records of a cluster's arrays: what it knows of each replica, what replicas report, what a router sees."""

from __future__ import annotations

from llmsched_gym.engine.records import record_dtype

BOTH, PREFILL, DECODE = range(3)  # places in config.cluster.ROLES

# What the cluster knows of a replica beyond its REPLICA.
NODE = record_dtype(
    [
        ("event_s", "f8"),  # when its batch ends, or when it looks for work next; inf: when somebody is delivered
        ("duration_s", "f8"),  # of the batch under way, decision included
        ("change_s", "f8"),  # when it fails, or is back; inf: never
        ("tokens_per_s", "f8"),  # of prompts alone, by the profile behind its scheduler's predictions
        ("dispatched_tokens", "i8"),  # prompt tokens that the router has sent it since its last report
        ("num_dispatched", "i4"),
        ("dispatched_strict", "i4"),  # of them, requests of the strict class
        ("num_coming", "i4"),  # requests whose KV is on its way here, or waits for room here
        ("num_delivered", "i4"),  # requests, since the start
        ("report", "i8"),  # which multiple of the staleness the last report was of; -1: none yet
        ("next_change", "i4"),  # which of its failures and returns comes next
        ("is_executing", "i1"),
        ("has_ended", "i1"),  # its batch has, at this very time: whoever comes now comes before its next one
        ("is_down", "i1"),
        ("role", "i1"),
    ]
)

# What a replica reports.
REPORT = record_dtype(
    [
        ("report_s", "f8"),
        ("mean_batch_s", "f8"),
        ("kv_usage", "f8"),  # share of its blocks that requests hold
        ("prompt_tokens_left", "f8"),  # still to compute, of waiting and running requests
        ("output_tokens_left", "f8"),  # still to emit, as expected
        ("num_waiting", "i4"),
        ("num_running", "i4"),
        ("num_strict", "i4"),  # of both, requests of the strict class
        ("free_blocks", "i4"),
    ]
)

# What a router sees of a replica for the request at hand: its last report, and what has been sent there since.
CANDIDATE = record_dtype(
    [
        ("age_s", "f8"),  # of the report
        ("mean_batch_s", "f8"),
        ("kv_usage", "f8"),
        ("prompt_tokens_left", "f8"),  # those dispatched since the report among them
        ("output_tokens_left", "f8"),
        ("tokens_per_s", "f8"),  # prompt tokens that it computes in a second, decodes left out
        ("predicted_ttft_s", "f8"),  # of this request: what is ahead of it and its own uncached prompt
        ("cached_tokens", "i4"),  # of this prompt
        ("uncached_tokens", "i4"),
        ("num_waiting", "i4"),  # those dispatched since the report among them
        ("num_running", "i4"),
        ("num_strict", "i4"),
        ("num_dispatched", "i4"),  # since the report
        ("free_blocks", "i4"),
        ("total_blocks", "i4"),
        ("max_num_seqs", "i4"),
        ("is_up", "i1"),
        ("is_legal", "i1"),  # whether the request may be sent there: it is up, takes prompts and can hold it
    ]
)

# Where an episode stands.
ROUTE = record_dtype(
    [
        ("now_s", "f8"),
        ("asked_s", "f8"),  # when the request that is decided on entered
        ("staleness_s", "f8"),
        ("link_s_per_token", "f8"),  # seconds that the KV of a token takes over the link
        ("next_change_s", "f8"),  # when the next replica fails or is back
        ("deciding", "i4"),  # the request that is decided on; NONE
        ("last_replica", "i4"),  # that served its session last; NONE
        ("num_held", "i4"),  # requests at the router: handed back, or nobody can take them now
        ("lane", "i4"),  # which lane Python is asked about
        ("num_decisions", "i8"),
        ("num_handed_back", "i8"),
        ("num_transfers", "i8"),
        ("num_abandoned", "i8"),  # clients that left while no replica had their request
        ("num_moving", "i4"),  # transfers under way or waiting for room
        ("dice_a", "i8"),  # of routers that draw
        ("dice_b", "i8"),
    ]
)

# KV on its way from the replica that computed a prompt to the one that goes on.
TRANSFER = record_dtype(
    [
        ("end_s", "f8"),  # inf until there is room at its destination
        ("request", "i4"),
        ("source", "i4"),  # replicas; without a target, NONE
        ("target", "i4"),
        ("num_blocks", "i4"),  # taken at its destination; 0 until there is room
    ]
)
