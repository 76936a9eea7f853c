"""Weighted routers, told and not: their kernel, their tuning, what they could gain, and students of them."""

import json
import pickle

import numpy as np
import pytest

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("cma", reason="cma is not installed")

from llmsched_gym.agents import imitate_route, route_headroom, tune_route
from llmsched_gym.agents.route_scores import (
    AFFINITY,
    NAMES,
    TUNED,
    later_turns,
    make_weighted,
    read_weights,
    told,
    utility,
)
from llmsched_gym.agents.routing import RouteTrainingEnv
from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.evaluation.clusters import simulate_cluster
from llmsched_gym.registry import make_router
from llmsched_gym.workload import make_table

SMALL = {"num_replicas": 3, "qps": 3.0, "horizon_s": 40.0}
MIXED = {"replica_profiles": ("h100-mistral-7b", "a100-mistral-7b", "rtx6000ada-mistral-7b"), "qps": 10.0}


def weights(**named):
    return np.array([named.get(name, 0.0) for name in NAMES])


def write(path, values):
    path.write_text(json.dumps({"weights": dict(zip(NAMES, values.tolist(), strict=True))}))
    return str(path)


def routed(router, **fields):
    """Where the requests of a run went."""
    world = scenario("cluster", **SMALL | fields)
    return simulate_cluster(world, "slai", 3, router=router).replica_of.tolist()


@pytest.mark.parametrize(
    ("weights", "router"),
    [
        (AFFINITY, "prefix-affinity[imbalance=inf]"),
        (AFFINITY * 0.5 + weights(cached_share=1.5), "prefix-affinity[weight=4,imbalance=inf]"),
    ],
)
def test_weights_of_a_known_router_route_as_it_does(weights, router):
    found = routed(make_weighted(weights))
    assert found == routed(make_router(router)) and len(set(found)) > 2


def test_each_weight_has_a_say():
    alone = {name: routed(make_weighted(weights(**{name: 1.0})), **MIXED) for name in NAMES}
    assert len({tuple(found) for found in alone.values()}) == len(NAMES)
    nobody = routed(make_weighted(weights()), **MIXED)
    assert nobody == alone["goes_on"] == routed(make_router("least-tokens"), **MIXED)  # nobody has been told
    with pytest.raises(ValueError, match="weights: expected 11, got 2"):
        make_weighted([1.0, 2.0])


def test_the_weights_that_were_found_have_a_name():
    found = routed(make_router("llmsched_gym.agents.route_scores:TUNED"), **MIXED)
    assert found == routed(TUNED, **MIXED) and set(found) >= {0, 1, 2}


def test_who_is_told_knows_lengths_and_turns():
    table = make_table(scenario("cluster", **SMALL), 3)
    later, hints = later_turns(table), told(table).length_hint
    for i in range(len(table)):
        assert later[i] == np.sum(table.session_id[i + 1 :] == table.session_id[i])
    assert np.array_equal(np.floor(hints), table.output_tokens) and np.allclose(hints % 1.0 * 4096, later)

    world = scenario("cluster", **SMALL, length_hint="oracle")
    routes = [
        simulate_cluster(world, "slai", 3, router=make_weighted(w), table=told(table)).replica_of.tolist()
        for w in (AFFINITY, AFFINITY + weights(goes_on=2.0))
    ]
    assert routes[0] != routes[1]
    plain = scenario("cluster", **SMALL)
    assert utility(plain, "slai", weights(work_s=1.0), 3, is_told=True) != utility(
        plain, "slai", weights(work_s=1.0), 3, is_told=False
    )


def test_asking_a_told_teacher_changes_nothing():
    def observations(asks):
        env = RouteTrainingEnv(2, "cluster", 0, **SMALL)
        teacher = imitate_route.Teacher(make_weighted(AFFINITY + weights(work_s=1.0)), env, is_told=True)
        found = [env.reset()]
        answers = []
        for i in range(150):
            if asks:
                answers.append(teacher())
            found.append(env.step(np.array([i % 3, i % 2]))[0])
        return np.array(found), np.array(answers)

    seen, answers = observations(asks=True)
    assert np.array_equal(seen, observations(asks=False)[0])
    assert set(answers.ravel().tolist()) == {0, 1, 2}
    hinted = RouteTrainingEnv(1, "cluster", 0, **SMALL, length_hint="oracle")
    with pytest.raises(ConfigError, match="length_hint: expected 'none'"):
        imitate_route.Teacher(make_weighted(AFFINITY), hinted, is_told=True)


def test_a_student_learns_to_route_as_its_teacher(tmp_path):
    file = write(tmp_path / "w.json", weights(load_share=1.0))
    out = tmp_path / "run"
    config = imitate_route.Config(
        weights=file,
        out=str(out),
        set={**SMALL, "warmup_s": 2.0},
        rounds=1,
        steps=200,
        num_envs=2,
        epochs=40,
        batch_size=64,
        hidden=(16,),
        learning_rate=1e-2,
        eval_seeds=1,
        eval_requests=20,
    )
    folder = imitate_route.imitate(config)
    lines = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1] and lines[-1]["agreement"] > 0.9
    alike = np.array(routed(make_router(str(folder)))) == np.array(routed(make_weighted(weights(load_share=1.0))))
    assert json.loads((folder / "policy.json").read_text())["training"]["weights"] == "w.json"
    assert alike.mean() > 0.3  # runs part ways after the first difference


@pytest.mark.parametrize("search", ["steps", "cma"])
def test_tuning_keeps_the_better_one_and_is_compared(search, tmp_path):
    file = str(tmp_path / "w.json")
    tiny = {"search": search, "generations": 2, "population": 4, "seeds": 1, "selection_seeds": 2, "horizon_s": 20.0}
    fields = {"num_replicas": 3, "qps": 3.0}
    found = tune_route.tune(tune_route.Config(set=fields, out=file, **tiny))
    assert read_weights(file).tolist() == list(found["weights"].values()) and found["weights"]["goes_on"] == 0.0
    assert (found["tuned"] > found["start"]) == (found["weights"] != dict(zip(NAMES, AFFINITY, strict=True)))

    settings = {"seeds": 2, "selection_seeds": 1, "workers": 1, "judged": 2, "out": str(tmp_path / "h.json")}
    config = route_headroom.Config(set=fields, horizon_s=20.0, weights=file, told=file, load=1.5, **settings)
    table = route_headroom.headroom(config)["routers"]
    assert [name.partition(":")[0] for name in table][2:] == ["weights", "lengths", "told", "hindsight"]
    assert table["hindsight"]["mean_utility"] >= table["told"]["mean_utility"]
    world = route_headroom.world_of(config)
    assert world.qps == 4.5 and world.qps_range == (1.5 * 4.1, 1.5 * 7.6)
    with pytest.raises(
        ConfigError, match=r"weights: expected a file of agents.tune_route, got 'nowhere.json': No such file"
    ):
        route_headroom.headroom(route_headroom.Config(weights="nowhere.json"))
    with pytest.raises(ConfigError, match="suite: expected one of cluster, hetero, disagg, got 'default'"):
        tune_route.tune(tune_route.Config(suite="default"))


def test_wrong_weights_and_folders_are_one_line_before_any_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tune_route, "by_steps", None)  # no search begins
    with pytest.raises(ConfigError, match="out: expected a file to write, got the folder"):
        tune_route.tune(tune_route.Config(out=str(tmp_path)))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="out: cannot write to"):
        tune_route.tune(tune_route.Config(out=str(tmp_path / "file" / "w.json")))
    file = tmp_path / "w.json"
    file.write_text(json.dumps({"weights": {**dict.fromkeys(NAMES, 0.0), "is_last": float("nan")}}))
    with pytest.raises(ConfigError, match=r"w\.json: is_last: expected a finite number, got nan"):
        read_weights(str(file))
    with pytest.raises(ConfigError, match=r"weights: expected a file of agents\.tune_route, got '': Is a directory"):
        read_weights("")


def test_weights_are_kept_in_a_pickle():
    for router in (TUNED, make_weighted(np.arange(len(NAMES)))):
        again = pickle.loads(pickle.dumps(router))
        assert again == router and again.weights == router.weights
