"""``python -m llmsched_gym.reproduce`` is :mod:`llmsched_gym.paper.reproduce`."""

import sys

from llmsched_gym.paper.reproduce import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
