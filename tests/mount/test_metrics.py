# SPDX-License-Identifier: GPL-2.0-or-later
"""A real Prometheus scrapes a real daemon.

Every query of the dashboard and of the alerts is one that it answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mount.test_metrics_flood import Thread
from tests.support import TOP
from tests.support.swap import Stage, next_worker, stage, wait_for
from tools.bench.harness.daemon import Daemon
from zswapd.metrics.exporter import TEXT_S

__all__ = ["stage"]
pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus (Debian package) is not installed"
)

MONITORING = TOP / "monitoring"
QUIET = {
    "ZswapdDown",
    "ZswapdPagesLost",
    "ZswapdPagesDamaged",
    "ZswapdRequestErrors",
    "ZswapdUnsupervised",
}
"""Alerts that a daemon that is well must not raise; the others depend on the machine."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read()


def answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(get(url))
    return False


class Prometheus:
    """A Prometheus with a data directory of its own.

    Args:
        directory: for that and for its configuration.
        target: what it scrapes, host:port.
    """

    def __init__(self, directory: Path, target: str) -> None:
        self.port = free_port()
        shutil.copy(MONITORING / "zswapd.rules.yml", directory)
        config = directory / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
            "rule_files: [zswapd.rules.yml]\n"
            f"scrape_configs: [{{job_name: zswapd, static_configs: [{{targets: ['{target}']}}]}}]\n"
        )
        self._log = (directory / "prometheus.log").open("wb")
        command = [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={directory / 'data'}",
        ]
        command.append(f"--web.listen-address=127.0.0.1:{self.port}")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)

    def close(self) -> None:
        self._process.kill()
        self._process.wait(10)
        self._log.close()

    def api(self, path: str, **arguments: str) -> Any:
        answer = json.loads(
            get(f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(arguments)}")
        )
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[Any]:
        result: list[Any] = self.api("query", query=expression)["result"]
        return result

    def knows(self, expression: str) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.query(expression))
        return False


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def daemon(stage: Stage, port: int, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with a cache volume, that is written to and read from all the time."""
    slow = tmp_path / "slow"
    slow.write_bytes(bytes(1 << 20))
    settings = {
        "memory__reserve": "8M",
        "metrics__listen": f"127.0.0.1:{port}",
        "cache__volumes__disk": str(slow),
    }
    settings["backing__path"] = str(tmp_path / "store")
    started = stage.daemon("64M", **settings)
    end = threading.Event()

    def use() -> None:
        with started.file.open("r+b", buffering=0) as file:
            number = 0
            while not end.wait(0.001):
                number = (number + 1) % 2000
                os.pwrite(file.fileno(), os.urandom(1000) + bytes(3096), number * 4096)
                os.pread(file.fileno(), 4096, number * 4096)

    user = threading.Thread(target=use)
    user.start()
    yield started
    end.set()
    user.join()


@pytest.fixture
def prometheus(daemon: Daemon, port: int, tmp_path: Path) -> Iterator[Prometheus]:
    running = Prometheus(tmp_path, f"127.0.0.1:{port}")
    try:
        wait_for(
            lambda: running.knows("count_over_time(zswapd_uptime_seconds[1m]) > 3"),
            "Prometheus has scraped nothing",
            40,
        )
        yield running
    finally:
        running.close()


def dashboard_queries() -> list[str]:
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def alerts() -> list[tuple[str, str]]:
    text = (MONITORING / "zswapd.rules.yml").read_text()
    return re.findall(r"- alert: (\w+)\n +expr: (.+)", text)


def test_prometheus_answers_what_the_dashboard_and_the_alerts_ask(
    prometheus: Prometheus, daemon: Daemon
) -> None:
    for query in dashboard_queries():
        expression = query.replace("$instance", ".*").replace("$__rate_interval", "10s")
        assert "$" not in expression
        assert prometheus.query(expression), f"no data for {expression}"
    names = set(prometheus.api("label/__name__/values"))
    rules = (MONITORING / "zswapd.rules.yml").read_text()
    assert {
        name for name in re.findall(r"zswapd_\w+", rules) if not name.endswith("_rules")
    } <= names
    groups = prometheus.api("rules")["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
    firing = {alert["labels"]["alertname"] for alert in prometheus.api("alerts")["alerts"]}
    assert not firing & QUIET
    # what Prometheus has is what the daemon counts
    before = daemon.ask("stats")["core"]["frontswap"]["succ_stores"]
    wait_for(
        lambda: float(prometheus.query("zswapd_frontswap_stores_total")[0]["value"][1]) >= before,
        "counts stand still",
    )
    # What a scrape costs, warming up included. How long it lasts depends on the other tasks of the
    # machine, since the thread is an ordinary task.
    scrapes = float(prometheus.query("count_over_time(zswapd_uptime_seconds[5m])")[0]["value"][1])
    assert Thread(daemon).processor_s() / scrapes < 0.02
    # the next worker is scraped as well, and its counters go on
    old = daemon.ask("status")["worker"]["pid"]
    os.kill(old, signal.SIGKILL)
    next_worker(daemon, old)
    wait_for(
        lambda: prometheus.knows("zswapd_worker_deaths_total == 1"), "the death was not counted"
    )
    assert not prometheus.query("resets(zswapd_frontswap_stores_total[1m]) > 0")


def test_a_scrape_starts_no_thread_and_leaves_no_descriptor(daemon: Daemon, port: int) -> None:
    url = f"http://127.0.0.1:{port}/metrics"
    wait_for(lambda: answers(url), "no listener")
    process = Path(f"/proc/{daemon.ask('status')['worker']['pid']}")
    before = len(list((process / "task").iterdir())), len(list((process / "fd").iterdir()))
    used = Thread(daemon).processor_s()
    for _ in range(30):
        text = get(url)
    assert b"zswapd_stored_pages" in text
    judged = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60, check=False
    )
    assert (judged.returncode, judged.stdout, judged.stderr) == (0, b"", b"")
    assert (Thread(daemon).processor_s() - used) / 30 < 0.02
    wait_for(lambda: len(list((process / "fd").iterdir())) <= before[1], "descriptors are left")
    assert len(list((process / "task").iterdir())) == before[0]


def test_pages_are_served_without_memory_from_the_kernel_while_it_is_scraped(
    daemon: Daemon, port: int
) -> None:
    url = f"http://127.0.0.1:{port}/metrics"
    wait_for(lambda: answers(url), "no listener")
    worker = daemon.ask("status")["worker"]["pid"]
    main = Path(f"/proc/{worker}/task/{worker}/stat")

    def scrape(times: int) -> tuple[int, int]:
        """Scrape; return the serving thread's page faults meanwhile, and the pages it stored."""
        stores = daemon.ask("stats")["core"]["frontswap"]["succ_stores"]
        faults = int(main.read_text().rpartition(") ")[2].split()[7])
        for _ in range(times):
            get(url)
        faults = int(main.read_text().rpartition(") ")[2].split()[7]) - faults
        return faults, daemon.ask("stats")["core"]["frontswap"]["succ_stores"] - stores

    scrape(20)  # what a first time touches
    wait_for(lambda: (seen := scrape(50))[1] > 100 and seen[0] == 0, "the page path takes memory")


def test_what_was_told_is_not_less_after_a_death(stage: Stage, port: int) -> None:
    """Else Prometheus takes the counter for one that began anew.

    And its whole value for an increase.
    """
    daemon = stage.daemon("64M", memory__reserve="8M", metrics__listen=f"127.0.0.1:{port}")
    url = f"http://127.0.0.1:{port}/metrics"

    def scraped() -> float:
        wait_for(lambda: answers(url), "no listener")
        line = re.search(rb"^zswapd_frontswap_stores_total (.+)$", get(url), re.MULTILINE)
        assert line
        return float(line[1])

    for _ in range(4):
        old = daemon.worker_pid()
        scraped()
        with daemon.file.open("r+b", buffering=0) as file:
            for number in range(100):
                os.pwrite(file.fileno(), os.urandom(1000) + bytes(3096), number * 4096)
        time.sleep(TEXT_S)
        with daemon.file.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), os.urandom(1000) + bytes(3096), 0)
        told, in_file = scraped(), int((daemon.mountpoint / "stats/succ_stores").read_text())
        os.kill(old, signal.SIGKILL)
        next_worker(daemon, old)
        assert int((daemon.mountpoint / "stats/succ_stores").read_text()) >= in_file >= told > 0
        assert scraped() >= told


def test_a_port_that_is_taken_is_no_reason_not_to_serve(stage: Stage, port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        daemon = stage.daemon("64M", memory__reserve="8M", metrics__listen=f"127.0.0.1:{port}")
        wait_for(lambda: "cannot listen on 127.0.0.1" in daemon.log_text(), "no warning")
        assert daemon.ask("status")["state"] == "serving"


@pytest.mark.parametrize(
    "arguments",
    [["check", "rules", "zswapd.rules.yml"], ["test", "rules", "zswapd.rules.test.yml"]],
)
def test_promtool_likes_the_rules(arguments: list[str]) -> None:
    result = subprocess.run(
        ["promtool", *arguments],
        cwd=MONITORING,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    cases = (MONITORING / "zswapd.rules.test.yml").read_text()
    assert len(alerts()) >= 10
    for name, _ in alerts():
        assert re.search(rf"alertname: {name}\n +exp_alerts", cases), name
