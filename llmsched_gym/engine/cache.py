"""The folder of compiled kernels, named after a digest of the files that they depend on; old ones are removed.

numba's own cache is keyed by the file of the compiled function alone: a kernel that inlines a helper or freezes a
constant of another file would keep the old one after that file changed.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path

from llmsched_gym.sources import digest

KERNELS = tuple(
    f"llmsched_gym.{name}"
    for name in (
        *("engine", "env", "scheduler", "baselines", "policies", "real_backend.vllm.lane_kernels"),
        *("agents.loss_kernels", "agents.rollout_kernels"),
    )
)
"""Modules and packages that hold kernels."""

KEPT, KEPT_S = 8, 14 * 24 * 3600.0  # folders beside the one in use, by last use, and how long they are kept at most
_NAME = re.compile(r"kernels-[0-9a-f]{16}")
_AWAY = re.compile(rf"{_NAME.pattern}\.\d+\.removed")


@cache
def kernels_digest() -> str:
    """16 hexadecimal digits that change with any file that kernels depend on."""
    return digest(KERNELS)


@cache
def cache_dir() -> str:
    """Folder of the compiled kernels: in NUMBA_CACHE_DIR or the user's cache, else in the system's temporary folder."""
    name = f"kernels-{kernels_digest()}"
    for root in (_user_root(), _temporary_root()):
        path = _usable(root, name)
        if path is not None:
            return str(path)
    return tempfile.mkdtemp(prefix=f"{name}-")


def _user_root() -> Path | None:
    """Where this user's caches are; None without a home."""
    if os.environ.get("NUMBA_CACHE_DIR"):
        return Path(os.environ["NUMBA_CACHE_DIR"])
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # others are to be ignored, says the XDG specification
        return Path(base) / "llmsched_gym"
    try:
        return Path.home() / ".cache" / "llmsched_gym"
    except RuntimeError:
        return None


def _temporary_root() -> Path | None:
    """A folder of this user's alone: code is read from it."""
    own = getattr(os, "getuid", lambda: 0)()  # on Windows all files are of user 0
    path = Path(tempfile.gettempdir()) / f"llmsched_gym-{own}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        return path if path.lstat().st_uid == own and not path.is_symlink() else None
    except OSError:
        return None


def _usable(root: Path | None, name: str) -> Path | None:
    """The folder `name` in `root`, made if need be; None where it cannot be written."""
    if root is None:
        return None
    path = root / name
    try:
        is_new = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        os.utime(path)  # the time of its last use
        if not os.access(path, os.W_OK):
            return None
    except OSError:
        return None
    if is_new:
        remove_old(path)
    return path


def remove_old(used: Path) -> None:
    """Remove folders beside `used` that nobody has used for long, or that many others have replaced.

    A process that still uses one compiles again what it has not loaded yet: numba makes the folder anew.
    """
    ages = []
    try:
        for path in used.parent.iterdir():
            if _AWAY.fullmatch(path.name):  # a process was ended while it removed it
                shutil.rmtree(path, ignore_errors=True)
            elif path != used and _NAME.fullmatch(path.name):
                ages.append((time.time() - path.stat().st_mtime, path))
    except OSError:
        return
    for i, (age_s, path) in enumerate(sorted(ages)):
        if i >= KEPT or age_s > KEPT_S:
            away = path.with_name(f"{path.name}.{os.getpid()}.removed")
            try:
                path.rename(away)  # at once, so that nobody finds half of it
            except OSError:
                continue
            shutil.rmtree(away, ignore_errors=True)
