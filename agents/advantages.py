"""Advantages with less noise in them, as options of our own PPO: what is known of queues, and what seeds can remove.

The plain ones are computed with the rollout, in compiled code. These are computed from it, for all environments at
once, whatever the threads were; where no option is on nobody does so.

- `group`: environments on the same requests are each other's baseline. Mao et al. (2019), "Variance Reduction for
  Reinforcement Learning in Input-Driven Environments": arrivals and lengths are noise that no action causes, and a
  baseline may depend on all of it. Here it is the leave-one-out mean of what the others' advantages are at the same
  time of the same episode: it depends on their actions, which are drawn independently, and never on one's own, so the
  gradient stays unbiased. Where nobody else decides around that time there is none.
- `shaping`: r + discount Phi(s') - Phi(s) as reward, with Phi = -shaping * predicted seconds of prompts to compute. Ng,
  Harada and Russell (1999), "Policy Invariance under Reward Transformations": what is best stays best, and what a
  backlog will cost is told at once. Phi is 0 after a termination; sums telescope with each step's own discount, so the
  optimum is exactly that of the plain rewards, however rough the estimate of seconds.
- `average`: rewards less their mean per second, no discount. Zhang and Ross (2021), "On-Policy Deep Reinforcement
  Learning for the Average-Reward Criterion", and Ma et al. (2021), "Average-Reward Reinforcement Learning with Trust
  Region Methods". The mean is that of all rollouts, recent ones more; the critic's values are centred, as only their
  differences mean something. Exact where an episode never ends; our episodes are cut off after `horizon_s` and begin
  with a random backlog, so the mean is that of such episodes.

Cuts at regeneration (Dai and Gluzman, 2022) are not among them: our engine hardly ever runs empty, see
docs/agents_scratch.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmsched_gym.agents.rollout_kernels import Rollout
from llmsched_gym.config import ConfigError
from llmsched_gym.engine.predict import prompt_s
from llmsched_gym.env.core import EnvCore
from llmsched_gym.env.features import ALL_FEATURES, AT
from llmsched_gym.scheduler import default_knobs

RECENT = 0.1  # weight of a rollout in running means
TYPICAL_PROMPT = 1024  # tokens; what one of them takes is what any of them is taken to
BACKLOG = (AT.waiting_tokens, AT.started_tokens)  # features that tell it


@dataclass(frozen=True)
class Variant:
    """Which of the options are on; none is by default."""

    group: int = 1  # environments on the same requests
    shaping: float = 0.0  # utility that a second of waiting work costs, in Phi
    average: bool = False


class Advantages:
    """Computes a variant's advantages of a rollout; what it has learnt of earlier ones is :meth:`save`'s.

    Raises :class:`ConfigError` for a world in which the variant makes no sense.
    """

    def __init__(self, variant: Variant, core: EnvCore, gae_lambda: float) -> None:
        self.variant, self.gae_lambda = variant, gae_lambda
        config = core.config
        if variant.group > core.num_envs or core.num_envs % variant.group:
            what = f"expected a divisor of the {core.num_envs} environments"
            raise ConfigError(f"group: {what}, got {variant.group}")
        if variant.average and config.num_requests is not None:
            raise ConfigError(
                f"average: expected episodes that do not end, num_requests=None, got {config.num_requests}"
            )
        self.scale = variant.shaping * config.reward_scale * token_s(core)
        self.paid = self.seconds = 0.0  # decaying sums

    def save(self) -> dict[str, float]:
        """What is known of earlier rollouts."""
        return {"paid": self.paid, "seconds": self.seconds}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from what was saved."""
        self.paid, self.seconds = state["paid"], state["seconds"]

    def learn(
        self, b: Rollout, last: np.ndarray, cut: dict[tuple[int, int], np.ndarray], first: np.ndarray
    ) -> dict[str, float]:
        """Write a rollout's advantages and baselines; returns figures for logs.

        Args:
            b: the rollout.
            last: features after it, (num_envs, number of features).
            cut: features that a truncated episode ended with, by environment and step.
            first: number of the episode that each environment began it in, (num_envs,).
        """
        variant, figures = self.variant, dict[str, float]()
        is_cut = np.zeros(b.ended.shape, np.bool_)
        for place in cut:
            is_cut[place] = True
        if variant.average:
            figures |= self._centre(b, is_cut)
        rewards = b.paid.astype(np.float64) - (self.rate * b.durations if variant.average else 0.0)
        discounts = np.ones_like(b.durations) if variant.average else b.discounts.astype(np.float64)
        if variant.shaping > 0.0:
            after = np.concatenate([b.features[:, 1:, BACKLOG], last[:, None, BACKLOG]], 1)
            for place, features in cut.items():
                after[place] = features[list(BACKLOG)]
            reached = np.where(b.ended & ~is_cut, 0.0, self.potential(after))
            rewards += discounts * reached - self.potential(b.features[..., BACKLOG])
        values = np.where(b.ended, b.last_values, b.values[:, 1:]).astype(np.float64)
        advantage = np.zeros(len(values))
        for t in reversed(range(values.shape[1])):
            delta = rewards[:, t] + discounts[:, t] * values[:, t] - b.values[:, t]
            advantage = delta + discounts[:, t] * self.gae_lambda * ~b.ended[:, t] * advantage
            b.advantages[:, t] = advantage
        if variant.group > 1:
            numbers = first[:, None] + np.cumsum(b.ended, 1) - b.ended
            others, known = others_mean(b.advantages, b.clocks, numbers, variant.group)
            b.baselines[...] = others
            plain, less = b.advantages[known], (b.advantages - b.baselines)[known]
            left = less.var() / plain.var() if plain.any() else 1.0
            figures |= {"baselined": known.mean(), "variance_left": left}
        return {f"advantages/{name}": float(figure) for name, figure in figures.items()}

    def potential(self, seen: np.ndarray) -> np.ndarray:
        """Phi of features in BACKLOG, (..., 2): minus what prompts that wait or are under way have left to compute."""
        waiting, started = (
            np.expm1(seen[..., k].astype(np.float64) * np.log1p(ALL_FEATURES[place].scale))
            for k, place in enumerate(BACKLOG)
        )
        found: np.ndarray = -self.scale * (waiting + started)
        return found

    def _centre(self, b: Rollout, is_cut: np.ndarray) -> dict[str, float]:
        """Take the mean off the critic's values, and a rollout into the mean reward per second."""
        mean = b.values[:, :-1].mean()
        b.values[...] -= mean
        b.last_values[is_cut] -= mean
        self.paid = (1.0 - RECENT) * self.paid + float(b.paid.sum(dtype=np.float64))
        self.seconds = (1.0 - RECENT) * self.seconds + float(b.durations.sum())
        return {"reward_per_s": self.rate}

    @property
    def rate(self) -> float:
        """The mean reward per second so far."""
        return self.paid / self.seconds if self.seconds > 0.0 else 0.0


def token_s(core: EnvCore) -> float:
    """Predicted seconds of a prompt token, one of TYPICAL_PROMPT that are computed in Sarathi-Serve's chunks."""
    state = core.engine.state
    chunk = min(int(default_knobs()["token_budget"]), core.config.max_num_batched_tokens)
    return float(prompt_s(state.own_linear_s[0], state.own_coef_s[0], 0, TYPICAL_PROMPT, chunk)) / TYPICAL_PROMPT


def others_mean(
    advantages: np.ndarray, clocks: np.ndarray, numbers: np.ndarray, group: int
) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the others' advantages at the same time of the same episode, and whether there is one.

    All are of shape (num_envs, n_steps); `numbers` are those of episodes, and environments 0, ..., group - 1 are the
    first group. Between two decisions of another member its advantages are interpolated; before its first decision of
    an episode in the rollout, and after its last, it has none.
    """
    found, known = np.zeros(advantages.shape, np.float32), np.zeros(advantages.shape, np.bool_)
    times = clocks + (numbers - numbers.min()) * (clocks.max() + 1.0)  # one episode behind the other
    for start in range(0, len(advantages), group):
        members = range(start, start + group)
        for own in members:
            total, count = np.zeros(advantages.shape[1]), np.zeros(advantages.shape[1])
            for other in members:
                if other != own:
                    covers = _covers(times[own], numbers[own], times[other], numbers[other])
                    total += np.where(covers, np.interp(times[own], times[other], advantages[other]), 0.0)
                    count += covers
            known[own] = count > 0
            found[own] = total / np.maximum(count, 1.0)
    return found, known


def _covers(times: np.ndarray, numbers: np.ndarray, others: np.ndarray, their_numbers: np.ndarray) -> np.ndarray:
    """Which of the times lie between two decisions, `others`, of the same episode; all (n_steps,)."""
    before, behind = np.searchsorted(others, times, "right") - 1, np.searchsorted(others, times, "left")
    last = len(others) - 1
    is_inside = (before >= 0) & (behind <= last)
    before, behind = before.clip(0), behind.clip(max=last)
    return is_inside & (their_numbers[before] == numbers) & (their_numbers[behind] == numbers)
