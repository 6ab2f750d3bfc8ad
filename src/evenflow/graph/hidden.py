"""Buffers that a program changes behind autograd's back (`data`): what the backward must not need.

Several microbatches are in flight at once, so the backward of one runs after the forward of the next. Where
autograd knows of a change it says so; where it does not, it would take the next one's numbers for its own.
"""

from evenflow.errors import RecordError
from evenflow.graph.leaves import walk
from evenflow.graph.tree import BufferSource, CallTree, FunctionCall


def refuse_hidden_changes(tree: CallTree) -> None:
    """Refuse to use, on the way to the loss, a buffer that is changed where autograd does not see it."""
    calls = [call for call in walk(tree.root) if isinstance(call, FunctionCall)]
    changed = {name: call for call in calls if call.hidden for name in call.changed_buffers}
    sources = ((value.source, value.storage) for value in tree.values)
    memories = {
        storage: source.name
        for source, storage in sources
        if isinstance(source, BufferSource) and source.name in changed
    }
    needed = set(tree.output.refs)
    for call in reversed(calls if memories else []):
        made = (*call.output.refs, *(new for _, new in call.rebinds))
        if not any(value in needed and tree.values[value].info.requires_grad for value in made):
            continue
        needed.update(call.args.refs)
        for ref in call.args.refs:
            name = memories.get(tree.values[ref].storage)
            if name is not None:
                raise RecordError(
                    f"{call.path or 'the loss function'} uses the buffer {name}, which "
                    f"{changed[name].path or 'the loss function'} changes through its data, so that autograd "
                    "does not see it: the backward of one microbatch would take the numbers of the next; use "
                    "a clone() of it"
                )
