"""Choosing leaves: which module calls of the tree stay whole, and the flat graph that follows.

Start at the root and take a call apart while it is heavier than a small share of all the work, so that cuts
can balance the stages. Three things overrule weight: a call that hides a value (a tensor that comes in or
goes out through Python state, not through its arguments or result) must be taken apart; a call that did
something that cannot be seen must stay whole; and with `exact`, no leaf may hold two uses of one parameter.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from evenflow.errors import RecordError
from evenflow.graph.leaves.hidden import hidden_values
from evenflow.graph.leaves.kept import KeptBuffers, refuse_unprotected
from evenflow.graph.leaves.nodes import guard_of, node_of, numbered, unsteady, without_unused
from evenflow.graph.leaves.snapshots import with_snapshots
from evenflow.graph.nouns.graph import Graph
from evenflow.graph.nouns.regions import refuse_changes_across_autocast, refuse_changes_of_state
from evenflow.graph.nouns.tree import (
    ARRAYS,
    SHAPE,
    BatchLeaf,
    BufferSource,
    Call,
    CallTree,
    ModuleCall,
    ParameterSource,
    ReadCall,
    flops_in,
    functions_in,
    modules_in,
    parameters_in,
    reads_in,
)


def flatten(
    tree: CallTree,
    *,
    max_share: float,
    exact: bool = False,
    opened: Collection[str] = (),
    is_atomic: Callable[[str], bool] = lambda _: False,
) -> Graph:
    """The graph of a recorded run.

    `max_share` is the largest part of all FLOPs that one leaf may hold (0 takes everything apart), `opened`
    names modules that a cut must be able to reach, `is_atomic` says which module paths never to take apart.
    Raises `RecordError` naming the call that can be neither kept whole nor taken apart.
    """
    choice = _Choice(tree, max_share, exact, opened, is_atomic)
    try:
        calls = choice.inside(tree.root)
    except _Stuck as stuck:
        raise RecordError(f"{stuck}; move one of the two into a module of its own") from None
    _refuse_returned_parameters(tree)
    _refuse_replaced_buffers(tree, calls)
    refuse_changes_of_state(tree)
    reads = [call for call in calls if isinstance(call, ReadCall)]
    kept = KeptBuffers(tree)
    nodes = [
        node_of(call, tree, choice.stuck.get(call), kept) for call in calls if not isinstance(call, ReadCall)
    ]
    nodes, values, output = with_snapshots(nodes, tree.values, tree.output)
    needed = {*output.refs, *(ref for read in reads for ref in read.args.refs)}
    nodes = numbered(without_unused(nodes, needed, values), values)
    refuse_changes_across_autocast(nodes, values)
    refuse_unprotected(calls, nodes, values, kept)
    return Graph(
        tuple(nodes),
        values,
        output,
        tuple(guard_of(read, nodes, values) for read in reads),
        tuple(choice.apart),
        tree.same_tensor,
        tree.constants,
        tree.pure,
        tree.changing_objects,
        tree.changed_leaves,
        tree.device,
    )


def _refuse_returned_parameters(tree: CallTree) -> None:
    for ref in tree.output.refs:
        source = tree.values[ref].source
        if isinstance(source, ParameterSource):
            raise RecordError(
                f"the loss function returns the parameter {source.name} itself; return its clone()"
            )


def _refuse_replaced_buffers(tree: CallTree, calls: Sequence[Call]) -> None:
    """Refuse to read a buffer in one place that a module puts another in the place of in another."""
    replaced = {
        name.replace("_buffers.", ""): call
        for call in modules_in(tree.root)
        for name in call.changed
        if "_buffers." in name
    }
    for call in calls if replaced else ():
        inside = set(modules_in(call))
        for function in functions_in(call):
            for ref in function.args.refs:
                source = tree.values[ref].source
                if not isinstance(source, BufferSource) or source.name not in replaced:
                    continue
                owner = replaced[source.name]
                if owner not in inside:
                    raise RecordError(
                        f"{function.path or 'the loss function'} uses the buffer {source.name}, which "
                        f"{owner.path} replaces by another in its forward: change it in place (copy_)"
                    )


class _Stuck(Exception):
    """A call can neither stay whole nor be taken apart."""


class _Choice:
    """The rules by which a module call stays whole or is taken apart."""

    def __init__(
        self,
        tree: CallTree,
        max_share: float,
        exact: bool,
        opened: Collection[str],
        is_atomic: Callable[[str], bool],
    ) -> None:
        self.values, self.opened, self.is_atomic = tree.values, opened, is_atomic
        self.limit = max_share * flops_in(tree.root)
        self.apart: dict[str, None] = {}  # paths of what was taken apart, in order
        self.stuck: dict[Call, str] = {}  # calls that stay whole because of one inside, and why that is so
        self.hides = hidden_values(tree)
        self.derived = _batch_derived(tree)
        counts = Counter(parameters_in(tree.root, tree.values)) if exact else {}
        self.shared = frozenset(name for name, count in counts.items() if count > 1)

    def inside(self, call: ModuleCall) -> list[Call]:
        """The calls that stand for this one once it is taken apart."""
        self.apart[call.path] = None
        found: list[Call] = []
        for child in call.children:
            found.extend(self.choose(child) if isinstance(child, ModuleCall) else [child])
        return found

    def choose(self, call: ModuleCall) -> list[Call]:
        part = self.hides.get(call) or call.foreign or _draws_recomputed(call)
        looks = self.unsteady_look(call)
        if looks is not None:
            self.stuck[call] = looks
        whole = call.whole or looks
        kept = whole is not None or call.layer
        if part is None and kept and _has_dynamic_shape(call):
            part = "a shape inside it depends on the batch's numbers"
        if part is None and (kept or not self.wanted_apart(call)):
            return [call]
        if whole is not None:
            where = call.path or "the model"
            raise _Stuck(f"{where} cannot be taken apart ({whole}), nor can it stay whole ({part})")
        try:
            return self.inside(call)
        except _Stuck as stuck:
            if part is None:
                self.stuck[call] = str(stuck)
                return [call]
            raise

    def unsteady_look(self, call: ModuleCall) -> str | None:
        """What numbers a call looks at for which no guard can ask before the step: then it stays whole."""
        for read in call.children:
            if isinstance(read, ReadCall) and read.name not in (SHAPE, *ARRAYS):
                for ref in read.args.refs:
                    if ref not in self.derived:
                        what = unsteady(self.values[ref])
                        return f"it calls {read.name} on {what}: do that in a smaller module"
        return None

    def wanted_apart(self, call: ModuleCall) -> bool:
        if any(name.startswith(call.inside) for name in self.opened):
            return True
        if self.is_atomic(call.path):
            return False
        if (
            self.limit == 0
            or flops_in(call) > self.limit
            or self.has_idle_argument(call)
            or self.looks_at_the_batch(call)
        ):
            return True
        uses = Counter(parameters_in(call, self.values)) if self.shared else {}
        return any(uses[name] > 1 for name in self.shared)

    def looks_at_the_batch(self, call: ModuleCall) -> bool:
        """Whether a number of the batch decides what happens inside: the next batch must be asked for it."""
        return any(read.name == SHAPE or self.derived.issuperset(read.args.refs) for read in reads_in(call))

    def has_idle_argument(self, call: ModuleCall) -> bool:
        """Whether a call without parameters is handed a tensor that nothing inside uses.

        Rotary tables take a hidden state only to ask its dtype: taken apart, they depend on the batch alone.
        """
        used = {ref for function in functions_in(call) for ref in function.args.refs}
        return not any(parameters_in(call, self.values)) and any(ref not in used for ref in call.args.refs)


def _batch_derived(tree: CallTree) -> set[int]:
    """Values that depend on the batch and on unchanged buffers alone."""
    functions = list(functions_in(tree.root))
    changed = {name for call in functions for name in call.changed_buffers}
    derived: set[int] = set()
    for value in tree.values:
        match value.source:
            case BatchLeaf():
                derived.add(value.number)
            case BufferSource(name) if name not in changed:
                derived.add(value.number)
    for call in functions:
        if call.draws is None and not call.changed_buffers and derived.issuperset(call.args.refs):
            derived.update((*call.output.refs, *(new for _, new in call.rebinds)))
    return derived


def _draws_recomputed(call: ModuleCall) -> str | None:
    """Why a call that holds a checkpoint with draws must be taken apart: then each can be keyed."""
    seen = call.region is None and any(
        function.draws is not None and function.region is not None for function in functions_in(call)
    )
    if seen or any(inner.sequential for inner in modules_in(call) if inner is not call):
        return "random numbers are drawn in a checkpoint inside it"
    return None


def _has_dynamic_shape(call: Call) -> bool:
    """Whether a shape inside depends on numbers: it must be seen, so that another is another recording."""
    return any(read.name == SHAPE for read in reads_in(call))
