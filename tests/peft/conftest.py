"""Shared by the comparisons with PEFT: each case is made once."""

import functools

import pytest
from cases import Ran, made


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    return functools.cache(lambda name: made(name, tmp_path_factory.mktemp("parity")))


@pytest.fixture
def ran(request, runs) -> Ran:
    """The case of the name that a test is given."""
    return runs(request.param)
