/* SPDX-License-Identifier: GPL-2.0-or-later */
/* See _digest.h. */

#include "_digest.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

uint64_t digest_plain(const void *data, size_t length, uint64_t seed)
{
	return XXH3_64bits_withSeed(data, length, seed);
}
