"""The tree of owners: every parameter has one owner, found by one path.

In comes a base model; out comes a mirror of its modules, which shares the parameters and can carry adapters that the
base never sees. `mirror` makes it, without what others have wrapped around the base (`wrappers`) and with their hooks
kept outside of the sites (`hooks`), and `unfit_bases` refuses what it cannot be made of; `replication` makes one that
has layers several times. `attached` hangs tensors into it and tells them from the model's own, `lookup` finds tensors
by path, `memory` knows which lie in one place. `own_layers` are modules that always run their own code, as quantised
ones do; `watched` tells who reads a tensor.

What modules hold besides tensors and modules is in `holdings` (what a value holds), `settings` (where values are),
`redirection` (what leads to a module leads to its mirror) and `originals` (what still does not). `modes` are training
and eval.
"""
