# SPDX-License-Identifier: GPL-2.0-or-later
"""Typed values and errors from process to process."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl import errors
from ksmd_ctl.codec import between, decode, decode_error, dump, encode, encode_error, load
from ksmd_ctl.errors import ConfigError, HostError, KsmdError
from ksmd_ctl.host.knobs import Knob, KnobValue
from ksmd_ctl.host.memory import Census, HomeRange, KsmDetection, Process, ProcessClass, ProcessId, Range
from ksmd_ctl.host.operation import Move, MoveResult, Progress, Unshare, UnsharedPart, UnsharePart, UnshareResult
from ksmd_ctl.privileged.requests import WriteKnob

ID = ProcessId(4711, 99)
VALUES: list[tuple[object, object]] = [
    (WriteKnob, WriteKnob(Knob.RUN, 2)),
    (WriteKnob, WriteKnob(Knob.ADVISOR_MODE, "scan-time")),
    (KnobValue, 5),
    (KnobValue, "none"),
    (Progress, Progress(1, 2, "pages")),
    (Move, Move(ID, 1, ((4096, 8192), (1 << 47, 1 << 48)), everything=True)),
    (MoveResult, MoveResult(1, 2, {"pinned": 3})),
    (Unshare, Unshare((UnsharePart(ID, ((4096, 8192),), 1, 5), UnsharePart(ID)), max_pressure=0.5)),
    (UnshareResult, UnshareResult((UnsharedPart(7, {"gone": 1}), UnsharedPart(0, {}, ended=True)), "it was stopped")),
    (Census, Census(1.5, {0: 1, 1: 2}, {0: 1, 1: 2}, {0: 1, 1: 2}, True, KsmDetection.PAGEMAP, 0.25)),
    (
        tuple[Process, ...],
        (
            Process(ID, "a", "g", "u", frozenset({ProcessClass.SHARED, ProcessClass.PINNED}), "why", nodes={1: 2}),
            Process(ID, "\udcff\n\0", "", "", frozenset(), "", merging_pages=0, home=3),
        ),
    ),
    (tuple[Range, ...], (Range(0, 4096, frozenset({"mg", "rd"}), policy_nodes=frozenset({0, 2})),)),
]


@pytest.mark.parametrize(("kind", "value"), VALUES, ids=lambda value: getattr(value, "__name__", "value"))
def test_values_come_out_as_they_went_in(kind: object, value: object) -> None:
    line = dump(encode(value))
    assert line.count(b"\n") == 1
    found = decode(kind, load(line))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("kind", "value"), [pair for pair in VALUES if dataclasses.is_dataclass(pair[1])])
def test_a_key_too_many_or_too_few_is_refused(kind: object, value: Any) -> None:
    document = encode(value)
    assert isinstance(document, dict)
    with pytest.raises(ValueError, match=r"\.more is not known"):
        decode(kind, {**document, "more": 1})
    for field in dataclasses.fields(value):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            with pytest.raises(ValueError, match=rf"\.{field.name} is missing"):
                decode(kind, {name: item for name, item in document.items() if name != field.name})


@pytest.mark.parametrize(
    ("kind", "document"),
    [
        (int, True),
        (int, 1.0),
        (int, "1"),
        (bool, 1),
        (str, 1),
        (str, None),
        (float, True),
        (float, "1"),
        (type(None), 0),
        (Knob, "Run"),
        (Knob, 3),
        (KnobValue, True),
        (KnobValue, None),
        (KnobValue, []),
        (ProcessId, []),
        (ProcessId, {"pid": 1, "start_time_ticks": None}),
        (tuple[int, ...], {}),
        (tuple[int, int], [1]),
        (tuple[int, int], [1, 2, 3]),
        (frozenset[str], "ab"),
        (Mapping[int, int], {"one": 1}),
        (Mapping[int, int], {"-1": 1}),
        (Mapping[int, int], []),
        # What 1e999 is read as.
        (float, float("inf")),
    ],
)
def test_nothing_is_converted(kind: object, document: Any) -> None:
    with pytest.raises(ValueError, match=r"is|does not have"):
        decode(kind, document)


def test_what_is_annotated_is_checked_wherever_it_stands() -> None:
    share = Annotated[float, between(0, 1)]
    kind = tuple[share | None, ...]
    assert decode(kind, [0, 0.5, 1, None]) == (0.0, 0.5, 1.0, None)
    with pytest.raises(ValueError, match=r"shares\[1\] is not between 0 and 1"):
        decode(tuple[share, ...], [0.5, 1.5], "shares")
    with pytest.raises(ValueError, match=r"it is 2, not float \| None"):
        decode(share | None, 2)
    for wrong in ([-1], [True], ["0.5"]):
        with pytest.raises(ValueError, match=r"it\[0\]"):
            decode(kind, wrong)


@pytest.mark.parametrize(
    "text", ['{"a":1,"a":1}', "NaN", "Infinity", "[" * 50000, "9" * 5000, "{", "", "\xff", '"\\ud800'], ids=range(9)
)
def test_what_is_not_a_document(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        load(text.encode("latin-1"))


@given(st.binary(max_size=200))
def test_any_message_is_a_document_or_a_valueerror(data: bytes) -> None:
    try:
        load(data)
    except ValueError:
        pass


JSON_DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)


@given(st.sampled_from([kind for kind, _ in VALUES]), JSON_DOCUMENTS)
def test_any_document_decodes_or_is_a_valueerror(kind: object, document: Any) -> None:
    try:
        decode(kind, document)
    except ValueError:
        pass


# -- errors ------------------------------------------------------------------------------------------------

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, KsmdError) and kind is not ConfigError
]


@pytest.mark.parametrize("kind", KINDS)
def test_each_error_comes_out_as_the_same_class_with_the_same_fields(kind: type[KsmdError]) -> None:
    error: KsmdError
    if issubclass(kind, HostError):
        error = kind("what", "why", hint="hint", path="/p", value=5, errno=22)
    else:
        error = kind("what", "why", hint="hint")
    found = decode_error(load(dump(encode_error(error))))
    assert type(found) is kind
    assert vars(found) == vars(error)
    assert str(found) == str(error)


@given(
    st.text(), st.text(), st.text(), st.none() | st.integers() | st.text() | st.booleans(), st.none() | st.integers()
)
def test_any_texts_of_an_error_survive(what: str, why: str, hint: str, value: object, number: int | None) -> None:
    error = errors.Rejected(what, why, hint=hint, path=why, value=value, errno=number)
    assert vars(decode_error(load(dump(encode_error(error))))) == vars(error)


ERROR = {"kind": "UsageError", "what": "a", "why": "b", "hint": ""}


@pytest.mark.parametrize(
    "document", [None, [], {}, {"kind": "KsmdError"}, ERROR | {"kind": "Exception"}, ERROR | {"kind": "ExitCode"}]
)
def test_what_is_not_an_error(document: Any) -> None:
    with pytest.raises(ValueError, match="error"):
        decode_error(document)


def test_what_has_no_form_is_a_defect() -> None:
    with pytest.raises(TypeError):
        encode(object())
    with pytest.raises(ValueError, match="JSON"):
        dump(float("nan"))
    assert json.loads(dump(encode({1: (True, None)}))) == {"1": [True, None]}


def test_a_type_is_looked_at_once_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    hints = typing.get_type_hints
    monkeypatch.setattr(typing, "get_type_hints", lambda *kind, **more: looks.append(kind) or hints(*kind, **more))
    ranges = tuple(HomeRange(start, start + 1, None, {0: 1}, 1) for start in range(1000))
    assert decode(tuple[HomeRange, ...], load(dump(encode(ranges)))) == ranges
    assert len(looks) <= 1


def test_a_document_that_is_nested_too_deeply_to_be_shown_is_refused() -> None:
    document: Any = []
    for _ in range(5000):
        document = [document]
    with pytest.raises(ValueError, match="nested too deeply"):
        decode(int, document)
