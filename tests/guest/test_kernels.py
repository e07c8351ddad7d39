# SPDX-License-Identifier: GPL-2.0-or-later
"""What holds on Debian's kernels: one boot for each kernel and number of nodes, and tests that read what came of it.

Other kernels: ``make matrix``. More of everything: ``make soak``.
"""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path

import pytest

from tests import matrix
from tests.guest.inside import ROOT, Boot, boot
from tests.guest.probe import KSM_FILES, check

pytestmark = pytest.mark.guest

INSIDE = "tests/guest_tests"
PROBE = ("python3", "tests/guest/probe.py")
REMOVABLE = ("--removable", "256")
#: Of kernels before 6.6 only.
ZERO_PAGES = f"{INSIDE}/doctor.py::test_zero_pages_that_the_kernel_does_not_count"
RANDOM_SCENARIOS = 20
#: One with which so few scenarios have everything that can happen in one (tests.matrix.LEAST).
SEED = 51
#: Folders of the library; `make matrix` has all on each kernel.
OLDER_LIBRARY = ("findings", "ltp", "offline", "seed")
#: They write while the service holds a value for a moment only, which an emulated processor misses.
NOT_IN_TIME = (
    *("--deselect", f"{INSIDE}/foreign.py::test_an_unmerge_and_a_stop_soon_after_it_have_their_names"),
    *("--deselect", f"{INSIDE}/foreign.py::test_whoever_ends_at_once_has_a_pid_at_least"),
)

_PROGRAMS, _SWITCHING = "tests/kernel/test_switched_programs.py", "tests/kernel/test_switching.py"
#: Programs that are switched, by prctl or, on 6.1, by madvise of each mapping; one is filtered by seccomp. Two kernels
#: are left to ``make soak``, and what takes minutes to this machine.
SWITCHED = (
    f"{_PROGRAMS}::test_on_and_off[filter]",
    f"{_SWITCHING}::test_on_and_off",
    f"{_SWITCHING}::test_only_some_addresses",
)


def comparison(folder: Path, domains: int = 0, library: Container[str] | None = None) -> dict[str, list[str]]:
    """Kernel and engine compared: the library, and random scenarios, so many of them with domains."""
    # The seed's authors thought that colliding pages become one: no kernel does it, so this has to be told.
    seed = f"ksmd-ctl verify --profile seed {matrix.LIBRARY}/findings/collision-is-for-ever.toml"
    script = f"{matrix.commands(2, SEED, RANDOM_SCENARIOS, folder, domains, library)}; {seed}; true"
    return {"verify": ["sh", "-c", script]}


# -- 6.1 with two nodes ------------------------------------------------------------------------------------

AWKWARD = ["a b", "it's", 'a "quote"', "$HOME `id`", "", "two\nlines", "\\", "é", "--nodes"]
SAY = """
import sys, os, pathlib
share, *words = sys.argv[1:]
pathlib.Path(share, "from-guest").write_text("\\0".join(words))
pathlib.Path("scratch-of-guest").touch()
sys.stdout.buffer.write(bytes(range(256)) * 1000)
sys.stderr.write("one\\ntwo\\r\\nthree")
print(len(list(pathlib.Path("/sys/devices/system/node").glob("node[0-9]*"))), os.environ["PATH"], file=sys.stderr)
sys.exit(77)
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Boot:
    folder = tmp_path_factory.mktemp("6.1-2")
    # What takes a node of memory only is left to four nodes.
    tests = (f"{INSIDE}/numa.py", f"{INSIDE}/estimate.py", ZERO_PAGES, "-k", "not memory_only")
    last = ("python3", "-c", SAY, str(folder), *AWKWARD)
    return boot(folder, "6.1", 2, {**comparison(folder, library=OLDER_LIBRARY), "probe": PROBE}, tests, REMOVABLE, last)


def test_two_nodes_of_an_older_kernel(older: Boot) -> None:
    """Pages placed, merged, moved, un-merged, and found where they are; what the doctor says of pages of zeroes."""
    assert older.passed(f"{INSIDE}/numa.py") >= 12
    assert older.passed(f"{INSIDE}/doctor.py") == 1
    assert older.passed(f"{INSIDE}/estimate.py") == 2
    older.said("tests")


def test_the_older_kernel_has_what_it_should(older: Boot) -> None:
    found = json.loads(older.said("probe"))
    assert found["release"].startswith("6.1.")
    assert found["cpus"] == {"node0": "0", "node1": "1"}
    check(found, KSM_FILES["6.1"])


def test_status_output_arguments_and_shares_come_through(older: Boot) -> None:
    assert older.runner.returncode == 77
    assert older.runner.stdout == bytes(range(256)) * 1000
    assert older.runner.stderr.startswith(b"one\ntwo\r\nthree2 ")
    assert (older.folder / "from-guest").read_text() == "\0".join(AWKWARD)
    assert not (ROOT / "scratch-of-guest").exists()
    if (ROOT / ".venv").is_dir():
        assert f"{ROOT}/.venv/bin:".encode() in older.runner.stderr


# -- 6.12 with two nodes -----------------------------------------------------------------------------------


#: Files of tests, and how many each has at least.
TWO_NODES = {
    "numa_service": 10,
    "transactions": 4,
    "domains": 8,
    "estimate": 2,
    "foreign": 1,
}


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Boot:
    folder = tmp_path_factory.mktemp("6.12-2")
    tests = [*(f"{INSIDE}/{name}.py" for name in TWO_NODES), *NOT_IN_TIME]
    return boot(
        folder,
        "6.12",
        2,
        comparison(folder, RANDOM_SCENARIOS),
        tests,
        REMOVABLE,
        environment={"KSMD_CTL_PAGES": "200"},
    )


@pytest.mark.parametrize(("file", "least"), TWO_NODES.items())
def test_two_nodes(two_nodes: Boot, file: str, least: int) -> None:
    """The service and its commands, transactions, domains that stay apart."""
    assert two_nodes.passed(f"{INSIDE}/{file}.py") >= least
    two_nodes.said("tests")


# -- 7.2 ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def newest(tmp_path_factory: pytest.TempPathFactory) -> Boot:
    return boot(tmp_path_factory.mktemp("7.2-2"), "7.2", 2, {}, SWITCHED)


def test_programs_are_switched(newest: Boot) -> None:
    assert (newest.passed(_PROGRAMS), newest.passed(_SWITCHING)) == (1, 2)
    newest.said("tests")


@pytest.mark.parametrize(("guest", "kernel", "domains"), [("older", "6.1", 0), ("two_nodes", "6.12", RANDOM_SCENARIOS)])
def test_kernel_and_engine_are_equal(guest: str, kernel: str, domains: int, request: pytest.FixtureRequest) -> None:
    """Also with domains: they stay apart, and don't where pages merge across nodes."""
    output = request.getfixturevalue(guest).said("verify")
    *parts, seed = matrix.parse(output)
    assert matrix.judged(parts, RANDOM_SCENARIOS, matrix.never(kernel, 2), domains) == [], output
    assert parts[0].equal >= (100 if guest == "two_nodes" else 50)
    assert parts[1].equal == RANDOM_SCENARIOS
    assert (seed.profile, seed.different) == ("seed", 1)
    assert "met: pages_sharing: kernel 8, engine 12" in output
    assert "note: Four contents" in output


# -- 6.12 with four nodes, two of them without a CPU, the last with nothing but memory that can be taken away -----


@pytest.fixture(scope="module")
def four_nodes(tmp_path_factory: pytest.TempPathFactory) -> Boot:
    folder = tmp_path_factory.mktemp("6.12-4")
    # Yama's scope can't be taken back: what sets it comes last.
    tests = [f"{INSIDE}/{name}.py" for name in ("numa", "doctor", "refused")]
    memory = ("--memory", "512,512,512,0", "--cpus", "1,1,0,0", *REMOVABLE)
    devices = ("--device", "intel-iommu,intremap=off", "--device", "edu", "--append", "intel_iommu=on")
    panic = ("sh", "-c", "echo c > /proc/sysrq-trigger")
    return boot(folder, "6.12", 4, {"probe": PROBE}, [*tests, "--deselect", ZERO_PAGES], (*memory, *devices), panic)


def test_four_nodes_two_of_them_memory_only(four_nodes: Boot) -> None:
    """As on two, and what the doctor says of such machines."""
    assert four_nodes.passed(f"{INSIDE}/numa.py") >= 13
    assert four_nodes.passed(f"{INSIDE}/doctor.py") == 4
    assert four_nodes.passed(f"{INSIDE}/refused.py") == 1
    four_nodes.said("tests")


def test_nodes_without_cpus_and_one_that_can_lose_its_memory(four_nodes: Boot) -> None:
    found = json.loads(four_nodes.said("probe"))
    assert found["removed"] == {f"node{node}": 256 for node in range(4)}
    assert found["nodes"]["node3"] == 256
    assert found["cpus"] == {"node0": "0", "node1": "1", "node2": "", "node3": ""}
    check(found, KSM_FILES["6.12"])


def test_a_guest_that_panics_is_lost(four_nodes: Boot) -> None:
    assert four_nodes.runner.returncode == 128
    what, hint = four_nodes.runner.stderr.decode().splitlines()
    assert "lost: " in what
    assert "Kernel panic" in what
    assert "sysrq" in Path(hint.split()[-1]).read_text()
