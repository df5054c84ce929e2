"""What test_distributed.py starts in several processes: train sharded or replicated, compare with one process, save."""

from __future__ import annotations

import sys
from pathlib import Path

import accelerate
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.fsdp import fully_shard

import lorafx

STEPS, BATCH = 3, 4


def fresh() -> lorafx.AdaptedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "use_cache": False}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    config = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
    return lorafx.compile(model, config, random_state=0)


def train(
    model: nn.Module, rank: int = 0, world: int = 1, accelerator: accelerate.Accelerator | None = None
) -> list[float]:
    """Losses over the whole batch, of which each process gets its part."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for step in range(STEPS):
        ids = torch.randint(0, 64, (BATCH, 9), generator=torch.Generator().manual_seed(step))[rank::world]
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        accelerator.backward(loss) if accelerator is not None else loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def main(folder: Path, *ways: str) -> None:
    accelerator = accelerate.Accelerator()  # sets up the processes, for the other ways too
    assert dist.get_world_size() == 2
    alone = fresh()
    expected = train(alone)
    for way in ways:
        try_out(way, folder / way, accelerator if way == "accelerate" else None, alone, expected)
    dist.destroy_process_group()


def try_out(
    way: str,
    folder: Path,
    accelerator: accelerate.Accelerator | None,
    alone: lorafx.AdaptedModel,
    expected: list[float],
) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    lora = fresh()
    model: nn.Module = lora
    if way == "ddp":
        model = nn.parallel.DistributedDataParallel(lora)
    elif way == "fsdp":
        for layer in lora.blocks:
            fully_shard(layer)
        fully_shard(lora)
    found = train(model, rank, world, accelerator)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0, msg=way)
    assert len(set(found)) == STEPS and [call.hits for call in lora.explain().calls] == [STEPS - 1], way
    assert_saved(lora, alone, folder / f"rank{rank}")
    assert_state_goes_on(lora, folder / "state")
    dist.barrier()


def assert_saved(lora: lorafx.AdaptedModel, alone: lorafx.AdaptedModel, folder: Path) -> None:
    """What each process saves, and what the first one does for all, is the adapter that one alone has trained."""
    lora.save_pretrained(folder)
    lora.save_pretrained(folder.parent / "main", is_main_process=dist.get_rank() == 0)
    saved = lorafx.load(fresh().unload(), folder)
    for name, parameter in saved.named_parameters():
        torch.testing.assert_close(parameter, alone.get_parameter(name), rtol=1e-4, atol=1e-6)


def assert_state_goes_on(lora: lorafx.AdaptedModel, folder: Path) -> None:
    """A distributed checkpoint gives back every value."""
    before = {name: value.clone() for name, value in lora.state_dict().items()}
    checkpoint.save(lora.state_dict(), checkpoint_id=folder)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.zero_()
    state = lora.state_dict()
    checkpoint.load(state, checkpoint_id=folder)
    lora.load_state_dict(state)
    for name, value in lora.state_dict().items():
        whole, then = (getattr(t, "full_tensor", lambda t=t: t)() for t in (value, before[name]))
        assert torch.equal(whole, then), name


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
