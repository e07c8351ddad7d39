# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever an installed text links to or names is installed, too."""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.building import ROOT

DOCUMENTS = "usr/share/doc/ksmd-ctl"

# A path from the top of the source tree or from where the documents are, which have the same names in both.
_TOPS = "|".join(sorted(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."))
_NAMED = re.compile(rf"(?<![\w/.%-])((?:{_TOPS})/[\w./*-]*[\w*]|[A-Z_]+\.md)")
_ABSOLUTE = re.compile(r"(?<![\w.])/((?:usr/share/(?:doc/)?|etc/)ksmd-ctl(?:/[\w./*-]*[\w*])?)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_ELSEWHERE = re.compile(r"[a-z]+:")

# A file of the kernel's, by its name there.
_KERNELS = {"tools/mm/page-types.c"}


def texts(tree: Path) -> Iterator[tuple[str, str]]:
    """The texts of the package, with their names."""
    for folder, _, names in os.walk(tree / "usr"):
        for name in names:
            path = Path(folder, name)
            # The metadata hold README.md once more.
            if path.is_symlink() or path.suffix in (".png", ".svg") or path.name == "METADATA":
                continue
            if path.suffix == ".gz":
                # roff: what is escaped is meant as it is.
                text = re.sub(r"\\(?:&|(-))", r"\1", gzip.decompress(path.read_bytes()).decode())
            else:
                text = path.read_text()
            yield str(path.relative_to(tree)), text
    yield "etc/ksmd-ctl/ksmd-ctl.toml", (tree / "etc/ksmd-ctl/ksmd-ctl.toml").read_text()


def documents(tree: Path) -> list[Path]:
    return sorted(path for path in (tree / DOCUMENTS).rglob("*.md") if not path.is_symlink())


def there(folder: Path, name: str) -> bool:
    return any(folder.glob(name)) if "*" in name else (folder / name).exists()


def says_that_it_is_the_source(text: str) -> bool:
    return "source tree" in " ".join(text.split()) or "checkout" in text


def sections(text: str) -> Iterator[tuple[str, bool]]:
    """The sections of a document, and whether one, or the document's beginning, speaks of the source tree."""
    # In an example "# " is a prompt.
    text = re.sub(r"```.*?```", lambda example: example[0].replace("\n#", "\n"), text, flags=re.DOTALL)
    parts = re.split(r"^(?=#+ )", text, flags=re.MULTILINE)
    beginning = says_that_it_is_the_source("".join(parts[:2]))
    for part in parts:
        yield part, beginning or says_that_it_is_the_source(part)


def anchors(text: str) -> set[str]:
    """The names that headings get on a page that is made of a document."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_documents_are_there_to_be_read(tree: Path) -> None:
    found = {str(path.relative_to(tree / DOCUMENTS)) for path in documents(tree)}
    assert found == {
        "README.md",
        "SECURITY.md",
        *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
    }
    assert {path.name for path in (tree / DOCUMENTS / "docs").iterdir()} == {
        path.name for path in (ROOT / "docs").iterdir()
    }


def test_every_link_leads_somewhere(tree: Path) -> None:
    broken, found = [], documents(tree)
    assert found
    for document in found:
        for link in _LINK.findall(document.read_text()):
            if _ELSEWHERE.match(link):
                continue
            name, _, anchor = link.partition("#")
            target = document.parent / name if name else document
            if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
                broken.append(f"{document.relative_to(tree)}: {link}")
    assert broken == []


def test_every_file_that_a_text_names_is_there(tree: Path) -> None:
    missing = []
    for name, text in texts(tree):
        for part, of_the_source in sections(text) if name.endswith(".md") else [(text, False)]:
            for found in {*_NAMED.findall(part)} - _KERNELS:
                if not (there(tree / DOCUMENTS, found) or (of_the_source and there(ROOT, found))):
                    missing.append(f"{name}: {found}")
            for found in set(_ABSOLUTE.findall(part)):
                # What is in conf.d is the administrator's.
                if not there(tree, "etc/ksmd-ctl/conf.d" if found.startswith("etc/ksmd-ctl/conf.d/") else found):
                    missing.append(f"{name}: /{found}")
    assert sorted(missing) == []


def test_what_is_looked_for_is_found() -> None:
    text = "see docs/a.md, `tests/x/*.py` and (README.md); not /usr/lib/systemd/system, a/docs/b or x.docs/c."
    assert _NAMED.findall(text) == ["docs/a.md", "tests/x/*.py", "README.md"]
    assert _ABSOLUTE.findall("in /usr/share/doc/ksmd-ctl. And /etc/ksmd-ctl/conf.d/*.toml") == [
        "usr/share/doc/ksmd-ctl",
        "etc/ksmd-ctl/conf.d/*.toml",
    ]
    assert anchors("# Is this kernel's KSM right?\n## merge_across_nodes") == {
        "is-this-kernels-ksm-right",
        "merge_across_nodes",
    }


@pytest.mark.parametrize("name", ["demo.toml", "equal_pages.py"])
def test_the_examples_are_there(tree: Path, name: str) -> None:
    assert (tree / DOCUMENTS / "examples" / name).read_bytes() == (ROOT / "examples" / name).read_bytes()
