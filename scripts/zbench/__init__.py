# SPDX-License-Identifier: GPL-2.0-or-later
"""The harness of `scripts/bench`, `scripts/demo` and the real-swap tests.

Everything here drives zswapd and its rivals from outside, as a user would: programs, device nodes, /proc. It
imports nothing of zswapd, so that a broken daemon cannot bend the measurement, and needs nothing but the
standard library.

    system      what the machine says: swap areas, loop devices, memory of a process, vm settings
    cgroup      a memory cgroup of its own for a workload, v1 and v2
    workload    builds and runs workload.c, the process that is swapped
    daemon      one running zswapd, from start to swapoff to the last trace of it
    contenders  swap devices to compare, one plug-in each
    rounds      who runs when, what is recorded
    report      medians, ratios, the table, the JSON, the figures that have to hold
    bench, demo the two programs
"""
