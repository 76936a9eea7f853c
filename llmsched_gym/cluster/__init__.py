"""Replicas of one episode behind a router: events, reports, routers, and the :class:`Cluster` that runs them."""

from llmsched_gym.cluster.core import Cluster
from llmsched_gym.cluster.router import CompiledRouter, Router, RouterView

__all__ = ["Cluster", "CompiledRouter", "Router", "RouterView"]
