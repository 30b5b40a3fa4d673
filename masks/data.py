"""Arrays inside masks and orders: values that compare by content and print as text."""

from __future__ import annotations

import base64
import hashlib
import zlib

import numpy as np

_TEXT_LIMIT = 1 << 20  # bytes of data beyond which a repr abbreviates


class Data:
    """Immutable arrays that compare by content; small ones print as text that makes them again."""

    def __init__(self, shape: tuple[int, int], content: np.ndarray) -> None:
        self.shape, self.content = shape, content
        self.digest = hashlib.sha256(f"{shape}".encode() + content.tobytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Data) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        rows, cols = self.shape
        if self.content.nbytes > _TEXT_LIMIT:
            return f"<{rows} x {cols}, sha256 {self.digest[:12]}>"
        return repr(
            f"{rows}x{cols}:{base64.b64encode(zlib.compress(self.content.tobytes())).decode()}"
        )

    @classmethod
    def from_text(cls, name: str, text: str, dtype: type[np.generic]) -> Data:
        """The data that a repr describes; ValueError where it is no such text."""
        try:
            size, _, code = text.partition(":")
            rows, cols = map(int, size.split("x"))
            raw = zlib.decompress(base64.b64decode(code, validate=True))
            return cls((rows, cols), np.frombuffer(raw, dtype))
        except (ValueError, zlib.error) as error:
            raise ValueError(f"{name}: {text[:40]!r} is no text that repr() printed") from error
