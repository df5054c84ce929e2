"""Random lives of adapters, in PEFT and in lorafx side by side: the same values, gradients, names and refusals.

Hypothesis draws the steps of a life, the same ones in each run. Where PEFT means something else, a step is not drawn:
it unmerges what is merged when an adapter is added or disabled, its `requires_grad` flags change with
`disable_adapter()`, and `unload()` leaves the base changed.
"""

from __future__ import annotations

import copy
import io
import re
import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import lorafx
from lorafx.errors import LorafxError
from lorafx.serving import early_calls

pytestmark = pytest.mark.slow

TOKENS = 11
TARGETS = ["emb", "conv", "up", "blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2", "down"]
# float64: sums of at most fourteen terms through eight layers.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
PATTERNS = {"rank_pattern": {"up": 4, "blocks.0.*": 5}, "alpha_pattern": {"down": 7}}


class Net(nn.Module):
    """An embedding, a convolution, linear layers with and without bias, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(TOKENS, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.up = nn.Linear(8, 10)
        rows = [nn.Sequential(nn.Linear(10, 14), nn.ReLU(), nn.Linear(14, 10, bias=False)) for _ in range(2)]
        self.blocks = nn.ModuleList(rows)
        self.norm = nn.LayerNorm(10)
        self.down = nn.Linear(10, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.up(torch.tanh(self.conv(self.emb(ids).mT)).mT)
        for block in self.blocks:
            x = x + block(x)
        return self.head(torch.tanh(self.down(self.norm(x))))


@st.composite
def configs(draw: Any) -> dict[str, Any]:
    """Arguments of `LoraConfig`."""
    targets = draw(st.lists(st.sampled_from(TARGETS), min_size=1, unique=True))
    kind = draw(st.sampled_from([{}, {}, {"use_dora": True}, {"modules_to_save": ["head", "norm"]}, PATTERNS]))
    size = {"r": draw(st.integers(1, 3)), "lora_alpha": draw(st.integers(1, 5)), "use_rslora": draw(st.booleans())}
    return size | {"target_modules": targets, "init_lora_weights": False} | kind


def plain(name: str) -> str:
    """A parameter's name without what only one of both libraries puts into it."""
    name = name.removeprefix("base_model.model.").replace("original_module.", "").replace(".base_layer", "")
    return re.sub(r"(lora_magnitude_vector\.\w+)\.weight", r"\1", name)


class Life(RuleBasedStateMachine):
    """One base in both libraries, with the same adapters at any time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.configs: dict[str, dict[str, Any]] = {}
        self.merged = False
        self.count = 0

    @initialize(config=configs(), capture=st.sampled_from(["auto", "sites"]))
    def begin(self, config: dict[str, Any], capture: str) -> None:
        base, dtypes = Net().double(), {"autocast_adapter_dtype": False}
        self.theirs: Any = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config), "a0", **dtypes)
        ours = lorafx.LoraConfig(**config)
        self.mine: Any = lorafx.compile(base, ours, adapter_name="a0", capture=capture, **dtypes)
        self.remember("a0", config)
        self.give_values("a0")

    def remember(self, name: str, config: dict[str, Any]) -> None:
        self.configs[name] = config
        self.count += 1

    def give_values(self, name: str) -> None:
        """Random ones to all that an adapter has, by PEFT's names."""
        found = peft.get_peft_model_state_dict(self.theirs, adapter_name=name, save_embedding_layers=False)
        values = {key: tensor + 0.3 * torch.randn_like(tensor) for key, tensor in found.items()}
        peft.set_peft_model_state_dict(self.theirs, dict(values), adapter_name=name)
        lorafx.of(self.mine).load_adapter_state_dict(values, name)

    @property
    def names(self) -> st.SearchStrategy[str]:
        return st.sampled_from(list(self.configs))

    def freezes(self, name: str) -> bool:
        """Whether PEFT freezes again what is let train without being active: not so whole modules."""
        return "modules_to_save" not in self.configs[name]

    def both(self, act: Any, theirs: Any = None) -> bool:
        """Whether both do it; if not, then both refuse."""
        refused = []
        for model, how, refusal in ((self.theirs, theirs or act, Exception), (self.mine, act, LorafxError)):
            try:
                how(model)
            except refusal as error:
                refused.append(error)
        assert len(refused) != 1, refused
        return not refused

    # --- what is always so -------------------------------------------------------------------------------------------

    @invariant()
    def same(self) -> None:
        """Outputs, what trains, gradients, numbers of parameters, and what files would hold."""
        if not self.count:
            return
        ids = torch.randint(0, TOKENS, (2, 5))
        models = (self.mine, self.theirs)
        mine, theirs = (model(ids) for model in models)
        torch.testing.assert_close(mine, theirs, **CLOSE)
        assert mine.requires_grad == theirs.requires_grad
        for model, value in zip(models, (mine, theirs)):
            model.zero_grad()
            value.square().sum().backward() if value.requires_grad else None
        torch.testing.assert_close(*(gradients(model) for model in models), **CLOSE)
        assert self.mine.get_nb_trainable_parameters() == self.theirs.get_nb_trainable_parameters()

    @invariant()
    def same_files(self) -> None:
        for name in self.configs:
            found = peft.get_peft_model_state_dict(self.theirs, adapter_name=name, save_embedding_layers=False)
            torch.testing.assert_close(lorafx.of(self.mine).adapter_state_dict(name), found, **CLOSE)

    # --- steps -------------------------------------------------------------------------------------------------------

    @rule(train=st.booleans())
    def switch_mode(self, train: bool) -> None:
        self.mine.train(train)
        self.theirs.train(train)

    @rule()
    def train(self) -> None:
        for model in (self.mine, self.theirs):
            trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
            torch.optim.SGD(trained, lr=0.01).step() if trained else None

    @rule()
    def copy(self) -> None:
        self.mine, self.theirs = copy.deepcopy(self.mine), copy.deepcopy(self.theirs)

    @rule()
    def pickle(self) -> None:
        file = io.BytesIO()
        torch.save(self.mine, file)
        file.seek(0)
        self.mine = torch.load(file, weights_only=False)

    @precondition(lambda self: not self.merged and len(self.configs) < 4)
    @rule(config=configs())
    def add(self, config: dict[str, Any]) -> None:
        name = f"a{self.count}"
        if self.both(lambda model: model.add_adapter(name, known(model).LoraConfig(**config))):
            self.remember(name, config)
            self.give_values(name)

    @precondition(lambda self: not self.merged)
    @rule(data=st.data(), inference_mode=st.booleans())
    def set_one(self, data: st.DataObject, inference_mode: bool) -> None:
        name = data.draw(self.names)
        assert self.both(lambda model: model.set_adapter(name, inference_mode=inference_mode))

    @precondition(lambda self: not self.merged)
    @rule(data=st.data())
    def set_two(self, data: st.DataObject) -> None:
        additive = [name for name, config in self.configs.items() if not {"use_dora", "modules_to_save"} & {*config}]
        names = data.draw(st.lists(st.sampled_from(additive), max_size=2, unique=True)) if additive else []
        if names:
            assert self.both(lambda m: m.set_adapter(names), theirs=lambda m: m.base_model.set_adapter(names))

    @precondition(lambda self: not self.merged and len(self.configs) > 1)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(self.names)
        assert self.both(lambda model: model.delete_adapter(name))
        del self.configs[name]
        self.set_one(data, False)

    @precondition(lambda self: not self.merged)
    @rule()
    def disable(self) -> None:
        """For a call, and before that for good, until they are enabled."""
        self.both(lambda m: m.disable_adapter_layers(), theirs=lambda m: m.base_model.disable_adapter_layers())
        self.same()
        self.both(lambda m: m.enable_adapter_layers(), theirs=lambda m: m.base_model.enable_adapter_layers())
        with self.mine.disable_adapter(), self.theirs.disable_adapter(), torch.no_grad():
            ids = torch.randint(0, TOKENS, (1, 4))
            torch.testing.assert_close(self.mine(ids), self.theirs(ids), **CLOSE)
        active = self.theirs.base_model.active_adapters
        assert self.both(lambda m: m.set_adapter(active), theirs=lambda m: m.base_model.set_adapter(active))

    @precondition(lambda self: not self.merged)
    @rule(data=st.data(), on=st.booleans())
    def freeze(self, data: st.DataObject, on: bool) -> None:
        name = data.draw(self.names)
        assert self.both(lambda model: model.set_requires_grad(name, on and self.freezes(name)))

    @precondition(lambda self: not self.merged)
    @rule(scale=st.sampled_from([0.5, 2.0, -1.0]))
    def scale(self, scale: float) -> None:
        name = self.theirs.base_model.active_adapters[0]
        if "use_dora" not in self.configs[name]:  # PEFT's layers of DoRA keep their own
            lorafx.of(self.mine).set_scale(name, scale)
            for module in self.theirs.modules():
                if isinstance(module, BaseTunerLayer) and name in module.scaling:
                    module.set_scale(name, scale)

    @precondition(lambda self: not self.merged and len(self.configs) < 4)
    @rule(data=st.data(), writer=st.sampled_from(["mine", "theirs"]), trains=st.booleans())
    def save_and_load(self, data: st.DataObject, writer: str, trains: bool) -> None:
        name, new = data.draw(self.names), f"a{self.count}"
        trains = trains and self.freezes(name)
        with tempfile.TemporaryDirectory() as folder:
            getattr(self, writer).save_pretrained(folder, selected_adapters=[name])
            assert self.both(lambda model: model.load_adapter(str(Path(folder, name)), new, is_trainable=trains))
        self.remember(new, self.configs[name])

    @precondition(lambda self: not self.merged)
    @rule(named=st.booleans())
    def merge(self, named: bool) -> None:
        names = list(self.theirs.base_model.active_adapters) if named else None
        assert self.both(lambda model: model.merge_adapter(names))
        self.merged = True

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self) -> None:
        assert self.both(lambda model: model.unmerge_adapter())
        self.merged = False

    def teardown(self) -> None:
        if self.count:
            ids = torch.randint(0, TOKENS, (2, 5))
            mine, theirs = (model.merge_and_unload() for model in (self.mine, self.theirs))
            torch.testing.assert_close(mine(ids), theirs(ids), **CLOSE)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of what trains, by name; zeros where none has come."""
    trained = {plain(name): each for name, each in model.named_parameters() if each.requires_grad}
    return {name: each.new_zeros(each.shape) if each.grad is None else each.grad for name, each in trained.items()}


def known(model: nn.Module) -> Any:
    """The library that a model is adapted by."""
    return peft if isinstance(model, peft.PeftModel) else lorafx


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("repeats", "lives"), [(0, 4), (100, 50)])
def test_a_life_is_the_same_in_both(repeats, lives, monkeypatch):
    """Served by graphs from the first call of a kind, which takes time, or by the net's own Python."""
    monkeypatch.setattr(early_calls, "REPEATS", repeats)
    how = {"derandomize": True, "database": None, "phases": [Phase.generate], "suppress_health_check": [*HealthCheck]}
    run_state_machine_as_test(Life, settings=settings(max_examples=lives, stateful_step_count=10, deadline=None, **how))
