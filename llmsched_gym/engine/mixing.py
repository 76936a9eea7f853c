"""What it costs that decodes run beside a prompt chunk: the batch that mixes them against one batch each."""

from __future__ import annotations

from llmsched_gym.engine.batch import is_prefill, remaining_prefill, waiting_prefill
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.surface import chunk_s, has_surface, surface_s


@kernel()
def price_of_mixing(lane, room):
    """Predicted time of all running decodes beside the prompts at hand, over that of the two apart; 0 to about 4.

    Below 1 mixing saves: the weights are read once. Above 1 the attention of decodes beside a chunk costs more than
    that. Prompts count up to `room` tokens, as one chunk behind nothing; 0 where there are no prompts, no decodes, or
    no surface, for a sum over the parts never charges for mixing.
    """
    if not has_surface(lane.coef_s):
        return 0.0
    decodes, tokens, longest = 0, 0.0, 0.0
    prompt = waiting_prefill(lane, room)
    for i in range(lane.sim.num_running):
        request = lane.requests[lane.running[i]]
        if is_prefill(request):
            prompt += remaining_prefill(request)
        else:
            decodes += 1
            tokens += request.num_computed_tokens + 1.0
            longest = max(longest, request.num_computed_tokens + 1.0)
    chunk = min(prompt, room)
    if decodes == 0 or chunk <= 0:
        return 0.0
    alone_s = chunk_s(lane.coef_s, 0, chunk)
    size = min(chunk + decodes, lane.sim.max_num_batched_tokens)
    both_s = surface_s(lane.linear_s, lane.coef_s, size, decodes, tokens, longest, 1, alone_s)
    decodes_s = surface_s(lane.linear_s, lane.coef_s, decodes, decodes, tokens, longest, 0, 0.0)
    return both_s / (decodes_s + surface_s(lane.linear_s, lane.coef_s, chunk, 0, 0.0, 0.0, 1, alone_s))
