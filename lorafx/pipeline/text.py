"""The text of a pipeline, read back: `name, name{option=value}, …`."""

from __future__ import annotations

import ast
import dataclasses
import io
import re
import tokenize
from typing import Any

from ..errors import PipelineError
from .definition import Pass


def split(text: str) -> list[str]:
    """The parts of a pipeline's text, cut at commas outside brackets; `PipelineError` if Python cannot tokenise it."""
    parts, depth, start = [], 0, 0
    flat = " ".join(text.split("\n"))
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(flat).readline))
    except (tokenize.TokenError, SyntaxError) as error:
        raise PipelineError(f"cannot read the pipeline {text!r}: {error}") from error
    for token in tokens:
        depth += (token.string in ("{", "(", "[")) - (token.string in ("}", ")", "]"))
        if token.string == "," and depth == 0:
            parts.append(flat[start : token.start[1]])
            start = token.end[1]
    return [part.strip() for part in (*parts, flat[start:]) if part.strip()]


def parse_pass(text: str) -> Pass:
    """The pass that `name` or `name{option=value}` says; `PipelineError` for any other text."""
    found = re.fullmatch(r"(\w+)\s*(?:\{(.*)\})?", text)
    if not found:
        raise PipelineError(f"{text!r} is no pass; write name or name{{option=value}}")
    name, options = found[1], found[2] or ""
    if name not in Pass.known:
        raise PipelineError(f"unknown pass {name!r}; known: {', '.join(sorted(Pass.known))}")
    return _construct(Pass.known[name], options, text)


def _construct(cls: type[Pass], options: str, text: str) -> Pass:
    try:
        call = ast.parse(f"f({options})", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        values: dict[str, Any] = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        return cls(**values)
    except (SyntaxError, ValueError, AssertionError, TypeError) as error:
        fields = ", ".join(f.name for f in dataclasses.fields(cls)) or "none"
        raise PipelineError(f"cannot read {text!r}: {error or 'options are name=value'} (options: {fields})") from error
