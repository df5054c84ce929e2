"""Adapters that act from an invocation on (`alora_invocation_tokens`), beside PEFT's."""

import copy

import models
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorafx
from lorafx.errors import AdapterError, ConfigError, MergeError, UncoveredOperatorError

INVOCATION = [3, 4]
PLAIN = {"r": 3, "lora_alpha": 0.5, "init_lora_weights": False, "target_modules": ["v_proj", "up_proj", "lm_head"]}
WAITING = {**PLAIN, "r": 2, "alora_invocation_tokens": INVOCATION}


def base_model():
    return models.llama(num_hidden_layers=1)


def prompts():
    """Rows with the invocation once, twice and not at all, the last of which has half of it."""
    ids = torch.randint(5, 30, (3, 7), generator=torch.Generator().manual_seed(0))
    ids[0, 2:4] = ids[1, 0:2] = ids[1, 4:6] = torch.tensor(INVOCATION)
    ids[2, 6] = INVOCATION[0]
    return ids, [2, 4, 7]


def waiting(**options):
    strong = WAITING | {"lora_alpha": 8}  # so that whoever places it wrongly generates other tokens
    return lorafx.compile(base_model(), strong, capture="sites", random_state=0, **options).eval()


def generated(model, ids, **options):
    told = {"do_sample": False, "max_new_tokens": 4, "attention_mask": torch.ones_like(ids)}
    return model.generate(input_ids=ids, **told | options)


def losses(model, ids):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    found = []
    for _ in range(3):
        found.append(model.train()(input_ids=ids, labels=ids).loss)
        found[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(found).detach()


@pytest.mark.slow
@pytest.mark.parametrize("capture", ["graph", "sites"])
def test_it_acts_where_pefts_does(capture, tmp_path):
    peft = pytest.importorskip("peft")
    base, (ids, _) = base_model(), prompts()
    torch.manual_seed(0)
    made = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**WAITING, task_type="CAUSAL_LM"))
    made.add_adapter("plain", peft.LoraConfig(**PLAIN, task_type="CAUSAL_LM"))
    made.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    theirs.load_adapter(tmp_path / "plain", "plain")
    lora = lorafx.load(base, tmp_path, is_trainable=True, capture=capture)
    torch.testing.assert_close(losses(lora, ids), losses(theirs, ids), rtol=1e-5, atol=1e-5)
    lora.save_pretrained(tmp_path / "ours")
    assert (
        load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "adapter_model.safetensors").keys()
    )
    lora.load_adapter(tmp_path / "plain", "plain")
    chosen = {"input_ids": ids, "adapter_names": ["default", "plain", "__base__"]}
    with torch.no_grad():
        ours, expected = (model.eval()(**chosen).logits for model in (lora, theirs))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        if capture == "graph":  # each kind of call is a capture
            return
        told = {"input_ids": ids, "alora_offsets": [1, None, 5]}
        for call in (told, chosen | {"alora_offsets": [2, None, None]}):
            torch.testing.assert_close(lora(**call).logits, theirs(**call).logits, rtol=1e-5, atol=1e-5)
    padded = torch.ones_like(ids)
    padded[0, :2] = padded[2, :3] = 0
    ours, expected = (generated(model, ids, attention_mask=padded) for model in (lora, theirs))
    assert torch.equal(ours, expected)


def test_tokens_before_the_invocation_are_the_bases_bit_for_bit():
    lora, (ids, starts) = waiting(), prompts()
    with torch.no_grad():
        found = lora(input_ids=ids).logits
        with lora.disable_adapter():
            base = lora(input_ids=ids).logits
        alone = lora(input_ids=ids[:1]).logits
    for row, start in enumerate(starts):
        assert torch.equal(found[row, :start], base[row, :start])
        assert (found[row, start:] != base[row, start:]).any(-1).all()
    torch.testing.assert_close(alone, found[:1])


def test_all_that_is_generated_comes_after_it():
    lora, (ids, _) = waiting(), prompts()
    expected = generated(lora, ids, use_cache=False)
    assert torch.equal(generated(lora, ids), expected)
    assert torch.equal(generated(lora, ids, cache_implementation="static"), expected)
    for given in (ids[:1], ids[:1, 2:]):  # all, or what the cache does not have
        with lora.disable_adapter(), torch.no_grad():  # the base has read what comes before
            cache = lora(input_ids=ids[:1, :2], use_cache=True).past_key_values
        found = generated(lora, given, past_key_values=cache, attention_mask=torch.ones_like(ids[:1]))
        assert torch.equal(found[:, -4:], expected[:1, -4:])
    beams = generated(lora, ids, num_beams=2, use_cache=False)
    assert torch.equal(generated(lora, ids, num_beams=2), beams)
    step = lora(input_ids=ids, use_cache=True)  # by hand it is as PEFT has it: what a call says of itself
    told = lora(input_ids=expected[:, 7:8], past_key_values=step.past_key_values, alora_offsets=[1, 1, None])
    torch.testing.assert_close(told.logits.argmax(-1), expected[:, 8:9])


def test_a_recurrent_model_whose_state_counts_no_tokens_generates_with_it():
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=30, hidden_size=16, state_size=4, conv_kernel=3, num_hidden_layers=1)
    torch.manual_seed(0)
    fields = WAITING | {"lora_alpha": 8, "target_modules": ["in_proj", "out_proj"]}
    lora = lorafx.compile(transformers.MambaForCausalLM(config), fields, capture="sites", random_state=0).eval()
    ids, _ = prompts()
    assert torch.equal(generated(lora, ids), generated(lora, ids, use_cache=False))


def test_a_call_within_a_call_has_places_of_its_own():
    lora, (ids, _) = waiting(), prompts()
    other = ids[:2].roll(1, 1)
    with torch.no_grad():
        expected, found = lora(input_ids=other).logits, []

        def calls(*_):
            if not found:
                found.append(None)
                found.append(lora(input_ids=other).logits)

        lora.model.norm.register_forward_hook(calls)
        lora(input_ids=ids)
    assert torch.equal(found[1], expected)


def test_a_layer_checkpointed_in_training_has_the_same_gradients():
    ids, _ = prompts()
    found = []
    for checkpointing in (False, True):
        lora = waiting().train()
        if checkpointing:
            lora.gradient_checkpointing_enable()
        lora(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in lora.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_dora": True}, "`alora_invocation_tokens` and `use_dora` are variants"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"modules_to_save": ["norm"]}, "`modules_to_save` on all"),
        ({"target_modules": ["embed_tokens"]}, "is for linear layers"),
        ({"task_type": "SEQ_CLS"}, "for causal language models"),
    ],
    ids=str,
)
def test_what_would_act_on_all_tokens_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        lorafx.compile(base_model(), WAITING | fields)


class Prefixed(nn.Module):
    """(batch, tokens) of ids -> (batch, tokens + 2, 8): the model puts two tokens of its own before them."""

    def __init__(self):
        super().__init__()
        self.embed, self.prefix, self.lin = nn.Embedding(9, 6), nn.Parameter(torch.randn(2, 6)), nn.Linear(6, 8)

    def forward(self, input_ids):
        embedded = self.embed(input_ids)
        return self.lin(torch.cat([self.prefix.expand(len(embedded), -1, -1), embedded], 1))


@pytest.mark.parametrize("capture", ["graph", "sites"])
def test_tokens_that_the_model_has_put_before_are_an_error(capture):
    lora = lorafx.compile(Prefixed(), WAITING | {"target_modules": ["lin"]}, capture=capture)
    with pytest.raises(UncoveredOperatorError, match="nobody can tell which rows"):
        lora(input_ids=torch.randint(9, (3, 5)))


def test_where_nobody_can_tell_which_tokens_these_are_is_an_error():
    lora, (ids, _) = waiting(), prompts()
    with pytest.raises(AdapterError, match="there are none: pass `alora_offsets`"):
        lora(inputs_embeds=torch.randn(3, 7, lora.config.hidden_size))
    with pytest.raises(AdapterError, match="`logits_to_keep` as a tensor"):
        lora(input_ids=ids, logits_to_keep=torch.tensor([1, 2]))
    for offsets, said in (([1, 2], "2 numbers, and the batch 3 rows"), (3, "not 3"), (["1"] * 3, "not ")):
        with pytest.raises(AdapterError, match=said):
            lora(input_ids=ids, alora_offsets=offsets)
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration has an encoder's and a decoder's"):
        lorafx.compile(models.t5(), WAITING | {"target_modules": ["v"]})
    lora.generation_config.guidance_scale = 1.5
    with pytest.raises(AdapterError, match="`guidance_scale` has `generate` read other tokens"):
        generated(lora, ids)
    with pytest.raises(MergeError, match="acts on some tokens alone"):
        lora.merge_adapter()
    lora.add_adapter("plain", PLAIN)
    lora.set_adapter(["default", "plain"])
    with pytest.raises(AdapterError, match="only alone"):
        lora(input_ids=ids)
