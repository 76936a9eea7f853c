"""What tests of the command line share: it as a process, a short run, traces, and what it says."""

import re
import subprocess
import sys

RUN = ["evaluate", "--policy", "slai", "--suite", "paper", "--qps", "1.5", "--seeds", "2", "--num-requests", "20"]


def llmsched(*args, **options):
    return subprocess.run(
        [sys.executable, "-m", "llmsched_gym.cli", *args], capture_output=True, text=True, timeout=120, **options
    )


def refuse(text):
    raise AssertionError(f"{text} is no JSON")


def trace(path, rows=20, **changes):
    """A trace file whose line numbers in `changes` (as l17=...) hold something else."""
    lines = ["arrived_at,num_prefill_tokens,num_decode_tokens"] + [f"{0.5 * i},100,20" for i in range(rows)]
    for line, text in changes.items():
        lines[int(line[1:]) - 1] = text
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def remarks(stderr):
    """What was said besides how far the runs are, which comes every 10 s: a slow machine says it, a quick one not."""
    return "".join(line for line in stderr.splitlines(True) if not re.search(r"\d+ of \d+ runs after \d+ s$", line))
