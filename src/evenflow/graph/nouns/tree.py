"""The call tree: what one run of a program did, at the finest grain that can be seen from Python.

Its inner nodes are calls of the model's modules, its leaves calls of torch functions. `record` makes it;
`leaves` decides which modules stay whole and flattens it into a `Graph`. Keeping the two apart lets the
choice of leaves be a pure function of one recording.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from evenflow.graph.nouns.template import NOTHING, Template

# The read of a shape that depends on a tensor's numbers (`nonzero`, a boolean index).
SHAPE = "a shape that depends on numbers"
# Functions that hand a tensor's memory to something that cannot be observed.
ARRAYS = frozenset(
    {"numpy", "__array__", "__dlpack__", "__reduce_ex__", "untyped_storage", "_typed_storage", "storage"}
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a split must know of a tensor before it exists."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: Any  # torch.dtype: torch does not type its dtypes for the checker
    requires_grad: bool

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class BatchLeaf:
    """A tensor of the microbatch, by its place among the microbatch's tensor leaves."""

    index: int


@dataclass(frozen=True, slots=True)
class ParameterSource:
    """A parameter of the model under the first of its names."""

    name: str


@dataclass(frozen=True, slots=True)
class BufferSource:
    """A registered buffer of the model, or a tensor kept as a plain attribute of one of its modules."""

    name: str


@dataclass(frozen=True, slots=True)
class CallSource:
    """A tensor that a recorded call made, or changed in place."""


Source: TypeAlias = BatchLeaf | ParameterSource | BufferSource | CallSource


@dataclass(frozen=True, slots=True)
class Value:
    """One version of one tensor. A change in place makes a new version, with a number of its own."""

    number: int
    info: TensorInfo
    source: Source
    storage: int  # two values with the same storage are aliases
    born: int  # clock of the call that made it; -1 when it was there before the program began

    @property
    def is_state(self) -> bool:
        """Whether it is a parameter or a buffer: of the model, and there whatever runs."""
        return isinstance(self.source, ParameterSource | BufferSource)


@dataclass(frozen=True, slots=True)
class Draws:
    """Random numbers drawn by one module call itself: `count` of them from ordinal `first` on."""

    path: str
    call: int
    first: int
    count: int


@dataclass(slots=True, eq=False)
class FunctionCall:
    """One call of a torch function. `rebinds` pairs (old value, new value) of what it changed in place."""

    function: Callable[..., Any]
    name: str
    path: str
    clock: int
    args: Template
    output: Template
    rebinds: tuple[tuple[int, int], ...] = ()
    changed_buffers: tuple[str, ...] = ()
    draws: Draws | None = None
    flops: int = 0
    grad_enabled: bool = True
    autocast: tuple[tuple[str, Any], ...] = ()  # (device type, dtype) of each active one; ("nesting", depth)
    region: int | None = None  # the checkpoint region in which it ran, if any
    unknown_to_autograd: bool = False  # what it changed in place


@dataclass(slots=True, eq=False)
class ReadCall:
    """Python looked at a tensor's numbers (`item`, `bool`, …): the rest of the run may depend on them."""

    function: Callable[..., Any]
    name: str
    path: str
    clock: int
    args: Template
    result: Any  # a number, bool or nested list of them


@dataclass(slots=True, eq=False)
class ModuleCall:
    """One call of one of the model's modules, and all that happened inside it (clocks `start` to `end`)."""

    path: str
    call: int
    start: int
    args: Template
    grad_enabled: bool
    autocast: tuple[tuple[str, Any], ...]
    children: "list[ModuleCall | FunctionCall | ReadCall]" = field(default_factory=list)
    end: int = -1
    output: Template = NOTHING  # until it has returned
    num_draws: int = 0
    whole: str | None = None  # why this call must not be taken apart, where it must not
    layer: bool = False  # one of torch's own layers: taken apart only where it cannot stay whole
    unseen: bool = False  # it did something that was not seen, perhaps with any parameter inside it
    region: int | None = None  # the checkpoint region in which it was called, if any
    sequential: bool = False  # it sets the generator's state itself: its draws are keyed at entry alone
    recomputes: bool = False  # it calls a reentrant checkpoint, whose inside was not seen
    recomputed: tuple[str, ...] = ()  # the attributes and buffers that were changed in there
    looks: bool = False  # it read numbers, its own calls or those inside it
    real: bool = False  # it ran for real, as one opaque step: it may use any parameter inside it
    stateful: bool = False  # it changed its own attributes
    changed: tuple[str, ...] = ()  # which, by their full names
    whole_besides: str | None = None  # why it must not be taken apart even if that does not matter
    hooks: bool = False  # it put hooks of its own on the backward
    foreign: str | None = None  # what other code changed of the module: why it must be taken apart

    @property
    def inside(self) -> str:
        """What all names begin with that lie inside the module."""
        return f"{self.path}." if self.path else ""


def never(*_: Any) -> Any:
    """The function of a call that nobody saw."""
    raise AssertionError("an operation that was not seen cannot be repeated: its module stays whole")


Call: TypeAlias = ModuleCall | FunctionCall | ReadCall


def walk(call: Call) -> Iterator[Call]:
    """A call and everything inside it, in program order."""
    waiting = [call]
    while waiting:
        inner = waiting.pop()
        yield inner
        if type(inner) is ModuleCall:
            waiting += inner.children[::-1]


def functions_in(call: Call) -> Iterator[FunctionCall]:
    """The calls of functions in a call, in program order; of a function's, that itself."""
    return (inner for inner in walk(call) if isinstance(inner, FunctionCall))


def modules_in(call: Call) -> Iterator[ModuleCall]:
    """The calls of modules in a call, in program order, that itself first if it is one."""
    return (inner for inner in walk(call) if isinstance(inner, ModuleCall))


def reads_in(call: Call) -> Iterator[ReadCall]:
    """Where Python looked at numbers inside a call."""
    return (inner for inner in walk(call) if isinstance(inner, ReadCall))


def parameters_in(call: Call, values: Sequence[Value]) -> Iterator[str]:
    """Names of the parameters that functions inside a call use, once for each function that does."""
    for function in functions_in(call):
        sources = (values[ref].source for ref in dict.fromkeys(function.args.refs))
        yield from (source.name for source in sources if isinstance(source, ParameterSource))


def flops_in(call: Call) -> int:
    """What a call computes."""
    return sum(function.flops for function in functions_in(call))


@dataclass(slots=True)
class CallTree:
    """All of one recorded run; `root` is the call of the program (the loss function) itself."""

    root: ModuleCall
    values: tuple[Value, ...]
    output: Template
    same_tensor: dict[int, int]  # a value -> the earlier value of which it was the very same tensor
    parameter_names: dict[str, str]  # every name of a parameter -> its first
    constants: dict[str, Any]  # tensors of Python's own, by the name of the `BufferSource` for them
    pure: dict[int, Any]  # values that only Python's constants decided -> equal for equal numbers
    changing_objects: frozenset[int]  # numbers of the `Shared` objects that the program changes
    changed_leaves: frozenset[int]  # places of the batch's tensors that it changes in place
    device: Any  # torch.device on which it was recorded
    as_first: Any  # what a second run of the program should know: a `constants.FirstRun`
    difference: str | None = None  # what the program did differently when it ran once more
    dependence: str | None = None  # what it does differently where another kind of call left a tensor
