# SPDX-License-Identifier: GPL-2.0-or-later
"""Messages of the control socket.

What is sent comes out again, and whatever strangers send is refused in words.
"""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zswapd import errors
from zswapd.control import protocol
from zswapd.control.protocol import Progress, Request, Result
from zswapd.errors import ControlError, ZswapdError

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("status", {}),
        ("get", {"keys": ["pool.compressor", "ü"]}),
        ("get", {}),
        ("reset", {"keys": ["pool.compressor"]}),
        (
            "set",
            {"settings": {"pool.compressor": "lzo", "fuse.poll_us": 0, "pool.checksum": False}},
        ),
    ],
)
def test_a_request_comes_out_as_it_went_in(command: str, arguments: dict[str, object]) -> None:
    line = protocol.encode_request(command, arguments)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert protocol.decode_request(line) == Request(command, arguments)


@given(JSON)
def test_a_result_comes_out_as_it_went_in(value: object) -> None:
    assert protocol.decode_reply(protocol.encode_result(value)) == Result(value)
    assert protocol.decode_reply(protocol.encode_progress(value)) == Progress(value)
    assert protocol.encode_result(value).count(b"\n") == 1


@pytest.mark.parametrize(
    "cls", [errors.ConfigError, errors.HeadroomError, errors.ControlError, errors.ZswapdError]
)
def test_an_error_comes_out_as_the_class_it_was(cls: type[ZswapdError]) -> None:
    with pytest.raises(cls) as caught:
        protocol.decode_reply(protocol.encode_error("it is full", "make room", cls.exit_code))
    assert type(caught.value) is cls
    assert (caught.value.message, caught.value.hint) == ("it is full", "make room")


@pytest.mark.parametrize("code", [9999, "5", None, [], True])
def test_an_error_with_an_unknown_code_is_a_control_error_or_its_base(code: object) -> None:
    line = json.dumps({"v": 1, "ok": False, "error": {"message": "m", "code": code}}).encode()
    with pytest.raises(ZswapdError, match="m"):
        protocol.decode_reply(line)


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        (b"", "not JSON", "one JSON object a line"),
        (b"hello", "not JSON", "UTF-8"),
        (b"\xff\xfe", "not JSON", "UTF-8"),
        (b"[" * 60000, "not JSON", "one JSON object"),
        (
            b'{"v": 1, "cmd": "get", "args": {"keys": ' + b"9" * 5000 + b"}}",
            "not JSON",
            "one JSON object",
        ),
        (b'{"v": NaN}', "not JSON", "one JSON object"),
        (b"[]", "not a JSON object", "one JSON object"),
        (b'{"cmd": "status"}', "version None, not 1", "zswapctl that came with"),
        (b'{"v": 2, "cmd": "status"}', "version 2, not 1", "zswapctl that came with"),
        (b'{"v": true, "cmd": "status"}', "version True, not 1", "zswapctl that came with"),
        (b'{"v": 1}', "no command", '"cmd": NAME'),
        (b'{"v": 1, "cmd": 7}', "no command", '"cmd": NAME'),
        (b'{"v": 1, "cmd": "status", "args": []}', "no command", '"args"'),
        (b'{"v": 1, "cmd": "status", "extra": 1}', "no command", '"args"'),
        (b'{"v": 1, "cmd": "statu"}', "unknown command 'statu'", "did you mean status?"),
        (b'{"v": 1, "cmd": "xyzzy"}', "unknown command 'xyzzy'", "commands are: status, stats"),
        (b'{"v": 1, "cmd": "status", "args": {"all": 1}}', "no argument 'all'", "none"),
        (b'{"v": 1, "cmd": "get", "args": {"key": []}}', "no argument 'key'", "keys"),
        (b'{"v": 1, "cmd": "get", "args": {"keys": "pool.limit"}}', "wrong type", "full names"),
        (b'{"v": 1, "cmd": "get", "args": {"keys": [1]}}', "wrong type", "full names"),
        (b'{"v": 1, "cmd": "set", "args": {"settings": {"a": [1]}}}', "wrong type", "new values"),
        (b'{"v": 1, "cmd": "set", "args": {"settings": null}}', "wrong type", "new values"),
        (b'{"v": 1, "cmd": "cache-remove", "args": {"name": 7}}', "wrong type", "cache volume"),
        (b'{"v": 1, "cmd": "cache-remove"}', "needs the argument name", "cache volume"),
        (
            b'{"v": 1, "cmd": "cache-add", "args": {"name": "disk"}}',
            "needs the argument path",
            "absolute path",
        ),
    ],
)
def test_a_bad_request_is_refused_and_says_what_would_be_right(
    line: bytes, message: str, hint: str
) -> None:
    with pytest.raises(ControlError) as caught:
        protocol.decode_request(line)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b'{"v":1}',
        b'{"v":1,"ok":1}',
        b'{"v":1,"ok":false}',
        b'{"v":1,"ok":false,"error":{"message":1}}',
    ],
)
def test_a_reply_that_makes_no_sense_is_a_control_error(line: bytes) -> None:
    with pytest.raises(ControlError):
        protocol.decode_reply(line)


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_decode_request_of_anything_gives_a_request_or_a_control_error(line: bytes) -> None:
    with contextlib.suppress(ControlError):
        assert protocol.decode_request(line).command in protocol.COMMANDS


@given(command=st.sampled_from(sorted(protocol.COMMANDS)) | st.text(max_size=8), arguments=JSON)
def test_decode_request_of_any_arguments_gives_valid_ones_or_a_control_error(
    command: str, arguments: object
) -> None:
    line = json.dumps({"v": 1, "cmd": command, "args": arguments}).encode()
    with contextlib.suppress(ControlError):
        request = protocol.decode_request(line)
        names = [argument.name for argument in protocol.COMMANDS[request.command]]
        assert set(request.arguments) <= set(names)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1: object()}])
def test_what_json_cannot_say_is_not_sent(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        protocol.encode_result(value)
