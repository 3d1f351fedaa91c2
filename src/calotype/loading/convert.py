"""From one layout to another, tensor by tensor, bit for bit."""

from __future__ import annotations

import os


def convert(source: str | os.PathLike[str], out: str | os.PathLike[str], layout: str) -> None:
    """Placeholder."""
    raise NotImplementedError
