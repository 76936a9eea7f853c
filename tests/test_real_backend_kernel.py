"""The paged Triton kernel against SDPA, under triton's interpreter on a CPU, compiled on a GPU."""

import numpy as np
import pytest

# ruff: noqa: E402 - a missing torch or triton is to skip these tests before anything imports it
torch = pytest.importorskip("torch", reason="the real backend needs torch")
pytest.importorskip("transformers", reason="the real backend needs transformers")
pytest.importorskip("triton", reason="the paged kernel needs triton")
import torch.nn.functional as F
from test_real_backend import WORLD, generated, random_table, run_chaos, tiny_model

from llmsched_gym.config import BLOCK_SIZE
from llmsched_gym.real_backend import make_backend
from llmsched_gym.real_backend import paged_attention as kernel

torch.set_num_threads(1)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KV_HEADS = 2


def random_batch(seed, singles=3, chunks=2, most=90):
    """(num_tokens, num_computed, blocks) of sequences with scattered blocks, single tokens first."""
    rng = np.random.default_rng(seed)
    num_tokens = np.concatenate([np.ones(singles, np.int64), rng.integers(2, most, chunks)])
    num_computed = rng.integers(0, 2 * most, singles + chunks)
    num_computed[rng.integers(singles + chunks)] = 0
    needed = -(-(num_tokens + num_computed) // BLOCK_SIZE)
    pool = rng.permutation(np.arange(1, needed.sum() + 1))
    blocks = np.zeros((len(needed), needed.max()), np.int64)  # 0, the scratch block, behind each sequence's own
    for row, count in enumerate(needed):
        blocks[row, :count], pool = pool[:count], pool[count:]
    return num_tokens, num_computed, blocks


def reference(query, keys, values, num_tokens, num_computed, blocks, window):
    """SDPA in float64, sequence by sequence; (tokens, heads, head_dim)."""
    out, start = [], 0
    groups = query.shape[1] // keys.shape[2]
    for n, computed, own in zip(num_tokens.tolist(), num_computed.tolist(), blocks, strict=True):
        k, v = (
            part[torch.from_numpy(own)].flatten(0, 1)[: computed + n].double().transpose(0, 1)
            for part in (keys, values)
        )
        columns = torch.arange(computed + n, device=query.device)
        positions = columns[computed:, None]
        mask = columns <= positions
        if window is not None:
            mask &= columns > positions - window
        q = query[start : start + n].double().transpose(0, 1)
        k, v = (part.repeat_interleave(groups, 0) for part in (k, v))
        out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1))
        start += n
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_the_kernel_is_sdpa(group, dim, window, monkeypatch):
    for seed, splits in enumerate((1, 4)):
        monkeypatch.setattr(kernel, "choose_splits", lambda *_, splits=splits: splits)
        check(group, dim, window, seed)


@pytest.mark.parametrize(("group", "dim"), [(7, 16), (2, 80)])
def test_odd_groups_and_head_sizes_are_padded(group, dim):
    check(group, dim, None, seed=3)


@pytest.mark.parametrize(("singles", "chunks"), [(5, 0), (0, 3)])
def test_decodes_or_chunks_may_be_alone(singles, chunks):
    check(4, 32, None, seed=4, singles=singles, chunks=chunks)


def check(group, dim, window, seed, **shape):
    num_tokens, num_computed, blocks = random_batch(seed, **shape)
    heads, tokens = group * KV_HEADS, int(num_tokens.sum())
    generator = torch.Generator(DEVICE).manual_seed(seed)
    cache_shape = (int(blocks.max()) + 1, BLOCK_SIZE, KV_HEADS, dim)
    keys, values = (torch.randn(cache_shape, generator=generator, device=DEVICE) for _ in range(2))
    keys[0] = values[0] = float("nan")  # nothing of the scratch block may be seen
    query = torch.randn((heads, tokens, dim), generator=generator, device=DEVICE).transpose(0, 1)
    batch = kernel.lay_out(blocks, num_tokens, num_computed, heads=heads, kv_heads=KV_HEADS, device=DEVICE)
    out = torch.full((tokens, heads, dim), float("nan"), device=DEVICE)
    kernel.attend(query, keys, values, out, batch, dim**-0.5, window)
    expected = reference(query, keys, values, num_tokens, num_computed, blocks, window)
    error = (out - expected).norm() / expected.norm()
    assert error < 2e-6, f"relative error {error:.1e}"  # a nan fails as well


def test_tiles_by_hand():
    tiles = kernel.tiles_of(np.array([0, 5]), np.array([5, 2]), np.array([10, 0]), tokens=4)
    assert tiles.tolist() == [[0, 4, 10, 0], [4, 1, 14, 0], [5, 2, 0, 1]]
    assert kernel.tile_tokens(4, prefill=True) == 16 and kernel.tile_tokens(4, prefill=False) == 1


def test_few_tiles_are_split_over_many_programs():
    assert [kernel.choose_splits(tiles, 8, 132) for tiles in (1, 4, 16, 33, 64, 128)] == [32, 16, 4, 2, 1, 1]


def test_the_warm_up_meets_every_number_of_splits(monkeypatch):
    seen = set()
    attend = kernel.attend

    def spy(*args):
        seen.add((args[4].launches[0].tile_tokens > 1, args[4].launches[0].splits, args[6] if len(args) > 6 else None))
        attend(*args)

    monkeypatch.setattr(kernel, "attend", spy)
    kernel.warm_up(4, 2, 16, torch.float32, DEVICE, {None, 8})
    splits = {kernel.choose_splits(tiles, 1, 132) for tiles in range(1, 600)}
    assert seen == {(prefill, n, window) for prefill in (False, True) for n in splits for window in (None, 8)}


@pytest.mark.parametrize("name", ["mistral", "qwen2, one layer with a window"])
def test_tokens_through_the_kernel_equal_generate(name):
    model = tiny_model(name)
    backend = make_backend(WORLD, model, str(DEVICE), attention="triton")
    table = random_table(3)
    run_chaos(backend, table, seed=5, admission="chunk")
    alone = tiny_model(name)
    for r in range(len(table)):
        assert backend.tokens.answer(r).tolist() == generated(
            alone, backend.tokens.prompt(r), int(table.output_tokens[r])
        )


def test_static_shapes_and_the_kernel_together():
    backend = make_backend(WORLD, tiny_model(), str(DEVICE), attention="triton", graphs=True)
    table = random_table(3)
    run_chaos(backend, table, seed=6, admission="prompt")
    alone = tiny_model()
    for r in range(len(table)):
        assert backend.tokens.answer(r).tolist() == generated(
            alone, backend.tokens.prompt(r), int(table.output_tokens[r])
        )
