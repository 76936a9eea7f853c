"""When a request's next token is due: the first by its TTFT SLO after arrival, any other by its TBT SLO after the last.

One wait is open at a time. Sums and differences are taken in one order everywhere, so that whoever asks twice whether a
token is late gets the same answer to the last bit.
"""

from __future__ import annotations

import numpy as np

from llmsched_gym.engine.jit import kernel


@kernel()
def open_wait(request):
    """The wait for a request's next token: since when, by the clock, and how many seconds its SLO allows."""
    if request.num_output_tokens == 0:
        return request.arrival_s, request.ttft_slo_s
    return request.last_token_s, request.tbt_slo_s


def open_waits(requests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """:func:`open_wait` of an array of REQUEST records (n,): since when, and the SLO, each float64 seconds (n,)."""
    is_first = requests["num_output_tokens"] == 0
    since_s = np.where(is_first, requests["arrival_s"], requests["last_token_s"])
    return since_s, np.where(is_first, requests["ttft_slo_s"], requests["tbt_slo_s"])


@kernel()
def next_due_s(request):
    """When a request's next token is due, by the clock."""
    since_s, slo_s = open_wait(request)
    return since_s + slo_s


@kernel()
def decode_due_s(request):
    """:func:`next_due_s` of a request that surely has a token: loops over decodes are 5 % faster without asking."""
    return request.last_token_s + request.tbt_slo_s


@kernel()
def left_s(request, now_s):
    """Seconds from `now_s` until a request's next token is due; below 0 it is late."""
    since_s, slo_s = open_wait(request)
    return slo_s - (now_s - since_s)


@kernel()
def open_lateness_s(request, now_s):
    """Late seconds of the wait that is open at `now_s` (rule 12)."""
    return max(0.0, -left_s(request, now_s))


@kernel()
def kth_due_s(request, k):
    """When output token `k`, from 0, is due by the TTFT SLO and k TBT SLOs behind it, whatever the gaps before it."""
    return request.arrival_s + request.ttft_slo_s + k * request.tbt_slo_s
