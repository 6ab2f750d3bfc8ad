"""Law 1: losses, gradients and weights are the same, to the last bit, however a model is cut and run."""

import random
import threading

import pytest
import torch

import evenflow
from evenflow.graph.cut import legal_positions
from evenflow.ir.op import Payload, Send
from evenflow.pipe import choices
from evenflow.pipe.reading import read_loss
from evenflow.runtime.executor import Executor, Job
from evenflow.runtime.links.local import LocalLink
from evenflow.runtime.links.rendezvous import Meeting
from evenflow.runtime.stage import Stage
from evenflow.schedules import catalog
from small_models import (
    MODELS,
    NUM_MICROBATCHES,
    NUM_STEPS,
    TIED,
    Outcome,
    adamw,
    assert_close,
    assert_same_bits,
    batches,
    build,
    outcome,
    sgd,
    train,
    train_plainly,
)

SCHEDULES = ("sequential", "gpipe", "1f1b")
SHARES = (None, 0.0)  # the default, and everything taken apart
DROPOUT = 0.1


@pytest.fixture(scope="module")
def references() -> dict[str, Outcome]:
    """Each model on one stage, with dropout."""
    return {name: train(name, dropout=DROPOUT, stages=1, exact=name in TIED) for name in MODELS}


# -- one process


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_cuts_and_schedules_change_no_bit(references, name, stages, schedule):
    for share in SHARES:
        found = train(
            name,
            dropout=DROPOUT,
            stages=stages,
            schedule=schedule,
            exact=name in TIED,
            max_leaf_share=share,
        )
        assert_same_bits(found, references[name])


@pytest.mark.parametrize("name", MODELS)
def test_dropout_drops(references, name):
    """Else all the tests here would pass without a random number."""
    assert train(name, stages=1, exact=name in TIED).losses != references[name].losses


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", MODELS)
def test_random_cuts_change_no_bit(references, monkeypatch, name, seed):
    chance = random.Random(seed)
    stages = chance.choice([2, 3, 4, 6])
    monkeypatch.setattr(choices, "positions_of", lambda graph, *_: random_positions(chance, graph, stages))
    found = train(
        name,
        dropout=DROPOUT,
        stages=stages,
        schedule=chance.choice(SCHEDULES),
        exact=name in TIED,
        max_leaf_share=chance.choice([0.0, 0.0, 0.02]),
    )
    assert_same_bits(found, references[name])


def random_positions(chance: random.Random, graph, stages: int) -> tuple[int, ...]:
    legal = legal_positions(graph)
    places = [at for at in range(1, len(graph.chain)) if legal[at]]
    assert len(places) >= 10, "so few places to cut make a poor test"
    return tuple(sorted(chance.sample(places, stages - 1)))


@pytest.mark.parametrize("num_steps", [1, NUM_STEPS])
@pytest.mark.parametrize("name", TIED)
def test_shared_parameters_without_exact_agree_closely(name, num_steps):
    # Plain SGD: Adam divides by the gradient's own size, so that where a gradient is nearly zero its last
    # bits alone decide about a whole step of the learning rate.
    options = {"dropout": DROPOUT, "optimizer": sgd, "num_steps": num_steps}
    reference = train(name, stages=1, **options)
    for stages in (2, 4):
        for schedule in SCHEDULES:
            assert_close(train(name, stages=stages, schedule=schedule, **options), reference, 1e-6)


# -- against PyTorch alone


@pytest.mark.parametrize("name", [name for name in MODELS if name not in TIED])
def test_one_stage_is_plain_pytorch_to_the_last_bit(name):
    assert_same_bits(train(name, stages=1), train_plainly(name))


@pytest.mark.parametrize("num_steps", [1, NUM_STEPS])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", TIED)
def test_one_stage_of_a_tied_model_is_close_to_plain_pytorch(name, exact, num_steps):
    found = train(name, stages=1, optimizer=sgd, exact=exact, num_steps=num_steps)
    assert_close(found, train_plainly(name, optimizer=sgd, num_steps=num_steps), 1e-6)


# -- several processes


def train_on_ranks(dropout: float) -> dict[tuple[str, str], Outcome]:
    """What each rank does: all models, all schedules; its own share of every outcome."""
    import torch.distributed as dist

    found: dict[tuple[str, str], Outcome] = {}
    for name in MODELS:
        for number, schedule in enumerate(SCHEDULES):
            data = batches()
            pipe = evenflow.pipeline(
                build(name, dropout),
                example=data[0],
                optimizer=adamw,
                num_microbatches=NUM_MICROBATCHES,
                schedule=schedule,
                exact=name in TIED,
                max_leaf_share=SHARES[number % 2],
            )
            # Both ways of giving a batch: on every rank, or on the first alone.
            fed = data if number == 0 else pipe.feed(data if dist.get_rank() == 0 else [])
            losses = [float(pipe.step(batch).loss) for batch in fed]
            found[name, schedule] = outcome(pipe, losses)
            pipe.close()
    return found


@pytest.fixture(scope="module", params=[2, 4])
def from_ranks(request) -> list[dict[tuple[str, str], Outcome]]:
    return evenflow.launch(train_on_ranks, DROPOUT, nproc=request.param)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", MODELS)
def test_processes_change_no_bit(references, from_ranks, name, schedule):
    shares = [found[name, schedule] for found in from_ranks]
    merged = Outcome(
        shares[0].losses,
        {key: tensor for share in shares for key, tensor in share.gradients.items()},
        {key: tensor for share in shares for key, tensor in share.weights.items()},
    )
    assert all(share.losses == merged.losses for share in shares), "every rank reports the same losses"
    assert sum(len(share.weights) for share in shares) == len(merged.weights), "owned by one rank each"
    assert all(share.weights for share in shares), "every rank owns something"
    assert_same_bits(merged, references[name])


# -- the worst machine


class OnThreads:
    """A pipeline of this process whose ranks run each in a thread, over rendezvous links."""

    def __init__(self, pipe: evenflow.Pipeline, schedule: str) -> None:
        self.parts, self.agree, self.proven = pipe._parts, pipe._agree, pipe._proven
        self.schedule = catalog.get(schedule)

    def step(self, batch) -> float:
        parts = self.parts
        parts.updater.clear()
        agreed = self.agree(parts.loss, batch, training=True)
        entries = [parts.recordings.entries[number] for number in agreed.recordings]
        jobs = [
            Job(leaves, number, entry.cut, entry.works, share)
            for leaves, number, entry, share in zip(
                agreed.batches, agreed.recordings, entries, agreed.shares, strict=True
            )
        ]
        proven = self.proven(self.schedule, jobs)
        meeting = Meeting(len(parts.stages), timeout_seconds=30)
        executors = [
            Executor(
                proven,
                rank,
                stages={rank: parts.stages[rank]},
                devices=parts.devices,
                jobs=jobs,
                link=meeting.link(rank),
                step=0,
                reading=read_loss,
            )
            for rank in parts.stages
        ]
        run_on_threads(executors, meeting)
        losses = [result.loss for _, result in sorted(executors[-1].results.items())]
        parts.updater.combine(None)
        parts.updater.step()
        return float(
            torch.stack([loss * share for loss, share in zip(losses, agreed.shares, strict=True)]).sum()
        )


def run_on_threads(executors: list[Executor], meeting: Meeting) -> None:
    errors: list[BaseException] = []

    def run(executor: Executor) -> None:
        try:
            executor.run()
        except BaseException as error:  # noqa: BLE001 (raised again below)
            errors.append(error)
        finally:
            meeting.leave(executor.rank)

    threads = [threading.Thread(target=run, args=(executor,)) for executor in executors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", MODELS)
def test_the_worst_machine_changes_no_bit(name, schedule):
    # Without dropout: threads of one process share the generator that dropout draws from.
    exact = name in TIED
    data = batches()
    pipe = evenflow.pipeline(
        build(name),
        example=data[0],
        optimizer=adamw,
        num_microbatches=4,
        stages=3,
        exact=exact,
        max_leaf_share=0,
    )
    threaded = OnThreads(pipe, schedule)
    losses = [threaded.step(batch) for batch in data]
    pipe._updated = True  # the gradients are combined already
    found = outcome(pipe, losses)
    pipe.close()
    assert_same_bits(found, train(name, stages=1, exact=exact))


# -- would a fault be seen?


def nudged(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, each element moved to the next number that a float can hold: one may be rounded away."""
    return torch.nextafter(tensor, torch.full_like(tensor, float("inf")))


def nudge_a_parcel(monkeypatch: pytest.MonkeyPatch, payload: Payload) -> None:
    """The first parcel of this kind travels with its last bits changed."""
    send, done = LocalLink.send, []

    def nudging(link, op: Send, parcel, manifest):
        if op.payload is payload and not done:
            done.append(op)
            parcel = tuple(t if t is None or not t.is_floating_point() else nudged(t) for t in parcel)
        send(link, op, parcel, manifest)

    monkeypatch.setattr(LocalLink, "send", nudging)


def nudge_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """One element of one parameter's gradient has its last bit changed, in the last step."""
    run_backward, num_left = Stage.run_backward, [2 * NUM_MICROBATCHES * NUM_STEPS]

    def nudging(stage, flight, **options):
        run_backward(stage, flight, **options)
        num_left[0] -= 1
        if not num_left[0]:
            *_, parameter = stage.parameters()
            at = (0,) * parameter.dim()
            parameter.grad[at] = nudged(parameter.grad[at])

    monkeypatch.setattr(Stage, "run_backward", nudging)


@pytest.mark.parametrize("where", ["activation", "boundary gradient", "weight gradient"])
@pytest.mark.parametrize("name", MODELS)
def test_one_last_bit_would_be_noticed(references, monkeypatch, name, where):
    match where:
        case "activation":
            nudge_a_parcel(monkeypatch, Payload.ACTIVATION)
        case "boundary gradient":
            nudge_a_parcel(monkeypatch, Payload.GRADIENT)
        case _:
            nudge_a_gradient(monkeypatch)
    found = train(name, dropout=DROPOUT, stages=2, exact=name in TIED)
    with pytest.raises(AssertionError):
        assert_same_bits(found, references[name])
