"""Repeated layers: one is traced, and those that ask torch for the same are calls of it.

`recorder` runs while the model is exported, `parameters` keeps layers' parameters out of torch.export's sight until
they are read, `answers` describes what torch was asked and answered, `folding` makes blocks of what was recorded.
"""
