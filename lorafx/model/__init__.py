"""The adapted model: what a user holds.

In come a base model and a dispatcher of calls; out comes an instance of the base's class with adapters. `adapted_model`
is the model, `calls` serves it and its parts, and `state` holds what it has besides modules. What lorafx offers of it
is `adaptation`; `names` lets the model have these names too, as far as its base leaves them free. Each `part` of that
is a file: `adapters`, `merges`, `scales`, `saving`, `weighted` (one adapter of several), `hotswap` (one takes another's
values), `allocation` (ranks shared out in training), `penalties` (of the loss), `graphs` and `like_peft`.

In a call, `rows` numbers the adapters that rows name, `activation` says on which tokens they act, `bounds` brings
tensors back to where they may be, and `backward` says why nothing trains. `report` is what `report()` and `explain()`
return; `trainers` is what trainers expect of PEFT's models, `optimizers_of_peft` what PEFT's optimizers do.

Before a base is adapted: `preparation` for training, `conversion` to float8, `preprocessing` by data. After it: start
values by `eva`, which looks for principal `components`, and by `loftq`.
"""

from .adapted_model import AdaptedModel

__all__ = ["AdaptedModel"]
