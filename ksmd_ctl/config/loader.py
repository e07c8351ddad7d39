# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads the configuration: a main file, then the files of the folder conf.d beside it; later wins, key by key."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ksmd_ctl import tomltext
from ksmd_ctl.codec import dump, encode_fields
from ksmd_ctl.config.domains import (
    DOMAIN_SECTION,
    Domain,
    DomainMode,
    Domains,
    mistakes,
    parse_key,
    parse_name,
)
from ksmd_ctl.config.model import (
    HOUSEKEEPING,
    KNOB_KEYS,
    ORDERED,
    SECTIONS,
    SETTINGS,
    SETTINGS_BY_KEY,
    SETTINGS_BY_NAME,
    STEERED,
    AtStop,
    Config,
    Heal,
    PolicyName,
    Want,
    knob_path,
)
from ksmd_ctl.errors import ConfigError, Problem, did_you_mean
from ksmd_ctl.figures import ranges_text
from ksmd_ctl.host.cpus import parse_cpus
from ksmd_ctl.host.knobs import KNOBS, KSMD_KNOBS, Knob, KnobValue, parse_wanted
from ksmd_ctl.regularfile import read_regular
from ksmd_ctl.tomltext import shown

DEFAULT_PATH = "/etc/ksmd-ctl/ksmd-ctl.toml"

# Enough to tell apart what the hosts of a fleet have.
_DIGEST_DIGITS: Final = 12
# A configuration with all settings and explanations is far smaller.
_MOST_BYTES = 1 << 20

# The policies that have a table, or a setting, of their own.
_POLICY_OF: Final = {
    setting.name: PolicyName(setting.section)
    for setting in SETTINGS
    if setting.section in (PolicyName.ADAPTIVE, PolicyName.KERNEL, PolicyName.KSMTUNED, PolicyName.KUBEVIRT)
} | {"heal_advisor": PolicyName.KERNEL}
_RECOVERY: Final = ("heal_smart_scan", "heal_swapin", "heal_zero_pages", "heal_twins")
_DOMAIN_SETTINGS: Final = ("domains_mode", "domains_unmatched", "domains_on_violation")
# What separates domains by their nodes: a tree a node, and no zero page, which is one for all nodes.
_SEPARATING: Final = (Knob.MERGE_ACROSS_NODES, Knob.USE_ZERO_PAGES)
_NO_POLICY: Final = 'no file sets policy, and the default is "observe", which writes no knob'


def load(path: str | None = None) -> Config:
    """The configuration in `path` and in the folder ``conf.d`` beside it.

    The default path may be missing; then the defaults hold.

    :raises ConfigError: with every problem, each with file and key
    """
    main = Path(path or DEFAULT_PATH)
    reading = _Reading()
    if path is not None or main.exists():
        reading.file(main)
    folder = main.parent / "conf.d"
    try:
        # Not glob, which reports no error if the folder can't be read.
        parts = sorted(part for part in folder.iterdir() if part.suffix == ".toml" and not part.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        parts = []
    except OSError as error:
        parts = []
        reading.problem(folder, "", f"can't be read: {error.strerror}")
    for part in parts:
        reading.file(part)
    return reading.config()


class _Reading:
    def __init__(self) -> None:
        self.problems: list[Problem] = []
        defaults = Config()
        self.values: dict[str, Any] = {name: getattr(defaults, name) for name in SETTINGS_BY_NAME}
        self.origins: dict[str, str] = {}
        self.knobs: dict[Knob, Want] = {}
        self.tables: dict[str, dict[str, Any]] = {}
        self.files: list[str] = []
        self.wrong: set[str] = set()

    def problem(self, path: Path | str, key: str, text: str) -> None:
        self.problems.append(Problem(str(path), key if key.isprintable() else ascii(key)[1:-1], text))

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
                self.problem(path, key, f"must be a table: [{key}]")
            else:
                for inner, inner_value in value.items():
                    if key == DOMAIN_SECTION and isinstance(inner_value, dict) and (key, inner) not in SETTINGS_BY_KEY:
                        self.domain(path, inner, inner_value)
                    else:
                        self.setting(path, key, inner, inner_value)

    def setting(self, path: Path, section: str, key: str, value: object) -> None:
        name = f"{section}.{key}" if section else key
        try:
            if knob := KNOB_KEYS.get(section, {}).get(key):
                self.knobs[knob] = _parse_knob(knob, value, str(path))
            elif (section, key) in SETTINGS_BY_KEY:
                setting = SETTINGS_BY_KEY[section, key]
                self.values[setting.name] = setting.type.parse(value)
                self.origins[setting.name] = str(path)
            else:
                self.problem(path, name, f"unknown setting{_meant(section, key)}")
        except ValueError as error:
            self.wrong.add(name)
            self.problem(path, name, str(error))

    def domain(self, path: Path, name: str, table: dict[str, object]) -> None:
        """Read a table of a domain; as with settings, later files win key by key."""
        where = f"{DOMAIN_SECTION}.{name}"
        try:
            parse_name(name)
        except ValueError as error:
            self.problem(path, where, str(error))
            return
        found = self.tables.setdefault(name, {"name": name, "origin": str(path)})
        for key, value in table.items():
            try:
                found[key] = parse_key(key, value)
            except ValueError as error:
                self.problem(path, f"{where}.{key}", str(error))

    def config(self) -> Config:
        pages, advisor = self.knobs.get(Knob.PAGES_TO_SCAN), self.knobs.get(Knob.ADVISOR_MODE)
        if pages and advisor and advisor.value == "scan-time":
            self.problem(
                pages.origin,
                knob_path(Knob.PAGES_TO_SCAN),
                f'the kernel refuses it while advisor_mode is "scan-time" ({advisor.origin}): leave one of them out',
            )
        self.contradictions()
        domains = self.domains()
        if self.values["policy"] == "fixed" and not self.knobs and not self.problems:
            self.problem(
                self.origins["policy"], "policy", '"fixed" needs at least one knob in [knobs] or key in [ksmd]'
            )
        if "policy" not in self.wrong:
            self.find_useless()
        if self.problems:
            raise ConfigError(
                "reading the configuration",
                self.problems,
                hint="`ksmd-ctl daemon --check-config` checks it without starting anything",
            )
        unused = tuple(f"{name} ({file})" for file, name, _ in self.unused())
        config = Config(knobs=self.knobs, files=tuple(self.files), unused=unused, domains=domains, **self.values)
        return replace(config, digest=_digest(config))

    def contradictions(self) -> None:
        """Find settings that contradict each other."""
        for low, high in ORDERED:
            if self.values[low] > self.values[high]:
                origin = self.origins.get(low) or self.origins[high]
                text = f"{self.values[low]:g} is greater than {_path(high)}, which is {self.values[high]:g}"
                self.problem(origin, _path(low), text)
        policy = PolicyName(self.values["policy"])
        for knob, want in self.knobs.items():
            if policy.steers and knob in STEERED:
                self.problem(
                    want.origin,
                    knob_path(knob),
                    f'is reserved under policy = "{policy}" ({self.origins["policy"]}): leave one of them out',
                )

    def domains(self) -> Domains | None:
        """The domains that were read, without their mistakes, and what they hold among the knobs."""
        named = [self.origins[name] for name in _DOMAIN_SETTINGS if name in self.origins]
        named += [table["origin"] for table in self.tables.values()]
        if not named or any(problem.key.startswith(f"{DOMAIN_SECTION}.") for problem in self.problems):
            return None
        tables = tuple(Domain(**table) for table in self.tables.values())
        mode, unmatched, on_violation = (self.values[name] for name in _DOMAIN_SETTINGS)
        domains = Domains(tables, mode, unmatched, on_violation, named[0])
        for file, key, text in mistakes(domains):
            self.problem(self.origins.get(f"domains_{key}", file), f"{DOMAIN_SECTION}.{key}", text)
        if domains.mode is DomainMode.NODES and PolicyName(self.values["policy"]).writes:
            for knob in _SEPARATING:
                # Where a kernel lacks it, the verdicts say so.
                want = self.knobs.setdefault(knob, Want(0, True, f"{domains.origin}: domains.mode"))
                if want.value != 0:
                    text = f'domains.mode = "nodes" ({domains.origin}) needs 0: leave one of them out'
                    self.problem(want.origin, knob_path(knob), text)
        return domains

    def find_useless(self) -> None:
        """Find settings that read as if they had an effect, and have none."""
        policy = PolicyName(self.values["policy"])
        why = (
            f'policy = "{policy}" ({self.origins["policy"]}) writes no knob' if "policy" in self.origins else _NO_POLICY
        )
        recovery = [name for name in _RECOVERY if self.values[name] in (Heal.ON, True)]
        if not policy.writes:
            tables = [(want.origin, knob_path(knob).partition(".")[0]) for knob, want in self.knobs.items()]
            for file, table in dict.fromkeys(tables):
                self.problem(file, table, f'has no effect: {why}; policy = "fixed" holds what [{table}] names')
            for name in recovery:
                self.useless(name, why)
            if self.values["at_stop"] is AtStop.STOP_SCANNING:
                self.useless("at_stop", why)
            if self.values["domains_mode"] is DomainMode.NODES:
                self.useless("domains_mode", why)
        if self.values["switch_keep"] and not self.values["switch_allow"]:
            self.useless("switch_keep", "switch.allow = false: the service may switch nothing")
        elif self.values["switch_keep"] and not self.values["census_cpu_share"]:
            self.useless("switch_keep", f"{self.no_census()} switches the surveys off that it needs")
        if "policy" not in self.origins:
            for file, table, owner in self.unused():
                self.problem(file, table, f'has no effect: {why}; policy = "{owner}" uses it')
        if policy.writes:
            self.find_useless_recovery(recovery)
            if self.values["domains_mode"] is DomainMode.NODES and not self.values["census_cpu_share"]:
                self.useless("domains_mode", f"{self.no_census()} switches the audits off that it needs")

    def find_useless_recovery(self, names: Iterable[str]) -> None:
        """Find kinds of recovery that other settings prevent."""
        for name in names:
            if off := self.held(Knob.RUN, 0):
                self.useless(name, f"{off} keeps KSM off")
            if name == "heal_smart_scan" and (off := self.held(Knob.SMART_SCAN, 0)):
                self.useless(name, f"{off} holds it off")
            if name == "heal_swapin" and (advisor := self.held(Knob.ADVISOR_MODE, "scan-time")):
                self.useless(name, f"{advisor} leaves speed to the kernel")
            if name == "heal_zero_pages" and (off := self.held(Knob.USE_ZERO_PAGES, 0)):
                self.useless(name, f"{off} holds it off")
            if name == "heal_twins" and not self.values["census_cpu_share"]:
                self.useless(name, f"{self.no_census()} switches the surveys off that it needs")

    def no_census(self) -> str:
        """The words for surveys that are switched off."""
        return f"census.cpu_share = 0 ({self.origins['census_cpu_share']})"

    def held(self, knob: Knob, value: object) -> str:
        """The words for a knob that is held at a value, empty if it is not."""
        want = self.knobs.get(knob)
        return "" if want is None or want.value != value else f"{knob_path(knob)} = {value} ({want.origin})"

    def useless(self, name: str, why: str) -> None:
        value = self.values[name]
        said = f'"{value}"' if isinstance(value, AtStop | DomainMode) else "true"
        self.problem(self.origins[name], _path(name), f"{said} has no effect: {why}")

    def unused(self) -> Iterable[tuple[str, str, PolicyName]]:
        """Tables and keys that only other policies use: file, table or key, and whose it is.

        They may be set before the policy is chosen, but not without any policy.
        """
        found = (
            (self.origins[name], _path(name) if name == "heal_advisor" else owner.value, owner)
            for name, owner in _POLICY_OF.items()
            if name in self.origins and owner != self.values["policy"]
        )
        return dict.fromkeys(found)


def _meant(section: str, key: str) -> str:
    """A suggestion for an unknown key."""
    for other, known in [*SETTINGS_BY_KEY, *((table, key) for table, keys in KNOB_KEYS.items() for key in keys)]:
        if known == key:
            return f": it belongs under [{other}]" if other else ": it belongs at the top, before the first table"
    here = [known for known_section, known in SETTINGS_BY_KEY if known_section == section]
    here += KNOB_KEYS.get(section, {})
    here += [] if section else filter(None, SECTIONS)
    return did_you_mean(key, here)


def _path(name: str) -> str:
    """A setting as messages name it: ``TABLE.KEY``."""
    return SETTINGS_BY_NAME[name].path


def _parse_knob(knob: Knob, value: object, origin: str) -> Want:
    """A knob of ``[knobs]``: VALUE, or ``{ value = VALUE, optional = true }``."""
    optional = False
    if isinstance(value, dict):
        unknown = [key for key in value if key not in ("value", "optional")]
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}: only value and optional are allowed")
        if "value" not in value:
            raise ValueError("has no value")
        if not isinstance(value.get("optional", False), bool):
            raise ValueError(f"optional is true or false, not {shown(value['optional'])}")
        optional = value.get("optional", False)
        value = value["value"]
    if knob is Knob.KSMD_CPUS and value == HOUSEKEEPING:
        return Want(HOUSEKEEPING, True, origin)
    wanted = _knob_value(knob, value)
    if knob is Knob.RUN and wanted == 2:
        raise ValueError("2 un-merges everything: only 0 and 1 can be held")
    # Where ksmd is not to be seen, the knobs can be held all the same.
    return Want(wanted, optional or knob in KSMD_KNOBS, origin)


def _knob_value(knob: Knob, value: object) -> KnobValue:
    # In a file a number in quotes is a text, other than on a command line.
    spec = KNOBS[knob]
    if spec.cpus:
        try:
            return ranges_text(parse_cpus(value))
        except ValueError as error:
            raise ValueError(f"{error}; or {HOUSEKEEPING!r}") from error
    if spec.choices:
        if value not in spec.choices:
            raise ValueError(f"{shown(value)} is not one of {', '.join(spec.choices)}")
    elif not isinstance(value, int) or (isinstance(value, bool) and spec.maximum != 1):
        number = isinstance(value, str) and value.isascii() and value.isdigit()
        raise ValueError(f"{shown(value)} is not a whole number" + (": write it without quotes" if number else ""))
    return parse_wanted(knob, value)


def _digest(config: Config) -> str:
    """The same for two configurations with the same settings, wherever their files are and whatever comments say."""
    knobs = {knob: replace(want, origin="") for knob, want in sorted(config.knobs.items())}
    domains = config.domains and replace(
        config.domains, origin="", domains=tuple(replace(one, origin="") for one in config.domains.domains)
    )
    settings = replace(config, knobs=knobs, domains=domains, files=(), unused=())
    return hashlib.sha256(dump(encode_fields(settings))).hexdigest()[:_DIGEST_DIGITS]


def check_knobs(config: Config, lacking: Container[Knob]) -> list[Problem]:
    """Problems with a configuration on a host that lacks some knobs, except optional ones."""
    return [
        Problem(
            want.origin,
            knob_path(knob),
            f"this kernel has no {knob}; to allow that, write {{ value = {shown(want.value)}, optional = true }}",
        )
        for knob, want in config.knobs.items()
        if knob in lacking and not want.optional
    ]


def not_reloadable(before: Config, after: Config) -> Iterable[str]:
    """The settings that differ and take effect only at the next start."""
    return [
        setting.name
        for setting in SETTINGS
        if not setting.reloadable and getattr(before, setting.name) != getattr(after, setting.name)
    ]
