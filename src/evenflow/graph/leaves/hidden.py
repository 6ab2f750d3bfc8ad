"""Values that enter or leave a module call through Python state, not through its arguments or its result.

A call that stays whole is handed its arguments and gives back its result, and nothing else. So one that takes
a tensor from a closure or leaves one in an attribute must be taken apart.
"""

from evenflow.graph.nouns.tree import Call, CallTree, FunctionCall, ModuleCall


def hidden_values(tree: CallTree) -> dict[ModuleCall, str]:
    """Calls that a value enters or leaves without passing through arguments or result, and which value."""
    births = _births(tree)
    homes: dict[int, tuple[ModuleCall, ...]] = {}  # clock of a call -> the module calls around it
    uses: list[tuple[int, str, tuple[ModuleCall, ...]]] = []  # value, its user's name, calls around the user
    given: dict[ModuleCall, frozenset[int]] = {}
    shown: dict[ModuleCall, frozenset[int]] = {}

    def visit(call: Call, around: tuple[ModuleCall, ...]) -> list[tuple[int, int]]:
        if isinstance(call, ModuleCall):
            given[call] = frozenset(call.args.refs)
            rebinds = [pair for child in call.children for pair in visit(child, (*around, call))]
            changed = (new for old, new in rebinds if births[tree.values[old].storage] < call.start)
            shown[call] = frozenset((*call.output.refs, *changed))
            return rebinds
        homes[call.clock] = around
        uses.extend((value, call.name, around) for value in call.args.refs)
        return list(call.rebinds) if isinstance(call, FunctionCall) else []

    visit(tree.root, ())
    uses.extend((value, "the loss function", (tree.root,)) for value in tree.output.refs)
    hides: dict[ModuleCall, str] = {}
    for number, user, around in uses:
        value = tree.values[number]
        if value.is_state:
            continue
        home = homes.get(value.born, ())
        for call in around[1:]:
            if call not in home and number not in given[call]:
                hides[call] = f"{user} inside it uses a tensor {value.info} that is not among its arguments"
        for call in home[1:]:
            if call not in around and number not in shown[call]:
                hides[call] = f"{user} uses a tensor {value.info} made inside it that is not in its result"
    return hides


def _births(tree: CallTree) -> dict[int, int]:
    """When the first version of each memory was made."""
    births: dict[int, int] = {}
    for value in tree.values:
        births[value.storage] = min(births.get(value.storage, value.born), value.born)
    return births
