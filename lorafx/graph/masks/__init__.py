"""Masks: what a graph computes of sizes alone, such as an attention mask.

`sizes` runs such nodes at chosen sizes; `positions` says which sizes are enough to have seen them all.
"""
