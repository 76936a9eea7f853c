"""The map over cells on a Ray started here: the same rows, lost workers and drivers, what it costs beside processes.

    python -m benchmarks.ray_map [--section rows,worker,nodes,driver,listens,cost] [--workers 2] [--runs 200]
                                 [--out out/ray]

rows: a grid of so many runs, in one process and on Ray, one of them by a scheduler of the user's own. worker: the same
with a worker killed in the middle. nodes: on a cluster of two nodes by its address, of which one goes in the middle.
driver: the same by the command line, killed in the middle and started again.
listens: on which addresses Ray's ports listen. cost: processor time of the driver per cell, and cells per second of
50 ms and of 5 s on one worker and on `--workers`, as a share of what as many processes do; cells compute, or wait with
`--idle`.

Prints a line a check and exits with 1 if one fails. Needs ``pip install 'llmsched-gym[ray]'``, Linux and ss.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import new_folder, whole
from llmsched_gym.config import ConfigError, Scenario, scenario
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.evaluation.ray_pool import LOOPBACK, NO_CLUSTER, RayPool
from llmsched_gym.evaluation.spread import choose, spread
from llmsched_gym.evaluation.workers import Workers
from llmsched_gym.help_text import OneLineParser, place
from llmsched_gym.text import number, table

POLICIES = ("slai", "own_policy:Own")
OWN = """# a scheduler of the user's own, in a file that lies where the command is given
from llmsched_gym.scheduler import Compiled

Own = Compiled("Sarathi-Serve with 256 tokens", settings={"token_budget": 256})
"""
CELLS_S, TOTAL_S = (0.05, 5.0), 10.0  # seconds of a cell, and of all cells of a measurement on one worker
TRIVIAL = 2000
MOST_DRIVER_MS, LEAST_SHARE = 5.0, 0.9
LEFT_S = 100.0  # in which all processes of a killed driver have ended: two agents of Ray look for theirs now and then


def wait(seconds: float) -> int:
    """Take so many seconds of nobody's processor time; returns who did."""
    time.sleep(seconds)
    return os.getpid()


def busy(seconds: float) -> int:
    """Compute for so many seconds of this thread's processor time; returns who did."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return os.getpid()


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """Whether rows say the same, but for how long it took to make them."""
    return [{**row, "wall_time_s": 0} for row in one] == [{**row, "wall_time_s": 0} for row in other]


def world(runs: int) -> tuple[Scenario, dict[str, Any]]:
    """What is run, and how often: half of the runs by each policy."""
    return scenario("paper", num_requests=100, qps=1.4), {"seeds": runs // len(POLICIES)}


def rows(args: argparse.Namespace) -> bool:
    """The rows of a grid on Ray are those of one process, and so are its files."""
    base, settings = world(args.runs)
    here = evaluate(base, POLICIES, **settings, out=args.out / "here")
    with choose(args.workers, ray=True) as pool:
        there = evaluate(base, POLICIES, **settings, workers=pool, out=args.out / "rows")
    files = [f"{name}.parquet" for name in ("requests", "steps", "itl")]
    equal = all((args.out / "here" / f).read_bytes() == (args.out / "rows" / f).read_bytes() for f in files)
    print(f"{len(there)} runs on {args.workers} workers: rows {same(here, there)}, files {equal}")
    return same(here, there) and equal and len(there) == args.runs


def worker(args: argparse.Namespace) -> bool:
    """A worker that is killed in the middle costs no row and doubles none."""
    base, settings = world(args.runs)
    here = evaluate(base, POLICIES, **settings, out=args.out / "here")
    killed: list[int] = []
    lines: list[str] = []
    out = args.out / "worker"
    with choose(args.workers, ray=True) as pool:

        def progress(done: int, total: int) -> None:
            if done >= total // 3 and not killed:
                killed.append(ray_workers()[0])
                os.kill(killed[0], signal.SIGKILL)
            if (out / "partial" / "rows.jsonl").exists():
                lines[:] = (out / "partial" / "rows.jsonl").read_text().splitlines()

        there = evaluate(base, POLICIES, **settings, workers=pool, out=out, progress=progress)
    cells = [re.match(r'{"cell": (\d+)', line)[1] for line in lines]  # type: ignore[index]
    once = len(cells) == len(set(cells)) == args.runs
    print(f"{len(killed)} worker killed after {args.runs // 3} runs: rows {same(here, there)}, each kept once {once}")
    return bool(killed) and same(here, there) and once


def nodes(args: argparse.Namespace) -> bool:
    """A cluster by its address; a node that goes costs no row and doubles none."""
    from ray.cluster_utils import Cluster

    base, settings = world(args.runs)
    here = evaluate(base, POLICIES, **settings, out=args.out / "here")
    node = {"num_cpus": 1, "node_ip_address": LOOPBACK}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    left: list[int] = []
    try:
        second = cluster.add_node(**node)
        with choose(None, address=cluster.address, files=POLICIES) as pool:

            def progress(done: int, total: int) -> None:
                if done >= total // 3 and not left:
                    left.append(done)
                    cluster.remove_node(second, allow_graceful=False)

            told = pool.where() if isinstance(pool, RayPool) else ""
            there = evaluate(base, POLICIES, **settings, workers=pool, out=args.out / "nodes", progress=progress)
    finally:
        cluster.shutdown()
    print(f"a cluster {told}, a node of which left after {left} runs: rows {same(here, there)}")
    return bool(left) and same(here, there) and len(there) == args.runs


def ray_workers() -> list[int]:
    """Processes of this Ray that run calls, by what they call themselves."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            name = path.read_bytes()
        except OSError:
            continue
        if name.startswith(b"ray::call") and is_below(int(path.parent.name), os.getpid()):
            found.append(int(path.parent.name))
    return found


def is_below(process: int, root: int) -> bool:
    """Whether `root` started it, directly or not."""
    while process > 1 and process != root:
        try:
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return process == root


def driver(args: argparse.Namespace) -> bool:
    """A command that is killed in the middle goes on where it was when it is given again, and leaves no process."""
    base, settings = world(args.runs)
    evaluate(base, POLICIES, **settings, out=args.out / "here")
    out = args.out / "driver"
    command = [sys.executable, "-m", "llmsched_gym.cli", "evaluate", "--suite", "paper", "--num-requests", "100"]
    command += ["--policy", ",".join(POLICIES), "--set", "qps=1.4", "--seeds", str(settings["seeds"]), "--no-bound"]
    command += ["--workers", str(args.workers), "--ray", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    kept = out / "partial" / "rows.jsonl"
    while process.poll() is None and (not kept.exists() or len(kept.read_text().splitlines()) < args.runs // 3):
        time.sleep(0.02)
    children = [int(p.name) for p in Path("/proc").glob("[0-9]*") if is_below(int(p.name), process.pid)]
    process.kill()
    process.wait()
    before = len(kept.read_text().splitlines())
    end = time.monotonic() + LEFT_S
    while (alive := [pid for pid in children if running(pid)]) and time.monotonic() < end:
        time.sleep(0.1)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    there = pd.read_parquet(out / "runs.parquet")
    plain = pd.read_parquet(args.out / "here" / "runs.parquet")
    columns = [name for name in plain.columns if name != "wall_time_s"]
    equal = there[columns].equals(plain[columns])
    print(f"driver killed after {before} runs and started again: rows {equal}; processes left: {len(alive)}")
    return equal and before < args.runs and not alive


def running(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def listens(args: argparse.Namespace) -> bool:
    """Ray's processes, those of calls too, listen on 127.0.0.1 and nowhere else."""
    with choose(args.workers, ray=True) as pool:
        list(spread(pool, busy, [(0.2,)] * args.workers))
        said = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
        found = [(line.split()[3], int(pid)) for line in said.splitlines() for pid in re.findall(r"pid=(\d+)", line)]
        own = [address for address, pid in found if is_below(pid, os.getpid())]
    far = [address for address in own if not re.fullmatch(r"(\[::ffff:127\.0\.0\.1\]|127\.0\.0\.1):\d+", address)]
    print(f"{len(own)} ports, elsewhere than on 127.0.0.1: {far or 'none'}")
    return len(own) > args.workers and not far


def cost(args: argparse.Namespace) -> bool:
    """What the driver does for a cell, and how many cells a second there are, beside as many processes."""
    lines, good = [], True
    for workers in sorted({1, args.workers}):
        with choose(workers, ray=True) as ray, Workers(workers) as local:
            pools = {"ray": ray, "processes": local}
            for pool in pools.values():
                list(spread(pool, busy, [(0.5,)] * 2 * workers))  # all workers are there
            start, own = time.perf_counter(), time.process_time()
            list(spread(ray, busy, [(0.0,)] * TRIVIAL))
            each_ms = 1e3 * (time.perf_counter() - start) / TRIVIAL
            driver_ms = 1e3 * (time.process_time() - own) / TRIVIAL
            good &= driver_ms < MOST_DRIVER_MS
            print(
                f"{workers} workers, empty cells: {each_ms:.2f} ms each, {driver_ms:.2f} ms of the driver", flush=True
            )
            for seconds in CELLS_S:
                count = max(2, round(TOTAL_S / seconds)) * workers
                best = dict.fromkeys(pools, 0.0)
                for name in [*pools, *pools]:  # by turns, as others use the machine
                    start = time.perf_counter()
                    list(spread(pools[name], wait if args.idle else busy, [(seconds,)] * count))
                    best[name] = max(best[name], count / (time.perf_counter() - start))
                share = best["ray"] / best["processes"]
                good &= share >= LEAST_SHARE
                lines.append(
                    (f"{seconds:g} s", workers, number(best["processes"]), number(best["ray"]), f"{share:.2f}")
                )
    print(table(("cells of", "workers", "processes, cells/s", "Ray, cells/s", "share"), lines, 1))
    return good


MARKS = {"own_policy.py": lambda path: path.read_text() == OWN}
"""By which a folder is known as one of this module."""
SECTIONS = {"rows": rows, "worker": worker, "nodes": nodes, "driver": driver, "listens": listens, "cost": cost}


def main() -> int:
    os.environ.setdefault(NO_CLUSTER, "0")  # before Ray is imported: all of it on the loopback
    parser = OneLineParser(prog="python -m benchmarks.ray_map", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--section", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--workers", type=whole, default=2, help="of Ray, and processes beside it")
    parser.add_argument("--idle", action="store_true", help="cells of cost that wait, for a machine that others use")
    parser.add_argument("--runs", type=whole, default=200, help="of the grid")
    parser.add_argument(
        "--out", type=place, default=Path("out/ray"), help="folder, new or of this module, which is emptied"
    )
    args = parser.parse_args()
    sections = args.section.split(",")
    for name in sections:
        if name not in SECTIONS:
            parser.error(f"--section: expected some of {', '.join(SECTIONS)}, got {name!r}")
    try:
        new_folder(args.out, MARKS)
    except ConfigError as error:
        parser.error(str(error))
    args.out = args.out.resolve()
    (args.out / "own_policy.py").write_text(OWN)
    root = Path.cwd()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    os.chdir(args.out)
    sys.path.insert(0, str(args.out))
    failed = [name for name in sections if not SECTIONS[name](args)]
    print(f"failed: {', '.join(failed)}" if failed else "all as it should be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
