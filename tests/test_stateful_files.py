"""Files that are changed again and again: each is read as something valid, or refused in one line."""

import random

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from stateful import sized

from benchmarks import fuzz

CORPUS = fuzz.corpus()


class FileMachine(RuleBasedStateMachine):
    @initialize(which=st.integers(0, len(CORPUS) - 1))
    def begin(self, which):
        self.name, self.good, self.reader, self.folder = CORPUS[which]
        self.content = self.good
        self.place = fuzz.Path(fuzz.tempfile.mkdtemp())
        assert self.said() == "read"

    def said(self):
        return fuzz.read(self.content, self.name, self.reader, self.folder, self.place / "case")

    @rule(seed=st.integers(0, 2**32 - 1))
    def change(self, seed):
        self.content = fuzz.changed(self.content, self.name, random.Random(seed))
        assert self.said() in ("read", "refused")

    @rule(at=st.floats(0, 1), new=st.binary(max_size=3), gone=st.integers(0, 3))
    def change_bytes(self, at, new, gone):
        at = int(at * len(self.content))
        self.content = self.content[:at] + new + self.content[at + gone :]
        assert self.said() in ("read", "refused")

    @rule()
    def mend(self):
        self.content = self.good
        assert self.said() == "read"

    def teardown(self):
        if hasattr(self, "place"):
            fuzz.shutil.rmtree(self.place)


TestFiles = FileMachine.TestCase
TestFiles.settings = sized(60, 8)
