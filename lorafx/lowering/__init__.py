"""Lowering: a rewritten graph becomes what runs.

In comes a graph module; out comes a function from a call's leaves to its output's: the graph itself with operators
called directly (`eager`), or compiled in pieces through torch.compile (`lower`), with passes for Inductor beside it.
"""
