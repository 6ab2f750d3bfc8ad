"""What a gradient checkpoint must not do: change state, which its recomputation would change once more.

A plain loop recomputes a microbatch before the next one's forward, a pipeline after it. So buffers and
attributes would be changed in another order, and what is read of them would be something else.
"""

from evenflow.errors import RecordError
from evenflow.graph.tree import CallTree, FunctionCall, ModuleCall, walk

REMEDY = (
    "a recomputation changes it once more, and in a pipeline after the forwards of other microbatches: leave "
    "the module that does so out of the checkpoint, or switch its changes off (eval() of a BatchNorm)"
)


def refuse_changes(tree: CallTree) -> None:
    """Raise `RecordError` naming the first buffer or attribute that is changed inside a checkpoint."""
    for call in walk(tree.root):
        match call:
            case FunctionCall(region=int(), changed_buffers=(name, *_)):
                raise RecordError(f"a gradient checkpoint in the program changes the buffer {name}: {REMEDY}")
            case ModuleCall(region=int(), changed=(name, *_)) | ModuleCall(recomputed=(name, *_)):
                raise RecordError(f"a gradient checkpoint in the program changes {name}: {REMEDY}")
