"""Serving: which program serves a call.

In come an adapted tree and a call; out comes its result. `dispatcher` takes the call's key, finds a program for it and
runs it. A new kind of call is served without a graph until it has come more often (`early_calls`). `call_key` says what
a program was specialised on, `tree_state` and `attribute_guards` what of it lies in the tree, and `programs` keeps what
was made. `graph_builder` makes a graph; `interpret` runs the model's own Python where there is none, `per_site`: what
reads an adapted weight, as the `site_table` says, is computed in the adapters' equations (`direct`), or by
`site_graphs`. What is decided on the way has a file for each idea: `free_counters` (which integers may be any),
`misses` (in what a new kind of call differs), `site_policy` (what goes by sites, and why), `settling` (models that
change themselves once), `checkpointing` (what runs again in backward), `scripts` (functions of TorchScript that read a
weight), `adapter_hooks` (hooks on an adapter's own modules), `traced` (calls that somebody else records) and `acting`
(whether a call ran a site at all).
"""
