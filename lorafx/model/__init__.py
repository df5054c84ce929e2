"""The adapted model: what a user holds.

In come a base model and a dispatcher of calls; out comes an instance of the base's class with adapters.
`adapted_model` is the model, `calls` serves it and its parts, and `state` holds what it has besides modules. What
lorafx offers of it is `adaptation`, in parts: `adapters`, `merges`, `scales`, `saving` and `like_peft`; `names` lets
the model have these names too, as far as its base leaves them free. `report` is what `report()` and `explain()` return,
`backward` says why nothing trains, `trainers` is what trainers expect of PEFT's models.
"""

from .adapted_model import AdaptedModel

__all__ = ["AdaptedModel"]
