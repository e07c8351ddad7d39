# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration: what is read, what wins, and that every problem is told, with file and key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksmd_ctl.config.loader import check_knobs, load, not_reloadable
from ksmd_ctl.config.model import AtStop, OnDrift, PolicyName, Want
from ksmd_ctl.config.values import parse_address
from ksmd_ctl.errors import ConfigError, ExitCode
from ksmd_ctl.host.knobs import Knob


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def problems(path: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.exit_code == ExitCode.USAGE
    return [str(problem) for problem in caught.value.problems]


def test_an_empty_file_is_the_packaged_default(tmp_path: Path) -> None:
    config = load(write(tmp_path / "ksmd-ctl.toml", ""))
    assert (config.policy, config.at_stop, config.on_drift) == (PolicyName.OBSERVE, AtStop.RESTORE, OnDrift.ENFORCE)
    assert config.sample_interval == 1.0
    assert config.metrics_listen.startswith("127.0.0.1:")
    assert config.knobs == {}


def test_the_digest_is_that_of_the_settings_alone(tmp_path: Path) -> None:
    text = 'policy = "fixed"\n[knobs]\nrun = 1\npages_to_scan = 100\n[domains.gold]\nslices = ["gold.slice"]\n'
    one = load(write(tmp_path / "one.toml", text)).digest
    other = "# as before\n[knobs]\npages_to_scan = 100\nrun = 1\n[domains.gold]\nslices = [ 'gold.slice' ]\n"
    write(tmp_path / "other/conf.d/10.toml", other)
    assert load(write(tmp_path / "other/main.toml", 'policy = "fixed"\n')).digest == one
    assert len(one) == 12
    for change in (("run = 1", "run = 0"), ("gold.slice", "silver.slice"), ("domains.gold", "domains.silver")):
        assert load(write(tmp_path / "changed.toml", text.replace(*change))).digest != one
    assert load(write(tmp_path / "more.toml", f'{text}[service]\nat_stop = "leave"\n')).digest != one


def test_later_files_win_key_by_key(tmp_path: Path) -> None:
    main = write(
        tmp_path / "main.toml",
        'policy = "fixed"\n[knobs]\nrun = 1\npages_to_scan = 100\n[service]\nat_stop = "leave"\n',
    )
    second = write(tmp_path / "conf.d/20.toml", "[knobs]\npages_to_scan = 300\n")
    first = write(tmp_path / "conf.d/10.toml", "[knobs]\npages_to_scan = 200\nsleep_millisecs = 5\n")
    write(tmp_path / "conf.d/30.conf", "this is no TOML")
    write(tmp_path / "conf.d/.40.toml", "this is no TOML")
    config = load(main)
    assert {knob: want.value for knob, want in config.knobs.items()} == {
        Knob.RUN: 1,
        Knob.PAGES_TO_SCAN: 300,
        Knob.SLEEP_MILLISECS: 5,
    }
    assert config.knobs[Knob.PAGES_TO_SCAN].origin == second
    assert config.at_stop is AtStop.LEAVE
    assert config.files == (main, first, second)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    main = write(
        tmp_path / "main.toml",
        'policy = "hold"\nsample_interval = 2\n[knobs]\nrun = 2\npages_to_scna = 1\nmax_page_sharing = 1\n'
        'sleep_millisecs = "many"\n[service]\nmetrics_listen = "9100"\nsocket = "run"\n[servic]\nx = 1\n',
    )
    part = write(tmp_path / "conf.d/a.toml", "[knobs]\nuse_zero_pages = 3\n")
    broken = write(tmp_path / "conf.d/b.toml", "[knobs\n")
    found = problems(main)
    expected = [
        f"{main}: policy: 'hold' is not one of observe, fixed, adaptive, kernel, ksmtuned, kubevirt",
        f"{main}: sample_interval: unknown setting: it belongs under [service]",
        f"{main}: knobs.run: 2 un-merges everything: only 0 and 1 can be held",
        f"{main}: knobs.pages_to_scna: unknown setting; did you mean pages_to_scan?",
        f"{main}: knobs.max_page_sharing: 1 is not between 2 and 2147483647",
        f"{main}: knobs.sleep_millisecs: 'many' is not a whole number",
        f"{main}: service.metrics_listen: '9100' is not ADDRESS:PORT (an IPv6 address stands in brackets)",
        f"{main}: service.socket: 'run' is not an absolute path",
        f"{main}: servic: unknown setting; did you mean service?",
        f"{part}: knobs.use_zero_pages: 3 is not between 0 and 1",
    ]
    assert found[: len(expected)] == expected
    assert [text.startswith(f"{broken}: is not TOML") for text in found[len(expected) :]] == [True]


@pytest.mark.parametrize("text", ["policy = " + "9" * 5000, "policy" + ".a" * 5000 + " = 1", "run = 0x" + "f" * 5000])
def test_what_no_reader_of_toml_should_have_to_read_is_a_problem_of_the_file(tmp_path: Path, text: str) -> None:
    [problem] = problems(write(tmp_path / "main.toml", text))
    assert problem.startswith(f"{tmp_path}/main.toml: is ")


def test_a_problem_is_no_longer_than_one_wants_to_read(tmp_path: Path) -> None:
    path = write(tmp_path / "main.toml", f"policy = '{'x' * 5000}'\n{'y' * 5000} = 1\n")
    first, second = problems(path)
    assert first.startswith(f"{path}: policy: 'xxx")
    assert "is not one of observe, fixed" in first
    assert len(first) + len(second) < 2000


def test_a_named_file_must_be_there(tmp_path: Path) -> None:
    assert problems(str(tmp_path / "none.toml")) == [f"{tmp_path}/none.toml: can't be read: No such file or directory"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("{ value = 1, optional = 1 }", "optional is true or false, not 1"),
        ("{ optional = true }", "has no value"),
        ("{ value = 1, default = 2 }", "unknown key 'default'"),
        ("-1", "-1 is not between 0 and 1"),
        ("1.0", "1.0 is not a whole number"),
        ("[1, true]", "[1, true] is not a whole number"),
        ('"1"', "'1' is not a whole number: write it without quotes"),
        ('{ value = "0" }', "'0' is not a whole number: write it without quotes"),
        ("1979-05-27", "1979-05-27 is not a whole number"),
    ],
)
def test_knob_forms_that_are_none(tmp_path: Path, value: str, says: str) -> None:
    (problem,) = problems(write(tmp_path / "main.toml", f"policy = 'fixed'\n[knobs]\nsmart_scan = {value}\n"))
    assert says in problem


def test_optional_knobs_may_be_lacking(tmp_path: Path) -> None:
    text = 'policy = "fixed"\n[knobs]\nsmart_scan = { value = 0, optional = true }\nadvisor_mode = "none"\n'
    config = load(write(tmp_path / "main.toml", text))
    assert config.knobs[Knob.SMART_SCAN] == Want(0, True, str(tmp_path / "main.toml"))
    lacking = {Knob.SMART_SCAN, Knob.ADVISOR_MODE, Knob.RUN}
    assert [problem.key for problem in check_knobs(config, lacking)] == ["knobs.advisor_mode"]


def test_what_the_kernel_would_refuse_together_is_a_problem(tmp_path: Path) -> None:
    main = write(tmp_path / "main.toml", 'policy = "fixed"\n[knobs]\npages_to_scan = 5\n')
    write(tmp_path / "conf.d/a.toml", '[knobs]\nadvisor_mode = "scan-time"\n')
    (problem,) = problems(main)
    assert problem.startswith(f"{main}: knobs.pages_to_scan: the kernel refuses it while")


def test_fixed_without_knobs_is_a_problem(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path / "main.toml", 'policy = "fixed"\n'))
    assert "needs at least one knob" in problem


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1", "true", '"1"', "3601"])
def test_intervals_that_are_none(tmp_path: Path, value: str) -> None:
    (problem,) = problems(write(tmp_path / "main.toml", f"[service]\nsample_interval = {value}\n"))
    assert "service.sample_interval" in problem


def test_what_takes_a_restart(tmp_path: Path) -> None:
    before = load(write(tmp_path / "main.toml", ""))
    after = load(write(tmp_path / "main.toml", '[service]\nsocket = "/x"\nat_stop = "leave"\n'))
    assert list(not_reloadable(before, after)) == ["socket"]


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:1", ("127.0.0.1", 1)), ("[::1]:65535", ("::1", 65535)), ("localhost:0", ("localhost", 0))],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", ":1", "127.0.0.1", "::1:80", "h:65536", "h:-1", "h:٣", "h:1_0"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_address(text)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_file_is_read_or_has_problems(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "main.toml"
    path.write_bytes(content)
    try:
        config = load(str(path))
    except ConfigError as error:
        told = [(problem.path, bool(problem.text)) for problem in error.problems]
    else:
        told = []
        assert config.files == (str(path),)
    assert set(told) <= {(str(path), True)}


@pytest.mark.parametrize("policy", ["adaptive", "kernel", "ksmtuned", "kubevirt"])
def test_a_knob_that_the_policy_steers_cant_be_named(tmp_path: Path, policy: str) -> None:
    main = write(tmp_path / "c.toml", f'policy = "{policy}"\n[knobs]\npages_to_scan = 100\nuse_zero_pages = 1\n')
    assert problems(main) == [
        f'{main}: knobs.pages_to_scan: is reserved under policy = "{policy}" ({main}): leave one of them out'
    ]
    assert load(write(tmp_path / "d.toml", f'policy = "{policy}"\nknobs.use_zero_pages = 1\n')).policy == policy


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("knobs.pages_to_scan = true", "true is not a whole number"),
        ("knobs.pages_to_scan = '1000'", "'1000' is not a whole number: write it without quotes"),
        ("knobs.advisor_mode = false", "false is not one of none, scan-time"),
        ("adaptive.max_cpu = true", "true is not a number"),
        ("service.sample_interval = true", "true is not a number of seconds"),
        ("limits.floor_bytes = true", "true is not a whole number of bytes"),
        ("limits.floor_bytes = 16777215", "16777215 is not between 16777216 and 1125899906842624 bytes"),
        ("service.at_stop = [true, {}]", "[true, {}] is not one of restore, leave, stop-scanning"),
    ],
)
def test_a_value_is_shown_as_the_file_has_it(tmp_path: Path, line: str, says: str) -> None:
    main = write(tmp_path / "c.toml", f"policy = 'fixed'\nknobs.run = 1\n{line}\n")
    assert problems(main) == [f"{main}: {line.partition(' ')[0]}: {says}"]


# What says "nothing is written" where somebody wrote down what is to be written.
NO_POLICY = 'no file sets policy, and the default is "observe", which writes no knob'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[knobs]\nrun = 1\npages_to_scan = 9",
            ['knobs: has no effect: {no}; policy = "fixed" holds what [knobs] names'],
        ),
        ("[adaptive]\nmax_cpu = 0.5", ['adaptive: has no effect: {no}; policy = "adaptive" uses it']),
        (
            "[kernel]\nmax_cpu = 0.5\nmin_pages_to_scan = 5\n[ksmtuned]\ninterval = 5",
            [
                'kernel: has no effect: {no}; policy = "kernel" uses it',
                'ksmtuned: has no effect: {no}; policy = "ksmtuned" uses it',
            ],
        ),
        ("[kubevirt]\npages_decay = -300", ['kubevirt: has no effect: {no}; policy = "kubevirt" uses it']),
        ("[healing]\nadvisor = true", ['healing.advisor: has no effect: {no}; policy = "kernel" uses it']),
        ("[healing]\nsmart_scan = true", ["healing.smart_scan: true has no effect: {no}"]),
        ("[healing]\nswapin = true", ["healing.swapin: true has no effect: {no}"]),
        ("[healing]\ntwins = true", ["healing.twins: true has no effect: {no}"]),
        ("[service]\nat_stop = 'stop-scanning'", ['service.at_stop: "stop-scanning" has no effect: {no}']),
    ],
)
def test_what_reads_as_if_it_were_in_force_and_is_not_is_a_problem(tmp_path: Path, text: str, said: list[str]) -> None:
    main = write(tmp_path / "c.toml", text)
    assert problems(main) == [f"{main}: {line.format(no=NO_POLICY)}" for line in said]


@pytest.mark.parametrize(
    "text",
    [
        "[knobs]\nrun = 1",
        "[healing]\nsmart_scan = true",
        "[healing]\nswapin = true",
        "[healing]\ntwins = true",
        "[service]\nat_stop = 'stop-scanning'",
    ],
)
def test_observe_written_down_does_no_more_than_observe_by_default(tmp_path: Path, text: str) -> None:
    main = write(tmp_path / "c.toml", f"policy = 'observe'\n{text}")
    [problem] = problems(main)
    assert f'has no effect: policy = "observe" ({main}) writes no knob' in problem


def test_each_file_with_knobs_that_nothing_holds_is_named_once(tmp_path: Path) -> None:
    main = write(tmp_path / "main.toml", "[knobs]\nrun = 1\nsleep_millisecs = 5\n")
    second = write(tmp_path / "conf.d/a.toml", "[knobs]\npages_to_scan = 5\n")
    assert [problem.split(": ")[:2] for problem in problems(main)] == [[main, "knobs"], [second, "knobs"]]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "knobs.smart_scan = 0\nhealing.smart_scan = true",
            "healing.smart_scan: true has no effect: knobs.smart_scan = 0 ({main}) holds it off",
        ),
        (
            "knobs.run = 1\nknobs.use_zero_pages = 0\nhealing.zero_pages = true",
            "healing.zero_pages: true has no effect: knobs.use_zero_pages = 0 ({main}) holds it off",
        ),
        (
            "knobs.run = 0\nhealing.swapin = true",
            "healing.swapin: true has no effect: knobs.run = 0 ({main}) keeps KSM off",
        ),
        (
            "knobs.advisor_mode = 'scan-time'\nhealing.swapin = true",
            "healing.swapin: true has no effect: knobs.advisor_mode = scan-time ({main}) leaves speed to the kernel",
        ),
        (
            "knobs.run = 1\nhealing.twins = true\ncensus.cpu_share = 0",
            "healing.twins: true has no effect: census.cpu_share = 0 ({main}) switches the surveys off that it needs",
        ),
    ],
)
def test_healing_that_other_settings_rule_out_is_a_problem(tmp_path: Path, text: str, problem: str) -> None:
    main = write(tmp_path / "c.toml", f"policy = 'fixed'\n{text}")
    assert problems(main) == [f"{main}: {problem.format(main=main)}"]


def test_tables_of_other_policies_may_be_prepared(tmp_path: Path) -> None:
    text = "policy = 'adaptive'\n[adaptive]\nworth = 5\n[kernel]\nmax_cpu = 0.5\n[healing]\nadvisor = false\n"
    main = write(tmp_path / "c.toml", text)
    config = load(main)
    assert (config.adaptive_worth, config.unused) == (5, (f"kernel ({main})", f"healing.advisor ({main})"))
    assert load(write(tmp_path / "d.toml", "policy = 'observe'\nadaptive.worth = 5")).policy is PolicyName.OBSERVE


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[adaptive]\nidle_cpu = 0.9", "adaptive.idle_cpu: 0.9 is greater than adaptive.max_cpu, which is 0.8"),
        ("[adaptive]\nmax_cpu = 0.0", "adaptive.max_cpu: 0.0 is not between 0.01 and 1"),
        (
            "[kernel]\nmin_pages_to_scan = 9\nmax_pages_to_scan = 8",
            "kernel.min_pages_to_scan: 9 is greater than kernel.max_pages_to_scan, which is 8",
        ),
        (
            "[ksmtuned]\nnpages_max = 10",
            "ksmtuned.npages_min: 64 is greater than ksmtuned.npages_max, which is 10",
        ),
        ("[healing]\nsmart_scan = 1", "healing.smart_scan: 1 is not true, false or 'adaptive'"),
        ("[healing]\ntwins = 'yes'", "healing.twins: 'yes' is not true or false"),
    ],
)
def test_limits_that_contradict_each_other(tmp_path: Path, text: str, problem: str) -> None:
    main = write(tmp_path / "c.toml", f"policy = 'adaptive'\n{text}")
    assert problems(main) == [f"{main}: {problem}"]


def test_healing_by_policy(tmp_path: Path) -> None:
    adaptive = load(write(tmp_path / "a.toml", "policy = 'adaptive'"))
    fixed = load(write(tmp_path / "f.toml", "policy = 'fixed'\nknobs.run = 1\nhealing.swapin = true"))
    assert adaptive.heal_smart_scan.acts(adaptive.policy)
    assert not fixed.heal_smart_scan.acts(fixed.policy)
    assert fixed.heal_swapin.acts(fixed.policy)
    assert not fixed.heal_swapin.acts(PolicyName.OBSERVE)


def test_nothing_in_a_files_place_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "conf.d"
    folder.mkdir()
    main = write(tmp_path / "c.toml", "")
    os.mkfifo(folder / "a.toml")
    (folder / "b.toml").symlink_to("/dev/zero")
    (folder / "c.toml").touch()
    os.truncate(folder / "c.toml", 1 << 40)
    (folder / "d.toml").mkdir()
    # A file that a package brings is masked like this.
    (folder / "e.toml").symlink_to("/dev/null")
    assert problems(main) == [
        f"{folder}/a.toml: is not a regular file",
        f"{folder}/b.toml: is not a regular file",
        f"{folder}/c.toml: is longer than 1048576 bytes",
        f"{folder}/d.toml: is not a regular file",
    ]


def test_a_file_may_be_a_link_to_one(tmp_path: Path) -> None:
    write(tmp_path / "real", "policy = 'adaptive'")
    (tmp_path / "c.toml").symlink_to("real")
    assert load(str(tmp_path / "c.toml")).policy is PolicyName.ADAPTIVE


def test_names_of_the_metrics_endpoint(tmp_path: Path) -> None:
    main = write(tmp_path / "a.toml", "[service]\nmetrics_names = ['Host.Example', 'web-1']")
    assert load(main).metrics_names == ("host.example", "web-1")
    assert load(write(tmp_path / "b.toml", "")).metrics_names == ()
    for value, text in (
        ("'host.example'", "'host.example' is not a list of host names"),
        ("['host:9100']", "'host:9100' is not a host name (without a port)"),
        ("['']", "'' is not a host name (without a port)"),
        ("['a..b']", "'a..b' is not a host name (without a port)"),
        ("[1]", "1 is not a host name (without a port)"),
    ):
        main = write(tmp_path / "c.toml", f"service.metrics_names = {value}")
        assert problems(main) == [f"{main}: service.metrics_names: {text}"]


# -- [ksmd] ------------------------------------------------------------------------------------------------


def test_how_ksmd_is_scheduled(tmp_path: Path) -> None:
    text = 'policy = "fixed"\n[ksmd]\ncpus = "3,0-1,8-12:2"\nscheduling = "idle"\nnice = -5\n'
    config = load(path := write(tmp_path / "c.toml", text))
    # Where ksmd can't be seen the rest is held.
    assert config.knobs == {
        Knob.KSMD_CPUS: Want("0-1,3,8,10,12", True, path),
        Knob.KSMD_SCHEDULING: Want("idle", True, path),
        Knob.KSMD_NICE: Want(-5, True, path),
    }
    assert check_knobs(config, set(config.knobs)) == []
    config = load(write(tmp_path / "c.toml", 'policy = "adaptive"\n[ksmd]\ncpus = "housekeeping"\n'))
    assert config.knobs[Knob.KSMD_CPUS].value == "housekeeping"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("cpus = 3", "ksmd.cpus: '3' is not a list of CPUs: write it in quotes"),
        ('cpus = "3-1"', "ksmd.cpus: '3-1' is not a list of CPUs, as in 0,2-3; or 'housekeeping'"),
        ('cpus = ""', "ksmd.cpus: '' is not a list of CPUs"),
        ('cpus = "0x3"', "is not a list of CPUs"),
        ('cpus = "99999"', "is not a list of CPUs"),
        ("cpus = [0, 1]", "is not a list of CPUs"),
        ("cpus = true", "is not a list of CPUs"),
        ('scheduling = "fifo"', "ksmd.scheduling: 'fifo' is not one of other, batch, idle"),
        ("scheduling = 5", "is not one of"),
        ("nice = 20", "ksmd.nice: 20 is not between -20 and 19"),
        ('nice = "5"', "ksmd.nice: '5' is not a whole number: write it without quotes"),
        ("nice = 1.5", "is not a whole number"),
        ("cpu = 1", "ksmd.cpu: unknown setting; did you mean cpus?"),
        ("run = 1", "ksmd.run: unknown setting: it belongs under [knobs]"),
    ],
)
def test_how_ksmd_can_not_be_scheduled(tmp_path: Path, line: str, said: str) -> None:
    found = problems(write(tmp_path / "c.toml", f'policy = "fixed"\n[knobs]\nrun = 1\n[ksmd]\n{line}\n'))
    assert len(found) == 1
    assert said in found[0]


def test_under_observe_it_would_have_no_effect(tmp_path: Path) -> None:
    [found] = problems(write(tmp_path / "c.toml", "[ksmd]\nnice = 5\n"))
    assert "ksmd: has no effect" in found
    assert 'policy = "fixed" holds what [ksmd] names' in found


def test_its_names_are_no_knobs_of_sysfs(tmp_path: Path) -> None:
    [found] = problems(write(tmp_path / "c.toml", 'policy = "fixed"\n[knobs]\nrun = 1\nksmd_nice = 5\n'))
    assert "knobs.ksmd_nice: unknown setting" in found
