"""The version of this package, and those of others."""

from __future__ import annotations

from importlib import metadata

VERSION = "0.1.0"


def installed(distribution: str) -> str | None:
    """The version of an installed distribution; None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
