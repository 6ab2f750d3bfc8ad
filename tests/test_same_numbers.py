"""Law 1: losses, gradients and weights are the same, to the last bit, however a model is cut and run."""

import itertools
import random
import threading
from functools import cache

import pytest
import torch

import evenflow
from evenflow.graph.cutting.positions import legal_positions
from evenflow.ir import Exchange, Payload, Program, Recv, Send
from evenflow.lower import lower
from evenflow.pipe.given import cuts, programs
from evenflow.pipe.given.reading import read_loss
from evenflow.runtime.links.local import LocalLink
from evenflow.runtime.notes.script import script
from evenflow.runtime.program.weight_grads import WeightGrads
from evenflow.runtime.stages.executor import Executor
from evenflow.runtime.stages.narrowing import Narrowing
from evenflow.runtime.stages.stage import Stage
from evenflow.schedules import catalog
from own_schedules import OWN
from rendezvous import Meeting
from small_models import (
    DROPOUT,
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
    recorded,
    reference,
    sgd,
    train,
    train_plainly,
)

CATALOG = [name for name in catalog.NAMES if name != "forward-only"]
SHARES = (None, 0.0)  # the default, and everything taken apart
SOME_MODELS = ("gpt", "t5")  # dropout everywhere; skip connections with relays and shared parameters
MANY = 8  # microbatches: as many as any schedule needs on 4 ranks, and more than any link receives ahead


def on_ranks(num_ranks: int, schedule: str) -> dict:
    """The options of a pipeline with a schedule of the catalog, or one of our own, on so many ranks."""
    own = OWN.get(schedule)
    on_each = catalog.default_stages_per_rank(schedule) if own is None else own.stages_per_rank
    return {"stages": num_ranks * on_each, "stages_per_rank": on_each, "schedule": own or schedule}


# -- one process


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_cuts_change_no_bit(name, stages, schedule):
    for share in SHARES:
        found = train(
            name,
            dropout=DROPOUT,
            stages=stages,
            schedule=schedule,
            exact=name in TIED,
            max_leaf_share=share,
        )
        assert_same_bits(found, reference(name))


# Every schedule on both, every model in three kinds of order, and the irregular orders in many stages.
IN_ONE_PROCESS = sorted(
    {
        *itertools.product([("t5", 2), ("gpt", 4)], [*CATALOG, *OWN]),
        *itertools.product([(name, 2) for name in MODELS], ["1f1b", "zb-v", "v, mixed, overlapping"]),
        *itertools.product([("t5", 4)], OWN),
    }
)


@pytest.mark.parametrize(("of", "schedule"), IN_ONE_PROCESS, ids=str)
def test_schedules_change_no_bit(of, schedule):
    name, num_ranks = of
    num_microbatches = 2 * num_ranks  # as many as any schedule needs
    found = train(
        name,
        dropout=DROPOUT,
        exact=name in TIED,
        num_microbatches=num_microbatches,
        max_leaf_share=0,
        **on_ranks(num_ranks, schedule),
    )
    assert_same_bits(found, reference(name, num_microbatches=num_microbatches))


@pytest.mark.parametrize("name", MODELS)
def test_dropout_drops(name):
    """Else all the tests here would pass without a random number."""
    assert train(name, stages=1, exact=name in TIED).losses != reference(name).losses


@pytest.mark.parametrize(
    ("name", "seed"), [(name, seed) for name in MODELS for seed in range(4 if name in SOME_MODELS else 2)]
)
def test_random_cuts_change_no_bit(monkeypatch, name, seed):
    expected = reference(name)  # before cuts are random
    chance = random.Random(seed)
    options = on_ranks(chance.choice([1, 2, 3]), chance.choice(list(OWN)))
    stages = options["stages"]
    monkeypatch.setattr(cuts, "positions_of", lambda graph, *_: random_positions(chance, graph, stages))
    found = train(
        name,
        dropout=DROPOUT,
        exact=name in TIED,
        max_leaf_share=chance.choice([0.0, 0.0, 0.02]),
        **options,
    )
    assert_same_bits(found, expected)


@pytest.mark.parametrize("name", MODELS)
def test_backwards_are_split(monkeypatch, name):
    """Else all would pass with backwards that are whole."""
    calls = []
    monkeypatch.setattr(WeightGrads, "put", counted(calls, WeightGrads.put))
    train(name, num_steps=1, exact=name in TIED, **on_ranks(2, "straight, split"))
    assert len(calls) >= NUM_MICROBATCHES


def counted(calls: list[None], method):
    def counting(*args):
        calls.append(None)
        method(*args)

    return counting


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
    whole = train(name, stages=1, **options)
    for stages in (2, 4):
        for schedule in ("1f1b", "straight, split", "upside down"):
            ours = options | on_ranks(stages, schedule) | {"stages": stages}
            assert_close(train(name, **ours), whole, 1e-6)


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


# By number of processes; many take long to start, and so do less.
ON_PROCESSES = {
    2: [
        *((name, schedule) for name in MODELS for schedule in ("1f1b", "v, mixed, overlapping")),
        *((name, "upside down") for name in SOME_MODELS),
        *(("gpt", schedule) for schedule in CATALOG if schedule != "1f1b"),
        *(("t5", schedule) for schedule in ("zb-h1", "zb-v")),
    ],
    4: [
        *(("gpt", schedule) for schedule in CATALOG),
        ("gpt", "v, mixed, overlapping"),
        ("t5", "v, split"),
        ("t5", "zb-v"),
    ],
}
EACH_ON_PROCESSES = [(number, *which) for number, listed in ON_PROCESSES.items() for which in listed]


def train_on_ranks(dropout: float) -> list[Outcome]:
    """What each rank does: all of `ON_PROCESSES`; its own share of every outcome."""
    import torch.distributed as dist

    found: list[Outcome] = []
    dist.init_process_group("gloo")
    num_ranks = dist.get_world_size()
    for number, (name, schedule) in enumerate(ON_PROCESSES[num_ranks]):
        data = batches()
        with recorded(name, dropout):
            pipe = evenflow.pipeline(
                build(name, dropout),
                example=data[0],
                optimizer=adamw,
                num_microbatches=MANY,
                exact=name in TIED,
                max_leaf_share=SHARES[number % 2],
                **on_ranks(num_ranks, schedule),
            )
            # Both ways of giving a batch: on every rank, or on the first alone.
            fed = data if number % 3 == 0 else pipe.feed(data if dist.get_rank() == 0 else [])
            losses = [float(pipe.step(batch).loss) for batch in fed]
        found.append(outcome(pipe, losses))
        pipe.close()
    return found


@cache
def from_ranks(num_ranks: int) -> list[list[Outcome]]:
    return evenflow.launch(train_on_ranks, DROPOUT, nproc=num_ranks)


@pytest.mark.parametrize(("num_ranks", "name", "schedule"), EACH_ON_PROCESSES)
def test_processes_change_no_bit(num_ranks, name, schedule):
    at = ON_PROCESSES[num_ranks].index((name, schedule))
    shares = [found[at] for found in from_ranks(num_ranks)]
    merged = Outcome(
        shares[0].losses,
        {key: tensor for share in shares for key, tensor in share.gradients.items()},
        {key: tensor for share in shares for key, tensor in share.weights.items()},
    )
    assert all(share.losses == merged.losses for share in shares), "every rank reports the same losses"
    assert sum(len(share.weights) for share in shares) == len(merged.weights), "owned by one rank each"
    assert all(share.weights for share in shares), "every rank owns something"
    assert_same_bits(merged, reference(name, num_microbatches=MANY))


# -- the worst machine


class OnThreads:
    """A pipeline of this process whose ranks run each in a thread, over rendezvous links."""

    def __init__(self, pipe: evenflow.Pipeline) -> None:
        self.parts, self.agree, self.runs = pipe._parts, pipe._batches.agree, pipe._runs
        self.placement = self.parts.programs.placement

    def step(self, batch) -> float:
        parts = self.parts
        parts.updater.clear()
        agreed = self.agree(parts.loss, batch, training=True)
        jobs, proven = self.runs.jobs(agreed), self.runs.proven(agreed, parts.programs.training)
        meeting = Meeting(self.placement, timeout_seconds=30)
        executors = [
            Executor(
                proven,
                rank,
                script=script(proven.program.ranks[rank]),
                stages={stage: parts.stages[stage] for stage in self.placement.stages_on(rank)},
                devices=parts.devices,
                jobs=jobs,
                link=meeting.link(rank),
                step=0,
                reading=read_loss,
                manifests={},
                narrowing=Narrowing(),
                data=parts.updater.data,
            )
            for rank in range(self.placement.num_ranks)
        ]
        run_on_threads(executors, meeting)
        last = executors[self.placement.rank_of[-1]]
        losses = [result.loss for _, result in sorted(last.results.items())]
        parts.updater.combine(None)
        parts.updater.step(parts.updater.norm())
        return float(
            torch.stack(
                [loss * share for loss, share in zip(losses, agreed.shares.losses, strict=True)]
            ).sum()
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


def grouped(program: Program) -> Program:
    """The program with neighbouring transfers made one group, in which sends and receives stand mixed."""
    ranks = []
    for queue in program.ranks:
        made = []
        for moves, ops in itertools.groupby(queue, lambda op: isinstance(op, Send | Recv)):
            transfers = tuple(ops)
            made += [Exchange(transfers)] if moves and len(transfers) > 1 else transfers
        ranks.append(tuple(made))
    return Program(program.schedule, program.flow, tuple(ranks))


# With neighbouring transfers grouped, of gpt in every order: that has nothing to do with the model.
ON_THREADS = [
    *((name, schedule, False) for name in MODELS for schedule in ("1f1b", "straight, split")),
    *(("gpt", schedule, False) for schedule in OWN if schedule != "straight, split"),
    *(("gpt", schedule, True) for schedule in (*CATALOG, *OWN)),
    *(("t5", "v, mixed, overlapping", groups) for groups in (False, True)),
]


@pytest.mark.parametrize(("name", "schedule", "groups"), ON_THREADS)
def test_the_worst_machine_changes_no_bit(monkeypatch, name, schedule, groups):
    if groups:
        monkeypatch.setattr(programs, "lower", lambda *args, **kwargs: grouped(lower(*args, **kwargs)))
    # Without dropout: threads of one process share the generator that dropout draws from.
    data = batches()
    with recorded(name):
        pipe = evenflow.pipeline(
            build(name),
            example=data[0],
            optimizer=adamw,
            num_microbatches=MANY,
            exact=name in TIED,
            max_leaf_share=0,
            **on_ranks(3, schedule),
        )
    threaded = OnThreads(pipe)
    losses = [threaded.step(batch) for batch in data]
    pipe._updated = True  # the gradients are combined already
    found = outcome(pipe, losses)
    pipe.close()
    assert_same_bits(found, reference(name, dropout=0.0, num_microbatches=MANY))


@pytest.mark.parametrize("schedule", ["1f1b", "v, split"])
def test_groups_of_transfers_change_no_bit_in_one_process(monkeypatch, schedule):
    found_groups = []

    def lowered(*args, **kwargs):
        program = grouped(lower(*args, **kwargs))
        found_groups.extend(op for queue in program.ranks for op in queue if isinstance(op, Exchange))
        return program

    monkeypatch.setattr(programs, "lower", lowered)
    found = train("t5", dropout=DROPOUT, exact=True, max_leaf_share=0, **on_ranks(2, schedule))
    assert found_groups
    assert_same_bits(found, reference("t5"))


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
def test_one_last_bit_would_be_noticed(monkeypatch, name, where):
    match where:
        case "activation":
            nudge_a_parcel(monkeypatch, Payload.ACTIVATION)
        case "boundary gradient":
            nudge_a_parcel(monkeypatch, Payload.GRADIENT)
        case _:
            nudge_a_gradient(monkeypatch)
    found = train(name, dropout=DROPOUT, stages=2, exact=name in TIED)
    with pytest.raises(AssertionError):
        assert_same_bits(found, reference(name))
