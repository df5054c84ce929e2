"""docs/models.md: which models are tested against PEFT, what serves each, how long a first call takes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
import zoo

HEAD = """# Models

Every model below is tested with a random adapter that PEFT wrote: outputs, loss and the gradient of every adapter
tensor in training, outputs in evaluation at two sizes and outputs after merging equal PEFT's, unmerging gives every bit
of the base back, what is saved is what PEFT saves, and those that write text write what PEFT's do. They are tiny (two
layers, random weights): what is tested is the architecture.

*served by* says what runs training steps with labels: one graph of the whole call, or, where that cannot be, the
model's own Python with a graph for each site (the same results, less fusion). The reason is what `lora.explain()` says.
*first call* is capture, rewriting and one step on one CPU core, in seconds; later calls cost no capture.

This page is written by `make models`, with torch {torch} and transformers {transformers}.

| model | sites | served by | first call |
|---|---|---|---|
"""


def write(page: Path, rows: Iterable[tuple[str, str, int, float, str]]) -> None:
    """Write the page from (name, served by, sites, seconds, reason) of each entry."""
    found = {name: rest for name, *rest in rows}
    lines, notes = [], []
    for name, entry in zoo.ENTRIES.items():
        if name not in found:
            lines.append(f"| {name} | | **failed** | |")
            continue
        served_by, sites, seconds, reason = found[name]
        lines.append(f"| {name} | {sites} | {served_by} | {seconds:.1f} |")
        if reason:
            calls = "is" if served_by == "sites" else "in some calls is"
            notes.append(f"- **{name}** {calls} served by sites: {first_line(reason)}")
        if entry.cannot:
            notes.append(f"- **{name}**: {entry.cannot}")
    head = HEAD.format(torch=torch.__version__.partition("+")[0], transformers=transformers.__version__)
    page.write_text(head + "\n".join(lines) + "\n\n## Reasons and limits\n\n" + "\n".join(notes) + LIMITS)


def first_line(reason: str) -> str:
    """The reason without paths of this machine."""
    line = " ".join(reason.splitlines()[0].split()).partition(" [")[0]
    place = reason.rpartition("[")[2].rstrip("]") if reason.endswith("]") else ""
    return f"{line} (`{Path(place.split(':')[0]).name}: {place.split(': ', 1)[-1]}`)" if place else line


LIMITS = """
- **Tied weights**: an adapter on one name of a tied weight acts wherever the weight is read; PEFT's acts only in the
  named module until it is merged. Logits differ there, and a warning says so. A file in which PEFT keeps two adapters
  for two names of one weight is refused.
- **Stacked experts** are adapted by `target_parameters`, as `["experts.gate_up_proj", "experts.down_proj"]`, and by the
  names that they had as layers where [PEFT reads these so](kinds.md#parameters-by-name).
"""
