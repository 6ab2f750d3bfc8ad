"""From the calls that were chosen as leaves to the nodes of a graph: what each uses, makes and changes."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence

from evenflow.errors import RecordError
from evenflow.graph.leaves.kept import KeptBuffers
from evenflow.graph.nouns.graph import (
    FunctionTarget,
    Guard,
    ModuleTarget,
    Node,
    Step,
    Target,
    changed_buffers,
)
from evenflow.graph.nouns.template import Shared
from evenflow.graph.nouns.tree import (
    ARRAYS,
    BatchLeaf,
    BufferSource,
    CallTree,
    Draws,
    FunctionCall,
    ModuleCall,
    ParameterSource,
    ReadCall,
    Value,
    functions_in,
    modules_in,
    reads_in,
    walk,
)


def node_of(call: FunctionCall | ModuleCall, tree: CallTree, stuck: str | None, kept: KeptBuffers) -> Node:
    """The node of a chosen call; `stuck` says why it stays whole where that is because of one inside."""
    inside = list(walk(call))
    functions = [inner for inner in inside if isinstance(inner, FunctionCall)]
    modules = [inner for inner in inside if isinstance(inner, ModuleCall)]
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
    changed = _distinct(*(name for inner in functions for name in inner.changed_buffers))
    return Node(
        index=-1,  # given once the unused nodes are gone
        name=name,
        target=target,
        args=call.args,
        output=call.output,
        results=results,
        rebinds=rebinds,
        parameters=_distinct(
            *(source.name for source in sources if isinstance(source, ParameterSource)),
            *_unseen_parameters(modules, tree),
        ),
        buffers=_distinct(*(source.name for source in sources if isinstance(source, BufferSource)), *changed),
        changed_buffers=changed,
        kept_buffers=kept.by(call),
        flops=sum(inner.flops for inner in functions),
        grad_enabled=call.grad_enabled,
        autocast=call.autocast,
        region=call.region,
        whole=_reason(call) or stuck,
        stateful=any(inner.stateful for inner in modules),
        opaque=isinstance(call, ModuleCall) and _is_opaque(call),
        hooks=call.region is not None or any(inner.hooks for inner in modules),
        unknown_to_autograd=any(inner.unknown_to_autograd for inner in functions),
        steps=tuple(map(_step, functions)),
    )


def _distinct(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


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
    return call.looks or any(inner.unseen or inner.real for inner in modules_in(call))


def _unseen_parameters(modules: Iterable[ModuleCall], tree: CallTree) -> Iterator[str]:
    """Parameters that may have been used where nobody could see: all those of the module that did it."""
    for inner in modules:
        if _is_opaque(inner):
            names = tree.parameter_names.items()
            yield from (first for name, first in names if name.startswith(inner.inside))


def _module_target(call: ModuleCall) -> ModuleTarget:
    drawing = [inner for inner in modules_in(call) if inner.num_draws]
    # Where the program looks at numbers inside, another batch may draw more often than this one.
    looks = any(True for _ in reads_in(call))
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
        if any(function.draws is not None for function in functions_in(child)):
            return False
    return True


def _composed(
    functions: Sequence[FunctionCall], call: ModuleCall, tree: CallTree
) -> tuple[tuple[int, int], ...]:
    """All changes in place inside a call, as (version before the call, version after it)."""
    first: dict[int, int] = {}  # newest version -> the version before the call
    for function in functions:
        for before, new in function.rebinds:
            old = before
            while tree.values[old].born >= call.start and old in tree.same_tensor:
                old = tree.same_tensor[old]
            first[new] = first.pop(old, old)
    return tuple((old, new) for new, old in first.items() if tree.values[old].born < call.start)


def without_unused(nodes: Sequence[Node], needed: Collection[int], values: Sequence[Value]) -> list[Node]:
    """Drop functions whose results nobody uses; modules stay, for they may keep state.

    A change in place stays where an earlier node used the memory: its backward may use it again.
    """
    first_use: dict[int, int] = {}
    for at, node in enumerate(nodes):
        for value in node.inputs:
            first_use.setdefault(values[value].storage, at)
    needed, kept = set(needed), list[Node]()
    for at, node in reversed(list(enumerate(nodes))):
        rebinds = tuple((old, new) for old, new in node.rebinds if new in needed)
        if any(first_use[values[old].storage] < at for old, _ in node.rebinds):
            rebinds = node.rebinds
        used = isinstance(node.target, ModuleTarget) or node.changed_buffers or rebinds
        if used or any(result in needed for result in node.results):
            kept.append(node if rebinds == node.rebinds else dataclasses.replace(node, rebinds=rebinds))
            needed.update(kept[-1].inputs)
    return kept[::-1]


def numbered(nodes: Sequence[Node], values: Sequence[Value]) -> list[Node]:
    """Number the nodes, and mark what depends on the batch alone: no parameter, draw, state or gradient."""
    changed = changed_buffers(nodes)
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
        glue = glue and not (
            node.unknown_to_autograd and any(values[old].storage in kept for old, _ in node.rebinds)
        )
        if glue:
            derived.update(node.makes)
        else:
            kept.update(values[value].storage for value in node.inputs)
        marked.append(dataclasses.replace(node, index=index, glue=glue))
    return marked


def _has_shared(node: Node) -> bool:
    """Whether a node is handed a mutable object, whose copies on other stages miss what it does."""
    return any(isinstance(leaf, Shared) for leaf in node.args.leaves)


def guard_of(read: ReadCall, nodes: Sequence[Node], values: Sequence[Value]) -> Guard:
    """What a look at numbers asks of each microbatch; `RecordError` where nobody can ask before the step."""
    made = {value for node in nodes if not node.glue for value in node.makes}
    where = read.path or "the loss function"
    if read.name in ARRAYS:
        raise RecordError(
            f"{where} turns a tensor of the batch into an array ({read.name}), whose further use cannot "
            "be seen; compute with torch, or do it before the batch is passed"
        )
    changed = changed_buffers(nodes)
    for ref in read.args.refs:
        source = values[ref].source
        changes = isinstance(source, BufferSource) and source.name in changed
        if changes or ref in made or isinstance(source, ParameterSource):
            raise RecordError(
                f"{where} calls {read.name} on {unsteady(values[ref])}, so the branch taken may change "
                "within a step; move that code into a module of the model"
            )
    return Guard(read.function, read.args, read.result, f"{where}: {read.name}")


def unsteady(value: Value) -> str:
    """What a number that decides something belongs to, and why it may be another the next time."""
    match value.source:
        case BufferSource(name):
            return f"the buffer {name}, which the program changes"
        case _:
            return f"a tensor {value.info} that depends on more than the batch"
