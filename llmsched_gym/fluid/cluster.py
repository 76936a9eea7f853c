"""The fluid capacity of replicas behind a router: of each by itself, and of pools that prefill or decode."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmsched_gym.config import ClusterScenario
from llmsched_gym.cost import Profile, load_profile
from llmsched_gym.fluid.additive import by_size
from llmsched_gym.fluid.mixed import by_composition
from llmsched_gym.fluid.solution import Fluid
from llmsched_gym.fluid.work import Work, scenario_work


@dataclass(frozen=True)
class ClusterFluid:
    """What a cluster sustains, and which part of it ends that; rates in the arrivals per second of the scenario."""

    qps: float  # the capacity
    both_qps: float  # of the replicas that compute prompts and decode; 0 without any
    prefill_qps: float  # prompts of those that only prefill
    decode_qps: float  # all tokens behind the first, of those that only decode and of the others' time that is lent
    link_qps: float  # prompts whose KV is moved; inf where nothing is
    limited_by: str  # replicas, prefill, decode, link
    used: tuple[Fluid, ...]  # of each replica of the part that ends it


def cluster_fluid(scenario: ClusterScenario) -> ClusterFluid:
    """The largest rate of a cluster whose router spreads arrivals evenly among what they are like.

    Replicas that do all work add up. Equal ones sustain no more than that, whoever routes: what a replica can do is a
    convex set, so that unequal shares of work gain nothing. Unequal ones could gain by being sent different kinds of
    requests, each what it is best at, which the sum leaves out.

    Of prompts that are computed on one replica and decoded on another the rate is the least of what the pool that
    prefills, the pool that decodes and the link sustain. The link is not shared: it ends a rate only in that KV under
    way holds blocks on both sides. With prefix caching replicas that prefill are granted the blocks of outputs, too,
    which others have computed. Replicas that do both decode for those that prefill in a share of their time.
    """
    profiles = [load_profile(name) for name in scenario.profiles]
    roles = scenario.roles or ("both",) * len(profiles)
    alone: dict[tuple[Profile, str], Fluid] = {}

    def of(profile: Profile, part: str) -> Fluid:
        if (profile, part) not in alone:
            alone[profile, part] = _replica(scenario, profile, part)
        return alone[profile, part]

    def pool(role: str) -> list[Profile]:
        return [p for p, r in zip(profiles, roles, strict=True) if r == role]

    prefills = [of(p, "prefill") for p in pool("prefill")]
    decoders = [of(p, "decode") for p in pool("decode")]
    whole = [of(p, "both") for p in pool("both")]
    both, prefill, decode = (sum((f.qps for f in part), 0.0) for part in (whole, prefills, decoders))
    if not prefills:
        return ClusterFluid(both, both, prefill, decode, math.inf, "replicas", tuple(whole))
    link = _link_qps(scenario, pool("prefill"), [*pool("decode"), *pool("both")])
    # whose requests take longest in proportion to their decodes gives up the least
    lenders = sorted(
        (f.qps / of(p, "decode").qps, of(p, "decode").qps) for f, p in zip(whole, pool("both"), strict=True)
    )
    for price, most in lenders:
        lent = min(max(min(prefill, link) - decode, 0.0), most)
        both, decode = both - price * lent, decode + lent
    moved = min(prefill, decode, link)
    limited_by = "decode" if decode == moved else "prefill" if prefill == moved else "link"
    used = prefills if limited_by != "decode" else [*decoders, *whole]
    return ClusterFluid(both + moved, both, prefill, decode, link, limited_by, tuple(used))


def cluster_capacity(scenario: ClusterScenario) -> Fluid:
    """The capacity in the form of one engine's: rates are sums over replicas, the rest means over their batches.

    Where some prefill and some decode, batches are those of the pool that ends the rate.
    """
    found = cluster_fluid(scenario)
    return _together(found.used, found.qps)


def part_of(work: Work, part: str) -> Work:
    """What of an arrival's work is done where prompts are computed, `prefill`, or behind the first token, `decode`."""
    if part == "prefill":
        return dataclasses.replace(
            work,
            decode_tokens=0.0,
            kv_tokens=work.prefill_kv_tokens,
            held_blocks=work.held_blocks - work.decode_blocks,
            batches=work.batches - work.decode_tokens,
            decode_blocks=0.0,
        )
    if part == "decode":
        return dataclasses.replace(
            work,
            prefill_tokens=0.0,
            pairs=0.0,
            kv_tokens=work.kv_tokens - work.prefill_kv_tokens,
            held_blocks=work.decode_blocks,
            batches=work.decode_tokens,
            prefill_kv_tokens=0.0,
            own_pairs=0.0,
        )
    return work


def _replica(scenario: ClusterScenario, profile: Profile, part: str) -> Fluid:
    blocks = scenario.blocks(profile.num_kv_blocks)
    work = part_of(scenario_work(scenario, blocks), part)
    if work.tokens == 0.0:  # nothing is to be done in this part, as where every output is one token
        return Fluid(math.inf, (1,), (1.0,), 0.0, 0.0, 1.0, 0.0, 0.0, work)
    return (by_size if profile.surface is None else by_composition)(scenario, profile, work, blocks)


def _link_qps(scenario: ClusterScenario, sources: Sequence[Profile], targets: Sequence[Profile]) -> float:
    """Moves per second that leave no block of either side free, were each as long as the mean prompt."""
    work = scenario_work(scenario, min(scenario.blocks(p.num_kv_blocks) for p in (*sources, *targets)))
    moved = work.batches - work.decode_tokens  # requests of an arrival
    if moved == 0.0:
        return math.inf
    tokens = work.prefill_kv_tokens / moved
    seconds = tokens * sources[0].model.kv_bytes_per_token / scenario.kv_link_bytes_per_s
    blocks = tokens / scenario.block_size
    room = min(sum(scenario.blocks(p.num_kv_blocks) for p in side) for side in (sources, targets))
    return room / (blocks * seconds) / moved


def _together(parts: Sequence[Fluid], qps: float) -> Fluid:
    batches_per_s = sum(f.batches_per_s for f in parts)
    sizes: dict[int, float] = {}
    for f in parts:
        for size, share in zip(f.batch_tokens, f.batch_share, strict=True):
            sizes[size] = sizes.get(size, 0.0) + share * f.batches_per_s
    rate = sum(f.qps for f in parts)
    decodes_per_s = sum(f.decodes_per_batch * f.batches_per_s for f in parts)
    mixed = [f.mixed_share for f in parts]
    return Fluid(
        qps=qps,
        batch_tokens=tuple(sorted(sizes)),
        batch_share=tuple(sizes[size] / batches_per_s for size in sorted(sizes)),
        batches_per_s=batches_per_s,
        decodes_per_batch=decodes_per_s / batches_per_s,
        linear_share=float(np.mean([f.linear_share for f in parts])),
        # all replicas get relatively as many more
        memory_price=sum(f.qps * f.memory_price for f in parts) / rate,
        seqs_price=sum(f.qps * f.seqs_price for f in parts) / rate,
        work=parts[0].work,
        mixed_share=None if None in mixed else float(np.mean([m for m in mixed if m is not None])),
    )
