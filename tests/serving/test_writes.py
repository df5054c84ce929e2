"""What a call writes: into containers that it is given, into the caller's cache, into buffers."""

import pytest
import torch
import transformers
from graphs import Chain
from serving_models import random, served, twins
from torch import nn


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


@pytest.mark.slow
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
