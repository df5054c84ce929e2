"""Merging: adapters into the base weights, and exactly out again.

In come a tree and adapters; `ledger` writes the merged weights and remembers how to undo it, `residual` holds what
rounding took.
"""
