# SPDX-License-Identifier: GPL-2.0-or-later
"""The only owners of page memory: frames, and the allocators over them."""
