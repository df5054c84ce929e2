"""What float8 does to training: 200 steps with the base in float8 next to the same steps in bfloat16 and float32.

OMP_NUM_THREADS=2 python tests/bench/float8_loss.py [--tasks llama demo] [--steps 200] [--out out/float8_loss.json]

The tasks are those of `loss_curves.py`, dropout off: a small Llama with random weights, and the pretrained encoder of
docs/examples/quickstart.py. Everybody starts from the same weights and adapter values and sees the same batches; the
adapters are float32. "weights in float8" makes them dense in each call, "products in float8" (`multiply_in_float8`)
rounds activations and gradients too. On a CPU the same numbers are multiplied in float32.

Printed are the mean loss of the first and the last 20 steps, the mean and the largest distance of a step's loss from
float32's, and the cosine between all adapters' gradients and float32's, at four moments of the float32 run, all at the
adapter values of that moment: the smallest of the four.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loss_curves import Batch, Task, demo, llama, trainable
from loss_curves import curve as train
from torch import Tensor, nn

import lorafx

MOMENTS = (0.1, 0.4, 0.7, 1.0)  # of the steps
IN_FLOAT8 = lorafx.passes.default + [lorafx.passes.MultiplyInFloat8()]
# The base's dtype, whether its weights are in float8, and the pipeline.
RUNS: dict[str, tuple[torch.dtype, bool, Any]] = {
    "float32": (torch.float32, False, None),
    "bfloat16": (torch.bfloat16, False, None),
    "bfloat16, weights in float8": (torch.bfloat16, True, None),
    "bfloat16, products in float8": (torch.bfloat16, True, IN_FLOAT8),
}
TASKS: dict[str, tuple[Callable[..., Task], dict[str, Any], Any]] = {  # makers, their options, and what is converted
    "llama": (llama, {"sizes": {"intermediate_size": 352}, "rows": 8, "tokens": 64}, None),
    "demo": (demo, {"rows": 8}, ("query", "key", "value", "dense")),
}
Values = dict[str, Tensor]


def model_of(task: Task, run: str, converted: Any, start: Values | None) -> nn.Module:
    dtype, in_float8, pipeline = RUNS[run]
    base = task.base(dtype).requires_grad_(False)
    if in_float8:
        lorafx.to_float8(base, converted)
    model = lorafx.compile(base, task.config, pipeline=pipeline, random_state=0, capture="graph").train()
    return filled(model, start) if start else model


@torch.no_grad()
def filled(model: nn.Module, values: Values) -> nn.Module:
    for name, parameter in trainable(model).items():
        parameter.copy_(values[name])
    return model


def values_of(model: nn.Module) -> Values:
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


def gradient(model: nn.Module, batch: Batch) -> Tensor:
    """Of all adapter tensors, in one row."""
    model(**batch).loss.backward()
    found = torch.cat([p.grad.double().flatten() for n, p in trainable(model).items() if ".lora_" in n])
    model.zero_grad()
    return found


def curve(model: nn.Module, task: Task, moments: list[int]) -> tuple[list[float], list[Values]]:
    """The loss of each step, and the adapters' values after so many steps."""
    found: list[Values] = []

    def note(steps: int) -> None:
        found.extend([values_of(model)] if steps in moments else [])

    return train(model, task.batches, task.lr, note), found


def measure(name: str, steps: int) -> dict[str, dict[str, Any]]:
    """Of each run: its losses, and its gradients' cosines."""
    maker, options, converted = TASKS[name]
    task = maker(**options, steps=steps)
    moments = [round(steps * moment) for moment in MOMENTS]
    record: dict[str, dict[str, Any]] = {}
    start = exact = None
    for run in RUNS:
        model = model_of(task, run, converted, start)
        start = start or values_of(model)
        losses, values = curve(model, task, moments)
        if exact is None:
            at = values
        gradients = [gradient(filled(model, v), task.batches[step - 1]) for v, step in zip(at, moments)]
        exact = exact or gradients
        cosines = [torch.cosine_similarity(a, b, 0).item() for a, b in zip(gradients, exact)]
        record[run] = {"losses": losses, "cosines": cosines}
        print(line(name, run, record), flush=True)
    return record


def line(task: str, run: str, record: dict[str, dict[str, Any]]) -> str:
    losses, exact, cosines = record[run]["losses"], record["float32"]["losses"], record[run]["cosines"]
    off = [abs(a - b) for a, b in zip(losses, exact, strict=True)]
    ends = f"{sum(losses[:20]) / 20:.4f} → {sum(losses[-20:]) / 20:.4f}"
    distance = f"{sum(off) / len(off):.4f} | {max(off):.4f}"
    return f"| {task} | {run} | {ends} | {distance} | {min(cosines):.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("out/float8_loss.json"))
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| task | base | loss | mean distance | largest | least cosine |\n|---|---|---|---|---|---|")
    record = {name: measure(name, asked.steps) for name in asked.tasks}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
