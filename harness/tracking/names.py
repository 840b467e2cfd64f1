"""Names that people give, made safe to be folders."""

from __future__ import annotations

import hashlib
import re

__all__ = ["folder_name"]

LONGEST = 100


def folder_name(name: str) -> str:
    """One folder's name: no path, no control characters, not hidden, not too long; unchanged if it was fine.

    Two different names never become one: what had to be changed gets a digest of the original.
    """
    safe = re.sub(r"[^\w .,=+@()\[\]-]", "_", name).strip(". ") or "run"
    if safe == name and len(name.encode()) <= LONGEST:
        return name
    digest = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()[:8]
    return f"{safe.encode()[: LONGEST - 9].decode(errors='ignore')}-{digest}"
