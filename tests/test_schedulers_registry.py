"""Names, bracket parameters, module:Class, and a scheduler of fifteen lines in plain Python."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import Run, request

from llmsched_gym import scheduler as low
from llmsched_gym.engine import Batch, IllegalBatch
from llmsched_gym.engine.pack import ORDERS
from llmsched_gym.engine.step import VICTIMS
from llmsched_gym.registry import make_scheduler, registry
from llmsched_gym.report.bounds import CLAIRVOYANT, bound_of, is_clairvoyant, ordinary, with_bound
from llmsched_gym.scheduler import Compiled, PolicyError, Scheduler, install

ROOT = Path(__file__).parents[1]
NAMES = ["sarathi", "sarathi-spf", "slai", "slai-spf-fixed", "slai-fcfs-fixed", "slai-priority", "rad", "rad-512"]
NAMES += [
    "vllm-v0",
    "vllm-v1",
    "orca",
    "faster-transformer",
    "edf",
    "srpt-capped",
    "feasible-first",
    "random",
    "sglang",
]
NAMES += ["trtllm"]


class OnePrompt:
    """All decodes; then one chunk of one prompt."""

    def schedule(self, view):
        tokens = {int(r): 1 for r in view.decodes.index}
        for prompt in [*view.prefills[:1], *view.waiting[:1]][:1]:
            if prompt.num_blocks or view.free_blocks - view.watermark_blocks - len(tokens) > prompt.prefill_tokens / 16:
                tokens[int(prompt.index)] = min(100, int(prompt.prefill_tokens - prompt.num_computed_tokens))
        return Batch(tokens)


class Configured(OnePrompt):
    """Takes a parameter and counts resets."""

    admission = "prompt"
    decision_s = 0.001

    def __init__(self, size="1"):
        self.size = int(size)
        self.seeds = []

    def reset(self, seed):
        self.seeds.append(seed)


MINE = Compiled("a user's own compiled scheduler", settings={"token_budget": 100})
NOT_A_SCHEDULER = 3


def world(count=60, seed=5):
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(0.02, count))
    return [request(float(t), int(rng.integers(1, 700)), int(rng.integers(1, 40))) for t in times]


def test_every_name_of_the_design_is_registered():
    assert set(NAMES) <= set(registry())
    for name in registry():
        scheduler = make_scheduler(name)
        assert isinstance(scheduler, Compiled | Scheduler)
        assert registry()[name].what and "\n" not in registry()[name].what


def test_names_are_resolved_above_all_that_they_may_mean():
    """Not by what a scheduler is, which baselines and policies import; from there they can still be asked for."""
    code = "import sys, llmsched_gym.scheduler; print(*(m for m in sys.modules if m.startswith('llmsched_gym.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[1] for name in done.stdout.split()}
    assert "engine" in loaded and not loaded & {"baselines", "policies", "env", "registry"}
    assert low.registry() is registry()
    assert low.make_scheduler("slai[limit=7]").settings == make_scheduler("slai[limit=7]").settings


def test_reports_know_which_schedulers_are_told_output_lengths():
    told = {name for name, entry in registry().items() if getattr(entry, "clairvoyant", False)}
    assert told == set(CLAIRVOYANT)
    assert is_clairvoyant("wait[bins=2]") and ordinary(["mc-sf", "slai"]) == ["slai"]
    # one of them is what the others are measured against, told or not
    assert bound_of(["a-min", "shortest-total[cap=0.9]"]) == "shortest-total[cap=0.9]" and bound_of(["mc-sf"]) is None
    assert with_bound(["mc-sf", "slai"]) == ["mc-sf", "slai", "shortest-total"]


def test_only_the_needed_ones_are_clairvoyant_and_decide_at_a_cost():
    for name in NAMES:
        entry = registry()[name]
        assert not getattr(entry, "clairvoyant", False)
        assert getattr(entry, "decision_s", 0.0) == 0.0
        own = {"vllm-v1": "prompt-check", "sglang": "chunk"}
        assert getattr(entry, "admission", "prompt") == own.get(name, "prompt")


@pytest.fixture
def documented(tmp_path, monkeypatch):
    """The schedulers of docs/schedulers.md as a module."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/schedulers.md").read_text(), re.DOTALL)
    (tmp_path / "my_module.py").write_text("\n\n".join(block for block in blocks if "simulate" not in block))
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_module"
    sys.modules.pop("my_module", None)


def test_the_documented_python_scheduler_equals_the_compiled_one(documented):
    rows = world()
    mine, compiled = Run(f"{documented}:ShortestFirst", rows), Run("sarathi-spf", rows)
    assert mine.engine.run(mine.scheduler) and compiled.engine.run(compiled.scheduler)
    assert mine.requests["first_token_s"].tobytes() == compiled.requests["first_token_s"].tobytes()
    assert mine.sim.num_finished == 60


def test_the_documented_compiled_scheduler_runs(documented):
    scheduler = make_scheduler(f"{documented}:ONE_PROMPT[budget=100]")
    assert isinstance(scheduler, Compiled)
    run = Run(scheduler, [request(prompt=150, output=3), request(prompt=90, output=3), request(prompt=80, output=1)])
    assert run.drain() == [{2: 80}, {1: 90}, {1: 1, 0: 99}, {1: 1, 0: 51}, {0: 1}, {0: 1}]
    crowded = Run(scheduler, world(), num_kv_blocks=60)
    assert crowded.engine.run(crowded.scheduler)


def test_module_and_class():
    scheduler = make_scheduler("test_schedulers_registry:OnePrompt")
    assert type(scheduler).__name__ == "OnePrompt"
    configured = make_scheduler("test_schedulers_registry:Configured[size=7]")
    assert configured.size == 7
    run = Run(configured, world(5), seed=11)
    assert configured.seeds == [11]
    assert run.sim.decision_s == 0.001


def test_module_and_compiled():
    scheduler = make_scheduler("test_schedulers_registry:MINE[order=srpt]")
    assert isinstance(scheduler, Compiled)
    run = Run(scheduler, [request(prompt=150, output=1), request(prompt=90, output=1)])
    assert run.drain() == [{1: 90, 0: 10}, {0: 100}, {0: 40}]


def test_a_module_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "schedulers_of_mine.py").write_text(
        "from llmsched_gym.engine import Batch\nclass Lazy:\n    def schedule(self, view):\n        return Batch()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert type(make_scheduler("schedulers_of_mine:Lazy")).__name__ == "Lazy"


def test_parameters_reach_the_knobs():
    spec = "slai[hold=true,limit=6500,budget=768,cap=0.8,refuse=yes,order=edf,offset=3,offset_full=7,usage_switch=0.5,"
    spec += "margin=1.5,victim=authors,admission=chunk]"
    scheduler = make_scheduler(spec)
    knobs = scheduler.knobs
    assert (knobs["hold"], knobs["limit"], knobs["token_budget"]) == (1, 6500, 768)
    assert (knobs["cap"], knobs["refuse"]) == (0.8, 1)
    assert (knobs["offset"], knobs["offset_full"], knobs["usage_switch"], knobs["margin"]) == (3.0, 7.0, 0.5, 1.5)
    assert ORDERS[knobs["order"]] == "edf" and VICTIMS[knobs["victim"]] == "authors"
    assert scheduler.admission == "chunk" and scheduler.name == spec
    plain = make_scheduler("slai").knobs
    assert (plain["offset"], plain["offset_full"], plain["usage_switch"]) == (5.0, 10.0, 0.96)
    assert make_scheduler(" slai[ budget = 64 ]").knobs["token_budget"] == 64
    assert make_scheduler("slai[]").knobs.tobytes() == plain.tobytes()
    fixed = make_scheduler("slai-spf-fixed[offset=4]").knobs
    assert fixed["offset"] == fixed["offset_full"] == 4.0
    assert math.isinf(make_scheduler("sarathi").knobs["offset"])


BAD = {
    "": "expected NAME",
    "[x]": "expected NAME",
    "slai[": "expected NAME",
    "slai]": "expected NAME",
    "slai[a=1][b=2]": "expected NAME",
    "slia": "did you mean 'slai'",
    "nonsense": "policy 'nonsense' is unknown: expected a name of `llmsched policies`",
    "slai[budget]": "expected key=value in brackets, got 'budget'",
    "slai[bugdet=5]": "unknown parameter 'bugdet', expected one of budget, hold",
    "slai[budget=0]": "budget: expected whole number of tokens >= 1, got '0'",
    "slai[budget=1.5]": "budget: expected whole number",
    "slai[budget=99999999999]": "budget: expected whole number",
    "slai[limit=-1]": "limit: expected whole number",
    "slai[hold=maybe]": "hold: expected true, false or always, got 'maybe'",
    "slai[cap=nan]": "cap: expected share",
    "slai[cap=0]": "cap: expected share",
    "slai[offset=-1]": "offset: expected mean batches",
    "slai[order=lifo]": "order: expected one of fcfs, spf, class, srpt, edf, feasible, lpm, got 'lifo'",
    "slai[victim=me]": "victim: expected one of latest-arrival, latest-lst, authors",
    "slai[admission=half]": "admission: expected one of prompt, chunk, prompt-check, got 'half'",
    "slai[reserve=true]": "unknown parameter 'reserve'",
    "vllm-v1[reserve=half]": "reserve: expected true or false, got 'half'",
    "vllm-v1[threshold=-1]": "threshold: expected whole number of tokens, 0 for none, got '-1'",
    "orca[offset=3]": "unknown parameter 'offset', expected one of budget, hold, limit, cap, victim, evict, admission",
    "random[budget=many]": "policy 'random",
    "random[hold=true]": "policy 'random",
    "no_such_module:Thing": "cannot import 'no_such_module'",
    ":Thing": "cannot import ''",
    "test_schedulers_registry:Nothing": "has no 'Nothing'",
    "test_schedulers_registry:NOT_A_SCHEDULER": "policy 'test_schedulers_registry:NOT_A_SCHEDULER'",
    "collections:OrderedDict": "expected an object with schedule(view), got OrderedDict",
    "test_schedulers_registry:Configured[size=big]": "policy 'test_schedulers_registry:Configured[size=big]'",
    "test_schedulers_registry:OnePrompt[size=1]": "policy 'test_schedulers_registry:OnePrompt",
}


@pytest.mark.parametrize("spec", BAD)
def test_a_bad_policy_is_one_clear_line(spec):
    with pytest.raises(PolicyError) as error:
        make_scheduler(spec)
    assert BAD[spec] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("policy", NAMES)
def test_nobody_admits_beyond_the_sequence_limit(policy):
    run = Run(policy, [request(prompt=3, output=3) for _ in range(12)], max_num_seqs=5)
    batches = run.drain(1000)
    assert max(len(batch) for batch in batches) <= 5
    assert run.sim.num_finished == 12


def test_install_resets_what_the_last_scheduler_left():
    run = Run("slai[budget=64,hold=true]", world(5))
    install(OnePrompt(), run.engine.state)
    knobs = run.engine.state.knobs[0]
    assert (knobs.token_budget, knobs.hold, knobs.victim) == (512, 0, 0)


def test_the_random_scheduler_is_legal_and_follows_its_seed():
    def trajectory(seed, **fields):
        run = Run("random", world(30), seed=seed, **{"num_kv_blocks": 60, **fields})
        run.drain(20_000)
        assert run.sim.num_finished + run.episode.num_rejected == 30
        return run.requests["first_token_s"].tobytes()

    assert trajectory(1) == trajectory(1)
    assert trajectory(1) != trajectory(2)
    trajectory(3, admission="chunk", num_kv_blocks=50)


def test_an_illegal_batch_of_a_class_is_reported_by_run():
    class Greedy:
        def schedule(self, view):
            return Batch({int(r): 1 for r in view.waiting.index})

    run = Run(Greedy(), [request(prompt=17) for _ in range(3)], num_kv_blocks=5)
    with pytest.raises(IllegalBatch, match="rule 4: request 2 needs 2 blocks, 1 are free"):
        run.engine.run(run.scheduler)


def test_a_parameter_is_given_once_and_a_share_is_one():
    for spec, message in (
        ("eb[k=1,k=2]", "'k' is given twice"),
        ("vllm-slo[kept=2]", "kept: expected share of the budget"),
    ):
        with pytest.raises(PolicyError, match=message):
            make_scheduler(spec)
