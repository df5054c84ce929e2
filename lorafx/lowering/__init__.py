"""Lowering: a rewritten graph becomes what runs.

In comes a graph module; out comes a function from a call's leaves to its output's. `backend` says how graphs are
compiled; `lower` gives the graph itself with operators called directly (`eager`), or has it compiled in `pieces`
through torch.compile; `inductor/` has the passes that Inductor runs for us. `cuda_graphs/` has calls launched as one,
and `errors_in_graphs` name the line of the model.
"""
