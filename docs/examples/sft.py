"""SFT: teach a small language model what Python's functions do, with trl's SFTTrainer; and PEFT's model the same.

Offline, in about a minute on two CPU cores: a small base that reads bytes is trained for a moment on the standard
library's code, then adapted to questions and answers made of its docstrings. PEFT's model starts from the same adapter
and is given the same batches, so losses have to be the same. A run that exits with 0 is a test that passed. Needs trl
and peft.

    python docs/examples/sft.py
    python docs/examples/sft.py --model Qwen/Qwen3-0.6B --steps 500 --length 512 --batch 4    # a base of the Hub
"""

from __future__ import annotations

import argparse
import ast
import copy
import random
import sysconfig
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
import transformers
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

import lorafx

LIBRARY = Path(sysconfig.get_path("stdlib"))
TEMPLATE = "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '\\n') }}{% endfor %}"
CLOSE = 1e-3  # of losses relative to PEFT's, float32: each step multiplies what rounding has left before it

Question = dict[str, str]
Row = tuple[str, str, bool | None]  # what, its value, and whether it is as promised (None: nothing was)


def main() -> None:
    options = parse_options(__doc__, steps=60)
    base, tokenizer = base_and_tokenizer(options)
    rows = Dataset.from_list([{"messages": [*question(q), answer(q)]} for q in questions(options)])

    def trained(model: nn.Module, folder: Path) -> tuple[SFTTrainer, float]:
        arguments = SFTConfig(str(folder), max_length=options.length, **common(options))
        return run(SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer))

    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = twins(base, options, Path(folder))
        (mine, seconds), (other, theirs_seconds) = trained(ours, Path(folder, "a")), trained(theirs, Path(folder, "b"))
    losses, expected = logged(mine, "loss"), logged(other, "loss")
    apart = max(abs(a - b) / b for a, b in zip(losses, expected))
    print(ours.explain())
    report(
        ("trained", "{:,} of {:,} numbers".format(*ours.get_nb_trainable_parameters()), None),
        ("loss before → after", f"{losses[0]:.3f} → {losses[-1]:.3f}", losses[-1] < losses[0] - options.min_gain),
        ("losses, of PEFT's", f"{apart:.1e} apart at most", apart < CLOSE),
        ("a step, ms", f"{1e3 * seconds:.0f} (PEFT {1e3 * theirs_seconds:.0f}), one after the other", None),
    )


def parse_options(doc: str, steps: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--model", help="a causal language model of the Hub or a folder (default: a small one, made here)"
    )
    parser.add_argument("--steps", type=int, default=steps, help="of the adapter (default: %(default)s)")
    parser.add_argument("--base-steps", type=int, default=100, help="of the small base (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens at most (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--capture", default="auto", help='"graph": make the graph at the first step, not at the hundredth'
    )
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--min-gain", type=float, default=0.05, help="how far the loss has to fall")
    return parser.parse_args()


def base_and_tokenizer(options: argparse.Namespace) -> tuple[nn.Module, Any]:
    transformers.set_seed(0)
    transformers.utils.logging.set_verbosity_error()
    if options.model:
        return AutoModelForCausalLM.from_pretrained(options.model), AutoTokenizer.from_pretrained(options.model)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    text = b"\n\n".join(path.read_bytes() for path in sorted(LIBRARY.glob("*.py"))[:40])
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long() + 3  # as ByT5 numbers bytes
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in tqdm(range(options.base_steps), "base"):
        starts = torch.randint(0, len(ids) - 96, (8,))
        batch = torch.stack([ids[start : start + 96] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


def questions(options: argparse.Namespace) -> list[Question]:
    """A function's name and arguments, and the first line of its docstring, in an order that is always the same."""
    found: dict[str, Question] = {}
    for path in sorted(LIBRARY.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and (line := (ast.get_docstring(node) or "").partition("\n")[0]):
                asked = f"{path.stem}.{node.name}({', '.join(each.arg for each in node.args.args)})"
                found.setdefault(line, {"asked": asked, "answer": line})
    return random.Random(0).sample(list(found.values()), min(len(found), options.batch * max(options.steps, 20)))


def question(each: Question) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What does {each['asked']} do?"}]


def answer(each: Question) -> dict[str, str]:
    return {"role": "assistant", "content": each["answer"]}


def common(options: argparse.Namespace) -> dict[str, Any]:
    """What trl's trainers are told in both examples."""
    return {
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "learning_rate": options.lr,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": torch.cuda.is_available(),
        "seed": 0,
    }


def twins(base: nn.Module, options: argparse.Namespace, folder: Path) -> tuple[lorafx.AdaptedModel, nn.Module]:
    """lorafx's model and PEFT's, of equal weights and adapters."""
    copied = copy.deepcopy(base)
    config = {
        "r": options.rank,
        "lora_alpha": 2 * options.rank,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }
    ours = lorafx.compile(base, config, capture=options.capture, random_state=0)
    ours.save_pretrained(folder / "start")
    return ours, peft.PeftModel.from_pretrained(copied, folder / "start", is_trainable=True)


class Clock(transformers.TrainerCallback):
    """The seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def run(trainer: Any) -> tuple[Any, float]:
    """Train; the trainer, and the median of its steps' seconds."""
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(clock := Clock())
    trainer.train()
    return trainer, median(clock.seconds)


def logged(trainer: Any, key: str) -> list[float]:
    return [log[key] for log in trainer.state.log_history if key in log]


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
