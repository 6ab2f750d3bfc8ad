"""Choosing leaves: which module calls of the tree stay whole, and the flat graph that follows.

Start at the root and take a call apart while it is heavier than a small share of all the work, so that cuts
can balance the stages. Three things overrule weight: a call that hides a value (a tensor that comes in or
goes out through Python state, not through its arguments or result) must be taken apart; a call that did
something that cannot be seen must stay whole; and with `exact`, no leaf may hold two uses of one parameter.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator

from evenflow.errors import RecordError
from evenflow.graph.graph import FunctionTarget, Graph, Guard, ModuleTarget, Node, Step, Target
from evenflow.graph.hidden import hidden_values
from evenflow.graph.kept import KeptBuffers
from evenflow.graph.recomputed import refuse_changes
from evenflow.graph.regions import refuse_changes_across_autocast
from evenflow.graph.snapshots import with_snapshots
from evenflow.graph.template import Shared
from evenflow.graph.tree import (
    ARRAYS,
    SHAPE,
    BatchLeaf,
    BufferSource,
    Call,
    CallTree,
    Draws,
    FunctionCall,
    ModuleCall,
    ParameterSource,
    ReadCall,
    Value,
    walk,
)
from evenflow.graph.unprotected import refuse_unprotected


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
    returned = (tree.values[ref].source for ref in tree.output.refs)
    for source in returned:
        if isinstance(source, ParameterSource):
            raise RecordError(
                f"the loss function returns the parameter {source.name} itself; return its clone()"
            )
    _refuse_replaced_buffers(tree, calls)
    refuse_changes(tree)
    reads = [call for call in calls if isinstance(call, ReadCall)]
    kept = KeptBuffers(tree)
    nodes = [
        _node(call, tree, choice.stuck.get(call), kept) for call in calls if not isinstance(call, ReadCall)
    ]
    nodes, values, output = with_snapshots(nodes, tree.values, tree.output)
    needed = {*output.refs, *(ref for read in reads for ref in read.args.refs)}
    nodes = _numbered(_without_unused(nodes, needed, values), values)
    refuse_changes_across_autocast(nodes, values)
    refuse_unprotected(calls, nodes, values, kept)
    guards = tuple(_guard(read, nodes, values) for read in reads)
    return Graph(
        tuple(nodes),
        values,
        output,
        guards,
        tuple(choice.apart),
        tree.same_tensor,
        tree.constants,
        tree.pure,
        tree.changing_objects,
        tree.changed_leaves,
        tree.device,
    )


def _refuse_replaced_buffers(tree: CallTree, calls: list[Call]) -> None:
    """Refuse to read a buffer in one place that a module puts another in the place of in another."""
    modules = (call for call in walk(tree.root) if isinstance(call, ModuleCall))
    replaced = {
        name.replace("_buffers.", ""): call
        for call in modules
        for name in call.changed
        if "_buffers." in name
    }
    for call in calls:
        inside = {id(inner) for inner in walk(call)}
        for function in (inner for inner in walk(call) if isinstance(inner, FunctionCall)):
            for ref in function.args.refs:
                source = tree.values[ref].source
                if not isinstance(source, BufferSource) or source.name not in replaced:
                    continue
                owner = replaced[source.name]
                if id(owner) not in inside:
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
        self.limit = max_share * _flops(tree.root)
        self.apart: dict[str, None] = {}  # paths of what was taken apart, in order
        self.stuck: dict[Call, str] = {}  # calls that stay whole because of one inside, and why that is so
        self.hides = hidden_values(tree)
        self.derived = _batch_derived(tree)
        counts = _parameter_uses(tree.root, tree.values)
        self.shared = frozenset(name for name, count in counts.items() if exact and count > 1)

    def inside(self, call: ModuleCall) -> list[Call]:
        """The calls that stand for this one once it is taken apart."""
        self.apart[call.path] = None
        found: list[Call] = []
        for child in call.children:
            found.extend(self.choose(child) if isinstance(child, ModuleCall) else [child])
        return found

    def choose(self, call: ModuleCall) -> list[Call]:
        hidden = self.hides.get(call) or call.foreign or _draws_recomputed(call)
        unsteady = self.unsteady_look(call)
        if unsteady is not None:
            self.stuck[call] = unsteady
        whole = call.whole or unsteady
        kept = whole is not None or call.layer
        if hidden is None and kept and _has_dynamic_shape(call):
            hidden = "a shape inside it depends on the batch's numbers"
        if hidden is None and (kept or not self.wanted_apart(call)):
            return [call]
        if whole is not None:
            where = call.path or "the model"
            raise _Stuck(f"{where} cannot be taken apart ({whole}), nor can it stay whole ({hidden})")
        try:
            return self.inside(call)
        except _Stuck as stuck:
            if hidden is None:
                self.stuck[call] = str(stuck)
                return [call]
            raise

    def unsteady_look(self, call: ModuleCall) -> str | None:
        """Whether a call looks at numbers for which no guard can ask before the step: then it stays whole."""
        for read in call.children:
            if isinstance(read, ReadCall) and read.name not in (SHAPE, *ARRAYS):
                for ref in read.args.refs:
                    if ref not in self.derived:
                        what = _what(self.values[ref])
                        return f"it calls {read.name} on {what}: do that in a smaller module"
        return None

    def wanted_apart(self, call: ModuleCall) -> bool:
        inside = f"{call.path}." if call.path else ""
        if any(name.startswith(inside) for name in self.opened):
            return True
        if self.is_atomic(call.path):
            return False
        if (
            self.limit == 0
            or _flops(call) > self.limit
            or self.has_idle_argument(call)
            or self.looks_at_the_batch(call)
        ):
            return True
        return any(
            count > 1 for name, count in _parameter_uses(call, self.values).items() if name in self.shared
        )

    def looks_at_the_batch(self, call: ModuleCall) -> bool:
        """Whether a number of the batch decides what happens inside: the next batch must be asked for it."""
        reads = (inner for inner in walk(call) if isinstance(inner, ReadCall))
        return any(read.name == SHAPE or self.derived.issuperset(read.args.refs) for read in reads)

    def has_idle_argument(self, call: ModuleCall) -> bool:
        """Whether a call without parameters is handed a tensor that nothing inside uses.

        Rotary tables take a hidden state only to ask its dtype: taken apart, they depend on the batch alone.
        """
        inner = [c for c in walk(call) if isinstance(c, FunctionCall)]
        used = {ref for function in inner for ref in function.args.refs}
        return not any(_parameters(call, self.values)) and any(ref not in used for ref in call.args.refs)


def _what(value: Value) -> str:
    """What a number that decides something belongs to, and why it may be another the next time."""
    match value.source:
        case BufferSource(name):
            return f"the buffer {name}, which the program changes"
        case _:
            return f"a tensor {value.info} that depends on more than the batch"


def _batch_derived(tree: CallTree) -> set[int]:
    """Values that depend on the batch and on unchanged buffers alone."""
    functions = [call for call in walk(tree.root) if isinstance(call, FunctionCall)]
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
    inner = [each for each in walk(call) if each is not call]
    regions = (
        isinstance(each, FunctionCall)
        and each.draws is not None
        and each.region is not None
        and call.region is None
        for each in inner
    )
    sequential = (isinstance(each, ModuleCall) and each.sequential for each in inner)
    return "random numbers are drawn in a checkpoint inside it" if any(regions) or any(sequential) else None


def _has_dynamic_shape(call: Call) -> bool:
    """Whether a shape inside depends on numbers: it must be seen, so that another is another recording."""
    return any(isinstance(inner, ReadCall) and inner.name == SHAPE for inner in walk(call))


def _flops(call: Call) -> int:
    return sum(inner.flops for inner in walk(call) if isinstance(inner, FunctionCall))


def _parameters(call: Call, values: tuple[Value, ...]) -> Iterator[str]:
    """Names of the parameters that functions inside a call use, once for each function that does."""
    for inner in walk(call):
        if isinstance(inner, FunctionCall):
            sources = (values[ref].source for ref in dict.fromkeys(inner.args.refs))
            yield from (source.name for source in sources if isinstance(source, ParameterSource))


def _parameter_uses(call: Call, values: tuple[Value, ...]) -> Counter[str]:
    return Counter(_parameters(call, values))


# -- from calls to nodes


def _node(call: FunctionCall | ModuleCall, tree: CallTree, stuck: str | None, kept: KeptBuffers) -> Node:
    functions = [inner for inner in walk(call) if isinstance(inner, FunctionCall)]
    refs = dict.fromkeys(ref for inner in functions for ref in inner.args.refs)
    sources = [tree.values[ref].source for ref in refs]
    match call:
        case FunctionCall():
            before = {old for old, _ in call.rebinds}
            fresh = (ref for ref in call.output.refs if tree.values[ref].born == call.clock)
            name = f"{call.path}:{call.name}" if call.path else call.name
            target: Target = FunctionTarget(call.function, call.draws)
            results, rebinds = tuple(ref for ref in fresh if ref not in before), call.rebinds
        case _:
            name, target = call.path or "the model", _module_target(call)
            results = tuple(r for r in call.output.refs if call.start <= tree.values[r].born < call.end)
            rebinds = _composed(functions, call, tree)
    changed = tuple(dict.fromkeys(name for inner in functions for name in inner.changed_buffers))
    return Node(
        index=-1,  # given once the unused nodes are gone
        name=name,
        target=target,
        args=call.args,
        output=call.output,
        results=results,
        rebinds=rebinds,
        parameters=tuple(dict.fromkeys((*_parameters(call, tree.values), *_unseen_parameters(call, tree)))),
        buffers=tuple(dict.fromkeys((*(s.name for s in sources if isinstance(s, BufferSource)), *changed))),
        changed_buffers=changed,
        kept_buffers=kept.by(call),
        flops=_flops(call),
        grad_enabled=call.grad_enabled,
        autocast=call.autocast,
        region=call.region,
        whole=_reason(call) or stuck,
        stateful=any(isinstance(inner, ModuleCall) and inner.stateful for inner in walk(call)),
        opaque=isinstance(call, ModuleCall) and _is_opaque(call),
        hooks=call.region is not None or any(isinstance(c, ModuleCall) and c.hooks for c in walk(call)),
        hidden=any(inner.hidden for inner in functions),
        steps=tuple(map(_step, functions)),
    )


def _step(call: FunctionCall) -> Step:
    takes, gives = (tuple(dict.fromkeys(tree.refs)) for tree in (call.args, call.output))
    in_place, autocast = bool(call.rebinds), bool(call.autocast)
    return Step(call.name, takes, gives, call.flops, in_place, call.grad_enabled, autocast, call.region)


def _reason(call: FunctionCall | ModuleCall) -> str | None:
    """Why a call was not taken apart, where it was not its weight that decided."""
    if not isinstance(call, ModuleCall):
        return None
    return call.whole or ("it is one of torch's own layers" if call.layer else None)


def _is_opaque(call: ModuleCall) -> bool:
    """Whether another microbatch may take another way inside, with other parameters, than was recorded."""
    return call.looks or any(
        isinstance(inner, ModuleCall) and (inner.unseen or inner.real) for inner in walk(call)
    )


def _unseen_parameters(call: Call, tree: CallTree) -> Iterator[str]:
    """Parameters that may have been used where nobody could see: all those of the module that did it."""
    for inner in walk(call):
        if isinstance(inner, ModuleCall) and _is_opaque(inner):
            inside = f"{inner.path}." if inner.path else ""
            yield from (first for name, first in tree.parameter_names.items() if name.startswith(inside))


def _module_target(call: ModuleCall) -> ModuleTarget:
    drawing = [inner for inner in walk(call) if isinstance(inner, ModuleCall) and inner.num_draws]
    # Where the program looks at numbers inside, another batch may draw more often than this one.
    looks = any(isinstance(inner, ReadCall) for inner in walk(call))
    at_entry = not looks and all(_draws_first(inner) for inner in drawing)
    at_entry = at_entry or any(inner.sequential for inner in drawing)
    return ModuleTarget(
        call.path, call.call, tuple(Draws(d.path, d.call, 0, d.num_draws) for d in drawing), at_entry
    )


def _draws_first(call: ModuleCall) -> bool:
    """Whether a call draws exactly once, before any call inside it draws."""
    for child in call.children:
        if isinstance(child, FunctionCall) and child.draws is not None:
            return call.num_draws == 1 and not call.real
        if any(isinstance(inner, FunctionCall) and inner.draws is not None for inner in walk(child)):
            return False
    return True


def _composed(functions: list[FunctionCall], call: ModuleCall, tree: CallTree) -> tuple[tuple[int, int], ...]:
    """All changes in place inside a call, as (version before the call, version after it)."""
    first: dict[int, int] = {}  # newest version -> the version before the call
    for function in functions:
        for before, new in function.rebinds:
            old = before
            while tree.values[old].born >= call.start and old in tree.same_tensor:
                old = tree.same_tensor[old]
            first[new] = first.pop(old, old)
    return tuple((old, new) for new, old in first.items() if tree.values[old].born < call.start)


def _without_unused(nodes: list[Node], needed: set[int], values: tuple[Value, ...]) -> list[Node]:
    """Drop functions whose results nobody uses; modules stay, for they may keep state.

    A change in place stays where an earlier node used the memory: its backward may use it again.
    """
    first_use: dict[int, int] = {}
    for at, node in enumerate(nodes):
        for value in node.inputs:
            first_use.setdefault(values[value].storage, at)
    kept: list[Node] = []
    for at, node in reversed(list(enumerate(nodes))):
        rebinds = tuple((old, new) for old, new in node.rebinds if new in needed)
        if any(first_use[values[old].storage] < at for old, _ in node.rebinds):
            rebinds = node.rebinds
        used = isinstance(node.target, ModuleTarget) or node.changed_buffers or rebinds
        if used or any(result in needed for result in node.results):
            kept.append(node if rebinds == node.rebinds else dataclasses.replace(node, rebinds=rebinds))
            needed.update(kept[-1].inputs)
    return kept[::-1]


def _numbered(nodes: list[Node], values: tuple[Value, ...]) -> list[Node]:
    """Number the nodes, and mark what depends on the batch alone: no parameter, draw, state or gradient."""
    changed = {name for node in nodes for name in node.changed_buffers}
    derived = {
        value.number
        for value in values
        if isinstance(value.source, BatchLeaf) and not value.info.requires_grad
    }
    derived |= {
        v.number for v in values if isinstance(v.source, BufferSource) and v.source.name not in changed
    }
    marked: list[Node] = []
    kept: set[int] = set()  # memory that the backward of a stage may look at again
    for index, node in enumerate(nodes):
        draws = node.target.draws
        stateless = (
            not draws and not node.stateful and not node.parameters and not changed.intersection(node.buffers)
        )
        glue = stateless and derived.issuperset(node.inputs) and not _has_shared(node)
        glue = glue and not any(values[value].info.requires_grad for value in node.makes)
        glue = glue and not (node.hidden and any(values[old].storage in kept for old, _ in node.rebinds))
        if glue:
            derived.update(node.makes)
        else:
            kept.update(values[value].storage for value in node.inputs)
        marked.append(dataclasses.replace(node, index=index, glue=glue))
    return marked


def _has_shared(node: Node) -> bool:
    """Whether a node is handed a mutable object, whose copies on other stages miss what it does."""
    return any(isinstance(leaf, Shared) for leaf in node.args.leaves)


def _guard(read: ReadCall, nodes: list[Node], values: tuple[Value, ...]) -> Guard:
    made = {value for node in nodes if not node.glue for value in node.makes}
    where = read.path or "the loss function"
    if read.name in ARRAYS:
        raise RecordError(
            f"{where} turns a tensor of the batch into an array ({read.name}), whose further use cannot "
            "be seen; compute with torch, or do it before the batch is passed"
        )
    changed = {name for node in nodes for name in node.changed_buffers}
    for ref in read.args.refs:
        source = values[ref].source
        unsteady = isinstance(source, BufferSource) and source.name in changed
        if unsteady or ref in made or isinstance(source, ParameterSource):
            raise RecordError(
                f"{where} calls {read.name} on {_what(values[ref])}, so the branch taken may change within "
                "a step; move that code into a module of the model"
            )
    return Guard(read.function, read.args, read.result, f"{where}: {read.name}")
