# SPDX-License-Identifier: GPL-2.0-or-later
"""Would the scenarios notice a wrong engine? Each condition in the engine is inverted, one at a time, and the library
and random scenarios are run on what comes of it; a mutant that shows the same everywhere survives, and is listed.

``python -m tests.matrix_mutants [MODULE...]``: by hand, minutes.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ROOT / "ksmd_ctl/engine"
MODULES = ("scan", "trees", "merge", "migrate", "registry", "sysfs", "mm")
PROFILES = ("6.12", "6.1", "4.10", "4.1", "seed")
RANDOM = 60
DOMAINS = 20
# One that survives takes 10 s of CPU time, one that runs for ever all there is; how long that takes says nothing.
_CPU_SECONDS = 40


def conditions(tree: ast.Module) -> Iterator[ast.expr]:
    """Every condition, and every operand of `and` and `or` in one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            yield node.test
        if isinstance(node, ast.BoolOp):
            yield from node.values


def mutate(source: str, number: int) -> str | None:
    """The source with one condition inverted, None where there is none of that number."""
    tree = ast.parse(source)
    for count, node in enumerate(conditions(tree)):
        if count == number:
            inverted = ast.UnaryOp(ast.Not(), ast.parse(ast.unparse(node), mode="eval").body)
            replaced = _Replace(node, inverted).visit(tree)
            return ast.unparse(ast.fix_missing_locations(replaced))
    return None


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.expr, new: ast.expr) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def show(profile: str) -> Iterator[str]:
    """A digest of what each scenario shows, or how it failed."""
    from ksmd_ctl.codec import encode
    from ksmd_ctl.scenario.format import LIBRARY, load_all
    from ksmd_ctl.scenario.generate import generate
    from ksmd_ctl.scenario.generate_domains import Mode
    from ksmd_ctl.scenario.generate_domains import generate as with_domains
    from ksmd_ctl.scenario.runner import run
    from ksmd_ctl.scenario.session import abilities_of, engine_for

    scenarios = load_all([LIBRARY])
    abilities = abilities_of(engine_for(profile, 4), 4)
    scenarios += [generate(77, number, abilities) for number in range(RANDOM)]
    scenarios += [with_domains(77, number, abilities, Mode.SEPARATE) for number in range(DOMAINS)]
    for scenario in scenarios:
        outcome = run(scenario, engine_for(profile, 4), profile)
        found: list[object] = [outcome.skipped, outcome.broken, outcome.events]
        found += [encode(seen) for seen in outcome.observations.values()]
        yield hashlib.blake2b(json.dumps(found, sort_keys=True).encode(), digest_size=8).hexdigest()


def child(module: str, number: int, expected: Path) -> int:
    """Exit status 0: no scenario notices; 1: one does; 2: there is no such mutant."""
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    path = ENGINE / f"{module}.py"
    source = mutate(path.read_text(), number)
    if source is None:
        return 2
    name = f"ksmd_ctl.engine.{module}"
    spec = importlib.util.spec_from_loader(name, loader=None, origin=str(path))
    assert spec is not None
    mutant = importlib.util.module_from_spec(spec)
    sys.modules[name] = mutant
    try:
        exec(compile(source, str(path), "exec"), mutant.__dict__)
        for profile, digests in json.loads(expected.read_text()).items():
            for digest, wanted in zip(show(profile), digests, strict=True):
                if digest != wanted:
                    return 1
    except Exception:
        return 1
    return 0


def _try(module: str, number: int, expected: Path) -> tuple[str, int, int]:
    words = [sys.executable, "-m", "tests.matrix_mutants", "--child", module, str(number), str(expected)]
    # Killed for its CPU time is noticed as well.
    return module, number, subprocess.run(words, cwd=ROOT, capture_output=True, check=False).returncode


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix_mutants", description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"default: {', '.join(MODULES)}")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args(arguments)
    if args.child:
        return child(args.child[0], int(args.child[1]), Path(args.child[2]))
    expected = ROOT / "build/mutants.json"
    expected.parent.mkdir(exist_ok=True)
    expected.write_text(json.dumps({profile: list(show(profile)) for profile in PROFILES}))
    work = []
    for module in args.modules or MODULES:
        count = len(list(conditions(ast.parse((ENGINE / f"{module}.py").read_text()))))
        work += [(module, number, expected) for number in range(count)]
    survivors = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for module, number, status in pool.map(lambda job: _try(*job), work):
            if status == 0:
                survivors += 1
                node = list(conditions(ast.parse((ENGINE / f"{module}.py").read_text())))[number]
                print(f"survives: ksmd_ctl/engine/{module}.py:{node.lineno}: not ({ast.unparse(node)})", flush=True)
    print(f"{len(work) - survivors} of {len(work)} inverted conditions were noticed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
