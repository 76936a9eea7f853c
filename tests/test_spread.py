"""The one map over cells, wherever they run; what of Ray can be seen without it."""

import sys
import threading
from concurrent.futures import Future

import pytest

from llmsched_gym.cli import main
from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.evaluation import cells, ray_pool, spread, warm
from llmsched_gym.evaluation.grid import evaluate


class Threads:
    """A pool whose calls end in whatever order they like, on machines that see none of our files."""

    is_here, count = False, 2

    def __init__(self):
        self.running = self.most = 0

    def submit(self, function, *args):
        future = Future()
        self.running += 1
        self.most = max(self.most, self.running)

        def run():
            self.running -= 1
            future.set_result(function(*args))

        threading.Timer(0.05 if args == (0,) else 0.0, run).start()
        return future

    def where(self):
        return "on 2 nodes"


def test_results_come_as_they_are_done_with_a_bounded_number_on_their_way():
    pool = Threads()
    found = list(spread.spread(pool, abs, [(-i,) for i in range(30)]))
    assert sorted(found) == [(i, i) for i in range(30)]
    assert found[0] != (0, 0)  # the first is the slowest
    assert pool.most <= spread.AHEAD * pool.count


def test_places_keep_the_order_and_say_where():
    notes = []
    assert spread.run_cells(abs, [(-3,), (-1,)], Threads(), notes.append) == [3, 1]
    assert notes == ["1/2 on 2 nodes", "2/2 on 2 nodes"]
    assert spread.run_cells(abs, [], 2) == []


def test_the_first_error_ends_it_and_what_was_done_before_has_come():
    done, tried = [], []

    def divide(a, b):
        tried.append(b)
        return a / b

    with pytest.raises(ZeroDivisionError):
        done.extend(spread.spread(spread.Here(), divide, [(6, 3), (1, 0), (8, 2)]))
    assert done == [(0, 2.0)] and tried == [3, 0]


def test_frames_of_workers_elsewhere_lie_in_the_drivers_folder_as_their_own_would(tmp_path, monkeypatch):
    world = scenario("paper", num_requests=30)
    monkeypatch.setattr(cells, "CHUNK_S", 0.0)
    found = {}
    for name, places in (("here", 1), ("away", Threads())):
        rows = evaluate(world, ["sarathi", "slai"], qps=[1.0], seeds=2, workers=places, out=tmp_path / name)
        found[name] = [{k: v for k, v in row.items() if k != "wall_time_s"} for row in rows]
    assert found["here"] == found["away"]
    for name in ("requests", "steps", "itl"):
        file = f"{name}.parquet"
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "away" / file).read_bytes()


def test_without_ray_one_line_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"^ray: it is not installed: pip install 'llmsched-gym\[ray\]'$"):
        spread.choose(2, ray=True)
    assert main(["evaluate", "--policy", "slai", "--seeds", "1", "--ray"]) == 2
    assert capsys.readouterr().err.strip().endswith("pip install 'llmsched-gym[ray]'")


def test_files_that_names_mean_go_to_a_cluster(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    modules = ("mine.py", "helper.py", "pack/__init__.py", "pack/deep/x.py")
    for file in ("runs/a/policy.json", "runs/b/policy.json", *modules):
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        (here / file).write_text("")
    (tmp_path / "elsewhere.json").write_text("")
    there.mkdir()
    monkeypatch.syspath_prepend(str(here))
    names = ["", "slai", "jsq+runs/a[decision_s=0]", "mine:Policy[x=1]", "pack.deep:Policy"]
    ray_pool.staged([*names, str(tmp_path / "elsewhere.json")], here, there)
    found = sorted(str(path.relative_to(there)) for path in there.rglob("*") if path.is_file())
    assert found == sorted([*modules, "runs/a/policy.json"])


def test_kernels_are_asked_for_once_per_node(tmp_path, monkeypatch):
    monkeypatch.setattr(warm, "cache_dir", lambda: str(tmp_path))
    monkeypatch.setattr(warm, "JIT_ENABLED", True)
    asked = []
    for process in ("one", "other"):
        monkeypatch.setattr(warm, "_warm", set())
        for _ in range(2):
            warm.once(("a",), lambda process=process: asked.append(process))
    assert asked == ["one"]
    warm.once(("fails",), lambda: 1 / 0)
    monkeypatch.setattr(warm, "_warm", set())
    warm.once(("fails",), lambda: asked.append("again"))
    assert asked == ["one", "again"]
