"""The adapted model: what a user holds.

In come a base model and what serves it; out comes an instance of the base's class with adapters. `adapted_model` is
the model, `state` what it is besides a module tree, `saving` its files, `trainers` what trainers ask, `report` what
it says.
"""
