"""Examine every MoE family of transformers and write down what moecc raises.

    python -m benchmarks.coverage                          # all families, half an hour
    python -m benchmarks.coverage qwen3_moe llama4         # some
    python -m benchmarks.coverage --json FILE --markdown docs/coverage.md
    python -m benchmarks.coverage --again FILE --markdown docs/coverage.md   # the page alone

Each family runs in a fresh process with bounded memory and time (`benchmarks.family`). Exit status
is 1 if a family fails or does not compute what eager computes; one that is not raised is reported.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.coverage_report import TOLERANCE, page, raised, verdict
from moecc.tiny_families import FAMILIES

_HEADINGS = ("family", "layers", "prefill", "decode", "uncompiled", "graphs", "error", "s")
_WIDTHS = (21, 6, 7, 6, 10, 6, 6, 3)


def main() -> int:
    """Run the families, print a line each, and write what was asked for."""
    arguments = _arguments()
    console, status = Console(highlight=False), Console(stderr=True)
    found: list[dict[str, Any]] = []
    console.print(_line(_HEADINGS), style="bold", soft_wrap=True)
    with status.status(f"0 of {len(arguments.families)} families done") as live:
        for number, one in enumerate(_found(arguments), start=1):
            found.append(one)
            style = None if one["verdict"] == "raised" else "yellow"
            console.print(_row(one), style=style, soft_wrap=True)
            for reason in _reasons(one):
                console.print(f"    {reason}", style="dim", markup=False, soft_wrap=True)
            live.update(f"{number} of {len(arguments.families)} families done")
    console.print(_summary(found))
    if arguments.markdown is not None:
        arguments.markdown.write_text(page(found))
    return int(any(one["verdict"] == "wrong" for one in found))


def _arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help="all of them if none is named"
    )
    parser.add_argument("--inner", default="eager", help="backend for what is not MoE")
    parser.add_argument("--dtype", default="float32", choices=list(TOLERANCE))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a JSON line a family")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page")
    parser.add_argument("--again", type=Path, metavar="FILE", help="read JSON lines, run nothing")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for a family")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB for a family")
    arguments = parser.parse_args()
    if unknown := set(arguments.families).difference(FAMILIES):
        parser.error(f"no families {sorted(unknown)}; there are {', '.join(FAMILIES)}")
    arguments.families = arguments.families or list(FAMILIES)
    return arguments


def _found(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Give what is found in each family, from new runs or from an earlier run's file."""
    if arguments.again is not None:
        lines = map(json.loads, arguments.again.read_text().splitlines())
        known = {one["family"]: one for one in lines}  # a later line replaces an earlier one
        yield from (_judged(known[family]) for family in arguments.families if family in known)
        return
    if arguments.json is not None:
        arguments.json.write_text("")
    for family in arguments.families:
        one = _judged(_examined(family, arguments))
        if arguments.json is not None:
            with arguments.json.open("a") as file:
                print(json.dumps(one), file=file)
        yield one


def _examined(family: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one family in a process group of its own; `failure` says why there is no result."""
    command = [sys.executable, "-m", "benchmarks.family", family]
    for name in ("inner", "dtype", "memory"):
        command += [f"--{name}", str(getattr(arguments, name))]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=arguments.timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its compilers, too
        process.communicate()
        return {"family": family, "failure": f"not done after {arguments.timeout:.0f} s"}
    if process.returncode == 0:
        return json.loads(out.splitlines()[-1])
    return {"family": family, "failure": _last_error(err) or f"exit status {process.returncode}"}


def _judged(one: dict[str, Any]) -> dict[str, Any]:
    """Add the verdict, and what is wrong if something is."""
    found = verdict(one)
    wrong = one.get("failure") or f"differs from eager by {one['error']:.0e}"
    return one | {"verdict": found, "wrong": wrong if found == "wrong" else ""}


def _last_error(text: str) -> str:
    """Find what a process died of, `PassError: ...`, in what it printed."""
    named = (line for line in reversed(text.splitlines()) if re.match(r"[\w.]*Error(: |$)", line))
    return next(named, "")


def _line(cells: Sequence[str]) -> str:
    aligned = zip(cells, _WIDTHS, strict=True)
    return "  ".join(
        cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(aligned)
    ).rstrip()


def _row(one: dict[str, Any]) -> str:
    if "failure" in one:
        return f"{one['family'].ljust(_WIDTHS[0])}  FAILED"
    prefill, decode = one["prefill"], one["decode"]
    cells = (
        one["family"],
        str(prefill["layers"]),
        *raised(one),
        f"{prefill['graphs']}" + ("" if decode is None else f"+{decode['graphs']}"),
        f"{one['error']:.0e}",
        f"{one['seconds']:.0f}",
    )
    wrong = "  WRONG" if one["verdict"] == "wrong" else ""
    return _line(cells) + wrong


def _reasons(one: dict[str, Any]) -> list[str]:
    return [one["failure"]] if "failure" in one else one["misses"]


def _summary(found: list[dict[str, Any]]) -> str:
    verdicts = [one["verdict"] for one in found]
    kinds = ("raised", "partly raised", "not raised", "wrong")
    counts = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in kinds if kind in verdicts)
    return f"\n{len(found)} families: {counts}"


if __name__ == "__main__":
    sys.exit(main())
