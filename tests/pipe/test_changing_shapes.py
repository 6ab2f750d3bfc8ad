"""Shapes that change from step to step: sizes, lengths, the last batch, train and eval.

The step's loss is that of the whole batch, each kind of microbatch is recorded once, and while kinds repeat
nothing is sent but what every step needs.
"""

import itertools
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import evenflow
from evenflow.runtime.links import shared_memory
from evenflow.runtime.links.shared_memory import SharedMemoryLink
from evenflow.runtime.ranks.world import ProcessGroupWorld
from evenflow.runtime.recorded.microbatch import Microbatches, split
from evenflow.schedules.catalog import SCHEDULES
from unsplit import (
    assert_same_step,
    mean_square,
    mlp,
    pipeline_step,
    regression,
    same,
    seeded,
    sgd,
)

NUM_MICROBATCHES = 4


def build():
    return mlp(4, 8, 8, 8, 1)


def make(model, **options):
    options = {
        "loss": mean_square,
        "example": regression(),
        "stages": 2,
        "max_leaf_share": 0.0,
        "num_microbatches": NUM_MICROBATCHES,
    } | options
    return evenflow.pipeline(model, **options)


def num_recordings(pipe) -> int:
    return len(pipe._parts.recordings.entries)


def assert_whole(pipe, model, batch, loss=mean_square):
    """A step's loss and gradients are those of `model` over the whole batch."""
    found, gradients = pipe.step(batch).loss, dict(pipe.named_gradients())
    model.zero_grad()
    expected = loss(model, batch)
    expected.backward()
    same(found, expected.detach(), 1e-6, "the loss")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6)


def plain(rows, model):
    """Loss and gradients of a loop over the microbatches of so many rows, weighed by rows."""
    items = split(regression(rows), min(rows, NUM_MICROBATCHES))
    model.zero_grad()
    parts = []
    for item in items:
        share, part = len(item["x"]) / rows, mean_square(model, item)
        part.backward(torch.tensor(share))
        parts.append(part.detach() * share)
    return torch.stack(parts).sum(), {name: p.grad for name, p in model.named_parameters()}


# -- any number of rows


@pytest.mark.parametrize("first", [1, 3, NUM_MICROBATCHES, 7])
def test_any_number_of_rows_up_to_two_for_each_microbatch(first):
    model, twin = build(), build()
    pipe = make(model, example=regression(first))
    for rows in range(1, 2 * NUM_MICROBATCHES + 1):
        assert_whole(pipe, twin, regression(rows))
        loss, gradients = plain(rows, twin)
        same(pipe.step(regression(rows)).loss, loss, 0, f"the loss of {rows} rows")
        for name, gradient in pipe.named_gradients():
            same(gradient, gradients[name], 0, f"the gradient of {name} for {rows} rows")
    assert num_recordings(pipe) == 2, "microbatches had one row or two"


@pytest.mark.parametrize("schedule", sorted(SCHEDULES.keys() - {"forward-only"}))
def test_fewer_rows_than_microbatches_under_every_schedule(schedule):
    model, twin = mlp(*(4,) * 7, 1), mlp(*(4,) * 7, 1)
    pipe = make(model, schedule=schedule, stages=4)
    for rows in (1, 2, 3, 8, 5):
        assert_whole(pipe, twin, regression(rows))


def test_the_last_batch_is_shorter():
    pipe = make(build(), microbatch_size=3, num_microbatches=None, optimizer=sgd)
    twin = build()
    updates = sgd(twin.parameters())
    for rows in (9, 9, 9, 4):
        loss = pipe.step(regression(rows)).loss
        updates.zero_grad()
        expected = mean_square(twin, regression(rows))
        expected.backward()
        updates.step()
        same(loss, expected.detach(), 1e-6, "the loss")
    for mine, theirs in zip(pipe._parts.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert num_recordings(pipe) == 2


def test_evaluation_and_prediction_of_fewer_rows_than_microbatches():
    model, twin = build(), build()
    pipe = make(model)
    for rows in (2, 7, 1):
        same(pipe.evaluate(regression(rows)).loss, mean_square(twin, regression(rows)).detach(), 1e-6, "loss")
        found = pipe.predict(regression(rows), lambda model, batch: model(batch["x"]))
        torch.testing.assert_close(found, twin(regression(rows)["x"]).detach())


# -- lengths


class Recurrent(nn.Module):
    """Rows of any length, read by attention."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, 9)

    def forward(self, ids):
        return self.head(self.block(self.embed(ids)))


def next_word(model, batch):
    scores = model(batch["ids"])[:, :-1]
    return F.cross_entropy(scores.flatten(0, 1), batch["ids"][:, 1:].flatten())


def text(rows, length):
    generator = torch.Generator().manual_seed(rows * length)
    return {"ids": torch.randint(0, 9, (rows, length), generator=generator)}


def test_another_length_in_each_step():
    pipe = make(seeded(Recurrent)().eval(), loss=next_word, example=text(8, 5))
    twin = seeded(Recurrent)().eval()
    for rows, length in [(8, 5), (8, 7), (3, 2), (8, 5), (6, 7)]:
        assert_whole(pipe, twin, text(rows, length), next_word)
    assert num_recordings(pipe) == 2 + 1 + 1, "two rows of 5 and of 7, one of 2, and one of 7"


def test_another_length_in_each_microbatch():
    items = [text(2, 5), text(2, 7), text(1, 3)]
    pipe = make(
        seeded(Recurrent)().eval(), loss=next_word, example=Microbatches(items), num_microbatches=None
    )
    twin = seeded(Recurrent)().eval()
    parts = [next_word(twin, item) * (len(item["ids"]) * (item["ids"].shape[1] - 1) / 22) for item in items]
    sum(parts).backward()
    same(pipe.step(Microbatches(items)).loss, sum(parts).detach(), 1e-6, "the loss")
    for name, gradient in pipe.named_gradients():
        torch.testing.assert_close(gradient, twin.get_parameter(name).grad, rtol=1e-5, atol=1e-6)


# -- train and eval


def test_switching_between_train_and_eval_records_each_once():
    model, twin = seeded(Recurrent)(), seeded(Recurrent)()
    pipe = make(model, loss=next_word, example=text(8, 5))
    trained = [float(pipe.step(text(8, 5)).loss) for _ in range(2)]
    assert trained[0] != trained[1], "another step drops other numbers"
    expected = next_word(twin.eval(), text(8, 5)).detach()
    for _ in range(3):
        same(pipe.evaluate(text(8, 5)).loss, expected, 1e-6, "the loss")
        pipe.step(text(8, 5))
    assert num_recordings(pipe) == 2
    model.eval()
    assert_whole(pipe, twin, text(8, 5), next_word)
    model.block.train()
    assert float(pipe.step(text(8, 5)).loss) != float(expected)
    assert num_recordings(pipe) == 4, "evaluation keeps no graph, so that a step in its mode is another"


@pytest.mark.parametrize("order", list(itertools.permutations([8, 5, 3])))
def test_the_order_in_which_shapes_come_changes_no_number(order):
    model = build()
    pipe = make(model)
    for rows in order:
        found = pipeline_step(pipe, model, regression(rows))
        alone = build()
        assert_same_step(found, pipeline_step(make(alone), alone, regression(rows)))


# -- what is sent between processes


class Counted:
    """Counts what two processes say to each other, apart from the microbatches' activations and gradients."""

    NAMES = ("share", "gather", "gather_numbers", "send", "receive", "broadcast")

    def __init__(self, monkeypatch):
        self.calls = Counter()
        for name in self.NAMES:
            monkeypatch.setattr(
                ProcessGroupWorld, name, self._counting(name, getattr(ProcessGroupWorld, name))
            )
        monkeypatch.setattr(SharedMemoryLink, "_tell", self._counting_parcels(SharedMemoryLink._tell))

    def _counting(self, name, whole):
        def call(*arguments, **options):
            self.calls[name] += 1
            return whole(*arguments, **options)

        return call

    def _counting_parcels(self, whole):
        """Parcels, and headers: those that tell how their tensors lie."""

        def call(link, peer, message, file=None):
            if file is None and not message.startswith(shared_memory._NEW_FILE):
                self.calls["transfer"] += 1
                self.calls["header"] += len(message) > shared_memory._HEAD_BYTES
            return whole(link, peer, message, file)

        return call

    def taken(self) -> dict[str, int]:
        found, self.calls = dict(+self.calls), Counter()
        return found


def with_metrics(model, batch):
    prediction = model(batch["x"])
    return F.mse_loss(prediction, batch["y"]), {"rows": len(prediction)}


def talk():
    """What a rank says in each of several steps."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        counted = Counted(monkeypatch)
        found = {}

        def steps(pipe, batches):
            counted.taken()
            said = []
            for batch in batches:
                float(pipe.step(batch).loss)
                said.append(counted.taken())
            return said

        sizes = [8, 8, 5, 5, 8]
        same_batches = [regression(rows) for rows in sizes]
        options = {"num_microbatches": 2, "optimizer": sgd, "stages": None}
        pipe = make(build(), **options)
        found["passed"] = steps(pipe, same_batches)
        pipe = make(build(), loss=with_metrics, **options)
        found["metrics"] = steps(pipe, same_batches[:2])
        pipe = make(build(), **options)
        found["fed"] = steps(pipe, pipe.feed(same_batches if pipe.is_main else ()))
        return found


@pytest.fixture(scope="module")
def said():
    return evenflow.launch(talk, nproc=2)


# Whatever is said: that the ranks have the same batch, and the loss. Two microbatches make two transfers.
EVERY_STEP = {"gather_numbers": 1, "broadcast": 1, "transfer": 2}


def test_while_shapes_repeat_a_step_says_no_more_than_it_must(said):
    for rank in said:
        assert [rank["passed"][at] for at in (1, 3, 4)] == [EVERY_STEP] * 3
        assert rank["metrics"][1] == EVERY_STEP | {"share": 1}, "metrics reach every rank"


def test_a_new_shape_adds_one_header_for_each_kind_of_parcel(said):
    for rank in said:
        assert rank["passed"][0] == EVERY_STEP | {"header": 1}
        assert rank["passed"][2] == EVERY_STEP | {"header": 2}, "microbatches of 3 rows and of 2"


def test_a_fed_rank_is_told_of_the_batch_and_of_its_recordings_and_sent_what_it_needs(said):
    for rank, name in zip(said, ("send", "receive"), strict=True):
        steady = EVERY_STEP | {"share": 2, name: 2}  # the targets of each microbatch
        assert [rank["fed"][at] for at in (1, 3, 4)] == [steady] * 3
        assert rank["fed"][0] == steady | {"header": 1}
        assert rank["fed"][2] == steady | {"header": 2}


def test_a_program_that_no_recording_fits_is_refused_and_not_recorded_for_ever(monkeypatch):
    pipe = make(build())
    monkeypatch.setattr(type(pipe._parts.recordings), "find", lambda *_: None)
    with pytest.raises(evenflow.RecordError, match="something else each time that microbatch 0 is recorded"):
        pipe.step(regression())
