"""Blocks that torch compiles: the same training, whatever the schedule, and word of what stays as it is."""

import inspect
import logging
import re
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import evenflow
from evenflow.errors import ConfigError
from evenflow.schedules import catalog
from forked import launched

# Of torch's compiler itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method"),
]

WIDTH, ROWS = 16, 8
SCHEDULES = ("1f1b", "zb-h1", "interleaved-1f1b", "zb-v")


class Block(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm, self.grow, self.shrink = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(2 * WIDTH, WIDTH),
        )
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x):
        return x + self.drop(self.shrink(F.gelu(self.grow(self.norm(x)))))


def model(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(dropout) for _ in range(6)), nn.Linear(WIDTH, 1))


def batches():
    torch.manual_seed(1)
    return [{"x": torch.randn(ROWS, WIDTH), "y": torch.randn(ROWS, 1)} for _ in range(3)]


def train(schedule="1f1b", ranks=2, dropout=0.0, **options):
    on_each = catalog.default_stages_per_rank(schedule)
    torch.manual_seed(2)
    pipe = evenflow.pipeline(
        model(dropout),
        loss=lambda m, b: F.mse_loss(m(b["x"]), b["y"]),
        example=batches()[0],
        optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=0.1),
        stages=ranks * on_each,
        schedule=schedule,
        num_microbatches=4,
        **options,
    )
    losses = [float(pipe.step(batch).loss) for batch in batches()]
    return losses, {name: p.detach().clone() for name, p in pipe.named_parameters()}


@cache
def plain():
    return train()


@cache
def compiled():
    return train(compile=True)


def is_same(found, expected):
    losses, weights = expected
    assert found[0] == losses
    assert found[1].keys() == weights.keys()
    return all(torch.equal(found[1][name], weights[name]) for name in weights)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_backend_that_changes_no_kernel_changes_no_bit(schedule):
    assert is_same(train(schedule, compile="aot_eager"), plain())


def test_compiled_blocks_train_as_plain_ones():
    losses, weights = plain()
    assert compiled()[0] == pytest.approx(losses, rel=1e-5)
    for name, found in compiled()[1].items():
        torch.testing.assert_close(found, weights[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES[1:])
def test_no_schedule_changes_a_bit_of_what_is_compiled(schedule):
    assert is_same(train(schedule, compile=True), compiled())


def on_two_processes():
    return train("zb-h1", compile="aot_eager")


def test_processes_compile_what_is_theirs():
    found = launched(on_two_processes, nproc=2)
    assert [losses for losses, _ in found] == [plain()[0]] * 2
    weights = {name: weight for _, own in found for name, weight in own.items()}
    assert is_same((plain()[0], weights), plain())


def test_the_log_tells_of_each_stage_what_is_compiled(caplog):
    with caplog.at_level(logging.INFO, "evenflow"):
        train("zb-h1", compile="aot_eager")
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("stage ")]
    whole = "; the gradients of their weights come with those of their inputs"
    assert said[0] == f"stage 0 compiles 3 of 3 nodes{whole}"
    assert said[1].startswith("stage 1 compiles 3 of ")
    assert "holds no other module" in said[1]


def test_what_draws_random_numbers_stays_as_it_is(caplog):
    with caplog.at_level(logging.INFO, "evenflow"):
        found = train(dropout=0.1, compile="aot_eager")
    assert is_same(found, train(dropout=0.1, max_leaf_share=0.5))
    assert "stage 0 compiles 0 of 3 nodes (0 draws random numbers)" in caplog.text


class Numbered(Block):
    """A block that reads its number, as many of Hugging Face's do."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return super().forward(x) * (1 + 1 / (self.number + 8))


def train_numbered(stages, **options):
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Numbered(at) for at in range(12)), nn.Linear(WIDTH, 1))
    pipe = evenflow.pipeline(
        blocks,
        loss=lambda m, b: F.mse_loss(m(b["x"]), b["y"]),
        example=batches()[0],
        stages=stages,
        num_microbatches=2,
        **options,
    )
    pipe.step(batches()[0], update=False)
    return {name: gradient.clone() for name, gradient in pipe.named_gradients()}


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters,
    reason="this torch has one limit of recompilations for all blocks of a class",
)
def test_many_blocks_that_differ_in_a_number_are_all_compiled(caplog):
    torch._dynamo.reset()
    with caplog.at_level(logging.WARNING):
        found = train_numbered(2, compile="aot_eager")
    assert "recompile_limit" not in caplog.text
    expected = train_numbered(2)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def planned_by_two():
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(logging.getLogger("evenflow"), "log", lambda _, text, *given: said.append(text % given))
        pipe = evenflow.pipeline(
            model(),
            loss=lambda m, b: F.mse_loss(m(b["x"]), b["y"]),
            example=batches()[0],
            plan="auto",
            compile="aot_eager",
        )
        pipe.step(batches()[0], update=False)
        return said


def test_a_plan_leaves_blocks_whole():
    said = [line for own in launched(planned_by_two, nproc=2) for line in own]
    assert sum(int(re.match(r"stage \d compiles (\d) of ", line)[1]) for line in said) == 6


def compiled_in_two():
    return evenflow.pipeline(
        model(),
        loss=lambda m, b: F.mse_loss(m(b["x"]), b["y"]),
        example=batches()[0],
        stages=2,
        compile="aot_eager",
    )


def test_what_is_compiled_is_recorded_once():
    pipe = compiled_in_two()
    for batch in batches():
        pipe.step(batch, update=False)
    assert len(pipe._parts.recordings.entries) == 1


def test_check_refuses_what_is_compiled():
    pipe = compiled_in_two()
    with pytest.raises(ConfigError, match="check compares with the model itself, which compiles nothing"):
        pipe.check(batches()[0])


@pytest.mark.parametrize("choice", ["fast", 1.5, None])
def test_a_backend_that_there_is_not_is_refused(choice):
    with pytest.raises(ConfigError, match=r"compile=.* is neither True nor False, nor a backend"):
        train(compile=choice)
