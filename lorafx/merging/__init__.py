"""Merging: adapters into the base weights, and exactly out again; and onto a checkpoint on disk.

In come a tree and adapters; `ledger` writes the merged weights and remembers how to undo it, with a `source` for each
adapter at each site (what it was when it was merged) and a `residual` for each weight (what rounding took).

`streaming` merges onto a base's files without the model in memory: `fitting` has the model without its numbers and the
adapters that fit it, `changes` what becomes of each tensor, `output` what is written; `command` is the command line.
"""
