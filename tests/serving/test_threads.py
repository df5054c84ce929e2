"""Threads: several call one adapted model at a time."""

import copy
import sys
import threading

import pytest
import torch
from graphs import Chain, adapted
from serving_models import served
from torch import nn

from lorafx.serving.programs import ProgramCache
from lorafx.serving.tree_state import TreeGuards
from lorafx.tree.watched import watched


@pytest.mark.slow
def test_a_kept_graph_runs_while_another_thread_captures():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    expected, wrong, stop = lora(x).detach(), [], threading.Event()

    def run():
        while not stop.is_set():
            try:
                output = lora(x).detach()
                if type(output) is not torch.Tensor or not torch.equal(output, expected):
                    wrong.append(output)
            except Exception as error:
                wrong.append(error)

    others = [threading.Thread(target=run) for _ in range(2)]
    for thread in others:
        thread.start()
    for dims in range(2, 6):
        lora(torch.randn(*[2] * dims, 4))
    stop.set()
    for thread in others:
        thread.join()
    assert wrong == []


def test_first_calls_from_several_threads_make_one_graph():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    results: list = []
    threads = [threading.Thread(target=lambda: results.append(lora(x).detach())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, results[0]) for result in results)
    assert served(lora) == ["graph"]


@pytest.fixture
def switching():
    """Threads take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(run, threads=4):
    """Run a function in several threads that start at once; returns what they raised."""
    raised, start = [], threading.Barrier(threads)

    def turn(number):
        start.wait()
        try:
            run(number)
        except Exception as error:
            raised.append(error)

    every = [threading.Thread(target=turn, args=(number,)) for number in range(threads)]
    for thread in every:
        thread.start()
    for thread in every:
        thread.join()
    return raised


def test_a_tree_is_looked_at_first_by_several_threads(switching):
    root = nn.Sequential(*(nn.Linear(2, 3) for _ in range(5)))
    for guards in (TreeGuards() for _ in range(20)):
        assert together(lambda _, guards=guards: [guards.state(root) for _ in range(3)]) == []
        assert guards.state(root).layout == 0


def test_programs_are_kept_and_looked_up_by_several_threads(switching):
    cache: ProgramCache[int] = ProgramCache(3)

    def use(number):
        for turn in range(500):
            cache.keep((number + turn) % 7, number)
            assert len(cache.of(turn % 7)) <= 500 and all(each < 4 for each in cache)

    assert together(use) == []


@pytest.mark.usefixtures("early")
def test_a_first_call_while_another_thread_watches_the_same_weights():
    lora, x = adapted(Chain()), torch.randn(5, 4)
    expected = copy.deepcopy(lora)(x)
    with watched([module.weight for module in (lora.first, lora.second)]):  # as in a later call of another thread
        torch.testing.assert_close(lora(x), expected)
    assert served(lora) == ["sites"]
