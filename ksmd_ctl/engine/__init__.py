# SPDX-License-Identifier: GPL-2.0-or-later
# mm/ksm.c of the kernel, on a simulated machine. Numbers such as 11.4 in docstrings and comments are statements of
# docs/engine.md, and C9 is a corner case there.
