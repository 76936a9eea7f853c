"""The command line: `llmsched COMMAND`, thin over the packages that do the work.

Results go to stdout, progress and remarks to stderr. What cannot be done is said in one line, with exit code 2.
Modules are imported by the commands that need them, so that listing things is quick. The file is long because the
options of all commands are declared here once.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from llmsched_gym.commands import add_commands
from llmsched_gym.config import (
    CLUSTER_SUITES,
    SUITES,
    ClusterScenario,
    ConfigError,
    Scenario,
    find_suite,
    scenario,
    split_names,
    suite_text,
)
from llmsched_gym.options_file import read_options
from llmsched_gym.report import console, terminal

USAGE, FAILURE, INTERRUPTED = 2, 1, 130

ENV_PREFIX = "LLMSCHED"
GO_ON, RESUME = ("evaluate", "capacity", "serve-bench", "compare", "arena"), ("train", "ppo", "tune", "search")

app = typer.Typer(
    help="Schedulers for LLM inference: compare them, and find the load that each can carry. Options can come from the "
    f"environment, {ENV_PREFIX}_EVALUATE_SEEDS=5 for --seeds 5 of evaluate.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Policy = Annotated[
    list[str], typer.Option(metavar="P1,P2,...", help="Names, module:Class or folders, separated by commas.")
]
SuiteName = Annotated[
    str, typer.Option(help=f"One of {', '.join((*SUITES, *CLUSTER_SUITES))}, or a TOML file (llmsched suite).")
]
Routers = Annotated[
    str | None,
    typer.Option("--router", metavar="R1,R2,...", help="Routers, each with every policy, on a suite of replicas."),
]
Profile = Annotated[str | None, typer.Option(help="Cost profile: a name or a JSON file.")]
Workload = Annotated[str | None, typer.Option(help="Fitted workload: a name or a JSON file.")]
TraceFile = Annotated[str | None, typer.Option(help="Trace file that replaces the workload.")]
TraceArrivals = Annotated[
    str | None,
    typer.Option(
        help="With a trace: keep its times (the default where it has some), or poisson, gamma, mmpp, switching."
    ),
]
TraceInvalid = Annotated[str | None, typer.Option(help="Rows of a trace that break a rule: raise, or drop.")]
NumRequests = Annotated[int | None, typer.Option(help="Measured requests of a run (2000).")]
Seeds = Annotated[int, typer.Option(help="Number of seeds.")]
FirstSeed = Annotated[int, typer.Option(help="The first seed.")]
StrictShare = Annotated[float | None, typer.Option(help="Share of strict users, 0 to 1.")]
TtftSlo = Annotated[
    str | None, typer.Option(metavar="S[,T]", help="TTFT SLO: seconds, and seconds a prompt token (0).")
]
TbtSlo = Annotated[
    str | None, typer.Option(metavar="S[,S]", help="SLO of gaps between tokens, seconds: of strict users, of others.")
]
Jitter = Annotated[float | None, typer.Option(help="Sigma of the log-normal factor on batch times.")]
Patience = Annotated[float | None, typer.Option(help="Lateness at which a client leaves, seconds; inf: never.")]
CostScale = Annotated[float | None, typer.Option(help="Hidden factor on batch times.")]
LengthHint = Annotated[str | None, typer.Option(help="Output length told to policies: none, noisy:SIGMA, oracle.")]
TbtRule = Annotated[str | None, typer.Option(help="every-gap, fraction:X, deadline or mean.")]
BackendName = Annotated[
    str | None,
    typer.Option("--backend", help="What executes batches: simulated, or a real model: transformers or vllm."),
]
Model = Annotated[str | None, typer.Option(help="With transformers: a folder, a hub id, random:tiny.")]
CountHostTime = Annotated[
    bool, typer.Option("--count-host-time", help="With transformers: let the scheduler's own time count.")
]
PrefixCaching = Annotated[
    bool | None,
    typer.Option("--prefix-caching/--no-prefix-caching", help="Whether requests share KV blocks of equal beginnings."),
]
AllowRefusal = Annotated[bool, typer.Option("--allow-refusal", help="Let policies refuse requests.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Any other field of the scenario.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; one per core unless given.")]
OnRay = Annotated[bool, typer.Option("--ray", help="Run on a Ray started here, of --workers processes.")]
RayAddress = Annotated[
    str | None, typer.Option("--ray-address", metavar="A", help="Run on the Ray cluster at this address.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _take_file(context: typer.Context, path: Path | None) -> Any:
    """Let the file's options be the defaults of this command; the value is what it says of the scenario's fields."""
    if path is None:
        return None
    found = read_options(path, [parameter.name or "" for parameter in context.command.params])
    context.default_map = {**(context.default_map or {}), **found.options}
    return found.fields


OptionsFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=_take_file,
        metavar="FILE",
        help="Options by name, TOML or JSON, or the config.json of a run.",
    ),
]


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    console.print_anywhere()
    extra: dict[str, Any] = {"auto_envvar_prefix": ENV_PREFIX}
    with _interrupts() as seen, _remarks():
        try:
            code = _command_line().main(args=argv, prog_name="llmsched", standalone_mode=False, **extra)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            if not seen:
                return _explain(error)
            code = INTERRUPTED
    if code == INTERRUPTED:
        return _fail(_interrupted(sys.argv[1:] if argv is None else argv), INTERRUPTED)
    return code if isinstance(code, int) else 0


def _interrupted(words: Sequence[str]) -> str:
    """What to say of an interrupt: commands that keep what is done in their folder can go on from it."""
    command = next((word for word in words if not word.startswith("-")), "")
    variable = f"{ENV_PREFIX}_{command.upper().replace('-', '_')}_OUT"
    named = variable in os.environ or any(word.split("=")[0] == "--out" for word in words)
    if command == "reproduce" or (command in GO_ON and named):
        return "interrupted: the same command goes on where it stopped"
    if command in RESUME:
        return "interrupted: with --resume the same command goes on from its last checkpoint, if there is one"
    return "interrupted"


def _command_line() -> Any:
    """All commands; their help does not say at each option which variable of the environment it has."""
    group: Any = typer.main.get_command(app)
    for command in (group, *group.commands.values()):
        for parameter in command.params:
            parameter.show_envvar = False
    return group


@contextmanager
def _remarks() -> Iterator[None]:
    """Print our own warnings as lines of ours, each once."""
    shown: set[str] = set()
    usual = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if not category.__module__.startswith("llmsched_gym."):
            usual(message, category, *where, **more)
        elif str(message) not in shown:
            shown.add(str(message))
            console.remark(str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """The interrupts that came; numba turns one that comes while it compiles into whatever error it causes there."""
    seen: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    def unraisable(ignored: Any) -> None:
        if not issubclass(ignored.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(ignored)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen
        return
    hook = sys.unraisablehook
    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = unraisable
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = hook


def _explain(error: Exception) -> int:
    """Say in one line what was wrong; an error that nobody foresaw goes on as it is."""
    if hasattr(error, "format_message"):  # of the command line itself
        return _fail(error.format_message() or "expected a command; see llmsched --help", USAGE)
    usage, failure = _known_errors()
    if not isinstance(error, (*usage, *failure)):
        raise error
    if isinstance(error, MemoryError):
        error = MemoryError(f"not enough memory: {error}")
    return _fail(str(error), USAGE if isinstance(error, usage) else FAILURE)


def _known_errors() -> tuple[tuple[type[Exception], ...], tuple[type[Exception], ...]]:
    """Errors of what was asked for, and of a policy or the machine while it runs."""
    from concurrent.futures import BrokenExecutor

    from llmsched_gym.cost import ProfileError
    from llmsched_gym.engine import IllegalBatch, StalledScheduler
    from llmsched_gym.scheduler import PolicyError
    from llmsched_gym.workload import TraceError

    backend_error = importlib.import_module("llmsched_gym.real_backend").BackendError
    return (ConfigError, PolicyError, TraceError, ProfileError, backend_error), (
        IllegalBatch,
        StalledScheduler,
        BrokenExecutor,
        MemoryError,
        OSError,
    )


def _fail(message: str, code: int) -> int:
    print("llmsched:", " ".join(message.split()), file=sys.stderr)
    return code


@app.command(epilog="\b\nExample:\n  llmsched evaluate --policy slai,sarathi --qps 1.4,1.8 --out out/mine")
def evaluate(
    policy: Policy,
    suite: SuiteName = "default",
    router: Routers = None,
    replicas: Annotated[int | None, typer.Option(help="Number of equal replicas; default: the suite's.")] = None,
    staleness: Annotated[float | None, typer.Option(help="Seconds between two reports of a replica; 0: none.")] = None,
    profile: Profile = None,
    workload: Workload = None,
    trace: TraceFile = None,
    trace_arrivals: TraceArrivals = None,
    trace_invalid: TraceInvalid = None,
    qps: Annotated[
        str | None,
        typer.Option(help="Arrival rates, 1/s, of requests or sessions, separated by commas; else the suite's."),
    ] = None,
    num_requests: NumRequests = None,
    seeds: Seeds = 20,
    first_seed: FirstSeed = 0,
    strict_share: StrictShare = None,
    ttft_slo: TtftSlo = None,
    tbt_slo: TbtSlo = None,
    jitter: Jitter = None,
    patience: Patience = None,
    cost_scale: CostScale = None,
    length_hint: LengthHint = None,
    tbt_rule: TbtRule = None,
    backend: BackendName = None,
    model: Model = None,
    count_host_time: CountHostTime = False,
    allow_refusal: AllowRefusal = False,
    prefix_caching: PrefixCaching = None,
    set_: Set = None,
    workers: Workers = None,
    ray: OnRay = False,
    ray_address: RayAddress = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the tables and a report.")] = None,
    perfetto: Annotated[
        Path | None, typer.Option(help="Of a single run: its batches and requests as a trace for ui.perfetto.dev.")
    ] = None,
    no_bound: Annotated[bool, typer.Option("--no-bound", help="With --out, leave the clairvoyant bound out.")] = False,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """Run policies on the same requests, at each rate and seed; with --out, also shortest-total for a bound."""
    world = _scenario(locals())
    rates = None if qps is None else _numbers("qps", qps)
    from llmsched_gym.evaluation import cluster_capacity as clusters
    from llmsched_gym.evaluation.grid import evaluate as run
    from llmsched_gym.evaluation.spread import where
    from llmsched_gym.report.bounds import with_bound

    named = split_policies(policy)
    for name, given in (("router", router), ("replicas", replicas), ("staleness", staleness)):
        if given is not None and not isinstance(world, ClusterScenario):
            raise ConfigError(f"{name}: expected a suite of several replicas, got {suite!r}")
    if isinstance(world, ClusterScenario):
        routers_named = split_policies([world.router if router is None else router], "router")
        named = clusters.pairs(routers_named, named)
        world = world if replicas is None else clusters.with_replicas(world, replicas)
        world = world if staleness is None else world.replace(router_staleness_s=staleness)
    if perfetto is not None:
        from llmsched_gym.evaluation.perfetto import claim_trace

        claim_trace(perfetto)
        if len(named) != 1 or seeds != 1 or (rates is not None and len(rates) != 1):
            raise ConfigError("perfetto: expected one policy, one rate and --seeds 1, got several runs")
        if isinstance(world, ClusterScenario) or world.backend != "simulated" or world.async_lag:
            raise ConfigError("perfetto: expected one simulated engine without async_lag")
    bounded = out is not None and not no_bound and world.backend == "simulated"
    bounded = bounded and not isinstance(world, ClusterScenario)
    chosen = with_bound(named) if bounded else named
    with _places(locals()) as places, console.progress_bar("runs", where(places)) as progress:
        rows = run(
            world,
            chosen,
            qps=rates,
            seeds=seeds,
            first_seed=first_seed,
            workers=places,
            out=out,
            progress=progress,
        )
    if perfetto is not None:
        from llmsched_gym.evaluation.grid import finite
        from llmsched_gym.evaluation.perfetto import write_trace
        from llmsched_gym.evaluation.record import record

        one = finite(world) if rates is None else finite(world).replace(qps=rates[0])
        write_trace(record(one, named[0], first_seed), perfetto)
        console.remark(f"wrote {perfetto}; open it at ui.perfetto.dev")
    try:
        if out is not None:
            from llmsched_gym.evaluation.lives import write_lives

            write_lives(out, world)
            report([out])
    finally:
        if as_json:
            console.print_rows(rows)
        else:
            for table in terminal.comparison(rows):
                console.print_table(table)
    if chosen != named:
        note = f"{chosen[-1]} ran too: a bound that knows every output length (--no-bound leaves it out)"
        console.remark(note)


@app.command(epilog="\b\nExample:\n  llmsched capacity --policy slai --criterion 'ttft.p99<=2,attainment>=0.95'")
def capacity(
    policy: Policy,
    criterion: Annotated[
        str,
        typer.Option(
            help="What must hold, in quotes: ttft.p99<=2,itl.strict.p99<=0.1,attainment>=0.95 (seconds, shares), or "
            "ttft-median, paper, serve-all:X; docs/paths/device.md has all."
        ),
    ],
    suite: SuiteName = "default",
    profile: Profile = None,
    workload: Workload = None,
    trace: TraceFile = None,
    trace_arrivals: TraceArrivals = None,
    trace_invalid: TraceInvalid = None,
    qps: Annotated[
        str | None,
        typer.Option(help="Lowest and highest rate searched, 1/s; else 0.1,16, further where the fluid capacity is."),
    ] = None,
    router: Routers = None,
    replicas: Annotated[str | None, typer.Option(help="Numbers of equal replicas; default: the suite's.")] = None,
    num_requests: NumRequests = None,
    seeds: Seeds = 20,
    first_seed: FirstSeed = 0,
    strict_share: StrictShare = None,
    ttft_slo: TtftSlo = None,
    tbt_slo: TbtSlo = None,
    jitter: Jitter = None,
    patience: Patience = None,
    cost_scale: CostScale = None,
    length_hint: LengthHint = None,
    tbt_rule: TbtRule = None,
    allow_refusal: AllowRefusal = False,
    prefix_caching: PrefixCaching = None,
    set_: Set = None,
    workers: Workers = None,
    ray: OnRay = False,
    ray_address: RayAddress = None,
    out: Annotated[Path | None, typer.Option(help="Folder for capacity-CRITERION.json and a report.")] = None,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """Find the largest arrival rate at which each policy meets a criterion."""
    world = _scenario(locals())
    bounds = None if qps is None else _numbers("qps", qps)
    if bounds is not None and (len(bounds) != 2 or not bounds[0] < bounds[1]):
        raise ConfigError(f"qps: expected the lowest and the highest rate, LOW,HIGH, got {qps!r}")
    from llmsched_gym.evaluation import capacity as search
    from llmsched_gym.evaluation import cluster_capacity as clusters
    from llmsched_gym.evaluation.criteria import criterion as judged_by
    from llmsched_gym.evaluation.spread import where
    from llmsched_gym.workload.generate import come_in_sessions

    rates = None if bounds is None else (bounds[0], bounds[1])
    settings: dict[str, Any] = {"seeds": seeds, "first_seed": first_seed, "out": out}
    labels: list[str] = []
    with _places(locals()) as places, console.progress_bar("runs", where(places)) as progress:
        settings |= {"workers": places, "progress": progress}
        if isinstance(world, ClusterScenario):
            numbers = [world.num_replicas] if replicas is None else _whole_numbers("replicas", replicas)
            routers_named = split_policies([world.router if router is None else router], "router")
            chosen = clusters.pairs(routers_named, split_policies(policy))
            several = clusters.by_replicas(world, chosen, criterion, numbers, qps=rates, **settings)
            found = [item for _, item in several]
            labels = [f"{item.policy} on {n}" if len(numbers) > 1 else item.policy for n, item in several]
        elif router is not None or replicas is not None:
            name = "router" if router is not None else "replicas"
            raise ConfigError(f"{name}: expected a suite of several replicas, got {suite!r}")
        else:
            judged_by(criterion)  # before the fluid capacity takes its time
            qps_range = rates or clusters.searched_rates(world)
            found = search.capacity(world, split_policies(policy), criterion, qps=qps_range, **settings)
            labels = [item.policy for item in found]
    ratios, unit = search.ratios(found), "sessions/s" if come_in_sessions(world) else "1/s"
    for label, item in zip(labels, found, strict=True):
        if item.note:
            console.remark(f"{label}: {item.criterion} {item.note}")
    if not isinstance(world, ClusterScenario) and world.backend == "simulated":
        from llmsched_gym.fluid import fluid_capacity

        most = f"{fluid_capacity(world).qps:.3g} {'requests/s' if unit == '1/s' else unit}"
        console.remark(f"no scheduler that serves everybody sustains more than {most}, the fluid capacity")
    named = [{"policy": label, "ratio_to": labels[0]} for label in labels]
    rows = [item.to_row() | ratio | name for item, ratio, name in zip(found, ratios, named, strict=True)]
    folders = [] if out is None else [out, *sorted(out.glob("replicas-*"))]
    for folder in folders:
        if any(folder.glob("capacity-*.json")):
            report([folder])
    if as_json:
        console.print_rows(rows)
    else:
        console.print_table(terminal.capacities(rows, unit))
    if any(item.shares for item in found):
        console.print_table(terminal.served(rows, unit), sys.stderr)


@app.command()
def policies(as_json: AsJson = False) -> None:
    """List the schedulers and what they do."""
    from llmsched_gym.registry import registry
    from llmsched_gym.scheduler import Compiled

    rows = []
    for name, entry in sorted(registry().items()):
        what = getattr(entry, "what", " ".join((entry.__doc__ or "").split()))
        kind = {"compiled": isinstance(entry, Compiled), "clairvoyant": getattr(entry, "clairvoyant", False)}
        rows.append({"name": name, "what": what, **kind})
    console.print_listing(rows, {"name": "policy", "what": "what"}, as_json)


@app.command()
def routers(as_json: AsJson = False) -> None:
    """List the routers and what they do."""
    from llmsched_gym.registry import routers as known

    rows = []
    for name, entry in sorted(known().items()):
        options = {parameter.name: f"{parameter.default:g}" for parameter in entry.own}
        given = "" if not options else f"[{','.join(f'{key}={value}' for key, value in options.items())}]"
        rows.append({"name": name + given, "what": entry.what, "parameters": options})
    console.print_listing(rows, {"name": "router", "what": "what"}, as_json)


@app.command()
def suites(as_json: AsJson = False) -> None:
    """List the suites."""
    rows = []
    for name, entry in (SUITES | CLUSTER_SUITES).items():
        fields = {k: "inf" if v == float("inf") else v for k, v in entry.scenario.to_dict().items()}
        rows.append({"name": name, "what": entry.what, "env_id": entry.env_id, "scenario": fields})
    console.print_listing(rows, {"name": "suite", "env_id": "environment", "what": "what"}, as_json)


@app.command()
def suite(name: Annotated[str, typer.Argument(metavar="NAME", help="A suite's name, or a TOML file.")]) -> None:
    """Print a suite as a TOML file, to be changed and given to --suite."""
    console.emit(suite_text(find_suite(name)))


@app.command()
def workloads(as_json: AsJson = False) -> None:
    """List the fitted workloads."""
    from llmsched_gym.workload import describe_workloads

    rows = describe_workloads()
    for row in [] if as_json else rows:
        for name in ("prompt_tokens", "output_tokens"):
            row[name] = " / ".join(f"{row[name][figure]:.0f}" for figure in ("mean", "p50", "p90", "p99"))
    heads = {"prompt_tokens": "prompt tokens: mean / p50 / p90 / p99", "output_tokens": "output tokens"}
    console.print_listing(rows, {"name": "workload", **heads, "source": "source"}, as_json)


workload_app = typer.Typer(help="Workloads of one's own: `llmsched workload fit TRACE`.", rich_markup_mode=None)
app.add_typer(workload_app, name="workload")


@workload_app.callback()
def _workload() -> None:
    pass


@workload_app.command("fit")
def workload_fit(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace, or a folder of ServeGen's clients.")],
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="The workload file to write.")],
    name: Annotated[str | None, typer.Option(help="Name of the workload; default: the file's.")] = None,
    source: Annotated[str | None, typer.Option(help="Where the trace comes from, licence included.")] = None,
    suite_out: Annotated[
        Path | None, typer.Option("--suite", metavar="FILE.toml", help="Write a suite, too: with the trace's rate.")
    ] = None,
    max_total_tokens: Annotated[
        int | None, typer.Option(min=2, help="Longest prompt + output; default: the trace's.")
    ] = None,
    trace_invalid: TraceInvalid = None,
    as_json: AsJson = False,
) -> None:
    """Fit a workload to a trace: lengths, or sessions where it has them; and say how far it is off."""
    from llmsched_gym.workload import fit_trace
    from llmsched_gym.workload.traces import load_trace

    checked = scenario(**({} if trace_invalid is None else {"trace_invalid": trace_invalid}))
    fit_trace.check_places(out, suite_out)
    loaded = load_trace(trace, checked.trace_invalid)
    data, rows = fit_trace.fit_workload(loaded, name or out.stem, source or trace.name, max_total_tokens)
    fit_trace.write_workload(data, out)
    if suite_out is not None:
        fit_trace.write_suite(data, out, suite_out)
    if as_json:
        console.emit(json.dumps({"workload": str(out), "arrivals": data["arrivals"], "fit": rows}) + "\n")
        return
    console.print_table(terminal.fit_table(data, rows))


@app.command()
def profiles(as_json: AsJson = False) -> None:
    """List the cost profiles."""
    from llmsched_gym.cost import list_profiles

    rows = []
    for profile in list_profiles():
        full_ms = 1e3 * float(profile.linear_table_s(512)[512])
        kind = "additive" if profile.surface is None else "surface"
        rows.append(profile.to_dict() | {"basis": profile.basis, "attention": kind, "full_batch_ms": full_ms})
    heads = {"name": "profile", "attention": "attention", "tile_tokens": "tile\n(tokens)"}
    heads |= {"full_batch_ms": "512 tokens\n(ms)", "num_kv_blocks": "KV blocks\nof 16"}
    console.print_listing(rows, heads, as_json)
    if not as_json:
        console.print_listing(rows, {"name": "profile", "basis": "times", "engine": "engine"})
        typer.echo("NAME[mixing=FACTOR]: decodes beside a prompt chunk cost FACTOR times as much attention.")
        typer.echo("NAME[additive=true]: a batch costs the sum of its parts, fitted to decodes alone.")


@app.command()
def trace(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A trace, or a folder of ServeGen's clients.")],
    max_model_len: Annotated[int, typer.Option(min=1, help="Longest request that an engine takes, tokens.")] = 8192,
    trace_invalid: TraceInvalid = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw rates, gaps and lengths into this file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a trace file is: format, rates, gaps, lengths, and what of it does not fit."""
    from llmsched_gym.report.trace_facts import facts, plot_trace
    from llmsched_gym.workload.traces import load_trace

    checked = scenario(**({} if trace_invalid is None else {"trace_invalid": trace_invalid}))
    loaded = load_trace(file, checked.trace_invalid)
    found = facts(loaded, max_model_len)
    if plot is not None:
        try:
            plot_trace(loaded).savefig(plot, format="png", dpi=120, metadata={"Software": None})
        except OSError as error:
            raise ConfigError(f"plot: cannot write to {plot}: {error.strerror}") from None
    if as_json:
        console.print_rows([found])
        return
    console.print_table(terminal.trace_table(found))


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="CSV of request times, or JSON of vllm bench serve.")],
    profile: Annotated[str, typer.Option(help="Cost profile: a name or a JSON file.")],
    policy: Annotated[str, typer.Option(help="What served the run: a name, module:Class or a folder.")] = "vllm-v1",
    max_num_seqs: Annotated[int | None, typer.Option(help="Requests that may run at once (the profile's).")] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens in a batch, and vllm-v1's budget (vLLM's on the profile's device).")
    ] = None,
    kv_blocks: Annotated[int | None, typer.Option(help="Usable KV blocks of 16 tokens (the profile's).")] = None,
    max_error: Annotated[
        float | None,
        typer.Option(help="Exit with 1 if the mean of TTFT, TPOT or E2E is off by more than this fraction."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for requests.csv and replay.png.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a measured serving run with the simulator, request by request."""
    if max_error is not None and not max_error >= 0.0:
        raise ConfigError(f"max_error: expected a fraction >= 0, got {max_error!r}")
    names = split_policies([policy])
    if len(names) != 1:
        raise ConfigError(f"policy: expected one name, got {policy!r}")
    from llmsched_gym.evaluation import replay as replays
    from llmsched_gym.workload.served_runs import load_run

    if out is not None:
        replays.claim_replay(out)
    result = replays.replay(
        load_run(run),
        names[0],
        profile,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_kv_blocks=kv_blocks,
    )
    if out is not None:
        replays.write(result, out)
    errors = result.errors()
    if as_json:
        console.emit(json.dumps(errors, allow_nan=False) + "\n")
    else:
        from llmsched_gym.evaluation.replay_table import replay_table

        console.print_table(replay_table(result))
    over = [] if max_error is None else replays.above(errors, max_error)
    for text in over:
        console.remark(text)
    if over:
        raise typer.Exit(FAILURE)


@app.command("serve-bench")
def serve_bench(
    label: Annotated[str, typer.Option(help="What the server is called in rows and reports, where policies are.")],
    out: Annotated[Path, typer.Option(help="Folder for the results of all labels, and the report.")],
    url: Annotated[str | None, typer.Option(help="An OpenAI-compatible server, http://HOST:PORT.")] = None,
    saved: Annotated[
        Path | None, typer.Option(metavar="JSON", help="Instead of a server: a result of vllm bench serve.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model's name at the server (the first it lists).")] = None,
    suite: SuiteName = "default",
    workload: Workload = None,
    trace: TraceFile = None,
    trace_arrivals: TraceArrivals = None,
    trace_invalid: TraceInvalid = None,
    qps: Annotated[
        str | None,
        typer.Option(help="Arrival rates, 1/s, of requests or sessions, separated by commas; else the suite's."),
    ] = None,
    num_requests: NumRequests = None,
    seeds: Seeds = 5,
    first_seed: FirstSeed = 0,
    strict_share: StrictShare = None,
    ttft_slo: TtftSlo = None,
    tbt_slo: TbtSlo = None,
    patience: Patience = None,
    tbt_rule: TbtRule = None,
    set_: Set = None,
    send_slos: Annotated[
        bool, typer.Option("--send-slos", help="Tell the server each request's SLOs, as vllm_xargs.")
    ] = False,
    check_metrics: Annotated[
        bool, typer.Option("--check-metrics", help="Compare TTFT and ITL with the histograms at /metrics.")
    ] = False,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Ask for logprobs, where only they tell tokens of a chunk.")
    ] = False,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable that holds the server's API key.")
    ] = None,
    config: OptionsFile = None,
    as_json: AsJson = False,
) -> None:
    """Offer a running server the requests that evaluate draws, and report on it in the same form."""
    world = _scenario({name: value for name, value in locals().items() if name != "model"})
    rates = None if qps is None else _numbers("qps", qps)
    if (url is None) == (saved is None):
        raise ConfigError("url: expected one of --url and --saved")
    if api_key_env is not None and api_key_env not in os.environ:
        raise ConfigError(f"api_key_env: no environment variable {api_key_env!r}")
    from llmsched_gym.serving.join import join

    if saved is not None:
        importlib.import_module("llmsched_gym.serving.saved").add_saved(world, saved, label, out)
    else:
        try:
            serving = importlib.import_module("llmsched_gym.serving.bench")
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("llmsched_gym"):
                raise
            raise ConfigError(f"llmsched serve-bench needs {error.name}: pip install '.[serve]'") from None
        key = None if api_key_env is None else os.environ[api_key_env]
        server = serving.Server(url, label, model, send_slos, check_metrics, logprobs, key)
        with console.progress_bar("requests") as progress:
            serving.serve_bench(
                world,
                server,
                qps=rates,
                seeds=seeds,
                first_seed=first_seed,
                out=out,
                progress=progress,
                say=console.remark,
            )
    rows = join(out)
    try:
        report([out])
    finally:
        if as_json:
            console.print_rows(rows)
        else:
            for table in terminal.comparison(rows):
                console.print_table(table)


@app.command()
def report(
    directory: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Folders that evaluate, capacity or serve-bench wrote.")
    ],
    out: Annotated[Path | None, typer.Option(help="With several folders: the folder of what compares them.")] = None,
) -> None:
    """Write report.html, report.md and tables/ of a folder of results, or of several in a folder that compares them."""
    from llmsched_gym.report.write import write_report

    folder = directory[0]
    if len(directory) > 1 or out is not None:
        if out is None or len(directory) == 1:
            raise ConfigError("out: expected --out FOLDER with several folders, and with one folder none")
        from llmsched_gym.evaluation.store import claim_results
        from llmsched_gym.report.compare import combine

        claim_results(out)
        combine(directory, out)
        folder = out
    console.remark(f"wrote {write_report(folder)}")


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="A smaller grid; the keys say so.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure how fast this machine runs the engine, an evaluation and the environments."""
    from llmsched_gym.evaluation.bench import bench as measure

    figures = measure(quick, note=lambda text: console.remark(f"measuring: {text}"))
    if as_json:
        console.emit(json.dumps(figures, allow_nan=False) + "\n")
        return
    flat = [(k, name, v) for k, value in figures.items() for name, v in _entries(value)]
    console.print_listing(
        [{"figure": f"{k} {name}".strip(), "value": v} for k, name, v in flat], {"figure": "figure", "value": "value"}
    )


def _entries(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else [("", value)]


def split_policies(texts: Sequence[str], what: str = "policy") -> list[str]:
    """Names separated by commas, those inside brackets left alone."""
    names = split_names(texts, what)
    sys.path.append(os.getcwd())  # module:Class may lie where the user is
    return names


def _scenario(options: dict[str, Any]) -> Scenario:
    """The suite's scenario with the fields that were given."""
    if options["trace"] is not None and options["workload"] is not None:
        raise ConfigError("workload: expected one of --workload and --trace, got both")
    for name in ("trace_arrivals", "trace_invalid"):
        if options["trace"] is None and options[name] is not None:
            raise ConfigError(f"{name}: needs --trace")
    names = (
        "profile workload trace trace_arrivals trace_invalid num_requests strict_share jitter cost_scale length_hint"
    )
    names += " tbt_rule backend model prefix_caching"
    fields = _parsed_fields(options["config"] or [])
    fields |= {name: options[name] for name in names.split() if options.get(name) is not None}
    if options["patience"] is not None:
        fields["patience_s"] = options["patience"]
    if options["ttft_slo"] is not None:
        fields["ttft_slo_s"], fields["ttft_slo_per_token_s"] = _one_or_two("ttft_slo", options["ttft_slo"], 0.0)
    if options["tbt_slo"] is not None:
        fields["strict_tbt_slo_s"], fields["relaxed_tbt_slo_s"] = _one_or_two("tbt_slo", options["tbt_slo"])
    for name in ("allow_refusal", "count_host_time"):
        if options.get(name):
            fields[name] = True
    return scenario(options["suite"], **fields | _parsed_fields(options["set_"] or []))


def _parsed_fields(texts: Sequence[str]) -> dict[str, Any]:
    """Fields of a scenario from FIELD=VALUE."""
    fields: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"set: expected FIELD=VALUE, got {text!r}")
        if name == "suite":
            raise ConfigError("set: suite is no field of the scenario; use --suite")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = float(value) if value == "inf" else value
        if isinstance(fields[name], list):
            fields[name] = tuple(fields[name])
    return fields


def _places(options: dict[str, Any]) -> AbstractContextManager[Any]:
    """Where the runs of a command take place, with the files that its options name."""
    from llmsched_gym.evaluation.spread import choose

    files = split_names([*options["policy"], *([options["router"]] if options["router"] else [])])
    files += [str(options[name]) for name in ("profile", "workload", "trace") if options[name] is not None]
    files += [text.partition("=")[2] for text in options["set_"] or ()]
    return choose(options["workers"], options["ray"], options["ray_address"], files)


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name}: expected numbers separated by commas, got {text!r}") from None


def _one_or_two(name: str, text: str, second: float | None = None) -> tuple[float, float]:
    """Two numbers; where only one is given the other is `second`, or the same."""
    numbers = _numbers(name, text)
    if len(numbers) > 2:
        raise ConfigError(f"{name}: expected one or two numbers, got {text!r}")
    return numbers[0], numbers[1] if len(numbers) == 2 else numbers[0] if second is None else second


def _whole_numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name}: expected whole numbers separated by commas, got {text!r}") from None


add_commands(app)

if __name__ == "__main__":
    sys.exit(main())
