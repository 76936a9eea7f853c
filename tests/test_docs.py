"""The generated page is what the generator makes, and what the pages show runs."""

import runpy
from pathlib import Path

import pytest

from llmsched_gym.env import LLMSchedEnv
from llmsched_gym.env.docs import fields, page
from llmsched_gym.evaluation.run import simulate

ROOT = Path(__file__).resolve().parents[1]


def test_the_environment_page_is_up_to_date():
    assert (ROOT / "docs" / "environment.md").read_text() == page(), (
        "python -m llmsched_gym.env.docs > docs/environment.md"
    )


def test_every_setting_is_on_the_page():
    listed = fields()
    for name in LLMSchedEnv().config.to_dict():
        assert f"`{name}`" in listed, name


@pytest.mark.parametrize("name", ["custom_reward", "custom_observation"])
def test_examples_run(name, capsys):
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_the_custom_scheduler_runs_and_serves_everybody():
    world = LLMSchedEnv("paper", qps=1.5, num_requests=40).config
    episode = simulate(world, "examples.custom_scheduler:ShortestFirst", 0)
    assert episode.sim.num_finished == 40


def test_the_readme_shows_the_examples_as_they_are():
    readme = (ROOT / "README.md").read_text()
    for name in ("ppo.py", "custom_scheduler.py"):
        assert (ROOT / "examples" / name).read_text().rstrip() in readme, name
