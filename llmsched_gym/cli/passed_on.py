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


def _fit(name: str, args: list[str]) -> int:
    function = importlib.import_module("llmsched_gym.cli.fit").fit_command
    code: int = importlib.import_module("llmsched_gym.real_backend.command").call(function, f"llmsched {name}", args)
    return code


def _roofline(name: str, args: list[str]) -> int:
    function = importlib.import_module("llmsched_gym.cli.roofline").roofline_command
    code: int = importlib.import_module("llmsched_gym.real_backend.command").call(function, f"llmsched {name}", args)
    return code


def _arena(name: str, args: list[str]) -> int:
    function = importlib.import_module("llmsched_gym.cli.arena").arena_command
    code: int = importlib.import_module("llmsched_gym.real_backend.command").call(function, f"llmsched {name}", args)
    return code


def _watch(name: str, args: list[str]) -> int:
    function = importlib.import_module("llmsched_gym.cli.watch").watch_command
    code: int = importlib.import_module("llmsched_gym.real_backend.command").call(function, f"llmsched {name}", args)
    return code


def _on_real_model(name: str, args: list[str]) -> int:
    module = {"calibrate": "calibration.calibrate", "sim2real": "sim2real.compare"}[name]
    function = getattr(importlib.import_module(f"llmsched_gym.real_backend.{module}"), f"{name}_command")
    code: int = importlib.import_module("llmsched_gym.real_backend.command").call(function, f"llmsched {name}", args)
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
    "arena": ("Rank all schedulers on all suites of one engine", _arena),
    "fit": ("Fit a cost profile to tables of measured kernels", _fit),
    "roofline": ("Make a cost profile of MODEL on DEVICE from data sheets", _roofline),
    "watch": ("Watch one run of a policy live in the terminal", _watch),
    "calibrate": ("Measure a real model's batches and fit a cost profile", _on_real_model),
    "sim2real": ("Compare the simulator with a real model", _on_real_model),
    "train": ("Train PPO or MaskablePPO", _with_agents),
    "ppo": ("Train our own PPO, twice as fast: features, knobs, presets and requests", _with_agents),
    "tune": ("Tune a constant, a linear rule or a scheduler's parameters", _with_agents),
    "search": ("Search settings of train with Optuna", _with_agents),
    "imitate": ("Imitate a scheduler with a network", _with_agents),
    "record": ("Record data sets for offline learning", _with_agents),
    "compare": ("Compare trained agents with opponents, over training seeds", _with_agents),
}
