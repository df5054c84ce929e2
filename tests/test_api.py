"""compile and load: what a user calls first."""

import pytest
import torch
from graphs import Chain, adapted

import lorafx
from lorafx.errors import AdapterError, CaptureError, ConfigError, PipelineError
from lorafx.passes import default

aten = torch.ops.aten


def test_compiling_twice_is_refused():
    with pytest.raises(AdapterError, match="add_adapter"):
        lorafx.compile(adapted(Chain()), {"target_modules": ["first"]})


def test_what_is_no_model_and_no_call_is_refused():
    with pytest.raises(ConfigError, match=r"the model is 'gpt2', a str"):
        lorafx.compile("gpt2", {"target_modules": ["first"]})
    model = Chain()
    with pytest.raises(ConfigError, match=r"example_inputs is a Tensor; give a tuple"):
        lorafx.compile(model, {"target_modules": ["first"]}, example_inputs=torch.randn(5, 4))
    assert not hasattr(model.first, "lora_A")


def test_a_failed_compile_leaves_the_model_alone():
    class Odd(Chain):
        def forward(self, x):
            return super().forward(x) @ self.second.weight

    model = Odd()
    with pytest.raises(lorafx.errors.UncoveredOperatorError):
        lorafx.compile(model, {"target_modules": ["second"]}, example_inputs=(torch.randn(5, 4),))
    assert all(p.requires_grad for p in model.parameters())
    assert not any("lora" in name for name, _ in model.named_modules())


def test_compile_checks_the_order_first():
    with pytest.raises(PipelineError):
        lorafx.compile(Chain(), {"target_modules": ["first"]}, pipeline="insert_adapters, canonicalize")


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ((), "no pass of the pipeline establishes `adapters`, so that calls would run without any"),
        (["canonicalize"], "'canonicalize' is no pass"),
        (5, "5 is no pass"),
        ((*default, type(default[0])), "Canonicalize'> is no pass"),
    ],
)
def test_a_pipeline_that_is_none_or_inserts_no_adapter_is_refused(pipeline, message):
    with pytest.raises(PipelineError, match=message):
        lorafx.compile(Chain(), {"target_modules": ["first"]}, pipeline=pipeline)


def test_the_pipeline_is_the_users():
    x, config = torch.randn(5, 4), {"target_modules": ["first"], "init_lora_weights": False}
    plain = lorafx.compile(Chain(), config, pipeline=default.without("fuse_lora", "fold_scaling"))
    assert plain.graph(x).graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    text = lorafx.compile(Chain(), config, pipeline=str(default))
    assert not text.graph(x).graph.find_nodes(op="call_function", target=aten.mul.Tensor)


def test_loading_takes_what_compiling_takes(tmp_path):
    saved = lorafx.compile(Chain(), {"r": 2, "target_modules": ["first"]})
    saved.save_pretrained(tmp_path)
    seen, x = [], torch.randn(5, 4)
    options = {"observers": [lambda *at: seen.append(at)], "activation_budget": 0.5, "gradient_checkpointing": True}
    lora = lorafx.load(Chain(), tmp_path, example_inputs=(x,), is_trainable=True, **options)
    assert seen and len(lora.explain().calls) == 1
    dispatcher = lora._lorafx.dispatcher
    assert dispatcher.backend.budget == 0.5 and "checkpoint_blocks{every=True}" in str(dispatcher.pipeline)
    with pytest.raises(ConfigError, match="no option random_state, nonsense for loading an adapter"):
        lorafx.load(Chain(), tmp_path, random_state=3, nonsense=1)


def test_a_load_whose_example_fails_leaves_the_model_as_it_was(tmp_path):
    lorafx.compile(Chain(), {"r": 2, "target_modules": ["first"]}).save_pretrained(tmp_path)
    model = Chain().train()
    with pytest.raises(CaptureError):
        lorafx.load(model, tmp_path, example_inputs=(torch.randn(5, 7),), capture="graph")
    assert model.training and all(p.requires_grad for p in model.parameters())
