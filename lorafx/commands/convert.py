"""`lorafx convert`: an adapter in one of PEFT's old formats, in today's.

What PEFT's loader still takes, and this with it: weights in a pickle, `adapter_model.bin`, and the two fields that its
configs had before PEFT 0.3. `merge_weights` said when to merge, and changes nothing; `enable_lora`, where it is not
null, said that the file's tensors are of a layer which PEFT has no longer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors.torch import save

from ..errors import CheckpointError
from ..files import checkpoint
from ..files.folder import replace_folder
from ..files.model_card import CARD
from .refusals import refusing

_GONE = ("merge_weights", "enable_lora")


@refusing
def convert(
    adapter: Annotated[str, typer.Argument(help="folder or Hub id of an adapter in PEFT's format, old or new")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the folder to write; not there yet, or empty")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> int:
    """Write an adapter of PEFT's old formats as today's: weights as safetensors, no fields that are gone.

    A pickle is read through torch's restricted unpickler. Tensors and all other fields stay as they are.

    Example: lorafx convert old-adapter/ -o adapter/
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} is there already; name a folder that is not")
    found = checkpoint.read(adapter, weights_only=True)
    config = json.loads((found.folder / checkpoint.CONFIG).read_text("utf-8"))
    gone = [name for name in _GONE if name in config]
    if config.get("enable_lora"):
        layer = "a layer that PEFT has not had since 0.3, so neither it nor lorafx reads them; train it again"
        raise CheckpointError(f"{adapter}: `enable_lora` says that its tensors are of {layer}")
    files = {checkpoint.CONFIG: _json(config, gone), checkpoint.WEIGHTS: _safetensors(found)}
    if (found.folder / CARD).is_file():
        files[CARD] = (found.folder / CARD).read_bytes()
    replace_folder(out, files)
    facts = {"out": str(out.resolve()), "tensors": len(found.tensors), "left_out": gone}
    print(json.dumps(facts, indent=2) if as_json else _words(facts))
    return 0


def _json(config: dict[str, Any], gone: list[str]) -> bytes:
    return (json.dumps({name: each for name, each in config.items() if name not in gone}, indent=2) + "\n").encode()


def _safetensors(found: checkpoint.Checkpoint) -> bytes:
    """A pickle may hold views of one memory, which safetensors does not."""
    return save({key: tensor.contiguous().clone() for key, tensor in found.tensors.items()}, metadata={"format": "pt"})


def _words(facts: dict[str, Any]) -> str:
    left_out = f", without the fields {', '.join(facts['left_out'])}" if facts["left_out"] else ""
    return f"{facts['tensors']} tensors written to {facts['out']}{left_out}"
