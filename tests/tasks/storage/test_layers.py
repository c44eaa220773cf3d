"""What imports what in the store: the Hub knows nothing of exports, and there is one of each small thing."""

from __future__ import annotations

import ast
from pathlib import Path

STORAGE = Path(__file__).parents[3] / "tasks" / "storage"


def imports_of(path: Path) -> set[str]:
    """Return the modules that a file imports, those within its functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_the_hub_and_what_it_builds_on_do_not_import_exports() -> None:
    shared = [STORAGE / f"{name}.py" for name in ("files", "locks", "folders", "eviction")]
    for path in [*(STORAGE / "hub").glob("*.py"), *shared]:
        assert not [name for name in imports_of(path) if ".storage.exports" in name], path


def test_one_hash_one_atomic_write_and_one_lock_of_the_kernel() -> None:
    """`os.replace` also publishes a blob, a link and a log; the modules that may are named."""
    may = {"files.py", "hub/cache.py", "hub/download.py"}
    for path in [*(STORAGE / "hub").glob("*.py"), *(STORAGE / "exports").glob("*.py"), *STORAGE.glob("*.py")]:
        name, text = path.relative_to(STORAGE).as_posix(), path.read_text(encoding="utf-8")
        assert "os.replace(" not in text or name in may or name == "places.py", name
        assert "file_digest(" not in text or name in ("files.py", "places.py"), name
        assert "fcntl" not in text or name == "locks.py", name
