"""What a call depends on, and what it does, besides its tensors: an adapted model behaves like the merged plain one."""

from __future__ import annotations

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
import transformers
from graphs import Chain, adapted
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorafx
from lorafx.errors import AdapterError, CaptureError

SERVED = ("graph", "sites")


def twins(model: nn.Module, **config):
    """An adapted model, and a plain one that computes the same with the same Python."""
    lora = adapted(model.double(), **config)
    return lora, copy.deepcopy(lora).merge_and_unload()


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def served(lora):
    return [call.served_by for call in lora.explain().calls]


class Node:
    """A config of somebody's own."""

    def __init__(self):
        self.offset = 0.0


class Attributes(Chain):
    """A model whose forward reads attributes of many sorts, its own and inner modules'."""

    def __init__(self):
        super().__init__()
        self.scale, self.shifts, self.options = 1.0, [0.5, 1.5], {"power": 1}
        self.cfg = SimpleNamespace(inner=SimpleNamespace(flag=False))
        self.node, self.used_in_training = Node(), ["a list"]
        self.drop = nn.Dropout(0.5)
        self.drop.tag = "a"
        self.register_buffer("mask", torch.ones(3))

    def forward(self, x):
        y = super().forward(x) * self.scale + sum(self.shifts)
        y = self.drop(y ** self.options["power"]) * self.mask.sum()
        return y + (1 if self.cfg.inner.flag else 0) + len(self.drop.tag) + self.node.offset


CHANGES = {
    "a float": lambda m: setattr(m, "scale", 100.0),
    "a list": lambda m: m.shifts.append(3.0),
    "a dict": lambda m: m.options.update(power=2),
    "a config of somebody's own": lambda m: setattr(m.node, "offset", 3.0),
    "a nested config": lambda m: setattr(m.cfg.inner, "flag", True),
    "a string of an inner module": lambda m: setattr(m.drop, "tag", "longer"),
    "a buffer's shape": lambda m: setattr(m, "mask", torch.ones(5)),
    "a forward": lambda m: setattr(m.drop, "forward", lambda y: y + 7),
    "a new attribute": lambda m: setattr(m.drop, "forward", torch.neg),
    "a module": lambda m: setattr(m, "drop", Tagged()),
}


class Tagged(nn.Tanh):
    tag = "class"


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_modules_hold_is_seen(change):
    lora, plain = twins(Attributes())
    x = random(5, 4)
    for model in (lora, plain):
        model.eval()
        model(x)
        CHANGES[change](model)
    torch.testing.assert_close(lora(x), plain(x))
    assert served(lora) == ["graph", "graph"]


def test_it_says_which_attribute_changed():
    lora, x = adapted(Attributes()), torch.randn(5, 4)
    lora(x)
    lora.scale = 2.0
    lora.cfg.inner.flag = True
    lora(x)
    assert set(lora.explain().calls[-1].why.split("; ")) == {"the attribute scale", "the attribute cfg.inner.flag"}


def test_an_attribute_that_keeps_changing_is_left_to_the_models_python():
    lora, plain = twins(Attributes())
    x = random(5, 4)
    for step in range(9):
        for model in (lora.eval(), plain.eval()):
            model.scale = step / 2
        torch.testing.assert_close(lora(x), plain(x))
    assert served(lora).count("graph") == 5 and served(lora)[-1] == "sites"
    assert "the attribute scale keeps changing" in lora.explain().calls[-1].reason


def test_dropout_that_is_switched_off_drops_nothing():
    lora, x = adapted(Attributes()), torch.randn(64, 4)
    lora(x)
    lora.drop.p = 0.0
    assert torch.equal(lora(x), lora(x))


class Stateful(Chain):
    """A model that remembers."""

    def __init__(self):
        super().__init__()
        self.last, self.history, self.counts = None, [], {"calls": 0}

    def forward(self, x, notes=None):
        h = super().forward(x)
        if self.last is not None:
            h = h + self.last
        self.last = h.detach()
        self.history.append(h.detach())
        self.counts["calls"] += 1
        self.loss = h.sum()
        return h * self.counts["calls"]


def test_what_a_model_remembers_is_remembered():
    lora, plain = twins(Stateful())
    with pytest.warns(UserWarning, match="changes"):
        lora(torch.zeros(2, 4, dtype=torch.float64))
    plain(torch.zeros(2, 4, dtype=torch.float64))
    for x in (random(5, 4)[:2], random(2, 4), random(2, 4)):
        torch.testing.assert_close(lora(x), plain(x))
    assert lora.counts == {"calls": 4} and len(lora.history) == 4 and lora.loss.shape == ()
    assert all(type(h) is torch.Tensor for h in lora.history)
    assert served(lora) == ["sites", "sites"], "the second try said that it does so each time"


class Settling(Chain):
    """A model that prepares something once."""

    prepared = False

    def forward(self, x):
        if not self.prepared:
            self.prepared, self.offset = True, 2.0
        return super().forward(x) + self.offset


def test_what_a_model_settles_once_is_settled_by_its_own_python():
    lora, plain = twins(Settling())
    x = random(5, 4)
    with pytest.warns(UserWarning, match="changes"):
        torch.testing.assert_close(lora(x), plain(x))
    torch.testing.assert_close(lora(x), plain(x))
    assert lora.prepared and served(lora) == ["sites", "graph"]


def test_a_capture_that_fails_leaves_the_models_containers_alone():
    model = Stateful()
    lora = adapted(model)
    with pytest.raises(CaptureError, match="changes"):
        lorafx.compile(Stateful(), {"target_modules": ["first"]}, capture="graph")(torch.randn(2, 4))
    with pytest.warns(UserWarning, match="changes"):
        lora(torch.randn(2, 4))
    assert len(lora.history) == 1 and type(lora.history[0]) is torch.Tensor


class Notes(Chain):
    """A model that writes into what it is given."""

    def forward(self, x, notes, log):
        notes["hidden"] = h = super().forward(x)
        log.append([h.shape[0], notes.get("before")])
        return h, notes


def test_containers_that_are_given_are_filled():
    lora, plain = twins(Notes())
    x, results = random(5, 4), []
    for model in (lora, lora, plain):
        notes, log = {"before": torch.ones(2)}, []
        output, returned = model(x, notes, log=log)
        assert returned is notes and notes["hidden"] is not None and log[0][1] is notes["before"]
        results.append((output, notes["hidden"], log[0][0]))
    assert served(lora) == ["graph"]
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


class Averaging(Chain):
    """A model that keeps statistics of which it uses nothing in the same call."""

    def __init__(self, way):
        super().__init__()
        self.way, self.norm = way, nn.BatchNorm1d(6)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        h = self.first(x)
        if self.way == "no_grad":
            with torch.no_grad():
                self.mean.mul_(0.9).add_(h.mean(0) * 0.1)
        else:
            self.norm(h)
        return self.second(h)


@pytest.mark.parametrize("way", ["no_grad", "norm"])
def test_statistics_are_kept_though_nobody_uses_them(way):
    lora, plain = twins(Averaging(way))
    for x in (random(5, 4), random(5, 4)):
        torch.testing.assert_close(lora(x), plain(x))
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(lora.get_buffer(name), buffer, msg=name)
    assert served(lora) == ["graph"]


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    lora = lorafx.compile(model, {"target_modules": ["q_proj"], "init_lora_weights": False})
    return lora.eval(), copy.deepcopy(lora).merge_and_unload().eval()


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_the_callers_cache_is_filled(llama, static):
    ids = torch.randint(3, 50, (2, 8))
    logits = []
    for model in llama:
        config = model.config
        cache = transformers.StaticCache(config=config, max_cache_len=16) if static else transformers.DynamicCache()
        model(input_ids=ids[:, :6], past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 6
        for step in (6, 7):
            output = model(input_ids=ids[:, step : step + 1], past_key_values=cache, use_cache=True)
            assert output.past_key_values is cache and cache.get_seq_length() == step + 1
        logits.append(output.logits)
    torch.testing.assert_close(*logits)


@pytest.mark.slow
@torch.no_grad()
def test_an_integer_that_means_something_else_as_a_symbol_stays_a_constant(llama):
    lora, plain = llama
    ids = torch.randint(3, 50, (2, 9))
    for keep in (2, 3, 4, 2, 5):
        torch.testing.assert_close(
            lora(input_ids=ids, logits_to_keep=keep).logits, plain(input_ids=ids, logits_to_keep=keep).logits
        )


@pytest.mark.parametrize("kind", ["full backward", "full backward pre", "global"])
def test_every_hook_is_called(kind):
    lora, x, calls = adapted(Chain()), torch.randn(5, 4), []
    lora(x).sum().backward()

    def hook(module, *args):
        calls.append(module)

    register = {
        "full backward": lora.first.register_full_backward_hook,
        "full backward pre": lora.first.register_full_backward_pre_hook,
        "global": nn.modules.module.register_module_forward_hook,
    }[kind]
    handle = register(hook)
    lora(x).sum().backward()
    handle.remove()
    assert any(module is lora.first for module in calls)
    before = len(calls)
    lora(x).sum().backward()
    assert len(calls) == before and served(lora)[-1] == "graph", "the graph that was kept serves again"


def test_a_librarys_hook_that_comes_and_goes_acts_meanwhile():
    def noise(module, args, output):
        return output + 10

    noise.__module__ = "transformers.integrations.neftune"
    lora, x = adapted(Chain()).eval(), torch.randn(5, 4)
    before = lora(x)
    handle = lora.second.register_forward_hook(noise)
    torch.testing.assert_close(lora(x), before + 10)
    handle.remove()
    assert torch.equal(lora(x), before)


def test_a_base_parameter_that_the_user_trains_stays_trained():
    lora = adapted(Chain())
    lora.second.bias.requires_grad_(True)
    for x in (torch.randn(5, 4), torch.randn(1, 4), torch.randn(2, 5, 4)):
        lora.zero_grad()
        lora(x).sum().backward()
        assert lora.second.bias.grad is not None and lora.second.weight.grad is None


def test_a_kept_graph_runs_while_another_thread_captures():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    expected, wrong, stop = lora(x).detach(), [], threading.Event()

    def run():
        while not stop.is_set():
            try:
                output = lora(x).detach()
                if type(output) is not torch.Tensor or not torch.equal(output, expected):
                    wrong.append(output)
            except Exception as error:
                wrong.append(error)

    others = [threading.Thread(target=run) for _ in range(2)]
    for thread in others:
        thread.start()
    for dims in range(2, 6):
        lora(torch.randn(*[2] * dims, 4))
    stop.set()
    for thread in others:
        thread.join()
    assert wrong == []


def test_first_calls_from_several_threads_make_one_graph():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    results: list = []
    threads = [threading.Thread(target=lambda: results.append(lora(x).detach())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, results[0]) for result in results)
    assert served(lora) == ["graph"]


class Region(Chain):
    """A model that runs a site in other modes than its own, or hands its weight out."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, x):
        h = torch.relu(self.first(x))
        if self.way == "no_grad":
            with torch.no_grad():
                return self.second(h)
        if self.way == "autocast":
            with torch.autocast("cpu", enabled=False):
                return self.second(h)
        return self.second(h), self.second.weight


@pytest.mark.parametrize("way", ["no_grad", "autocast", "weight"])
def test_a_site_in_a_region_of_its_own_acts(way):
    lora, plain = twins(Region(way))
    x = random(5, 4)
    with pytest.warns(UserWarning, match="site second"):
        ours = lora(x)
    ours, theirs = (output[0] if way == "weight" else output for output in (ours, plain(x)))
    torch.testing.assert_close(ours, theirs)


class Modes(Chain):
    def forward(self, x, **more):
        y = super().forward(x)
        for power, value in enumerate(more.values(), 1):
            y = y + value**power
        return y + 1 if torch.is_grad_enabled() else y - 1


def test_gradient_modes_are_as_the_caller_set_them():
    lora, plain = twins(Modes())
    x = random(5, 4)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            torch.testing.assert_close(lora(x), plain(x))


def test_further_keywords_keep_their_order():
    lora, plain = twins(Modes())
    x, a, b = random(5, 4), torch.tensor(2.0), torch.tensor(3.0)
    torch.testing.assert_close(lora(x, b=b, a=a), plain(x, b=b, a=a))
    torch.testing.assert_close(lora(x, a=a, b=b), plain(x, a=a, b=b))


def test_a_call_that_the_model_refuses_leaves_nothing_behind(recwarn):
    lora, x = adapted(Chain()), torch.randn(5, 4)
    with pytest.raises(TypeError, match="unexpected keyword"):
        lora(xx=x)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        lora(torch.randn(5, 7))
    lora(x)
    assert served(lora) == ["graph"] and not recwarn.list


def test_a_hook_that_came_and_went_leaves_nothing_behind():
    lora = adapted(Chain())
    handle = lora.first.register_forward_hook(lambda *args: None)
    lora(torch.randn(5, 4))
    handle.remove()
    lora(torch.randn(2, 5, 4))
    assert served(lora) == ["sites", "graph"]


def test_the_first_call_may_be_checkpointed_or_transformed():
    x = random(5, 4)
    lora, plain = twins(Chain())
    expected = plain(x)
    checkpoint(adapted(Chain()), x.float().requires_grad_(), use_reentrant=False).sum().backward()
    torch.testing.assert_close(torch.func.vmap(lora)(x[:, None])[:, 0], expected)
    lora._lorafx.dispatcher.clear()
    jacobian = torch.func.jacrev(lambda t: lora(t).sum(0))(x)
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda t: plain(t).sum(0))(x))
    lora._lorafx.dispatcher.clear()
    zero = {name: torch.zeros_like(p) for name, p in lora.named_parameters() if "lora_" in name}
    torch.testing.assert_close(torch.func.functional_call(lora, zero, (x,)), lora._lorafx.base(x))


def test_a_site_that_was_taken_away_is_named():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    lora(x)
    lora.first = nn.Linear(4, 6)
    with pytest.raises(AdapterError, match="first: replaced or taken away"):
        lora(x)
    lora.delete_adapter("default")
    assert lora(x).shape == (5, lora.second.out_features)


class Plain(Chain):
    """A tensor that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.factor = torch.ones(3)

    def forward(self, x):
        return super().forward(x) * self.factor.sum()


def test_a_plain_tensor_of_the_root_is_read_when_the_graph_runs():
    lora, x = adapted(Plain()), torch.randn(5, 4)
    before = lora(x)
    lora.factor = 2 * torch.ones(3)
    torch.testing.assert_close(lora(x), 2 * before)
    assert served(lora) == ["graph"]


class Casting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype)).float()
        return x


def test_a_cast_of_a_module_in_the_middle_is_seen():
    lora, plain = twins(Casting(), target_modules=["0", "1", "2", "3"])
    x = random(5, 4)
    lora(x)
    lora.layers[1].double()
    plain.layers[1].double()
    torch.testing.assert_close(lora(x), plain(x))


def test_a_slice_of_a_sequential_is_plain_and_adapted():
    lora = adapted(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), target_modules=["0", "2"])
    x = torch.randn(5, 4)
    part = lora[:2]
    assert not isinstance(part, lorafx.AdaptedModel)
    torch.testing.assert_close(lora[2](part(x)), lora(x))


class Counting(Chain):
    """A model that counts its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_states_that_were_long_ago_are_forgotten():
    lora, x = adapted(Counting()), torch.randn(5, 4)
    with pytest.warns(UserWarning, match="it changes calls"):
        lora(x)
    for _ in range(300):
        lora(x)
    watch = lora._lorafx.dispatcher.layout.watch
    assert len(watch._states) <= 256 and lora.calls == 301 and served(lora) == ["sites", "sites"]
