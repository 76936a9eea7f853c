"""How large files are and how many of their lines stand twice: ``python benchmarks/sizes.py [CHECKOUT]``.

Duplicates are lines in runs of six or more that stand in several places; blank lines, comments, imports and lone
brackets are left out of the runs. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

FOLDERS = ("llmsched_gym", "agents", "baselines", "real_backend")
RUN = 6
LONG = 300


def sizes(root: Path) -> dict[str, float]:
    """Files, lines, files of more than LONG lines, the longest file and duplicated lines of a checkout."""
    lengths: list[int] = []
    places: defaultdict[tuple[str, ...], list[tuple[Path, int]]] = defaultdict(list)
    for file in sorted(file for folder in FOLDERS for file in (root / folder).rglob("*.py")):
        text = file.read_text(encoding="utf-8").splitlines()
        lengths.append(len(text))
        lines = [(i, line.strip()) for i, line in enumerate(text) if len(line.strip()) > 1]
        lines = [(i, line) for i, line in lines if not line.startswith(("#", "from ", "import "))]
        for k in range(len(lines) - RUN + 1):
            run = lines[k : k + RUN]
            places[tuple(line for _, line in run)] += [(file, i) for i, _ in run]
    duplicated = {place for found in places.values() if len(found) > RUN for place in found}
    return {
        "files": len(lengths),
        "lines": sum(lengths),
        "mean_lines": round(sum(lengths) / len(lengths)),
        "long_files": sum(length > LONG for length in lengths),
        "longest": max(lengths),
        "duplicated_lines": len(duplicated),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("checkout", type=Path, nargs="?", default=Path("."), help="this folder unless given")
    print(json.dumps(sizes(parser.parse_args().checkout)))
