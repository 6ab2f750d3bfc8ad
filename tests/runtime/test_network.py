"""Which address leads to the other ranks, as routes would say it; on real hosts in tests/test_hosts.py."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from evenflow.errors import PeerError
from evenflow.runtime.ranks import network
from evenflow.runtime.ranks.network import address_towards, interface_of


class Told:
    """A store in which ranks 1 and 2 have written; rank 0 has yet to."""

    def __init__(self, *told):
        self.values = {f"address {n}": each for n, each in enumerate(told, 1)}

    def set(self, key, value):
        self.values[key] = value

    def multi_get(self, keys):
        return [self.values[key].encode() for key in keys]


ROUTES = {"first": "127.0.1.1", "10.0.0.2": "10.0.0.1", "10.0.0.1": "10.0.0.1", "nowhere": None}


@pytest.mark.parametrize(
    ("host", "told", "address"),
    [
        ("first", ["127.0.0.1", "127.0.0.1"], "127.0.1.1"),  # all on this host
        ("first", ["127.0.1.1", "10.0.0.2"], "10.0.0.1"),  # rank 1 is on this host, rank 2 is not
        ("10.0.0.1", ["10.0.0.1", "10.0.0.2"], "10.0.0.1"),
        ("nowhere", ["127.0.0.1", "10.0.0.2"], "10.0.0.1"),
    ],
)
def test_the_address_leads_to_other_hosts_where_there_are_any(monkeypatch, host, told, address):
    monkeypatch.setattr(network, "address_towards", ROUTES.__getitem__)
    store = Told(*told)
    assert network._own_address(host, store, 0, 3) == address
    assert store.values["address 0"] == (ROUTES[host] or "127.0.0.1")


def test_what_leads_nowhere_has_no_address():
    assert address_towards("no.such.host.invalid") is None


def test_an_address_that_no_interface_has():
    assert interface_of("192.0.2.77") is None


def test_attempts_in_one_store_have_numbers_of_their_own():
    """With what ranks of an earlier attempt, that are gone, have asked and told."""
    first = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [first, *(TCPStore("127.0.0.1", first.port, is_master=False) for _ in range(2))]
    first.set("evenflow asks 1", "asked by nobody who lives")
    numbers, wait = [], timedelta(seconds=20)
    with ThreadPoolExecutor(3) as ranks:
        for size in (3, 2, 3):
            found = ranks.map(
                lambda rank, of=size: network.attempt_of(stores[rank], rank, of, wait), range(size)
            )
            numbers.append(set(found))
    assert [len(each) for each in numbers] == [1, 1, 1]
    assert len(set.union(*numbers)) == 3
    with pytest.raises(PeerError, match="1 of 2 have"):
        network.attempt_of(first, 0, 2, timedelta(seconds=0.05))
