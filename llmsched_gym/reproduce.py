"""``python -m llmsched_gym.reproduce`` is ``llmsched reproduce``, :mod:`llmsched_gym.paper.reproduce`."""

import sys

from llmsched_gym.cli import main as llmsched
from llmsched_gym.paper.reproduce import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(llmsched(["reproduce", *sys.argv[1:]]))
