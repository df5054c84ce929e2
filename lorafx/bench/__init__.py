"""The bench: what an adapter costs, next to the frozen base and to other libraries.

In come the names of cases and contestants; out come tables, a chart and a record in JSON. `cases` says what is run and
which bars it is held to, `models` builds a case's base, `contestants` sets up each library on it, `measure` takes time,
memory and gradients, `reference` says what these should be, `job` does all that for a case's contestants, `apart` in a
process of its own, `run` runs a case, `record` and `report` write what was found.
"""
