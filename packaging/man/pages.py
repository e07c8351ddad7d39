# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the manual pages:   python3 packaging/man/pages.py OUTDIR

The prose is in scdoc files here. What the program knows by itself is made from it, so that the pages can't lag: the
commands and their options from the parser (``@COMMANDS@``), the settings from their table (``@SETTINGS@``).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
# So that it works in a checkout as in a package build, neither of which has the package installed.
sys.path.insert(0, str(HERE.parents[1]))

from sample import SECTION_TEXTS, domain_help, knob_help  # noqa: E402

from ksmd_ctl.cli.main import COMMANDS, make_parser  # noqa: E402
from ksmd_ctl.config.domains import DOMAIN_KEYS, DOMAIN_SECTION  # noqa: E402
from ksmd_ctl.config.model import KNOB_KEYS, SECTIONS, SETTINGS  # noqa: E402

__all__ = ["commands", "escape", "pages", "settings", "source"]


def escape(text: str) -> str:
    """Text as scdoc takes it literally."""
    return re.sub(r"([\\*_`<>#\[\]|~.])", r"\\\1", text)


def commands() -> str:
    """A section a command, from the parser; those without a help are no commands for people."""
    parser = make_parser(COMMANDS)
    lines: list[str] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for shown in action._choices_actions:
                lines += _command(shown.dest, action.choices[shown.dest])
    return "\n".join(lines).rstrip("\n")


def _command(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## {name.upper()}"
    yield ""
    words = " ".join(_usage(action) for action in parser._actions if _shown(action))
    yield f"*ksmd-ctl {name}* {words}"
    yield ""
    yield _sentence(parser.description or "")
    yield ""
    for action in parser._actions:
        if _shown(action):
            yield _option(action)
            yield f"\t{_sentence(_help(action))}"
            yield ""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for shown in action._choices_actions:
                yield from _command(f"{name} {shown.dest}", action.choices[shown.dest])


def _shown(action: argparse.Action) -> bool:
    return action.help != argparse.SUPPRESS and not isinstance(
        action, argparse._HelpAction | argparse._SubParsersAction
    )


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices is not None and action.metavar is None:
        return "|".join(escape(str(choice)) for choice in action.choices)
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return "|".join(f"_{escape(part)}_" for part in metavar.split("|"))


def _usage(action: argparse.Action) -> str:
    value = _value(action)
    if not action.option_strings:
        many = "..." if action.nargs in ("*", "+") else ""
        return f"{value}{many}" if action.nargs in (None, "+") else f"\\[{value}{many}\\]"
    said = f"*{escape(action.option_strings[0])}*" + (f" {value}" if value else "")
    return said if action.required else f"\\[{said}\\]"


def _option(action: argparse.Action) -> str:
    value = _value(action)
    if not action.option_strings:
        return value
    return ", ".join(f"*{escape(name)}*" for name in action.option_strings) + (f" {value}" if value else "")


def _help(action: argparse.Action) -> str:
    return (action.help or "") % {**vars(action), "prog": "ksmd-ctl"}


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return escape(text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")) if text else ""


def settings() -> str:
    """A section a table of the configuration, from the table of settings."""
    lines: list[str] = []
    for section in SECTIONS:
        # scdoc takes a heading as it is.
        lines += [f"## [{section}]" if section else "## AT THE TOP, BEFORE ANY TABLE", ""]
        if section:
            lines += [escape(SECTION_TEXTS[section]), ""]
        for key, knob in KNOB_KEYS.get(section, {}).items():
            lines += [f"*{escape(key)}*", *_paragraphs(knob_help(knob)), ""]
        for setting in SETTINGS:
            if setting.section == section:
                texts = [setting.help, *setting.type.lines, f"  default: {_toml(setting.default)}"]
                if not setting.reloadable:
                    texts.append("  takes effect at the next start, not on a reload")
                lines += [f"*{escape(setting.key)}*", *_paragraphs(texts), ""]
        if section == DOMAIN_SECTION:
            lines += [f"## [{DOMAIN_SECTION}.NAME]", "", "One table a domain.", ""]
            for name, domain_key in DOMAIN_KEYS.items():
                texts = [*domain_help(domain_key), f"  example: {_toml(domain_key.example)}"]
                lines += [f"*{escape(name)}*", *_paragraphs(texts), ""]
    return "\n".join(lines).rstrip("\n")


def _paragraphs(texts: list[str] | tuple[str, ...]) -> Iterator[str]:
    """One paragraph of prose, and a line each for what hangs in."""
    for index, text in enumerate(texts):
        said = escape(" ".join(text.split()))
        if text.startswith("  "):
            yield f"\t- {said}"
        else:
            if index:
                yield ""
            yield f"\t{said}"
            if index + 1 < len(texts) and texts[index + 1].startswith("  "):
                yield ""


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def source(page: Path) -> str:
    """A page's scdoc text with what is generated in its place."""
    text = page.read_text(encoding="utf-8")
    # The first line is the licence's, which scdoc would take for a heading.
    text = re.sub(r"\A; .*\n", "", text)
    for mark, made in (("@COMMANDS@", commands), ("@SETTINGS@", settings)):
        if f"\n{mark}\n" in text:
            text = text.replace(f"\n{mark}\n", f"\n{made()}\n")
    return text


def pages() -> list[Path]:
    """The sources."""
    return sorted(HERE.glob("*.scd"))


def main() -> None:
    """Make all pages."""
    parser = argparse.ArgumentParser(description="Makes the manual pages.")
    parser.add_argument("folder", type=Path, help="where they go; it is created")
    out: Path = parser.parse_args().folder
    out.mkdir(parents=True, exist_ok=True)
    for page in pages():
        made = subprocess.run(["scdoc"], input=source(page).encode(), stdout=subprocess.PIPE, check=True)
        (out / page.stem).write_bytes(made.stdout)


if __name__ == "__main__":
    main()
