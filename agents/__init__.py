"""Training, tuning and imitation with Stable-Baselines3: `llmsched train`, or `python -m agents.train` in a clone."""

import importlib
import sys

if __name__ == "agents":  # a clone's spelling of the same package
    sys.modules[__name__] = importlib.import_module("llmsched_gym.agents")
