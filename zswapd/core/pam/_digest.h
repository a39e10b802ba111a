/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * XXH3 with 64 bits and a seed, with the widest registers of the processor that pay. The library's
 * header selects them at compile time, but a package must run on any processor. For 2300 bytes,
 * registers of 256 bits take 45 ns. Registers of 128 bits, which every x86-64 has, take 500 ns.
 * Registers of 512 bits are slower than those of 256. All give the same number.
 */

#ifndef ZSWAPD_DIGEST_H
#define ZSWAPD_DIGEST_H

#include <stddef.h>
#include <stdint.h>

typedef uint64_t (*digest_function)(const void *data, size_t length, uint64_t seed);

/* The version for any processor of the architecture. */
uint64_t digest_plain(const void *data, size_t length, uint64_t seed);

/* The version for AVX2. NULL if the compiler or the architecture does not support AVX2. */
extern const digest_function digest_avx2;

#endif
