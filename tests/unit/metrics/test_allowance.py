# SPDX-License-Identifier: GPL-2.0-or-later
"""A thread's processor time is a share of the time that passes, however much work there is."""

from __future__ import annotations

import random
import time

import pytest

from zswapd.metrics.allowance import Allowance


class Times:
    """A clock and a processor of their own: sleeping moves the first, work both."""

    def __init__(self) -> None:
        self.now = self.used = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.used += seconds


def allowance(times: Times, share: float, most_s: float) -> Allowance:
    return Allowance(
        share, most_s, clock=lambda: times.now, used=lambda: times.used, sleep=times.sleep
    )


@pytest.mark.parametrize("piece_s", [0.0001, 0.01, 0.5])
def test_the_share_is_kept_whatever_the_pieces(piece_s: float) -> None:
    times = Times()
    made = allowance(times, 0.01, 0.05)
    while times.now < 1000:
        made.wait()
        times.work(piece_s * random.random())
    assert times.used <= 0.01 * times.now + 0.05 + piece_s
    assert times.used >= 0.009 * times.now - piece_s


def test_what_is_saved_up_is_used_at_once_and_no_more_than_that() -> None:
    times = Times()
    made = allowance(times, 0.01, 0.05)
    times.sleep(1e6)
    for _ in range(5):
        assert made.debt_s() == 0
        times.work(0.01)
    times.work(0.002)
    assert made.debt_s() == pytest.approx(0.2, rel=0.3)


def test_it_is_the_calling_threads_processor_that_counts() -> None:
    made = Allowance(0.5, 0.0)
    began, used = time.monotonic(), time.thread_time()
    for _ in range(200):
        made.wait()
        sum(range(2000))
    assert time.thread_time() - used <= 0.6 * (time.monotonic() - began)
