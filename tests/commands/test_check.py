"""`lorafx check`: a verdict for a base and an adapter."""

import importlib
import json

import pytest
import torch

from lorafx.__main__ import main
from lorafx.commands import check
from lorafx.commands.adapted import base_of
from lorafx.commands.check import Subject
from lorafx.passes import ElideDropout, FuseLora

# As for users, who get no graph for a first call unless they ask for one.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("early")]
aten = torch.ops.aten


@pytest.fixture
def config(tmp_path):
    """A config's file, for an adapter that is not there yet."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"r": 2, "target_modules": ["down_proj"], "lora_dropout": 0.5}))
    return str(file)


def test_check_holds_for_a_sound_pair(on_disk, capsys, monkeypatch):
    folder, _ = on_disk
    monkeypatch.setattr(check, "_SIZES", ((2, 9), (2, 1)))  # a graph each, for each of what is checked
    assert main(["check", str(folder / "base"), str(folder / "adapter"), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert len(results) == 9 and all(each["holds"] for each in results)


def test_what_does_not_hold_is_said_with_a_status(on_disk, config, capsys, monkeypatch):
    def fails():
        raise RuntimeError("a wrong graph\nand more")

    monkeypatch.setattr(Subject, "tests", lambda self: iter([("this", lambda: None), ("that", fails)]))
    assert main(["check", str(on_disk[0] / "base"), config]) == 1
    printed = capsys.readouterr().out
    assert "│ this  │ holds " in printed and "│ that  │ RuntimeError: a wrong graph │" in printed


def _doubled(gm):
    """The scaling of each adapted linear, twice."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.lorafx.lora_linear.default):
        node.args = (*node.args[:6], 2 * node.args[6], *node.args[7:])


def _without_dropout(gm):
    for node in gm.graph.find_nodes(op="call_function", target=aten.dropout.default):
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)


@pytest.mark.parametrize(
    ("check", "broken", "fault"),
    [
        ("a plain model with W + ΔW for weights gives the same", FuseLora, _doubled),
        ("in training, graph and sites draw the same and give the same", ElideDropout, _without_dropout),
    ],
)
def test_a_pass_that_is_wrong_is_seen(on_disk, config, monkeypatch, check, broken, fault):
    sound = broken.rewrite
    monkeypatch.setattr(broken, "rewrite", lambda self, gm, context: sound(self, gm, context) + (fault(gm) or 0))
    with pytest.raises(AssertionError, match="rounding explains"):
        dict(Subject(base_of(str(on_disk[0] / "base")).eval(), config).tests())[check]()


def test_a_gradient_that_is_wrong_is_seen(on_disk, config, monkeypatch):
    operator = importlib.import_module("lorafx.ops.lora_linear")
    sound = operator._gradients

    def wrong(*given):
        found = sound(*given)
        return found._replace(lora_B=None if found.lora_B is None else 1.5 * found.lora_B)

    monkeypatch.setattr(operator, "_gradients", wrong)
    with pytest.raises(AssertionError, match="backward gives"):
        dict(Subject(base_of(str(on_disk[0] / "base")).eval(), config).tests())[
            "gradients are what outputs change by"
        ]()


def test_an_adapter_that_waits_is_invoked_and_layers_are_those_that_were_asked_for(on_disk, config, monkeypatch):
    monkeypatch.setattr(check, "_SIZES", ((2, 9), (2, 1)))
    fields = {"target_modules": ["down_proj"], "alora_invocation_tokens": [3, 4], "layer_replication": [[0, 1], [0, 1]]}
    with open(config, "w") as file:
        json.dump(fields, file)
    subject = Subject(base_of(str(on_disk[0] / "base")).eval(), config)
    subject.capture, subject.lora = "sites", subject._adapted("sites")
    tests = dict(subject.tests())
    tests["switched off, the adapter leaves the base's outputs"]()
    tests["gradients are what outputs change by"]()


def test_an_adapter_that_takes_from_its_base_is_held_to_what_it_left(on_disk, config):
    with open(config, "w") as file:
        json.dump({"target_modules": ["down_proj"], "kasa_config": {}}, file)
    subject = Subject(base_of(str(on_disk[0] / "base")).eval(), config)
    subject.capture, subject.lora = "sites", subject._adapted("sites")
    subject._is_the_base_when_off()
    weights = (model.model.layers[0].mlp.down_proj.weight for model in (subject.lora, subject.plain))
    assert not torch.equal(*weights)
