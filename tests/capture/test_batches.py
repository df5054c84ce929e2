"""Batches as tokenizers give them: a graph for all of them; and objects that no graph can be given."""

import gc
import weakref
from collections import UserDict

import pytest
import torch
from graphs import adapted
from torch import nn
from transformers import BatchEncoding

import lorafx
from lorafx.errors import CaptureError


class Embedder(nn.Module):
    """Puts what it finds into the batch that it is given, as models of sentence-transformers do."""

    def __init__(self):
        super().__init__()
        self.words, self.up = nn.Embedding(50, 6), nn.Linear(6, 9)

    def forward(self, batch):
        batch["found"] = self.up(self.words(batch["input_ids"])).mean(1)
        return batch


def batch(seed: int, rows: int = 3) -> BatchEncoding:
    ids = torch.randint(0, 50, (rows, 7), generator=torch.Generator().manual_seed(seed))
    made = BatchEncoding({"input_ids": ids}, n_sequences=1)
    made._encodings = [f"the encodings of {seed}"]
    return made


def test_batches_of_a_tokenizer_are_one_kind_of_call():
    model = Embedder().eval()
    lora = adapted(model, target_modules=["up"]).eval()
    lora.graph(batch(0))
    for seed, rows in ((1, 3), (2, 5)):
        given = batch(seed, rows)
        assert lora(given) is given and given._encodings == [f"the encodings of {seed}"]
        with torch.no_grad():
            words = model.words(given["input_ids"])
            update = words @ lora.up.lora_A.default.weight.T @ lora.up.lora_B.default.weight.T
        torch.testing.assert_close(given["found"].detach(), (model.up(words) + 3 * update).mean(1))
    first = lora.explain().calls[0]
    assert (first.served_by, first.hits) == ("graph", 2)


def test_what_a_model_notes_on_a_batch_is_there_after_a_graph():
    class Scaled(UserDict):
        def __getitem__(self, name):
            return 2 * self.data[name]

    class Counts(nn.Sequential):
        def forward(self, batch):
            batch.calls, batch["y"] = batch.calls + 1, super().forward(batch["x"])

    x = torch.randn(4, 5)
    for capture in ("graph", "sites"):
        lora = lorafx.compile(Counts(nn.Linear(5, 3)), {"target_modules": ["0"]}, capture=capture)
        given = Scaled(x=x)
        given.calls = 3
        lora(given)
        torch.testing.assert_close(given.data["y"], lora[0](2 * x))
        assert given.calls == 4 and given.data["x"] is x


def test_a_model_that_reads_encodings_has_no_graph():
    class Reader(Embedder):
        def forward(self, batch):
            return super().forward(batch)["found"] * len(batch._encodings[0])

    lora = adapted(Reader(), target_modules=["up"])
    with pytest.raises(CaptureError):
        lora.graph(batch(0))
    assert lora(batch(1)).shape == (3, 9)


def test_objects_that_no_graph_can_be_given_are_one_kind_and_not_kept():
    class Bag:
        def __init__(self):
            self.x = torch.randn(4, 5)

    class Opens(nn.Sequential):
        def forward(self, bag):
            return super().forward(bag.x)

    lora = adapted(Opens(nn.Linear(5, 3)))
    kept = [weakref.ref(bag) for bag in (Bag(), Bag()) if lora(bag).shape == (4, 3)]
    gc.collect()
    assert [ref() for ref in kept] == [None, None] and len(lora.explain().calls) == 1
    lora(type("Box", (Bag,), {})())
    assert "any Bag → any Box" in str(lora.explain().calls[1])


def test_a_function_or_a_dtype_is_part_of_the_kind():
    """They may decide what a call computes; torch.export takes them as constants, or may in another release."""

    class Applies(nn.Sequential):
        def forward(self, x, function, dtype):
            return function(super().forward(x)).to(dtype)

    lora, x = adapted(Applies(nn.Linear(5, 3))), torch.randn(4, 5)
    one, other = (lambda x: -x), (lambda x: x)
    for function, dtype in ((one, torch.float64), (other, torch.float64), (one, torch.float32)):
        assert lora(x, function, dtype).dtype == dtype
    assert len(lora.explain().calls) == 3
