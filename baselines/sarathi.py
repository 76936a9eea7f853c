"""Sarathi-Serve (Agrawal et al., OSDI 2024, arXiv 2403.02310): chunked prefills piggy-backed on all decodes."""

from llmsched_gym.engine.pack import FCFS, SPF
from llmsched_gym.scheduler import Compiled

SCHEDULERS = {
    "sarathi": Compiled(
        "Sarathi-Serve: all decodes, then chunks of prompts first come first served, 512 tokens (arXiv 2403.02310)",
        settings={"order": FCFS},
    ),
    "sarathi-spf": Compiled(
        "Sarathi-Serve, shortest prompt first",
        settings={"order": SPF},
    ),
}
