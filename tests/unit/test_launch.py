"""Whether a cluster's address is worth connecting to: known within seconds."""

from __future__ import annotations

import socket
import time

import pytest

from actors.launch import check_address, connect, open_to_others
from actors.plan import PlacementError


def test_addresses_without_a_host_and_those_that_answer():
    check_address("auto")
    check_address("local")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"localhost:{port}", f"ray://127.0.0.1:{port}"):
            check_address(address)


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}"])
def test_nobody_listens(form):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = form.format(closed.getsockname()[1])
        with pytest.raises(
            PlacementError, match=r"RAY_ADDRESS: got .* expected host:port of a running cluster"
        ) as error:
            check_address(address)
    assert repr(address) in str(error.value)
    assert "unset RAY_ADDRESS" in str(error.value)


@pytest.mark.parametrize("address", ["127.0.0.1", "host", "host:port", ":6379", "http://127.0.0.1:8265", "a..b:1"])
def test_what_is_no_address(address):
    with pytest.raises(PlacementError, match="RAY_ADDRESS: got"):
        check_address(address)


def test_a_host_that_stays_silent_is_given_up_on():
    """A queue of connections that nobody takes is full after a few: the next one hangs."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        try:
            for one in waiting:
                one.setblocking(False)
                one.connect_ex(silent.getsockname())
            began = time.monotonic()
            with pytest.raises(PlacementError, match=r"no answer within 3 s|timed out"):
                check_address(f"127.0.0.1:{silent.getsockname()[1]}")
            assert time.monotonic() - began < 8
        finally:
            for one in waiting:
                one.close()


def test_connecting_asks_first(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(PlacementError, match="refused"):
            connect()


@pytest.mark.parametrize("mode", [None, "disabled"])
def test_a_cluster_that_others_reach_without_a_token_is_named(monkeypatch, mode):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    for address in ("10.0.0.1:6379", "head.example.com:6379", "[2001:db8::1]:6379", "0.0.0.0:6379"):
        warning = open_to_others(address)
        assert warning is not None
        assert address in warning
        assert "RAY_AUTH_MODE=token" in warning
    for address in ("127.0.0.1:6379", "127.8.0.1:6379", "[::1]:6379", "localhost:6379"):
        assert open_to_others(address) is None
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert open_to_others("10.0.0.1:6379") is None
