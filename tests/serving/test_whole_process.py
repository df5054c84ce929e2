"""The whole process: what leaves a call finds its way back, and who only imports lorafx keeps what there is."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lorafx


class Leaving(nn.Module):
    """(n, 6) -> (n, 4): a thread reads the first weight, and what is checkpointed the second."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 10, bias=False), nn.Linear(10, 4, bias=False)

    def forward(self, x):
        found = []
        thread = threading.Thread(target=lambda: found.append(F.linear(x, self.first.weight)))
        thread.start()
        thread.join()
        return checkpoint(lambda h: torch.tanh(F.linear(h, self.second.weight)), found[0], use_reentrant=False)


def gradients(lora, x):
    lora(x).square().sum().backward()
    return {name: p.grad for name, p in lora.named_parameters() if p.grad is not None}


SCRIPT = """
import sys, threading, torch
from torch.utils.checkpoint import CheckpointFunction, _CheckpointFrame

def replaced():
    checkpoints = CheckpointFunction.forward, _CheckpointFrame.__init__
    return threading.Thread.start, *checkpoints, torch._C.ScriptFunction.__call__

before = replaced()
import lorafx
from test_whole_process import gradients
assert replaced() == before
lora, x, expected = torch.load(sys.argv[1], weights_only=False)
found = gradients(lora, x)
assert found.keys() == expected.keys() and len(found) == 4
torch.testing.assert_close(found, expected)
"""


@pytest.mark.slow
def test_a_model_that_a_fresh_process_loads_has_what_it_needs(tmp_path):
    config = {"r": 2, "target_modules": ["first", "second"], "init_lora_weights": False}
    lora, x = lorafx.compile(Leaving(), config, random_state=0, capture="sites"), torch.randn(5, 6)
    torch.save((lora, x, gradients(lora, x)), tmp_path / "model")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "model"], check=True, env=environment)
