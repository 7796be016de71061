"""What RFC 6455 asks of a server, byte by byte, and what a socket on its transport costs and leaves behind."""

import asyncio
import contextlib
import gc
import json
import os
import socket
import struct
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from websockets.frames import Close, Frame, Opcode

from pubsub_mw.errors import CloseCode
from pubsub_mw.publisher import AsyncPublisher
from pubsub_mw.realtime.send_queue import websocket_frame
from pubsub_mw.realtime.socket import USER_TIMEOUT_MS, Socket, Sockets
from pubsub_mw.realtime.wheel import Wheel
from pubsub_mw.settings import Settings
from tests.realtime.conftest import OURS, Site
from tests.tools.clock import MS, eventually_async

pytestmark = pytest.mark.anyio

Serve = Callable[..., Awaitable[Site]]

HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
CONNECT = b'{"type":"connect","channels":{"room":null}}'
_BYTES_OF_OURS = 2_500
"""2,430 were found; the transport's own are 1,300 more. Raise it for a reason alone: there are 100,000 connections."""
TEXT, BINARY, CONT, CLOSE, PING, PONG = Opcode.TEXT, Opcode.BINARY, Opcode.CONT, Opcode.CLOSE, Opcode.PING, Opcode.PONG


def frame(
    opcode: int, data: bytes, *, fin: bool = True, rsv: int = 0, masked: bool = True, wide: bool = False
) -> bytes:
    """A frame as a client sends it, or should not."""
    size = len(data)
    if wide:
        length = bytes([127 | 0x80 * masked]) + struct.pack("!Q", size)
    elif size < 126:
        length = bytes([size | 0x80 * masked])
    elif size < 65_536:
        length = bytes([126 | 0x80 * masked]) + struct.pack("!H", size)
    else:
        length = bytes([127 | 0x80 * masked]) + struct.pack("!Q", size)
    mask = os.urandom(4)
    body = mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(data)) if masked else data
    return bytes([0x80 * fin | rsv << 4 | opcode]) + length + body


class Peer:
    """The other end of the TCP connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))

    async def recv(self) -> tuple[int, bytes]:
        async with asyncio.timeout(5_000 * MS):
            first, length = await self.reader.readexactly(2)
            assert first & 0x70 == 0
            assert length < 128, "a server's frames are not masked"
            if length == 126:
                (length,) = struct.unpack("!H", await self.reader.readexactly(2))
            elif length == 127:
                (length,) = struct.unpack("!Q", await self.reader.readexactly(8))
            assert first & 0x80, "a server's messages are one frame each"
            return first & 15, await self.reader.readexactly(length)

    async def recv_json(self, kind: str) -> dict[str, Any]:
        """The next frame of this kind; pings and what comes before are passed over."""
        while True:
            opcode, data = await self.recv()
            assert opcode == TEXT, (opcode, data)
            found: dict[str, Any] = json.loads(data)
            if found["type"] == kind:
                return found

    async def recv_close(self) -> tuple[int, str]:
        """The code and reason of the close frame; then the server ends its side."""
        while True:
            opcode, data = await self.recv()
            if opcode == CLOSE:
                close = Close.parse(data)
                async with asyncio.timeout(5_000 * MS):
                    assert await self.reader.read() == b""
                return int(close.code), close.reason

    async def echoes(self) -> None:
        """The connection goes on: the server answers."""
        self.send(frame(TEXT, b'{"type":"subscribe","channel":"a b"}'))
        assert (await self.recv_json("error"))["code"] == "bad_channel"


class Sink(asyncio.Transport):
    """A transport that takes everything at once."""

    def __init__(self, found: socket.socket | None = None) -> None:
        super().__init__()
        self.found, self.asked = found, 0
        self.written: list[bytes] = []

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        self.asked += name == "socket"
        return self.found if name == "socket" else default

    def write(self, data: Any) -> None:
        self.written.append(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        pass


@pytest.fixture
def websocket_class() -> str:
    return OURS


@pytest.fixture
async def connect() -> AsyncIterator[Callable[[Site], Awaitable[Peer]]]:
    """Open a WebSocket by hand: `await connect(site)`; `connected` was received."""
    peers: list[Peer] = []

    async def open_peer(site: Site, *, says_connect: bool = True) -> Peer:
        peer = Peer(*await asyncio.open_connection("127.0.0.1", site.port))
        peers.append(peer)
        peer.send(HANDSHAKE)
        head = await peer.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head  # RFC 6455 1.3
        if says_connect:
            peer.send(frame(TEXT, CONNECT))
            await peer.recv_json("subscribed")
        return peer

    yield open_peer
    for peer in peers:
        peer.writer.close()


Connect = Callable[..., Awaitable[Peer]]


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        pytest.param(frame(TEXT, b"{}", masked=False), 1002, id="not masked"),
        pytest.param(frame(TEXT, b"{}", rsv=4), 1002, id="compressed without leave"),
        pytest.param(frame(TEXT, b"{}", rsv=2), 1002, id="second reserved bit"),
        pytest.param(frame(TEXT, b"{}", rsv=1), 1002, id="third reserved bit"),
        pytest.param(frame(3, b""), 1002, id="reserved data opcode"),
        pytest.param(frame(11, b""), 1002, id="reserved control opcode"),
        pytest.param(frame(CONT, b"x"), 1002, id="continuation of nothing"),
        pytest.param(frame(TEXT, b"a", fin=False) + frame(TEXT, b"b"), 1002, id="message within a message"),
        pytest.param(frame(PING, b"x" * 126), 1002, id="long ping"),
        pytest.param(frame(PING, b"x", fin=False), 1002, id="ping in parts"),
        pytest.param(frame(CLOSE, b"x"), 1002, id="close of one byte"),
        pytest.param(frame(CLOSE, struct.pack("!H", 1005)), 1002, id="close code that is never sent"),
        pytest.param(frame(CLOSE, struct.pack("!H", 1000) + b"\xff"), 1007, id="close reason that is no UTF-8"),
        pytest.param(frame(TEXT, b"\xff\xfe"), 1007, id="text that is no UTF-8"),
        pytest.param(frame(TEXT, b"\xed\xa0\x80"), 1007, id="a surrogate"),
        pytest.param(
            frame(TEXT, "ä".encode()[:1], fin=False) + frame(CONT, b"x"), 1007, id="a character broken between parts"
        ),
        pytest.param(frame(TEXT, b"x" * 70_000), 1009, id="too large"),
        pytest.param(bytes([0x81, 0xFF]) + struct.pack("!Q", 1 << 62), 1009, id="too large by its header alone"),
        pytest.param(
            b"".join(frame(TEXT if i == 0 else CONT, b"x" * 10_000, fin=False) for i in range(8)),
            1009,
            id="too large in parts without end",
        ),
    ],
)
async def test_what_the_protocol_forbids_ends_the_connection_with_its_code(
    serve_realtime: Serve, connect: Connect, publisher: AsyncPublisher, sent: bytes, code: int
) -> None:
    site = await serve_realtime(max_frame_bytes=65_536)
    peer, other = await connect(site), await connect(site)
    peer.send(sent)
    found, _ = await peer.recv_close()
    assert found == code
    await eventually_async(lambda: _hub(site).connection_count == 1)
    await publisher.publish("room", 1)
    await other.recv_json("message")
    peer.writer.close()  # who does not is cut off, in a while, as below
    await eventually_async(lambda: len(_sockets(site)) == 1)


def _hub(site: Site) -> Any:
    return site.app._running.hub


def _sockets(site: Site) -> list[Socket]:
    return [peer for peer in site.server.server_state.connections if isinstance(peer, Socket)]


@pytest.mark.parametrize("step", [1, 2, 3, 7])
async def test_frames_cut_anywhere_are_the_same_frames(serve_realtime: Serve, connect: Connect, step: int) -> None:
    site = await serve_realtime()
    peer = await connect(site)
    text = b'{"type":"subscribe","channel":"\xc3\xa4"}'
    sent = b"".join(
        [
            frame(TEXT, text[:33], fin=False),
            frame(PING, b"between"),
            frame(CONT, b"", fin=False),
            frame(CONT, text[33:-1], fin=False),
            frame(PONG, b"unasked"),
            frame(CONT, text[-1:]),
            frame(TEXT, b'{"type":"subscribe","channel":"room"}'),
            frame(TEXT, b"[" + b" " * 200 + b"]"),
            frame(PING, b"x" * 125),
        ]
    )
    for start in range(0, len(sent), step):
        peer.send(sent[start : start + step])
        await peer.writer.drain()
        if start % 5 == 0:
            await asyncio.sleep(0)
    answers: list[str] = []
    pongs: list[bytes] = []
    while len(answers) < 3 or len(pongs) < 2:
        opcode, data = await peer.recv()
        if opcode == PONG:
            pongs.append(data)
        elif (found := json.loads(data))["type"] == "error":
            answers.append(found["code"])
    assert answers == ["bad_channel", "already_subscribed", "bad_frame"]
    assert pongs == [b"between", b"x" * 125]


async def test_many_who_stop_in_the_middle_of_a_frame_do_not_mix(serve_realtime: Serve, connect: Connect) -> None:
    site = await serve_realtime()
    peers = [await connect(site) for _ in range(8)]
    texts = [frame(TEXT, json.dumps({"type": "subscribe", "channel": f"bad channel {i}"}).encode()) for i in range(8)]
    for cut in (1, 2, 3, 6, 20):
        for peer, sent in zip(peers, texts, strict=True):
            peer.send(sent[:cut])
        await asyncio.sleep(20 * MS)
        for peer, sent in reversed(list(zip(peers, texts, strict=True))):
            peer.send(sent[cut:])
        for index, peer in enumerate(peers):
            assert (await peer.recv_json("error"))["channel"] == f"bad channel {index}"


async def test_a_length_in_more_bytes_than_needed_is_read_all_the_same(serve_realtime: Serve, connect: Connect) -> None:
    site = await serve_realtime()
    peer, other = await connect(site), await connect(site)
    for _ in range(3):
        peer.send(frame(TEXT, b'{"type":"subscribe","channel":"a b"}', wide=True))
        assert (await peer.recv_json("error"))["code"] == "bad_channel"
        await other.echoes()
    await peer.echoes()


async def test_frames_without_content_cost_nothing_however_many(serve_realtime: Serve, connect: Connect) -> None:
    site = await serve_realtime()
    peer = await connect(site)
    peer.send(frame(TEXT, b"", fin=False), *[frame(CONT, b"", fin=False) for _ in range(20_000)], frame(CONT, b"{}"))
    assert (await peer.recv_json("error"))["code"] == "bad_frame"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(struct.pack("!H", 1000) + b"bye", (1000, "bye"), id="with a reason"),
        pytest.param(struct.pack("!H", 4321), (4321, ""), id="with a code of the application"),
        pytest.param(b"", (1005, ""), id="with nothing"),
    ],
)
async def test_a_close_is_answered_alike_and_nothing_is_left(
    serve_realtime: Serve, connect: Connect, data: bytes, expected: tuple[int, str]
) -> None:
    site = await serve_realtime()
    peer = await connect(site)
    peer.send(frame(TEXT, b'{"type":"subscribe","channel":"a b"}'), frame(CLOSE, data))
    assert (await peer.recv_json("error"))["code"] == "bad_channel"
    assert await peer.recv_close() == expected
    await eventually_async(lambda: _hub(site).connection_count == _hub(site).channel_count == 0)
    assert not site.server.server_state.connections


async def test_who_ends_only_its_sending_side_is_gone(serve_realtime: Serve, connect: Connect) -> None:
    site = await serve_realtime()
    peer = await connect(site)
    peer.writer.write_eof()
    async with asyncio.timeout(5_000 * MS):
        await peer.reader.read()
    await eventually_async(lambda: _hub(site).connection_count == 0)


async def test_frames_are_taken_in_order_while_one_takes_its_time(serve_realtime: Serve, connect: Connect) -> None:
    site = await serve_realtime()
    peer = await connect(site, says_connect=False)
    # The connect waits for the broker; what comes behind it in one piece must not overtake it, nor get lost.
    subscribes = [frame(TEXT, json.dumps({"type": "subscribe", "channel": f"c{i}"}).encode()) for i in range(50)]
    peer.send(frame(TEXT, CONNECT), *subscribes[:25])
    await asyncio.sleep(0)
    peer.send(*subscribes[25:])
    assert (await peer.recv_json("connected"))["connection"]
    found = [(await peer.recv_json("subscribed"))["channel"] for _ in range(51)]
    assert set(found) == {"room", *(f"c{i}" for i in range(50))}


async def test_who_does_not_answer_a_close_is_cut_off(
    serve_realtime: Serve, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pubsub_mw.realtime.socket.CLOSE_SECONDS", 500 * MS)
    site = await serve_realtime(connect_timeout=50 * MS)
    peer = await connect(site, says_connect=False)
    assert (await peer.recv_json("disconnect"))["code"] == CloseCode.CONNECT_TIMEOUT
    opcode, data = await peer.recv()
    assert (opcode, Close.parse(data).code) == (CLOSE, CloseCode.CONNECT_TIMEOUT)
    with pytest.raises(ConnectionResetError):
        await peer.reader.read()
    assert not site.server.server_state.connections


async def test_a_server_that_stops_without_a_drain_says_so(serve_realtime: Serve, connect: Connect) -> None:
    site = await serve_realtime()
    peer = await connect(site)
    site.server.should_exit = True
    code, _ = await peer.recv_close()
    assert code == CloseCode.SHUTDOWN


async def test_an_idle_connection_keeps_neither_parser_nor_task(serve_realtime: Serve, connect: Connect) -> None:
    site = await serve_realtime()
    await connect(site)
    tasks = len(asyncio.all_tasks())
    for _ in range(10):
        await (await connect(site)).echoes()
    assert len(_sockets(site)) == 11
    assert all(item._parser is None and item._frames_left is None for item in _sockets(site))
    assert len(asyncio.all_tasks()) == tasks
    names = [type(item).__name__ for item in gc.get_objects()]
    assert not {"RequestResponseCycle", "_Ordinary"} & set(names)


async def test_an_idle_connection_is_counted_in_bytes(serve_realtime: Serve, connect: Connect) -> None:
    """A guard: of what our own code allocates for a connection on one shared channel, this much is left."""
    site = await serve_realtime()
    peers = [await connect(site) for _ in range(10)]
    ours = [tracemalloc.Filter(inclusive=True, filename_pattern="*/pubsub_mw/realtime/*")]
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.take_snapshot().filter_traces(ours)
        peers += [await connect(site) for _ in range(32)]
        gc.collect()
        after = tracemalloc.take_snapshot().filter_traces(ours)
    finally:
        tracemalloc.stop()
    grown = sum(difference.size_diff for difference in after.compare_to(before, "filename")) / 32
    where = "\n".join(map(str, after.compare_to(before, "lineno")[:40]))
    assert grown < _BYTES_OF_OURS, f"{grown:.0f} bytes:\n{where}"


async def test_the_kernel_gives_up_a_dead_client(serve_realtime: Serve, connect: Connect) -> None:
    site = await serve_realtime()
    for _ in range(3):
        await connect(site)
    for found in _sockets(site):
        raw = found._transport.get_extra_info("socket")
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000


async def test_what_the_listener_has_said_of_a_dead_client_is_not_said_again() -> None:
    sockets = Sockets(Settings.build("memory://", environ={}), Wheel())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        sink = Sink(listener)
        for _ in range(3):
            sockets.bound(sink)
    assert sink.asked == 1


async def test_a_connect_is_answered_in_one_write(serve_realtime: Serve, connect: Connect) -> None:
    site = await serve_realtime()
    await connect(site)  # from now on it is known where the channel stands
    peer = await connect(site, says_connect=False)
    peer.send(frame(TEXT, CONNECT))
    answer = await peer.reader.read(65_536)
    assert 0 < answer.index(b'"connected"') < answer.index(b'"subscribed"')


async def test_recovery_waits_for_what_is_held_too() -> None:
    sink = Sink()
    held = Socket(Sockets(Settings.build("memory://", environ={}), Wheel()), sink, set())
    told: list[bool] = []
    low = [held.is_low]
    held.hold()
    for size in (0, 100_000, 200_000):
        held.put_recovered_nowait(b"x" * size)
        low.append(held.is_low)
    assert low == [True, True, True, False]
    held.when_low(lambda: told.append(held.is_low))
    held.put_recovered_nowait(b"x" * 900_000)
    held.put_nowait(b"live")
    held.put_first(b"first")
    assert not sink.written
    held.release()
    assert told == [True]
    assert held.closed is None, "what is recovered does not count against the bound"
    (written,) = sink.written
    assert written.startswith(b"\x81\x05first")
    assert written.endswith(b"xx\x81\x04live")


async def test_what_the_kernel_does_not_take_at_once_goes_out_behind_the_rest() -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
    client = Socket(Sockets(Settings.build(environ={}, send_queue_bytes=1 << 26), Wheel()), transport, set())
    texts = [b"%d," % number * (number * 7_919 % 20_000) for number in range(300)]
    expected = b"".join(map(websocket_frame, texts))
    got, times_full = bytearray(), 0
    for number, text in enumerate(texts):
        client.put_nowait(text)
        times_full += not client._is_clear
        if number % 3:
            with contextlib.suppress(BlockingIOError):
                got += theirs.recv(40_000)
            await asyncio.sleep(0)
    while len(got) < len(expected):
        got += await loop.sock_recv(theirs, 1 << 20)
    is_same = got == expected  # pytest would compare ten megabytes line by line
    assert is_same
    assert 30 < times_full < 300, times_full
    client.put_nowait(b"{}")
    assert client._is_clear, "nothing waits any more"
    raw = client._raw
    assert raw is not None
    transport.abort()
    await eventually_async(lambda: raw.fileno() == -1)
    theirs.close()


def test_frame_here_and_in_the_library_are_the_same() -> None:
    for size in (0, 5, 125, 126, 65_535, 65_536):
        ours = frame(TEXT, b"x" * size, masked=False)
        assert ours == Frame(TEXT, b"x" * size).serialize(mask=False)
