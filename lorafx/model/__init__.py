"""The adapted model: what a user holds.

In come a base model and a dispatcher of calls; out comes an instance of the base's class with adapters.
`adapted_model` is the model, and parts of it are `merges`, `saving` and `trainers` (what trainers expect of PEFT's
models). `state` holds what it has besides modules, `report` what `report()` and `explain()` return.
"""
