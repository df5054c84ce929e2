"""Several processes: what they compute together is what one computes, and they save one adapter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = (
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
)
LAUNCH = {"ddp": TORCHRUN, "fsdp": TORCHRUN, "accelerate": (*ACCELERATE, "no", "--dynamo_backend", "no")}
RUN = Path(__file__).parent / "distributed_run.py"


@pytest.mark.slow
@pytest.mark.parametrize("how", LAUNCH)
def test_two_processes_train_as_one(tmp_path, how):
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCH[how], str(RUN), how, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (load_file(tmp_path / f"rank{rank}" / "adapter_model.safetensors") for rank in range(2))
    assert first.keys() == second.keys() and all((first[key] == second[key]).all() for key in first)
