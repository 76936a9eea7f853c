"""LLMRoute: an agent that sends requests to replicas, single and vectorised."""

from llmsched_gym.env.route.envs import LLMRouteEnv, LLMRouteVectorEnv

__all__ = ["LLMRouteEnv", "LLMRouteVectorEnv"]
