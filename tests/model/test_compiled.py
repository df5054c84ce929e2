"""torch.compile around an adapted model: its own graphs are compiled, as that says, and nothing else is traced."""

import copy

import pytest
import torch
import torch._dynamo
from graphs import Chain, adapted
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lorafx.lowering.backend import Backend

x = torch.linspace(-1, 1, 12).view(3, 4).clone()  # a view would be compiled for apart from what is none


class Recording:
    """A backend that keeps what it is given to compile."""

    def __init__(self):
        self.graphs = []

    def __call__(self, gm, inputs):
        self.graphs.append(gm)
        return gm


def whole(lora, **options):
    return torch.compile(lora, **options)


def in_place(lora, **options):
    lora.compile(**options)
    return lora


def forward(lora, **options):
    lora.forward = torch.compile(lora.forward, **options)
    return lora


def around(lora, **options):
    return torch.compile(lambda x: lora(x * 1.0), **options)


WAYS = [(whole, False), (whole, True), (in_place, False), (in_place, True), (forward, True), (around, False)]


@pytest.mark.parametrize(("way", "fullgraph"), [WAYS[0], *(pytest.param(*w, marks=pytest.mark.slow) for w in WAYS[1:])])
def test_the_rewritten_graph_is_what_is_compiled(way, fullgraph):
    torch._dynamo.reset()
    lora, backend = adapted(Chain()), Recording()
    expected = lora(x)
    run = way(lora, backend=backend, fullgraph=fullgraph)
    result = run(x)
    assert torch.equal(result, expected)
    assert run(torch.cat([x, x])).shape == (6, 3) and torch.equal(run(x), expected)
    own = [gm for gm in backend.graphs if "lorafx" in gm.print_readable(print_output=False)]
    assert len(own) == 1 and [times for _, times, _ in lora.explain().compiled] == [1]
    result.sum().backward()
    assert all(parameter.grad is not None for parameter in lora.parameters() if parameter.requires_grad)
    with lora.disable_adapter():
        assert not torch.equal(run(x), expected)
    assert torch.equal(run(x), expected)


def test_a_part_that_is_compiled_is_still_a_part():
    torch._dynamo.reset()
    lora = adapted(Chain())
    expected = lora(x)
    lora.second.forward = torch.compile(lora.second.forward, backend="eager")
    assert torch.equal(lora(x), expected)
    with lora.disable_adapter():
        assert torch.allclose(lora(x), torch.nn.functional.linear(torch.relu(x @ lora.first.weight.T), *_second(lora)))


def _second(lora):
    return lora.second.weight, lora.second.bias


def test_a_function_that_must_be_one_graph_hears_why_it_cannot():
    torch._dynamo.reset()
    run = around(adapted(Chain()), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"give torch.compile that model with fullgraph=True"):
        run(x)


@pytest.mark.slow
def test_copies_compile_for_themselves():
    lora = adapted(Chain())
    compiled = torch.compile(lora, backend="eager")
    expected = compiled(x)
    assert len(lora._lorafx.compiled) == 1
    other = copy.deepcopy(lora)
    assert other._lorafx.compiled == [] and torch.equal(copy.deepcopy(compiled)(x), expected)
    lora.delete_adapter("default")
    assert [list(dispatcher) for _, dispatcher in lora._lorafx.compiled] == [[]]  # what served it is forgotten


def test_what_torch_compile_says_is_a_backend():
    inductor = torch._TorchCompileInductorWrapper("max-autotune", None, None)
    backend = Backend.of(inductor, 0.5)
    assert backend.name == "inductor" and backend.budget == 0.5 and backend.dynamic and backend.records
    assert backend.settings["max_autotune"] is True and "triton.cudagraphs" not in backend.settings
    other = torch._TorchCompileWrapper("aot_eager", None, None, False)
    assert Backend.of(other, None) == Backend("aot_eager", compiler=other, dynamic=False)


# --- FSDP1 -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layers", [False, True])
def test_fsdp1_around_an_adapted_model(layers):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        lora = adapted(Chain())
        expected = lora(x).detach()
        policy = ModuleWrapPolicy({torch.nn.Linear}) if layers else None
        sharded = FullyShardedDataParallel(
            lora, use_orig_params=True, device_id=torch.device("cpu"), auto_wrap_policy=policy
        )
        result = sharded(x)
        assert torch.allclose(result, expected, atol=1e-6)
        result.sum().backward()
        trained = [parameter for parameter in sharded.parameters() if parameter.requires_grad]
        assert trained and all(parameter.grad is not None for parameter in trained)
    finally:
        torch.distributed.destroy_process_group()
