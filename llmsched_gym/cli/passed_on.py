"""Commands that pass their options on to the module that does the work, which is imported only then."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import typer

from llmsched_gym.config import ConfigError


def add_commands(app: typer.Typer) -> None:
    """Add the commands of :data:`COMMANDS` to the command line."""
    for name, (what, run) in COMMANDS.items():
        app.command(
            name,
            help=f"{what}; `llmsched {name} --help` lists its options.",
            context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
        )(_command(name, run))


def _command(name: str, run: Callable[[str, list[str]], int]) -> Callable[[typer.Context], None]:
    def command(context: typer.Context) -> None:
        raise typer.Exit(run(name, context.args))

    return command


def _reproduce(name: str, args: list[str]) -> int:
    code: int = importlib.import_module("llmsched_gym.paper.reproduce").main(args)
    return code


TYPED = {
    "arena": ("cli.arena", "arena_command", "llmsched arena --out out/arena --suites paper,default --seeds 3"),
    "fit": (
        "cli.fit",
        "fit_command",
        "llmsched fit --dense dense.csv --attention attention.csv --per-sequence heads.csv --out mine.json",
        "llmsched fit --batches measured.csv --model mistral-7b --device h100-sxm --out mine.json",
    ),
    "roofline": ("cli.roofline", "roofline_command", "llmsched roofline mistral-7b h100-sxm --out mine.json"),
    "watch": ("cli.watch", "watch_command", "llmsched watch --policy slai --qps 1.8 --speed 10"),
    "calibrate": (
        "real_backend.calibration.calibrate",
        "calibrate_command",
        "llmsched calibrate --model random:tiny --device cpu --out tiny.json",
    ),
    "sim2real": (
        "real_backend.sim2real.compare",
        "sim2real_command",
        "llmsched sim2real --model random:tiny --device cpu --out out/tiny --seeds 1",
    ),
}
"""Commands that are one function: its module, its name, and examples."""


def _typed(name: str, args: list[str]) -> int:
    module, function, *lines = TYPED[name]
    command = getattr(importlib.import_module(f"llmsched_gym.{module}"), function)
    call = importlib.import_module("llmsched_gym.real_backend.command").call
    code: int = call(command, f"llmsched {name}", args, lines)
    return code


def _with_agents(name: str, args: list[str]) -> int:
    try:
        module = importlib.import_module(f"llmsched_gym.agents.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("llmsched_gym"):
            raise
        extras = "agents,search" if name == "search" else "agents"
        raise ConfigError(f"llmsched {name} needs {error.name}: pip install '.[{extras}]'") from None
    module.command(args, f"llmsched {name}")
    return 0


COMMANDS: dict[str, tuple[str, Callable[[str, list[str]], int]]] = {
    "reproduce": ("Run the paper's whole evaluation and write docs/results.md", _reproduce),
    "arena": ("Rank all schedulers on all suites of one engine", _typed),
    "fit": ("Fit a cost profile to tables of measured kernels", _typed),
    "roofline": ("Make a cost profile of MODEL on DEVICE from data sheets", _typed),
    "watch": ("Watch one run of a policy live in the terminal", _typed),
    "calibrate": ("Measure a real model's batches and fit a cost profile", _typed),
    "sim2real": ("Compare the simulator with a real model", _typed),
    "train": ("Train PPO or MaskablePPO", _with_agents),
    "ppo": ("Train our own PPO, twice as fast: features, knobs, presets and requests", _with_agents),
    "tune": ("Tune a constant, a linear rule or a scheduler's parameters", _with_agents),
    "search": ("Search settings of train with Optuna", _with_agents),
    "imitate": ("Imitate a scheduler with a network", _with_agents),
    "record": ("Record data sets for offline learning", _with_agents),
    "compare": ("Compare trained agents with opponents, over training seeds", _with_agents),
}
