"""Workloads: arrival processes, fitted length distributions, trace files, and the request table made from them."""

from llmsched_gym.workload.generate import NOISE_BLOCK, make_table, noise_block
from llmsched_gym.workload.identity import shares_of_ids, shares_of_turns
from llmsched_gym.workload.lengths import WORKLOADS, describe_workloads
from llmsched_gym.workload.streams import check_seed
from llmsched_gym.workload.table import Request, RequestTable
from llmsched_gym.workload.traces import Trace, TraceError, TraceWarning, load_trace

__all__ = [
    "NOISE_BLOCK",
    "WORKLOADS",
    "Request",
    "RequestTable",
    "Trace",
    "TraceError",
    "TraceWarning",
    "check_seed",
    "describe_workloads",
    "load_trace",
    "make_table",
    "noise_block",
    "shares_of_ids",
    "shares_of_turns",
]
