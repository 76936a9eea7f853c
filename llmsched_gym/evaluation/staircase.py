"""``python -m llmsched_gym.evaluation.staircase`` is :mod:`llmsched_gym.report.staircase`."""

import sys

from llmsched_gym.report.staircase import command

__all__ = ["command"]

if __name__ == "__main__":
    sys.exit(command())
