"""Adapters: what a config picks in a model, and what is put there.

In come a module tree and a config; out come a selection of sites and an adapter's tensors at them. `config` has the
options, and `default_targets` which modules are meant where it names none. `selection` finds each `site`, `parameters`
those that a config names itself, `expert_names` those that it names as if experts were layers (which they were, as
`experts` knows), and `mismatches` says what to do where there is none. `planning` decides which tensors there will be
and where they hang, by the adapter's name (`naming`); `adapter` is what knows them. `building` makes them, of the
kind's `start_values`, which may need `notes` that data has left beside a weight. Three axes have a file for each
member: `kinds/` (adapter families), `readings/` (operators that read weights) and `storages/` (ways of keeping
weights).

`equation` writes what an adapter computes for a graph, `by_row` what several do where rows choose. `low_rank` is the
change of a weight that two small matrices make, and `combining` makes one adapter's tensors of several. `slots` let an
adapter take the values of others, by `room` in its tensors. `tying` knows weights that modules share, and `peft_itself`
tells when it is peft's own code that asks.
"""
