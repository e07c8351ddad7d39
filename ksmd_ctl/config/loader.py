# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads the configuration: a main file, then the files of the folder conf.d beside it; later wins, key by key."""

from __future__ import annotations

from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from ksmd_ctl import tomltext
from ksmd_ctl.config.effect import unused, without_effect
from ksmd_ctl.config.model import STEERED, Config, PolicyName, Want
from ksmd_ctl.config.settings import KNOB_SECTION, ORDERED, SECTIONS, SETTINGS, SETTINGS_BY_KEY, parse_knob
from ksmd_ctl.errors import ConfigError, Problem, did_you_mean
from ksmd_ctl.knobs import KNOBS, Knob
from ksmd_ctl.regularfile import read_regular

__all__ = ["DEFAULT_PATH", "check_knobs", "defaults", "load", "not_reloadable"]

DEFAULT_PATH = "/etc/ksmd-ctl/ksmd-ctl.toml"

# Far more than all settings with their explanations take.
_MOST_BYTES = 1 << 20


def load(path: str | None = None) -> Config:
    """The configuration in `path` and in the folder ``conf.d`` beside it.

    Without a path, the default one, which may be missing: then all is at its default.

    :raises ConfigError: with every problem that there is, file and key
    """
    main = Path(path or DEFAULT_PATH)
    reading = _Reading()
    if path is not None or main.exists():
        reading.file(main)
    folder = main.parent / "conf.d"
    try:
        # iterdir and not glob, which is silent about a folder that can't be read.
        parts = sorted(part for part in folder.iterdir() if part.suffix == ".toml" and not part.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        parts = []
    except OSError as error:
        parts = []
        reading.problem(folder, "", f"can't be read: {error.strerror}")
    for part in parts:
        reading.file(part)
    return reading.config()


def defaults() -> Config:
    """What holds without any file."""
    return _Reading().config()


class _Reading:
    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.values: dict[str, Any] = {setting.name: setting.type.parse(setting.default) for setting in SETTINGS}
        self.origins: dict[str, str] = {}
        self.knobs: dict[Knob, Want] = {}
        self.files: list[str] = []
        self.wrong: set[str] = set()

    def problem(self, path: Path | str, key: str, text: str) -> None:
        self.problems.append(Problem(str(path), key, text))

    def file(self, path: Path) -> None:
        self.files.append(str(path))
        try:
            tables = tomltext.parse(read_regular(path, _MOST_BYTES, follow=True))
        except OSError as error:
            self.problem(path, "", f"can't be read: {error.strerror}")
            return
        except ValueError as error:
            self.problem(path, "", str(error))
            return
        for key, value in tables.items():
            if key not in SECTIONS:
                self.setting(path, "", key, value)
            elif not isinstance(value, dict):
                self.problem(path, key, f"is a table: [{key}]")
            else:
                for inner, inner_value in value.items():
                    self.setting(path, key, inner, inner_value)

    def setting(self, path: Path, section: str, key: str, value: object) -> None:
        name = f"{section}.{key}" if section else key
        try:
            if section == KNOB_SECTION and key in KNOBS:
                self.knobs[Knob(key)] = parse_knob(Knob(key), value, str(path))
            elif (section, key) in SETTINGS_BY_KEY:
                setting = SETTINGS_BY_KEY[section, key]
                self.values[setting.name] = setting.type.parse(value)
                self.origins[setting.name] = str(path)
            else:
                self.problem(path, name, f"unknown setting{_meant(section, key)}")
        except ValueError as error:
            self.wrong.add(name)
            self.problem(path, name, str(error))

    def config(self) -> Config:
        pages, advisor = self.knobs.get(Knob.PAGES_TO_SCAN), self.knobs.get(Knob.ADVISOR_MODE)
        if pages and advisor and advisor.value == "scan-time":
            self.problem(
                pages.origin,
                f"{KNOB_SECTION}.{Knob.PAGES_TO_SCAN}",
                f'the kernel refuses it while advisor_mode is "scan-time" ({advisor.origin}): leave one of them out',
            )
        self.contradictions()
        if self.values["policy"] == "fixed" and not self.knobs and not self.problems:
            self.problem(self.origins["policy"], "policy", '"fixed" holds what [knobs] names, and it names nothing')
        if "policy" not in self.wrong:
            self.problems += without_effect(self.values, self.origins, self.knobs)
        if self.problems:
            raise ConfigError(
                "reading the configuration",
                self.problems,
                hint="`ksmd-ctl daemon --check-config` checks it without starting anything",
            )
        idle = unused(PolicyName(self.values["policy"]), self.origins)
        return Config(
            knobs=self.knobs,
            files=tuple(self.files),
            unused=tuple(f"{name} ({file})" for file, name, _ in idle),
            **self.values,
        )

    def contradictions(self) -> None:
        """Settings that are good by themselves and can't hold together."""
        names = {setting.name: f"{setting.section}.{setting.key}" for setting in SETTINGS}
        for low, high in ORDERED:
            if self.values[low] > self.values[high]:
                origin = self.origins.get(low) or self.origins[high]
                text = f"{self.values[low]:g} is more than {names[high]}, {self.values[high]:g}: contradictory"
                self.problem(origin, names[low], text)
        policy = PolicyName(self.values["policy"])
        for knob, want in self.knobs.items():
            if policy.steers and knob in STEERED:
                self.problem(
                    want.origin,
                    f"{KNOB_SECTION}.{knob}",
                    f'policy = "{policy}" ({self.origins["policy"]}) steers it: contradictory, leave one of them out',
                )


def _meant(section: str, key: str) -> str:
    """What somebody who wrote an unknown key may have had in mind."""
    for other, known in [*SETTINGS_BY_KEY, *((KNOB_SECTION, knob.value) for knob in Knob)]:
        if known == key:
            return f": it belongs under [{other}]" if other else ": it belongs at the top, before the first table"
    here = [known for known_section, known in SETTINGS_BY_KEY if known_section == section]
    here += [*Knob] if section == KNOB_SECTION else []
    here += [] if section else filter(None, SECTIONS)
    return did_you_mean(key, here)


def check_knobs(config: Config, lacking: Container[Knob]) -> list[Problem]:
    """Problems with a configuration on a host that lacks some knobs; none with those marked as optional."""
    return [
        Problem(
            want.origin,
            f"{KNOB_SECTION}.{knob}",
            f"this kernel has no {knob}; {{ value = {_toml(want.value)}, optional = true }} makes do without it",
        )
        for knob, want in config.knobs.items()
        if knob in lacking and not want.optional
    ]


def not_reloadable(before: Config, after: Config) -> Iterable[str]:
    """The keys that differ and only take effect at the next start."""
    return [
        setting.name
        for setting in SETTINGS
        if not setting.reloadable and getattr(before, setting.name) != getattr(after, setting.name)
    ]


def _toml(value: int | str) -> str:
    return str(value) if isinstance(value, int) else f'"{value}"'
