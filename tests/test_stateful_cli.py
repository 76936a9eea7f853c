"""Commands on one folder in any order, interrupted and torn: it stays readable, and its rows are a fresh run's."""

import json
import shutil
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from stateful import sized
from test_evaluation import timeless
from test_out_folders import held

from llmsched_gym import cli
from llmsched_gym.config import scenario
from llmsched_gym.evaluation import cells
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.evaluation.store import read_rows
from llmsched_gym.interrupts import INTERRUPTED

WORLD = ["--suite", "paper", "--qps", "1,2", "--seeds", "2", "--num-requests", "4", "--workers", "1", "--no-bound"]
POLICIES = ("sarathi", "sarathi,slai")
CELLS = {"sarathi": 4, "sarathi,slai": 8}


@cache
def fresh(policies):
    """The rows of a run of its own."""
    return timeless(evaluate(scenario("paper", num_requests=4), policies.split(","), qps=[1.0, 2.0], seeds=2))


class FolderMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.root = Path(tempfile.mkdtemp())
        self.folder = self.root / "out"
        self.begun = self.done = None  # policies of the grid that has begun, and of the one whose tables are there

    def llmsched(self, *args):
        """Exit code, and the lines on stderr that say what is wrong."""
        out, err = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = cli.main([*args])
        said = [line for line in err.getvalue().splitlines() if line.startswith("llmsched: ")]
        wrong = [line for line in said if not line.startswith("llmsched: wrote ")]
        assert "Traceback" not in err.getvalue() and len(wrong) == (code != 0)
        return code, out.getvalue()

    @rule(policies=st.sampled_from(POLICIES), after=st.one_of(st.none(), st.integers(0, 7)))
    def evaluate(self, policies, after):
        """A grid, interrupted behind so many runs; another one than the folder's may be refused."""
        before = held(self.folder) if self.folder.exists() else {}
        run_cell, left = cells.run_cell, [after]

        def until_interrupted(*args):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] = None if left[0] is None else left[0] - 1
            return run_cell(*args)

        cells.run_cell = until_interrupted
        try:
            code, out = self.llmsched("evaluate", "--policy", policies, *WORLD, "--json", "--out", str(self.folder))
        finally:
            cells.run_cell = run_cell
        if code == 0:
            assert timeless(json.loads(out)) == fresh(policies)
            self.begun = self.done = policies
        elif code == 2:
            assert self.begun not in (None, policies) and held(self.folder) == before
        else:
            assert code == INTERRUPTED and after is not None and after < CELLS[policies]
            self.begun = policies

    @precondition(lambda self: self.begun != self.done)
    @rule(text=st.sampled_from(['{"cell": 3, "row": {"pol', '{"cell"', "\n", "{"]))
    def tear(self, text):
        """What a crash leaves of the line that it was writing."""
        lines = self.folder / "partial" / "rows.jsonl"
        if lines.exists():
            with lines.open("a") as file:
                file.write(text)

    @rule()
    def report(self):
        before = held(self.folder) if self.folder.exists() else {}
        code, _ = self.llmsched("report", str(self.folder))
        if self.done is None:
            assert code == 2 and (held(self.folder) if self.folder.exists() else {}) == before
        elif self.done == self.begun:
            assert code == 0 and (self.folder / "report.html").stat().st_size > 1000

    @invariant()
    def what_is_there_can_be_read(self):
        if getattr(self, "done", None) is not None and self.done == self.begun:
            assert timeless(read_rows(self.folder)) == fresh(self.done)
        for path in self.folder.rglob("*.json") if hasattr(self, "folder") else ():
            json.loads(path.read_text())
        assert not list(self.folder.rglob("*.tmp")) if hasattr(self, "folder") else True

    def teardown(self):
        """What was begun is completed by the same command."""
        if getattr(self, "begun", None) is not None:
            self.evaluate(self.begun, None)
            self.what_is_there_can_be_read()
        if hasattr(self, "root"):
            shutil.rmtree(self.root)


TestFolder = FolderMachine.TestCase
TestFolder.settings = sized(4, 6)
