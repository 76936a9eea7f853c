"""Whether batches within an engine's limits take time: past the last knots of a surface its last trend goes on."""

from __future__ import annotations

from functools import lru_cache

from llmsched_gym.cost.profile import Profile
from llmsched_gym.cost.surface import ProfileError, Sums


@lru_cache(maxsize=64)
def check_reach(profile: Profile, max_num_seqs: int, max_model_len: int, kv_tokens: int) -> None:
    """ProfileError where decodes within these limits, alone or beside a chunk, take no time.

    Between knots a surface is bilinear in decodes and their context, so that times are lowest at corners: at the knots,
    which the profile has looked at, and at the limits, `kv_tokens` in the cache among them.
    """
    surface = profile.surface
    if surface is None:
        return
    contexts = {*(k for k in surface.context if k < max_model_len), max_model_len}
    counts = {*(n for n in surface.sequences if n < max_num_seqs), max_num_seqs}
    corners = {(min(max_num_seqs, kv_tokens // k), k) for k in contexts}
    corners |= {(n, min(max_model_len, kv_tokens // n)) for n in counts}
    for n, k in sorted(corners):
        if n < 1 or k < 1:
            continue
        chunks: list[list[tuple[int, int]]] = [[], *([(0, size)] for size in surface.chunk)]
        for chunk in chunks:
            num_tokens = n + sum(size for _, size in chunk)
            if profile.ms(num_tokens, Sums(n, n * k, k, n + len(chunk), chunk)) <= 0.0:
                where = f" beside a chunk of {chunk[0][1]:,}" if chunk else ""
                what = f"{n:,} decodes of {k:,} tokens{where} take no time, which max_num_seqs and max_model_len allow"
                name = "hybrid_ms" if chunk else "decode_ms"
                raise ProfileError(f"{profile.name}: surface.{name}: expected times that do not fall below 0, {what}")
