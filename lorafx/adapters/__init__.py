"""Adapters: what a config picks in a model, and what is put there.

In come a module tree and a config; out go a selection of sites and the adapter planned for them. `config` has the
options, `selection` finds the sites, `adapter` says which tensors there are and where they hang. `kinds/` holds the
equations, a file an adapter family.
"""
