"""One contract for every link: what is sent arrives, in order, whole, and lying as it lay."""

import contextlib
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import distributed as dist

from evenflow.cost.storages import Memory
from evenflow.errors import PeerError, ScheduleError
from evenflow.graph.nouns.tree import TensorInfo
from evenflow.ir.flow import Flow
from evenflow.ir.op import Payload, Recv, Send
from evenflow.ir.placement import Placement
from evenflow.launcher import launch
from evenflow.runtime.links import process_group
from evenflow.runtime.links.choose import link_for
from evenflow.runtime.links.layout import Layout
from evenflow.runtime.links.link import Link, Manifest, Parcel
from evenflow.runtime.links.local import LocalLink
from evenflow.runtime.links.process_group import RECEIVES_AHEAD, SENDS_AHEAD, ProcessGroupLink
from evenflow.runtime.links.ways import ways
from evenflow.runtime.ranks.world import ProcessGroupWorld
from rendezvous import Meeting

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Transfer:
    """One parcel from rank to rank, each of which runs the stage of its number."""

    source: int
    target: int
    microbatch: int
    parcel: Parcel
    taken_at_once: bool = True  # else when all transfers of the step are under way

    @property
    def payload(self) -> Payload:
        return Payload.ACTIVATION if self.source < self.target else Payload.GRADIENT

    @property
    def send(self) -> Send:
        return Send(self.source, self.target, self.microbatch, self.payload)

    @property
    def recv(self) -> Recv:
        return Recv(self.source, self.target, self.microbatch, self.payload)

    @property
    def manifest(self) -> Manifest:
        infos = tuple(
            TensorInfo((1,), (1,), torch.float32, True)
            if tensor is None
            else TensorInfo(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, False)
            for tensor in self.parcel
        )
        return Manifest((0, self.source, self.target, self.payload), infos, CPU)


Step = list[Transfer]  # in an order that needs no buffer


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(1.0, 1.0 + torch.Size(shape).numel()).view(shape)


def layouts() -> dict[str, torch.Tensor]:
    return {
        "plain": numbers(3, 4),
        "transposed": numbers(3, 4).t(),
        "permuted": numbers(2, 3, 4).permute(2, 0, 1),
        "expanded": numbers(3, 1).expand(3, 4),
        "expanded twice": numbers(3, 1).expand(2, 3, 4),
        "sliced with gaps": numbers(6, 8)[::2, 1::3],
        "sliced off": numbers(4, 6)[:, :2],
        "with an offset": numbers(9)[4:],
        "channels last": numbers(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "a scalar": torch.tensor(2.5),
        "nothing": torch.zeros(0, 3),
        "nothing, transposed": torch.zeros(4, 0).t(),
        "one element": numbers(1, 1, 1),
        "overlapping": numbers(5).unfold(0, 3, 1),
    }


DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
)


def of_type(dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([[0, 1, 2], [3, 0, 5]]).to(dtype)


def scenarios() -> dict[str, list[Step]]:
    """Steps of transfers between two ranks; each scenario is run on links that are new to it."""

    def at(microbatch: int) -> torch.Tensor:
        return numbers(2, 3) + 100 * microbatch

    found: dict[str, list[Step]] = {
        f"layout: {name}": [[Transfer(0, 1, 0, (tensor,)), Transfer(1, 0, 0, (tensor,))]]
        for name, tensor in layouts().items()
    }
    found |= {f"type: {dtype}": [[Transfer(0, 1, 0, (of_type(dtype),))]] for dtype in DTYPES}
    found["in order"] = [[Transfer(0, 1, i, (at(i),)) for i in range(6)]]
    found["several steps"] = [
        [Transfer(0, 1, i, (at(10 * step + i),)) for i in range(3)] for step in range(3)
    ]
    found["posted ahead"] = [[Transfer(0, 1, i, (at(i),), taken_at_once=False) for i in range(6)]]
    found["both ways"] = [
        [
            transfer
            for i in range(5)
            for transfer in (
                Transfer(0, 1, i, (at(i), at(i).t())),
                Transfer(1, 0, i, (at(-i),), taken_at_once=i % 2 == 0),
            )
        ]
        for _ in range(2)
    ]
    found["one after many"] = [
        [Transfer(0, 1, i, (at(i),), taken_at_once=False) for i in range(4)]
        + [Transfer(1, 0, i, (at(-i),)) for i in reversed(range(4))]
    ]
    found["many tensors"] = [[Transfer(0, 1, i, tuple(layouts().values())) for i in range(2)]]
    found["gradients that do not exist"] = [
        [Transfer(1, 0, i, (None, at(i), None)) for i in range(3)],
        [Transfer(1, 0, i, (None, at(i), None)) for i in range(3)],
    ]
    found["no gradient at all"] = [[Transfer(1, 0, i, (None, None)) for i in range(3)]]
    found["empty parcels"] = [[Transfer(0, 1, i, ()) for i in range(3)] + [Transfer(1, 0, 0, (at(0),))]]
    large = torch.arange(2.0**20)  # more than any socket holds
    found["large"] = [
        [Transfer(0, 1, 0, (large,)), Transfer(1, 0, 0, (-large,)), Transfer(0, 1, 1, (large + 1,))]
    ]
    return found


SCENARIOS = scenarios()


# -- three ways to run a scenario: each returns, for every step, what was received


Received = list[dict[Recv, Parcel]]


def run_rank(link: Link, rank: int, steps: list[Step]) -> Received:
    """One rank's part of a scenario, as an executor would run it."""
    received: Received = []
    for step in steps:
        arrived: dict[Recv, Parcel] = {}
        mine = [transfer for transfer in step if rank in (transfer.source, transfer.target)]
        link.start([(transfer.recv, transfer.manifest) for transfer in mine if transfer.target == rank])
        for transfer in mine:
            if transfer.source == rank:
                link.send(transfer.send, transfer.parcel, transfer.manifest)
            else:
                link.post(transfer.recv)
                if transfer.taken_at_once:
                    arrived[transfer.recv] = link.take(transfer.recv)
        for transfer in mine:
            if transfer.target == rank and not transfer.taken_at_once:
                arrived[transfer.recv] = link.take(transfer.recv)
        link.finish()
        received.append(arrived)
    return received


def run_locally(name: str) -> Received:
    link, received = LocalLink(), []
    for step in SCENARIOS[name]:
        arrived: dict[Recv, Parcel] = {}
        link.start([(transfer.recv, transfer.manifest) for transfer in step])
        for transfer in step:
            link.send(transfer.send, transfer.parcel, transfer.manifest)
            link.post(transfer.recv)
            if transfer.taken_at_once:
                arrived[transfer.recv] = link.take(transfer.recv)
        for transfer in step:
            if not transfer.taken_at_once:
                arrived[transfer.recv] = link.take(transfer.recv)
        link.finish()
        received.append(arrived)
    return received


def merged(ranks: list[Received]) -> Received:
    return [
        {op: parcel for part in parts for op, parcel in part.items()} for parts in zip(*ranks, strict=True)
    ]


def run_on_threads(*functions):
    """Call each function in a thread; their results, or the errors that they raised."""
    results = [None] * len(functions)

    def run(at: int) -> None:
        try:
            results[at] = functions[at]()
        except Exception as error:  # noqa: BLE001 (it is what the test looks at)
            results[at] = error

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def run_on_meeting(name: str) -> Received:
    meeting = Meeting(Placement.linear(2), timeout_seconds=30)
    steps = SCENARIOS[name]
    ranks = run_on_threads(
        lambda: run_rank(meeting.link(0), 0, steps), lambda: run_rank(meeting.link(1), 1, steps)
    )
    for outcome in ranks:
        if isinstance(outcome, Exception):
            raise outcome
    return merged(ranks)


def two_ways():
    return ways(Flow.chain(2), Placement.linear(2), 60.0, {}, [range(2)])


def process_links() -> dict[str, Callable[[], Link]]:
    """What makes a link between two processes, by its kind."""
    return {
        "process group": lambda: ProcessGroupLink(CPU, Placement.linear(2)),
        "process group, two ways": lambda: ProcessGroupLink(CPU, Placement.linear(2), ways=two_ways()),
        "shared memory": lambda: link_for(ProcessGroupWorld(CPU), CPU, Placement.linear(2)),
    }


def run_all_on_process() -> dict[str, Any]:
    """What each process of a pair does: every scenario, on a link of its own, and what comes below."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for kind, link in process_links().items():
        for name, steps in SCENARIOS.items():
            found[f"{kind}: {name}"] = run_rank(link(), dist.get_rank(), steps)
        for name, ranks in GROUPS.items():
            received = run_group_rank(link(), dist.get_rank(), ranks[dist.get_rank()])
            found[f"{kind}: group: {name}"] = received
    found["held"] = send_many()
    return found | {f"under way: {backend}": watch_receives(backend) for backend in ("gloo", "nccl")}


@cache
def results_of_processes() -> list[dict[str, Any]]:
    return launch(run_all_on_process, nproc=2)


def run_on_processes(kind: str, name: str) -> Received:
    return merged([results[f"{kind}: {name}"] for results in results_of_processes()])


RUNS = {
    "local": run_locally,
    "rendezvous": run_on_meeting,
    "process group": partial(run_on_processes, "process group"),
    "process group, two ways": partial(run_on_processes, "process group, two ways"),
    "shared memory": partial(run_on_processes, "shared memory"),
}


# -- groups: two ranks that stand in transfers both ways, in orders that would deadlock one after the other


def several(microbatches, source: int, target: int) -> list[Transfer]:
    return [Transfer(source, target, i, (numbers(2, 3) + 100 * i, None)) for i in microbatches]


THERE, BACK = several(range(3), 0, 1), several(range(2), 1, 0)
# A part of a rank's program: the transfers of one group, or a single one.
GROUPS: dict[str, tuple[list[list[Transfer]], list[list[Transfer]]]] = {
    "each sends first": ([[THERE[0], BACK[0]]], [[BACK[0], THERE[0]]]),
    "several each way": ([[*THERE, *BACK]], [[*BACK, *THERE]]),
    "each receives first": ([[*BACK, *THERE]], [[*THERE, *BACK]]),
    "a group on one side": ([[*THERE, *BACK]], [[BACK[0]], [THERE[0]], [THERE[1]], [BACK[1]], [THERE[2]]]),
    "groups of other sizes": ([THERE[:1], [*THERE[1:], *BACK]], [[*THERE[:2], *BACK], THERE[2:]]),
}


def run_group_rank(link: Link, rank: int, parts: list[list[Transfer]]) -> dict[Recv, Parcel]:
    """One rank's part, in which each group is an exchange, however small."""
    receives = [t for part in parts for t in part if t.target == rank]
    link.start([(t.recv, t.manifest) for t in receives])
    for part in parts:
        sends = [(t.send, t.parcel, t.manifest) for t in part if t.source == rank]
        link.exchange(sends, [t.recv for t in part if t.target == rank])
    arrived = {t.recv: link.take(t.recv) for t in receives}
    link.finish()
    return arrived


def groups_locally(name: str) -> list[dict[Recv, Parcel]]:
    """All ranks in one process, which take turns."""
    link, arrived = LocalLink(), {}
    link.start([])
    for rank, parts in enumerate(GROUPS[name]):
        for part in parts:
            sends = [(t.send, t.parcel, t.manifest) for t in part if t.source == rank]
            link.exchange(sends, [t.recv for t in part if t.target == rank])
    for rank, parts in enumerate(GROUPS[name]):
        arrived |= {t.recv: link.take(t.recv) for part in parts for t in part if t.target == rank}
    link.finish()
    return [arrived]


def groups_on_meeting(name: str) -> list[dict[Recv, Parcel]]:
    meeting = Meeting(Placement.linear(2), timeout_seconds=30)
    first, second = GROUPS[name]
    results = run_on_threads(
        lambda: run_group_rank(meeting.link(0), 0, first), lambda: run_group_rank(meeting.link(1), 1, second)
    )
    assert not [result for result in results if isinstance(result, Exception)], results
    return results


def groups_on_processes(kind: str, name: str) -> list[dict[Recv, Parcel]]:
    return [results[f"{kind}: group: {name}"] for results in results_of_processes()]


GROUP_RUNS = {
    "local": groups_locally,
    "rendezvous": groups_on_meeting,
    "process group": partial(groups_on_processes, "process group"),
    "process group, two ways": partial(groups_on_processes, "process group, two ways"),
    "shared memory": partial(groups_on_processes, "shared memory"),
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("link", GROUP_RUNS)
def test_groups_arrive_whole(link, name):
    arrived = {op: parcel for part in GROUP_RUNS[link](name) for op, parcel in part.items()}
    expected = {t.recv: t for parts in GROUPS[name] for part in parts for t in part}
    assert arrived.keys() == expected.keys()
    for recv, transfer in expected.items():
        (found, nothing), (sent, _) = arrived[recv], transfer.parcel
        assert nothing is None
        assert torch.equal(found, sent)


def test_a_group_that_is_not_met_says_what_is_left():
    meeting = Meeting(Placement.linear(3), timeout_seconds=0.2)
    results = run_on_threads(
        lambda: run_group_rank(meeting.link(0), 0, [[THERE[0], *several([0], 0, 2)]]),
        lambda: run_group_rank(meeting.link(1), 1, [[THERE[0]]]),
    )
    assert [type(result) for result in results] == [PeerError, dict]
    assert str(results[0]).startswith(
        "rank 0 in S0>2F0 (activations of microbatch 0, stage 0 to stage 2) wai"
    )


def test_a_group_in_another_order_is_mis_paired():
    meeting = Meeting(Placement.linear(2), timeout_seconds=30)
    results = run_on_threads(
        lambda: run_group_rank(meeting.link(0), 0, [[THERE[0], THERE[1]]]),
        lambda: run_group_rank(meeting.link(1), 1, [[THERE[1], THERE[0]]]),
    )
    assert [type(result) for result in results] == [ScheduleError, ScheduleError]
    assert {str(result) for result in results} == {"mis-pairing: S0>1F0 on rank 0 meets R0>1F1 on rank 1"}


def test_stages_live_where_the_placement_says():
    """Two stages a rank, the first ones on rank 1."""
    placement = Placement((1, 0, 0, 1))
    meeting = Meeting(placement, timeout_seconds=30)
    there, back = several([0], 0, 1)[0], several([0], 2, 3)[0]
    there_infos = [(there.recv, there.manifest)], [(back.recv, back.manifest)]

    def first():
        link = meeting.link(1)
        link.start(there_infos[1])
        link.send(there.send, there.parcel, there.manifest)
        link.post(back.recv)
        return link.take(back.recv)

    def second():
        link = meeting.link(0)
        link.start(there_infos[0])
        link.post(there.recv)
        link.send(back.send, back.parcel, back.manifest)
        return link.take(there.recv)

    found_back, found_there = run_on_threads(first, second)
    assert torch.equal(found_back[0], back.parcel[0])
    assert torch.equal(found_there[0], there.parcel[0])


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("link", RUNS)
def test_what_is_sent_arrives_as_it_was(link, name):
    received = RUNS[link](name)
    assert len(received) == len(SCENARIOS[name])
    for step, arrived in zip(SCENARIOS[name], received, strict=True):
        assert arrived.keys() == {transfer.recv for transfer in step}
        for transfer in step:
            for sent, found in zip(transfer.parcel, arrived[transfer.recv], strict=True):
                if sent is None:
                    assert found is None
                    continue
                assert torch.equal(found, sent)
                assert Layout.of(found) == Layout.of(sent)


def test_every_scenario_needs_no_buffer():
    """The rendezvous link runs them all, but a fault in the scenarios must not look like one of the links."""
    for steps in SCENARIOS.values():
        for step in steps:
            assert len({transfer.recv for transfer in step}) == len(step)


# -- the rendezvous link is the worst machine


def test_a_send_waits_for_its_receive():
    """Each rank would send first: with buffers this passes."""
    meeting = Meeting(Placement.linear(2), timeout_seconds=0.2)
    there, back = Transfer(0, 1, 0, (numbers(2),)), Transfer(1, 0, 0, (numbers(2),))
    first, second = run_on_threads(
        lambda: run_rank(meeting.link(0), 0, [[there, back]]),
        lambda: run_rank(meeting.link(1), 1, [[back, there]]),
    )
    errors = [error for error in (first, second) if isinstance(error, PeerError)]
    assert errors, "each waited for the other"
    texts = " | ".join(map(str, errors))
    assert "rank 0 in S0>1F0 (activations of microbatch 0, stage 0 to stage 1)" in texts or (
        "rank 1 in S1>0B0 (gradients of microbatch 0, stage 1 to stage 0)" in texts
    )
    assert "waited 0.2 s for rank" in texts


def test_one_that_waits_too_long_says_where_the_peer_stands():
    meeting = Meeting(Placement.linear(3), timeout_seconds=0.2)
    first = Transfer(0, 1, 3, (numbers(2),))
    other = Transfer(1, 2, 5, (numbers(2),))
    results = run_on_threads(
        lambda: run_rank(meeting.link(0), 0, [[first]]),
        lambda: run_rank(meeting.link(1), 1, [[other]]),
    )
    assert all(isinstance(result, PeerError) for result in results)
    texts = sorted(map(str, results))
    assert texts[0].startswith(
        "rank 0 in S0>1F3 (activations of microbatch 3, stage 0 to stage 1) waited 0.2 s for rank 1, which "
    )
    assert texts[1] == (
        "rank 1 in S1>2F5 (activations of microbatch 5, stage 1 to stage 2) waited 0.2 s for rank 2, "
        "which is in no transfer"
    )


def test_one_whose_peer_has_left_says_so_at_once():
    meeting = Meeting(Placement.linear(2), timeout_seconds=100)
    meeting.leave(1)
    started = time.monotonic()
    with pytest.raises(
        PeerError,
        match=r"^rank 0 in R1>0B2 \(gradients of microbatch 2, stage 1 to stage 0\) lost rank 1, which has l",
    ):
        run_rank(meeting.link(0), 0, [[Transfer(1, 0, 2, (numbers(2),))]])
    assert time.monotonic() - started < 50


def test_transfers_in_another_order_are_mis_paired_and_both_ranks_say_so():
    meeting = Meeting(Placement.linear(2), timeout_seconds=30)
    one, two = Transfer(0, 1, 0, (numbers(2),)), Transfer(0, 1, 1, (numbers(2),))
    results = run_on_threads(
        lambda: run_rank(meeting.link(0), 0, [[one, two]]), lambda: run_rank(meeting.link(1), 1, [[two, one]])
    )
    assert [type(result) for result in results] == [ScheduleError, ScheduleError]
    assert {str(result) for result in results} == {"mis-pairing: S0>1F0 on rank 0 meets R0>1F1 on rank 1"}


def test_a_parcel_is_the_receivers_own():
    """As over a wire: what the sender does to its tensor later is not seen."""
    meeting = Meeting(Placement.linear(2), timeout_seconds=30)
    transfer = Transfer(0, 1, 0, (numbers(2, 2).t(),))
    _, received = run_on_threads(
        lambda: run_rank(meeting.link(0), 0, [[transfer]]), lambda: run_rank(meeting.link(1), 1, [[transfer]])
    )
    transfer.parcel[0].zero_()
    assert torch.equal(received[0][transfer.recv][0], numbers(2, 2).t())


# -- a peer that dies


def send_many() -> list[int]:
    """How many of the tensors that were sent are still held, after each send and at the end."""
    rank, number = dist.get_rank(), 8
    link = ProcessGroupLink(CPU, Placement.linear(2))
    transfers = [Transfer(0, 1, microbatch, (numbers(1000),)) for microbatch in range(number)]
    if rank == 1:
        link.start([(each.recv, each.manifest) for each in transfers])
        for each in transfers:
            link.post(each.recv)
            link.take(each.recv)
        link.finish()
        return []
    link.start([])
    held, alive = [], []
    while transfers:
        each = transfers.pop(0)
        link.send(each.send, each.parcel, each.manifest)
        held.append(Memory(each.parcel[0]))
        del each
        alive.append(sum(memory.alive for memory in held))
    link.finish()
    return [*alive, sum(memory.alive for memory in held)]


def test_what_has_left_is_let_go_of():
    alive = results_of_processes()[0]["held"]
    assert max(alive) == SENDS_AHEAD
    assert alive[-1] == 0


def lose_a_peer(folder, kind: str, role: str) -> None:
    """Rank 1 dies; rank 0, which cannot be stopped meanwhile, writes down how it learns of it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    link = process_links()[kind]()
    there = [Transfer(0, 1, i, (numbers(4),)) for i in range(3)]
    back = [Transfer(1, 0, i, (numbers(4),)) for i in range(3)]
    run_rank(link, rank, [[there[0], back[0]]])
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with contextlib.suppress(RuntimeError):  # until the death is known here
        dist.recv(torch.empty(1), 1)
    step = back[1:] if role == "receives" else there[1:]
    try:
        run_rank(link, 0, [step])
    except Exception as error:  # noqa: BLE001 (any: the test looks at it)
        (folder / "error").write_bytes(pickle.dumps((type(error).__name__, str(error))))
    os._exit(0)  # to take apart a group whose other side is gone may wait for ever


@pytest.mark.parametrize("kind", ["process group", "shared memory"])
@pytest.mark.parametrize(("role", "op"), [("receives", "R1>0B1"), ("sends", "S0>1F1")])
def test_a_lost_peer_is_named_with_rank_and_op(tmp_path, kind, role, op):
    with pytest.raises(PeerError, match="rank 1 was killed by signal 9"):
        launch(lose_a_peer, tmp_path, kind, role, nproc=2)
    kind, text = pickle.loads((tmp_path / "error").read_bytes())
    assert kind == "PeerError"
    assert text.startswith(f"rank 0 lost rank 1 in {op} (microbatch 1): ")


# -- receives posted ahead of their place, and the groups that they use


def watch_receives(backend: str) -> list[tuple[int, bool]]:
    """Of each of three steps, how many receives rank 1 has under way at once, and whether on their way."""
    own, groups, irecv, found = two_ways(), [], dist.irecv, []
    there = [Transfer(0, 1, i, (numbers(4),)) for i in range(6)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_group, "backend_of", lambda _: backend)
        patch.setattr(dist, "irecv", lambda *args, group: groups.append(group) or irecv(*args, group=group))
        link = ProcessGroupLink(CPU, Placement.linear(2), ways=own)
        for _ in range(3):
            groups.clear()
            if dist.get_rank() == 0:
                run_rank(link, 0, [there])
                continue
            link.start([(each.recv, each.manifest) for each in there])
            number = len(groups)
            for each in there:
                link.post(each.recv)
                link.take(each.recv)
            link.finish()
            found.append((number, all(group is own[0, 1] for group in groups)))
    return found


@pytest.mark.parametrize(("backend", "ahead"), [("gloo", RECEIVES_AHEAD), ("nccl", 0)])
def test_receives_are_posted_ahead_on_gloo_alone_each_on_its_way(backend, ahead):
    # In the first step no layout is known.
    assert results_of_processes()[1][f"under way: {backend}"] == [(0, True), (ahead, True), (ahead, True)]
