"""The commands put together, and what runs one of them: `main`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import typer

from llmsched_gym.cli import capacity, evaluate, lists, replay, reports, serve_bench, traces
from llmsched_gym.cli.endings import ENV_PREFIX, explain, fail, interrupted, remarks
from llmsched_gym.cli.passed_on import add_commands
from llmsched_gym.help_text import GroupedCommand, epilog, grouped
from llmsched_gym.interrupts import INTERRUPTED, code_of, interrupts, leave
from llmsched_gym.report import console

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
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions and leave.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no remarks on stderr.")] = False,
) -> None:
    """Say versions, or be quiet, whatever the command."""
    console.quiet = quiet
    if quiet:
        os.environ["LLMSCHED_SAY_COMPILING"] = "0"  # to workers, too
        context.call_on_close(lambda: os.environ.pop("LLMSCHED_SAY_COMPILING", None))


COMMANDS: tuple[tuple[Callable[..., None], tuple[str, ...]], ...] = (
    (evaluate.evaluate, ("llmsched evaluate --policy slai,sarathi --qps 1.4,1.8 --out out/mine",)),
    (capacity.capacity, ("llmsched capacity --policy slai --criterion 'ttft.p99<=2,attainment>=0.95'",)),
    (lists.policies, ("llmsched policies --json",)),
    (lists.routers, ("llmsched routers",)),
    (lists.suites, ("llmsched suites",)),
    (lists.suite, ("llmsched suite default > my.toml",)),
    (lists.workloads, ("llmsched workloads",)),
    (lists.profiles, ("llmsched profiles",)),
    (traces.trace, ("llmsched trace trace.csv --plot trace.png",)),
    (replay.replay, ("llmsched replay run.csv --profile rtx6000ada-mistral-7b --max-error 0.2",)),
    (
        serve_bench.serve_bench,
        ("llmsched serve-bench --url http://localhost:8000 --label vllm --qps 2,4 --seeds 3 --out out/server",),
    ),
    (reports.report, ("llmsched report out/mine", "llmsched report out/mine out/other --out out/both")),
    (reports.bench, ("llmsched bench --quick --json",)),
)
"""Commands in the order of help, with examples."""

for function, lines in COMMANDS:
    app.command(function.__name__.replace("_", "-"), cls=GroupedCommand, epilog=epilog(*lines))(grouped(function))
app.add_typer(traces.workload_app, name="workload")
add_commands(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    console.print_anywhere()
    extra: dict[str, Any] = {"auto_envvar_prefix": ENV_PREFIX}
    with interrupts() as seen, remarks():
        try:
            code = typer_group().main(args=argv, prog_name="llmsched", standalone_mode=False, **extra)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            if not seen:
                return explain(error)
            code = INTERRUPTED
    if code == INTERRUPTED:
        return fail(interrupted(sys.argv[1:] if argv is None else argv), code_of(seen))
    return code if isinstance(code, int) else 0


def run() -> NoReturn:
    """The program `llmsched`: :func:`main` with the words of the command line, then the end of the process."""
    leave(main())


def typer_group() -> Any:
    """All commands; their help does not say at each option which variable of the environment it has."""
    group: Any = typer.main.get_command(app)
    for command in (group, *group.commands.values()):
        for parameter in command.params:
            parameter.show_envvar = False
    return group
