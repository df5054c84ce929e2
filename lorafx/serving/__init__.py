"""Serving: which program serves a call.

In come an adapted tree and a call; out comes its result. `dispatcher` takes the call's key, finds a program for it and
runs it. `call_key` says what a program was specialised on, `tree_state` and `attribute_guards` what of that lies in the
tree, and `keys` what of it makes a difference. `programs` keeps what was made.

`program_maker` makes what serves a new kind of call. A program is a graph: `graph_builder` makes one, once a kind of
call has come often (`early_calls`); `rebinding` makes one of another that has other adapters. `misses` knows in what a
new kind of call differs, and `free_counters` which integers may be any.

Or it is the model's own Python, which `by_sites` has run and `interpret` runs. `per_site` is told of each function that
reads one of the `adapted_tensors`, which a `site_table` has the places of. It has it computed in the adapters'
equations (`direct`), also of a weight that is `turned` round first, or with W + ΔW (`values`), or by a graph of its own
(`operator_call`, `site_graphs`) with the adapters that are `concerned`. `site_policy` says which calls go so, and why;
`before` puts back what a call has changed that has to start anew. What leaves a call, as threads do, finds its way back
by what is put in place for the `whole_process`.

The rest is one question each: do all `adapted_modules` still hold their weights, has a call run a site at all
(`acting`), which adapter has each row (`choosing`), who hooks an adapter's modules (`adapter_hooks`), does the model
change itself once (`settling`), what runs again in backward (`checkpointing`), what reads a weight in TorchScript
(`scripts`), in a backward of its own (`own_backward`) or by a tensor's `methods`, and does somebody record the call
(`traced`).
"""
