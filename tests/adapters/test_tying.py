"""`ensure_weight_tying`, beside PEFT's."""

import copy
import warnings

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafx
from lorafx.errors import CheckpointError, ConfigError

WEIGHTS = "adapter_model.safetensors"
TIED = {"r": 3, "lora_alpha": 0.3, "init_lora_weights": False, "ensure_weight_tying": True}


def base_model():
    return models.llama(num_hidden_layers=1, tie_word_embeddings=True)


def trained(model, call):
    """The losses of three steps, and the logits after them."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = models.run(model.train(), call).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack([*losses]), read(model, call)


@torch.no_grad()
def read(model, call):
    return models.logits(models.run(model.eval(), call))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "capture"),
    [
        ({"target_modules": ["lm_head", "q_proj"]}, "graph"),
        ({"target_modules": r".*(lm_head|q_proj)"}, "sites"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "graph"),
        ({"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}, "sites"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [4], "lm_head": [4]}}, "graph"),
    ],
    ids=["target", "regex", "saved", "saved target", "tokens"],
)
def test_both_ends_are_one_as_in_peft(fields, capture, tmp_path):
    peft = pytest.importorskip("peft")
    base, call = base_model(), models.call("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**TIED, **fields))
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if parameter.requires_grad and "lora_" not in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        theirs.save_pretrained(tmp_path / "theirs")
        lora = lorafx.load(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True, capture=capture)
        lora.save_pretrained(tmp_path / "ours")
        written, again = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
        own = {key for key in written if ".base_layer." not in key}
        assert own == {key for key in again if ".base_layer." not in key}
        assert all(torch.equal(written[key], again[key]) for key in own)
        back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
        assert torch.equal(read(back, call), read(theirs, call))
        for found, expected in zip(trained(lora, call), trained(theirs, call)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    expected = read(lora, call)
    lora.save_pretrained(tmp_path / "ours")
    base.save_pretrained(tmp_path / "base")
    lorafx.merge(tmp_path / "base", tmp_path / "ours", tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged"), lora.merge_and_unload()
    for model in merged:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        torch.testing.assert_close(read(model, call), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["word_embeddings"]},
        {"target_modules": r".*\.word_embeddings"},
        {"target_modules": ["query"], "modules_to_save": ["decoder"]},
        {"target_modules": ["query", "decoder"], "modules_to_save": ["word_embeddings"]},
    ],
    ids=["target", "regex", "saved", "saved target"],
)
def test_peft_reads_what_it_would_not_tie(fields, tmp_path):
    peft = pytest.importorskip("peft")  # which ties only what is called embed_tokens or lm_head
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    torch.manual_seed(0)
    base = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=models.VOCABULARY, **sizes)).eval()
    call = models.call("llama", labels=False)
    lora = lorafx.compile(copy.deepcopy(base), TIED | fields, capture="sites", random_state=0)
    with torch.no_grad():
        for copied in (p for name, p in lora.named_parameters() if "modules_to_save" in name):
            copied.add_(torch.randn_like(copied), alpha=0.1)
    expected = read(lora, call)
    lora.save_pretrained(tmp_path)
    for back in (peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), lorafx.load(base, tmp_path)):
        torch.testing.assert_close(read(back, call), expected, rtol=1e-5, atol=1e-5)
    tensors = load_file(tmp_path / WEIGHTS)
    if any("decoder.lora_A" in key for key in tensors):  # what PEFT writes has the one module alone
        save_file({key: value for key, value in tensors.items() if "decoder.lora_" not in key}, tmp_path / WEIGHTS)
        with pytest.warns(UserWarning, match=r"has no base_model.model.cls.predictions.decoder.lora_A.weight"):
            lorafx.load(base, tmp_path)


@pytest.mark.parametrize("ties", [True, False])
def test_what_is_merged_beside_a_copy_of_one_end_reaches_both(ties, tmp_path):
    base, call = base_model(), models.call("llama", labels=False)
    fields = TIED | {"target_modules": ["lm_head"], "ensure_weight_tying": ties}
    lora = lorafx.compile(copy.deepcopy(base), fields, capture="sites", random_state=0)
    lora.add_adapter("whole", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    lora.set_adapter(["default", "whole"])
    with torch.no_grad():
        lora.get_parameter("lm_head.modules_to_save.whole.weight").mul_(1.5)
    expected = read(lora, call)
    lora.save_pretrained(tmp_path)
    base.save_pretrained(tmp_path / "base")
    lorafx.merge(tmp_path / "base", [tmp_path, tmp_path / "whole"], tmp_path / "merged")
    lora.merge_adapter()
    for merged in (lora, type(base).from_pretrained(tmp_path / "merged"), lora.merge_and_unload()):
        torch.testing.assert_close(read(merged, call), expected, rtol=1e-4, atol=1e-4)


def test_an_adapters_values_by_key_have_both_ends_and_go_back():
    lora = lorafx.compile(base_model(), TIED | {"target_modules": ["lm_head"]})
    values = lorafx.get_peft_model_state_dict(lora)
    head = "base_model.model.lm_head.lora_A.weight"
    assert torch.equal(values[head], values["base_model.model.model.embed_tokens.lora_embedding_B"].t())
    moved = {key: 2 * value.detach() for key, value in values.items()}
    lorafx.set_peft_model_state_dict(lora, moved)
    assert torch.equal(lorafx.get_peft_model_state_dict(lora)[head], moved[head])


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"target_modules": ["lm_head"]}, "lm_head.lora_A.weight"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head.weight"),
    ],
    ids=["target", "saved"],
)
def test_a_file_that_has_two_of_one_is_refused(fields, key, tmp_path):
    lorafx.compile(base_model(), TIED | fields).save_pretrained(tmp_path, save_embedding_layers=False)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[f"base_model.model.{key}"] += 1
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=key):
        lorafx.load(base_model(), tmp_path)


def test_an_adapter_starts_as_the_heads():
    lora = lorafx.compile(base_model(), TIED | {"target_modules": ["embed_tokens"], "init_lora_weights": True})
    own = {name.split(".")[-2]: p for name, p in lora.named_parameters() if "lora_embedding" in name}
    assert not own["lora_embedding_A"].any()
    b = own["lora_embedding_B"]  # (out, r): the head's A transposed, uniform up to 1 / √in; an embedding's is normal
    assert 0.5 < b.abs().max() * len(b) ** 0.5 <= 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target_modules": ["lm_head"], "use_dora": True}, "a magnitude for each"),
        ({"target_modules": ["lm_head"], "exclude_modules": ["embed_tokens"]}, "leaves out model.embed_tokens"),
        ({"target_modules": ["lm_head"], "rank_pattern": {"lm_head": 2}}, "`rank_pattern` has other numbers"),
        ({"target_modules": ["lm_head"], "trainable_token_indices": [1]}, "lm_head is in `target_modules` and in"),
        (
            {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
            "other tokens for these",
        ),
    ],
    ids=["DoRA", "excluded", "rank", "twice", "tokens"],
)
def test_what_cannot_be_tied_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        lorafx.compile(base_model(), TIED | fields)


def test_what_has_no_effect_is_said():
    with pytest.warns(UserWarning, match="no effect: none of model.embed_tokens, lm_head, which are tied"):
        lorafx.compile(base_model(), TIED | {"target_modules": ["q_proj"]})
    with pytest.warns(UserWarning, match="no effect: no other module has"):
        lorafx.compile(models.llama(num_hidden_layers=1), TIED | {"target_modules": ["embed_tokens"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lorafx.compile(base_model(), TIED | {"target_modules": ["embed_tokens"]})
