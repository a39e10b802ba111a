# SPDX-License-Identifier: GPL-2.0-or-later
"""Cache volumes: slow files, shown in the mount, with their pages in cleancache.

    manager.py    all volumes: commands, threads, the state for a successor
    mounted.py    the volumes in the mount
    commands.py   the handlers of `zswapctl cache`
    volume.py     one volume: reads, writes, and when cached pages are stale
    gate.py       the bound on waiting requests
    watch.py      regular looks at the backing file of an open volume
    source.py     the backing file in the event loop: when to look at it, and which jobs use it
    fetches.py    reads of the backing file that are under way, and their readers
    file_io.py    the backing file: all operations that may block, as plain functions for a thread
    plan.py       which pages to read together, and what a sequential stream is; pure
    statistics.py the counters

A page of a volume is looked up in the kernel's page cache, then in cleancache, then in the backing
file.
"""
