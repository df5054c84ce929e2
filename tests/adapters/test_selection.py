"""The selection: which weights a config picks, and what is said when it picks none."""

import warnings

import pytest
import torch
from graphs import Chain
from modules import tiny_llama
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from transformers import GptOssConfig, GptOssForCausalLM

import lorafx
from lorafx.adapters.selection import saved_modules, select
from lorafx.errors import ConfigError, SelectionError


def names(model, **config) -> list[str]:
    return [site.name for site in select(model, lorafx.LoraConfig(**config))]


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


def test_suffixes_match_whole_names_only(llama):
    assert names(llama, target_modules=["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert names(llama, target_modules=["0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    with pytest.raises(SelectionError):
        names(llama, target_modules=["proj"])


def test_a_string_is_a_regex_for_the_whole_name(llama):
    assert names(llama, target_modules=r".*\.1\..*[qv]_proj") == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]


def test_all_linear_leaves_the_head_out(llama):
    found = names(llama, target_modules="all-linear")
    assert len(found) == 14 and "lm_head" not in found and "model.embed_tokens" not in found


def test_the_default_is_the_architectures(llama):
    assert {name.rpartition(".")[2] for name in names(llama)} == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match="no default is known for 'Chain'"):
        names(Chain())


def layered() -> nn.Module:
    """Three numbered layers below the root, with numbered experts in each."""

    def layer() -> nn.Module:
        experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 6)}) for _ in range(2))
        return nn.ModuleDict({"up": nn.Linear(4, 6), "experts": experts})

    return nn.ModuleDict({"stages": nn.ModuleList(layer() for _ in range(3))})


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("targets", [["up"], "all-linear"])
def test_the_first_number_in_a_name_is_the_layer_s_wherever_the_list_is(depth, targets):
    model = layered()
    for name in ("body", "model")[:depth]:
        model = nn.ModuleDict({name: model})
    start = "".join(f"{name}." for name in ("model", "body")[2 - depth :]) + "stages.1."
    wanted = [f"{start}up", f"{start}experts.0.up", f"{start}experts.1.up"]
    for layers in (1, [1]):
        assert names(model, target_modules=targets, layers_to_transform=layers) == wanted
    assert len(names(model, target_modules=["up"], layers_to_transform=1, layers_pattern="experts")) == 3


def test_a_model_that_is_itself_the_list_of_layers_has_layers():
    model = nn.Sequential(*(nn.ModuleDict({"up": nn.Linear(4, 6)}) for _ in range(3)))
    assert names(model, target_modules=["up"], layers_to_transform=[1]) == ["1.up"]


def test_layers_and_exclusions_narrow(llama):
    chosen = {"target_modules": ["q_proj", "v_proj"]}
    assert len(names(llama, **chosen, layers_to_transform=1)) == 2
    assert len(names(llama, **chosen, layers_to_transform=[0, 1], layers_pattern="layers")) == 4
    with pytest.raises(SelectionError):
        names(llama, **chosen, layers_to_transform=[0], layers_pattern=["blocks"])
    assert len(names(llama, **chosen, exclude_modules=["v_proj"])) == 2
    assert len(names(llama, **chosen, exclude_modules=r".*\.0\..*")) == 2
    assert len(names(llama, **chosen, modules_to_save=["1.self_attn.v_proj"])) == 3


def test_a_whole_name_says_its_layer_itself(llama):
    chosen = ["model.layers.1.self_attn.q_proj", "v_proj"]
    assert names(llama, target_modules=chosen, layers_to_transform=[0]) == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
    ]


def test_a_saved_module_within_a_saved_one_is_saved_once():
    model = nn.ModuleDict({"head": nn.ModuleDict({"norm": nn.LayerNorm(3)}), "norm": nn.LayerNorm(3)})
    config = lorafx.LoraConfig(target_modules=["x"], modules_to_save=["norm", "head"])
    assert saved_modules(model, config) == ("head", "norm")


def test_a_classifiers_scores_are_left_out_for_the_task_alone():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.classifier = nn.Linear(4, 6), nn.Linear(6, 3)

    assert names(Classifier(), target_modules="all-linear") == ["body", "classifier"]
    assert names(Classifier(), target_modules="all-linear", task_type="SEQ_CLS") == ["body"]


def test_ranks_and_alphas_by_pattern(llama):
    config = {
        "target_modules": ["q_proj", "v_proj"],
        "r": 8,
        "lora_alpha": 16,
        "rank_pattern": {"layers.0.self_attn.q_proj": 3, "v": 1, "v_proj": 5},  # "v" is no whole name
        "alpha_pattern": {r"layers\.\d\.self_attn\.q_proj": 6},
    }
    lora = lorafx.compile(llama, config)
    shape = {name: tuple(p.shape) for name, p in lora.named_parameters() if "lora_A" in name}
    assert [shape[f"model.layers.{i}.self_attn.{m}_proj.lora_A.default.weight"][0] for m in "qv" for i in (0, 1)] == [
        3,
        8,
        5,
        5,
    ]
    adapter = lora._lorafx.adapters["default"]
    scales = [adapter.kind.numbers(site, adapter.config)["scaling"] for site in lora.sites]
    assert scales == [6 / 3, 16 / 5, 6 / 8, 16 / 5]


def test_features_are_those_of_the_operator():
    class Forms(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Embedding(11, 5), nn.Conv2d(4, 6, (3, 2), groups=2)

    sites = select(Forms(), lorafx.LoraConfig(target_modules=["a", "b", "c"]))
    assert [(s.in_features, s.out_features) for s in sites] == [(4, 6), (11, 5), (4, 6)]


def test_nothing_matched_names_the_nearest(llama):
    with pytest.raises(SelectionError, match=r"Nearest: q_proj \(Linear\).*q_proj \(Linear\) x2"):
        names(llama, target_modules=["q_porj"])
    with pytest.raises(SelectionError, match="a string is a regex"):
        names(llama, target_modules="q_proj")


def test_a_module_that_no_form_covers_is_named(llama):
    with pytest.raises(SelectionError, match=r"model.layers.0.mlp \(LlamaMLP\)"):
        names(llama, target_modules=["mlp"])


def test_an_entry_that_matches_nothing_beside_others_warns(llama):
    with pytest.warns(UserWarning, match="match no module: .'k_porj'.*k_proj"):
        names(llama, target_modules=["q_proj", "k_porj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names(llama, target_modules=["q_proj", "k_proj"])


def test_tied_weights_are_one_site_with_a_warning():
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match=r"model.embed_tokens shares its weight with lm_head"):
        sites = select(model, lorafx.LoraConfig(target_modules=["embed_tokens", "lm_head"]))
    assert [(site.name, site.tied) for site in sites] == [("model.embed_tokens", ("lm_head",))]


def test_a_module_under_two_names_is_one_site():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    model.add_module("again", model[0])
    with pytest.warns(UserWarning, match="0 and again are one module: its adapter acts wherever"):
        assert names(model, target_modules="all-linear") == ["0", "1"]


def test_a_module_below_one_that_has_two_names_is_not_remarked_on():
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))})
    model["again"] = model["body"]
    assert said(model, target_modules=["0", "1"]) == []


@pytest.mark.parametrize(
    ("config", "remark"),
    [
        ({"target_modules": "all-linear"}, '"all-linear" leaves out the stacked weights of experts'),
        ({"target_modules": ["q_proj", "up_proj"]}, "The weights of experts are stacked here"),
    ],
)
def test_experts_that_a_config_may_have_meant_are_pointed_at(config, remark):
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 24, "head_dim": 8}
    model = GptOssForCausalLM(GptOssConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, **sizes))
    (said_once,) = said(model, **config)
    assert remark in said_once
    assert "`target_parameters=['experts.gate_up_proj', 'experts.down_proj']`" in said_once
    named = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    assert said(model, **named) == [] and said(model, target_modules=["q_proj"]) == []


@pytest.mark.parametrize("targets", [["attention"], ["out_proj"], ["other", "attention"]])
def test_attention_that_reads_a_quantised_layer_s_weight_is_refused(targets):
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4), "other": nn.Linear(32, 8)})
    model["attention"].out_proj = bnb.nn.Linear4bit(32, 32)
    with pytest.raises(SelectionError, match=r"^attention.out_proj is quantised, and MultiheadAttention computes"):
        select(model.to("cpu"), lorafx.LoraConfig(target_modules=targets))
    assert len(select(model, lorafx.LoraConfig(target_modules=["other"]))) == 1


def test_a_lazy_module_must_run_first():
    with pytest.raises(SelectionError, match="lazy"):
        names(nn.Sequential(nn.LazyLinear(3)), target_modules=["0"])


def test_the_selection_prints_and_joins(llama):
    sites = select(llama, lorafx.LoraConfig(target_modules=["q_proj", "up_proj"]))
    assert "model.layers.0.self_attn.q_proj" in sites and sites[0] in sites
    assert len(sites[:3]) == 3 and len(sites | sites) == 4
    for part in ("4 sites", "model.layers.1.mlp.up_proj", "linear", "56"):
        assert part in str(sites)


def test_a_large_model_on_meta_is_counted_exactly(capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # the defaults are Llama-2-7B's
    lora = lorafx.compile(model, lorafx.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    lora.print_trainable_parameters()
    expected = "trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622\n"
    assert capsys.readouterr().out == expected
    assert len(lora.sites) == 64


@pytest.mark.slow
def test_a_large_model_on_meta_stays_small():
    """Its own process, since peak memory is a process's: under 2 GiB with a captured graph."""
    import subprocess
    import sys

    script = """
import resource, torch, lorafx
from transformers import LlamaConfig, LlamaForCausalLM
with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=8))  # 7.5 GB, if it were not on meta
ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
lora = lorafx.compile(model, {"target_modules": ["q_proj", "v_proj"]}, example_inputs={"input_ids": ids})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 2 * 2**30


def said(model, **config):
    """What is warned of when a model is adapted so."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lorafx.compile(model, {"r": 2, "target_modules": ["q_proj", "v_proj"], **config})
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"target_modules": ["q_proj", "vproj"]}, "`target_modules` entries that match no module: ['vproj']"),
        ({"exclude_modules": ["vproj", "k_proj"]}, "`exclude_modules` entries that match no module: ['vproj']"),
        ({"exclude_modules": r".*\.vproj"}, r"`exclude_modules` entries that match no module: ['.*\\.vproj']"),
        ({"layers_to_transform": [0, 9, 7]}, "`layers_to_transform` numbers that pick no module: [9, 7]"),
        ({"target_modules": "all-linear", "layers_to_transform": [1, 5]}, "numbers that pick no module: [5]"),
        ({"rank_pattern": {"qproj": 4, "q_proj": 3}}, "`rank_pattern` keys that match no adapted module: ['qproj']"),
        ({"alpha_pattern": {"k_proj": 4}}, "`alpha_pattern` keys that match no adapted module: ['k_proj']"),
        ({"alpha_pattern": {"^q_proj": 4.0}}, "['^q_proj']"),
        ({"rank_pattern": {"base_model.model.model.layers.0.self_attn.q_proj": 4}}, "base_model.model"),
        ({"lora_bias": True}, "`lora_bias` adds a bias to 4 layers without one, such as model.layers.0."),
    ],
)  # fmt: skip
def test_what_a_config_names_in_vain_is_said_once(config, named):
    remarks = said(tiny_llama(), **config)
    assert len(remarks) == 1 and named in remarks[0]


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"q_proj": 4, "layers.0.self_attn.q_proj": 3, "^model.layers.1.self_attn.v_proj": 5}},
        {"exclude_modules": ["lm_head", "layers.1.self_attn.q_proj"], "layers_to_transform": [0, 1]},
        {"layers_to_transform": 0, "modules_to_save": ["lm_head"], "bias": "all"},
    ],
)
def test_what_acts_is_not_remarked_on(config):
    assert said(tiny_llama(), **config) == []


def test_a_tie_that_training_ends_is_said():
    for saved in (["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]):
        (remark,) = said(tiny_llama(tie_word_embeddings=True), modules_to_save=saved)
        assert "model.embed_tokens.weight" in remark and "lm_head.weight" in remark and "tied no longer" in remark
    assert said(tiny_llama(), modules_to_save=["embed_tokens"]) == []


@pytest.mark.parametrize("targets", ["all-linear", ["fc"]])
def test_a_layer_that_is_the_model_is_told_that_it_has_no_name(targets):
    with pytest.raises(SelectionError, match=r"is itself a Linear, .*nn\.Sequential"):
        names(nn.Linear(4, 3), target_modules=targets)


@pytest.mark.parametrize("typed", ["all-linears", "all_linear", "All-Linea", "alllinear"])
def test_all_linear_misspelt(typed, llama):
    with pytest.raises(SelectionError, match='Did you mean "all-linear"'):
        names(llama, target_modules=typed)


REFUSED = {
    "no linear layer": (nn.Sequential(nn.Conv1d(3, 4, 2)), "all-linear", r"'all-linear'\. Modules .* 0 \(Conv1d\) x1"),
    "no numbers": (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 0)), ["1"], r"the weight of 1 .* \(0, 4\)"),
    "pruned": (
        nn.Sequential(prune.identity(nn.Linear(3, 4), "weight")),
        ["0"],
        r"matches 0 \(Linear\), where .* computed",
    ),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(("model", "targets", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_picked_is_said_with_its_reason(model, targets, said):
    with pytest.raises(SelectionError, match=said):
        names(model, target_modules=targets)


def test_all_linear_says_which_linear_layers_it_leaves_out():
    """A weight that is computed is no parameter, which an adapter could act on."""
    model = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Linear(4, 5))
    (remark,) = said(model, target_modules="all-linear")
    assert '"all-linear" leaves out 0: ' in remark and "remove_parametrizations" in remark
    assert names(nn.Sequential(*model[1:]), target_modules="all-linear") == ["0"]
