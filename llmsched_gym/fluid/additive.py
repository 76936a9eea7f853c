"""The program where a batch's time is a sum over its parts, so that only its number of tokens matters."""

from __future__ import annotations

import numpy as np

from llmsched_gym.config import Scenario
from llmsched_gym.cost import Profile
from llmsched_gym.fluid.solution import Fluid
from llmsched_gym.fluid.work import Work, mean_cost_factor


def by_size(scenario: Scenario, profile: Profile, work: Work, blocks: int) -> Fluid:
    """The largest rate: unknowns are the rate and how many batches of N tokens run per second, for every N."""
    from scipy.optimize import linprog

    attention_s = profile.pair_s * work.pairs + profile.kv_s * work.kv_tokens
    scale = mean_cost_factor(scenario)
    size = np.arange(1, scenario.max_num_batched_tokens + 1)
    linear_s = profile.linear_table_s(scenario.max_num_batched_tokens)[1:]

    # variables: rate, then batches per second of each size; costs in seconds per second
    time = np.concatenate([[scale * attention_s], scale * linear_s])
    ones = np.ones(len(size))
    memory = np.concatenate([[work.held_blocks / blocks], -ones])
    seqs = np.concatenate([[work.batches / (scenario.max_num_seqs or profile.device.max_num_seqs)], -ones])
    tokens = np.concatenate([[work.tokens], -size])
    found = linprog(
        c=np.concatenate([[-1.0], 0.0 * ones]),
        A_ub=np.stack([time, memory, seqs]),
        b_ub=[1.0, 0.0, 0.0],
        A_eq=tokens[None, :],
        b_eq=[0.0],
        method="highs",
    )
    if found.status != 0:
        raise ValueError(f"fluid capacity: {found.message}")
    qps, rates = float(found.x[0]), found.x[1:]
    used = np.flatnonzero(rates > 1e-9 * rates.sum())
    batches_per_s = float(rates.sum())
    # a constraint's right-hand side is rate * need / limit: its price per relative change of the limit
    prices = [max(0.0, -float(m)) * batches_per_s / qps for m in found.ineqlin.marginals[1:]]
    return Fluid(
        qps=qps,
        batch_tokens=tuple(int(n) for n in size[used]),
        batch_share=tuple(float(r) for r in rates[used] / batches_per_s),
        batches_per_s=batches_per_s,
        decodes_per_batch=qps * work.decode_tokens / batches_per_s,
        linear_share=1.0 - scale * attention_s * qps,
        memory_price=prices[0],
        seqs_price=prices[1],
        work=work,
    )
