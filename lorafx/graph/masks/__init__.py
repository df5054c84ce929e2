"""Masks: what a graph computes from sizes alone, such as an attention mask.

`sizes` runs such nodes at chosen sizes; `positions` says which sizes have to be tried to know a mask at all sizes.
"""
