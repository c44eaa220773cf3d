"""Versions of the packages that decide what an export contains."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

EXPORT_PACKAGES = ("optimum-intel", "optimum", "nncf", "openvino", "openvino-tokenizers", "transformers", "torch")


@cache
def installed_version(package: str) -> str | None:
    """Return the version of an installed package without its local part, or None. Imports nothing."""
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return None


def export_versions() -> dict[str, str]:
    """Return the versions of the packages that make exports; a package that is missing is left out."""
    found = {package: installed_version(package) for package in EXPORT_PACKAGES}
    return {package: number for package, number in found.items() if number is not None}
