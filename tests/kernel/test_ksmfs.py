# SPDX-License-Identifier: GPL-2.0-or-later
"""/sys/kernel/mm/ksm: each file, each way in which one can't be had, each errno of a write."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.errors import Absent, Denied, ExitCode, ReadError, Rejected, Unparsable, Unreadable
from ksmd_ctl.host.fields import FIELDS, FIELDS_BY_NAME, Source
from ksmd_ctl.host.knobs import KNOBS, SYSFS_KNOBS, Knob, same_value, write_error
from ksmd_ctl.host.sample import Reading
from ksmd_ctl.kernel.ksmfs import KsmFs, number
from tests.fakes.ksmfs import FILES_6_1, FILES_6_12, FakeKsmFs

FILES = [field.name for field in FIELDS if field.source in (Source.KNOB, Source.KSM)]


@pytest.fixture
def fake(tmp_path: Path) -> FakeKsmFs:
    return FakeKsmFs(tmp_path)


def sample(root: Path) -> dict[str, Reading]:
    readings: dict[str, Reading] = {}
    ksm = KsmFs(root)
    ksm.sample(readings)
    ksm.close()
    return readings


def test_every_file_of_6_12_is_a_field() -> None:
    assert sorted(FILES) == sorted(FILES_6_12)


@pytest.mark.parametrize("name", FILES)
def test_each_file_reads(fake: FakeKsmFs, name: str) -> None:
    if name == "advisor_mode":
        fake.set(name, "none [scan-time]")
        assert sample(fake.root)[name] == "scan-time"
    else:
        fake.set(name, 4711)
        assert sample(fake.root)[name] == 4711


@pytest.mark.parametrize("name", FILES)
def test_each_file_may_be_missing_unreadable_or_garbage(fake: FakeKsmFs, name: str) -> None:
    fake.garble(name)
    found = sample(fake.root)
    assert type(found.pop(name)) is Unparsable
    assert all(not isinstance(reading, ReadError) for reading in found.values())
    fake.make_unreadable(name)
    found = sample(fake.root)
    unreadable = found.pop(name)
    assert type(unreadable) is Unreadable
    assert unreadable.errno == errno.EISDIR
    assert all(not isinstance(reading, ReadError) for reading in found.values())
    (fake.ksm / name).rmdir()
    absent = sample(fake.root)[name]
    assert type(absent) is Absent
    assert "no KSM" not in absent.why
    assert FIELDS_BY_NAME[name].since in absent.why


@pytest.mark.parametrize(
    "text",
    ["", "\n", "-", "-1", "+1", "1_0", "1 2", "0x10", "1.5", "\u0661", "9" * 30, "9" * 5000, "18446744073709551616"],
)
def test_what_no_kernel_prints_is_not_a_number(fake: FakeKsmFs, text: str) -> None:
    fake.set("pages_shared", text)
    error = sample(fake.root)["pages_shared"]
    assert type(error) is Unparsable
    assert error.path.endswith("/pages_shared")


@pytest.mark.parametrize("name", ["general_profit", "ksm_zero_pages"])
def test_signed_files_may_be_negative(fake: FakeKsmFs, name: str) -> None:
    fake.set(name, -4096)
    assert sample(fake.root)[name] == -4096
    fake.set(name, -(2**63) - 1)
    assert type(sample(fake.root)[name]) is Unparsable
    fake.set(name, 2**63)
    assert type(sample(fake.root)[name]) is Unparsable


@pytest.mark.parametrize("text", ["none scan-time", "[none] [scan-time]", "[]", "none", "0"])
def test_advisor_mode_has_exactly_one_word_in_brackets(fake: FakeKsmFs, text: str) -> None:
    fake.set("advisor_mode", text)
    assert type(sample(fake.root)["advisor_mode"]) is Unparsable


def test_run_shows_that_memory_goes_offline(fake: FakeKsmFs) -> None:
    fake.set("run", 5)
    assert sample(fake.root)["run"] == 5
    ksm = KsmFs(fake.root)
    assert ksm.read(Knob.RUN) == 5
    assert ksm.write(Knob.RUN, 1) == 5
    assert fake.text("run") == "5"
    ksm.close()


@pytest.mark.parametrize(
    ("found", "wanted", "same"), [(0, 0, True), (4, 0, True), (5, 1, True), (6, 2, True), (5, 0, False), (1, 5, False)]
)
def test_bit_4_of_run_is_not_part_of_its_value(found: int, wanted: int, same: bool) -> None:
    assert same_value(Knob.RUN, found, wanted) is same


def test_bit_4_means_nothing_elsewhere() -> None:
    assert not same_value(Knob.MAX_PAGE_SHARING, 6, 2)


def test_a_kernel_like_6_1_lacks_ten_files(tmp_path: Path) -> None:
    found = sample(FakeKsmFs(tmp_path, files=FILES_6_1).root)
    absent = {name for name, reading in found.items() if isinstance(reading, Absent)}
    assert absent == set(FILES_6_12) - set(FILES_6_1)
    assert all(not isinstance(found[name], ReadError) for name in FILES_6_1)


def test_a_kernel_without_ksm_is_told_from_one_that_lacks_a_file(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path, files=None)
    for reading in sample(fake.root).values():
        assert type(reading) is Absent
        assert "no KSM" in reading.why
        assert reading.hint
    ksm = KsmFs(fake.root)
    with pytest.raises(Absent, match="no KSM"):
        ksm.read(Knob.RUN)
    with pytest.raises(Absent, match="no KSM"):
        ksm.store(Knob.RUN, 1)
    ksm.close()


def test_a_file_that_appears_later_is_found(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path, files=None)
    ksm = KsmFs(fake.root)
    with pytest.raises(Absent):
        ksm.read(Knob.RUN)
    fake.set("run", 1)
    assert ksm.read(Knob.RUN) == 1
    fake.set("run", 0)
    assert ksm.read(Knob.RUN) == 0
    ksm.close()


def test_errors_in_a_sample_hold_no_frames(tmp_path: Path) -> None:
    fake = FakeKsmFs(tmp_path, files=FILES_6_1)
    fake.make_unreadable("run")
    fake.garble("pages_shared")
    errors = [reading for reading in sample(fake.root).values() if isinstance(reading, ReadError)]
    assert len(errors) == 12
    assert all(error.__traceback__ is None and error.__cause__ is None for error in errors)


@pytest.mark.parametrize("knob", list(SYSFS_KNOBS))
def test_each_knob_is_read_by_itself(fake: FakeKsmFs, knob: Knob) -> None:
    ksm = KsmFs(fake.root)
    assert ksm.read(knob) == KNOBS[knob].default
    fake.garble(knob)
    with pytest.raises(Unparsable):
        ksm.read(knob)
    ksm.close()


@pytest.mark.parametrize("knob", [knob for knob in SYSFS_KNOBS if not KNOBS[knob].choices])
def test_each_number_is_written_and_read_back(fake: FakeKsmFs, knob: Knob) -> None:
    ksm = KsmFs(fake.root)
    wanted = KNOBS[knob].maximum if KNOBS[knob].default != KNOBS[knob].maximum else KNOBS[knob].minimum
    assert ksm.write(knob, wanted) == wanted
    assert fake.text(knob) == str(wanted)
    ksm.close()


def test_what_is_so_already_is_not_written(fake: FakeKsmFs) -> None:
    ksm = KsmFs(fake.root)
    before = (fake.ksm / "pages_to_scan").stat().st_mtime_ns
    assert ksm.write(Knob.PAGES_TO_SCAN, 100) == 100
    assert ksm.write(Knob.ADVISOR_MODE, "none") == "none"
    assert (fake.ksm / "pages_to_scan").stat().st_mtime_ns == before
    assert fake.text("advisor_mode") == "[none] scan-time"
    ksm.close()


def test_values_that_the_kernel_would_cut_or_refuse_are_not_written(fake: FakeKsmFs) -> None:
    ksm = KsmFs(fake.root)
    for knob, value in (
        (Knob.ADVISOR_MAX_CPU, 2**32 + 70),
        (Knob.RUN, 4),
        (Knob.MAX_PAGE_SHARING, 1),
        (Knob.ADVISOR_MODE, "x"),
    ):
        before = fake.text(knob)
        with pytest.raises(Rejected) as caught:
            ksm.write(knob, value)
        assert caught.value.errno == errno.EINVAL
        assert fake.text(knob) == before
    ksm.close()


def test_a_value_that_reads_otherwise_afterwards_is_rejected(fake: FakeKsmFs) -> None:
    # proc_pid_timerslack_ns(5): writing 0 is taken, and puts the default back, which is not 0.
    fake.link("sleep_millisecs", Path("/proc/self/timerslack_ns"))
    ksm = KsmFs(fake.root)
    default = ksm.read(Knob.SLEEP_MILLISECS)
    assert default != 0
    with pytest.raises(Rejected, match=f"reads {default} afterwards") as caught:
        ksm.write(Knob.SLEEP_MILLISECS, 0)
    assert caught.value.value == 0
    assert caught.value.errno is None
    ksm.close()


def test_a_kernel_that_refuses_is_rejected_with_its_errno(fake: FakeKsmFs) -> None:
    # proc_pid_oom_score_adj(5) takes -1000 to 1000.
    fake.link("sleep_millisecs", Path("/proc/self/oom_score_adj"))
    ksm = KsmFs(fake.root)
    with pytest.raises(Rejected) as caught:
        ksm.write(Knob.SLEEP_MILLISECS, 4000)
    assert caught.value.errno == errno.EINVAL
    ksm.close()


def test_a_knob_that_the_kernel_lacks(tmp_path: Path) -> None:
    ksm = KsmFs(FakeKsmFs(tmp_path, files=FILES_6_1).root)
    with pytest.raises(Absent, match=r"it came with 6\.7") as caught:
        ksm.write(Knob.SMART_SCAN, 0)
    assert caught.value.exit_code is ExitCode.LACKING
    with pytest.raises(Absent, match=r"it came with 6\.7"):
        ksm.store(Knob.SMART_SCAN, 0)
    ksm.close()


def test_the_errno_of_a_write_comes_through(fake: FakeKsmFs) -> None:
    fake.link("run")
    ksm = KsmFs(fake.root)
    with pytest.raises(Rejected) as caught:
        ksm.store(Knob.RUN, 1)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.value == 1
    assert caught.value.path == str(fake.ksm / "run")
    ksm.close()


def test_the_advisor_is_named_when_it_refuses_pages_to_scan(fake: FakeKsmFs) -> None:
    fake.set("advisor_mode", "none [scan-time]")
    ksm = KsmFs(fake.root)
    # A file that takes -1000 to 1000, and refuses others with EINVAL.
    fake.link("pages_to_scan", Path("/proc/self/oom_score_adj"))
    with pytest.raises(Rejected) as caught:
        ksm.store(Knob.PAGES_TO_SCAN, 5000)
    assert "advisor_mode is scan-time" in caught.value.why
    assert "advisor_mode" in caught.value.hint
    fake.set("advisor_mode", "[none] scan-time")
    with pytest.raises(Rejected) as caught:
        ksm.store(Knob.PAGES_TO_SCAN, 5000)
    assert "advisor" not in caught.value.why
    ksm.close()


@pytest.mark.parametrize(
    ("number_", "kind", "code"),
    [
        (errno.ENOENT, Absent, ExitCode.LACKING),
        (errno.EACCES, Denied, ExitCode.DENIED),
        (errno.EPERM, Denied, ExitCode.DENIED),
        (errno.EROFS, Denied, ExitCode.DENIED),
        (errno.EBUSY, Rejected, ExitCode.REFUSED),
        (errno.EINVAL, Rejected, ExitCode.REFUSED),
        (errno.ERANGE, Rejected, ExitCode.REFUSED),
        (errno.ENOMEM, Rejected, ExitCode.REFUSED),
        (errno.EINTR, Rejected, ExitCode.REFUSED),
    ],
)
@pytest.mark.parametrize("knob", [Knob.MERGE_ACROSS_NODES, Knob.RUN])
def test_each_errno_has_its_class(number_: int, kind: type, code: ExitCode, knob: Knob) -> None:
    error = write_error(knob, 1, OSError(number_, os.strerror(number_)), "/x")
    assert type(error) is kind
    assert error.exit_code is code
    assert (error.errno, error.value, error.path) == (number_, 1, "/x")
    transaction = "transaction" in error.hint
    assert transaction == (number_ == errno.EBUSY and knob is Knob.MERGE_ACROSS_NODES)


@given(st.binary(max_size=40), st.booleans())
def test_any_bytes_are_a_number_or_a_valueerror(data: bytes, signed: bool) -> None:
    try:
        value = number(data, signed=signed)
    except ValueError:
        return
    assert str(value) == data.strip().decode().lstrip("0") or value == int(data)
    assert signed or value >= 0


@given(st.integers(-(2**70), 2**70), st.booleans())
def test_numbers_are_taken_exactly_within_a_c_long(value: int, signed: bool) -> None:
    fits = -(2**63) <= value < 2**63 if signed else 0 <= value < 2**64
    try:
        assert number(b"%d\n" % value, signed=signed) == value
        assert fits
    except ValueError:
        assert not fits


@given(data=st.binary(max_size=64))
def test_no_content_of_any_file_breaks_a_sample(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    fake = FakeKsmFs(tmp_path_factory.mktemp("tree"))
    for name in FILES:
        (fake.ksm / name).write_bytes(data)
    for name, reading in sample(fake.root).items():
        assert isinstance(reading, int | str | Unparsable), name
        if isinstance(reading, str):
            assert name == "advisor_mode"
