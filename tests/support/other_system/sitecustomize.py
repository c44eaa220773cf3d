"""A system without what only Unix or Linux has. Python runs this file first where its folder is on the path.

The modules `fcntl` and `resource`, the files of the kernel and forking are not there for this project and for filelock;
other libraries may use them, as they have their own ways elsewhere.
"""

import builtins
import multiprocessing
import os
import pathlib

HIDDEN_MODULES = {"fcntl", "resource", "pwd", "grp"}
HIDDEN_FILES = ("/proc", "/sys")
HIDDEN_NAMES = ("fork", "sched_getaffinity")  # torch itself asks for the others
BLIND = ("prefect_huggingface", "filelock")

_import, _read_text = builtins.__import__, pathlib.Path.read_text


def _hidden_import(name, globals=None, locals=None, fromlist=(), level=0):
    importer = str((globals or {}).get("__name__", ""))
    program = str((globals or {}).get("__file__", ""))
    ours = importer.startswith(BLIND) or (importer == "__main__" and "/storage/exports/" in program)
    if ours and level == 0 and name in HIDDEN_MODULES:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return _import(name, globals, locals, fromlist, level)


def _hidden_read_text(self, *arguments, **keywords):
    if str(self).startswith(HIDDEN_FILES):
        raise FileNotFoundError(2, "No such file or directory", str(self))
    return _read_text(self, *arguments, **keywords)


builtins.__import__ = _hidden_import
pathlib.Path.read_text = _hidden_read_text
for _name in HIDDEN_NAMES:
    if hasattr(os, _name):
        delattr(os, _name)
multiprocessing.set_start_method("spawn")
