# SPDX-License-Identifier: GPL-2.0-or-later
"""Documents: links and anchors lead somewhere, lines are short, and every document can be found from README.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lint.test_lint import ROOT, tracked

LINE_LENGTH = 120
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_ELSEWHERE = re.compile(r"[a-z]+:")
_CODE = re.compile(r"^```.*?^```[^\n]*$", re.MULTILINE | re.DOTALL)

# What a check gets: the top folder, and the files in it by their paths from there.
Check = Callable[[Path, list[str]], list[str]]


def without_code(text: str) -> str:
    """A document whose code blocks are blank, with as many lines as before."""
    return _CODE.sub(lambda block: "\n" * block[0].count("\n"), text)


def links(text: str) -> Iterator[str]:
    return (link for link in _LINK.findall(without_code(text)) if not _ELSEWHERE.match(link))


def anchors(text: str) -> set[str]:
    """The names that headings get on a page that is made of a document."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def documents(files: list[str]) -> list[str]:
    return [name for name in files if name.endswith(".md")]


def broken_links(top: Path, files: list[str]) -> list[str]:
    broken = []
    for name in documents(files):
        text = (top / name).read_text()
        for link in links(text):
            path, _, anchor = link.partition("#")
            target = (top / name).parent / path if path else top / name
            if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
                broken.append(f"{name}: {link}")
    return broken


def long_lines(top: Path, files: list[str]) -> list[str]:
    """Lines that are too long, but for tables and code, which can't be wrapped."""
    return [
        f"{name}:{number}"
        for name in documents(files)
        for number, line in enumerate(without_code((top / name).read_text()).splitlines(), 1)
        if len(line) > LINE_LENGTH and not line.startswith(("|", "    "))
    ]


def unreachable(top: Path, files: list[str]) -> list[str]:
    """Files under docs/ that no document names which can itself be found, beginning with README.md."""
    found, next_ones = set[str](), ["README.md"]
    while next_ones:
        name = next_ones.pop()
        if name in found or not (top / name).is_file():
            continue
        found.add(name)
        if name.endswith(".md"):
            targets = ((top / name).parent / link.partition("#")[0] for link in links((top / name).read_text()))
            next_ones += [str(target.resolve().relative_to(top.resolve())) for target in targets if target.is_file()]
    return [name for name in files if name.startswith("docs/") and name not in found]


CHECKS: list[Check] = [broken_links, long_lines, unreachable]


@pytest.mark.parametrize("check", CHECKS)
def test_documents(check: Check) -> None:
    files = tracked()
    assert "docs/json.md" in files
    assert check(ROOT, files) == []


GOOD = {
    "README.md": "# Top\n[a](docs/a.md#one-thing), [elsewhere](https://example.org)\n",
    "docs/a.md": "# One thing\n[top](../README.md#top)\n| "
    + "x" * 200
    + " |\n```\n[no link](x.md) "
    + "x" * 200
    + "\n```\n",
}


@pytest.mark.parametrize(
    ("check", "planted", "found"),
    [
        (broken_links, {}, []),
        (broken_links, {"docs/a.md": "[b](b.md)"}, ["README.md: docs/a.md#one-thing", "docs/a.md: b.md"]),
        (broken_links, {"docs/a.md": "# One thing\n[a](#two)"}, ["docs/a.md: #two"]),
        (broken_links, {"docs/a.md": "# One thing\n```\n# Two\n```\n[a](#two)"}, ["docs/a.md: #two"]),
        (long_lines, {}, []),
        (long_lines, {"docs/a.md": "a\n```\nb\n```\n" + "x" * 121}, ["docs/a.md:5"]),
        (unreachable, {}, []),
        (unreachable, {"docs/b.md": "[a](a.md)"}, ["docs/b.md"]),
        (unreachable, {"docs/b.svg": ""}, ["docs/b.svg"]),
    ],
)
def test_a_planted_fault_is_found(check: Check, planted: dict[str, str], found: list[str], tmp_path: Path) -> None:
    files = {**GOOD, **planted}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert check(tmp_path, list(files)) == found


# `path/module.py`, and a name in it: `path/module.py` `Class.method`.
_MODULE = re.compile(r"`([\w/]+\.py)`(?:\s+`([\w.]+)`)?")
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def defines(tree: ast.Module, name: str) -> bool:
    """Whether a module has a class or function, or with a dot a class with such a method."""
    body: list[ast.stmt] = tree.body
    for part in name.split("."):
        found = [node for node in body if isinstance(node, _DEFINITIONS) and node.name == part]
        if not found:
            return False
        body = [child for node in found for child in node.body]
    return True


def missing_modules(top: Path, files: list[str]) -> list[str]:
    """Modules, and names in them, that a document has and the source has not.

    A path is from the top, from the package or from the document; a name without a folder may be anywhere.
    """
    missing = []
    for name in documents(files):
        if name == "CHANGELOG.md":
            continue
        for module, defined in _MODULE.findall((top / name).read_text()):
            folders = (top, top / "ksmd_ctl", (top / name).parent)
            found = [folder / module for folder in folders if (folder / module).is_file()]
            if not found and "/" not in module:
                found = [top / file for file in files if Path(file).name == module]
            if not found or (defined and not any(defines(ast.parse(file.read_text()), defined) for file in found)):
                missing.append(f"{name}: {module} {defined}".rstrip())
    return missing


def test_modules_that_documents_name_exist() -> None:
    files = tracked()
    assert len(_MODULE.findall((ROOT / "docs/architecture.md").read_text())) > 40
    assert missing_modules(ROOT, files) == []


def test_a_module_that_does_not_exist_is_found(tmp_path: Path) -> None:
    text = "`a/b.py` `C.d`, `b.py`, `a/b.py` `C.e`, `a/b.py` `D.d`, `a/b.py` `d`, `a/c.py`, `c.py`"
    for name, content in {"x.md": text, "ksmd_ctl/a/b.py": "class C:\n    def d(self) -> None: ...\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    files = ["x.md", "ksmd_ctl/a/b.py"]
    assert missing_modules(tmp_path, files) == [
        "x.md: a/b.py C.e",
        "x.md: a/b.py D.d",
        "x.md: a/b.py d",
        "x.md: a/c.py",
        "x.md: c.py",
    ]


def glossary_words(text: str) -> list[str]:
    """The first column of its table, a word each."""
    cells = re.findall(r"^\| ([^|`]+) \|", text, re.MULTILINE)
    return [word.strip() for cell in cells[1:] for word in cell.split(",") if not cell.startswith("-")]


def test_the_glossary_has_words_that_exist() -> None:
    """At most thirty; each is in a string, a name or a document of the package's."""
    text = (ROOT / "docs/glossary.md").read_text()
    words = glossary_words(text)
    assert 20 < len(words) <= 30
    source = "\n".join((ROOT / name).read_text() for name in tracked("ksmd_ctl/*.py", "ksmd_ctl/**/*.py")).lower()
    assert [word for word in words if not re.search(rf"\b{word.replace(' ', '[ _]')}", source)] == []
