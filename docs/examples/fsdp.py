"""FSDP: train an adapter in several processes that share a frozen base, each holding a part; then as one process does.

Offline, in half a minute on two CPU cores. Started plainly it starts itself again by torchrun, once a process. Losses
have to be those of one process that is given whole batches, and what is saved has to be one whole adapter. A run that
exits with 0 is a test that passed.

    python docs/examples/fsdp.py
    python docs/examples/fsdp.py --way ddp                             # the base whole in each process
    torchrun --nproc-per-node 8 docs/examples/fsdp.py --hidden 4096 --layers 8 --length 2048    # eight GPUs
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.run import main as torchrun
from transformers import LlamaConfig, LlamaForCausalLM

import lorafx

CLOSE = 1e-4  # of losses relative to one process's, float32: a mean of two halves rounds elsewhere than one of all
VOCABULARY = 512

Row = tuple[str, str, bool | None]  # what, its value, and whether it is as promised (None: nothing was)


def main() -> None:
    options = parse_options()
    if "RANK" not in os.environ:
        torchrun(["--nproc-per-node", str(options.processes), __file__, *sys.argv[1:]])
        return
    device = set_up()
    base = small_decoder(options).to(device)
    alone, _ = train(adapted(copy.deepcopy(base), options), options, device)

    lora = adapted(base, options)
    whole = sum(parameter.numel() for parameter in lora.parameters())
    model: nn.Module = lora
    if options.way == "fsdp":
        for layer in lora.blocks:  # what repeats: the decoder's layers
            fully_shard(layer)
        fully_shard(lora)
    else:
        model = nn.parallel.DistributedDataParallel(lora)
    losses, seconds = train(model, options, device, dist.get_rank(), dist.get_world_size())
    held = sum(local(parameter).numel() for parameter in lora.parameters())
    tensors = saved(lora)
    apart = max(abs(a - b) / b for a, b in zip(losses, alone))
    if dist.get_rank() == 0:
        print(lora.explain())
    report(
        ("trained", "{:,} of {:,} numbers".format(*lora.get_nb_trainable_parameters()), None),
        ("loss before → after", f"{losses[0]:.3f} → {losses[-1]:.3f}", None),
        ("losses, of one process's", f"{apart:.1e} apart at most", apart < CLOSE),
        ("numbers in each process", f"{held:,} of {whole:,}", options.way == "ddp" or held < 0.6 * whole),
        ("tensors in the file, whole", str(tensors), tensors == 2 * len(lora.sites)),
        ("a step, ms", f"{1e3 * seconds:.0f}", None),
    )
    dist.destroy_process_group()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--way", choices=("fsdp", "ddp"), default="fsdp", help="(default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="of all processes together (default: %(default)s)")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=128, help="width of the base (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    return parser.parse_args()


def set_up() -> torch.device:
    """Join the other processes; the device of this one."""
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    if not cuda:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def small_decoder(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": options.hidden, "intermediate_size": 3 * options.hidden, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=options.layers, **sizes))


def adapted(base: nn.Module, options: argparse.Namespace) -> lorafx.AdaptedModel:
    """Adapted before it is sharded, from the same start in each process."""
    config = {
        "r": options.rank,
        "lora_alpha": 2 * options.rank,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    return lorafx.compile(base, config, random_state=0).train()


def train(
    model: nn.Module, options: argparse.Namespace, device: torch.device, rank: int = 0, world: int = 1
) -> tuple[list[float], float]:
    """Each step's loss over the whole batch, of which this process gets its part, and the median of their seconds."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses, seconds = [], []
    for step in range(options.steps):
        start = time.perf_counter()
        ids = counting(options, step)[rank::world].to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item() / world)
        seconds.append(time.perf_counter() - start)
    return losses, median(seconds)


def counting(options: argparse.Namespace, step: int) -> Tensor:
    """Sequences that count from anywhere, (batch, length)."""
    starts = torch.randint(0, VOCABULARY, (options.batch, 1), generator=torch.Generator().manual_seed(step))
    return (starts + torch.arange(options.length)) % VOCABULARY


def saved(lora: lorafx.AdaptedModel) -> int:
    """The number of tensors in the file that the first process writes. All have to call: together they gather."""
    with tempfile.TemporaryDirectory() as folder:
        lora.save_pretrained(folder, is_main_process=dist.get_rank() == 0)
        if dist.get_rank():
            return 2 * len(lora.sites)
        return len(lorafx.files.checkpoint.read(Path(folder)).tensors)


def local(parameter: Tensor) -> Tensor:
    """The part of a parameter that this process holds."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def report(*rows: Row) -> None:
    """Print all as a table, in the first process, and fail if anything is not as promised."""
    table = Table(show_header=False)
    for what, value, holds in rows:
        table.add_row(what, value, {True: "✓", False: "✗", None: ""}[holds])
    if dist.get_rank() == 0:
        Console().print(table)
    broken = [f"{what}: {value}" for what, value, holds in rows if holds is False]
    if broken:
        raise SystemExit("not as promised: " + "; ".join(broken))


if __name__ == "__main__":
    main()
