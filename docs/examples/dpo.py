"""DPO: teach a small language model not to shout, with trl's DPOTrainer; and PEFT's model the same.

Offline, in about a minute on two CPU cores. Base and questions are those of sft.py; the rejected answer is the chosen
one in capitals. There is no second model: the reference is the adapter as it was. Losses and rewards of each step have
to be those of PEFT's model, and the first loss log 2. A run that exits with 0 is a test that passed. Needs trl and
peft.

    python docs/examples/dpo.py
    python docs/examples/dpo.py --model Qwen/Qwen3-0.6B --steps 300 --length 512 --batch 4 --lr 1e-4
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from datasets import Dataset
from sft import (
    CLOSE,
    Question,
    answer,
    base_and_tokenizer,
    common,
    logged,
    parse_options,
    question,
    questions,
    report,
    run,
    twins,
)
from torch import nn
from trl import DPOConfig, DPOTrainer


def main() -> None:
    options = parse_options(__doc__, steps=40)
    base, tokenizer = base_and_tokenizer(options)
    pairs = [{"prompt": question(q), "chosen": [answer(q)], "rejected": [shouted(q)]} for q in questions(options)]
    rows = Dataset.from_list(pairs)

    def trained(model: nn.Module, folder: Path) -> tuple[DPOTrainer, float]:
        arguments = DPOConfig(str(folder), max_length=options.length, **common(options))
        return run(DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer))

    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = twins(base, options, Path(folder))
        (mine, seconds), (other, theirs_seconds) = trained(ours, Path(folder, "a")), trained(theirs, Path(folder, "b"))
    losses, rewards = logged(mine, "loss"), logged(mine, "rewards/margins")
    apart = max(
        abs(a - b) / max(abs(b), 1)
        for key in ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
        for a, b in zip(logged(mine, key), logged(other, key), strict=True)
    )
    print(ours.explain())
    report(
        ("trained", "{:,} of {:,} numbers".format(*ours.get_nb_trainable_parameters()), None),
        ("reference", f"adapter {ours.active_adapters[0]!r} as it was, kept as 'ref'", "ref" in ours.peft_config),
        ("first loss", f"{losses[0]:.6f}, log 2 = {math.log(2):.6f}", abs(losses[0] - math.log(2)) < 1e-5),
        ("margin of rewards after", f"{rewards[-1]:.3f}", rewards[-1] > options.min_gain),
        ("losses, rewards, log probabilities, of PEFT's", f"{apart:.1e} apart at most", apart < CLOSE),
        ("a step, ms", f"{1e3 * seconds:.0f} (PEFT {1e3 * theirs_seconds:.0f}), one after the other", None),
    )


def shouted(each: Question) -> dict[str, str]:
    return answer({**each, "answer": each["answer"].upper()})


if __name__ == "__main__":
    main()
