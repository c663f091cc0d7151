"""Read disassembled kernels: which instructions they have, and which of them run most.

Knows the text of `nvdisasm -c` (SASS) and of Triton's `amdgcn`. A loop is what lies between a label
and a later branch to it: compilers lay loops out in one piece, entered from above.
"""

import collections
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

TENSOR_CORES = ("HGMMA", "UTCHMMA", "UTCQMMA", "HMMA", "v_mfma")
ASYNC_COPIES = ("LDGSTS", "UTMALDG", "buffer_load_lds")
"""From global to shared memory without passing through registers."""

_TELLING = ("64", "128", "NAN")
_SASS = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<name>[A-Z][A-Z0-9]*)(?P<rest>[^;]*);"
)
_GCN = re.compile(r"^\t(?P<name>[vs]_\w+|ds_\w+|global_\w+|buffer_\w+|flat_\w+)(?P<rest>[^;]*)")
_LABEL = re.compile(r"^\s*(\.L\w+):")
_TARGET = re.compile(r"\.L\w+")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line: the opcode without modifiers, the modifiers, the label that it may branch to."""

    name: str
    modifiers: tuple[str, ...] = ()
    target: str | None = None
    always: bool = False
    """It branches whenever it is reached."""

    @property
    def is_product(self) -> bool:
        """Tell whether it runs on tensor cores."""
        return self.name.startswith(TENSOR_CORES)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineCode:
    """A kernel's instructions, and where they are labelled."""

    instructions: Sequence[Instruction]
    labels: Mapping[str, int]

    def counts(self) -> dict[str, int]:
        """Count opcodes, and again with the modifiers that change what they mean: `LDG.128`."""
        return _count(self.instructions)

    def hot_loop(self) -> dict[str, int]:
        """Count the opcodes of the loop that runs most; empty without a loop.

        That is the smallest one with a tensor core instruction (loops that wait for a barrier lie
        inside), by the shortest way that leaves out no product: a loop over tiles and their steps
        also has what only ends a tile. Or else the longest one that holds no other.
        """
        loops = [
            (self.labels[one.target], end + 1)
            for end, one in enumerate(self.instructions)
            if one.target is not None and self.labels.get(one.target, end) < end
        ]
        products = [
            loop for loop in loops if any(one.is_product for one in self.instructions[slice(*loop)])
        ]
        if products:
            return _count(self._shortest_way(*min(products, key=_length)))
        inner = [one for one in loops if not any(_holds(one, other) for other in loops)]
        first, end = max(inner, key=_length, default=(0, 0))
        return _count(self.instructions[first:end])

    def _shortest_way(self, first: int, end: int) -> list[Instruction]:
        """Go through a loop with as many products as there are on a way, by the shortest such."""
        ways: dict[int, list[Instruction]] = {end: []}
        for at in reversed(range(first, end)):
            one = self.instructions[at]
            target = self.labels.get(one.target or "", at)
            following = [] if one.always and at < end - 1 else [at + 1]
            if at < target < end:
                following.append(target)
            known = [ways[number] for number in following if number in ways]
            if known:
                ways[at] = [one, *min(known, key=_cost)]
        return ways.get(first, list(self.instructions[first:end]))  # all, if it leads elsewhere


def parse(text: str) -> MachineCode:
    """Read a disassembly; what only fills space is left out."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := _SASS.search(line) or _GCN.match(line):
            name, rest = match["name"], match["rest"]
            if name in ("NOP", "s_nop"):
                continue
            modifiers = rest.split()[0].strip(".").split(".") if rest.startswith(".") else ()
            branches = name == "BRA" or name.startswith(("s_cbranch", "s_branch"))
            target = _TARGET.search(rest) if branches else None
            # Of a guard, or of an operand before the label: `@P0 BRA`, `BRA.U UP0,`.
            guarded = match.groupdict().get("guard") or "," in rest
            always = branches and not guarded and not name.startswith("s_cbranch")
            found.append(Instruction(name, tuple(modifiers), target and target[0], always))
    return MachineCode(instructions=found, labels=labels)


def size(counts: Mapping[str, int]) -> int:
    """Count all instructions of `counts`, those with modifiers once."""
    return sum(number for name, number in counts.items() if "." not in name)


def of_kind(counts: Mapping[str, int], kinds: Iterable[str]) -> int:
    """Count the instructions whose opcode begins like one of `kinds`."""
    kinds = tuple(kinds)
    return sum(n for name, n in counts.items() if "." not in name and name.startswith(kinds))


def _count(instructions: Iterable[Instruction]) -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    for one in instructions:
        counts[one.name] += 1
        counts.update(f"{one.name}.{part}" for part in one.modifiers if part in _TELLING)
    return dict(counts)


def _cost(way: Sequence[Instruction]) -> tuple[int, int]:
    return -sum(one.is_product for one in way), len(way)


def _length(loop: tuple[int, int]) -> int:
    return loop[1] - loop[0]


def _holds(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]
