"""The client of real servers against one that does as it is told: times, failures, sessions, ways of asking."""

import asyncio
import json
import math
import time

import numpy as np
import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("prometheus_client")

from fake_server import FakeServer, Plan

from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.engine.records import PHASES
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.outcomes import Outcomes
from llmsched_gym.serving import prometheus
from llmsched_gym.serving.bench import Server, examine, latencies, run_once
from llmsched_gym.serving.client import Client, base_of
from llmsched_gym.serving.dialect import Dialect, dialects
from llmsched_gym.serving.episode import episode_of, row_of, token_times
from llmsched_gym.serving.load import Run, offer
from llmsched_gym.serving.prompts import Prompts
from llmsched_gym.serving.stream import Answer, Events, StreamError
from llmsched_gym.workload import RequestTable

WORLD = scenario("default", num_requests=1, warmup_s=0.0, patience_s=5.0)
SLACK_S = 1.0  # between what the server wrote and what its client saw, on a machine that others use
TIGHT_S, ATTEMPTS = 0.005, 4  # the same, half of the time, in one of so many attempts


def table(outputs, every_s=0.02, **more):
    """Requests of 10 prompt tokens; the lengths of their outputs, all different, name them."""
    slos = {"ttft_slo_s": 1.0, "tbt_slo_s": 0.5} | more
    return RequestTable.of(every_s * np.arange(len(outputs)), 10, outputs, qps=1 / every_s, **slos)


def run(fake, requests, world=WORLD, *, goes_on=False, logprobs=False, send_slos=False):
    """Offer requests to a server; (run, what the server turned out to be)."""

    async def main():
        async with Client(fake.url) as client:
            found = await examine(Server(fake.url, "x", logprobs=logprobs), client, goes_on=goes_on)
            load = await offer(
                client, found.dialect, found.model, world, requests, seed=0, nonce=1, send_slos=send_slos
            )
            return load, found

    return asyncio.run(main())


def phases(load, world=WORLD):
    return [PHASES[p] for p in episode_of(load, world, "x", 0).requests["phase"]]


# What came when


@pytest.mark.parametrize(
    ("per_chunk", "server", "logprobs", "counted_by"),
    [
        (1, {}, False, "usage"),
        (3, {}, False, "usage"),
        (3, {"usage": False}, True, "logprobs"),
        (3, {"refuses": ("min_tokens",)}, False, "total"),
        (3, {"usage": False}, False, "total"),  # finish_reason "length" tells that all came
    ],
)
def test_every_token_has_the_time_at_which_the_server_wrote_it(per_chunk, server, logprobs, counted_by):
    outputs = np.arange(5, 25)
    for _ in range(ATTEMPTS):
        delays = []
        with FakeServer(Plan(0.05, 0.015, per_chunk), **server) as fake:
            load, found = run(fake, table(outputs), logprobs=logprobs)
        for answer, tokens in zip(load.answers, outputs, strict=True):
            log = fake.of(tokens)
            if counted_by != "total":
                assert answer.counts == [count for _, count in log.written]
            assert len(token_times(answer)) == tokens and not answer.reason
            written_s = np.array([time_s for time_s, _ in log.written]) - load.start_s
            assert answer.sent_s < log.arrived_s - load.start_s
            assert (np.array(answer.chunk_s) > written_s).all()  # one clock for both
            delays += (answer.chunk_s - written_s).tolist()
        if np.median(delays) < TIGHT_S:
            break
    assert np.median(delays) < TIGHT_S and max(delays) < SLACK_S
    figures = row_of(episode_of(load, WORLD, "x", 0), load, found.model)
    assert figures["counted_by"] == counted_by
    assert figures["num_finished"] == len(outputs) and figures["num_attained"] == len(outputs)
    assert sum(figures["num_gaps_by_class"].values()) == (outputs - 1).sum()
    assert figures["tokens_per_chunk"] == pytest.approx(outputs.sum() / np.ceil(outputs / per_chunk).sum())
    assert 0.0 <= figures["sent_late_p50_s"] <= figures["sent_late_p99_s"] <= figures["sent_late_max_s"] < SLACK_S


def test_where_nobody_says_how_many_tokens_came_gaps_are_between_chunks():
    with FakeServer(Plan(per_chunk=3, finish_reason="stop"), usage=False, refuses=("ignore_eos",)) as fake:
        load, found = run(fake, table([9]))
    assert len(found.remarks) == 2 and "gaps are between chunks" in found.remarks[1]
    (answer,) = load.answers
    assert answer.num_tokens == 3 and answer.reason == "short: 3 of 9 tokens (stop)"
    assert row_of(episode_of(load, WORLD, "x", 0), load, "m")["counted_by"] == "chunk"


def test_requests_are_sent_on_time_whatever_the_server_does():
    with FakeServer(Plan(ttft_s=1.5)) as fake:
        load, _ = run(fake, table(np.arange(3, 33), every_s=0.005, ttft_slo_s=9.0))
        arrived = [log.arrived_s for log in fake.logs[1:]]
    assert max(arrived) < min(log.written[0][0] for log in fake.logs[1:])
    assert load.late_s.shape == (30,) and (load.late_s >= 0.0).all()
    assert all(a.chunk_s[0] - a.sent_s >= 1.5 for a in load.answers)


def test_a_run_by_hand_has_the_figures_of_evaluate():
    requests = RequestTable.of([0.0, 1.0], [10, 20], [4, 2], slo_class=[0, 1], ttft_slo_s=0.5, tbt_slo_s=[0.1, 0.5])
    first = Answer(
        0.0, 0.9, [0.4, 0.5, 0.75], [1, 2, 1], 4, counted_by=1, ended_by="length", is_done=True, lateness_s=0.15
    )
    second = Answer(1.0, 1.6, [1.5, 1.6], [1, 1], 2, counted_by=1, ended_by="length", is_done=True)
    load = Run(requests, [first, second], requests.arrival_s, np.zeros(2, bool), 1.7)
    episode = episode_of(load, WORLD, "x", 0)
    assert np.allclose(episode.gaps, [0.1, 0.0, 0.25, 0.1])
    outcomes = Outcomes(episode)
    assert outcomes.num_late_gaps.tolist() == [1, 0] and outcomes.attained.tolist() == [False, True]
    assert outcomes.ttft_s.tolist() == [0.4, 0.5] and outcomes.e2e_latency_s.tolist() == pytest.approx([0.75, 0.6])
    assert episode.requests["deadline_miss_s"].tolist() == pytest.approx([0.75 - 0.8, 0.0])
    figures = row(episode)
    assert figures["itl_p99_s_by_class"]["strict"] == pytest.approx(0.1 + 0.98 * 0.15)
    assert figures["slo_attainment_by_class"] == {"strict": 0.0, "relaxed": 1.0}
    mean = row(episode_of(load, WORLD.replace(tbt_rule="mean"), "x", 0))
    assert mean["num_attained"] == 1  # (0.75 - 0.4) / 3 is more than 0.1


# What goes wrong


def test_what_fails_is_a_miss_with_its_reason():
    plans = {
        21: Plan(status=500),
        22: Plan(status=429),
        5: Plan(fault="close"),
        6: Plan(fault="close", fault_after=2),
        7: Plan(fault="bad json", fault_after=1),
        8: Plan(fault="error event", fault_after=3),
        9: Plan(fault="no end", fault_after=4),
        10: Plan(tokens=6, finish_reason="stop"),
        11: Plan(tokens=12),
        12: Plan(fault="no stream"),
        13: Plan(),
    }
    with FakeServer(plans=plans) as fake:
        load, found = run(fake, table(list(plans)))
        assert len(fake.logs) == 1 + len(plans)  # the probe, and nothing twice
    assert [a.reason for a in load.answers] == [
        "HTTP 500: out of order",
        "HTTP 429: out of order",
        "disconnected before a token",
        "disconnected after 2 of 6 tokens",
        "the stream holds what is no JSON",
        "the server says: it broke",
        "disconnected after 4 of 9 tokens",
        "short: 6 of 10 tokens (stop)",
        "long: 12 of 11 tokens",
        "the server does not stream: it sent application/json",
        "",
    ]
    assert phases(load) == ["rejected", "refused", *["rejected"] * 8, "finished"]
    figures = row_of(episode_of(load, WORLD, "x", 0), load, found.model)
    assert figures["num_attained"] == figures["num_finished"] == 1
    assert figures["num_failed"] == 10 and figures["num_short"] == 1
    assert json.loads(figures["failures"])["disconnected"] == 2


def test_a_client_leaves_when_its_patience_is_over_and_the_server_sees_it_go():
    world = WORLD.replace(patience_s=0.1)
    plans = {14: Plan(ttft_s=5.0), 6: Plan(fault="hang", fault_after=2), 5: Plan()}
    with FakeServer(plans=plans) as fake:
        load, _ = run(fake, table(list(plans), ttft_slo_s=0.2, tbt_slo_s=0.05), world)
        waiting, hung, served = load.answers
        deadline = time.monotonic() + 5
        while not fake.of(6).is_gone and time.monotonic() < deadline:
            time.sleep(0.01)
        assert fake.of(6).is_gone
    assert phases(load, world) == ["abandoned", "abandoned", "finished"]
    assert 0.3 <= waiting.ended_s - waiting.sent_s < 0.3 + SLACK_S
    assert 0.15 <= hung.ended_s - hung.last_s < 0.15 + SLACK_S
    figures = row(episode_of(load, world, "x", 0))
    assert figures["num_abandoned"] == 2 and not served.reason
    assert figures["mean_utility"] == pytest.approx((1 - 2 * world.beta) / 3)


def test_a_server_that_is_killed_and_comes_back_costs_what_it_lost():
    outputs = np.arange(20, 80)
    with FakeServer(Plan(0.02, 0.01)) as fake:

        async def main():
            async with Client(fake.url) as client:
                found = await examine(Server(fake.url, "x"), client, goes_on=False)

                async def fault():
                    await asyncio.sleep(0.5)
                    await asyncio.to_thread(fake.kill)
                    await asyncio.sleep(0.3)
                    await asyncio.to_thread(fake.start)

                task = asyncio.create_task(fault())
                load = await offer(client, found.dialect, found.model, WORLD, table(outputs, 0.04), seed=0, nonce=1)
                await task
                return load

        load = asyncio.run(main())
    kinds = [a.reason.split(" after ")[0].split(":")[0] for a in load.answers]
    assert kinds[0] == "" and kinds[-1] == ""  # before, and after
    assert "disconnected" in kinds and "no connection" in kinds
    down = [a.sent_s for a, kind in zip(load.answers, kinds, strict=True) if kind == "no connection"]
    assert len(down) >= 4 and max(down) - min(down) < 1.0
    assert all(a.num_tokens < n for a, n in zip(load.answers, outputs, strict=True) if "disc" in a.reason)
    assert "no connection: Connection refused" in {a.reason for a in load.answers}
    figures = row(episode_of(load, WORLD, "x", 0))
    assert figures["num_finished"] + figures["num_rejected"] == len(outputs)
    assert figures["num_attained"] <= figures["num_finished"] == kinds.count("")


def test_a_run_ends_without_those_that_are_nobodys_measure():
    requests = table([5, 6, 400], every_s=0.05)
    requests = RequestTable.of(requests.arrival_s, 10, [5, 6, 400], ttft_slo_s=1.0, tbt_slo_s=0.5, cohort=(0, 2))
    with FakeServer() as fake:
        load, _ = run(fake, requests)
    assert load.clock_s < 3.5 and phases(load) == ["finished", "finished", phases(load)[2]]
    assert phases(load)[2] in ("pending", "waiting", "running")


def test_a_run_is_cut_off_behind_its_drain():
    world = WORLD.replace(drain_s=3.0)
    with FakeServer(plans={3: Plan(), 9: Plan(fault="hang", fault_after=2)}) as fake:
        load, _ = run(fake, table([3, 9]), world)
    assert phases(load, world) == ["finished", "running"]
    assert row(episode_of(load, world, "x", 0))["num_unfinished"] == 1


# Sessions, SLOs, ways of asking


def sessions(outputs, parent, think_s):
    n = len(outputs)
    prompts, shares, shared = [10], [-1], [0]
    for r in range(1, n):
        shares.append(parent[r])
        shared.append(0 if parent[r] < 0 else prompts[parent[r]] + outputs[parent[r]])
        prompts.append(10 + shared[r])
    plain = RequestTable.of(np.zeros(n), prompts, outputs, ttft_slo_s=1.0, tbt_slo_s=0.5)
    fields = vars(plain) | {
        "arrival_s": np.where(np.array(parent) < 0, 0.0, np.nan),
        "parent": np.array(parent, np.int32),
        "think_s": np.array(think_s, float),
        "shares_with": np.array(shares, np.int32),
        "shared_tokens": np.array(shared, np.int32),
    }
    return RequestTable(**fields)


def test_turns_come_behind_the_answers_that_their_prompts_go_on_with():
    requests = sessions([5, 6, 7, 8, 9], [-1, 0, 1, -1, 3], [0.0, 0.1, 0.05, 0.0, 0.1])
    with FakeServer(plans={8: Plan(fault="close", fault_after=3)}, ids=True) as fake:
        load, _ = run(fake, requests, goes_on=True)
        bodies = [fake.of(tokens).body for tokens in (5, 6, 7)]
        assert len([log for log in fake.logs if log.body["max_tokens"] == 9]) == 0
    assert phases(load) == ["finished", "finished", "finished", "rejected", "cancelled"]
    for before, after, think_s in ((0, 1, 0.1), (1, 2, 0.05)):
        gap_s = load.answers[after].sent_s - load.answers[before].last_s
        assert think_s <= gap_s < think_s + SLACK_S
        told = list(range(7000, 7000 + requests.output_tokens[before]))
        begins = bodies[before]["prompt"] + told
        assert bodies[after]["prompt"][: len(begins)] == begins
        assert len(bodies[after]["prompt"]) == requests.prompt_tokens[after]
    assert row(episode_of(load, WORLD, "x", 0))["num_cancelled"] == 1


def test_slos_travel_with_requests():
    requests = RequestTable.of([0.0, 0.02], 10, [3, 5], slo_class=[0, 1], ttft_slo_s=[0.5, math.inf], tbt_slo_s=0.25)
    with FakeServer() as fake:
        run(fake, requests, send_slos=True)
        told = [fake.of(tokens).body["vllm_xargs"] for tokens in (3, 5)]
    assert told[0] == {"slo_class": "strict", "ttft_slo_s": 0.5, "tbt_slo_s": 0.25}
    assert told[1] == {"slo_class": "relaxed", "tbt_slo_s": 0.25}


@pytest.mark.parametrize(
    ("refuses", "ids", "fixed", "usage"),
    [
        ((), True, ("ignore_eos", "min_tokens"), "continuous"),
        (("min_tokens",), True, ("ignore_eos",), "final"),
        (("ignore_eos", "min_tokens"), True, (), "final"),
        (("ignore_eos", "min_tokens", "stream_options"), True, (), "none"),
        (("ids",), False, ("ignore_eos", "min_tokens"), "continuous"),
    ],
)
def test_a_server_is_asked_as_it_can_be(refuses, ids, fixed, usage):
    with FakeServer(refuses=refuses) as fake:
        load, found = run(fake, table([5]))
        prompt = fake.of(5).body["prompt"]
    assert (found.dialect.ids is not None, found.dialect.fixed_length, found.dialect.usage) == (ids, fixed, usage)
    assert len(prompt) == 10 if ids else len(prompt.split()) == 10
    assert phases(load) == ["finished"]


def test_dialects_go_from_the_most_telling_to_the_plainest():
    known = list(dialects(token_ids=True))
    assert known[0] == Dialect(token_ids=True) and len(set(known)) == len(known)
    assert known[-1].ids is None and known[-1].usage == "none" and known[-1].fixed_length == ()
    body = json.loads(known[-1].body("m", " a b", 7))
    assert body == {"model": "m", "prompt": " a b", "max_tokens": 7, "temperature": 0.0, "stream": True}


def test_events_are_read_in_any_pieces():
    text = b': hello\r\ndata: {"a": 1}\r\n\r\nevent: x\ndata: b\ndata: c\n\ndata:[DONE]\n\ndata: cut'
    for size in (1, 2, 3, 7, len(text)):
        events = Events()
        found = [e for i in range(0, len(text), size) for e in events.feed(text[i : i + size])]
        assert found == [b'{"a": 1}', b"b\nc", b"[DONE]"]


@pytest.mark.parametrize("data", [b"{", b"[1]", b'{"choices": [1]}', b'{"error": {"message": "no"}}'])
def test_a_stream_that_is_none_is_an_error(data):
    with pytest.raises(StreamError):
        Answer().read(data, 0.0)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "8000"])
def test_an_address_is_checked(url):
    with pytest.raises(ConfigError, match="url: expected http"):
        base_of(url)
    assert base_of("http://h:1/v1/") == base_of("http://h:1") == "http://h:1"


# The server's own histograms


def test_histograms_of_client_and_server_agree_and_would_not_if_the_client_were_off():
    world = scenario("default", num_requests=40, warmup_s=0.0, qps=50.0, arrivals_continue=False, workload="sharegpt")
    for _ in range(ATTEMPTS):
        with FakeServer(Plan(0.03, 0.002)) as fake:
            server = Server(fake.url, "x", check_metrics=True)

            async def examined(fake=fake, server=server):
                async with Client(fake.url) as client:
                    return await examine(server, client, goes_on=False)

            load = asyncio.run(run_once(server, asyncio.run(examined()), world, 3))
            whole = prometheus.parse(fake.exposition(), "fake")
        if load.counters["metrics_agree"]:
            break
    assert load.counters["metrics_agree"] is True, load.counters["metrics"]
    own = latencies(load)
    assert f"{len(own['itl']):,} of the client, {len(own['itl']):,} of the server" in load.counters["metrics"]
    assert not prometheus.compare("ttft", 10 * own["ttft"], whole["ttft"]).agrees
    assert not prometheus.compare("itl", own["itl"] + 0.05, whole["itl"]).agrees
    assert prometheus.parse(fake.exposition(), "another") == {}


def test_a_histogram_by_hand():
    bounds_s = np.array([0.1, 0.2, math.inf])
    server = prometheus.Histogram(bounds_s, np.array([5.0, 9.0, 10.0]))
    assert [server.bucket(q) for q in (0.5, 0.51, 0.9, 0.99)] == [0, 1, 1, 2]
    before = prometheus.Histogram(bounds_s, np.array([1.0, 1.0, 1.0]))
    assert server.less(before).counts.tolist() == [4.0, 8.0, 9.0]
    with pytest.raises(ConfigError, match="began anew"):
        before.less(server)
    with pytest.raises(ConfigError, match="began anew"):
        prometheus.Histogram(bounds_s, np.array([5.0, 9.0, 10.0]), created_s=2.0).less(before)
    with pytest.raises(ConfigError, match="began anew"):
        prometheus.Histogram(bounds_s, np.array([5.0, 9.0, 10.0]), created_s=2.0).less(before)
    client = np.array([0.05] * 4 + [0.15] * 5 + [0.3])
    found = prometheus.compare("ttft", client, server)
    assert found.buckets_apart == (1, 0, 0) and found.agrees
    assert found.largest_difference == pytest.approx(0.1)


def test_prompts_share_what_the_table_says_and_are_a_runs_own():
    requests = sessions([5, 6, 7], [-1, 0, 1], [0.0, 0.0, 0.0])
    prompts = Prompts(requests, Dialect(), seed=0, nonce=1)
    first, second = prompts.of(0), prompts.of(1)
    assert second[:10] == first and len(second) == 25
    prompts.answered(1, [7, 8, 9])  # a server that tells less than it said: the rest is made up
    third = prompts.of(2)
    assert third[:28] == [*second, 7, 8, 9] and len(third) == requests.prompt_tokens[2]
    assert prompts.of(2) == third
    assert Prompts(requests, Dialect(), 0, 1).of(1) == second
    assert Prompts(requests, Dialect(), 0, 2).of(0) != first != Prompts(requests, Dialect(), 1, 1).of(0)
    low, high = Dialect().ids
    assert all(low <= token < high for token in third[:25] + third[28:])
    words = Prompts(requests, Dialect(ids=None), 0, 1)
    assert len(words.of(2).split()) == len(third) and words.of(2).startswith(words.of(1))
