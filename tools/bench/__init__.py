# SPDX-License-Identifier: GPL-2.0-or-later
"""The harness of `scripts/bench`, `scripts/demo` and the real-swap tests.

Everything here drives zswapd and its rivals from outside, as a user would: programs, device nodes,
/proc. But for density and scale, which measure parts of it, it imports nothing of zswapd, so that a
broken daemon cannot bend the measurement. It needs the standard library; plots take matplotlib, the
database the package redis.

    system        what the machine says: swap areas, loop devices, memory of a process, vm settings
    cgroup        a memory cgroup of its own for a workload, v1 and v2
    workload      builds and runs workload.c, the process that is swapped
    daemon        one running zswapd, from start to swapoff to the last trace of it
    contenders    swap devices to compare, one plug-in each
    raw           the raw workload: rounds (who runs when, what is recorded), report (medians, ratios, table, JSON)
    applications  what people run, one plug-in each; jobs runs them over all contenders
    scale         many pages, below FUSE
    density       the allocators alone
    shrink        a full cache that gives its memory back
    figures       figures that have to hold, tables, plots
    bench, demo   the two programs
"""
