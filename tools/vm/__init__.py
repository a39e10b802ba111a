# SPDX-License-Identifier: GPL-2.0-or-later
"""Virtual machines for tests that could hang the test machine: a Debian under an emulator.

    image      builds the operating system once and caches it
    payload    packs the zswapd of this checkout, for each run of the tests
    machine    runs both under qemu
    channel    talks to the agent in the guest (agent.c)
    guest      does the tests' operations in the guest

qemu emulates the processor, because most test machines are virtual and offer no nested
virtualisation. Python is about 20 times slower in there. So the guests test correctness, never
speed.
"""
