"""Several processes: what they compute together is what one computes, and they save one adapter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow  # processes of their own

# accelerate's launcher is torch's, and says in the environment what the Accelerator of the third way is to do.
LAUNCH = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
OPTIONS = ["--mixed_precision", "no", "--dynamo_backend", "no"]
WAYS = "ddp", "fsdp", "accelerate"
RUN = Path(__file__).parent / "distributed_run.py"


def test_two_processes_train_as_one(tmp_path):
    """By each way in turn, in the same two processes: starting them is most of the time."""
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCH, *OPTIONS, str(RUN), str(tmp_path), *WAYS],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for way in WAYS:
        saved = (load_file(tmp_path / way / name / "adapter_model.safetensors") for name in ("rank0", "rank1", "main"))
        first, *others = saved
        for other in others:
            assert first.keys() == other.keys() and all((first[key] == other[key]).all() for key in first), way
