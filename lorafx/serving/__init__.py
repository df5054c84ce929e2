"""Serving: which program serves a call.

In come an adapted tree and a call; out comes its result. `call_key` says what a graph was specialised on,
`tree_state` and `attribute_guards` number the states of the tree, `programs` keeps what was made, `dispatcher` finds
or makes it, `per_site` runs the model's own Python where a call cannot be one graph, `misses` explains why a program
was made.
"""
