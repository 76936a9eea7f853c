"""A pool on Ray: one started here, on loopback alone, or a cluster's. Ray runs a lost worker's calls again."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import platform
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from importlib import metadata
from pathlib import Path
from typing import Any

from llmsched_gym import sources
from llmsched_gym.config import ConfigError
from llmsched_gym.workload import TraceWarning

LOOPBACK = "127.0.0.1"
NO_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # at 0 Ray takes the loopback address for its own, on Linux too
RETRIES = 5  # of a call whose worker or node was lost
LOOK_S = 5.0  # between two looks at how large the cluster is
FEWEST = 8  # calls handed over to a cluster that has no workers yet, so that it gets some
CODE = ("llmsched_gym.evaluation", "llmsched_gym.baselines", "llmsched_gym.policies")


def import_ray() -> Any:
    """The package; ConfigError with one line where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError("ray: it is not installed: pip install 'llmsched-gym[ray]'") from None


def start_ray(count: int) -> Any:
    """Start Ray for `count` calls at a time on 127.0.0.1 alone, without a dashboard; returns the package.

    Raises :class:`ConfigError` with one line where it would listen elsewhere.
    """
    # No option of ray.init keeps Ray from looking for an address of the network, and it looks when it is imported.
    os.environ.setdefault(NO_CLUSTER, "0")
    ray = import_ray()
    _init(ray, address="local", num_cpus=count, include_dashboard=False, _node_ip_address=LOOPBACK)
    if any(node["NodeManagerAddress"] != LOOPBACK for node in ray.nodes()):
        ray.shutdown()
        raise ConfigError(f"ray: it was imported before and would listen to the network; set {NO_CLUSTER}=0")
    return ray


def _init(ray: Any, **settings: Any) -> None:
    try:
        ray.init(**settings, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"ray: cannot use {settings['address']}: {what}") from None


class RayPool:
    """Calls on Ray's workers, one CPU each; a context manager that leaves Ray.

    Args:
        count: calls at a time of a Ray started here.
        address: of a cluster that runs; None: start Ray here, on 127.0.0.1 alone and without a dashboard.
        files: names that may mean files of this machine, see :func:`staged`.

    Raises :class:`ConfigError` with one line where there is no cluster or no way to listen on loopback alone.
    """

    def __init__(self, count: int, address: str | None = None, files: Sequence[str] = ()) -> None:
        self.is_here = address is None
        self._looked_s, self._count, self._nodes = -LOOK_S, count, 1
        self._staging: tempfile.TemporaryDirectory | None = None
        if address is None:
            ray = start_ray(count)
        else:
            if address.partition(":")[0] in (LOOPBACK, "localhost"):  # or Ray would look for it on the network
                os.environ.setdefault(NO_CLUSTER, "0")
            ray = import_ray()
            self._staging = tempfile.TemporaryDirectory(prefix="llmsched-")
            staged(files, Path.cwd(), Path(self._staging.name))
            _init(ray, address=address, runtime_env={"working_dir": self._staging.name})
        self._ray = ray
        self._call = ray.remote(num_cpus=1, max_retries=RETRIES)(call)
        self._paths, self._code = (list(sys.path), "") if self.is_here else ([], code_here())

    @property
    def count(self) -> int:
        """CPUs of the cluster, as of now."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= LOOK_S:
            self._looked_s = now_s
            self._count = int(self._ray.cluster_resources().get("CPU", 0)) or FEWEST
            self._nodes = sum(node["Alive"] for node in self._ray.nodes())
        return self._count

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """Call it with `args`, there; a lost worker's call is made again, up to `RETRIES` times."""
        future: Future = Future()
        inner = self._call.remote(self._paths, self._code, function, args).future()
        inner.add_done_callback(lambda done: _pass_on(done, future))
        return future

    def where(self) -> str:
        """How many nodes and CPUs."""
        count = self.count
        return f"on {self._nodes} node{'s' * (self._nodes != 1)}, {count} CPUs"

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._ray.shutdown()
        if self._staging is not None:
            self._staging.cleanup()


def _pass_on(done: Future, future: Future) -> None:
    """The result, or the error as the function raised it, without Ray's traceback in its text."""
    error = done.exception()
    if error is None:
        future.set_result(done.result())
        return
    lost = type(error).__name__ in ("WorkerCrashedError", "NodeDiedError")
    cause = getattr(error, "cause", None)  # of a RayTaskError
    if lost:
        cause = OSError(f"ray: the worker of a call was lost {RETRIES + 1} times")
    future.set_exception(cause if isinstance(cause, Exception) else error)


_ready = False  # whether this worker has been prepared


def call(paths: list[str], code: str, function: Callable[..., Any], args: tuple) -> Any:
    """What a worker does; the first time it makes itself ready."""
    global _ready
    if not _ready:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        warnings.simplefilter("ignore", TraceWarning)
        sys.path += [path for path in paths if path not in sys.path]
        if code and code != (own := code_here()):
            raise ConfigError(f"ray: {socket.gethostname()} has other code or packages ({own}) than here ({code})")
        _ready = True
    return function(*args)


def code_here() -> str:
    """What results depend on beside their settings: a digest of the code, and versions."""
    versions = (f"{name} {metadata.version(name)}" for name in ("numpy", "numba"))
    return ", ".join((f"llmsched-gym {sources.digest(CODE)}", f"python {platform.python_version()}", *versions))


def staged(names: Iterable[str], here: Path, to: Path) -> None:
    """Copy into `to` what `names` mean of the files below `here`, at the same relative places.

    A name is a file or a folder, or ``module:Class``, with brackets or not, or several joined by ``+``. Of a module go
    its package, or itself with the Python files beside it. Files elsewhere are to be where they are on every node.
    """
    for text in names:
        for part in re.split(r"\+(?![^\[\]]*\])", text):
            name = part.partition("[")[0].strip()
            module, colon, _ = name.partition(":")
            if name and Path(here, name).exists():
                _copy([Path(here, name)], here, to)
            elif colon and module:
                _copy(_module_files(module), here, to)


def _module_files(module: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return [Path(place) for place in spec.submodule_search_locations]
    return sorted(Path(spec.origin).parent.glob("*.py")) if spec.origin else []


def _copy(paths: Iterable[Path], here: Path, to: Path) -> None:
    for path in paths:
        if not path.resolve().is_relative_to(here.resolve()) or path.resolve() == here.resolve():
            continue
        place = to / path.resolve().relative_to(here.resolve())
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(path, place)
