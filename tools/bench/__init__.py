# SPDX-License-Identifier: GPL-2.0-or-later
"""The harness of `scripts/bench`, `scripts/demo` and the real-swap tests.

The harness drives zswapd and its rivals from outside, as a user would: by programs, device nodes
and /proc. Only density and scale import zswapd, because they measure parts of it. The rest imports
nothing of it, so a broken daemon cannot distort a measurement. The harness needs the standard
library; plots need matplotlib, and the database needs the package redis.

    harness/system     swap areas, loop devices, memory of a process, vm settings
    harness/cgroup     a memory cgroup for a workload, v1 and v2
    harness/workload   the process that is swapped: it builds and runs workload.c
    harness/daemon     one running zswapd, from its start to its removal
    harness/figures    figures that have to hold, tables, plots
    harness/display    the progress display of the demo
    harness/shortage   a machine that is short of memory
    contenders         swap devices to compare, one plug-in each
    applications       programs from practice, one plug-in each; jobs runs them on all contenders
    workloads/raw      the raw workload; rounds runs it, report makes its table and its JSON
    workloads/scale    many pages, below FUSE
    workloads/density  the allocators alone
    workloads/shrink   a full cache that gives its memory back
    bench, everything  the programs behind `scripts/bench`
"""
