"""Describe hardware in the few numbers that decide how fast experts come and compute.

Profiles are TOML files: those in `profiles/` by name, others by path. `moecc profile` measures one.
"""

import json
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moecc.runtime.errors import OptionError

_FOLDER = Path(__file__).parent / "profiles"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpeed:
    """How experts move."""

    bandwidth: float
    """Bytes a second of several reads at once."""
    stream: float
    """Bytes a second of one read alone."""
    latency: float
    """Seconds before the first byte of a read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeSpeed:
    """How a model computes whose experts are all there; seconds, and bytes a second."""

    bandwidth: float
    """With which weights are read by kernels."""
    balance: float
    """Rows of tokens for which an expert takes twice as long as for one, and so on."""
    launch: float
    """One call of a kernel, whatever it computes."""
    call: float
    """One call of a bank, beside its kernels."""
    layer: float
    """Between two blocks, beside reading weights."""
    token: float
    """A token, beside its layers and reading weights."""
    beside_reads: float
    """Times as long while experts are being read; kernels also just after that."""
    after_reads: float
    """Times as long for the rest of the model just after: caches are cold, threads were asleep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A machine, or what is known of one."""

    name: str
    tier: str
    """Which memory holds the experts that compute, and what fills it."""
    source: str
    """Where the figures come from."""
    link: LinkSpeed
    compute: ComputeSpeed


def names() -> list[str]:
    """List the profiles that come with moecc."""
    return sorted(file.stem for file in _FOLDER.glob("*.toml"))


def read(name: str) -> Profile:
    """Read a profile by name or path.

    Raises `OptionError` when there is none, or it lacks a number or has one below zero.
    """
    file = _FOLDER / f"{name}.toml" if name in names() else Path(name)
    if not file.is_file():
        raise OptionError(f"no profile {name!r}: give a TOML file, or one of {names()}")
    try:
        known: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
        return Profile(
            name=known["name"],
            tier=known["tier"],
            source=known["source"],
            link=LinkSpeed(**_numbers(known["link"], LinkSpeed)),
            compute=ComputeSpeed(**_numbers(known["compute"], ComputeSpeed)),
        )
    except KeyError as error:
        raise OptionError(f"the profile {str(file)!r} lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise OptionError(f"the profile {str(file)!r} is damaged: {error}") from error


def write(profile: Profile, file: Path) -> None:
    """Write a profile as TOML."""
    about = {"name": profile.name, "tier": profile.tier, "source": profile.source}
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in about.items()]
    for part, numbers in (("link", profile.link), ("compute", profile.compute)):
        lines += ["", f"[{part}]"]
        lines += [f"{name} = {value:.4g}" for name, value in asdict(numbers).items()]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _numbers(given: dict[str, Any], kind: Any) -> dict[str, float]:
    for name, value in given.items():
        if not isinstance(value, int | float) or value < 0:
            raise ValueError(f"{name} is {value!r}, not a number from 0 up")
    return {one.name: float(given[one.name]) for one in fields(kind)}
