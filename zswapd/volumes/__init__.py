# SPDX-License-Identifier: GPL-2.0-or-later
"""Cache volumes: slow files, seen through the mount, whose pages cleancache keeps.

    manager.py    all volumes: commands, threads, what a successor has to know
    volume.py     one volume: reads, writes, and when what is cached is stale
    source.py     the backing file as the event loop sees it: when to look at it, and who uses it
    fetches.py    reads of the backing file that are under way, and who waits for them
    backing.py    the backing file: everything that may block, as plain functions for a thread
    plan.py   which pages to read together, and what a sequential stream is; pure

How a page of a volume is found: in the kernel's page cache; in cleancache; in the backing file.
"""
