"""Adapters: what a config picks in a model, and what is put there.

In come a module tree and a config; out come a selection of sites and the adapter planned for them. `config` has the
options, `selection` finds each `site`, `adapter` says which tensors there are and where they hang, `equation` writes
what they compute for a graph. Three axes have a file for each member: `kinds/` (adapter families), `readings/`
(operators that read weights) and `storages/` (ways of keeping weights).
"""
