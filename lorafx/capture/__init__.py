"""Capture: one call of a model becomes a graph of ATen operators.

In come a module tree and the arguments of a call; out comes a graph module that reads the tree. `export` runs
torch.export, in the surroundings that `contexts` makes. `arguments` names a call's arguments; `written_arguments` fills
those that the model would fill, and `caches` lets torch see into key-value caches, which are most of them. `purity`
refuses calls that do more than tensor operators, as do `autograd_use`, `outside_use` and `process_use`, by what the
model's own code asks for or does (`frames` tells it from torch's). `foreign_tensors` knows the tree's tensors wherever
a model has them from. `repeated/` has layers that are alike traced once.
"""
