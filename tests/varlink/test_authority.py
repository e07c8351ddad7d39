# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import socket
import struct

import pytest

from ksmd_ctl.daemon.varlink_socket import Authority, Peer, group_number, peer_of
from ksmd_ctl.errors import UsageError


def test_the_peer_of_a_socket_of_ours() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        found = peer_of(ours.getsockopt)
    assert (found.pid, found.uid) == (os.getpid(), os.geteuid())
    assert found.groups == {os.getegid(), *os.getgroups()}


def test_supplementary_groups_are_read() -> None:
    def getsockopt(level: int, option: int, size: int) -> bytes:
        return struct.pack("iII", 1, 1000, 1000) if option == socket.SO_PEERCRED else struct.pack("3I", 4, 27, 1000)

    assert peer_of(getsockopt) == Peer(1, 1000, frozenset({4, 27, 1000}))


def test_more_groups_than_can_be_asked_for_are_none() -> None:
    def getsockopt(level: int, option: int, size: int) -> bytes:
        if option == socket.SO_PEERCRED:
            return struct.pack("iII", 1, 1000, 1000)
        raise OSError("ERANGE")

    assert peer_of(getsockopt) == Peer(1, 1000, frozenset({1000}))


@pytest.mark.parametrize(
    ("uid", "groups", "group", "may"),
    [
        (0, {0}, None, True),
        (990, {990}, None, True),
        (1000, {1000}, None, False),
        (1000, {1000, 55}, None, False),
        (1000, {1000, 55}, 55, True),
        (1000, {1000}, 55, False),
        (1000, {0}, 55, False),
    ],
)
def test_who_may_change_something(uid: int, groups: set[int], group: int | None, may: bool) -> None:
    assert Authority(group, own_uid=990).may_change(Peer(1, uid, frozenset(groups))) is may


def test_groups_by_name() -> None:
    assert group_number("root") == 0
    with pytest.raises(UsageError, match="no such group"):
        group_number("no-group-of-this-name")
