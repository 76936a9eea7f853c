"""The reward: each request's utility, paid as it is earned and lost.

With a_i(t) = 1 while request i's first token came in time and no token since was late, and L_i(t) its late seconds so
far, U_i(t) = a_i(t) - beta * min(1, L_i(t) / patience). A step pays the sum over the measured requests of what U_i
changed, so that the undiscounted return telescopes to the sum of the final utilities, whatever the steps were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmsched_gym.config import EnvConfig, RouteConfig
from llmsched_gym.engine.due import kth_due_s, left_s, open_lateness_s
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.records import ABANDONED, FINISHED, REFUSED, record_dtype
from llmsched_gym.engine.utility import gaps_in_time_kernel, late_share, mean_in_time_kernel, utility_kernel
from llmsched_gym.engine.view import View

EVERY_GAP, FRACTION, DEADLINE, MEAN = range(4)
TERMS = ("on_time", "expired", "lateness", "refused")
ON_TIME, EXPIRED, LATENESS, REFUSAL = range(len(TERMS))

RULES = record_dtype(
    [
        ("beta", "f8"),
        ("scale", "f8"),
        ("late_share", "f8"),  # share of gaps that may be late
        ("tau_s", "f8"),
        ("tbt_rule", "i4"),
        ("at_finish", "i4"),
        ("action_repeat", "i4"),
        ("token_budget", "i4"),
        ("prefix_caching", "i4"),  # whether prompts can go by what of them is cached
    ]
)


def rules_of(config: EnvConfig | RouteConfig) -> np.ndarray:
    """The constants of reward and action decoding for the kernels; RULES of shape (1,)."""
    rules = np.zeros(1, RULES)
    row = rules[0]
    row.beta, row.scale, row.tau_s = config.beta, config.reward_scale, config.tau_s
    row.at_finish = config.credit == "finish"
    row.action_repeat, row.token_budget = config.action_repeat, config.token_budget
    row.prefix_caching = config.prefix_caching
    rule = config.tbt_rule.partition(":")[0]
    row.tbt_rule = {"every-gap": EVERY_GAP, "fraction": FRACTION, "deadline": DEADLINE, "mean": MEAN}[rule]
    row.late_share = late_share(config.tbt_rule)
    return rules


@kernel()
def attains(request, rules, now_s):
    """Whether nothing has gone wrong for the request so far and its first token is out (0 or 1)."""
    if request.num_output_tokens == 0 or request.ttft_missed:
        return 0.0
    done = request.phase == FINISHED
    if rules.tbt_rule == DEADLINE:
        due_s = kth_due_s(request, request.num_output_tokens)
        return 1.0 if request.deadline_miss_s <= 0.0 and (done or now_s <= due_s) else 0.0
    overdue = not done and left_s(request, now_s) < 0.0
    late, gaps = request.num_late_gaps + overdue, request.num_output_tokens - 1 + overdue
    if rules.tbt_rule == MEAN:
        lasted_s = (now_s if overdue else request.last_token_s) - request.first_token_s
        return 1.0 if mean_in_time_kernel(lasted_s, gaps, request.tbt_slo_s) else 0.0
    return 1.0 if gaps_in_time_kernel(late, gaps, rules.late_share) else 0.0


@kernel()
def _pay(about, rules, request, attained, lateness_s, refused, terms):
    """Book what the request's utility changed; returns the change."""
    late = paid_late = 0.0
    if about.patience_s < math.inf:
        late = min(1.0, lateness_s / about.patience_s)
        paid_late = min(1.0, request.paid_lateness_s / about.patience_s)
    utility = utility_kernel(attained, late + refused, rules.beta)
    change = utility - request.paid_utility
    if attained > request.paid_attained:
        terms[ON_TIME] += 1.0
    elif attained < request.paid_attained:
        terms[EXPIRED] -= 1.0
    terms[LATENESS] -= rules.beta * (late - paid_late)
    terms[REFUSAL] -= refused * rules.beta
    request.paid_attained = attained
    request.paid_lateness_s = lateness_s
    request.paid_utility = utility
    return change


@kernel()
def _pay_resolved(about, now_s, rules, request, terms):
    if request.phase == FINISHED:
        attained = attains(request, rules, now_s)
        return _pay(about, rules, request, attained, request.lateness_s, 0.0, terms)
    if request.phase == ABANDONED:
        return _pay(about, rules, request, 0.0, request.lateness_s, 0.0, terms)
    return _pay(about, rules, request, 0.0, 0.0, 1.0 if request.phase == REFUSED else 0.0, terms)


@kernel()
def _has_changed(now_s, tbt_rule, request):
    """False for a waiting or running request that surely owes nothing: the common case, small enough to be inlined."""
    is_late = left_s(request, now_s) < 0.0
    if request.num_output_tokens == 0:
        return is_late
    if tbt_rule != EVERY_GAP or is_late:
        return True
    spoiled = request.ttft_missed or request.num_late_gaps > 0
    return request.lateness_s != request.paid_lateness_s or (request.paid_attained == 0.0) != spoiled


@kernel()
def pay_live(about, now_s, rules, cohort_start, cohort_stop, r, request, terms):
    """Book what the utility of waiting or running request `r` has changed since it was last paid; returns the change.

    0 for requests outside cohort_start, ..., cohort_stop - 1. This is the live half of the reward, for whoever comes
    past the requests anyway: a pass of its own over them would cost as much as the step's decision.
    """
    if not cohort_start <= r < cohort_stop or not _has_changed(now_s, rules.tbt_rule, request):
        return 0.0
    lateness_s = request.lateness_s + open_lateness_s(request, now_s)
    return _pay(about, rules, request, attains(request, rules, now_s), lateness_s, 0.0, terms)


@kernel()
def pay_resolved(of, world, now_s, rules, terms):
    """Sum of the last changes of utility of the measured requests resolved since the last call, `of` a lane's too."""
    about = of.episode
    total = 0.0
    for i in range(about.num_settled, about.num_resolved):
        r = of.resolved[i]
        if world.cohort_start <= r < world.cohort_stop:
            total += _pay_resolved(about, now_s, rules, of.requests[r], terms)
    about.num_settled = about.num_resolved
    return total


@dataclass(frozen=True)
class Transition:
    """What a custom reward is computed from: ``gym.make(id, reward=callable)``."""

    duration_s: float  # how far the clock moved
    terms: Mapping[str, float]  # parts of the built-in reward, unscaled
    resolved: Any  # records of the measured requests resolved in this step, engine.state.REQUEST
    view: View | Any  # the engine after the step; of a routing environment its RouterView


def as_reward(paid: Any) -> float:
    """What a reward of the user's paid, as a number; ValueError for what is none, such as a forgotten return."""
    try:
        reward = math.nan if _loses_part(paid) else float(paid)
    except (TypeError, ValueError):
        reward = math.nan
    if not math.isfinite(reward):
        raise ValueError(f"reward: expected a finite number, got {paid!r}")
    return reward


def _loses_part(paid: Any) -> bool:
    """Whether NumPy would make a number of it by leaving out its imaginary part, or that it is masked."""
    found = np.asanyarray(paid)
    return found.dtype.kind == "c" or bool(np.ma.is_masked(found))


def as_rewards(paid: Any, num_envs: int) -> np.ndarray:
    """What a batched reward of the user's paid, float64 (num_envs,); ValueError for what is no such array."""
    try:
        rewards = np.full(num_envs, math.nan) if _loses_part(paid) else np.asarray(paid, np.float64)
    except (TypeError, ValueError):
        rewards = np.full(num_envs, math.nan)
    if rewards.shape != (num_envs,) or not np.isfinite(rewards).all():
        has_shape = paid is not None and rewards.shape != (num_envs,)
        got = f"shape {rewards.shape}" if has_shape else f"{paid!r:.60}"
        raise ValueError(
            f"reward: expected {num_envs} finite numbers, shape ({num_envs},), got {' '.join(got.split())}"
        )
    return rewards
