"""Training, tuning and imitation with Stable-Baselines3; run from a clone: `python -m agents.train`."""
