"""Capture: one call of a model becomes a graph of ATen operators.

In come a module tree and the arguments of a call; out comes a graph module that reads the tree. `export` runs
torch.export, `caches` makes key-value caches its inputs and outputs, `arguments` fills what the call was given,
`purity` refuses calls that do more than tensor operators, `repeated/` traces layers that repeat once.
"""
