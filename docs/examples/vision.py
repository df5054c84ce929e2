"""Vision: teach a small vision transformer digits that it has not seen; and PEFT's model the same.

Offline, in half a minute on two CPU cores. The base is trained here on scikit-learn's digits 0 to 4; an adapter and a
new head then learn 5 to 9. PEFT's model starts from the same adapter and is given the same batches; the first losses
have to be the same. (Later ones part, as those of two runs of PEFT's do that start a rounding apart.) The adapter is
loaded onto a fresh base at the end. A run that exits with 0 is a test that passed. Needs peft and scikit-learn.

    python docs/examples/vision.py
    python docs/examples/vision.py --hidden 192 --layers 8 --steps 500
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Iterator
from statistics import median

import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import lorafx

FIRST = 10  # so many losses are compared with PEFT's: each step multiplies what rounding has left before it
CLOSE = 1e-4  # of these losses, relative, in float32

Row = tuple[str, str, bool | None]  # what, its value, and whether it is as promised (None: nothing was)


def main() -> None:
    options = parse_options()
    transformers.set_seed(0)
    seen, unseen = digits(range(5)), digits(range(5, 10))
    base = small_transformer(options)
    base_losses, _ = train(base, seen, options.base_steps, options)
    base.classifier.reset_parameters()  # what is to be learnt has other names

    config = lorafx.LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "projection"],
        modules_to_save=["classifier"],
    )
    with tempfile.TemporaryDirectory() as folder:
        fresh, copied = copy.deepcopy(base), copy.deepcopy(base)
        lora = lorafx.compile(base, config, capture="graph", random_state=0)  # at the first step, not the hundredth
        lora.save_pretrained(f"{folder}/start")
        theirs = peft.PeftModel.from_pretrained(copied, f"{folder}/start", is_trainable=True)
        before = accuracy(lora, unseen)
        losses, seconds = train(lora, unseen, options.steps, options)
        expected, theirs_seconds = train(theirs, unseen, options.steps, options)
        lora.save_pretrained(f"{folder}/adapter")
        loaded = accuracy(lorafx.load(fresh, f"{folder}/adapter"), unseen)
    after = accuracy(lora, unseen)
    apart = max(abs(a - b) / b for a, b in zip(losses[:FIRST], expected))
    print(lora.sites, lora.explain(), sep="\n")
    report(
        ("base, loss on digits 0 to 4", f"{base_losses[0]:.3f} → {base_losses[-1]:.3f}", None),
        ("trained", "{:,} of {:,} numbers".format(*lora.get_nb_trainable_parameters()), None),
        ("right among 5 to 9, before → after", f"{before:.0%} → {after:.0%}", after > before + options.min_gain),
        ("saved and loaded", f"{loaded:.0%}", loaded == after),
        (f"first {FIRST} losses, of PEFT's", f"{apart:.1e} apart at most", apart < CLOSE),
        ("a step, ms", f"{1e3 * seconds:.1f} (PEFT {1e3 * theirs_seconds:.1f}), one after the other", None),
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="of the adapter (default: %(default)s)")
    parser.add_argument("--base-steps", type=int, default=150, help="of the small base (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=64, help="width of the base (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--min-gain", type=float, default=0.3, help="accuracy to gain (default: %(default)s)")
    return parser.parse_args()


def digits(which: range) -> tuple[Tensor, Tensor]:
    """Images of these digits, (count, 1, 8, 8) of 0 to 1, and their numbers from 0 on, in an order that is no order."""
    found = load_digits()
    images, labels = torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)
    chosen = (labels >= which.start) & (labels < which.stop)
    order = torch.randperm(int(chosen.sum()), generator=torch.Generator().manual_seed(0))
    return images[chosen][order].unsqueeze(1), labels[chosen][order] - which.start


def small_transformer(options: argparse.Namespace) -> ViTForImageClassification:
    sizes = {"hidden_size": options.hidden, "intermediate_size": 2 * options.hidden, "num_attention_heads": 4}
    shape = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 5}
    return ViTForImageClassification(ViTConfig(num_hidden_layers=options.layers, **sizes, **shape))


def batches(images: Tensor, labels: Tensor, options: argparse.Namespace, steps: int) -> Iterator[dict[str, Tensor]]:
    """Batches at random of the first four fifths."""
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        chosen = torch.randint(0, len(images) * 4 // 5, (options.batch,), generator=rng)
        yield {"pixel_values": images[chosen], "labels": labels[chosen]}


def train(
    model: nn.Module, of: tuple[Tensor, Tensor], steps: int, options: argparse.Namespace
) -> tuple[list[float], float]:
    """The losses, and the median of the steps' seconds."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.lr)
    losses, seconds = [], []
    model.train()
    for batch in batches(*of, options, steps):
        start = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return losses, median(seconds)


@torch.no_grad()
def accuracy(model: nn.Module, of: tuple[Tensor, Tensor]) -> float:
    """Of the last fifth, which no batch has."""
    images, labels = (each[len(each) * 4 // 5 :] for each in of)
    return float((model.eval()(pixel_values=images).logits.argmax(-1) == labels).float().mean())


def report(*rows: Row) -> None:
    """Print all as a table, and fail if anything is not as promised."""
    table = Table(show_header=False)
    for what, value, holds in rows:
        table.add_row(what, value, {True: "✓", False: "✗", None: ""}[holds])
    Console().print(table)
    broken = [f"{what}: {value}" for what, value, holds in rows if holds is False]
    if broken:
        raise SystemExit("not as promised: " + "; ".join(broken))


if __name__ == "__main__":
    main()
