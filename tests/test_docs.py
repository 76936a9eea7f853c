"""The generated page is what the generator makes, and what the pages show runs."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from llmsched_gym.cluster.records import CANDIDATE
from llmsched_gym.config import scenario
from llmsched_gym.env import LLMSchedEnv
from llmsched_gym.env.actions.knobs import WITH_CACHING
from llmsched_gym.env.docs import fields, page, worked_steps
from llmsched_gym.env.features import FEATURES
from llmsched_gym.env.route.features import REPLICA_FEATURES, REQUEST_FEATURES
from llmsched_gym.env.slots import SLOT_FEATURES
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.registry import routers

ROOT = Path(__file__).resolve().parents[1]


def test_the_environment_page_is_up_to_date():
    assert (ROOT / "docs" / "environment.md").read_text() == page(), (
        "python -m llmsched_gym.env.docs > docs/environment.md"
    )


def test_every_setting_entry_and_value_is_on_the_page():
    listed, text = fields(), page()
    for name in LLMSchedEnv().config.to_dict():
        assert f"`{name}`" in listed, name
    for entry in (*FEATURES, *SLOT_FEATURES, *WITH_CACHING):
        assert f"| `{entry.name}` |" in text, entry.name
    for knob in WITH_CACHING:
        assert f"{len(knob.values) - 1}: {knob.label(len(knob.values) - 1)} |" in text, knob.name


@pytest.mark.parametrize("file", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda f: f.stem)
def test_tables_have_as_many_cells_in_every_row(file):
    for block in re.findall(r"(?:^\|.*\n)+", file.read_text(), re.MULTILINE):
        rows = [re.sub(r"`[^`]*`|\\\|", "", line) for line in block.splitlines()]  # a bar in code is no border
        assert len({row.count("|") for row in rows}) == 1, block


def test_the_worked_steps_add_up():
    """Each reward on the page is the sum of its parts on the page; the steps show a gain, nothing and a loss."""
    rows = [line.split(" | ") for line in worked_steps().splitlines() if re.match(r"\| \d+ \| `\[", line)]
    numbers = [[float(cell.strip(" |")) for cell in row[5:]] for row in rows]
    assert len(numbers) == 3
    for on_time, expired, lateness, reward in numbers:
        assert reward == pytest.approx(on_time + expired + lateness, abs=1e-6)
    assert [n[:2] for n in numbers] == [[1.0, 0.0], [0.0, 0.0], [2.0, -1.0]]


@pytest.mark.parametrize("name", ["custom_reward", "custom_observation", "custom_batched"])
def test_examples_run(name, capsys):
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_planning_with_states_pays(capsys):
    runpy.run_path(str(ROOT / "examples" / "planning.py"), run_name="__main__")
    rows = [list(map(float, line.split()[1:])) for line in capsys.readouterr().out.splitlines()[1:]]
    assert len(rows) == 3 and all(planned > alone for alone, planned in rows)


@pytest.mark.parametrize("seed", range(4))
def test_the_custom_scheduler_serves_everybody_where_memory_is_short(seed):
    world = LLMSchedEnv("paper", qps=3.0, num_requests=150, num_kv_blocks=2000).config
    episode = simulate(world, "examples.custom_scheduler:ShortestFirst", seed)
    assert episode.sim.num_finished == 150


def test_the_readme_shows_the_examples_as_they_are():
    readme = (ROOT / "README.md").read_text()
    for name in ("ppo.py", "custom_scheduler.py", "custom_router.py"):
        assert (ROOT / "examples" / name).read_text().rstrip() in readme, name


def test_the_page_of_routing_names_every_entry_router_and_field():
    page = (ROOT / "docs" / "routing.md").read_text()
    entries = [f"| `{f.name}` | {f.meaning} |" for f in (*REQUEST_FEATURES, *REPLICA_FEATURES)]
    assert [entry for entry in entries if entry not in page] == []
    assert [name for name in (*routers(), *(CANDIDATE.names or ())) if f"`{name}" not in page] == []


def test_the_custom_router_sends_requests_to_where_their_prompts_are_cached():
    world = scenario("cluster", num_requests=60, warmup_s=0.0, qps=4.0, workload="chat", arrivals_continue=False)
    own, blind = (
        row(simulate(world, f"{router}+slai", 0)) for router in ("examples.custom_router:CheapestPrompt", "round-robin")
    )
    assert own["num_finished"] == own["num_requests"] and own["prefix_hit_rate"] > blind["prefix_hit_rate"]


def test_snippets_for_other_libraries_are_parts_of_files_that_run():
    files = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "examples" / "libraries").glob("*.py"))]
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "libraries.md").read_text(encoding="utf-8"), re.S)
    assert len(snippets) > 10
    for snippet in snippets:
        assert any(snippet in text for text in files), snippet


def test_a_learner_of_the_libraries_page_runs_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "examples.libraries.cmaes", "1600"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert line["decisions"] == 1600
    assert 0 < line["utility"] <= 1
