"""Capture: one call of a model becomes a graph of ATen operators.

In come a module tree and the arguments of a call; out comes a graph module that reads the tree. `export` runs
torch.export, in the surroundings that `contexts` makes. `arguments` names a call's arguments; `written_arguments` fills
those that the model would fill. `caches` and `batches` let torch see into key-value caches and into what tokenizers
give; `padding` does what torch's kernel for encoders does there. `repeated/` has layers that are alike traced once.

A graph would not do again what a call does besides computing. So `purity` refuses calls that change the model,
`autograd_use`, `outside_use` and `process_use` those that ask for more than tensors (`frames` tells the model's code
from torch's), and `layout_use` notes who asks how tensors lie in memory. `loops` refuses loops over a size, and knows
the modules that have one. `foreign_tensors` knows the tree's tensors wherever a model has them from.
"""
