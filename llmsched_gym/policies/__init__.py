"""Learned policies at inference time, without torch: folders that hold no code, networks, bridges to schedulers."""

from llmsched_gym.policies.folder import PolicySpec, read_folder, write_folder
from llmsched_gym.policies.load import LoadedPolicy, load_policy

__all__ = ["LoadedPolicy", "PolicySpec", "load_policy", "read_folder", "write_folder"]
