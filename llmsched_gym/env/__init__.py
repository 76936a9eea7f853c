"""LLMSched: the engine as a Gymnasium environment, single and vectorised."""

from llmsched_gym.env.actions.action import InvalidAction
from llmsched_gym.env.batched import Moments, batched
from llmsched_gym.env.reward import Transition
from llmsched_gym.env.single import LLMSchedEnv
from llmsched_gym.env.vector import LLMSchedVectorEnv

__all__ = ["InvalidAction", "LLMSchedEnv", "LLMSchedVectorEnv", "Moments", "Transition", "batched"]
