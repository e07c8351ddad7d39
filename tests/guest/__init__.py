# SPDX-License-Identifier: GPL-2.0-or-later
"""The test bed: NUMA guests with Debian's kernels and systems under emulation."""
