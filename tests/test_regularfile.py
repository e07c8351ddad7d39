# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading a file in a place where somebody else may have put anything."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ksmd_ctl.regularfile import read_regular


def test_the_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"", b"x" * 10, os.urandom(10)):
        path.write_bytes(content)
        assert read_regular(path, 10) == content


def test_what_is_too_long_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    # A sparse file: to read it all would take that much memory.
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match="is longer than 10 bytes"):
        read_regular(path, 10)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
    for name in ("fifo", "folder", "device", "socket"):
        with pytest.raises(ValueError, match="is not a regular file"):
            read_regular(tmp_path / name, 10, follow=True)


def test_links_are_followed_only_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link", 10, follow=True) == b"content"
    with pytest.raises(ValueError, match="is a symbolic link"):
        read_regular(tmp_path / "link", 10)


def test_a_file_can_be_masked(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/null")
    assert read_regular(tmp_path / "link", 10, follow=True) == b""
