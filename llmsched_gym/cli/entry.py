"""The commands put together, and what runs one of them: `main`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from llmsched_gym.cli import capacity, evaluate, lists, replay, reports, serve_bench, traces
from llmsched_gym.cli.endings import INTERRUPTED, explain, fail, interrupted, interrupts, remarks
from llmsched_gym.cli.passed_on import add_commands
from llmsched_gym.report import console

ENV_PREFIX = "LLMSCHED"

app = typer.Typer(
    help="Schedulers for LLM inference: compare them, and find the load that each can carry. Options can come from the "
    f"environment, {ENV_PREFIX}_EVALUATE_SEEDS=5 for --seeds 5 of evaluate.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        import platform
        from importlib import metadata

        packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("gymnasium", "numpy", "numba"))
        print(f"llmsched-gym {metadata.version('llmsched-gym')} (Python {platform.python_version()}, {packages})")
        raise typer.Exit


@app.callback()
def options_of_all(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions and leave.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no remarks on stderr.")] = False,
) -> None:
    """Say versions, or be quiet, whatever the command."""
    console.quiet = quiet


EXAMPLES = {
    "evaluate": "llmsched evaluate --policy slai,sarathi --qps 1.4,1.8 --out out/mine",
    "capacity": "llmsched capacity --policy slai --criterion 'ttft.p99<=2,attainment>=0.95'",
}

for function in (
    evaluate.evaluate,
    capacity.capacity,
    lists.policies,
    lists.routers,
    lists.suites,
    lists.suite,
    lists.workloads,
    lists.profiles,
    traces.trace,
    replay.replay,
    serve_bench.serve_bench,
    reports.report,
    reports.bench,
):
    name = function.__name__.replace("_", "-")
    app.command(name, epilog=f"\b\nExample:\n  {EXAMPLES[name]}" if name in EXAMPLES else None)(function)
app.add_typer(traces.workload_app, name="workload")
add_commands(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    console.print_anywhere()
    extra: dict[str, Any] = {"auto_envvar_prefix": ENV_PREFIX}
    with interrupts() as seen, remarks():
        try:
            code = _command_line().main(args=argv, prog_name="llmsched", standalone_mode=False, **extra)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            if not seen:
                return explain(error)
            code = INTERRUPTED
    if code == INTERRUPTED:
        return fail(interrupted(sys.argv[1:] if argv is None else argv), INTERRUPTED)
    return code if isinstance(code, int) else 0


def _command_line() -> Any:
    """All commands; their help does not say at each option which variable of the environment it has."""
    group: Any = typer.main.get_command(app)
    for command in (group, *group.commands.values()):
        for parameter in command.params:
            parameter.show_envvar = False
    return group
