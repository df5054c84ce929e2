"""Values: W + ΔW for functions of which no reading knows what they do with an adapted parameter, without a graph."""

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

import lorafx
from lorafx.errors import LorafxError

pytestmark = pytest.mark.usefixtures("early")
CONFIG = {"r": 2, "lora_alpha": 6, "target_modules": [], "target_parameters": ["0.w"], "init_lora_weights": False}
SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2}
CONFIGS = {
    "qwen": lambda: transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=20, num_experts=3),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=3),
    "oss": lambda: transformers.GptOssConfig(**SIZES, num_local_experts=3),
}


class Stack(nn.Module):
    """A parameter, three experts (in 5, out 7) as a rule; `read` is how forward reads it."""

    def __init__(self, read, shape):
        super().__init__()
        self.w, self.read = nn.Parameter(torch.randn(shape) / 2), read

    def forward(self, x):
        return self.read(self.w, x)


class Model(nn.Sequential):
    pass


def whole(w, x):
    return torch.einsum("ti,eoi->to", x, w) + (x @ w.mT).tanh().sum(0)


def both(folder, name, how):
    """PEFT's model and ours, of one base and one adapter."""
    base = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    base.set_experts_implementation(how)
    for p in base.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **targets)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(folder)
    return theirs, lorafx.load(base, folder, is_trainable=True)


def by_suffix(model):
    """The gradients by what both call a tensor at a layer: PEFT wraps a module once for each of its parameters."""
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            *_, layer = name.partition("layers.")
            kind = "lora_A" if "lora_A" in name else "lora_B"
            found[layer[0], kind, tuple(p.shape)] = p.grad
    return found


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("index", [1, torch.tensor([2]), torch.tensor([0, 2, 1, 0]), slice(1, None)])
def test_what_is_taken_of_a_stack_is_the_same_with_and_without_gradients(index, is_new):
    lora = lorafx.compile(Model(Stack(lambda w, x: x @ w[index].mT, (3, 7, 5))).double(), lorafx.LoraConfig(**CONFIG))
    x = torch.randn(4, 5).double()
    for _ in range(1 if is_new else 3):
        found = lora(x)
        with torch.no_grad():
            torch.testing.assert_close(lora(x), found.detach(), rtol=1e-12, atol=1e-12)
    assert [call.served_by for call in lora.explain().calls] == ["sites"] * 2


def test_a_matrix_that_a_config_names_may_be_read_by_any_function():
    torch.manual_seed(0)
    base = Model(Stack(lambda w, x: x @ (w / w.norm()).T, (7, 5))).double()
    x, found = torch.randn(4, 5).double(), []
    for capture in ("auto", "sites", "graph"):
        lora = lorafx.compile(base, lorafx.LoraConfig(**CONFIG), capture=capture, random_state=0)
        y = lora(x)
        y.square().sum().backward()
        a, b = (getattr(lora[0], f"w_lora_{one}").default.weight for one in "AB")
        found.append((y.detach(), a.grad, b.grad))
    weight = lora[0].w + 3 * b @ a
    expected = x @ (weight / weight.norm()).T
    wanted = expected.detach(), *torch.autograd.grad(expected.square().sum(), (a, b))
    for each in found:
        torch.testing.assert_close(each, wanted, rtol=1e-12, atol=1e-12)


def test_several_adapters_are_summed_whoever_reads_the_weight_and_a_merged_one_is_in_it():
    torch.manual_seed(0)
    lora, x = lorafx.compile(Model(Stack(whole, (3, 7, 5))).double(), CONFIG), torch.randn(4, 5).double()
    lora.add_adapter("b", CONFIG | {"r": 1})
    lora.set_adapter(["default", "b"])
    both = lora(x)
    lora.merge_adapter(["b"])
    torch.testing.assert_close(lora(x), both, rtol=1e-12, atol=1e-12)
    lora.unmerge_adapter()
    lora.merge_adapter()
    torch.testing.assert_close(lora(x), both.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("write", [lambda w: w.mT.mul_(2), lambda w: w.data.mul_(2), lambda w: w.detach().zero_()])
@pytest.mark.parametrize("capture", ["auto", "sites"])
def test_a_parameter_that_is_written_to_while_an_adapter_acts_is_refused_and_stays(write, capture):
    def read(w, x):
        with torch.no_grad():
            write(w)
        return whole(w, x)

    lora = lorafx.compile(Model(Stack(read, (3, 7, 5))), CONFIG, capture=capture)
    before = lora[0].w.clone()
    with pytest.raises(LorafxError):
        lora(torch.randn(4, 5))
    assert torch.equal(lora[0].w, before)


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_experts_train_and_generate_at_once_as_in_peft(tmp_path, name, how, checkpointed):
    theirs, ours = both(tmp_path, name, how)
    ids, gradients = torch.randint(1, 50, (2, 9)), []
    for model in (theirs, ours):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append(by_suffix(model))
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 2 * 2 * 3
    for key, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    answers = [
        m.eval().generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (theirs, ours)
    ]
    assert torch.equal(*answers)
    assert {call.served_by for call in ours.explain().calls} == {
        "sites"
    } and not ours._lorafx.dispatcher.graphs.captures
    assert len(ours._lorafx.dispatcher.by_sites.operators) == 0
