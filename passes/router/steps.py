"""Name the steps that routers are made of.

A step is what happens to the scores of one token. Steps before the choice run over all experts,
steps after it over the K chosen ones. What could not be read is a step of its own, `Unknown`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Function:
    """A function of each score, or a softmax over all of them: `softmax`, `sigmoid`, `sqrt`."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiply by a constant, or divide by it; on the experts' summed output if `on_output`."""

    by: float
    divides: bool = False
    on_output: bool = False

    def __str__(self) -> str:
        return f"{'÷' if self.divides else '×'} {self.by:g}{' on the output' * self.on_output}"


@dataclass(frozen=True, slots=True)
class Shift:
    """Add a constant."""

    by: float

    def __str__(self) -> str:
        return f"{'+' if self.by >= 0 else '-'} {abs(self.by):g}"


@dataclass(frozen=True, slots=True)
class Cap:
    """Keep values within ±`at` smoothly: at · tanh(x / at)."""

    at: float

    def __str__(self) -> str:
        return f"soft cap {self.at:g}"


@dataclass(frozen=True, slots=True)
class LearnedScale:
    """Multiply by a tensor of the model: one value for all, one a feature, or one an expert."""

    of: str

    def __str__(self) -> str:
        return f"× {self.of}"


@dataclass(frozen=True, slots=True)
class Bias:
    """Add a value for each expert that only the choice sees, or that stays in the weights too."""

    kept: bool

    def __str__(self) -> str:
        return "+ bias, kept in the weights" if self.kept else "+ bias"


@dataclass(frozen=True, slots=True)
class Normalise:
    """Divide by the sum over what is there, or by another p-norm of it."""

    power: float = 1.0
    epsilon: float = 0.0
    floor: float = 0.0

    def __str__(self) -> str:
        total = "sum" if self.power == 1 else f"{self.power:g}-norm"
        if self.floor:
            return f"÷ max({total}, {self.floor:g})"
        return f"÷ ({total} + {self.epsilon:g})" if self.epsilon else f"÷ {total}"


@dataclass(frozen=True, slots=True)
class Groups:
    """Leave experts only in the best groups; the others' scores become `fill`."""

    kept: int
    of: int
    scored_by: str
    fill: float

    def __str__(self) -> str:
        rest = "" if self.fill == float("-inf") else f", the rest {self.fill:g}"
        return f"{self.kept} of {self.of} groups ({self.scored_by}{rest})"


@dataclass(frozen=True, slots=True)
class TopK:
    """Choose the K best scores."""

    k: int

    def __str__(self) -> str:
        return f"top-{self.k}"


@dataclass(frozen=True, slots=True)
class Table:
    """Look the chosen experts up in a table by an integer input, such as the token's id."""

    k: int
    rows: int

    def __str__(self) -> str:
        return f"{self.k} from a table of {self.rows} rows (hash routing)"


@dataclass(frozen=True, slots=True)
class SparseMixer:
    """Choose K times the best of the rest, each weighed among the logits near it (Phi-MoE)."""

    k: int
    within: float

    def __str__(self) -> str:
        return f"sparsemixer top-{self.k} (softmax of logits within {self.within:g})"


@dataclass(frozen=True, slots=True)
class Sinkhorn:
    """Balance scores over tokens and experts in turn."""

    rounds: int

    def __str__(self) -> str:
        return f"sinkhorn ({self.rounds} rounds)"


@dataclass(frozen=True, slots=True)
class Weigh:
    """Take the weights from scores of all experts that the choice did not go by."""

    steps: tuple["Step", ...]
    other_matrix: bool = False
    """The scores do not come from the matrix that the choice goes by."""

    def __str__(self) -> str:
        return f"weights from {'another matrix: ' * self.other_matrix}{chain_text(self.steps)}"


@dataclass(frozen=True, slots=True)
class Part:
    """Take `count` neighbours of `of` values, from `start`."""

    start: int
    count: int
    of: int

    def __str__(self) -> str:
        place = "first" if self.start == 0 else f"from {self.start} on"
        return f"{place} {self.count} of {self.of}"


@dataclass(frozen=True, slots=True)
class Beside:
    """Put other values of the router beside the chosen ones."""

    count: int

    def __str__(self) -> str:
        return f"with {self.count} unchosen beside"


@dataclass(frozen=True, slots=True)
class Spread:
    """Put the chosen scores among all experts', of which the others become `rest`."""

    rest: float

    def __str__(self) -> str:
        return f"the others {self.rest:g}"


@dataclass(frozen=True, slots=True)
class Skip:
    """Give class `number` no expert: its weight is zero."""

    number: int

    def __str__(self) -> str:
        return f"class {self.number} is no expert"


@dataclass(frozen=True, slots=True)
class Capacity:
    """Drop a choice unless its place in its expert's queue of tokens is as `kept` says."""

    kept: str

    def __str__(self) -> str:
        return f"capacity (place {self.kept})"


@dataclass(frozen=True, slots=True)
class Noise:
    """Add or multiply random numbers."""

    sign: str

    def __str__(self) -> str:
        return f"{self.sign} noise"


@dataclass(frozen=True, slots=True)
class Norm:
    """Normalise the features of the router's input."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Logits:
    """Multiply by the router's matrix [classes, features]."""

    classes: int
    features: int
    bias: bool

    def __str__(self) -> str:
        return "logits"


@dataclass(frozen=True, slots=True)
class Linear:
    """Multiply by a matrix before the router's last one."""

    outputs: int

    def __str__(self) -> str:
        return f"linear {self.outputs}"


@dataclass(frozen=True, slots=True)
class Earlier:
    """Start from a value that the experts' hidden state is itself made from."""

    def __str__(self) -> str:
        return "earlier hidden state"


@dataclass(frozen=True, slots=True)
class Applied:
    """Weigh something else than the experts' outputs: what enters them, or what becomes of them."""

    to: str

    def __str__(self) -> str:
        return f"on {self.to}"


@dataclass(frozen=True, slots=True)
class Equal:
    """Weigh every chosen expert alike, by 1."""

    def __str__(self) -> str:
        return "all weights 1"


@dataclass(frozen=True, slots=True)
class Unknown:
    """Reading stopped here."""

    node: str
    source: str
    why: str = ""

    def __str__(self) -> str:
        where = f"{self.node} ({self.source})" if self.source else self.node
        return f"unknown: {where}{', ' + self.why if self.why else ''}"


Step = (
    Function | Scale | Shift | Cap | LearnedScale | Bias | Normalise | Groups | TopK | Table
    | SparseMixer | Sinkhorn | Weigh | Part | Beside | Spread | Skip | Capacity | Noise | Norm
    | Logits | Linear | Earlier | Applied | Equal | Unknown
)  # fmt: skip


def chain_text(steps: tuple[Step, ...]) -> str:
    """Write steps with arrows between them.

    The matrix goes without saying where a chain begins with it and a function of its logits.
    """
    if len(steps) > 1 and isinstance(steps[0], Logits) and isinstance(steps[1], Function):
        steps = steps[1:]
    parts: list[str] = []
    for step in steps:
        if isinstance(step, Bias) and parts:
            parts[-1] += f" {step}"
        else:
            parts.append(str(step))
    return " → ".join(parts) or "logits"
