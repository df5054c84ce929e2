"""Several adapters of two kinds, whatever is done with them in whatever order: outputs are what the formula says.

A model is driven through random calls beside plain arithmetic in float64. A call that has no meaning is an error, and
changes nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from graphs import change
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lorafx
from lorafx.adapters import kinds
from lorafx.adapters.config import AdapterConfig
from lorafx.adapters.kinds import Kind, Spec
from lorafx.errors import AdapterError, LorafxError, MergeError

LAYERS = {"first": (3, 5), "second": (5, 4), "third": (4, 2)}
ALPHA = 3
Draw = Callable[[st.SearchStrategy[Any]], Any]
NAMES = ["a", "ab", "first", "lora_A", "default", "b", "weight"]  # that begin alike, and that modules have
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@dataclass(frozen=True, kw_only=True)
class FactorConfig(AdapterConfig):
    peft_type: str = "FACTOR"


class Factor(Kind):
    """y' = y ∘ f, so W' = diag(f) W and b' = f ∘ b; it does not add, and has no inverse that merging could use."""

    config = FactorConfig

    def tensors(self, site, config):
        return {"f": Spec("factor", (site.out_features,))}

    def init(self, site, config, tensors, rng, weight):
        tensors["f"].uniform_(0.5, 1.5, generator=rng)

    def after(self, y, x, at):
        return torch.ops.aten.mul.Tensor(y, at.f)

    def changes(self, site, config):
        return ("weight", "bias") if site.has_bias else ("weight",)

    def merged(self, name, base, at):
        return base * (at.f[:, None] if name == "weight" else at.f)

    def unmerged(self, name, merged, at):
        return None


@dataclass
class Known:
    """What the arithmetic knows of an adapter: what it adds to a layer's weight, or multiplies its output by."""

    adds: bool
    at: dict[str, Tensor]
    scale: float = 1.0


@dataclass
class Arithmetic:
    """The model as formulas: the adapters by name, who is active, who is merged, whether they are switched off.

    `loaded` are those that train since they were loaded, active or not, until who is active changes.
    """

    base: dict[str, Tensor]
    adapters: dict[str, Known] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    disabled: bool = False
    loaded: set[str] = field(default_factory=set)

    @property
    def acting(self) -> list[str]:
        return list(dict.fromkeys(self.merged + ([] if self.disabled else self.active)))

    def outputs(self, x: Tensor, acting: list[str] | None = None) -> Tensor:
        for layer in LAYERS:
            y = x @ self.base[f"{layer}.weight"].T + self.base.get(f"{layer}.bias", 0)
            for known in (self.adapters[name] for name in (self.acting if acting is None else acting)):
                if layer in known.at:
                    change = known.at[layer]
                    y = y + known.scale * (x @ change.T) if known.adds else y * change
            x = torch.tanh(y)
        return x

    def can_merge(self, names: list[str]) -> bool:
        """Whether no other adapter stands between these and the base that would act on, or be acted on by, them."""
        for name in names:
            inside = self.active[: self.active.index(name)] if name in self.active else []
            for other in (self.adapters[n] for n in inside if n not in (*names, *self.merged)):
                both_add = other.adds and self.adapters[name].adds
                if not both_add and other.at.keys() & self.adapters[name].at.keys():
                    return False
        return True


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        for number, (name, sizes) in enumerate(LAYERS.items()):
            self.add_module(name, nn.Linear(*sizes, bias=number != 1))

    def forward(self, x):
        for name in LAYERS:
            x = torch.tanh(getattr(self, name)(x))
        return x


class Both:
    """A model and its arithmetic. Each step draws what it needs; what has no meaning is refused."""

    def __init__(self, draw: Draw, capture: str = "sites"):
        torch.manual_seed(draw(st.integers(0, 99)))
        model, self.x, self.draw = Three().double(), torch.randn(6, 3, dtype=torch.float64), draw
        self.bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.known = Arithmetic(dict(self.bits))
        adds, config = self.config()
        self.lora = lorafx.compile(model, config, adapter_name=NAMES[0], capture=capture)
        self.known.adapters[NAMES[0]], self.known.active = self.read(NAMES[0], adds), [NAMES[0]]
        for name in NAMES[1:3]:
            self.add(name)

    def config(self) -> tuple[bool, AdapterConfig]:
        targets = self.draw(st.lists(st.sampled_from(list(LAYERS)), min_size=1, unique=True))
        if self.draw(st.booleans()):
            r = self.draw(st.integers(1, 3))
            return True, lorafx.LoraConfig(r=r, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=False)
        return False, FactorConfig(target_modules=targets)

    def read(self, name: str, adds: bool) -> Known:
        """What an adapter that the model has just made is to do."""
        adapter, at = self.lora._lorafx.adapters[name], {}
        for layer in (site.name for site in adapter.selection):
            tensors = [self.lora.get_parameter(path).detach().clone() for path in adapter.tensors[layer].values()]
            at[layer] = ALPHA / len(tensors[0]) * tensors[1] @ tensors[0] if adds else tensors[0]
        return Known(adds, at)

    def refused(self, call: Callable[[], Any], error: type[LorafxError] = AdapterError) -> None:
        before = {path: (tensor.clone(), tensor.requires_grad) for path, tensor in self.tensors()}
        with pytest.raises(error):
            call()
        after = dict(self.tensors())
        assert before.keys() == after.keys()
        assert all(torch.equal(t, after[p]) and after[p].requires_grad == flag for p, (t, flag) in before.items())

    def tensors(self) -> list[tuple[str, Tensor]]:
        return [*self.lora.named_parameters(), *self.lora.named_buffers()]

    def name(self) -> str:
        """Mostly that of an adapter that is there."""
        return self.draw(st.sampled_from([*list(self.known.adapters) * 4, "nobody"]))

    def names(self) -> list[str]:
        return list(dict.fromkeys(self.name() for _ in range(self.draw(st.sampled_from([0, 1, 2, 2, 3])))))

    def weight(self) -> float:
        return self.draw(st.sampled_from([-1.5, 0.0, 0.5, 2.0]))

    def all_there(self, *names: str) -> bool:
        return all(name in self.known.adapters for name in names)

    def all_add(self, *names: str) -> bool:
        return self.all_there(*names) and all(self.known.adapters[name].adds for name in names)

    # --- they come and go --------------------------------------------------------------------------------------------

    def add(self, name: str = "") -> None:
        name, (adds, config) = name or self.draw(st.sampled_from(NAMES)), self.config()
        if name in self.known.adapters:
            return self.refused(lambda: self.lora.add_adapter(name, config))
        self.lora.add_adapter(name, config)
        self.known.adapters[name] = self.read(name, adds)

    def delete(self) -> None:
        name = self.name()
        if not self.all_there(name) or name in self.known.merged:
            return self.refused(lambda: self.lora.delete_adapter(name))
        self.lora.delete_adapter(name)
        del self.known.adapters[name]
        self.known.loaded.discard(name)
        if name in self.known.active:
            self.known.active.remove(name)
            self.known.loaded.clear()
            self.known.active = self.known.active or (self.known.merged or list(self.known.adapters))[:1]

    def save_and_load(self) -> None:
        name, new = self.name(), self.draw(st.sampled_from(NAMES))
        if not self.all_there(name) or self.all_there(new):
            return
        with self.saved(name) as folder:
            self.lora.load_adapter(folder, new, is_trainable=True)
        self.known.adapters[new] = Known(self.known.adapters[name].adds, self.known.adapters[name].at)
        self.known.loaded.add(new)

    @contextmanager
    def saved(self, name: str) -> Iterator[str]:
        with tempfile.TemporaryDirectory() as folder:
            self.lora.save_pretrained(folder, selected_adapters=[name])
            yield folder if name == "default" else f"{folder}/{name}"

    def combine(self) -> None:
        chosen, new = self.names(), self.draw(st.sampled_from(NAMES))
        factors = [self.weight() for _ in chosen]
        if not chosen or not self.all_add(*chosen) or self.all_there(new):
            return self.refused(lambda: self.lora.add_weighted_adapter(chosen, factors, new, "cat"), LorafxError)
        self.lora.add_weighted_adapter(chosen, factors, new, "cat")
        at: dict[str, Tensor] = {}
        for known, weight in zip((self.known.adapters[name] for name in chosen), factors):
            for layer, delta in known.at.items():
                at[layer] = at.get(layer, 0) + weight * known.scale * delta
        self.known.adapters[new] = Known(True, at)

    def swap(self) -> None:
        name, other = self.name(), self.name()
        if not self.all_add(name, other):
            return
        with self.saved(other) as folder:
            if any(self.all_add(each) for each in self.known.merged):
                self.refused(lambda: self.lora.prepare_for_hotswap(target_rank=50))
                return self.refused(lambda: self.lora.hotswap_adapter(folder, self.known.merged[0]))
            every, ranks = lorafx.LoraConfig(r=1, target_modules=list(LAYERS)), self.lora.peft_config.values()
            room = max(12, *(getattr(config, "r", 0) for config in ranks))
            self.lora.prepare_for_hotswap(target_rank=room, config=every)
            self.lora.hotswap_adapter(folder, name)
        self.known.adapters[name] = Known(True, self.known.adapters[other].at)

    # --- they act ----------------------------------------------------------------------------------------------------

    def activate(self) -> None:
        chosen = self.names()
        if not self.all_there(*chosen):
            return self.refused(lambda: self.lora.set_adapter(chosen))
        self.lora.set_adapter(chosen)
        self.known.active, self.known.merged, self.known.loaded = chosen, [], set()

    def weigh(self) -> None:
        chosen = {name: self.weight() for name in self.names()}
        if not self.all_add(*chosen):
            return self.refused(lambda: self.lora.set_adapter(chosen))
        self.lora.set_adapter(chosen)
        self.known.active, self.known.merged, self.known.loaded = list(chosen), [], set()
        for name, scale in chosen.items():
            self.known.adapters[name].scale = scale

    def scale(self) -> None:
        name, scale = self.name(), self.weight()
        if not self.all_add(name) or name in self.known.merged:
            return self.refused(lambda: self.lora.set_scale(name, scale))
        self.lora.set_scale(name, scale)
        self.known.adapters[name].scale = scale

    def rescale(self) -> None:
        factor, active = self.weight(), [self.known.adapters[name] for name in self.known.active]
        if {*self.known.active} & {*self.known.merged} or not self.all_add(*self.known.active):
            return self.refused(lambda: self.lora.rescale(factor).__enter__())
        before = [known.scale for known in active]
        with self.lora.rescale(factor):
            for known in active:
                known.scale *= factor
            torch.testing.assert_close(self.lora(self.x), self.known.outputs(self.x), **CLOSE)
        for known, scale in zip(active, before):
            known.scale = scale

    def without(self) -> None:
        with ExitStack() as stack:
            for _ in range(self.draw(st.integers(1, 3))):
                stack.enter_context(self.lora.disable_adapter())
                torch.testing.assert_close(self.lora(self.x), self.known.outputs(self.x, []), **CLOSE)
                assert not any(p.requires_grad for p in self.lora.parameters())

    def switch(self) -> None:
        if self.known.disabled:
            self.lora.enable_adapter_layers()
        else:
            self.lora.disable_adapter_layers()
            self.known.merged = []
        self.known.disabled, self.known.loaded = not self.known.disabled, set()

    # --- they are merged ---------------------------------------------------------------------------------------------

    def merge(self) -> None:
        chosen = self.draw(st.sampled_from([None, self.names(), self.known.active[-1:]]))
        if not self.all_there(*(chosen or [])):
            return self.refused(lambda: self.lora.merge_adapter(chosen))
        wanted = ([] if self.known.disabled else self.known.active) if chosen is None else chosen
        fresh = [name for name in wanted if name not in self.known.merged]
        if not self.known.can_merge(fresh):
            return self.refused(lambda: self.lora.merge_adapter(chosen), MergeError)
        before = self.known.outputs(self.x)
        self.lora.merge_adapter(chosen)
        order = {name: place for place, name in enumerate(self.known.active)}
        self.known.merged += sorted(fresh, key=lambda name: order.get(name, -1))
        if not self.known.disabled and {*fresh} <= {*self.known.active}:
            torch.testing.assert_close(self.known.outputs(self.x), before, **CLOSE)

    def unmerge(self) -> None:
        self.lora.unmerge_adapter()
        self.known.merged = []

    def holds(self) -> None:
        """What does after each step."""
        known, lora = self.known, self.lora
        torch.testing.assert_close(lora(self.x), known.outputs(self.x), **CLOSE)
        assert (lora.active_adapters, lora.merged_adapters) == (known.active, known.merged)
        assert list(lora.peft_config) == list(known.adapters)
        status = lora.get_model_status()
        acting = [] if known.disabled else known.active
        trained = {name: name in acting or name in known.loaded for name in known.adapters}
        assert status.requires_grad == trained and status.enabled is not known.disabled
        for name in filter(self.all_add, known.adapters):  # also of those that do not act
            adapter, at = lora._lorafx.adapters[name], known.adapters[name]
            for site in adapter.selection:
                expected = at.scale * at.at.get(site.name, torch.zeros(site.weight_shape, dtype=torch.float64))
                torch.testing.assert_close(change(lora, name, site)["weight"], expected, **CLOSE)
        if not known.merged:
            base = lora._lorafx.base.state_dict()
            assert all(torch.equal(base[name], tensor) for name, tensor in self.bits.items())


STEPS = [Both.add, Both.delete, Both.save_and_load, Both.combine, Both.swap, Both.activate, Both.weigh, Both.scale]
STEPS += [Both.rescale, Both.without, Both.switch, Both.unmerge, Both.combine, *[Both.activate, Both.merge] * 3]


@pytest.fixture(autouse=True)
def known():
    kinds.register(Factor)
    yield
    kinds.KINDS.pop("FACTOR")


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), count=st.integers(10, 30))
@pytest.mark.filterwarnings("ignore")
def test_outputs_are_what_arithmetic_says_in_each_order(data, count):
    both = Both(data.draw)
    both.holds()
    for _ in range(count):
        step = data.draw(st.sampled_from(STEPS))
        note(step.__name__)
        step(both)
        both.holds()
