"""`python -m lorafx merge`: adapters onto a checkpoint on disk."""

from __future__ import annotations

import argparse
import sys
import warnings

from ..errors import LorafxError
from .streaming import DTYPES, merge


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="folder or Hub id of the original model, as safetensors")
    parser.add_argument("adapters", metavar="ADAPTER", nargs="+", help="folder or Hub id of one in PEFT's format")
    parser.add_argument(
        "-o", "--out", metavar="OUT", required=True, help="the folder to write; not there yet, or empty"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the merged weights; default: each as it is stored")


def main(asked: argparse.Namespace) -> int:
    """Exit status. 0: done. 1: refused or failed, with a line on standard error that says why."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"merge: {message}", file=sys.stderr)
        try:
            out = merge(asked.base, asked.adapters, asked.out, dtype=asked.dtype)
        except LorafxError as error:
            print(f"merge: {error}", file=sys.stderr)
            return 1
    print(f"merged into {out}")
    return 0
