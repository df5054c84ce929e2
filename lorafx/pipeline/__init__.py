"""The pipeline: passes in order, the graph verified after each.

In come a graph and the adapters that act; out comes the rewritten graph, and a `Step` of what each pass did.
"""
