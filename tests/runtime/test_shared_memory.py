"""What links through shared memory do beyond the contract of `test_links`."""

import errno
import mmap
import os
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from evenflow.errors import ConfigError, PeerError, ScheduleError
from evenflow.graph.nouns.tree import TensorInfo
from evenflow.ir.op import Payload, Recv, Send
from evenflow.ir.placement import Placement
from evenflow.launcher import launch
from evenflow.runtime.links import choose, neighbours, shared_memory, slots
from evenflow.runtime.links.by_rank import LinkByRank
from evenflow.runtime.links.choose import link_for
from evenflow.runtime.links.link import Manifest
from evenflow.runtime.links.process_group import ProcessGroupLink
from evenflow.runtime.links.shared_memory import SharedMemoryLink
from evenflow.runtime.ranks.world import ProcessGroupWorld

CPU = torch.device("cpu")


def _end(rank: int, end: socket.socket) -> SharedMemoryLink:
    return SharedMemoryLink(Placement.linear(2), rank, {1 - rank: end}, timeout_seconds=20.0)


def pair() -> tuple[SharedMemoryLink, SharedMemoryLink]:
    """Both ends, in this process."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return tuple(_end(rank, ends[rank]) for rank in (0, 1))


def manifest(source: int, target: int) -> Manifest:
    return Manifest((source, target), (TensorInfo((1,), (1,), torch.float32, False),), CPU)


def give(link, microbatch: int, *tensors: torch.Tensor, source: int = 0, target: int = 1) -> None:
    link.send(Send(source, target, microbatch, Payload.ACTIVATION), tensors, manifest(source, target))


def receives(number: int) -> list[tuple[Recv, Manifest]]:
    return [(Recv(0, 1, microbatch, Payload.ACTIVATION), manifest(0, 1)) for microbatch in range(number)]


def get(link, microbatch: int):
    op = Recv(0, 1, microbatch, Payload.ACTIVATION)
    link.post(op)
    return link.take(op)


@pytest.fixture
def files(monkeypatch):
    """The sizes of the files of slots that are made."""
    made, truncate = [], os.ftruncate

    def noted(file, size):
        made.extend([size] * (size > mmap.PAGESIZE))
        truncate(file, size)

    monkeypatch.setattr(os, "ftruncate", noted)
    return made


def test_what_somebody_holds_is_never_written_to_again():
    here, there = pair()
    there.start(receives(5))
    taken = []
    for microbatch in range(5):
        give(here, microbatch, torch.full((1000,), float(microbatch)))
        taken.append(get(there, microbatch)[0])
    assert [tensor.unique().tolist() for tensor in taken] == [[0.0], [1.0], [2.0], [3.0], [4.0]]


def test_a_slot_is_used_again_when_the_last_of_its_tensors_is_gone(files):
    here, there = pair()
    made = 0
    for step in range(4):
        here.start([])
        there.start(receives(3))
        kept = None
        for microbatch in range(3):
            give(here, microbatch, torch.ones(1000), torch.full((10,), float(microbatch)))
            first, second = get(there, microbatch)
            kept = kept if microbatch else second.view(2, 5)[1]  # of the first, a view of one
            del first, second
        here.finish(), there.finish()
        assert kept.tolist() == [0.0] * 5, "while that is held, nothing else is written there"
        assert step == 0 or len(files) == made, "later steps make none"
        made = len(files)
    assert made <= 3


def test_parcels_of_other_sizes_share_slots(files):
    here, there = pair()
    for number in range(1025, 2048, 50):
        there.start(receives(1))
        give(here, 0, torch.ones(number))
        assert get(there, 0)[0].sum() == number
        there.finish()
    assert len(files) <= 2


def test_a_sender_runs_only_so_far_ahead_of_the_program_of_its_receiver(monkeypatch):
    here, there = pair()
    there.start(receives(100))
    sent = []

    def send_on():
        while len(sent) < 100:
            give(here, len(sent), torch.full((10,), float(len(sent))))
            sent.append(len(sent))

    with monkeypatch.context() as patch:
        patch.setattr(here, "_timeout_seconds", 0.0)
        with pytest.raises(PeerError, match=r"^rank 0 lost rank 1 in S0>1F16 .*: waited 0 s$"):
            send_on()
    thread = threading.Thread(target=send_on)
    thread.start()
    assert [int(get(there, microbatch)[0][0]) for microbatch in range(100)] == list(range(100))
    thread.join()


def test_a_receiver_that_lets_go_of_much_at_once_waits_for_nobody():
    """More slots than a socket holds messages; the sender reads none of them before its next step."""
    here, there = pair()
    for _ in range(2):
        here.start([])
        there.start(receives(1000))
        taken = []
        for microbatch in range(1000):
            give(here, microbatch, torch.full((1,), float(microbatch)))
            taken.append(get(there, microbatch)[0])
        assert [int(tensor) for tensor in taken] == list(range(1000))
        del taken
        there.finish()
        here.finish()


def test_what_a_socket_has_no_room_for_is_told_later():
    here, there = pair()
    there.start(receives(3000))
    for op, _ in receives(3000):  # 375 times eight, that nobody reads
        there.post(op)
    for microbatch in range(3000):
        give(here, microbatch, torch.full((1,), float(microbatch)))
        op = Recv(0, 1, microbatch, Payload.ACTIVATION)
        assert int(there.take(op)[0]) == microbatch


def test_a_parcel_in_another_place_than_the_programs_is_refused():
    here, there = pair()
    there.start(receives(2)[::-1])
    give(here, 0, torch.ones(1))
    with pytest.raises(ScheduleError, match="mis-pairing: rank 0 sent for R0>1F0, and rank 1 expects R0>1F1"):
        get(there, 1)


def test_what_was_sent_can_be_taken_when_the_sender_has_ended():
    here, there = pair()
    there.start(receives(20))
    for microbatch in range(10):
        give(here, microbatch, torch.full((10,), float(microbatch)))
    for op, _ in receives(20):
        there.post(op)  # tells `here`, which never reads it
    del here
    taken = [there.take(op)[0][0].item() for op, _ in receives(10)]
    assert taken == list(range(10))
    with pytest.raises(PeerError, match=r"^rank 1 lost rank 0 in R0>1F10 \(microbatch 10\): "):
        there.take(receives(11)[10][0])


def test_each_parcel_has_its_own_layout_in_whatever_order_they_are_taken():
    here, there = pair()
    there.start(receives(4))
    sent = [torch.ones(2, 3), torch.ones(2, 3), torch.ones(3, 2).t(), torch.ones(3, 2).t()]
    for microbatch, tensor in enumerate(sent):
        give(here, microbatch, tensor)
    for microbatch in reversed(range(4)):
        assert get(there, microbatch)[0].stride() == sent[microbatch].stride()


def test_nothing_is_left_of_a_link():
    def round_trip():
        here, there = pair()
        there.start(receives(3))
        for microbatch in range(3):
            give(here, microbatch, torch.ones(1000))
        held = [get(there, microbatch) for microbatch in range(3)]
        return held[0][0].sum()

    def left() -> tuple[int, int]:
        process = Path("/proc/self")
        return len([*(process / "fd").iterdir()]), (process / "maps").read_text().count("memfd:evenflow")

    before = left()
    round_trip()
    assert left() == before


def test_running_out_of_files_is_no_lost_peer(monkeypatch):
    here, _ = pair()

    def out_of_files(_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", out_of_files)
    with pytest.raises(ConfigError, match="ulimit -n"):
        give(here, 0, torch.ones(1))


def test_more_tensors_than_a_message_holds_are_refused_by_name():
    here, _ = pair()
    with pytest.raises(ConfigError, match="stage 0 hands 20000 tensors at once to stage 1"):
        give(here, 0, *[torch.ones(1)] * 20000)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_slot_is_filled_in_any_mode_after_any_other(mode):
    here, there = pair()
    there.start(receives(3))
    weight = torch.ones(4, requires_grad=True)
    with mode():
        give(here, 0, torch.full((4,), 1.0))
    assert get(there, 0)[0].tolist() == [1.0] * 4
    for microbatch in (1, 2):
        give(here, microbatch, weight * microbatch)
        with mode():
            taken = get(there, microbatch)[0]
            assert taken.tolist() == [microbatch] * 4
            assert not taken.requires_grad
            del taken


def test_a_parcel_that_could_not_be_sent_is_not_taken_for_told(monkeypatch):
    here, there = pair()
    there.start(receives(1))

    def out_of_files(_):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", out_of_files)
        with pytest.raises(ConfigError, match="ulimit -n"):
            give(here, 0, torch.ones(3, 5))
    give(here, 0, torch.ones(3, 5))
    assert get(there, 0)[0].shape == (3, 5)


def test_a_child_process_frees_no_slot_of_its_parent():
    here, there = pair()
    there.start(receives(2))
    give(here, 0, torch.full((4,), 1.0))
    held = list(get(there, 0))
    child = os.fork()
    if not child:
        held.clear()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    give(here, 1, torch.full((4,), 2.0))
    assert held[0].tolist() == [1.0] * 4


def three(timeout_seconds: float) -> tuple[SharedMemoryLink, ...]:
    """Ranks 0, 1 and 2, of which the middle one has a connection with each of the others."""
    ends = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    sockets = ({1: ends[0][0]}, {0: ends[0][1], 2: ends[1][0]}, {1: ends[1][1]})
    return tuple(
        SharedMemoryLink(Placement.linear(3), rank, own, timeout_seconds=timeout_seconds)
        for rank, own in enumerate(sockets)
    )


def test_who_waits_for_one_rank_reads_what_others_send():
    first, middle, last = three(timeout_seconds=20.0)
    number = 1000  # more messages than a socket has room for
    expected = [(Recv(0, 1, at, Payload.ACTIVATION), manifest(0, 1)) for at in range(number)]
    back = Recv(2, 1, 0, Payload.GRADIENT)
    middle.start([*expected, (back, manifest(2, 1))])
    for op, _ in expected:
        middle.post(op)

    def send_all():
        for at in range(number):
            give(first, at, torch.full((1,), float(at)))
        last.send(Send(2, 1, 0, Payload.GRADIENT), (torch.ones(1),), manifest(2, 1))

    thread = threading.Thread(target=send_all)
    thread.start()
    assert middle.take(back)[0].item() == 1.0
    thread.join()
    assert [int(middle.take(op)[0]) for op, _ in expected] == list(range(number))


def test_what_was_read_while_another_rank_was_read_is_not_waited_for():
    first, middle, last = three(timeout_seconds=3.0)
    back = Recv(2, 1, 0, Payload.GRADIENT)
    middle.start([(back, manifest(2, 1))])

    def send_in_parts():
        """Half of what tells of a new file; a whole parcel from the other rank; the other half."""
        peer = first._peers[1]
        time.sleep(0.2)
        first._tell(peer, shared_memory._NEW_FILE + shared_memory._BYTES.pack(4096))
        time.sleep(0.2)
        last.send(Send(2, 1, 0, Payload.GRADIENT), (torch.ones(1),), manifest(2, 1))
        time.sleep(0.2)
        file = slots.memory_file(17 * 4096)
        first._tell(peer, b"file", file)
        os.close(file)

    thread = threading.Thread(target=send_in_parts)
    thread.start()
    assert middle.take(back)[0].item() == 1.0
    thread.join()


def test_files_that_two_ranks_send_in_parts_at_once_are_not_mixed_up():
    first, middle, last = three(timeout_seconds=3.0)
    back, there = Recv(2, 1, 0, Payload.GRADIENT), Recv(0, 1, 0, Payload.ACTIVATION)
    middle.start([(there, manifest(0, 1)), (back, manifest(2, 1))])

    def send_in_parts():
        for link in (first, last):
            time.sleep(0.1)
            link._tell(link._peers[1], shared_memory._NEW_FILE + shared_memory._BYTES.pack(4096))
        for link in (first, last):
            time.sleep(0.1)
            file = slots.memory_file(17 * 4096)
            link._tell(link._peers[1], b"file", file)
            link._peers[1].own += slots.slots_in(file, 4096)
            os.close(file)
        give(first, 0, torch.full((1,), 5.0))
        last.send(Send(2, 1, 0, Payload.GRADIENT), (torch.ones(1),), manifest(2, 1))

    thread = threading.Thread(target=send_in_parts)
    thread.start()
    assert middle.take(there)[0].item() == 5.0
    assert middle.take(back)[0].item() == 1.0
    thread.join()


# -- which link joins which ranks


def refuse(*_):
    raise PermissionError("no memory files here")


RINGS = {
    (None, None): [SharedMemoryLink] * 3,
    (2, None): [LinkByRank, LinkByRank, ProcessGroupLink],
    (None, 1): [ProcessGroupLink] * 3,
}


def rings() -> list[tuple[str, float]]:
    """What `ring` finds, in each of the cases."""
    dist.init_process_group("gloo")
    return [ring(*case) for case in RINGS]


def ring(elsewhere: int | None, lacking: int | None) -> tuple[str, float]:
    """Each of three ranks hands its number to the next; one is on another host, or cannot make slots."""
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        if rank == elsewhere:
            patch.setattr(neighbours, "this_host", lambda: "elsewhere")
        if rank == lacking:
            patch.setattr(os, "memfd_create", refuse)
        link = link_for(ProcessGroupWorld(CPU), CPU, Placement((0, 1, 2, 0)))
    op = Recv(rank - 1 if rank else 2, rank or 3, 0, Payload.ACTIVATION)
    found = []
    for _ in range(2):
        link.start([(op, manifest(op.source, op.target))])
        give(link, 0, torch.tensor([float(rank)]), source=rank, target=rank + 1)
        link.post(op)
        found.append(float(link.take(op)[0]))
        link.finish()
    assert found[0] == found[1]
    return type(link).__name__, found[0]


def test_ranks_of_one_host_share_memory_and_others_do_not():
    for found, kinds in zip(zip(*launch(rings, nproc=3), strict=True), RINGS.values(), strict=True):
        names = [kind.__name__ for kind in kinds]
        assert list(found) == list(zip(names, (2.0, 0.0, 1.0), strict=True))


CHOICES = {
    ("auto", None): ("SharedMemoryLink", "over shared memory"),
    ("auto", 1): ("ProcessGroupLink", "over torch.distributed"),
    ("shared-memory", None): ("SharedMemoryLink", "over shared memory"),
    ("shared-memory", 1): ("link='shared-memory' needs all ranks on the CPUs of one host", ""),
    ("torch", None): ("ProcessGroupLink", "over torch.distributed"),
}


def all_chosen() -> list[tuple[str, str]]:
    """What `chosen` finds, in each of the cases."""
    dist.init_process_group("gloo")
    return [chosen(*case) for case in CHOICES]


def chosen(choice: str, elsewhere: int | None) -> tuple[str, str]:
    """The kind of link that a choice gives, or what is said against it; and what the log names."""
    noted = []
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == elsewhere:
            patch.setattr(neighbours, "this_host", lambda: "elsewhere")
        patch.setattr(choose._LOG, "info", lambda text, *args: noted.append(text % args))
        try:
            found = type(link_for(ProcessGroupWorld(CPU), CPU, Placement.linear(2), choice)).__name__
        except ConfigError as error:
            found = str(error)
    return found, " ".join(noted)


def test_a_link_can_be_asked_for_and_the_log_names_it():
    ranks = zip(*launch(all_chosen, nproc=2), strict=True)
    for case, (first, second), (kind, said) in zip(CHOICES, ranks, CHOICES.values(), strict=True):
        assert first[0].startswith(kind), case
        assert second[0].startswith(kind), case
        assert said in first[1], case
        assert not second[1], "one rank tells"
