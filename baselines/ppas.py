"""P-PAS: vLLM with a smaller token budget while several prompts press on decodes.

Source: arXiv 2608.15171 and its patch (github.com/TimoSaemann/ppas-vllm), read. As `vllm-v1`, but a batch has
`small` tokens at most if at least 2 prompts are unfinished, waiting or under way, and a decode runs. `ppas+` takes the
small budget too if exactly one prompt is under way with at least `long` tokens left, and at least 2 decodes run.

Theirs are 16,384 and 1,280 tokens, and 65,536 left, on other GPUs and for contexts of 100,000 tokens. Ours follow from
B, vLLM's budget for the profile's device (2,048 tokens here): large = B, small = B / 4, long = 2 B, that is 2,048, 512
and 4,096. The ratios are a guess that keeps `small` above what decodes alone take. A preempted request is a prompt
again here, with what it has emitted; theirs counts it by its prompt alone.
"""

from llmsched_gym.baselines.vllm_v1 import OWN, fill_v1
from llmsched_gym.engine.batch import is_prefill, open_batch, remaining_prefill
from llmsched_gym.engine.jit import kernel
from llmsched_gym.scheduler import VLLM_TOKEN_BUDGET, Compiled, Own, not_negative_int

BUDGETS = (
    *OWN,
    Own("large", 0, not_negative_int, "whole number of tokens, 0 for the budget"),
    Own("small", 0, not_negative_int, "whole number of tokens, 0 for a quarter of large"),
)
LARGE, SMALL, LONG = len(OWN), len(OWN) + 1, len(OWN) + 2
OWN_PLUS = (*BUDGETS, Own("long", 0, not_negative_int, "whole number of tokens, 0 for twice large"))


@kernel()
def fill_under_pressure(lane, plus):
    """A batch as vLLM's, its budget by the pressure of prompts on decodes; with `plus` one long prompt is pressure."""
    open_batch(lane)
    sim, batch, own = lane.sim, lane.batch, lane.knobs.own
    large = int(own[LARGE]) if own[LARGE] > 0 else max(1, lane.knobs.token_budget)
    small = int(own[SMALL]) if own[SMALL] > 0 else max(1, large // 4)
    prompts, left = 0, 0
    for i in range(sim.num_running):
        request = lane.requests[lane.running[i]]
        if is_prefill(request):
            prompts += 1
            left += remaining_prefill(request)
    decodes = sim.num_running - prompts
    presses = prompts + sim.num_waiting >= 2 and decodes >= 1
    if plus and not presses and prompts == 1 and decodes >= 2:
        presses = left >= (int(own[LONG]) if own[LONG] > 0 else 2 * large)
    batch.token_room = min(small if presses else large, sim.max_num_batched_tokens)
    fill_v1(lane, sim.max_num_seqs)


def ppas(lane):
    """The small budget while at least two prompts and a decode run."""
    fill_under_pressure(lane, False)


def ppas_plus(lane):
    """The same, and while one long prompt and at least two decodes run."""
    fill_under_pressure(lane, True)


def _entry(what, function, own):
    settings = {"token_budget": VLLM_TOKEN_BUDGET}
    return Compiled(what, function, settings, admission="prompt-check", options=("reserve",), own=own)


SCHEDULERS = {
    "ppas": _entry("P-PAS: vLLM V1 with a quarter of the budget while prompts press (arXiv 2608.15171)", ppas, BUDGETS),
    "ppas+": _entry("P-PAS+: as ppas, and while one long prompt runs beside decodes", ppas_plus, OWN_PLUS),
}
