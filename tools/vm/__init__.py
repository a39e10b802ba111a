# SPDX-License-Identifier: GPL-2.0-or-later
"""Virtual machines for tests that could hang the machine they run on: a Debian under an emulator.

`image` builds the operating system once and caches it; `payload` packs the zswapd of this checkout,
fresh each time; `machine` runs both under qemu; `channel` talks to the agent in it (agent.c);
`guest` does what the tests do in it, in their terms.

Emulation, not virtualisation: the machines that run the tests are virtual themselves and mostly do
not pass it on. Python is some twenty times slower in there, so this is for correctness, never for
speed.
"""
