"""Hold everything a user may decide: `torch.compile(..., options={...})`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import Any, Literal, cast

from moecc.runtime.errors import OptionError
from moecc.runtime.schemes.scheme import SCHEMES, Scheme, Schemes

POLICIES = ("auto", "lru", "lfu", "lookahead")
MISSES = ("wait", "home")
TOKENS = ("replicated", "split")
EMITTERS = ("auto", "triton", "native", "torch")
_PROJECTIONS = {
    "gate_proj": ("gate_proj", "gate_up_proj"),
    "up_proj": ("up_proj", "gate_up_proj"),
    "down_proj": ("down_proj",),
}
"""What patterns may call each matrix of an expert."""
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)bpw")
_DECIMAL = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS = _DECIMAL | {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user asked for, checked. Fields are the table in the README."""

    quantize: str | Mapping[str, str] | None = None
    expert_memory: int | float | None = None
    """Bytes, or a share of the experts' own bytes as a float in (0, 1]; None is all resident."""
    lookahead: int | Literal["auto"] = "auto"
    policy: str = "auto"
    trace: str | None = None
    """A file of `moecc trace`, by which `expert_memory` is shared among blocks; None is evenly."""
    misses: str = "wait"
    """`home` computes an expert in host memory when that is sooner than its copy to a device."""
    kernels: str = "auto"
    dense_linears: bool | str | Mapping[str, str] = "auto"
    """Linear layers in bf16 and fp16 run on our kernels; auto is where the CPU widens these. A
    scheme, or a mapping to schemes from patterns of paths, has them read low-bit copies."""
    attention: bool = True
    """Attention of a few query tokens runs on our kernel, on CPUs."""
    outline: bool | Literal["auto"] = "auto"
    """Layers that repeat are compiled once; auto is where that saves a third of the compilation."""
    expert_parallel: Any = None
    """Ranks that share each block's experts: how many, a DeviceMesh or a ProcessGroup."""
    tokens: Literal["replicated", "split"] = "replicated"
    """Whether these ranks all run the same tokens, or each its own."""
    inner: str = "inductor"
    """Auto is inductor for layers, and nothing for what is a small share of a call beside them."""
    progress: bool | Literal["auto"] = "auto"
    """Tell on stderr what the inner backend compiles; auto is on a terminal."""
    strict: bool = False

    def schemes(self, path: str) -> Schemes | None:
        """Give the schemes of the block at a path; None where one of its products has none.

        Raises `OptionError` when gate and up, which are one product, have different ones.
        """
        gate, up, down = self.by_projection(path).values()
        if gate != up:
            raise OptionError(
                f"quantize={self.quantize!r} gives {path}.gate_proj {gate or 'nothing'} and "
                f"{path}.up_proj {up or 'nothing'}; they are one product, so name both: "
                "'*.gate_up_proj'"
            )
        return Schemes(first=gate, second=down) if gate and down else None

    def linear_scheme(self, path: str) -> Scheme | None:
        """Give the scheme of the linear layer at a path: of a mapping, from the first pattern."""
        wanted = self.dense_linears
        if isinstance(wanted, Mapping):
            wanted = next((one for glob, one in wanted.items() if fnmatch(path, glob)), "auto")
        return SCHEMES.get(wanted) if isinstance(wanted, str) else None

    @property
    def budget(self) -> float | None:
        """Bits a weight to share among blocks (`moecc.budgets`), if that was asked for."""
        found = _BUDGET.fullmatch(self.quantize) if isinstance(self.quantize, str) else None
        return float(found[1]) if found else None

    def by_projection(self, path: str) -> dict[str, Scheme | None]:
        """Give what each projection of a block gets: of a mapping, from the first pattern.

        Patterns match `<block path>.<projection>`, where `gate_up_proj` is gate and up, or the
        block's path alone.
        """
        if self.budget is not None:
            raise OptionError(
                f"quantize={self.quantize!r} shares bits among all blocks of a model, and here is "
                "only a graph of it; give torch.compile the model itself, or quantize a mapping"
            )
        if self.quantize is None or isinstance(self.quantize, str):
            return dict.fromkeys(_PROJECTIONS, SCHEMES[self.quantize] if self.quantize else None)
        found: dict[str, Scheme | None] = {}
        for projection, aliases in _PROJECTIONS.items():
            names = [path, *(f"{path}.{one}" for one in aliases)]
            found[projection] = next(
                (
                    SCHEMES[scheme]
                    for glob, scheme in self.quantize.items()
                    if any(fnmatch(name, glob) for name in names)
                ),
                None,
            )
        return found

    @staticmethod
    def parse(given: Mapping[str, Any] | None) -> "Options":
        """Check a plain mapping.

        Raises `OptionError` naming the key, the value and what is allowed.
        """
        if not isinstance(given, Mapping | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(f"options are {given!r}; moecc takes a mapping of names to values")
        given = dict(given or {})
        names = [field.name for field in fields(Options)]
        unknown = [key for key in given if key not in names]
        if unknown:
            raise OptionError(f"unknown option(s) {unknown}; moecc takes {names}")
        return Options(**{key: _CHECKS[key](value) for key, value in given.items()})


def parse_memory(value: Any) -> int | float | None:
    """Read an amount of memory: None, bytes, '8GiB', '500 MB' or a share such as '25%'.

    Returns bytes as an int, a share as a float in (0, 1].
    """
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*|%)\s*", value)
        if found and found[2] == "%" and 0 < float(found[1]) <= 100:
            return float(found[1]) / 100
        scale = _UNITS.get(found[2].upper(), 0) if found else 0
        if found and (size := int(float(found[1]) * scale)) > 0:
            return size
    raise _bad("expert_memory", value, "None, bytes, '8GiB' or a share such as '25%'")


def _bad(key: str, value: Any, allowed: str) -> OptionError:
    return OptionError(f"option {key!r} is {value!r}; allowed: {allowed}")


def _quantize(value: Any) -> Any:
    allowed = (
        f"None, one of {list(SCHEMES)}, a mapping to them from patterns of block paths or "
        "projections ('*.down_proj'), or bits a weight above 2 and up to 8.5 ('4.5bpw')"
    )
    if value is None or (isinstance(value, str) and value in SCHEMES):
        return value
    if (
        isinstance(value, str)
        and (found := _BUDGET.fullmatch(value))
        and 2 < float(found[1]) <= 8.5
    ):
        return value
    if (pairs := _pairs(value)) is not None:
        return pairs
    raise _bad("quantize", value, allowed)


def _pairs(value: Any) -> dict[str, str] | None:
    """Read a mapping from patterns to schemes; None for anything else."""
    pairs = dict(cast(Mapping[Any, Any], value)) if isinstance(value, Mapping) else {}
    fits = all(isinstance(glob, str) and one in SCHEMES for glob, one in pairs.items())
    return pairs if pairs and fits else None


def _dense_linears(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, str) and value in ("auto", *SCHEMES)):
        return value
    if (pairs := _pairs(value)) is not None:
        return pairs
    allowed = f"True, False, 'auto', one of {list(SCHEMES)}, or a mapping to them from patterns"
    raise _bad("dense_linears", value, f"{allowed} of paths ('*.self_attn.*')")


def _lookahead(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise _bad("lookahead", value, "'auto' or a number of layers, 0 for none")


def _flag_or_auto(key: str) -> Any:
    def check(value: Any) -> Any:
        if value == "auto" or isinstance(value, bool):
            return value
        raise _bad(key, value, "True, False or 'auto'")

    return check


def _trace(value: Any) -> str | None:
    if value is None or (isinstance(value, str | Path) and Path(value).is_file()):
        return None if value is None else str(value)
    raise _bad("trace", value, "None or a file that moecc trace wrote")


def _one_of(key: str, allowed: tuple[str, ...]) -> Any:
    def check(value: Any) -> str:
        if isinstance(value, str) and value in allowed:
            return value
        raise _bad(key, value, f"one of {list(allowed)}")

    return check


def _expert_parallel(value: Any) -> Any:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if value is None or number or isinstance(value, ProcessGroup | DeviceMesh):
        return value
    raise _bad("expert_parallel", value, "None, a number of ranks, a DeviceMesh or a ProcessGroup")


def _inner(value: Any) -> str:
    import torch

    backends = torch.compiler.list_backends(exclude_tags=())
    allowed = ["auto", *(name for name in backends if name != "moecc")]
    if isinstance(value, str) and value in allowed:
        return value
    raise _bad("inner", value, f"auto or a registered backend: {allowed}")


def _flag(key: str) -> Any:
    def check(value: Any) -> bool:
        if isinstance(value, bool):
            return value
        raise _bad(key, value, "True or False")

    return check


_CHECKS: dict[str, Any] = {
    "quantize": _quantize,
    "expert_memory": parse_memory,
    "lookahead": _lookahead,
    "policy": _one_of("policy", POLICIES),
    "trace": _trace,
    "misses": _one_of("misses", MISSES),
    "kernels": _one_of("kernels", EMITTERS),
    "dense_linears": _dense_linears,
    "attention": _flag("attention"),
    "outline": _flag_or_auto("outline"),
    "expert_parallel": _expert_parallel,
    "tokens": _one_of("tokens", TOKENS),
    "inner": _inner,
    "progress": _flag_or_auto("progress"),
    "strict": _flag("strict"),
}
