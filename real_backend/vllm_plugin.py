"""Where ``vllm serve MODEL --scheduler-cls llmsched_gym.real_backend.vllm_plugin.Scheduler`` finds it; docs/vllm.md."""

from llmsched_gym.real_backend.vllm.plugin import AsyncScheduler, Scheduler, SyncScheduler

__all__ = ["AsyncScheduler", "Scheduler", "SyncScheduler"]
