"""torch's private parts: whatever lorafx uses of torch, and replaces in transformers, that neither of them documents.

The rest of lorafx imports such things from here, so this room is where lorafx is fitted to another release of torch.
With each name stands what it is in torch and what would break without it. `tensors` asks about tensors and modules,
`graphs` about operators, nodes and graphs, `tracing` is for torch.export and `guards` for the checks that it writes,
`compilers` are for torch.compile and `inductor` for what that compiles with, `cuda` for memory on a GPU, `loading` is
how transformers reads checkpoints, `hidden_states` has its hooks for these, and `replacing` puts functions in the place
of others while a model is captured. The room knows nothing of lorafx.

Not here, because lorafx uses them everywhere and torch has kept them for years: `torch.utils._pytree` (a call's
arguments as a flat list), `torch._ops` (the classes of operators), operators below `torch.ops` whatever their names,
and the dicts `_parameters`, `_buffers` and `_modules` of a module.
"""
