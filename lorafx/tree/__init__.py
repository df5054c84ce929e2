"""The tree of owners: every parameter has one owner, found by one path.

In comes a base model; out goes a mirror of its modules, which shares the parameters and can carry adapters that the
base never sees. `mirror` makes it, `attached` hangs things into it and tells them apart, `lookup` finds tensors by
path.
"""
