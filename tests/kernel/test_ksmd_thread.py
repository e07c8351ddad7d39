# SPDX-License-Identifier: GPL-2.0-or-later
"""How ksmd is scheduled: read and set on this host's ksmd, and refusals on a fake one."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.errors import Absent, Denied, Rejected, Unparsable
from ksmd_ctl.host.knobs import KSMD_KNOBS, Knob, KnobValue
from ksmd_ctl.host.sample import Reading
from ksmd_ctl.kernel.ksmd_thread import FIELDS, KsmdThread, parse_ksmd_stat
from tests.fakes.ksmfs import FakeKsmFs

TICKS = os.sysconf("SC_CLK_TCK")
CPU = "sys/devices/system/cpu"


@pytest.fixture
def fake(tmp_path: Path) -> FakeKsmFs:
    fake = FakeKsmFs(tmp_path)
    fake.write(tmp_path / CPU / "possible", "0-3\n")
    return fake


def sample(thread: KsmdThread) -> dict[str, Reading]:
    readings: dict[str, Reading] = {}
    thread.sample(readings)
    assert set(readings) == set(FIELDS)
    return readings


def test_everything_is_found(fake: FakeKsmFs) -> None:
    fake.add_process(
        37, "ksmd", parent=2, user_ticks=1, system_ticks=9, cpus="0,2-3", policy=os.SCHED_IDLE, waited_ns=2_500_000_000
    )
    with KsmdThread(fake.root) as thread:
        assert sample(thread) == {
            "ksmd_cpu_seconds": 10 / TICKS,
            "ksmd_wait_seconds": 2.5,
            "ksmd_cpus": "0,2-3",
            "ksmd_scheduling": "idle",
            "ksmd_nice": 5,
        }
        fake.add_process(37, "ksmd", parent=2, system_ticks=251, cpus="1", policy=os.SCHED_BATCH)
        assert sample(thread)["ksmd_cpu_seconds"] == 251 / TICKS
        assert [thread.read(knob) for knob in KSMD_KNOBS] == ["1", "batch", 5]


def test_ksmd_that_is_not_to_be_seen_is_absent(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path, ksmd_pid=None)
    with KsmdThread(fake.root) as thread:
        for _ in range(2):
            assert {type(reading) for reading in sample(thread).values()} == {Absent}
        for knob in KSMD_KNOBS:
            with pytest.raises(Absent):
                thread.write(knob, "0")


def test_a_pid_that_is_no_longer_ksmd_is_looked_for_anew(fake: FakeKsmFs) -> None:
    with KsmdThread(fake.root) as thread:
        assert sample(thread)["ksmd_cpu_seconds"] == 250 / TICKS
        fake.add_process(37, "bash", command=["bash"])
        fake.ksmd(99, system_ticks=300)
        assert {type(reading) for reading in sample(thread).values()} == {Unparsable}
        assert sample(thread)["ksmd_cpu_seconds"] == 300 / TICKS


@pytest.mark.parametrize(("text", "kind"), [(None, Absent), ("", Unparsable), ("7 x 1", Unparsable)])
def test_a_kernel_without_schedstat_lacks_only_the_wait(fake: FakeKsmFs, text: str | None, kind: type) -> None:
    schedstat = fake.proc / "37/schedstat"
    schedstat.unlink() if text is None else fake.write(schedstat, text)
    with KsmdThread(fake.root) as thread:
        readings = sample(thread)
    assert type(readings["ksmd_wait_seconds"]) is kind
    assert readings["ksmd_cpu_seconds"] == 250 / TICKS


def test_a_real_time_class_is_told_and_left_alone(fake: FakeKsmFs) -> None:
    fake.add_process(37, "ksmd", parent=2, policy=os.SCHED_FIFO)
    with KsmdThread(fake.root) as thread:
        readings = sample(thread)
        assert type(readings["ksmd_scheduling"]) is Unparsable
        assert readings["ksmd_nice"] == 5
        with pytest.raises(Unparsable, match="real-time"):
            thread.write(Knob.KSMD_SCHEDULING, "idle")


@pytest.mark.parametrize("text", ["", "0-", "?"])
def test_a_list_of_cpus_that_cannot_be_understood(fake: FakeKsmFs, text: str) -> None:
    fake.write(fake.proc / "37/status", f"Name:\tksmd\nCpus_allowed_list:\t{text}\n" if text else "Name:\tksmd\n")
    with KsmdThread(fake.root) as thread:
        readings = sample(thread)
    assert type(readings["ksmd_cpus"]) is (Unparsable if text else Absent)
    assert readings["ksmd_nice"] == 5


@given(st.binary(max_size=200))
def test_any_stat_gives_seconds_or_a_valueerror(data: bytes) -> None:
    for text in (data, b"37 (ksmd) " + data):
        try:
            assert float(parse_ksmd_stat(text)["ksmd_cpu_seconds"]) >= 0
        except ValueError:
            pass


# -- what can't be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cpus", "missing"), [("7", "7"), ("0-5", "4-5"), ("3,9,11", "9,11")])
def test_cpus_that_do_not_exist(fake: FakeKsmFs, cpus: str, missing: str) -> None:
    # The kernel drops them without a word where one of the others exists.
    calls: list[tuple[int, Knob, KnobValue]] = []
    thread = KsmdThread(fake.root, lambda *call: calls.append(call))
    with pytest.raises(Rejected, match=f"this host has no CPU {missing}: it can have 0-3") as caught:
        thread.write(Knob.KSMD_CPUS, cpus)
    thread.close()
    assert caught.value.errno == errno.EINVAL
    assert calls == []


@pytest.mark.parametrize(
    ("number", "flags", "kind", "said"),
    [
        (errno.EPERM, 0x200040, Denied, "EPERM"),
        (errno.EINVAL, 0x200040, Rejected, "they are offline, or a cpuset leaves them out"),
        (errno.EINVAL, 0x4200040, Rejected, "PF_NO_SETAFFINITY"),
        (errno.ESRCH, 0x200040, Rejected, "ESRCH"),
    ],
)
def test_what_the_kernel_refuses(
    fake: FakeKsmFs, number: int, flags: int, kind: type[Rejected | Denied], said: str
) -> None:
    def refuse(pid: int, knob: Knob, value: KnobValue) -> None:
        raise OSError(number, os.strerror(number))

    stat = (fake.proc / "37/stat").read_text()
    fake.write(fake.proc / "37/stat", stat.replace(" 2097216 ", f" {flags} "))
    with KsmdThread(fake.root, refuse) as thread, pytest.raises(kind, match=said) as caught:
        thread.write(Knob.KSMD_CPUS, "2")
    assert caught.value.errno == number
    assert caught.value.what == "setting ksmd_cpus to 2"


def test_what_the_kernel_takes_otherwise(fake: FakeKsmFs) -> None:
    def cut(pid: int, knob: Knob, value: KnobValue) -> None:
        fake.add_process(pid, "ksmd", parent=2, cpus="2")

    with KsmdThread(fake.root, cut) as thread:
        assert thread.write(Knob.KSMD_CPUS, "0,1") == "0-1"
        with pytest.raises(Rejected, match="it reads 2 afterwards"):
            thread.write(Knob.KSMD_CPUS, "2-3")


@pytest.mark.parametrize(
    ("knob", "value"), [(Knob.KSMD_NICE, 20), (Knob.KSMD_SCHEDULING, "fifo"), (Knob.KSMD_CPUS, "")]
)
def test_values_that_are_none(fake: FakeKsmFs, knob: Knob, value: KnobValue) -> None:
    with KsmdThread(fake.root, lambda *_: None) as thread, pytest.raises(Rejected):
        thread.write(knob, value)


def test_a_fake_tree_never_reaches_this_machine(fake: FakeKsmFs) -> None:
    # A process of this machine may have the pid that ksmd has in the tree.
    with KsmdThread(fake.root) as thread, pytest.raises(Denied, match="is not this machine's root"):
        thread.write(Knob.KSMD_NICE, 7)


# -- this host's ksmd ------------------------------------------------------------------------------------------


@pytest.fixture
def thread(ksm_host: Path) -> Iterator[KsmdThread]:
    with KsmdThread() as thread:
        yield thread


def test_this_hosts_ksmd_is_set_and_set_back(thread: KsmdThread) -> None:
    before = {knob: thread.read(knob) for knob in KSMD_KNOBS}
    assert before[Knob.KSMD_SCHEDULING] == "other"
    cpu = str(min(os.sched_getaffinity(0)))
    wanted = {Knob.KSMD_CPUS: cpu, Knob.KSMD_SCHEDULING: "idle", Knob.KSMD_NICE: 12}
    for knob, value in wanted.items():
        assert thread.write(knob, value) == value
    assert {knob: thread.read(knob) for knob in KSMD_KNOBS} == wanted
    for knob, value in before.items():
        assert thread.write(knob, value) == value
    assert {knob: thread.read(knob) for knob in KSMD_KNOBS} == before


def test_this_host_refuses_a_cpu_that_it_does_not_have(thread: KsmdThread) -> None:
    before = thread.read(Knob.KSMD_CPUS)
    with pytest.raises(Rejected, match="this host has no CPU 8000"):
        thread.write(Knob.KSMD_CPUS, "8000")
    assert thread.read(Knob.KSMD_CPUS) == before
