"""Training curves: 50 steps of lorafx next to PEFT's, measured by how far PEFT is from itself.

OMP_NUM_THREADS=2 python tests/bench/loss_curves.py [--out out/curves] [--tasks llama demo] [--settings …]

Everybody starts from the same weights and adapter values, sees the same batches and takes AdamW's steps. PEFT's
distance from itself is measured twice:

- order: the same model with an axis of its weights in another order, and the same batches with their rows in another
  order. These compute the same function, and differ only in the order in which numbers are added.
- dtype: the same weights in a wider dtype, float64 for float32 and float32 for bfloat16. This is what all of the
  rounding in PEFT's run does. Another order repeats most of that rounding, above all in bfloat16, where sums are made
  in float32 and mostly round to the same number; who rounds at other places is farther away without being less exact.

lorafx's distance from PEFT, the largest of all steps and the mean, is within one of them if it is at most `FACTOR`
times as much, plus `FLOOR` units in the last place of the loss. Two runs that round independently differ by the root of
two of what each is off, and the largest of a few draws is itself a draw: Adam divides a gradient by its size, so an
element that is nothing but rounding takes a whole step to one side or the other, and one such element can be most of a
distance.

Dropout is off, as no two libraries draw the same numbers. `demo` is the model, the data, the loss and the learning rate
of docs/examples/quickstart.py. Writes curves.json, curves.md and curves.png after each setting; exits with 1 where
lorafx is within neither.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import lorafx
from lorafx.bench.record import environment

STEPS, FACTOR, FLOOR = 50, 2.0, 8
SYMBOLS = 32  # as many tokens as the text of `llama` is made of
PREFIX = "base_model.model."
Batch = dict[str, Tensor]
Options = dict[str, Any]

# Rounds where PEFT does outside autocast.
AS_WRITTEN = lorafx.passes.default.without("fuse_loss", "restore_rotary", "choose_kernels")
ALIKE: Options = {"adapter_compute_dtype": "float32", "pipeline": AS_WRITTEN}
OURS: dict[str, Options] = {"lorafx": {}, "lorafx, compiled": {"backend": "inductor"}, "lorafx, rounding alike": ALIKE}
# dtype of the base, what both libraries are told, and who of `OURS` runs; in float32 the defaults of both are the same
SETTINGS: dict[str, tuple[torch.dtype, Options, tuple[str, ...]]] = {
    "float32": (torch.float32, {}, ("lorafx", "lorafx, compiled")),
    "bfloat16, adapters in float32": (torch.bfloat16, {}, tuple(OURS)),
    "bfloat16, adapters too": (torch.bfloat16, {"autocast_adapter_dtype": False}, ("lorafx", "lorafx, compiled")),
}
WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
EXACT = "PEFT, in a wider dtype"
COLORS = dict(zip(("PEFT", *OURS, EXACT), ("black", "tab:blue", "tab:orange", "tab:purple", "tab:green")))


@dataclass(frozen=True)
class Task:
    """What is trained. `axes`: widths that only axes of one meaning have, so that these can be put in another order."""

    base: Callable[[torch.dtype], nn.Module]
    config: Options
    batches: list[Batch]
    axes: tuple[int, ...]
    lr: float


def llama(sizes: Options | None = None, rows: int = 4, tokens: int = 32, steps: int = STEPS) -> Task:
    """A small Llama with random weights, and text in which each token has two likely successors."""
    chosen = {"vocab_size": 211, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2} | (sizes or {})
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "initializer_range": 0.1}
    config = transformers.LlamaConfig(**chosen, **heads, use_cache=False)

    def base(dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).to(dtype)

    rng = torch.Generator().manual_seed(1)
    successors = torch.randint(0, SYMBOLS, (SYMBOLS, 2), generator=rng)
    texts = [_text(successors, rows, tokens, rng) for _ in range(steps)]
    axes = config.hidden_size, config.intermediate_size
    adapters = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    return Task(base, adapters, [{"input_ids": ids, "labels": ids} for ids in texts], axes, lr=1e-2)


def _text(successors: Tensor, rows: int, tokens: int, rng: torch.Generator) -> Tensor:
    """(rows, tokens)"""
    text = [torch.randint(0, len(successors), (rows,), generator=rng)]
    for _ in range(tokens - 1):
        text.append(successors[text[-1], torch.randint(0, 2, (rows,), generator=rng)])
    return torch.stack(text, 1)


def demo(rows: int = 4, steps: int = STEPS) -> Task:
    """The quickstart's, with smaller batches."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "docs/examples"))
    import quickstart

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    examples, _ = quickstart.split(quickstart.labelled_docstrings(), test_size=192)
    batches = chain.from_iterable(repeat(quickstart.batches(examples, rows, shuffle=True)))

    def base(dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        model = quickstart.pretrained().to(dtype)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    adapters = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "modules_to_save": ["classifier"]}
    return Task(base, adapters, list(islice(batches, steps)), (1536,), lr=1.5e-3)


TASKS = {"llama": llama, "demo": demo}


def with_peft(task: Task, dtype: torch.dtype, options: Options) -> nn.Module:
    return peft.get_peft_model(task.base(dtype), peft.LoraConfig(**task.config), **options)


def with_lorafx(task: Task, dtype: torch.dtype, options: Options) -> nn.Module:
    """lorafx with the start values that PEFT draws."""
    model = lorafx.compile(task.base(dtype), task.config, capture="graph", **options)
    drawn = {key: value for key, value in options.items() if key == "autocast_adapter_dtype"}
    start = trainable(with_peft(task, dtype, drawn))
    assert trainable(model).keys() == start.keys()
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            assert parameter.dtype == start[name].dtype
            parameter.copy_(start[name])
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a model trains, by names that both libraries share."""
    named = ((name.removeprefix(PREFIX), p) for name, p in model.named_parameters() if p.requires_grad)
    return {name.replace(".modules_to_save.default.", "."): p for name, p in named}


@torch.no_grad()
def permuted(model: nn.Module, width: int) -> nn.Module:
    """The same function: every axis of this width, of weights and adapters, in another order."""
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        for axis in range(parameter.dim()):
            if parameter.shape[axis] == width:
                parameter.copy_(parameter.index_select(axis, order))
    return model


def turned(batch: Batch) -> Batch:
    """The same rows, the last one first."""
    return {name: value.flip(0) for name, value in batch.items()}


def curve(
    model: nn.Module, batches: list[Batch], lr: float, after: Callable[[int], object] = lambda steps: None
) -> list[float]:
    """The loss of each step; the loop is the quickstart's. `after` is called with the number of steps so far."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    losses = []
    model.train()
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        after(len(losses))
    return losses


def curves(task: Task, setting: str, ours: Sequence[str]) -> Iterator[tuple[str, list[float]]]:
    """Who, and the losses: PEFT, PEFT in other orders and in a wider dtype, and those of lorafx."""
    dtype, options, _ = SETTINGS[setting]

    def theirs(change: Callable[[nn.Module], nn.Module] = lambda model: model) -> list[float]:
        return curve(change(with_peft(task, dtype, options)), task.batches, task.lr)

    yield "PEFT", theirs()
    for width in task.axes:
        yield f"PEFT, axis of {width} reordered", theirs(partial(permuted, width=width))
    yield "PEFT, rows reordered", curve(with_peft(task, dtype, options), [*map(turned, task.batches)], task.lr)
    yield EXACT, theirs(lambda model: model.to(WIDER[dtype]))
    for name in ours:
        yield name, curve(with_lorafx(task, dtype, options | OURS[name]), task.batches, task.lr)


@dataclass(frozen=True)
class Distance:
    """How far a curve is from PEFT's."""

    largest: float
    mean: float

    def within(self, noise: Distance, floor: float) -> bool:
        return self.largest <= FACTOR * noise.largest + floor and self.mean <= FACTOR * noise.mean + floor

    def ratios(self, noise: Distance) -> str:
        return f"{self.largest / noise.largest:.2g}, {self.mean / noise.mean:.2g}"


Losses = dict[str, list[float]]  # by who


def distances(found: Losses) -> dict[str, Distance]:
    """Everybody's from PEFT."""
    by_name = {}
    for name in [name for name in found if name != "PEFT"]:
        off = [abs(a - b) for a, b in zip(found[name], found["PEFT"], strict=True)]
        by_name[name] = Distance(max(off), sum(off) / len(off))
    return by_name


def noises(by_name: dict[str, Distance]) -> dict[str, Distance]:
    """PEFT's distances from itself: the largest of other orders, and from a wider dtype."""
    orders = [distance for name, distance in by_name.items() if name.endswith("reordered")]
    order = Distance(max(each.largest for each in orders), max(each.mean for each in orders))
    return {"order": order, "dtype": by_name[EXACT]}


def verdicts(found: Losses) -> dict[str, list[str]]:
    """Which of PEFT's distances from itself each of lorafx is within."""
    by_name = distances(found)
    floor = FLOOR * torch.finfo(torch.float32).eps * max(found["PEFT"])
    own = noises(by_name).items()
    return {name: [what for what, noise in own if by_name[name].within(noise, floor)] for name in found if name in OURS}


Found = dict[str, Losses]  # by task and setting


def markdown(record: Found) -> str:
    differences = "largest difference", "mean difference", "to PEFT's other orders", "to PEFT's rounding", "within"
    columns = ("task", "dtype", "who", "loss", *differences)
    lines = [columns, ("---",) * len(columns)]
    for title, found in record.items():
        task, _, setting = title.partition(": ")
        by_name, verdict = distances(found), verdicts(found)
        lines.append((task, setting, "PEFT", _ends(found["PEFT"]), *[""] * 5))
        for name, distance in by_name.items():
            cells = [f"{distance.largest:.1e}", f"{distance.mean:.1e}", "", "", ""]
            if name in verdict:
                cells[2:] = [distance.ratios(noise) for noise in noises(by_name).values()]
                cells.append(" and ".join(verdict[name]) or "neither")
            lines.append((task, setting, name, _ends(found[name]), *cells))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ends(losses: list[float]) -> str:
    """The mean of the first and of the last five: a batch has easier and harder rows."""
    return f"{sum(losses[:5]) / 5:.3f} → {sum(losses[-5:]) / 5:.3f}"


def draw(record: Found, path: Path) -> None:
    """A row for each setting: the losses, and the differences from PEFT's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.8 * len(record)), layout="constrained")
    axes = figure.subplots(len(record), 2, squeeze=False)
    for (title, found), (left, right) in zip(record.items(), axes):
        for name, losses in found.items():
            color = COLORS.get(name, "0.7")
            left.plot(losses, color=color, label=name)
            if name != "PEFT":
                right.plot([abs(a - b) for a, b in zip(losses, found["PEFT"])], color=color, label=name)
        left.set_title(title, fontsize=9, loc="left")
        left.set_ylabel("loss")
        right.set(yscale="log", ylabel="difference from PEFT")
        right.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)


def write(record: Found, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment("cpu"), "factor": FACTOR, "floor": FLOOR, "losses": record}
    (folder / "curves.json").write_text(json.dumps(content, indent=1))
    (folder / "curves.md").write_text(markdown(record) + "\n")
    draw(record, folder / "curves.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/curves"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--ours", nargs="+", choices=OURS, default=list(OURS))
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    record: Found = {}
    for name in asked.tasks:
        task = TASKS[name]()
        for setting in asked.settings:
            ours = [each for each in SETTINGS[setting][2] if each in asked.ours]
            record[f"{name}: {setting}"] = dict(curves(task, setting, ours))
            write(record, asked.out)
    print(markdown(record))
    return int(not all(within for found in record.values() for within in verdicts(found).values()))


if __name__ == "__main__":
    sys.exit(main())
