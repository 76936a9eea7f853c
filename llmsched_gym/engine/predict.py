"""What a prompt is predicted to take if it is served alone, and whether its first token can still be in time."""

from __future__ import annotations

from llmsched_gym.engine import surface
from llmsched_gym.engine.blocks import known_computed
from llmsched_gym.engine.due import left_s
from llmsched_gym.engine.handles import unpack
from llmsched_gym.engine.jit import entry, kernel
from llmsched_gym.engine.state import lane_of
from llmsched_gym.engine.surface import has_surface


@kernel()
def time_alone_s(lane, r):
    """Predicted seconds until the prompt of `r` is complete if it is served alone from now on."""
    request = lane.requests[r]
    chunk = max(1, min(lane.knobs.token_budget, lane.sim.max_num_batched_tokens))
    computed = known_computed(lane, r)
    return prompt_s(lane.linear_s, lane.coef_s, computed, request.prefill_tokens - computed, chunk)


@kernel()
def prompt_s(linear_s, coef_s, computed, n, chunk):
    """Seconds that n tokens of a prompt behind `computed` ones take alone, in chunks of so many."""
    if has_surface(coef_s):
        return surface.prompt_s(linear_s, coef_s, computed, n, chunk)
    whole, rest = n // chunk, n % chunk
    seconds = whole * linear_s[chunk] + (linear_s[rest] if rest > 0 else 0.0)
    seconds += coef_s[0] * n * (computed + (n + 1) * 0.5)
    # the KV read by chunk i ends at computed + (i + 1) * chunk
    kv_tokens = whole * computed + chunk * whole * (whole + 1) * 0.5 + (computed + n if rest > 0 else 0)
    return seconds + coef_s[1] * kv_tokens


@kernel()
def can_make_ttft(lane, r):
    """Whether `r`, served alone from now on, would have its first token in time; true once it has one.

    The estimate leaves out all other work, so what it calls hopeless is hopeless.
    """
    if lane.requests[r].num_output_tokens > 0:
        return True
    time_s = left_s(lane.requests[r], lane.sim.clock_s)
    return time_s > 0.0 and time_alone_s(lane, r) <= time_s


@entry()
def can_make_ttft_env(s, env, r):
    """:func:`can_make_ttft` of request `r` of environment `env`, for Python."""
    return can_make_ttft(lane_of(unpack(s), env), r)
