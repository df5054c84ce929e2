"""fold_scaling: α / r is the `alpha` of the operator that adds the update."""

import pytest
import torch
from graphs import INSERT, Chain, adapted, context, in_float32, run, text
from modules import EveryForm

from lorafx.passes import ElideCasts, ElideDropout, FoldScaling

PLAIN = (*INSERT, ElideCasts(), ElideDropout())
FOLDED = (*PLAIN, FoldScaling())
eps = torch.finfo(torch.float32).eps


def after_base(gm) -> list[str]:
    lines = text(gm)
    return lines[next(i for i, line in enumerate(lines) if "lora_b" in line) + 1 :]


def test_on_a_matrix_it_is_one_addmm():
    lora, x = adapted(Chain(), target_modules=["second"]), torch.randn(5, 4)
    assert after_base(run(lora, PLAIN, x)) == [
        "linear_2 = linear(relu, second_lora_a_default_weight)",
        "linear_3 = linear(linear_2, second_lora_b_default_weight)",
        "mul = mul.Tensor(linear_3, 3.0)",
        "add = add.Tensor(linear_1, mul)",
    ]
    assert after_base(run(lora, FOLDED, x)) == [
        "linear_2 = linear(relu, second_lora_a_default_weight)",
        "t = t(second_lora_b_default_weight)",
        "addmm = addmm(linear_1, linear_2, t, alpha=3.0)",
    ]


@pytest.mark.slow
def test_batches_of_sequences_are_viewed_as_a_matrix():
    lora = adapted(Chain(), target_modules=["second"])
    assert after_base(run(lora, FOLDED, torch.randn(5, 2, 4))) == [
        "linear_2 = linear(relu, second_lora_a_default_weight)",
        "reshape = reshape(linear_1, [-1, 3])",
        "reshape_1 = reshape(linear_2, [-1, 2])",
        "t = t(second_lora_b_default_weight)",
        "addmm = addmm(reshape, reshape_1, t, alpha=3.0)",
        "view_as = view_as(addmm, linear_1)",
    ]


def test_a_single_vector_works_too():
    lora, x = adapted(Chain().double()), torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(run(lora, FOLDED, x)(x), run(lora, PLAIN, x)(x), rtol=1e-14, atol=1e-14)


@pytest.mark.slow
def test_no_form_keeps_a_multiplication():
    lora = adapted(EveryForm().double(), target_modules=["embedding", "conv1d", "conv2d", "conv3d", "addmm", "linear"])
    ids = torch.randint(0, 11, (2, 8))
    gm, plain = run(lora, FOLDED, ids), run(lora, PLAIN, ids)
    assert sum("mul.Tensor" in line for line in text(plain)) == 6
    assert not any("mul.Tensor" in line for line in text(gm))
    assert sum("alpha=3.0" in line for line in text(gm)) == 6
    torch.testing.assert_close(gm(ids), plain(ids), rtol=1e-13, atol=1e-13)


def test_mixed_dtypes_add_in_the_wider_one():
    lora, x = adapted(Chain().bfloat16(), target_modules=["second"]), torch.randn(5, 4, dtype=torch.bfloat16)
    gm = run(lora, in_float32(FOLDED), x)
    assert sum("add.Tensor(linear_1, linear_3, alpha=3.0)" in line for line in text(gm)) == 1
    assert not any("mul.Tensor" in line for line in text(gm))
    assert torch.equal(gm(x), run(lora, in_float32(PLAIN), x)(x))


def test_a_bias_of_the_adapter_is_scaled_too():
    lora, x = adapted(Chain().double(), lora_bias=True, target_modules=["second"]), torch.randn(5, 4).double()
    torch.testing.assert_close(run(lora, FOLDED, x)(x), run(lora, PLAIN, x)(x), rtol=1e-14, atol=1e-14)


def test_the_models_own_arithmetic_is_left():
    class Scaled(Chain):
        def forward(self, x):
            return x.sum() + 2.0 * super().forward(x)

    lora = adapted(Scaled(), target_modules=["second"])
    assert sum("mul.Tensor" in line for line in text(run(lora, FOLDED, torch.randn(5, 4)))) == 1


def test_a_number_for_each_feature_is_no_scaling():
    lora, x = adapted(Chain(), target_modules=["second"]), torch.randn(5, 4)
    gm = run(lora, PLAIN, x)
    (scaled,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    (gains,) = (node for node in gm.graph.nodes if node.target == "second.bias")
    scaled.args = (scaled.args[0], gains)
    before = text(gm)
    assert FoldScaling().rewrite(gm, context(lora)) == 0 and text(gm) == before


def test_gradients_are_those_of_the_plain_equation():
    """float32; the longest reduction is over 50 rows, and each gradient passes two of them."""
    lora, x = adapted(Chain()), torch.randn(50, 4)
    grads = []
    for passes in (PLAIN, FOLDED):
        lora.zero_grad()
        run(lora, passes, x)(x).square().sum().backward()
        grads.append([p.grad.clone() for p in lora.parameters() if p.requires_grad])
    for plain, folded in zip(*grads):
        assert (plain - folded).abs().max() <= 2 * 50 * eps * plain.abs().max()
