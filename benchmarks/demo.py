"""The demo: reference schedulers on the paper's suite and on the default one, as a report.

python -m benchmarks.demo [--out out/demo] [--seeds 10]
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from llmsched_gym.cli import main as llmsched
from llmsched_gym.help_text import place

POLICIES = "sarathi,sarathi-spf,slai-fcfs-fixed,slai-spf-fixed,slai,vllm-v0,rad-512,srpt-capped,on-time,learned"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=place, default=Path("out/demo"), help="folder of the reports")
    parser.add_argument("--seeds", type=int, default=10, help="seeds per policy and load")
    args = parser.parse_args()
    runs = {
        "paper": ["--suite", "paper", "--qps", "1.0,1.2,1.4,1.6,1.8", "--num-requests", "1500"],
        "default": ["--suite", "default", "--qps", "1.4,1.8,2.2", "--num-requests", "1000"],
    }
    for name, options in runs.items():
        folder = args.out / name
        command = ["evaluate", "--policy", POLICIES, *options, "--seeds", str(args.seeds), "--out", str(folder)]
        print("llmsched " + " ".join(command), flush=True)
        code = llmsched(command)
        if code:
            return int(code)
    shutil.copy(args.out / "paper" / "report.html", args.out / "report.html")
    print(
        f"{args.out / 'report.html'}: the paper's workload; {args.out / 'default' / 'report.html'}: the default suite"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
