"""Where exports lie in a store, and what their folders are called.

```
<store>/exports/<name>-<format>-<first 16 digits of the key>/   one export, whole
<store>/exports/.staging/<random>/                              an export in the making, renamed when it is whole
<store>/exports/.locks/<first 16 digits of the key>.lock        held by the process that makes the export
<store>/exports/.logs/<what>-<when>.log                         output of a child process that failed
<store>/hashes/<digest of the folder's path>.json               hashes of the files of a local folder
```

The name and the format are for people. An export is found by its key alone.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

KEY_DIGITS = 16
MANIFEST = "export.json"
LEASE = ".lease"


def exports_folder(store: Path) -> Path:
    """Return the folder of the exports of a store."""
    return store / "exports"


def staging_folder(store: Path) -> Path:
    """Return the folder of the exports that are being made."""
    return exports_folder(store) / ".staging"


def failure_logs_folder(staged: Path) -> Path:
    """Return the folder for the output of child processes that failed, for one that works in a staging folder."""
    return staged.parent.parent / ".logs"


def lock_path(store: Path, key: str) -> Path:
    """Return the path of the lock of one export."""
    return exports_folder(store) / ".locks" / f"{key[:KEY_DIGITS]}.lock"


def hash_cache_path(store: Path, folder: Path) -> Path:
    """Return the path of the remembered hashes of a local folder."""
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()
    return store / "hashes" / f"{digest[:32]}.json"


def export_name(model_name: str, weight_format: str, key: str) -> str:
    """Return the name of the folder of an export.

    Args:
        model_name: Repository id or folder of the source, for people to read.
        weight_format: Format of the weights.
        key: Key of the export, 64 hexadecimal digits.
    """
    last = model_name.rstrip("/").rsplit("/", 1)[-1]
    readable = re.sub(r"[^A-Za-z0-9_.]+", "-", last).strip("-.")[:48] or "model"
    return f"{readable}-{weight_format}-{key[:KEY_DIGITS]}"


def find_export_folder(store: Path, key: str) -> Path | None:
    """Return the folder of an export, or None if the store has none with the key."""
    ending = f"-{key[:KEY_DIGITS]}"
    try:
        names = os.listdir(exports_folder(store))
    except OSError:
        return None
    return next((exports_folder(store) / name for name in sorted(names) if name.endswith(ending)), None)
