"""Planning with saved states: every two seconds, try each scheduler from here on and go on with the best.

A state holds what is hidden from agents, so this planner knows who will come and how long answers get. It says what
looking ahead is worth, not what a scheduler can do; with ``seed=`` in ``set_state`` it would not know the noise.
"""

from typing import Any

from llmsched_gym.env import LLMSchedEnv
from llmsched_gym.scheduler import make_scheduler

WORLD: dict[str, Any] = {"qps": 2.2, "horizon_s": 60.0}
NAMES = ("slai", "on-time", "sarathi[order=spf]", "sarathi[order=feasible,hold=true,cap=0.9]")
HELD_S, AHEAD_S = 2.0, 8.0  # how long a choice is kept, and how far is looked


def play(env: LLMSchedEnv, scheduler: Any, seconds: float) -> tuple[float, bool]:
    """What a scheduler earns in so many seconds, and whether the episode is over."""
    earned, done = 0.0, False
    while seconds > 0.0 and not done:
        _, reward, terminated, truncated, info = env.step_scheduler(scheduler)
        earned, seconds, done = earned + reward, seconds - info["duration_s"], terminated or truncated
    return earned, done


def plan(env: LLMSchedEnv, schedulers: list[Any]) -> Any:
    """The scheduler that would earn most from here on; the environment is left as it was."""
    state, earned = env.get_state(), []
    for scheduler in schedulers:
        env.set_state(state)
        earned.append(play(env, scheduler, AHEAD_S)[0])
    env.set_state(state)
    return schedulers[earned.index(max(earned))]


def utility(names: tuple[str, ...], seed: int) -> float:
    """What an episode pays under the best of these schedulers at each time."""
    env, schedulers, total, done = LLMSchedEnv(**WORLD), [make_scheduler(name) for name in names], 0.0, False
    env.reset(seed=seed)
    while not done:
        earned, done = play(env, plan(env, schedulers), HELD_S)
        total += earned
    return total


if __name__ == "__main__":
    print("seed  slai  planned")
    for seed in range(3):
        print(f"{seed:4} {utility(('slai',), seed):5.1f} {utility(NAMES, seed):8.1f}")
