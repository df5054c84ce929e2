"""Threads: several call one adapted model at a time."""

import threading

import pytest
import torch
from graphs import Chain, adapted
from serving_models import served


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
