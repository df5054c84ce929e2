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


def main(how: str, folder: Path) -> None:
    accelerator = accelerate.Accelerator() if how == "accelerate" else None
    if accelerator is None:
        dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    alone = fresh()
    expected = train(alone)
    lora = fresh()
    model: nn.Module = lora
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(lora)
    elif how == "fsdp":
        for layer in lora.blocks:
            fully_shard(layer)
        fully_shard(lora)
    found = train(model, rank, world, accelerator)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=0)
    assert len(set(found)) == STEPS and [call.hits for call in lora.explain().calls] == [STEPS - 1]

    lora.save_pretrained(folder / f"rank{rank}")
    saved = lorafx.load(fresh().unload(), folder / f"rank{rank}")
    for name, parameter in saved.named_parameters():
        torch.testing.assert_close(parameter, alone.get_parameter(name), rtol=1e-4, atol=1e-6)

    before = {name: value.clone() for name, value in lora.state_dict().items()}
    checkpoint.save(lora.state_dict(), checkpoint_id=folder / "state")
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.zero_()
    state = lora.state_dict()
    checkpoint.load(state, checkpoint_id=folder / "state")
    lora.load_state_dict(state)
    for name, value in lora.state_dict().items():
        whole, then = (getattr(t, "full_tensor", lambda t=t: t)() for t in (value, before[name]))
        assert torch.equal(whole, then), name
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
