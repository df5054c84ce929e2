"""Merging: adapters into the base weights, and exactly out again.

In come a tree and adapters; `ledger` writes the merged weights and remembers how to undo it, with a `source` for each
adapter at each site (what it was when it was merged) and a `residual` for each weight (what rounding took).
"""
