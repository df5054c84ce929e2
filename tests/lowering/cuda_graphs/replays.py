"""Models with and without CUDA graphs, and training steps to compare.

By tapes on a CPU, where they give the same bits; on a GPU, where there is one, by CUDA graphs. There rounding differs
with dropout, whose mask is kept by a recording and drawn again by a call that runs as it is: sums of at most 96
products.
"""

import torch
from models import llama
from tape import TapeDevice
from torch import nn
from torch.nn import functional as F

import lorafx
from lorafx.lowering.cuda_graphs import Cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Recorder = Cuda if DEVICE == "cuda" else TapeDevice


class Tiny(nn.Module):
    """(rows, tokens) ids or (rows, tokens, 48) embeddings -> a loss, if there are labels, and logits of 90 classes."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(90, 48), nn.Linear(48, 90, bias=False)
        self.q_proj, self.down_proj = nn.Linear(48, 80), nn.Linear(80, 48)

    def forward(self, input_ids=None, labels=None, inputs_embeds=None):
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        logits = self.head(x + self.down_proj(F.silu(self.q_proj(x))))
        return {"logits": logits} | ({} if labels is None else {"loss": F.cross_entropy(logits.mT, labels)})


def made(mode, dropout=0.0, model=Tiny, **options):
    """An adapted model with values in B, the same each time."""
    config = {"r": 2, "target_modules": ["q_proj", "down_proj"], "lora_dropout": dropout, "init_lora_weights": False}
    options = {"backend": "eager", "mode": mode, "random_state": 0, **options}
    torch.manual_seed(0)
    return lorafx.compile(model().to(DEVICE), config, **options).train()


def both(**options):
    """The model without and with CUDA graphs."""
    return made(None, **options), made("reduce-overhead", **options)


def layers():
    return llama()


def launched(lora) -> str:
    """What is said of the kind of call that came last."""
    return lora.explain().calls[-1].cuda_graph


def ids(seed: int, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 90, (2, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def gradients(lora) -> list[torch.Tensor]:
    return [p.grad for p in lora.parameters() if p.requires_grad]


def assert_same(one: list, other: list) -> None:
    assert len(one) == len(other) > 0
    limit = 0 if DEVICE == "cpu" else 96 * torch.finfo(torch.float32).eps
    for a, b in zip(one, other):
        assert (a - b).abs().max() <= limit * a.abs().max()


def loss_of(lora, n: int) -> torch.Tensor:
    return lora(input_ids=ids(n), labels=ids(n))["loss"]


def trained(lora, losses=loss_of, steps: int = 5) -> list[torch.Tensor]:
    """What some steps give: `losses(lora, step)` is what is trained on; gradients add up over two steps."""
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=0.1)
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = losses(lora, step)
        loss.backward()
        found += [loss.detach(), *(g.clone() for g in gradients(lora) if g is not None)]
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    return found


def decoded(lora, cache, tokens: int) -> list[torch.Tensor]:
    """Logits of tokens one by one, after a prefix of four."""
    lora(input_ids=torch.arange(4, device=DEVICE)[None], past_key_values=cache, use_cache=True)
    found = []
    for at in range(4, 4 + tokens):
        one = torch.tensor([[at]], device=DEVICE)
        output = lora(input_ids=one, position_ids=one, past_key_values=cache, use_cache=True)
        assert output.past_key_values is cache
        found.append(output.logits)
    return found
