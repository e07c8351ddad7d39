# SPDX-License-Identifier: GPL-2.0-or-later
"""The tables of a recording: an SQLite file that anybody can ask with SQL. docs/recordings.md is made from this.

A recording of a later format has a greater `VERSION`. A table or a column may be added without that: who reads asks
for what there is, and takes what is not there for unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ksmd_ctl.host.fields import FIELDS, Field, Metric
from ksmd_ctl.host.knobs import KNOBS, Knob

#: PRAGMA application_id: "KSMR".
APPLICATION_ID: Final = 0x4B534D52
#: PRAGMA user_version.
VERSION: Final = 1
#: The number of the content of a page of zeroes.
ZEROES: Final = 0


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its name, its type in SQL with what has to hold, and what it says."""

    name: str
    type: str
    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table: its name, what a row is, and its columns.

    :ivar added: recordings of this format may lack it, as it came later
    """

    name: str
    text: str
    columns: tuple[Column, ...]
    added: bool = False

    @property
    def sql(self) -> str:
        """The statement that makes it."""
        columns = ", ".join(f'"{column.name}" {column.type}' for column in self.columns)
        return f'CREATE TABLE "{self.name}" ({columns}) STRICT'

    @property
    def insert(self) -> str:
        """The statement that adds a row."""
        return f'INSERT INTO "{self.name}" VALUES ({", ".join("?" * len(self.columns))})'


_KEY: Final = "INTEGER PRIMARY KEY"
_INT: Final = "INTEGER"
_NEEDED: Final = "INTEGER NOT NULL"
_REAL: Final = "REAL NOT NULL"
_TEXT: Final = "TEXT NOT NULL"
_SECONDS: Final = "seconds since the recording began"


def _field(field: Field) -> Column:
    words = field.metric is Metric.STATE or (field.name in KNOBS and KNOBS[Knob(field.name)].words)
    real = field.name.endswith("_seconds")
    return Column(field.name, "TEXT" if words else "REAL" if real else _INT, field.help)


SAMPLE: Final = Table(
    "sample",
    "what the kernel's counters and knobs read; NULL where this host does not have it",
    (Column("seconds", _REAL, _SECONDS), *map(_field, FIELDS)),
)

TABLES: Final = (
    Table(
        "fact",
        "what holds for the whole recording",
        (Column("name", "TEXT PRIMARY KEY", "see below"), Column("value", _TEXT, "as JSON")),
    ),
    Table(
        "node",
        "a NUMA node that was online when the recording began",
        (
            Column("node", _KEY, "its number"),
            Column("cpus", _TEXT, "the list of its CPUs"),
            Column("memory_bytes", _NEEDED, "its memory"),
            Column("distances", _TEXT, "the distance to each node, by number, as JSON"),
        ),
    ),
    SAMPLE,
    Table(
        "node_sample",
        "the memory of a node at the time of a sample",
        (
            Column("seconds", _REAL, "that of the sample"),
            Column("node", _NEEDED, "the node"),
            Column("total_bytes", _NEEDED, "its memory"),
            Column("free_bytes", _NEEDED, "what of it is free"),
        ),
    ),
    Table(
        "process",
        "a process with mergeable memory",
        (
            Column("process", _KEY, "its number in this recording"),
            Column("pid", _NEEDED, "its pid; with --anonymous its number in this recording"),
            Column("name", _TEXT, "the name of its program"),
            Column("unit", _TEXT, "its systemd unit, empty outside of any"),
            Column("grouped", _TEXT, "the virtual machine or the unit that it belongs to"),
            Column("family", _NEEDED, "the same number for forks of one program, 0 where that is not known"),
            Column("home", _INT, "the node where it belongs, NULL where that is not one node"),
            Column("began", _REAL, f"when it was started, in {_SECONDS}; negative for what ran before"),
            Column("ended", "REAL", f"when it ended, half way between two samples, in {_SECONDS}; NULL while it runs"),
            Column(
                "domain", "TEXT", "the trust domain that it belongs to (domains.md); NULL where none are configured"
            ),
        ),
    ),
    Table(
        "domain",
        "a trust domain that the configuration names",
        (
            Column("domain", "TEXT PRIMARY KEY", "its name"),
            Column("nodes", _TEXT, "the list of nodes that are its alone, empty where it has none"),
        ),
        added=True,
    ),
    Table(
        "process_sample",
        "counters of a process, in two samples between which one of them changed; pages in memory, mergeable or not",
        (
            Column("seconds", _REAL, "that of the sample"),
            Column("process", _NEEDED, "the process"),
            Column("resident_pages", _NEEDED, "its pages in memory"),
            Column("rmap_items", _INT, "its pages that ksmd has seen (ksm_rmap_items)"),
            Column("merging_pages", _INT, "its merged pages as the kernel counts them (ksm_merging_pages)"),
        ),
    ),
    Table(
        "look",
        "a look at the contents of all mergeable pages",
        (
            Column("look", _KEY, "its number, from 1"),
            Column("began", _REAL, _SECONDS),
            Column("ended", _REAL, _SECONDS),
            Column("cpu_seconds", _REAL, "the CPU time that it took"),
            Column("unread", _NEEDED, "processes that could not be looked at"),
            Column("equal_pages", _INT, "pages, sampled or not, of which there is an equal one; NULL if not counted"),
            Column("equal_contents", _INT, "how many contents these have"),
        ),
    ),
    Table(
        "process_look",
        "what a look found of a process",
        (
            Column("look", _NEEDED, "the look"),
            Column("process", _NEEDED, "the process"),
            Column("seconds", _REAL, f"when its pages had been read, in {_SECONDS}"),
            Column("pages", _NEEDED, "its mergeable pages in memory, sampled or not"),
            Column("merging_pages", _INT, "its merged pages as the kernel counts them (ksm_merging_pages)"),
        ),
    ),
    Table(
        "content",
        "a content that pages of the sample have",
        (
            Column("content", _KEY, "its number in this recording; 0 for a page of zeroes"),
            Column("digest", "BLOB", "keyed BLAKE2b of 8 bytes; NULL without a key file"),
        ),
    ),
    Table(
        "page",
        "a page of the sample that a look found to be new, written, moved or gone since the look before",
        (
            Column("look", _NEEDED, "the look"),
            Column("process", _NEEDED, "the process"),
            Column("page", _NEEDED, "its address divided by the size of a page"),
            Column("content", _INT, "its content; NULL where it is no longer there, or no longer in the sample"),
            Column("node", _NEEDED, "the node that it is on"),
            Column("frame", _NEEDED, "the same for pages of one look that have one frame; 0 for one mapped once"),
        ),
    ),
    Table(
        "event",
        "what happened",
        (
            Column("seconds", _REAL, _SECONDS),
            Column("kind", _TEXT, "knob or process; of what a service told, as in its history (history.md)"),
            Column("text", _TEXT, "what it was"),
            Column("service", _NEEDED, "1 for what a service told, else 0"),
        ),
    ),
)

TABLES_BY_NAME: Final = {table.name: table for table in TABLES}

#: The rows of the table fact, with what they say.
FACTS: Final = {
    "program": "the version of ksmd-ctl that recorded it",
    "kind": "kernel, or engine for the simulated host",
    "release": "the kernel's release, or the engine's profile",
    "profile": "the engine's profile that behaves as this kernel does",
    "page_size_bytes": "the size of a page",
    "begun": "when it began, in seconds since 1970",
    "seconds": "how long it took; not there where it did not come to its end",
    "one_in": "of so many contents one is sampled",
    "keyed": "whether digests are stored, which need a key file",
    "anonymous": "whether names are replaced",
    "numa": "whether this host offers NUMA",
    "domains": "the mode of the configured trust domains, report or nodes; null without any",
    "service": "of a service that ran: its version, its policy, and the knobs that it wants; null without one",
}


def document() -> Iterator[str]:
    """The tables as Markdown (docs/recordings.md)."""
    for table in TABLES:
        yield f"### `{table.name}`\n\nA row is {table.text}.\n\n| column | type | what it says |\n|---|---|---|\n"
        columns = table.columns[:1] if table is SAMPLE else table.columns
        for column in columns:
            yield f"| `{column.name}` | {column.type} | {column.text} |\n"
        if table is SAMPLE:
            yield "| and a column for each field of a report | | see `readings` in [json.md](json.md) |\n"
        if table.name == "fact":
            yield "\n| fact | what it says |\n|---|---|\n"
            yield from (f"| `{name}` | {text} |\n" for name, text in FACTS.items())
        yield "\n"
