# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that forks workers imports the modules that its settings need, and no others."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from tests.support.successor import make_config
from zswapd import supervisor
from zswapd.worker import prepare as preparing
preparing.load(make_config(*sys.argv[1:]))
print("prometheus_client" in sys.modules)
"""


@pytest.mark.parametrize(("listen", "imported"), [("", "False"), ("127.0.0.1:1", "True")])
@pytest.mark.slow
def test_supervisor_imports_what_the_settings_need_and_no_more(listen: str, imported: str) -> None:
    command = [sys.executable, "-c", PROGRAM, f"metrics.listen={listen}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [imported]
