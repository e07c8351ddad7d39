# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.daemon import varlink_wire as wire
from ksmd_ctl.daemon.varlink_wire import BadMessage, Call, CallError, encode_reply, parse_call

INTERFACE_FILE = Path(wire.__file__).with_name("io.ksmd-ctl.varlink")

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def message(**keys: object) -> bytes:
    return json.dumps(keys).encode()


def test_a_call() -> None:
    found = parse_call(b'{"method":"io.ksmd-ctl.Status","parameters":{"a":1},"more":true}')
    assert found == Call("io.ksmd-ctl", "Status", {"a": 1}, more=True)
    assert found.name == "io.ksmd-ctl.Status"


def test_what_may_be_left_out() -> None:
    assert parse_call(message(method="a.B", parameters=None, more=None)) == Call("a", "B", {})


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\xff",
        b"[]",
        b"1",
        b"{}",
        b'{"method":1}',
        b'{"method":"Status"}',
        b'{"method":".Status"}',
        b'{"method":"a.B","parameters":[]}',
        b'{"method":"a.B","more":1}',
        b'{"method":"a.B","more":true,"oneway":true}',
        b'{"method":"a.B","upgrade":true}',
        b'{"method":"a.B","method":"a.C"}',
        b'{"method":"a.B","parameters":{"x":1,"x":2}}',
        b'{"method":"a.B","parameters":{"x":NaN}}',
        b'{"method":"a.B","parameters":{"x":-Infinity}}',
        b'{"method":"a.B","parameters":{"x":' + b"9" * 5000 + b"}}",
        b"[" * 60000,
        b'{"a":' * 12000,
        b'{"method":"a.B","parameters":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"method":"a.B"} x',
    ],
    ids=lambda data: repr(data[:40]),
)
def test_what_is_no_call(bad: bytes) -> None:
    with pytest.raises(BadMessage):
        parse_call(bad)


@given(st.binary(max_size=2000))
def test_any_bytes_are_a_call_or_refused(data: bytes) -> None:
    try:
        found = parse_call(data)
    except BadMessage:
        return
    assert found.interface


@given(JSON)
def test_any_json_is_a_call_or_refused(document: Any) -> None:
    try:
        found = parse_call(json.dumps(document).encode())
    except BadMessage:
        return
    assert document["method"] == found.name


@given(st.dictionaries(st.text(), JSON, max_size=4), st.booleans())
def test_a_reply_comes_back_as_it_was(parameters: dict[str, Any], continues: bool) -> None:
    sent = encode_reply(parameters, continues=continues)
    assert sent.count(b"\0") == 1
    assert sent.endswith(b"\0")
    found = json.loads(sent[:-1])
    assert found["parameters"] == parameters
    assert found.get("continues", False) is continues


def test_no_reply_holds_what_json_has_no_word_for() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode_reply({"x": math.nan})


def declared(kind: str) -> dict[str, dict[str, bool]]:
    """By name of a method or error in the interface: its parameters, and whether they may be left out."""
    text = re.sub(r"#.*", "", INTERFACE_FILE.read_text())
    return {
        name: {key: value.startswith("?") for key, value in re.findall(r"(\w+):\s*(\S+?)(?:,|$)", inside.strip())}
        for name, inside in re.findall(rf"{kind}\s+(\w+)\s*\(([^)]*)\)", text)
    }


def fields_of(kind: Any) -> dict[str, bool]:
    return {field.name: field.default is not dataclasses.MISSING for field in dataclasses.fields(kind)}


def test_methods_and_errors_have_the_parameters_that_the_interface_says() -> None:
    for name, parameters in declared("method").items():
        assert parameters == fields_of(getattr(wire, f"{name}Parameters", wire.NoParameters)), name
    assert declared("error") == {kind.__name__: fields_of(kind) for kind in get_args(wire.OwnError)}


def test_parameters_are_taken_or_named() -> None:
    call = Call("a", "B", {"to": 1, "unit": None, "ranges": [{"start": 1, "end": 2}]})
    found = call.take(wire.MigrateParameters)
    assert (found.to, found.unit, found.ranges) == (1, None, (wire.AddressRange(1, 2),))
    with pytest.raises(CallError) as caught:
        Call("a", "B", {"to": 1, "ranges": [{"start": 1, "end": 2, "more": 3}]}).take(wire.MigrateParameters)
    assert caught.value.parameters == {"parameter": "ranges"}
