"""Pages of the site that are no files of this folder: the README as its start, and the reference from docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
REFERENCE = {
    "Environments": (
        "llmsched_gym.env.single.LLMSchedEnv",
        "llmsched_gym.env.vector.LLMSchedVectorEnv",
        "llmsched_gym.env.route.envs.LLMRouteEnv",
        "llmsched_gym.env.route.envs.LLMRouteVectorEnv",
    ),
    "Scenarios": (
        "llmsched_gym.config.scenario.Scenario",
        "llmsched_gym.config.env.EnvConfig",
        "llmsched_gym.config.cluster.ClusterScenario",
    ),
    "Schedulers": ("llmsched_gym.scheduler", "llmsched_gym.registry", "llmsched_gym.engine.view.View"),
    "Routers": ("llmsched_gym.cluster.router.Router", "llmsched_gym.cluster.router.RouterView"),
    "Policies": ("llmsched_gym.policies.load.load_policy", "llmsched_gym.policies.folder"),
    "Running": (
        "llmsched_gym.engine.core.Engine",
        "llmsched_gym.evaluation.run.simulate",
        "llmsched_gym.evaluation.grid.evaluate",
        "llmsched_gym.evaluation.capacity",
        "llmsched_gym.evaluation.metrics",
    ),
    "Workloads": (
        "llmsched_gym.workload.table.RequestTable",
        "llmsched_gym.workload.generate.make_table",
        "llmsched_gym.workload.traces.load_trace",
    ),
    "Costs": (
        "llmsched_gym.cost.profile.Profile",
        "llmsched_gym.cost.profile.load_profile",
        "llmsched_gym.cost.fit.fit",
        "llmsched_gym.cost.roofline.roofline",
    ),
    "Theory": ("llmsched_gym.fluid.capacity.fluid_capacity", "llmsched_gym.fluid.cluster.cluster_fluid"),
    "Reports": ("llmsched_gym.report.write.write_report", "llmsched_gym.report.intervals"),
}


def on_files(files: Files, config: Any) -> Files:
    """Add the two pages."""
    for name, text in (("index.md", start()), ("reference.md", reference())):
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links out of this folder lead nowhere on the site: their text stays."""
    return re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Docstrings' roles, :func:`name` and the like, become plain code."""
    return re.sub(r":(?:class|func|meth|mod|data|attr):<code>~?", "<code>", html)


def start() -> str:
    """The README, whose links lead from the root of the repository."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#|[\w-]+\.md|figures/)[^)]*\)", r"\1", text)


def reference() -> str:
    """Classes, functions and modules by what they are for."""
    parts = ["# Python\n\nWhat is meant to be used from Python, from its docstrings."]
    for title, names in REFERENCE.items():
        parts += [f"## {title}", *(f"::: {name}" for name in names)]
    return "\n\n".join(parts) + "\n"
