"""The export-friendly layers against plain re-statements of what they compute."""

import numpy as np
import pytest
import torch
from clapsep.export import htsat
from clapsep.export.clap import bicubic_matrix
from clapsep.export.clapsep import InversePatchEmbed, PatchExpand, SelfAttention
from clapsep.export.layers import LastAxisBatchNorm, LoRALinear, attend, freeze, merge_lora
from torch.nn import functional as F

GRIDS = [(32, 8), (16, 8), (8, 8), (4, 4)]


def to_raster(x, grid, window):
    out = torch.empty_like(x)
    out[:, torch.from_numpy(htsat.window_order(grid, window))] = x
    return out


def plain_attention(q, k, v, bias=None):
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias).softmax(-1) @ v


@pytest.mark.parametrize(("grid", "window"), GRIDS)
@pytest.mark.parametrize("shifted", [False, True])
def test_swin_block_in_window_order_equals_the_textbook_block(grid, window, shifted):
    torch.manual_seed(0)
    dim, heads = 16, 2
    block = htsat.SwinBlock(dim, heads, grid, window, shifted=shifted, mlp_ratio=2)
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    x = torch.randn(2, grid * grid, dim)
    shift = window // 2 if shifted and grid > window else 0

    y = block.norm1(to_raster(x, grid, window)).reshape(2, grid, grid, dim).roll((-shift, -shift), (1, 2))
    n = grid // window
    y = y.reshape(2, n, window, n, window, dim).permute(0, 1, 3, 2, 4, 5).reshape(2 * n * n, window * window, dim)
    qkv = block.attn.qkv(y).reshape(-1, window * window, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    bias = torch.empty(heads, window * window, window * window)
    for p in range(window * window):
        for q in range(window * window):
            row = (p // window - q // window + window - 1) * (2 * window - 1) + p % window - q % window + window - 1
            bias[:, p, q] = block.attn.relative_position_bias_table[row]
    bias = bias.repeat(n * n, 1, 1, 1)
    if shift:
        edge = lambda i: 0 if i < grid - window else 1 if i < grid - shift else 2  # noqa: E731
        for w in range(n * n):
            tokens = [(w // n * window + i, w % n * window + j) for i in range(window) for j in range(window)]
            labels = torch.tensor([3 * edge(h) + edge(v) for h, v in tokens])
            bias[w] += torch.where(labels[:, None] == labels[None], 0.0, -100.0)
    y = plain_attention(*qkv, bias.repeat(2, 1, 1, 1)).transpose(1, 2).reshape(-1, window * window, dim)
    y = block.attn.proj(y).reshape(2, n, n, window, window, dim).permute(0, 1, 3, 2, 4, 5).reshape(2, grid, grid, dim)
    wanted = to_raster(x, grid, window) + y.roll((shift, shift), (1, 2)).reshape(2, grid * grid, dim)
    wanted = wanted + block.mlp(block.norm2(wanted))

    torch.testing.assert_close(to_raster(block(x), grid, window), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(to_raster(freeze(block)(x), grid, window), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("grid", "window", "after"), [(32, 8, 8), (16, 8, 8), (8, 8, 4)])
def test_patch_merging_and_expanding_follow_the_grid(grid, window, after):
    x = torch.randn(1, grid * grid, 3)
    raster = to_raster(x, grid, window).reshape(1, grid, grid, 3)
    joined = torch.cat([raster[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1).reshape(1, -1, 12)
    merged = x.index_select(1, torch.from_numpy(htsat.merge_index(grid, window, after))).reshape(1, -1, 12)
    torch.testing.assert_close(to_raster(merged, grid // 2, after), joined)
    back = merged.reshape(1, -1, 3).index_select(1, torch.from_numpy(htsat.expand_index(grid // 2, after, window)))
    torch.testing.assert_close(back, x)


def test_patch_expand_order():
    expand = PatchExpand(8, 4, 4, 8)
    x = torch.randn(1, 16, 8)
    parts = expand.expand(to_raster(x, 4, 4)).reshape(4, 4, 4, 4)
    wanted = torch.empty(8, 8, 4)
    for i in (0, 1):
        for j in (0, 1):
            wanted[i::2, j::2] = parts[:, :, i + 2 * j]
    torch.testing.assert_close(to_raster(expand(x), 8, 8)[0], expand.norm(wanted.reshape(64, 4)))


def test_patch_embedding_equals_fold_and_convolution():
    config = htsat.HtsatConfig(spec_size=128, embed=8, depths=(1,), heads=(1,))
    embed = htsat.PatchEmbed(config)
    x = torch.randn(2, config.frames, 64)
    image = torch.empty(2, 1, 128, 128)
    for c in range(2):
        image[:, 0, 64 * c : 64 * c + 64] = x[:, 128 * c : 128 * c + 128].transpose(1, 2)
    wanted = embed.norm(embed.proj(image).flatten(2).transpose(1, 2))
    torch.testing.assert_close(to_raster(embed(x), 32, 8), wanted, atol=1e-5, rtol=1e-5)

    inverse = InversePatchEmbed(config)
    tokens = embed(x)
    folded = inverse.proj(inverse.norm(to_raster(tokens, 32, 8)).transpose(1, 2).reshape(2, 8, 32, 32))[:, 0]
    unfolded = torch.cat([folded[:, 64 * c : 64 * c + 64].transpose(1, 2) for c in range(2)], 1)
    torch.testing.assert_close(inverse(tokens), unfolded, atol=1e-5, rtol=1e-5)


def test_bicubic_matrix_equals_torch():
    x = torch.randn(1, 1, 1001, 64, dtype=torch.float64)
    wanted = F.interpolate(x, (1024, 64), mode="bicubic", align_corners=True)[0, 0]
    torch.testing.assert_close(torch.from_numpy(bicubic_matrix(1001, 1024)).double() @ x[0, 0], wanted, atol=1e-6, rtol=1e-6)
    np.testing.assert_array_equal(bicubic_matrix(7, 7), np.eye(7))


def test_packed_attention_equals_torch():
    torch.manual_seed(0)
    ours, theirs = SelfAttention(32, 4), torch.nn.MultiheadAttention(32, 4, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 32)
    wanted = theirs(x, x, x)[0]
    torch.testing.assert_close(ours(x), wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(freeze(ours)(x), wanted, atol=1e-6, rtol=1e-5)


def test_attention_for_the_first_queries_only():
    qkv = torch.randn(2, 7, 3 * 8)
    torch.testing.assert_close(attend(qkv, 2, queries=1), attend(qkv, 2)[:, :1])


def test_merged_lora_is_the_same_layer():
    torch.manual_seed(0)
    layer = LoRALinear(24, 12, rank=4)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 24)
    merged = merge_lora(torch.nn.Sequential(layer))[0]
    assert type(merged) is torch.nn.Linear
    torch.testing.assert_close(merged(x), layer(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(merged.weight, layer.weight + layer.lora_B @ layer.lora_A / 4, atol=1e-7, rtol=1e-6)
    assert (merged(x) - F.linear(x, layer.weight, layer.bias)).abs().max() > 0.1


def test_batch_norm_over_the_last_axis_equals_torch():
    ours, theirs = LastAxisBatchNorm(6), torch.nn.BatchNorm1d(6).eval()
    for parameter in (theirs.weight.data, theirs.bias.data, theirs.running_mean.data):
        parameter.normal_()
    theirs.running_var.data.uniform_(0.5, 2)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k != "num_batches_tracked"})
    x = torch.randn(4, 6)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(freeze(ours)(x), theirs(x), atol=1e-6, rtol=1e-5)


def test_freezing_twice_changes_nothing():
    block = htsat.SwinBlock(16, 2, 8, 8, shifted=True, mlp_ratio=2)
    x = torch.randn(1, 64, 16)
    torch.testing.assert_close(freeze(freeze(block))(x), freeze(block)(x))


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit"):
        htsat.HtsatConfig(spec_size=100)
