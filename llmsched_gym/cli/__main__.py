"""``python -m llmsched_gym.cli`` is ``llmsched``."""

from llmsched_gym.cli import run

run()
