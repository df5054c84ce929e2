"""attention: attention in half precision by blocks of queries, with instructions for it and without."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorafx.ops import attention
from lorafx.ops.cpu import half_precision
from lorafx.ops.cpu.attention import _blocks, pays

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
# batch, heads, key heads, queries, keys, features, causal, scale: blocks that divide queries and that do not, one block
# and several, more keys than queries and fewer, heads that share keys, features of which the root is no power of two.
SHAPES = [
    (2, 4, 4, 128, 128, 16, True, None),
    (1, 6, 2, 200, 200, 24, True, 0.3),
    (3, 5, 5, 77, 77, 8, True, None),
    (2, 4, 1, 150, 90, 12, False, None),
    (1, 4, 2, 60, 300, 16, False, 0.5),
    (1, 2, 2, 700, 700, 8, True, None),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(params=[True, False], ids=["multiplies", "widens"])
def machine(request, monkeypatch):
    """Whether this CPU multiplies half precision itself."""
    monkeypatch.setattr(half_precision, "multiplies", lambda dtype: request.param)
    return request.param


def some(shape, dtype):
    """Queries, keys and values as models have them, split off the last dimension; dy; and options."""
    batch, heads, shared, queries, keys, features, causal, scale = shape

    def heads_of(count, length, size):
        return torch.randn(batch, length, count, size).to(dtype).transpose(1, 2)

    given = heads_of(heads, queries, features), heads_of(shared, keys, features), heads_of(shared, keys, features + 4)
    dy = heads_of(heads, queries, features + 4)
    return given, dy, {"is_causal": causal, "scale": scale, "enable_gqa": heads != shared}


def outcome(function, given, dy, options):
    given = [tensor.detach().clone().requires_grad_() for tensor in given]
    output = function(*given, **options)
    return output, *torch.autograd.grad(output, given, dy)


@HALF
@shapes
def test_it_is_as_near_to_the_truth_as_torchs_own(shape, dtype, machine):
    """Weights, or dS, are rounded to be multiplied, and so are the products: two roundings of half a step each."""
    given, dy, options = some(shape, dtype)
    assert pays(*given, options["is_causal"], options["enable_gqa"])
    found = outcome(attention, given, dy, options)
    exact = outcome(F.scaled_dot_product_attention, [each.double() for each in given], dy.double(), options)
    step = torch.finfo(dtype).eps
    for ours, theirs in zip(found, exact, strict=True):
        off = (ours.double() - theirs).norm() / theirs.norm()
        assert ours.dtype == dtype and off < step / (1 if machine else 2), float(off / step)
        if dtype == torch.float16:  # nothing is lost in one place that the norm would hide
            torch.testing.assert_close(
                ours.double(), theirs, rtol=16 * step, atol=16 * step * theirs.abs().max().item()
            )


def test_nothing_but_what_is_given_is_kept(machine):
    given, _, options = some(SHAPES[0], torch.bfloat16)
    given, kept = [each.requires_grad_() for each in given], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = attention(*given, **options)
    assert [each.data_ptr() for each in kept] == [each.data_ptr() for each in given]
    assert output.transpose(1, 2).is_contiguous()  # heads are joined without a copy


def test_a_query_sees_no_later_key(machine):
    """A change of the last key and value changes the last query's output alone, also within a block."""
    given, _, options = some(SHAPES[1], torch.bfloat16)
    query, key, value = (each.requires_grad_() for each in given)
    other_key, other_value = key.detach().clone(), value.detach().clone()
    other_key[:, :, -1] = 2.0**60  # finite: oneDNN's products by AMX let a NaN in one row through to another
    other_value[:, :, -1] += 1
    one, other = attention(query, key, value, **options), attention(query, other_key, other_value, **options)
    assert torch.equal(one[:, :, :-1], other[:, :, :-1]) and not torch.equal(one[:, :, -1], other[:, :, -1])


def test_some_of_the_gradients(machine):
    given, dy, options = some(SHAPES[0], torch.bfloat16)
    all_of_them = outcome(attention, given, dy, options)
    for place in range(3):
        some_given = [each.detach().clone().requires_grad_(place == number) for number, each in enumerate(given)]
        (gradient,) = torch.autograd.grad(attention(*some_given, **options), some_given[place], dy)
        assert torch.equal(gradient, all_of_them[place + 1])
        again = torch.autograd.grad(attention(*some_given, **options), some_given[place], dy, create_graph=True)
        torch.testing.assert_close(again[0], gradient, rtol=2**-5, atol=2**-5)


def test_gradients_in_batches(machine):
    given, dy, options = some(SHAPES[1], torch.bfloat16)
    dys, given = torch.stack((dy, 2 * dy)), [each.requires_grad_() for each in given]
    output = attention(*given, **options)
    found = torch.autograd.grad(output, given, dys, retain_graph=True, is_grads_batched=True)
    for each, of_dy in zip(found, torch.autograd.grad(output, given, dy), strict=True):
        torch.testing.assert_close(each, torch.stack((of_dy, 2 * of_dy)), rtol=2**-5, atol=2**-5)


def test_float16_is_large_enough(monkeypatch):
    """Where Σ dSᵢᵀ Qᵢ is too large for it and scale · Σ dSᵢᵀ Qᵢ is not."""
    monkeypatch.setattr(half_precision, "multiplies", lambda dtype: True)
    query, key, value, dy = (torch.randn(1, 2, 256, 128) for _ in range(4))
    given = [(4 * query).half(), (key / 4).half(), value.half()]
    dy = (12000 * dy).clamp(-60000, 60000).half()
    for found in outcome(attention, given, dy, {"is_causal": False}):
        assert found.isfinite().all()


def test_many_keys_make_small_blocks():
    query, key = torch.randn(2, 8, 512, 32), torch.randn(2, 8, 8192, 32)
    ((first, last, seen), *_) = _blocks(query, key, False)
    assert first == 0 and 0 < last < 128 and 2 * 8 * last * seen <= 2**23


def test_what_it_gives_may_be_written_to(machine):
    given, _, options = some(SHAPES[0], torch.bfloat16)
    output = attention(*(each.requires_grad_() for each in given), **options)
    doubled = torch.autograd.grad(output.mul_(2).sum(), given)
    once = torch.autograd.grad(attention(*given, **options).sum(), given)
    for found, expected in zip(doubled, once, strict=True):
        torch.testing.assert_close(found, 2 * expected, rtol=2**-6, atol=2**-6)


@shapes
def test_second_derivatives(shape, machine):
    """By torch's own formulas, each of which rounds."""
    given, _, options = some(shape, torch.float16)

    def penalty(function, given):
        given = [each.detach().clone().requires_grad_() for each in given]
        gradients = torch.autograd.grad(function(*given, **options).sin().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in gradients), given)

    found = penalty(attention, given)
    exact = penalty(F.scaled_dot_product_attention, [each.double() for each in given])
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours.double() - theirs).norm() / theirs.norm() < 16 * torch.finfo(torch.float16).eps


def test_autocast_changes_nothing(machine):
    given, dy, options = some(SHAPES[0], torch.bfloat16)
    plain = outcome(attention, given, dy, options)
    with torch.autocast("cpu", torch.bfloat16):
        cast = outcome(attention, given, dy, options)
    assert all(map(torch.equal, plain, cast))


def test_what_is_left_to_torch(monkeypatch):
    """In each way the operator still gives what torch gives, to the bit where it multiplies half precision."""
    monkeypatch.setattr(half_precision, "multiplies", lambda dtype: True)
    (query, key, value), _, _ = some(SHAPES[0], torch.bfloat16)
    mask = torch.randn(128, 128).bfloat16()
    ways = [
        ((query.float(), key.float(), value.float()), {}),
        ((query, key, value), {"attn_mask": mask}),
        ((query[:, :, :4], key[:, :, :4], value[:, :, :4]), {}),
        ((query[0], key[0], value[0]), {}),
        ((query[:, :, :100], key, value), {"is_causal": True}),
        ((query, key[:1], value[:1]), {}),
    ]
    for given, options in ways:
        given = [each.detach().clone().requires_grad_() for each in given]
        assert torch.equal(attention(*given, **options), F.scaled_dot_product_attention(*given, **options))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert not pays(query, key, value, False, False)
    with torch.autocast("cpu", torch.float16):
        assert not pays(query, key, value, False, False)
    assert pays(query, key, value, False, False)
    assert not pays(*(torch.randn(1, 2, 768, 8).bfloat16() for _ in range(3)), True, False)
    assert not pays(query[..., :0], key[..., :0], value, False, False)
    assert not pays(query, key[:, :0], value[:, :0], False, True)
    assert not pays(*(each.to("meta") for each in (query, key, value)), True, False)


def test_inference_keeps_the_bits_of_torch(machine):
    given, _, options = some(SHAPES[0], torch.bfloat16)
    assert torch.equal(attention(*given, **options), F.scaled_dot_product_attention(*given, **options))


def test_where_half_precision_is_slow_length_does_not_matter(monkeypatch):
    monkeypatch.setattr(half_precision, "multiplies", lambda dtype: False)
    assert pays(*(torch.randn(1, 2, 2000, 8).bfloat16() for _ in range(3)), True, False)
    query = torch.randn(1, 2, 2000, 8)
    assert [last - first for first, last, _ in _blocks(query, query, True)][:2] == [128, 128]
