"""``python -m llmsched_gym`` is ``llmsched``."""

from llmsched_gym.cli import run

run()
