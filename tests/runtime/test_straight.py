"""The code that is written for a section's calls."""

import contextlib
import gc
import traceback
import weakref
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import evenflow
from evenflow.graph.nouns.template import Ref, Shared, Shell, Template
from evenflow.runtime.program.straight import filling

WIDTH = 4


@contextlib.contextmanager
def piped(forward, *, last=None, **options):
    """A pipeline of a net of three linear layers that runs `forward(net, x)`, each function a node."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.last = last

        def forward(self, x):
            return forward(self, x)

    torch.manual_seed(0)
    pipe = evenflow.pipeline(
        Net(),
        loss=lambda model, batch: model(batch["x"]),
        example={"x": torch.ones(2, WIDTH)},
        **{"stages": 1, "num_microbatches": 1, "max_leaf_share": 0.0} | options,
    )
    try:
        yield pipe
    finally:
        pipe.close()


def code_of(pipe):
    runs = [run for work in pipe._parts.recordings.entries[0].works.values() for run in work.runs]
    return "".join(run.plainly.__globals__["__loader__"].text for run in runs)


def test_calls_in_a_row_read_like_the_program():
    with piped(lambda net, x: net.b(net.a(x).relu()).sum()) as pipe:
        lines = [line.strip().split("_")[0] for line in code_of(pipe).splitlines()]
    kinds = [line.split(" = ")[-1] for line in lines if not line.startswith("del ")]
    assert kinds[0] == "def run(values, shared):"
    assert kinds[2:-1] == ["with mode", "a", "relu", "b", "sum"]


def test_each_value_is_let_go_of_after_its_last_use():
    with piped(lambda net, x: net.b(net.a(x).relu()).sum()) as pipe:
        code = code_of(pipe)
        names = {word for word in code.replace(")", " ").replace("(", " ").split() if word[0] == "v"}
        numbers = {name for name in names if name[1:].isdigit()}
        deleted = {name for name in numbers if f"del {name}" in code}
        assert len(numbers - deleted) == 1  # the loss
        made = []

        def tell(node, values):
            made.append((node.name, [weakref.ref(value) for value in values.values()]))
            alive[node.name] = [name for name, refs in made if any(ref() is not None for ref in refs)]

        alive = {}
        work = pipe._parts.recordings.entries[0].works[0]
        ((_, value),) = work.section.batch
        with torch.no_grad():  # what autograd keeps is not ours
            work.watched(tell).run({value: torch.ones(2, WIDTH)})
        gc.collect()
        assert alive == {"a": ["a"], "relu": ["a", "relu"], "b": ["relu", "b"], "sum": ["b", "sum"]}


class Wrapping(nn.Module):
    """Returns a tensor in a tuple in a tuple."""

    def forward(self, x):
        return ((x * 2,),)


@pytest.mark.parametrize(
    ("forward", "written"),
    [
        (lambda net, x: torch.cat([net.a(x), net.b(x)], dim=1).sum(), "([v"),
        (lambda net, x: torch.stack((net.a(x),), dim=-1).sum(), ",), "),
        (lambda net, x: net.a(x).max(dim=1)[0].sum(), "leaves"),
        (lambda net, x: net.last(net.a(x))[0][0].sum(), "leaves"),
        (lambda net, x: sum(part.sum() for part in net.a(x).unbind(1)), ", = unbind"),
        (lambda net, x: F.dropout(net.a(x), 0.5, training=True).sum(), "before"),
        (lambda net, x: net.a(x).mul_(2.0).sum(), " = v"),
        (lambda net, x: torch.einsum("ij,kj->ik", net.a(x), net.b(x)).sum(), "'ij,kj->ik'"),
        (lambda net, x: net.a(x).clamp(-1e9, float("inf")).sum(), "-1000000000.0, constant"),
    ],
)
def test_every_kind_of_call_is_written_and_right(forward, written):
    with piped(forward, last=Wrapping(), atomic=[Wrapping]) as pipe:
        assert written in code_of(pipe)
        assert pipe.check({"x": torch.randn(2, WIDTH)}).equal


class Keeping(nn.Linear):
    """Changes the containers that it is given."""

    def forward(self, x, others, factors):
        assert len(others) == len(factors["of"]) == 1
        x = super().forward(x + others[0]) * factors["of"][0]
        others.append(x)
        factors["of"].append(3.0)
        return x


def test_containers_are_made_anew_by_each_call():
    with piped(
        lambda net, x: net.last(net.a(x), [net.b(x)], {"of": [2.0]}).sum(),
        last=Keeping(WIDTH, WIDTH),
        atomic=[Keeping],
    ) as pipe:
        assert "{'of': [2.0]}" in code_of(pipe)
        assert pipe.check({"x": torch.randn(2, WIDTH)}).equal  # both ways call it once more


def test_a_traceback_shows_the_line():
    def fail(x):
        raise ValueError("as it was told")

    with piped(lambda net, x: net.b(net.a(x).tanh()).sum()) as pipe:
        (run,) = pipe._parts.recordings.entries[0].works[0].runs
        (call,) = (call for call in run.calls if call.node.name == "tanh")
        call.function = fail
        with pytest.raises(ValueError, match="as it was told") as raised:
            pipe.step({"x": torch.ones(2, WIDTH)})
    assert any(" = tanh_" in frame.line for frame in traceback.extract_tb(raised.tb))


def test_a_template_is_filled_with_values_and_copies_of_its_tensors():
    own = torch.zeros(2)
    ref = Ref(3)
    held = Shell(SimpleNamespace(of=ref), (ref,), {})
    tree = {"a": [Ref(3), own], 5: (Ref(3), None, "x"), "s": Shared(0, [1], {}), "h": held}
    leaves, spec = pytree.tree_flatten(tree | {"o": OrderedDict(b=[Ref(3), (1.5,)], a=Ref(3))})
    fill = filling(Template(tuple(leaves), spec))
    first, second = fill({3: 7}), fill({3: 8})
    assert first[5] == (7, None, "x")
    assert (first["a"][0], second["a"][0]) == (7, 8)
    assert first["a"][1] is not own
    assert torch.equal(first["a"][1], own)
    assert first["o"] == OrderedDict(b=[7, (1.5,)], a=7)
    assert (first["h"].of, second["h"].of) == (7, 8)
    assert first["s"] == [1]
    assert first["s"] is not second["s"]
