"""Time of a batch on a profile whose attention is a surface: the kernels of `llmsched_gym.cost.surface`.

The profile is one array, see `Profile.coefficients` and `Surface.packed`. Knots are powers of two, so that a number's
cell and its place in it are its exponent and its mantissa.
"""

from __future__ import annotations

import math

from llmsched_gym.engine.jit import kernel

PLAIN = 4  # numbers of a profile without a surface
ID = 4
SEQUENCES, CONTEXTS, CHUNKS, PREFIXES, CONTEXT_LOG, CHUNK_LOG, PREFIX_LOG = range(5, 12)
TAIL_ALONE, TAIL_HYBRID, LAUNCH, CHUNK_BATCH, COUNTS = range(12, 17)
TABLES = 17


@kernel()
def has_surface(coef_s):
    return len(coef_s) > PLAIN


@kernel()
def _cell(x, first_log, size):
    """(cell, share): between which knots 2^first_log * 2^i the number lies, and how far from the lower one, 0 to 1.

    Numbers below the first knot count as it; past the last one the share of the last cell goes beyond 1.
    """
    mantissa, exponent = math.frexp(x)
    cell = exponent - 1 - first_log
    if cell < 0:
        return 0, 0.0
    if cell > size - 2:
        return size - 2, math.ldexp(x, 2 - first_log - size) - 1.0
    return cell, 2.0 * mantissa - 1.0


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
    first = math.ldexp(1.0, first_log)
    if computed < first:
        column, across = 0, computed / first
    else:
        column, across = _cell(float(computed), first_log, width - 1)
        column += 1
    at = TABLES + int(coef_s[SEQUENCES]) * int(coef_s[CONTEXTS]) + row * width + column
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
    at = TABLES + row * contexts + column
    if chunk_tokens == 0:
        return _on_plane(coef_s, at, contexts, share, across)
    num_chunks = int(coef_s[CHUNKS])
    layer, depth = _cell(float(chunk_tokens), int(coef_s[CHUNK_LOG]), num_chunks)
    plane = seqs * contexts
    at += plane + num_chunks * int(coef_s[PREFIXES]) + layer * plane
    low = _on_plane(coef_s, at, contexts, share, across)
    both = low + depth * (_on_plane(coef_s, at + plane, contexts, share, across) - low)
    floor = TABLES + plane + num_chunks * (int(coef_s[PREFIXES]) + plane) + column
    floor_s = coef_s[floor] + across * (coef_s[floor + 1] - coef_s[floor])
    return max(chunks_s, floor_s) + both


@kernel()
def surface_s(linear_s, coef_s, num_tokens, num_decodes, decode_tokens, longest, num_chunks, chunks_s):
    """Seconds of a batch: linear layers and overhead by tokens, attention, output head, what chunks cost the host."""
    if num_tokens == 0:
        return 0.0
    counts = int(coef_s[COUNTS])
    sequences = min(num_decodes + num_chunks, counts - 1)
    seconds = linear_s[num_tokens] + coef_s[len(coef_s) - counts + sequences]
    if num_chunks > 0:
        seconds += coef_s[CHUNK_BATCH]
    return seconds + attention_s(coef_s, num_decodes, decode_tokens, longest, num_tokens - num_decodes, chunks_s)


@kernel()
def prompt_s(linear_s, coef_s, computed, n, size):
    """Seconds that n tokens of a prompt behind `computed` ones take alone, in chunks of `size`."""
    seconds = 0.0
    for start in range(0, n, size):
        chunk = min(size, n - start)
        alone_s = chunk_s(coef_s, computed + start, chunk)
        seconds += surface_s(linear_s, coef_s, chunk, 0, 0.0, 0.0, 1, alone_s)
    return seconds
