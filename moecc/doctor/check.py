"""Hold what was found about one thing."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that moecc needs or can use."""

    name: str
    status: Literal["ok", "limited", "broken"]
    """`limited`: moecc works without it, with less or slower; `broken`: it does not."""
    found: str
    fix: str = ""
    """What to do; empty where it is fine."""
    measured: float | None = None
    """Of what has a speed: bytes, or FLOPs of products, a second."""


def ok(name: str, found: str, measured: float | None = None) -> Check:
    """Say that something works."""
    return Check(name=name, status="ok", found=found, measured=measured)


def limited(name: str, found: str, fix: str) -> Check:
    """Say that moecc does without something, and what would help."""
    return Check(name=name, status="limited", found=found, fix=fix)


def broken(name: str, found: str, fix: str) -> Check:
    """Say that something has to be mended."""
    return Check(name=name, status="broken", found=found, fix=fix)
