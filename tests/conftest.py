"""Shared by all tests: quiet libraries, a fixed seed, a text form of graphs."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers.utils import logging

logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
