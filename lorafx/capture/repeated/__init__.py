"""Repeated layers: the first of each kind is traced, and those that ask torch for the same become calls of its block.

The Python of every layer runs. While it runs, what it asks of torch is compared with what earlier layers asked, on
tensors that torch treats alike; as long as it is the same, the layer is given their answers and nothing is traced. So
nothing is assumed about a layer: its class, its number and its place in a cache do what they do. Where it asks for
something else, what it asked so far is traced after all, and then the rest.

`layers` listens to each layer while the model is exported. `record` is what a layer asked and was answered; `recorder`
fills it while the layer is traced, `replayer` answers from earlier layers' records, `answers` says what an answer is
without its tensors. `hidden_parameters` keeps layers' parameters out of torch.export's sight until they are needed.
What comes out is a graph in which marks (`marks`) stand for layers, and `folding` makes blocks and calls of them.
"""
