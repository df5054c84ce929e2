"""Merging: adapters into the base weights, and exactly out again; and onto a checkpoint on disk.

In come a tree and adapters. `ledger` knows which are merged, and writes into all weights or none, a `batch` of small
ones that are alike at a time. An `entry` for each weight leads back, block by block: `steps` are what adapters do to a
block, `kept` is what a block leaves behind, a `residual` and a `fingerprint`, and a `source` is what an adapter was at
a site when it was merged. `scratch` is memory for a block. `dequantised` makes a model without quantised layers.

`streaming` merges onto a base's files without the model in memory: `fitting` has the model without its numbers (for
code of its own, `by_names` alone) and the adapters that fit it, `changes` what becomes of each tensor, `output` what is
written; `packed` says what of a quantised checkpoint may change.
"""
