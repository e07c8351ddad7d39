# SPDX-License-Identifier: GPL-2.0-or-later
"""/sys/kernel/mm/ksm: every file of it, typed.

Source: mm/ksm.c (``ksm_attrs`` and their ``*_show`` and ``*_store``), Documentation/admin-guide/mm/ksm.rst.
The directory exists if the kernel has CONFIG_KSM and CONFIG_SYSFS; which files it holds depends on the kernel,
and is found out by looking.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from ksmd_ctl.errors import Absent, HostError, ReadError, Rejected, Unparsable, errno_text
from ksmd_ctl.host.fields import FIELDS, Field, Metric, Source
from ksmd_ctl.host.knobs import KNOBS, Knob, KnobValue, format_value, parse_value, parse_wanted, same_value, write_error
from ksmd_ctl.host.sample import Reading
from ksmd_ctl.kernel.pseudofile import PseudoFile, without_frames

_DIRECTORY = "sys/kernel/mm/ksm"
# The longest is a number of 20 digits or the advisor's words; anything longer is none of these.
_CHUNK_BYTES = 128
_ULONG_MAX = 2**64 - 1
_LONG_MIN = -(2**63)
_LONG_MAX = 2**63 - 1

# O_TRUNC means nothing to sysfs; it makes a regular file, as in a test's tree, behave like one of its files.
_WRITE_FLAGS = os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC | os.O_NOCTTY


def number(data: bytes, *, signed: bool = False) -> int:
    """The number that a file of one number holds.

    :raises ValueError: it isn't one, or no C long could hold it
    """
    text = data.strip()
    negative = signed and text[:1] == b"-"
    digits = text[1:] if negative else text
    # bytes.isdigit() knows ASCII digits only; int() by itself takes "1_0" and "+1", which no kernel prints.
    if not digits.isdigit() or len(digits) > 20:
        raise ValueError(f"{_shown(data)} is not a number")
    value = -int(digits) if negative else int(digits)
    if not (_LONG_MIN if signed else 0) <= value <= (_LONG_MAX if signed else _ULONG_MAX):
        raise ValueError(f"{_shown(data)} is out of range")
    return value


class KsmFs:
    """The directory of one host, its files open.

    :param root: where sysfs is found below: ``/``, but in tests
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self.directory = root / _DIRECTORY
        self._files = [
            (field, PseudoFile(self.directory / field.name, _CHUNK_BYTES), field.metric is Metric.STATE)
            for field in FIELDS
            if field.source in (Source.KNOB, Source.KSM)
        ]
        self._knobs = {Knob(field.name): file for field, file, _ in self._files if field.source is Source.KNOB}

    def close(self) -> None:
        """Give the descriptors back."""
        for _, file, _ in self._files:
            file.close()

    def sample(self, into: dict[str, Reading]) -> None:
        """Read every file; a field that can't be had gets its error."""
        missing: list[tuple[Field, Absent]] = []
        for field, file, words in self._files:
            try:
                data = file.read()
                if words:
                    into[field.name] = parse_value(Knob(field.name), data.decode("ascii", "replace"))
                elif len(data) < 20 and data[:-1].isdigit():
                    into[field.name] = int(data)
                else:
                    into[field.name] = number(data, signed=field.signed)
            except Absent as error:
                missing.append((field, without_frames(error)))
            except ReadError as error:
                into[field.name] = without_frames(error)
            except ValueError as error:
                into[field.name] = _unparsable(field.name, file.path, data, error)
        if missing:
            present = self.directory.is_dir()
            for field, absent in missing:
                into[field.name] = self._absent(field.name, absent, present)

    def read(self, knob: Knob) -> KnobValue:
        """One knob, read now.

        :raises ReadError: it is absent, unreadable or unparsable
        """
        file = self._knobs[knob]
        try:
            data = file.read()
            if KNOBS[knob].choices:
                return parse_value(knob, data.decode("ascii", "replace"))
            return number(data)
        except Absent as error:
            raise self._absent(knob, error, self.directory.is_dir()) from error
        except ValueError as error:
            raise _unparsable(knob, file.path, data, error) from error

    def store(self, knob: Knob, value: KnobValue) -> None:
        """Write a knob, whatever it holds, whatever the value is.

        It waits as long as the kernel does: for ``run``, ``merge_across_nodes`` and ``max_page_sharing`` that is
        until ksmd's batch, an un-merge or memory offlining is over.

        :raises Absent, Denied, Rejected: with the kernel's errno
        """
        path = self._knobs[knob].path
        try:
            descriptor = os.open(path, _WRITE_FLAGS)
            try:
                os.write(descriptor, format_value(value).encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._write_error(knob, value, path, error) from error

    def write(self, knob: Knob, value: KnobValue) -> KnobValue:
        """Give a knob a value: skipped where it has it already, read back afterwards.

        :returns: the value read back
        :raises Absent, Denied, Rejected: the kernel didn't take it, or reads otherwise afterwards
        :raises ReadError: it can't be read
        """
        found = self.read(knob)
        what, path = f"writing {format_value(value)} to {knob}", self._knobs[knob].path
        try:
            # The kernel cuts some values to 32 bits without a word (advisor_max_cpu).
            value = parse_wanted(knob, value)
        except ValueError as error:
            raise Rejected(what, str(error), path=path, value=value, errno=errno.EINVAL) from error
        if same_value(knob, found, value):
            return found
        self.store(knob, value)
        found = self.read(knob)
        if not same_value(knob, found, value):
            why = f"it reads {found} afterwards"
            hint = "something else writes it too: ksmd-ctl status names the known ones"
            if knob is Knob.PAGES_TO_SCAN and self._advised():
                hint = "the kernel's advisor sets it: write none to advisor_mode first"
            raise Rejected(what, why, hint=hint, path=path, value=value)
        return found

    def _write_error(self, knob: Knob, value: KnobValue, path: str, error: OSError) -> HostError:
        result = write_error(knob, value, error, path)
        if isinstance(result, Absent):
            return self._absent(knob, result, self.directory.is_dir(), result.what)
        # pages_to_scan_store() (6.8 on) refuses every value then, so the number has nothing to do with it.
        if knob is Knob.PAGES_TO_SCAN and error.errno == errno.EINVAL and self._advised():
            result.why = f"advisor_mode is scan-time, so the kernel's advisor sets it, {errno_text(errno.EINVAL)}"
            result.hint = "write none to advisor_mode first, or set the advisor's limits instead"
        return result

    def _advised(self) -> bool:
        try:
            return self.read(Knob.ADVISOR_MODE) == "scan-time"
        except ReadError:
            return False

    def _absent(self, name: str, error: HostError, directory: bool, what: str = "") -> Absent:
        what = what or f"reading {name}"
        if not directory:
            why = f"this kernel has no KSM ({self.directory} is missing)"
            hint = "KSM needs a kernel with CONFIG_KSM; --host engine shows a simulated host"
            return Absent(what, why, hint=hint, path=error.path, value=error.value, errno=error.errno)
        since = next(field.since for field, _, _ in self._files if field.name == name)
        why = f"this kernel does not have it{f' (it came with {since})' if since else ''}"
        return Absent(what, why, path=error.path, value=error.value, errno=error.errno)


def _shown(data: bytes) -> str:
    return repr(data[:40].decode("ascii", "backslashreplace"))


def _unparsable(name: str, path: str, data: bytes, error: ValueError) -> Unparsable:
    return Unparsable(f"reading {name}", str(error), path=path, value=data[:40].decode("ascii", "backslashreplace"))
