"""`layer_replication`, beside PEFT's."""

import copy

import models
import pytest
import torch
from graphs import Chain
from safetensors.torch import load_file

import lorafx
from lorafx.errors import ConfigError, MergeError

SETTINGS = {"r": 2, "lora_alpha": 0.5, "init_lora_weights": False, "target_modules": ["q_proj", "down_proj"]}
TWICE = [[0, 2], [1, 3]]


def base_model():
    return models.llama(num_hidden_layers=3)


def replicated(base=None, layers=TWICE, **options):
    return lorafx.compile(base or base_model(), SETTINGS | {"layer_replication": layers}, random_state=0, **options)


@torch.no_grad()
def read(model, call):
    return models.logits(models.run(model.eval(), call))


def losses(model, call):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    found = []
    for _ in range(3):
        found.append(models.run(model.train(), call).loss)
        found[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(found).detach()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "capture"), [(TWICE, "graph"), (TWICE, "sites"), ([[2, 3], [0, 1]], "sites")], ids=str
)
def test_each_layer_has_adapters_of_its_own_as_in_peft(layers, capture, tmp_path):
    peft = pytest.importorskip("peft")
    base, call = base_model(), models.call("llama")
    torch.manual_seed(0)
    fields = peft.LoraConfig(**SETTINGS, layer_replication=layers)
    peft.get_peft_model(copy.deepcopy(base), fields).save_pretrained(tmp_path / "theirs")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True)
    lora = lorafx.load(base, tmp_path / "theirs", is_trainable=True, capture=capture)
    assert lora.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    torch.testing.assert_close(losses(lora, call), losses(theirs, call), rtol=1e-5, atol=1e-5)
    lora.save_pretrained(tmp_path / "ours")
    written, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert written.keys() == again.keys()
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(read(back, call), read(lora, call), rtol=1e-5, atol=1e-5)
    if capture == "graph":  # each kind of call is a capture, and generating has two more
        return
    told = {"input_ids": call["input_ids"], "attention_mask": torch.ones_like(call["input_ids"]), "do_sample": False}
    ours, expected = (model.generate(**told, max_new_tokens=5) for model in (lora, back))
    assert torch.equal(ours, expected)


def test_the_base_keeps_its_layers_and_what_becomes_of_its_weights_counts():
    base, call = base_model(), models.call("llama", labels=False)
    before = read(base, call)
    lora = replicated(base, capture="sites")
    assert (len(base.model.layers), base.config.num_hidden_layers) == (3, 3)
    assert (len(lora.model.layers), lora.config.num_hidden_layers) == (4, 4)
    assert [layer.self_attn.layer_idx for layer in (*base.model.layers, *lora.model.layers)] == [0, 1, 2, 0, 1, 2, 3]
    assert torch.equal(read(base, call), before)
    expected = read(lora, call)
    other = copy.deepcopy(lora)
    for parameter in base.parameters():  # in other memory, where nobody is told
        parameter.data = 1.01 * parameter.data
    moved = read(lora, call)
    assert not torch.equal(moved, expected)
    first, second = (lora.model.layers[number].self_attn.q_proj.weight for number in (1, 2))
    assert first is not second and first.data_ptr() == second.data_ptr()
    with torch.no_grad():
        for parameter in other._lorafx.base.parameters():
            parameter.data = 1.01 * parameter.data
    torch.testing.assert_close(read(other, call), moved, msg="a copy follows its own base")
    assert len(lora.unload().model.layers) == 4 and torch.equal(read(lora.double().float(), call), read(lora, call))


def test_a_model_that_was_unloaded_has_the_layers_already(tmp_path):
    call = models.call("llama", labels=False)
    lora = replicated(capture="sites")
    expected = read(lora, call)
    lora.save_pretrained(tmp_path)
    unloaded = lora.unload()
    again = lorafx.load(unloaded, tmp_path, capture="sites")
    assert torch.equal(read(again, call), expected) and again.unload() is unloaded
    with pytest.raises(ConfigError, match=r"is \[\[0, 1\]\], and the model was made with \[\[0, 2\], \[1, 3\]\]"):
        replicated(unloaded, [[0, 1]])


def test_a_layer_has_its_own_place_in_a_cache_whatever_it_calls_its_number():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "num_layers": 2}
    config = transformers.GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]], window_size=2)
    fields = {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [0, 2]]}
    lora = lorafx.compile(transformers.GPTNeoModel(config), fields, capture="sites").eval()
    ids = torch.randint(30, (1, 6))
    with torch.no_grad():
        assert torch.equal(lora(ids, use_cache=True)[0], lora(ids, use_cache=False)[0])
    assert lora.config.attention_layers == ["global", "local"] * 2


def test_what_a_config_says_of_each_layer_goes_with_the_layer():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    windows = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 2, "use_sliding_window": True}
    config = transformers.Qwen2Config(**sizes, **windows, num_key_value_heads=1, num_hidden_layers=2)
    base = transformers.Qwen2ForCausalLM(config)
    lora = replicated(base, [[1, 2], [0, 2]], capture="sites").eval()
    assert lora.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    ids = torch.randint(40, (1, 6))
    told = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 4}
    assert torch.equal(lora.generate(ids, **told), lora.generate(ids, **told, use_cache=False))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layer_replication": [[0, 4]]}, r"has \[0, 4\], and the model has 3 layers"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "start values that are taken"),
    ],
    ids=str,
)
def test_what_cannot_be_replicated_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        lorafx.compile(base_model(), SETTINGS | {"layer_replication": TWICE} | fields)


def test_a_model_without_a_list_of_layers_is_refused():
    with pytest.raises(ConfigError, match="Chain has none"):
        lorafx.compile(Chain(), {"target_modules": ["first"], "layer_replication": [[0, 1]]})


def test_layers_that_read_what_others_computed_are_refused():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8}
    sizes |= {"num_hidden_layers": 2, "num_key_value_heads": 1, "vocab_size_per_layer_input": 30, "laurel_rank": 2}
    windows = {"layer_types": ["full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 2}
    for shared, said in ((1, "read keys and values of others"), (0, "read inputs of which there are as many")):
        config = transformers.Gemma3nTextConfig(**sizes, **windows, num_kv_shared_layers=shared)
        base = transformers.Gemma3nForCausalLM(config)
        with pytest.raises(ConfigError, match=said):
            replicated(base, [[0, 2], [0, 2]])


def test_all_adapters_have_the_same_layers_and_none_is_merged():
    lora = replicated(capture="sites")
    with pytest.raises(ConfigError, match=r"the model was made with \[\[0, 2\], \[1, 3\]\]"):
        lora.add_adapter("other", SETTINGS)
    lora.add_adapter("other", SETTINGS | {"layer_replication": TWICE})
    with pytest.raises(MergeError, match="layers share their weights"):
        lora.merge_adapter("other")
    plain = lorafx.compile(base_model(), SETTINGS)
    with pytest.raises(ConfigError, match="the model has its own layers"):
        plain.add_adapter("other", SETTINGS | {"layer_replication": TWICE})
