"""A reward of your own: a callable on the transition."""

import gymnasium as gym

import llmsched_gym  # noqa: F401
from llmsched_gym.env import Transition


def shorter_queues(transition: Transition) -> float:
    """Minus the requests in the system, integrated over time."""
    view = transition.view
    return -transition.duration_s * (len(view.waiting) + len(view.running))


env = gym.make("LLMSched-v0", reward=shorter_queues)
env.reset(seed=0)
print(env.step(env.action_space.sample())[1])
