"""QLoRA: train an adapter beside a base of 4 bits, and merge it into the base that was never quantised.

The whole way, offline, in about two minutes on two CPU cores: a small base model is saved, loaded in NF4, adapted,
trained on other text, saved, and merged on disk into the original in bfloat16. Each promise made on the way is checked.
Needs `pip install "lorafx[quant]"`.

    python docs/examples/qlora.py
    python docs/examples/qlora.py --base folder --steps 500 --length 512 --batch 4    # a base of your own, by bytes

The small base is made here: a Llama that reads bytes, trained for a moment on the standard library's code. The adapter
then learns the library's licence and other plain text.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
import tempfile
from itertools import chain
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it when it is imported
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import lorafx

LIBRARY = Path(sysconfig.get_path("stdlib"))
IN_4_BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
WITHIN = 0.05  # how far the loss of the merged model may be off: that of 4 bits and of bfloat16


def main() -> None:
    options = parse_options()
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        failed = run(options, Path(folder))
    raise SystemExit(f"not as promised: {failed}" if failed else 0)


def run(options: argparse.Namespace, folder: Path) -> list[str]:
    """The example, with its files in `folder`; returns the promises that did not hold."""
    base = Path(options.base) if options.base else small_base(folder / "base", options)
    text = encoded(sorted(LIBRARY.glob("pydoc_data/*.py")) + [LIBRARY / "LICENSE.txt"])
    held_out = batch(text, options, seed=-1)

    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=IN_4_BITS, device_map={"": "cpu"})
    model = lorafx.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = lorafx.compile(model, {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"})
    before = loss_of(lora, held_out)
    kept = train(lora, text, options.steps, options, "adapter")
    after = loss_of(lora, held_out)

    lora.save_pretrained(folder / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(base, quantization_config=IN_4_BITS, device_map={"": "cpu"})
    loaded = loss_of(lorafx.load(fresh, folder / "adapter"), held_out)
    merged_folder = lorafx.merge(base, folder / "adapter", folder / "merged", dtype=torch.bfloat16)
    merged = AutoModelForCausalLM.from_pretrained(merged_folder, dtype=torch.float32)
    rows = [
        ("loss before, in 4 bits", f"{before:.3f}", True),
        ("loss after training the adapter", f"{after:.3f}", after < before - options.min_gain),
        ("saved and loaded beside a fresh base", f"{loaded:.3f}", abs(loaded - after) < 1e-4),
        ("merged into the original, in bfloat16", f"{loss_of(merged, held_out):.3f}", None),
    ]
    rows[-1] = (*rows[-1][:2], abs(float(rows[-1][1]) - after) < WITHIN)
    show("What it learnt", rows)
    show("Memory, MiB", [(what, f"{size / 2**20:.2f}", True) for what, size in (memory(lora) | kept).items()])
    return [what for what, _, held in rows if not held]


def small_base(folder: Path, options: argparse.Namespace) -> Path:
    """Train a small Llama on the standard library's code for a moment, and save it."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=4 * options.length,
    )
    model = LlamaForCausalLM(config)
    train(model, encoded(sorted(LIBRARY.glob("*.py"))[:40]), options.base_steps, options, "base")
    model.save_pretrained(folder)
    return folder


def encoded(files: list[Path]) -> Tensor:
    """The bytes of files, one after another."""
    return torch.frombuffer(
        bytearray(chain.from_iterable(f.read_bytes() for f in files if f.exists())), dtype=torch.uint8
    )


def batch(text: Tensor, options: argparse.Namespace, seed: int) -> Tensor:
    """(batch, length) of bytes from random places: of the text's last tenth for a negative seed, else before that."""
    split, rng = len(text) * 9 // 10, torch.Generator().manual_seed(seed)
    low, high = (0, split) if seed >= 0 else (split, len(text))
    starts = torch.randint(low, high - options.length, (options.batch,), generator=rng)
    return torch.stack([text[start : start + options.length] for start in starts]).long()


def train(model: nn.Module, text: Tensor, steps: int, options: argparse.Namespace, what: str) -> dict[str, int]:
    """Train what requires gradients; returns the bytes of the optimizer, and of what one step keeps for backward."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr)
    model.train()
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {tensor.untyped_storage().data_ptr() for tensor in chain(model.parameters(), model.buffers())}
    for step in tqdm(range(steps), what):
        ids = batch(text, options, seed=step)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor) if not step else torch.enable_grad():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    activations = sum(size for place, size in kept.items() if place not in own)
    return {"optimizer": sum(t.nbytes for t in states), "kept for backward": activations}


@torch.no_grad()
def loss_of(model: nn.Module, ids: Tensor) -> float:
    return float(model.eval()(input_ids=ids, labels=ids).loss)


def memory(lora: lorafx.AdaptedModel) -> dict[str, int]:
    """Bytes of the base's weights, as they are and as they would be in float32, and of the adapter."""
    trained = [parameter for parameter in lora.parameters() if parameter.requires_grad]
    dense = sum(site.in_features * site.out_features * 4 for site in lora.sites)
    packed = sum(lora.get_parameter(site.weight).nbytes for site in lora.sites)
    return {"adapted weights in float32": dense, "as they are": packed, "adapter": sum(p.nbytes for p in trained)}


def show(title: str, rows: list[tuple[str, str, bool | None]]) -> None:
    table = Table(title=title, show_header=False)
    for what, value, held in rows:
        table.add_row(what, value, "" if held else "not as promised")
    Console().print(table)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="a folder that transformers loads a causal language model from")
    parser.add_argument("--steps", type=int, default=60, help="of the adapter")
    parser.add_argument("--base-steps", type=int, default=120, help="of the small base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--min-gain", type=float, default=0.05, help="how much the loss has to fall")
    return parser.parse_args()


if __name__ == "__main__":
    main()
