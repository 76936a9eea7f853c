"""Fixed hypothesis seeds, the data folder, and one line at the end that says how many conformance tests ran."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

if not Path("/dev/nvidia0").exists():
    # Read when triton is first imported, which transformers may do: tests of its kernels run without a GPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Read when numpy and torch are first imported. A process per core runs tests, and what these start are more: threads of
# linear algebra besides only wait for each other, which takes a fit of a cost model six times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests count lines on stderr, and whether kernels are compiled by then depends on what ran before.
os.environ.setdefault("LLMSCHED_SAY_COMPILING", "0")

settings.register_profile(
    "fixed", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("search", parent=settings.get_profile("fixed"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(scope="session")
def golden():
    """Folder of the published schedulers' decision logs; skips where it is not at hand."""
    root = os.environ.get("LLMSCHED_DATA_DIR")
    if not root:
        pytest.skip("needs the decision logs: LLMSCHED_DATA_DIR is not set")
    folder = Path(root, "golden")
    if not folder.is_dir():
        pytest.skip(f"needs the decision logs: LLMSCHED_DATA_DIR has no folder golden ({folder})")
    return folder


@pytest.fixture
def interruptible():
    """Processes that the test starts hear SIGINT, which a script ignores for what it starts in the background."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def pytest_configure(config):
    # here and not in pyproject.toml, for whose sake pytest would import numba, and so numpy, before this file
    config.addinivalue_line("filterwarnings", "ignore::numba.NumbaExperimentalFeatureWarning")
    config.addinivalue_line("markers", "conformance: replays a published scheduler's decision log")
    config.addinivalue_line("markers", "slow: takes many seconds, builds a virtual environment or trains")


FIRST = ("trajectories", "packaging", "names", "fit_tables", "imports", "compiling", "terminals", "serving")
"""Files of tests that two processes begin with. In the first most kernels are compiled, and while one process sees to
it, the other runs what needs few of them: where both need a kernel at the same time, both compile it."""


def place(item):
    name = item.path.stem.removeprefix("test_")
    return FIRST.index(name) if name in FIRST else len(FIRST)


def pytest_collection_modifyitems(items):
    items.sort(key=place)
    for item in items:
        if item.get_closest_marker("conformance"):
            item.user_properties.append(("conformance", True))


def pytest_terminal_summary(terminalreporter):
    def count(outcome):
        reports = terminalreporter.stats.get(outcome, [])
        return sum(("conformance", True) in getattr(report, "user_properties", ()) for report in reports)

    passed, failed, skipped = count("passed"), count("failed") + count("error"), count("skipped")
    if passed + failed + skipped:
        terminalreporter.write_line(f"conformance tests: {passed} passed, {failed} failed, {skipped} skipped")
