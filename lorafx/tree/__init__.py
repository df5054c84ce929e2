"""The tree of owners: every parameter has one owner, found by one path.

In comes a base model; out comes a mirror of its modules, which shares the parameters and can carry adapters that the
base never sees. `mirror` makes it, `wrappers` takes off what is around the base, `hooks` keeps its hooks, `attached`
hangs tensors into it and tells them from the model's own, `lookup` finds tensors by path.
"""
