"""Which address leads to the other ranks, as routes would say it; on real hosts in tests/test_hosts.py."""

import pytest

from evenflow.runtime import network
from evenflow.runtime.network import address_towards, interface_of


class Told:
    """A store at `host` in which ranks 1 and 2 have written; rank 0 has yet to."""

    def __init__(self, host, *told):
        self.host, self.values = host, {f"evenflow/address/{n}": each for n, each in enumerate(told, 1)}

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
    store = Told(host, *told)
    assert network._own_address(store, 0, 3) == address
    assert store.values["evenflow/address/0"] == (ROUTES[host] or "127.0.0.1")


def test_what_leads_nowhere_has_no_address():
    assert address_towards("no.such.host.invalid") is None


def test_an_address_that_no_interface_has():
    assert interface_of("192.0.2.77") is None
