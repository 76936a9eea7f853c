"""Time of a batch on a profile whose attention is a surface: the kernels of `llmsched_gym.cost.surface`.

The profile is one array, see `Profile.coefficients` and `Surface.packed`. Knots are powers of two, so that a number's
cell and its place in it are its exponent and its mantissa.
"""

from __future__ import annotations

import math

import numpy as np

from llmsched_gym.engine.jit import kernel

ID = 5  # 0 without a surface, else a number that only an equal profile has
SEQUENCES, CONTEXTS, CHUNKS, PREFIXES, CONTEXT_LOG, CHUNK_LOG, PREFIX_LOG = range(6, 13)
TAIL_ALONE, TAIL_HYBRID, LAUNCH, CHUNK_BATCH, COUNTS = range(13, 18)
TABLES = 18

EXPONENT_AT, EXPONENT_BIAS = 52, 1023
MANTISSA, ONE = (1 << EXPONENT_AT) - 1, EXPONENT_BIAS << EXPONENT_AT


@kernel()
def has_surface(coef_s):
    """Whether a profile's coefficients hold a surface."""
    return coef_s[ID] != 0.0


@kernel()
def _cell(x, first_log, size):
    """(cell, share): between which knots 2^first_log * 2^i the number lies, and how far from the lower one, 0 to 1.

    Numbers below the first knot count as it; past the last one the share of the last cell goes beyond 1.
    """
    # the bits of a double: `math.frexp` is a call of 8 ns
    bits = np.float64(x).view(np.int64)
    cell = (bits >> EXPONENT_AT) - EXPONENT_BIAS - first_log
    if cell < 0:
        return 0, 0.0
    if cell > size - 2:
        return size - 2, math.ldexp(x, 2 - first_log - size) - 1.0
    return cell, np.int64((bits & MANTISSA) | ONE).view(np.float64) - 1.0


@kernel()
def _on_plane(table, at, width, share, share_across):
    """Between four neighbours of a table with rows of `width`: `at` is the lowest one."""
    low = table[at] + share_across * (table[at + 1] - table[at])
    high = table[at + width] + share_across * (table[at + width + 1] - table[at + width])
    return low + share * (high - low)


@kernel()
def chunk_s(coef_s, computed, n):
    """Seconds that a chunk of n tokens behind `computed` ones adds to a batch's attention, its launch left out."""
    size, width = int(coef_s[CHUNKS]), int(coef_s[PREFIXES])
    row, share = _cell(float(n), int(coef_s[CHUNK_LOG]), size)
    first_log = int(coef_s[PREFIX_LOG])
    first = float(1 << first_log)
    if computed < first:
        column, across = 0, computed / first
    else:
        column, across = _cell(float(computed), first_log, width - 1)
        column += 1
    at = TABLES + int(coef_s[COUNTS]) + int(coef_s[SEQUENCES]) * int(coef_s[CONTEXTS]) + row * width + column
    pairs = n * (computed + (n + 1) * 0.5)
    return coef_s[0] * pairs + _on_plane(coef_s, at, width, share, across) - coef_s[LAUNCH]


@kernel()
def attention_s(coef_s, num_decodes, decode_tokens, longest, chunk_tokens, chunks_s):
    """Seconds of attention: decodes by their number, KV tokens and longest context; `chunks_s` a sum of `chunk_s`."""
    chunks_s = coef_s[LAUNCH] + chunks_s if chunk_tokens > 0 else 0.0
    if num_decodes == 0:
        return chunks_s
    seqs, contexts = int(coef_s[SEQUENCES]), int(coef_s[CONTEXTS])
    mean = decode_tokens / num_decodes
    tail = coef_s[TAIL_HYBRID] if chunk_tokens > 0 else coef_s[TAIL_ALONE]
    column, across = _cell(mean + tail * (longest - mean) / num_decodes, int(coef_s[CONTEXT_LOG]), contexts)
    row, share = _cell(float(num_decodes), 0, seqs)
    first = TABLES + int(coef_s[COUNTS])
    at = first + row * contexts + column
    if chunk_tokens == 0:
        return _on_plane(coef_s, at, contexts, share, across)
    num_chunks = int(coef_s[CHUNKS])
    layer, depth = _cell(float(chunk_tokens), int(coef_s[CHUNK_LOG]), num_chunks)
    depth = min(depth, 1.0)  # beyond the longest measured chunk the last trend need not go on, least of all below 0
    plane = seqs * contexts
    at += plane + num_chunks * int(coef_s[PREFIXES]) + layer * plane
    low = _on_plane(coef_s, at, contexts, share, across)
    both = low + depth * (_on_plane(coef_s, at + plane, contexts, share, across) - low)
    floor = first + plane + num_chunks * (int(coef_s[PREFIXES]) + plane) + column
    floor_s = coef_s[floor] + across * (coef_s[floor + 1] - coef_s[floor])
    return max(chunks_s, floor_s) + both


@kernel()
def surface_s(linear_s, coef_s, num_tokens, num_decodes, decode_tokens, longest, num_chunks, chunks_s):
    """Seconds of a batch: linear layers and overhead by tokens, attention, output head, what chunks cost the host."""
    if num_tokens == 0:
        return 0.0
    sequences = min(num_decodes + num_chunks, int(coef_s[COUNTS]) - 1)
    seconds = linear_s[num_tokens] + coef_s[TABLES + sequences]
    if num_chunks > 0:
        seconds += coef_s[CHUNK_BATCH]
    return seconds + attention_s(coef_s, num_decodes, decode_tokens, longest, num_tokens - num_decodes, chunks_s)


@kernel()
def prompt_s(linear_s, coef_s, computed, n, size):
    """Seconds that n tokens of a prompt behind `computed` ones take alone, in chunks of `size`."""
    each_s = coef_s[TABLES + 1] + coef_s[CHUNK_BATCH] + coef_s[LAUNCH]
    seconds = 0.0
    for start in range(0, n, size):
        chunk = min(size, n - start)
        seconds += each_s + linear_s[chunk] + chunk_s(coef_s, computed + start, chunk)
    return seconds


# From here on they take the batch's record and arrays, for a lane is 700 bytes.


@kernel()
def predicted_s(batch, linear_s, coef_s):
    """Seconds of the batch as it stands."""
    return with_decodes_s(batch, linear_s, coef_s, 0, 0.0, 0.0)


@kernel()
def with_decodes_s(batch, linear_s, coef_s, count, context, longest):
    """The same with `count` more decodes, which read `context` KV tokens in all and `longest` of them at most."""
    return surface_s(
        linear_s,
        coef_s,
        batch.num_tokens + count,
        batch.num_decodes + count,
        batch.kv_tokens - batch.chunk_kv_tokens + context,
        max(float(batch.longest), longest),
        batch.num_chunks,
        batch.chunks_s,
    )


@kernel()
def _with_chunk_s(batch, linear_s, coef_s, computed, n):
    return surface_s(
        linear_s,
        coef_s,
        batch.num_tokens + n,
        batch.num_decodes,
        batch.kv_tokens - batch.chunk_kv_tokens,
        float(batch.longest),
        batch.num_chunks + 1,
        batch.chunks_s + chunk_s(coef_s, computed, n),
    )


@kernel()
def recount(batch, items, requests, coef_s):
    """Take the sums that only a surface needs over all items of the batch; `coef_s` prices the chunks."""
    if not has_surface(coef_s):
        return
    longest, num_chunks, kv_tokens, chunks_s = 0, 0, 0.0, 0.0
    for i in range(batch.num_items):
        request = requests[items[i].request]
        n, computed = request.num_scheduled_tokens, request.num_computed_tokens
        if n <= 0:
            continue  # evicted again
        if computed < request.prefill_tokens:
            num_chunks += 1
            kv_tokens += computed + n
            chunks_s += chunk_s(coef_s, computed, n)
        else:
            longest = max(longest, computed + 1)
    batch.longest, batch.num_chunks, batch.chunk_kv_tokens, batch.chunks_s = longest, num_chunks, kv_tokens, chunks_s


@kernel()
def see_longest(batch, requests, added, count):
    """Bring `longest` up to date for decodes ``added[:count]``."""
    longest = 0
    for i in range(count):
        longest = max(longest, requests[added[i]].num_computed_tokens)
    batch.longest = max(batch.longest, longest + 1)


@kernel()
def see_chunk(batch, coef_s, computed, n):
    """Count a chunk of n tokens behind `computed` ones."""
    batch.num_chunks += 1
    batch.chunk_kv_tokens += computed + n
    batch.chunks_s += chunk_s(coef_s, computed, n)


@kernel()
def chunk_room(batch, linear_s, coef_s, computed, n):
    """The most of n prompt tokens behind `computed` ones that the batch takes within its time cap."""
    if _with_chunk_s(batch, linear_s, coef_s, computed, n) <= batch.cap_s:
        return n
    low, high = 0, n  # low fits (nothing always does), high does not
    for _ in range(32):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        if _with_chunk_s(batch, linear_s, coef_s, computed, middle) <= batch.cap_s:
            low = middle
        else:
            high = middle
    return low
