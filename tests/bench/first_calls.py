"""Seconds that a model takes to answer, from the first call on: lorafx and PEFT, each in a cold process of its own.

python tests/bench/first_calls.py [--layers 4 32 80] [--widths 128 1024] [--backends eager inductor] [--rounds 5]
                                  [--cpu-time] [--json out.json]

A decoder with all its linear layers adapted, r = 8, on one core, of each number of layers and each width. The
contestants take turns; what is printed are medians and, by round, the ratio's median and spread. A backend is lorafx's;
PEFT is as it is. `--cpu-time` counts what the process computes and not what it waits for: on a machine that is busy
otherwise, that is what repeats.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

CONTESTANTS = ("lorafx", "peft")
Adapted = tuple[Any, Callable[[Any, str], Any]]


class Case(NamedTuple):
    """What is measured: a model's size, and what lorafx runs its graphs with."""

    layers: int
    width: int
    backend: str

    @property
    def options(self) -> list[str]:
        """The same for a command line."""
        return ["--layers", str(self.layers), "--widths", str(self.width), "--backends", self.backend]


def adapted(contestant: str, base: Any, backend: str) -> Adapted:
    """The adapted model, and what loads one from a folder."""
    if contestant == "lorafx":
        import lorafx

        how = {} if backend == "eager" else {"backend": backend}  # whoever names a backend asks for graphs at once
        return lorafx.compile(base, {"r": 8, "target_modules": "all-linear"}, **how), lorafx.load
    import peft

    config = peft.LoraConfig(r=8, target_modules="all-linear")
    return peft.get_peft_model(base, config), peft.PeftModel.from_pretrained


def steps(contestant: str, case: Case) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is measured, in order, each as a function."""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": case.width, "intermediate_size": 2 * case.width, "num_hidden_layers": case.layers}
    config = transformers.LlamaConfig(**sizes, vocab_size=256, num_attention_heads=4, num_key_value_heads=2)
    base, other = (transformers.LlamaForCausalLM(config) for _ in range(2))
    ids = torch.randint(0, 256, (2, 16))
    made: list[Adapted] = []
    yield "compile", lambda: made.append(adapted(contestant, base, case.backend))
    ((model, load),) = made
    train = lambda: model(input_ids=ids, labels=ids).loss.backward()  # noqa: E731
    call = torch.no_grad()(lambda: model(input_ids=ids))
    answer = {"do_sample": False, "pad_token_id": 0}
    model.train()
    yield "first training step", train
    yield "second training step", train
    model.eval()
    yield "first evaluation", call
    yield "second evaluation", call
    yield "first token", lambda: model.generate(ids[:1], max_new_tokens=1, **answer)
    yield "32 tokens, first", lambda: model.generate(ids[:1], max_new_tokens=32, **answer)
    yield "32 tokens, second", lambda: model.generate(ids[:1], max_new_tokens=32, **answer)
    model.add_adapter("other", model.peft_config["default"])
    for name, where in (("other", "there"), ("default", "back"), ("other", "there again")):
        yield f"set_adapter, {where}", lambda name=name: model.set_adapter(name)
        yield f"first call {where}", call
    model.set_adapter("default")
    yield "merge", model.merge_adapter
    yield "unmerge", model.unmerge_adapter
    with tempfile.TemporaryDirectory() as folder:
        yield "save", lambda: model.save_pretrained(folder)
        yield "load", lambda: load(other, folder)


def measured(contestant: str, case: Case, clock: Callable[[], float]) -> dict[str, float]:
    """The seconds of each step, in this process."""
    seconds = {}
    for name, step in steps(contestant, case):
        gc.collect()  # of all objects of the process it takes 0.3 s, in whichever step it comes due
        start = clock()
        step()
        seconds[name] = clock() - start
    return seconds


def apart(contestant: str, case: Case, cpu_time: bool) -> dict[str, float]:
    """The same in a process of its own."""
    options = [*case.options, "--only", contestant, *(["--cpu-time"] if cpu_time else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", __file__, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[32])
    parser.add_argument("--widths", type=int, nargs="+", default=[128])
    parser.add_argument("--backends", nargs="+", choices=("eager", "inductor"), default=["eager"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--only", choices=CONTESTANTS)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    cases = [Case(*each) for each in itertools.product(asked.layers, asked.widths, asked.backends)]
    if asked.only:
        clock = time.process_time if asked.cpu_time else time.perf_counter
        print(json.dumps(measured(asked.only, cases[0], clock)))
        return
    records = []
    for case in cases:
        rounds = [{each: apart(each, case, asked.cpu_time) for each in CONTESTANTS} for _ in range(asked.rounds)]
        print(shown(rounds, case), flush=True)
        records.append({**case._asdict(), "cpu_time": asked.cpu_time, "rounds": rounds})
        if asked.json:
            asked.json.write_text(json.dumps(records))


def shown(rounds: list[dict[str, dict[str, float]]], case: Case) -> str:
    """The table of medians."""
    import torch

    from lorafx.tables import table

    rows = []
    for step in rounds[0]["lorafx"]:
        ours, theirs = ([each[who][step] for each in rounds] for who in CONTESTANTS)
        ratios = [a / b for a, b in zip(ours, theirs)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        medians = (f"{statistics.median(each):.4f}" for each in (ours, theirs))
        rows.append((step, *medians, f"{statistics.median(ratios):.2f}", spread))
    columns = ("what", "lorafx s", "PEFT s", "ratio", "from, to")
    title = f"{case.layers} layers of {case.width}, {case.backend}, {len(rounds)} rounds, torch {torch.__version__}"
    return str(table(title, columns, rows))


if __name__ == "__main__":
    main()
