# SPDX-License-Identifier: GPL-2.0-or-later
"""Names that are used where vulture does not look; each block says which code uses them.

Vulture reads this file beside `zswapd` and takes every name in it as used. It is never imported.
Fields of statistics and reports need no line here: `tests/test_linters.py` adds them.
"""
# ruff: noqa: B018, F821
# mypy: ignore-errors

# pyfuse3 calls the handlers of Operations by name, with arguments of these names, and reads
# attributes of what they return.
_.read
_.statfs
_.opendir
_.readdir
_.releasedir
_.fsync
_.fsyncdir
_.forget
_.mknod
_.symlink
_.link
_.rename
_.supports_dot_lookup
_.enable_writeback_cache
_.f_bsize
_.f_frsize
_.f_blocks
_.f_files
_.f_namemax
_.st_nlink
_.st_blksize
_.st_atime_ns
_.st_ctime_ns
_.st_mtime_ns
_.attr_timeout
_.entry_timeout
ctx
datasync
inode_list

# Python calls __exit__ with three arguments, and logging reads its own switch.
traceback
_.raiseExceptions

# Python calls it for a module's missing names (PEP 562).
__getattr__

# The promise of an allocator, and a function for owners of an arena that outlives the core.
_.max_size
lost_bitmap_bytes

# cleancache: the kernel's names, whole.
_.init_shared_fs

# Cache volumes.
Volumes

# Tests arm crash points; nothing that ships does by itself.
arm_from_environment
disarm

# Public operations of the core that nothing above calls yet: what a pool's clients may ask for, and
# whole-pool steps that the daemon does in pieces.
_.destroy_client
_.pool_pages
_.trim_now
_.invalidate
FIRST_CODEC

# The ephemeral half, before the core has one.
_.evict
_.after_io_wait  # trio calls it

# Tests ask whether all is done.
_.is_idle

# tools/reference makes docs/metrics.md of it.
_.described

# The supervisor numbers its files from the first on, in the order of resources.NAMES.
_.FILE_ARENA
_.FILE_STATE
_.FILE_SOCKET
_.FILE_LOCK
_.FILE_BACKING

# core/backing/_disk.c reads it.
_.spin_ns

# argparse calls it for each value that is to be one of several.
_._check_value
