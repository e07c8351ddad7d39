# SPDX-License-Identifier: GPL-2.0-or-later
"""Every figure of speed, as a ratio against a peer in the same run: `make bench`, or one by name.

A benchmark is a module in this folder with ``run() -> None`` that prints its figures. Machines are noisy:
only ratios within one run mean anything.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys

import benchmarks


def main(names: list[str]) -> None:
    # What takes many minutes is a package, and has a command of its own.
    known = [
        module.name
        for module in pkgutil.iter_modules(benchmarks.__path__)
        if not module.name.startswith("_") and not module.ispkg
    ]
    for name in names or known:
        if name not in known:
            sys.exit(f"bench: no benchmark {name!r}\nhint: there are {', '.join(known)}")
        print(f"== {name}", flush=True)
        importlib.import_module(f"benchmarks.{name}").run()


if __name__ == "__main__":
    main(sys.argv[1:])
