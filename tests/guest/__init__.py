"""The test bed: NUMA guests with Debian's kernels and systems under emulation."""
