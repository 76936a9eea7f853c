"""`llmsched watch`: a live view of one run of a policy in the simulator, at a multiple of real time."""

from __future__ import annotations

import math
import os
import sys
import time
from typing import Annotated, Any

import numpy as np
import typer

from llmsched_gym.config import ClusterScenario, ConfigError, find_suite, split_names
from llmsched_gym.env import LLMSchedEnv
from llmsched_gym.env.render import LivePanel, frame_text
from llmsched_gym.env.snapshot import ATTAINMENT_WINDOW_S, Snapshot, snapshot
from llmsched_gym.policies.bridge import SchedulerPolicy
from llmsched_gym.registry import make_scheduler
from llmsched_gym.report import console
from llmsched_gym.text import number

FRAMES_PER_S = 10
SLOWEST = 1e-3  # simulated seconds a second; a batch takes some hundredths
MOST = 4  # decodes and prompts in a frame: a panel of 22 lines


def watch_command(
    policy: Annotated[str, typer.Option(rich_help_panel="What runs", help="A name, module:Class or folder.")] = "slai",
    suite: Annotated[
        str, typer.Option(rich_help_panel="What runs", help="A suite of one engine: its name, or a TOML file.")
    ] = "default",
    qps: Annotated[
        float | None, typer.Option(rich_help_panel="What runs", help="Arrival rate, 1/s; else the suite's.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(rich_help_panel="What runs", help="Cost profile: a name or a JSON file.")
    ] = None,
    workload: Annotated[
        str | None, typer.Option(rich_help_panel="What runs", help="Fitted workload: a name or a JSON file.")
    ] = None,
    trace: Annotated[
        str | None, typer.Option(rich_help_panel="What runs", help="Trace file that replaces the workload.")
    ] = None,
    num_requests: Annotated[
        int | None,
        typer.Option(rich_help_panel="What runs", help="Measured requests of the run; else the suite's length."),
    ] = None,
    seed: Annotated[int, typer.Option(rich_help_panel="What runs", help="Of the requests.")] = 0,
    speed: Annotated[
        float,
        typer.Option(
            rich_help_panel="The view", metavar="N", help="Simulated seconds a second; inf: as fast as it goes."
        ),
    ] = 5,
    seconds: Annotated[
        float, typer.Option(rich_help_panel="The view", metavar="S", help="Stop after so many simulated seconds.")
    ] = math.inf,
    every: Annotated[
        float,
        typer.Option(rich_help_panel="The view", metavar="S", help="Without a terminal: simulated seconds a line."),
    ] = 5.0,
) -> None:
    """Watch one run: queue, batch, KV memory, deadlines, TTFT and attainment of the last minute; Ctrl-C ends it."""
    for name, value in (("speed", speed), ("seconds", seconds), ("every", every)):
        if not value > 0.0:
            raise ConfigError(f"{name}: expected a number above 0, got {value:g}")
    if speed < SLOWEST:
        raise ConfigError(f"speed: expected a number >= {SLOWEST:g}, got {speed:g}")
    env, chosen = _make(policy, suite, qps, profile, workload, trace, num_requests, seed)
    live = sys.stdout is not None and sys.stdout.isatty()
    panel, caption = LivePanel(), f"{chosen.name}, {suite}, {speed:g} x real time"
    step_s = speed / FRAMES_PER_S if live else every
    due_s, begun_s, over = 0.0, time.monotonic(), False
    try:
        while not over:
            due_s += min(step_s, every) if math.isinf(step_s) else step_s
            over = _run_to(env, chosen, min(due_s, seconds))
            shot = snapshot(env.core, 0)
            over = over or shot.clock_s >= seconds
            time.sleep(max(0.0, begun_s + shot.clock_s / speed - time.monotonic()))
            if live:
                panel.show(_frame(env, shot, caption))
            else:
                console.emit(line(env, shot) + "\n")
    except KeyboardInterrupt:  # how one leaves
        pass
    finally:
        panel.close()
        env.close()


def _make(
    policy: str,
    suite: str,
    qps: float | None,
    profile: str | None,
    workload: str | None,
    trace: str | None,
    num_requests: int | None,
    seed: int,
) -> tuple[LLMSchedEnv, SchedulerPolicy]:
    """The environment, reset, and the policy that steps it."""
    sys.path.append(os.getcwd())  # module:Class may lie where the user is
    names = split_names([policy], "policy")
    if len(names) != 1:
        raise ConfigError(f"policy: expected one name, got {policy!r}")
    if seed < 0:
        raise ConfigError(f"seed: expected a number >= 0, got {seed}")
    if isinstance(find_suite(suite).scenario, ClusterScenario):
        raise ConfigError(f"suite: expected one of a single engine, got {suite!r}")
    given = {"qps": qps, "profile": profile, "workload": workload, "trace": trace, "num_requests": num_requests}
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    scheduler = make_scheduler(names[0])
    if getattr(scheduler, "admission", None):
        fields["admission"] = scheduler.admission
    if getattr(scheduler, "clairvoyant", False):
        fields["length_hint"] = "oracle"
    env = LLMSchedEnv(suite, **fields)
    env.reset(seed=seed)
    return env, SchedulerPolicy(env, names[0])


def _run_to(env: LLMSchedEnv, policy: SchedulerPolicy, until_s: float) -> bool:
    """Step to that simulated time; returns whether the run is over."""
    sims = env.core.engine.state.sims
    while float(sims[0].clock_s) < until_s:
        _, _, terminated, truncated, _ = policy.step()
        if terminated or truncated:
            return True
    return False


def recent_ttft_s(env: LLMSchedEnv) -> np.ndarray:
    """TTFT of the requests whose first token came in the last minute of simulated time; (n,) seconds."""
    state = env.core.engine.state
    requests = state.requests[0, : state.worlds[0].num_requests]
    started = requests[requests["num_output_tokens"] > 0]
    recent = started[started["first_token_s"] >= float(state.sims[0].clock_s) - ATTAINMENT_WINDOW_S]
    return np.asarray(recent["first_token_s"] - recent["arrival_s"])


def rolling(env: LLMSchedEnv, shot: Snapshot) -> str:
    """Median and p99 TTFT and attainment of the last minute, in one line."""
    ttft_s = recent_ttft_s(env)
    p50, p99 = (_short(float(np.quantile(ttft_s, q))) if len(ttft_s) else "-" for q in (0.5, 0.99))
    return f"TTFT {p50} s, p99 {p99} s; on time {number(100 * shot.attainment, 0)} %"


def _short(seconds: float) -> str:
    return number(seconds, 2 if seconds < 10.0 else 1 if seconds < 100.0 else 0)


def line(env: LLMSchedEnv, shot: Snapshot) -> str:
    """One moment in a line of at most 80 characters, of a log for instance."""
    usage = 100 * shot.used_blocks / max(1, shot.total_blocks)
    running = len(shot.decodes) + len(shot.started)
    counts = f"{len(shot.waiting):>3} waiting {running:>3} running KV {usage:3.0f} %"
    return f"{shot.clock_s:6.0f} s {counts} {rolling(env, shot)}"


def _frame(env: LLMSchedEnv, shot: Snapshot, caption: str) -> Any:
    text = frame_text(shot, caption, MOST)
    text.append(f"\nlast {ATTAINMENT_WINDOW_S:.0f} s  {rolling(env, shot)}", "bold")
    return text
