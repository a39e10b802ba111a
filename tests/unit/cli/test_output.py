# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever standard output and standard error are,
no command ends with a traceback because of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import TOP
from tests.support.commandline import all_commands
from tests.support.snapshots import make_core, make_snapshot
from tests.unit.cli.test_cli import ARGUMENTS, FakeDaemon
from zswapd.cli import output, zswapctl
from zswapd.control.client import Client
from zswapd.control.protocol import encode_progress, encode_result
from zswapd.errors import ControlError
from zswapd.worker.reports import plain

# One process runs all commands, each in a child that was forked: starting an interpreter for each
# would cost 20 times as much. Nothing touches the machine's own swap.
RUNNER = """
import gc, importlib, json, os, sys
from zswapd import config, swapdevice
from zswapd.cli import cache, swap, top, upgrade, zswapctl, zswapd
from zswapd.errors import SwapDeviceError

importlib.import_module("zswapd.cli.config")

def refuse(*_, **__):
    raise SwapDeviceError("not here")

swapdevice.attach = swapdevice.detach = refuse
swapdevice.find_attached = lambda _: None
programs = {"zswapctl": zswapctl.main, "zswapd": zswapd.main}
codes = []
gc.freeze()
for program, arguments in json.loads(sys.argv[2]):
    child = os.fork()
    if not child:
        sys.argv[:] = [program]
        sys.exit(programs[program](arguments))
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os.write(int(sys.argv[1]), json.dumps(codes).encode())
os._exit(0)
"""

Commands = list[tuple[str, list[str]]]


class Daemon(FakeDaemon):
    """One that is upgraded whenever it is asked to be, with names that few locales can write."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.takeovers = itertools.count(5000)
        self.status["mountpoint"] = str(path.parent / "mnt \u20ac \udcff")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeDaemon]:
    core = make_core()
    statistics = json.loads(json.dumps(plain(make_snapshot(core))))
    core.close()
    running = Daemon(tmp_path_factory.mktemp("daemon") / "zswapd.sock")
    running.statistics = statistics
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def commands(daemon: FakeDaemon) -> Commands:
    """Return every command of both programs, some with --json, and what argparse prints."""
    made: Commands = []
    for words in sorted(all_commands(zswapctl.make_parser())):
        line = ["--socket", str(daemon.path), *words, *ARGUMENTS.get(" ".join(words), [])]
        line += ["--interval", "0.1"] if words == ("top",) else []
        made.append(("zswapctl", line))
    made += [
        ("zswapctl", ["--socket", str(daemon.path), word, "--json"])
        for word in ("status", "pages", "thaw")
    ]
    made += [("zswapd", ["config", word]) for word in ("show", "check", "defaults")]
    made.append(("zswapd", ["config", "check", "--json"]))
    for line_ in (
        "run --help",
        "--help",
        "--version",
        "run --nonsense",
        "config show swap.nonsense",
    ):
        made.append(("zswapd", line_.split()))
    for line_ in ("--help", "swapon --help", "nonsense", "--socket /none status --json"):
        made.append(("zswapctl", line_.split()))
    return made


FEW = ("get", "pages", "compact", "shrink", "defaults", "--json", "nonsense", "--nonsense")


def few(commands: Commands, usual: tuple[list[int], bytes]) -> tuple[Commands, list[int]]:
    """Return one command of each kind, with its exit code: long, with progress, one that fails,
    JSON, help.
    """
    chosen = [
        (command, code)
        for command, code in zip(commands, usual[0], strict=True)
        if command[1][-1] in FEW
    ]
    return [command for command, _ in chosen], [code for _, code in chosen]


@pytest.fixture(scope="module")
def locales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory for LOCPATH, with a locale whose characters have 8 bits."""
    directory = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef") is None:
        pytest.skip("localedef is not installed")
    command = [
        "localedef",
        "-c",
        "-i",
        "de_DE",
        "-f",
        "ISO-8859-1",
        str(directory / "de_DE.ISO-8859-1"),
    ]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if not (directory / "de_DE.ISO-8859-1").exists():
        pytest.skip(f"localedef cannot make a locale: {made.stderr}")
    return directory


def environment(locale: str = "C.UTF-8", **more: str) -> dict[str, str]:
    """Return an environment in which Python takes the locale as it is."""
    dropped = ("PYTHON", "LC_", "LANG")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    kept |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": locale}
    return kept | {"PYTHONPATH": str(TOP), "COLUMNS": "80", **more}


def run(
    commands: Commands,
    environ: dict[str, str] | None = None,
    *,
    stdout: int,
    stderr: int | None = None,
    before: Callable[[], None] | None = None,
) -> tuple[list[int], str]:
    """Run commands one after the other.

    Returns:
        Their exit codes, and what they wrote to standard error.
    """
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(write), json.dumps(commands)],
        cwd=TOP,
        env=environ or environment(),
        stdout=stdout,
        stderr=subprocess.PIPE if stderr is None else stderr,
        pass_fds=[write],
        preexec_fn=before,  # noqa: PLW1509 - no thread of this process takes part
    )
    os.close(write)
    with os.fdopen(read) as report:
        _, complaints = process.communicate(timeout=300)
        return json.loads(report.read() or "[]"), (complaints or b"").decode(errors="replace")


def check(complaints: str) -> None:
    for word in ("Traceback", "Exception", "connection to zswapd broke", "Error:"):
        assert word not in complaints, complaints


@pytest.fixture(scope="module")
def usual(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[int], bytes]:
    """Return the exit codes and the output of all commands where there is nothing wrong with it."""
    path = tmp_path_factory.mktemp("usual") / "output"
    with path.open("wb") as file:
        codes, complaints = run(commands, stdout=file.fileno())
    check(complaints)
    assert len(codes) == len(commands)
    return codes, path.read_bytes()


@contextlib.contextmanager
def broken_pipe() -> Iterator[int]:
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@contextlib.contextmanager
def broken_socket() -> Iterator[int]:
    one, other = socket.socketpair()
    other.close()
    yield one.fileno()
    one.close()


@contextlib.contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags)
    yield descriptor
    os.close(descriptor)


@pytest.mark.slow
def test_a_reader_that_has_left_is_no_failure(
    commands: Commands, usual: tuple[list[int], bytes]
) -> None:
    with broken_pipe() as stdout:
        codes, complaints = run(commands, stdout=stdout)
    check(complaints)
    assert "cannot write" not in complaints
    for command, code, expected in zip(commands, codes, usual[0], strict=True):
        assert code in {expected, 0}, command
    some, _ = few(commands, usual)
    with broken_socket() as stdout:
        check(run(some, stdout=stdout)[1])


def check_unwritten(
    reason: str, outcome: tuple[list[int], str], commands: Commands, expected: list[int]
) -> None:
    codes, complaints = outcome
    check(complaints)
    for command, code, other in zip(commands, codes, expected, strict=True):
        assert code in ({1} if other == 0 else {other, 1}), command
    for program in ("zswapctl", "zswapd"):
        said = f"{program}: cannot write to standard output: {reason}"
        assert complaints.count(said) >= sum(
            name == program and code == 0
            for (name, _), code in zip(commands, expected, strict=True)
        )


@pytest.mark.slow
def test_output_that_cannot_be_written_is_said_in_a_line(
    commands: Commands, usual: tuple[list[int], bytes]
) -> None:
    with opened("/dev/full", os.O_WRONLY) as stdout:
        check_unwritten("No space left on device", run(commands, stdout=stdout), commands, usual[0])
    some, expected = few(commands, usual)
    with opened("/dev/null", os.O_RDONLY) as stdout:
        check_unwritten("Bad file descriptor", run(some, stdout=stdout), some, expected)


def limit_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))


@pytest.mark.slow
def test_output_that_is_cut_short_is_said_too(commands: Commands, tmp_path: Path) -> None:
    # The limit would cut byte code short too, and Python takes such a file for whole.
    environ = environment(PYTHONDONTWRITEBYTECODE="1")
    for command in [command for command in commands if command[1][-1] in {"defaults", "get"}]:
        with (tmp_path / "output").open("wb") as file:
            codes, complaints = run([command], environ, stdout=file.fileno(), before=limit_files)
        check(complaints)
        assert codes == [1]
        assert f"{command[0]}: cannot write to standard output: File too large\n" in complaints


def close_all() -> None:
    for number in range(3):
        os.close(number)


@pytest.mark.slow
def test_closed_standard_files_are_no_failure(
    commands: Commands, usual: tuple[list[int], bytes]
) -> None:
    some, expected = few(commands, usual)
    codes, complaints = run(some, stdout=subprocess.DEVNULL, before=lambda: os.close(1))
    check(complaints)
    assert codes == expected
    codes, _ = run(some, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, before=close_all)
    assert codes == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_waiting_for_a_reader_that_is_stopped_can_be_interrupted(
    daemon: FakeDaemon, number: signal.Signals
) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, bytes(1 << 16))
    os.set_blocking(write, True)
    code = "import sys; from zswapd.cli.zswapctl import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--socket", str(daemon.path), "get"],
        cwd=TOP,
        env=environment(),
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    try:
        waits_for = Path(f"/proc/{process.pid}/wchan")
        end = time.monotonic() + 10
        while "pipe_write" not in waits_for.read_text() and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(number)
        _, complaints = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
        os.close(read)
    assert (process.returncode, complaints) == (130, "zswapctl: interrupted\n")


@contextlib.contextmanager
def full_pipe() -> Iterator[int]:
    """A pipe that is full and does not block."""
    read, write = os.pipe2(os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, bytes(1 << 16))
    yield write
    os.close(write)
    os.close(read)


@pytest.mark.parametrize("stderr", ["broken", "full", "closed", "stopped"])
@pytest.mark.slow
def test_standard_error_that_takes_nothing_changes_nothing(
    stderr: str, commands: Commands, usual: tuple[list[int], bytes], tmp_path: Path
) -> None:
    pipes: dict[str, contextlib.AbstractContextManager[int]] = {
        "broken": broken_pipe(),
        "full": opened("/dev/full", os.O_WRONLY),
        "closed": opened("/dev/null", os.O_WRONLY),
        "stopped": full_pipe(),
    }
    some, expected = few(commands, usual)
    if stderr == "stopped":  # each that complains waits for a while
        some, expected = some[:4], expected[:4]
    before = (lambda: os.close(2)) if stderr == "closed" else None
    path = tmp_path / "output"
    with path.open("wb") as file, pipes[stderr] as descriptor:
        codes, _ = run(some, stdout=file.fileno(), stderr=descriptor, before=before)
    assert codes == expected
    assert len(path.read_bytes()) > 1000


@pytest.mark.slow
def test_output_that_does_not_block_is_waited_for(
    commands: Commands, usual: tuple[list[int], bytes]
) -> None:
    """A pipe that is full most of the time, with O_NONBLOCK set by another process that has it."""
    read, write = os.pipe2(os.O_NONBLOCK)
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(read, True)
    received = bytearray()

    def take() -> None:
        while piece := os.read(read, 2000):
            received.extend(piece)
            time.sleep(0.001)

    reader = threading.Thread(target=take)
    reader.start()
    long = [
        (command, code)
        for command, code in zip(commands, usual[0], strict=True)
        if command[1][-1] in {"get", "defaults"}
    ]
    try:
        codes, complaints = run([command for command, _ in 3 * long], stdout=write)
    finally:
        os.close(write)
        reader.join()
        os.close(read)
    check(complaints)
    assert codes == [code for _, code in 3 * long]
    once = len(received) // 3
    assert once > 1 << 13
    assert received[:once] * 3 == received


@pytest.mark.parametrize("locale", ["de_DE.ISO-8859-1", "C"])
@pytest.mark.slow
def test_every_command_says_the_same_in_any_locale(
    locale: str, locales: Path, commands: Commands, usual: tuple[list[int], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "output"
    environ = environment(locale, LOCPATH=str(locales))
    with path.open("wb") as file:
        codes, complaints = run(commands, environ, stdout=file.fileno())
    check(complaints)
    assert codes == usual[0]
    assert b"5 us" not in usual[1]
    # Lines are wrapped by their length, so the number may differ by the few characters that became
    # longer.
    said, expected = path.read_bytes().splitlines(), usual[1].splitlines()
    assert abs(len(said) - len(expected)) <= 5
    assert all(line.decode("latin-1").isprintable() for line in said)


@pytest.mark.slow
def test_defaults_are_a_config_file_whatever_the_locale(locales: Path, tmp_path: Path) -> None:
    """TOML is UTF-8, so a character of 8 bits in a comment would have the whole file refused."""
    path = tmp_path / "zswapd.toml"
    for locale in ("de_DE.ISO-8859-1", "C", "C.UTF-8"):
        with path.open("wb") as file:
            run(
                [("zswapd", ["config", "defaults"])],
                environment(locale, LOCPATH=str(locales)),
                stdout=file.fileno(),
            )
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) > 100
        tomllib.loads(text)
        codes, complaints = run(
            [("zswapd", ["config", "check", "--config", str(path)])], stdout=subprocess.DEVNULL
        )
        taken = "127.0.0.1:9847: Address already in use"  # by another test's daemon
        assert codes == [0]
        assert [line for line in complaints.splitlines() if not line.endswith(taken)] == []


@pytest.mark.parametrize(
    ("text", "encoding", "written"),
    [
        ("5 \u00b5s \u2026 \u2192 \u201cx\u201d", "ascii", b'5 us ... -> "x"'),
        ("5 \u00b5s \u2026", "latin-1", b"5 \xb5s ..."),
        ("\u00fcber \uff11 \u4e2d", "ascii", b"uber 1 ?"),
        ("/a/\udcff\udce4", "ascii", b"/a/\xff\xe4"),
        ("/a/\udcff", "utf-8", b"/a/\xff"),
        ("\u00b5\u2026", "utf-8", "\u00b5\u2026".encode()),
    ],
)
def test_what_an_encoding_lacks_is_written_in_plain_letters(
    text: str, encoding: str, written: bytes
) -> None:
    assert text.encode(encoding, "zswapd.plain") == written
    assert output.plain("5 \u00b5s") == "5 us"


class Broken:
    """A daemon that sends progress, and then its result, to one client."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._socket.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(1000)
            connection.sendall(encode_progress(1) + encode_result(2))
            connection.recv(1000)

    def close(self) -> None:
        self._thread.join()
        self._socket.close()


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), output.OutputError(28, "No space left on device")]
)
def test_an_error_in_showing_progress_is_not_one_of_the_connection(
    error: OSError, tmp_path: Path
) -> None:
    def show(_: Any) -> None:
        raise error

    daemon = Broken(tmp_path / "zswapd.sock")
    with pytest.raises(type(error)), Client(daemon.path) as client:
        client.call("pages", progress=show)
    daemon.close()


class Reset:
    """A socket whose peer has reset the connection."""

    def __init__(self, real: socket.socket) -> None:
        self._real = real

    def recv(self, _: int) -> bytes:
        raise ConnectionResetError(104, "Connection reset by peer")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_an_error_of_the_connection_still_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = Broken(tmp_path / "zswapd.sock")
    with Client(daemon.path) as client:
        monkeypatch.setattr(client, "_socket", Reset(client._socket))
        with pytest.raises(
            ControlError, match="connection to zswapd broke: Connection reset by peer"
        ):
            client.call("pages")
        monkeypatch.undo()
    daemon.close()
