"""vLLM's own scheduler tests on the plug-in, whose policy `vllm-v1` forms every batch, against the same on vLLM's own.

    pip download --no-deps --no-binary vllm vllm==0.32.0     # the tests are in its source distribution alone
    DIR/bin/python -m benchmarks.vllm_own_tests vllm-0.32.0.tar.gz

needs pytest and pytest-asyncio beside vLLM (PYTHONPATH may name a folder that has them). The archive's `tests` are
unpacked into a temporary folder, with a configuration in the shape of their default model, since they must run offline.
Prints one JSON line for each side, and one for each test that passes on vLLM's own scheduler and fails on the plug-in.
`stock` counts tests in which a scheduler left batches to vLLM's own order, with the reasons.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

FILES = ("test_scheduler.py", "test_async_scheduler.py")
OPT_125M = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 768,
    "ffn_dim": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}
MODULES = ("tests.v1.core.utils", "tests.v1.core.test_scheduler", "tests.v1.core.test_async_scheduler")


class Substitute:
    """A pytest plug-in: the plug-in's schedulers stand for vLLM's in the tests' modules; outcomes go to a file."""

    def __init__(self, path: Path, substitutes: bool, policy: str) -> None:
        self.path, self.substitutes, self.policy = path, substitutes, policy
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, list[str]] = {}
        self.messages: dict[str, str] = {}
        self.made: list[Any] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if not self.substitutes:
            return
        os.environ["LLMSCHED_POLICY"] = self.policy
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler

        from llmsched_gym.real_backend.vllm.plugin import PolicyDecides
        from llmsched_gym.real_backend.vllm_plugin import AsyncScheduler as OurAsync
        from llmsched_gym.real_backend.vllm_plugin import SyncScheduler

        made = self.made
        begin = PolicyDecides.__init__

        def noted(self: Any, *args: Any, **kwargs: Any) -> None:
            begin(self, *args, **kwargs)
            made.append(self)

        PolicyDecides.__init__ = noted  # type: ignore[method-assign]
        for name in MODULES:
            module = sys.modules.get(name)
            for attribute, value in list(vars(module).items()) if module else ():
                if value is Scheduler:
                    setattr(module, attribute, SyncScheduler)
                elif value is AsyncScheduler:
                    setattr(module, attribute, OurAsync)

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.split("::", 1)[0].rsplit("/", 1)[-1] + "::" + report.nodeid.split("::", 1)[1]
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[name] = report.outcome
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                self.messages[name] = str(crash.message if crash else report.longrepr).splitlines()[0][:200]
        if report.when == "call":
            reasons = set()
            for scheduler in self.made:
                if scheduler.lane is None:
                    reasons.add("all")
                reasons |= {key[1] for key in scheduler.metrics.counts if key[0] == "fallbacks"}
                reasons |= {"foreign"} if scheduler.foreign else set()
            self.reasons[name] = sorted(reasons)
            self.made.clear()

    def pytest_sessionfinish(self) -> None:
        found = {"outcomes": self.outcomes, "reasons": self.reasons, "messages": self.messages}
        self.path.write_text(json.dumps(found), encoding="utf-8")


def run_inside(folder: Path, path: Path, substitutes: bool, policy: str) -> int:
    """Run the tests in this process."""
    import pytest

    os.chdir(folder)
    sys.path.insert(0, str(folder))
    files = [f"tests/v1/core/{name}" for name in FILES]
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "--tb=short", "-q"]
    return int(pytest.main([*options, *files], plugins=[Substitute(path, substitutes, policy)]))


def unpack(archive: Path, folder: Path) -> None:
    """The archive's tests, and what they need offline."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            parts = Path(member.name).parts
            if len(parts) > 1 and parts[1] == "tests" and (member.isfile() or member.isdir()):
                member.name = str(Path(*parts[1:]))
                tar.extract(member, folder, filter="data")
    model = folder / "facebook" / "opt-125m"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(OPT_125M), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_own_tests", description=__doc__.split("\n")[0])
    parser.add_argument("archive", type=Path, help="vllm-VERSION.tar.gz, of the version that is installed")
    parser.add_argument("--policy", default="vllm-v1", help="what forms the batches (vllm-v1)")
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.inside:
        folder, path, side = args.inside
        return run_inside(Path(folder), Path(path), side == "plugin", args.policy)
    if not args.archive.is_file():
        print(f"error: {args.archive}: no such file; see `python -m benchmarks.vllm_own_tests --help`", file=sys.stderr)
        return 2
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack(args.archive, folder)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
        for side in ("stock", "plugin"):
            path = folder / f"{side}.json"
            command = [sys.executable, "-m", "benchmarks.vllm_own_tests", str(args.archive), "--policy", args.policy]
            ran = subprocess.run(
                [*command, "--inside", name, str(path), side], env=environment, capture_output=True, text=True
            )
            if not path.is_file():
                print(f"error: {side}: {(ran.stderr or ran.stdout).strip().splitlines()[-1]}", file=sys.stderr)
                return 1
            found[side] = json.loads(path.read_text(encoding="utf-8"))
            outcomes = found[side]["outcomes"]
            line = {"side": side, **Counter(outcomes.values())}
            if side == "plugin":
                passing = [test for test, outcome in outcomes.items() if outcome == "passed"]
                formed = [test for test in passing if not found[side]["reasons"].get(test)]
                line["passed with every batch formed"] = len(formed)
                line["stock"] = dict(Counter(r for rs in found[side]["reasons"].values() for r in rs))
            print(json.dumps(line), flush=True)
    lost = 0
    for test, outcome in found["stock"]["outcomes"].items():
        if outcome == "passed" and found["plugin"]["outcomes"].get(test) != "passed":
            lost += 1
            print(json.dumps({"test": test, "message": found["plugin"]["messages"].get(test, "did not run")}))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
