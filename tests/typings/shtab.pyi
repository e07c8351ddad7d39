# SPDX-License-Identifier: GPL-2.0-or-later
# As much of shtab as packaging/completion/completions.py uses.
from argparse import ArgumentParser

FILE: dict[str, str]

def complete(parser: ArgumentParser, shell: str = ...) -> str: ...
