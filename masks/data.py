"""Arrays inside masks and token orders: compared by content, printed as text."""

from __future__ import annotations

import base64
import hashlib
import zlib

import numpy as np

_TEXT_LIMIT = 1 << 20  # bytes; a repr abbreviates larger data


class Data:
    """Immutable array that compares by content; the repr of a small one parses back to it."""

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
        """Parse the text of a repr; raise ValueError for any other text."""
        try:
            size, _, code = text.partition(":")
            rows, cols = map(int, size.split("x"))
            raw = zlib.decompress(base64.b64decode(code, validate=True))
            return cls((rows, cols), np.frombuffer(raw, dtype))
        except (ValueError, zlib.error) as error:
            raise ValueError(f"{name}: {text[:40]!r} is not a text printed by repr()") from error
