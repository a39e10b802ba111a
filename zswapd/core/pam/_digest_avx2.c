/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The AVX2 version of _digest.h. It has a file of its own because the library's header selects
 * registers once per file. gcc applies the pragma to all that follows. A compiler that ignores the
 * pragma leaves __AVX2__ undefined.
 */

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx2")
#endif

#include "_digest.h"

#ifdef __AVX2__
#define XXH_INLINE_ALL
#include <xxhash.h>

static uint64_t digest(const void *data, size_t length, uint64_t seed)
{
	return XXH3_64bits_withSeed(data, length, seed);
}

const digest_function digest_avx2 = digest;
#else
const digest_function digest_avx2 = NULL;
#endif
