# SPDX-License-Identifier: GPL-2.0-or-later
"""The format: what reads, what doesn't and how that is said, writing back, and the schema beside the loader."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.engine.memory import page_content
from ksmd_ctl.errors import ConfigError
from ksmd_ctl.host.knobs import Knob
from ksmd_ctl.scenario.format import LIBRARY, PROBES, load, parse, text_of
from ksmd_ctl.scenario.generate import Abilities, generate
from ksmd_ctl.scenario.host_steps import Batch, Set
from ksmd_ctl.scenario.memory_steps import Migrate, Write
from ksmd_ctl.scenario.model import KnobSetting, Step, arguments
from ksmd_ctl.scenario.steps import KINDS
from ksmd_ctl.scenario.values import PAGES, parse_pages
from tests.scenario.minischema import mistakes
from tests.scenario.schema import schema

ROOT = Path(__file__).parents[2]
FILES = sorted([*LIBRARY.rglob("*.toml"), *PROBES.rglob("*.toml")])

HEAD = """
format = 1
name = "test"
nodes = 2
[[region]]
process = "p"
name = "a"
node = 0
pages = ["x", "y", "0", "-"]
"""
TAIL = '[[step]]\nobserve = "end"\n'


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, "some.toml")
    return [str(problem) for problem in caught.value.problems]


def test_everything_that_the_design_names() -> None:
    scenario = parse(
        HEAD.replace(
            "[[region]]", "[knobs]\nmerge_across_nodes = 0\nsmart_scan = {value = 0, optional = true}\n[[region]]"
        )
        + "[[step]]\nbatch = 37\n"
        + '[[step]]\nmigrate = { process = "p", region = "a", pages = "0-1,3", to = 1 }\n'
        + '[[step]]\nwrite = { process = "p", region = "a", page = 2, label = "z" }\n'
        + '[[step]]\nset = { max_page_sharing = 1 }\nfails = "EINVAL"\n'
        + TAIL
    )
    assert scenario.knobs == {
        Knob.MERGE_ACROSS_NODES: KnobSetting(0),
        Knob.SMART_SCAN: KnobSetting(0, optional=True),
    }
    assert scenario.steps[:4] == (
        Batch(37),
        Migrate("p", "a", 1, pages=(0, 1, 3)),
        Write("p", "a", "z", pages=(2,)),
        Set({Knob.MAX_PAGE_SHARING: 1}, "EINVAL"),
    )


@pytest.mark.parametrize(
    ("step", "key", "said"),
    [
        ("scan = 0", "step 1 (scan)", "0 is not a whole number from 1 on"),
        ("scan = true", "step 1 (scan)", "True is not"),
        ("jump = 1", "step 1", "a step is one of"),
        ("scan = 1\nbatch = 1", "step 1", "here is scan and batch"),
        ("scan = 1\nfails = 'EBUSY'", "step 1 (scan): fails", "unknown"),
        ("migrate = { process = 'p', region = 'a' }", "step 1 (migrate): to", "missing"),
        ("migrate = { process = 'p', region = 'a', to = 2 }", "step 1 (migrate): to", "nodes 0 to 1"),
        ("migrate = { process = 'p', region = 'a', to = 1, pages = '3-1' }", "step 1 (migrate): pages", "ascending"),
        ("migrate = { process = 'p', region = 'b', to = 1 }", "step 1 (migrate)", "has no region b"),
        ("migrate = { process = 'q', region = 'a', to = 1 }", "step 1 (migrate)", "there is no process q"),
        ("discard = { process = 'p', region = 'a', pages = '4' }", "step 1 (discard)", "no page 4"),
        (
            "write = { process = 'p', region = 'a', page = 0, pages = '0', label = 'x' }",
            "step 1 (write)",
            "one of page and pages, not both",
        ),
        ("write = { process = 'p', region = 'a', page = 0, label = '-' }", "step 1 (write): label", "not -"),
        ("fork = { process = 'p', as = 'p' }", "step 1 (fork)", "already"),
        ("set = { pages_to_scan = 5 }", "step 1 (set): pages_to_scan", "is not one of"),
        ("set = { smart_scan = 5 }", "step 1 (set): smart_scan", "between 0 and 1"),
        ("set = { smart_scan = 0 }\nfails = 'EWHAT'", "step 1 (set): fails", "errno"),
        ("set = { smart_scan = 0 }\nfails = 'errorcode'", "step 1 (set): fails", "errno"),
        ("set = { advisor_mode = 'none' }", "step 1 (set): advisor_mode", "is not one of"),
        ("unmerge = false", "step 1 (unmerge)", "is not true"),
        ("sleep = 0", "step 1 (sleep)", "is not"),
        ("observe = 'end'", "step 2 (observe)", "already"),
    ],
)
def test_mistakes_are_named_by_file_step_and_key(step: str, key: str, said: str) -> None:
    found = problems(f"{HEAD}[[step]]\n{step}\n{TAIL}")
    assert len(found) == 1
    assert found[0].startswith(f"some.toml: {key}: ")
    assert said in found[0]


def test_all_mistakes_at_once() -> None:
    text = HEAD.replace("node = 0", 'node = "x"').replace("format = 1", "format = 2")
    found = problems(text + "[[step]]\nscan = -1\n[[step]]\nbatch = 0\n[[expect]]\nat = 'end'\npages_shared = 'x'\n")
    assert [problem.split(": ")[1] for problem in found] == [
        "format",
        "region 1",
        "step 1 (scan)",
        "step 2 (batch)",
        "expect 1",
    ]


def test_a_dead_process_and_an_unmapped_page_are_gone() -> None:
    gone = "[[step]]\nexit = { process = 'p' }\n[[step]]\nfork = { process = 'p', as = 'q' }\n"
    assert "process p is gone" in problems(HEAD + gone + TAIL)[0]
    unmapped = "[[step]]\nunmap = { process = 'p', region = 'a', pages = '1' }\n"
    write = "[[step]]\nwrite = { process = 'p', region = 'a', page = 1, label = 'x' }\n"
    assert "not mapped any more" in problems(HEAD + unmapped + write + TAIL)[0]
    locked = "[[step]]\nprotect = { process = 'p', region = 'a', writable = false }\n"
    assert "would die" in problems(HEAD + locked + write + TAIL)[0]
    # A child has what its parent had at that moment.
    child = "[[step]]\nfork = { process = 'p', as = 'q' }\n" + write.replace("'p'", "'q'")
    assert "not mapped any more" in problems(HEAD + unmapped + child + TAIL)[0]
    parse(HEAD + child.replace("[[step]]\nfork", "[[step]]\nfork", 1) + unmapped + TAIL)


@pytest.mark.parametrize("text", ["x = [", "format = 1\nname = 'x'\x01", "a." * 5000 + "b = 1"])
def test_what_is_not_toml(text: str) -> None:
    assert "some.toml: " in problems(text)[0]


def test_expectations_name_what_is_there() -> None:
    for line, said in (
        ("at = 'never'", "no observation 'never'"),
        ("at = 'end'\npages_sharred = 1", "is not one of"),
        ("at = 'end'\nnodes = { 'p.a.9' = 0 }", "no page p.a.9"),
        ("at = 'end'\ngroups = [['p.a.0'], ['p.a.0', 'p.a.1']]", "in two groups"),
    ):
        assert said in problems(f"{HEAD}{TAIL}[[expect]]\n{line}\n")[0]


@given(st.sets(st.integers(0, 5000), min_size=1, max_size=60))
def test_pages_read_back(pages: set[int]) -> None:
    assert parse_pages(json.loads(PAGES.write(pages))) == tuple(sorted(pages))


@given(st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=1, max_size=20))
def test_contents_compare_as_labels_do(label: str) -> None:
    content = page_content(label, 4096)
    assert len(content) == 4096
    other = page_content("m", 4096)
    if label not in ("0", "m"):
        unit, there = label.encode() + b"\0", b"m\0"
        assert (content < other) == (unit * 4096 < there * 4096)
    assert page_content("0", 4096) == bytes(4096)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_files_read_back_and_fit_the_schema(path: Path) -> None:
    scenario = load(path)
    assert parse(text_of(scenario), str(path)) == scenario
    assert mistakes(schema(), tomllib.loads(path.read_text())) == []


@given(st.integers(0, 10**6))
def test_random_scenarios_read_back_and_fit_the_schema(number: int) -> None:
    scenario = generate(7, number, Abilities(nodes=3))
    text = text_of(scenario)
    assert parse(text) == scenario
    assert mistakes(schema(), tomllib.loads(text)) == []


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if any(a.key == "pages" for a in arguments(kind))])
def test_a_step_without_pages_is_about_the_whole_region(kind: type[Step]) -> None:
    others = {"to": "1", "label": "'x'", "mergeable": "true", "writable": "true"}
    given = ["process = 'p'", "region = 'a'"]
    given += [f"{argument.key} = {others[argument.key]}" for argument in arguments(kind) if argument.key in others]
    step = f"{kind.kind} = {{ {', '.join(given)} }}"
    text = f"{HEAD}[[step]]\n{step}\n{TAIL}"
    scenario = parse(text)
    assert getattr(scenario.steps[0], "pages") is None  # noqa: B009
    assert mistakes(schema(), tomllib.loads(text)) == []
    assert parse(text_of(scenario)).steps == scenario.steps


def test_the_schema_refuses_what_form_can_tell() -> None:
    both = "write = { process = 'p', region = 'a', page = 0, pages = '0', label = 'x' }"
    for step in (
        both,
        "scan = 0",
        "jump = 1",
        "scan = 1\nbatch = 1",
        "set = { run = 'x', speed = 3 }",
        "unmerge = false",
    ):
        assert mistakes(schema(), tomllib.loads(f"{HEAD}[[step]]\n{step}\n{TAIL}"))
    assert mistakes(schema(), tomllib.loads(f"{HEAD}{TAIL}colour = 1\n"))


def test_the_schema_in_docs_is_this_one() -> None:
    assert json.loads((ROOT / "docs/scenario.schema.json").read_text()) == schema()


def test_the_documentation_names_every_kind_and_key() -> None:
    text = (ROOT / "docs/scenarios.md").read_text()
    for kind in KINDS.values():
        assert f"| `{kind.kind}` |" in text
        for argument in () if kind.bare else arguments(kind):
            assert f"`{argument.key}`" in text
