"""The engine in any order of calls: the rules hold, bad batches change nothing, states come back."""

import pickle

import helpers
import numpy as np
from clusters import random_sessions
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, precondition, rule
from stateful import lasting, one_line, sized
from test_engine_properties import DEVICE, REQUESTS, SMALL_WORLDS, rows_of

from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.engine import Batch, Engine, IllegalBatch, check
from llmsched_gym.engine.blocks import NUM_COLUMNS, USERS
from llmsched_gym.engine.records import FLYING, PREFIX, REPLICA, REQUEST
from llmsched_gym.scheduler import install, make_scheduler
from llmsched_gym.workload import Request

REMEMBERED = ("blocks_version", "users_version", "num_releases", "last_evicted", "last_to_find")
"""Of a lane: what tells whether blocks that were found are still there."""

FORMED = ("batches", "items", "preempt", "refuse")
"""Of a lane: a batch that is formed and not run, which the next one replaces."""

INDEX = st.one_of(st.integers(0, 15), st.sampled_from([-1, 2**40, 0.5, "0", None]))
TOKENS = st.one_of(st.integers(1, 60), st.sampled_from([0, -1, 2**40, 2**70, 1.5, float("nan"), "1", None, True, 1.0]))
PLANS = st.builds(
    Batch,
    tokens=st.one_of(st.dictionaries(INDEX, TOKENS, max_size=6), st.sampled_from([None, [1], 3])),
    preempt=st.one_of(st.just(()), st.lists(INDEX, max_size=2), st.just(None)),
    refuse=st.one_of(st.just(()), st.lists(INDEX, max_size=2), st.just(3)),
)
KINDS = st.sampled_from(["plain", "async", "cached"])


def zeroed(content, dtype, *fields):
    kept = bytearray(content)  # a copy of records would leave out what lies between fields
    for field in fields:
        np.frombuffer(kept, dtype)[field] = 0
    return bytes(kept)


def taken(engine):
    return lasting(engine.save(), engine.state)


def living(engine):
    """The state without the batch that may be formed, its marks, and what is remembered of looking for blocks."""
    saved = taken(engine)
    lane = {name: taken for name, taken in saved.lanes[0].items() if name not in FORMED}
    lane["sims"] = zeroed(lane["sims"], REPLICA, *REMEMBERED)
    if lane["flying"]:
        lane["flying"] = zeroed(lane["flying"], FLYING, "last_token_s")  # as it was before it was foreseen
    requests = zeroed(saved.begun["requests"], REQUEST, "num_scheduled_tokens", "lst_s")
    begun = saved.begun | {"requests": requests}
    if "prefixes" in begun:
        places = int(engine.state.sims[0].table_mask) + 1  # behind them is what was found when it was looked for
        blocks = np.frombuffer(lane["blocks"], np.int32).reshape(-1, NUM_COLUMNS)[:places].copy()
        blocks[:, USERS] = np.maximum(blocks[:, USERS], 0)  # without the number of the release that left it
        lane["blocks"] = blocks.tobytes()
        begun["prefixes"] = zeroed(
            begun["prefixes"], PREFIX, *(f for f in PREFIX.names if f.startswith("found_") or f == "users_version")
        )
    return saved._replace(lanes=(lane,), begun=begun)


def proposal(view, rng):
    """A batch that may be legal: whom to preempt and refuse, and items to be added while they fit."""
    preempt = [int(r) for r in view.running.index if rng.random() < 0.1]
    refuse = [int(r) for r in view.waiting.index if view.allow_refusal and rng.random() < 0.1]
    items = []
    for row in (*view.running, *view.waiting):
        left = int(row.prefill_tokens - row.num_computed_tokens)
        if int(row.index) not in (*preempt, *refuse) and rng.random() < 0.85:
            items.append((int(row.index), int(rng.integers(1, left + 1)) if left > 0 else 1))
    rng.shuffle(items)
    return items, preempt, refuse


class EngineMachine(RuleBasedStateMachine):
    moments = Bundle("moments")

    @initialize(kind=KINDS, fields=SMALL_WORLDS, drawn=REQUESTS, seed=st.integers(0, 99))
    def begin(self, kind, fields, drawn, seed):
        cached = kind == "cached"
        fields = fields | {"async_lag": kind == "async", "prefix_caching": cached}
        self.table = random_sessions(np.random.default_rng(seed)) if cached else helpers.table(rows_of(drawn))
        gaps = int(self.table.output_tokens.sum()) - len(self.table) + 1
        self.engine = Engine(scenario("paper", **fields), len(self.table), profile=DEVICE, num_gaps=gaps)
        self.engine.reset(self.table)
        self.scheduler = make_scheduler("sarathi")
        install(self.scheduler, self.engine.state, 0, seed)
        self.clock_s = check(self.engine.state)

    def checked(self):
        self.clock_s = check(self.engine.state, 0, self.clock_s)

    def is_on(self):
        return not self.engine.is_over()

    def decided(self, rng, before):
        """Submit a random batch: of a proposal what the rules allow."""
        items, preempt, refuse = proposal(self.engine.view(), rng)
        batch = Batch()
        for tokens, more in [({}, {"preempt": preempt}), ({}, {"refuse": refuse}), *[({r: n}, {}) for r, n in items]]:
            longer = {"tokens": batch.tokens, "preempt": batch.preempt, "refuse": batch.refuse} | more
            longer["tokens"] = {**longer["tokens"], **tokens}
            try:
                self.engine.submit(Batch(**longer))
            except IllegalBatch as error:
                assert "\n" not in str(error) and str(error).startswith("rule ")
                assert living(self.engine) == before
            else:
                batch = Batch(**longer)
        self.engine.submit(batch)

    @precondition(is_on)
    @rule(seed=st.integers(0, 2**32 - 1), minds=st.integers(1, 2))
    def step(self, seed, minds):
        """A legal batch, after another that was submitted first and not run."""
        rng, before = np.random.default_rng(seed), living(self.engine)
        for _ in range(minds):
            self.decided(rng, before)
        self.engine.execute()
        self.checked()

    @precondition(is_on)
    @rule(count=st.integers(1, 5))
    def compiled(self, count):
        for _ in range(count):
            if self.is_on():
                self.engine.step(self.scheduler)
                self.checked()

    @precondition(is_on)
    @rule(plan=PLANS)
    def hostile(self, plan):
        """A batch of anything: run, or refused in one line with nothing changed."""
        before = living(self.engine)
        try:
            self.engine.submit(plan)
        except IllegalBatch as error:
            assert "\n" not in str(error) and str(error).startswith("rule ")
            assert living(self.engine) == before
            self.checked()
        else:
            self.engine.execute()
            self.checked()

    @precondition(is_on)
    @rule()
    def decide_nothing(self):
        tokens, preemptions = (int(self.engine.state.sims[0][name]) for name in ("tokens_emitted", "num_preemptions"))
        self.engine.execute()
        self.checked()
        sim = self.engine.state.sims[0]
        assert sim.num_preemptions == preemptions
        assert sim.tokens_emitted == tokens or self.engine.scenario.async_lag  # those of the batch in flight

    @rule(prompt=st.integers(1, 300), output=st.integers(1, 30), late=st.sampled_from([None, 0.0]))
    def enter(self, prompt, output, late):
        self.engine.enter(Request(prompt, output, 0.3, 0.1, arrival_s=late))
        self.checked()

    @rule(ahead=st.floats(1e-6, 9.0), with_=st.integers(0, 99))
    def enter_wrongly(self, ahead, with_):
        before = taken(self.engine)
        with one_line(ValueError):
            self.engine.enter(Request(10, 2, arrival_s=self.clock_s + ahead))
        with one_line(ConfigError):
            self.engine.enter(Request(10, 2, shares_with=with_, shared_tokens=11))
        assert taken(self.engine) == before

    def future(self):
        """What comes of the present by itself."""
        for _ in range(6):
            if self.is_on():
                self.engine.step(self.scheduler)
        return taken(self.engine)

    @rule(target=moments)
    def keep(self):
        saved, now = self.engine.save(), taken(self.engine)
        future = self.future()
        self.engine.restore(saved)
        return saved, now, future

    @rule(moment=moments)
    def go_back(self, moment):
        saved, now, future = moment
        self.engine.restore(saved)
        assert taken(self.engine) == now
        assert self.future() == future
        self.engine.restore(saved)
        self.clock_s = check(self.engine.state)

    @rule()
    def copy(self):
        now = taken(self.engine)
        self.engine = pickle.loads(pickle.dumps(self.engine))
        assert taken(self.engine) == now
        self.checked()

    def teardown(self):
        if hasattr(self, "engine"):
            for _ in range(4000):
                if not self.is_on():
                    break
                self.engine.step(self.scheduler)
            self.checked()
            assert not self.is_on(), "no end"


TestEngine = EngineMachine.TestCase
TestEngine.settings = sized(25, 25)
