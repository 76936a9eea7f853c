"""When a file that was read before is still the same."""

from __future__ import annotations

from pathlib import Path


def version_of(path: Path) -> tuple[Path, tuple[int, ...]]:
    """The file's place, which outlives a change of folder, and what tells another content there; OSError if none is.

    Modification times can be copied (``cp -p``), the time of the inode's last change cannot.
    """
    stat = path.stat()
    return path.absolute(), (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
