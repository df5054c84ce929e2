"""compilers: what torch.compile made of functions, and functions that Dynamo leaves alone."""

import functools

import torch
import torch._dynamo
from torch import nn

from lorafx.torch_private.compilers import compiled_module, compiler_in_charge, not_traced, uncompiled


def plain(x):
    return x + 1


def test_a_function_that_is_not_traced_knows_who_compiles():
    torch._dynamo.reset()
    seen, compiled = [], []

    @not_traced("because")
    def look(x):
        seen.append((torch.compiler.is_compiling(), compiler_in_charge()))
        return inner(x)

    @not_traced("because")
    def inner(x):
        seen.append((torch.compiler.is_compiling(), compiler_in_charge()))
        return x * 2

    def backend(gm, inputs):
        compiled.append(gm)
        return gm

    run = torch.compile(lambda x: look(x + 1) + 1, backend=backend)
    assert run(torch.ones(2)).tolist() == [5, 5]
    assert [compiler.compiler_fn for _, compiler in seen] == [backend, backend] and not any(flag for flag, _ in seen)
    assert compiler_in_charge() is None and look(torch.ones(1)) == 2 and seen[-1] == (False, None)
    targets = [str(node.target) for gm in compiled for node in gm.graph.nodes if node.op == "call_function"]
    assert targets and all("add" in target for target in targets)


def test_what_was_compiled_is_found():
    layer = nn.Linear(2, 2)
    assert uncompiled(torch.compile(plain)) is plain and uncompiled(plain) is plain and uncompiled(3) == 3
    assert uncompiled(torch.compile(layer.forward)).__self__ is layer
    assert uncompiled(torch.compile(layer.forward)).__func__ is nn.Linear.forward
    assert compiled_module(torch.compile(layer)) is layer and compiled_module(layer) is None


def test_what_is_around_a_compiled_function_stays():
    @functools.wraps(torch.compile(plain))
    def twice(x):
        return 2 * plain(x)

    disabled = torch.compiler.disable(plain)
    assert uncompiled(twice) is twice and uncompiled(disabled) is disabled
