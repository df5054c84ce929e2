"""What is kept of a block of rows that is merged into, to give it back bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .fingerprint import Fingerprint, fingerprint, is_of, size
from .residual import Residual
from .steps import Rows


@dataclass(slots=True)
class Kept:
    """A residual or a copy of some rows, and the fingerprint of what they were.

    With a copy there is the fingerprint of what they became, too. What comes out of a residual depends on that anyway.
    """

    rows: Rows
    original: Fingerprint
    residual: Residual | None
    copy: Tensor | None = None
    merged: Fingerprint | None = None

    @classmethod
    def of(cls, rows: Rows, original: Tensor, merged: Tensor, guess: Tensor | None) -> Kept:
        """Of rows that were `original` and become `merged`; `guess` was made of that, if the kinds have inverses."""
        before = fingerprint(original)
        residual = None if guess is None else Residual.of(original, guess)
        if residual is not None and residual.nbytes < original.nbytes:
            return cls(rows, before, residual)
        return cls(rows, before, None, original.clone(), fingerprint(merged))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        fingerprints = sum(size(each) for each in (self.original, self.merged) if each is not None)
        return fingerprints + sum(part.nbytes for part in (self.residual, self.copy) if part is not None)

    def is_original(self, rows: Tensor) -> bool:
        """Whether these are the rows before the merge."""
        return is_of(self.original, rows)

    def restored(self, rows: Tensor, guess: Tensor | None) -> Tensor | None:
        """The original of rows, with the guess from them, which may be written over; None if it does not come back."""
        if self.residual is None:
            assert self.copy is not None and self.merged is not None
            return self.copy if is_of(self.merged, rows) else None
        assert guess is not None, "what has a residual has an inverse"
        found = self.residual.restore(guess)
        return found if self.is_original(found) else None
