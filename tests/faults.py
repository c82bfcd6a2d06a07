"""An HTTP proxy that breaks what a seed tells it to break, in front of a real store.

It understands enough of HTTP/1.1 to choose a fault for every single request on connections that stay open, and forwards
every byte it does not break as it came: the Host header too, which S3's signatures cover.

Whether and how a request is broken depends on the seed, the request, and how often this very request came before; never
on time, threads or connections. Two runs that send the same requests meet the same faults, however they are scheduled.

It also runs as a process of its own, for long runs; SIGTERM or Ctrl-C ends it:

    python -m tests.faults --target http://127.0.0.1:8333 --seed 3 --read-status 0.1 --write-lost-reply 0.05 \
        --max-per-request 4 --journal journal.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import select
import signal
import socket
import struct
import termios
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal

from tests.waiting import PATIENCE_S

_MAX_HEAD_BYTES: Final = 256 * 1024
_PIECE_BYTES: Final = 256 * 1024
_UNKNOWN_LENGTH_BYTES: Final = 16 * 1024
"""A body whose length is not known ahead is cut somewhere in so many of its first bytes."""
_CONNECT_TIMEOUT_S: Final = 10
_READS: Final = frozenset({"GET", "HEAD", "OPTIONS"})

_Framing = int | Literal["chunked", "until close"]


class Fault(StrEnum):
    """What can befall a request."""

    STATUS = "status"
    """It is answered 500 InternalError or 503 SlowDown; the store is never asked."""
    RESET = "reset"
    """The connection is reset; the store is never asked."""
    BROKEN_BODY = "broken_body"
    """The reply breaks off in its body, or in its headers if it has none; then the connection is reset."""
    STALL = "stall"
    """The reply stops at such a place; nothing follows until the client gives up or `Faults.stall_s` have passed."""
    FLIP = "flip"
    """One bit of an object's body is the other one; the headers are as they were."""
    LOST_REPLY = "lost_reply"
    """The store acts and answers; the client sees a reset instead."""


@dataclass(frozen=True, kw_only=True)
class Odds:
    """How likely each fault is, 0 to 1 each, together at most 1. A flip befalls only objects that are read."""

    status: float = 0.0
    reset: float = 0.0
    broken_body: float = 0.0
    stall: float = 0.0
    flip: float = 0.0
    lost_reply: float = 0.0

    def __post_init__(self) -> None:
        values = [getattr(self, fault) for fault in Fault]
        if min(values) < 0 or sum(values) > 1 + 1e-9:
            raise ValueError(f"odds must be at least 0 each and at most 1 together, got {self}")

    def pick(self, draw: float) -> Fault | None:
        """Return the fault that a number from [0, 1) stands for, or None."""
        for fault in Fault:
            odds: float = getattr(self, fault)
            if draw < odds:
                return fault
            draw -= odds
        return None


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What a proxy breaks.

    Attributes:
        reads: Odds for GET, HEAD and OPTIONS.
        writes: Odds for all other methods.
        max_per_request: Most faults in a row for one and the same request, so that a client with more tries gets on.
        stall_s: Seconds after which a stalled reply is reset.
    """

    reads: Odds = field(default_factory=Odds)
    writes: Odds = field(default_factory=Odds)
    max_per_request: int | None = None
    stall_s: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request, as it came.

    Attributes:
        n: Its number among all requests, from 0.
        method: In capitals.
        path: Still percent-encoded.
        query: Without the question mark.
        headers: Names in lower case.
        seen: How often this very request (method, path, query, range) came before.
    """

    n: int
    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    seen: int

    @property
    def is_read(self) -> bool:
        """Whether it changes nothing."""
        return self.method in _READS

    @property
    def is_object(self) -> bool:
        """Whether it asks for the body of an object: bucket and key, and no listing."""
        names = {name for name, _ in urllib.parse.parse_qsl(self.query, keep_blank_values=True)}
        return self.method == "GET" and "/" in self.path.strip("/") and names <= {"x-id", "versionId", "partNumber"}

    def draw(self, seed: int, purpose: str) -> float:
        """Return the number from [0, 1) that this request, under this seed, has for a purpose."""
        digest = hashlib.sha256(f"{seed} {purpose} {self.seen} ".encode() + _identity(self)).digest()
        return int.from_bytes(digest[:7], "big") / 2**56


@dataclass(kw_only=True)
class Record:
    """What became of a request. Filled in as things happen, always before the client can tell.

    Attributes:
        n: Number of the request.
        method: Of the request.
        path: Of the request, percent-encoded.
        query: Of the request.
        fault: What was done to it.
        status: What the store answered, if it was asked and did.
        bytes: Of the reply's body that were sent on.
    """

    n: int
    method: str
    path: str
    query: str
    fault: Fault | None = None
    status: int | None = None
    bytes: int = 0


Callback = Callable[[Request], Fault | None]


class Hold:
    """A point where matching requests wait. Made by `FaultProxy.hold`."""

    def __init__(self, match: Callable[[Request], bool], *, after: bool) -> None:
        self._match = match
        self._after = after
        self._reached = threading.Event()
        self._released = threading.Event()

    def wait(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait until a request is held here.

        Raises:
            TimeoutError: If none came.
        """
        if not self._reached.wait(timeout_s):
            raise TimeoutError(f"no matching request came within {timeout_s} s")

    def release(self) -> None:
        """Let the requests held here, and all that follow, go on."""
        self._released.set()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def pass_through(self, request: Request, *, after: bool) -> None:
        """Stop a matching request here until it is released."""
        if after == self._after and not self._released.is_set() and self._match(request):
            self._reached.set()
            self._released.wait()


class FaultProxy:
    """A proxy on 127.0.0.1 that breaks some of the requests to a server. Use it in a `with` block.

    Args:
        target_url: Of the real server: http://host:port.
        seed: Of all that it does.
        faults: What it breaks; can be changed while it runs. Default: nothing.
        on_request: Called before a request reaches the server; a fault it returns is what happens.
        on_reply: Called when the server has answered, before the client hears of it; likewise. It comes too late for
            STATUS and RESET, which are then a LOST_REPLY.
        port: To listen on. Default: a free one.

    Callbacks are called on the thread of their connection: to block is to hold that request back.
    """

    def __init__(
        self,
        target_url: str,
        seed: int = 0,
        faults: Faults | None = None,
        *,
        on_request: Callback | None = None,
        on_reply: Callback | None = None,
        port: int = 0,
    ) -> None:
        target = urllib.parse.urlsplit(target_url)
        self._target = (str(target.hostname), target.port or 80)
        self._seed = seed
        self.faults = faults or Faults()
        self.on_request = on_request
        self.on_reply = on_reply
        self._lock = threading.Lock()
        self._holds: list[Hold] = []
        self._records: list[Record] = []
        self._histories: dict[bytes, _History] = {}
        self._connections: dict[_Connection, threading.Thread] = {}
        # Keeps the port while the proxy is down: a socket that is bound but does not listen refuses connections.
        self._guard = _bound_socket(port)
        self._listener: socket.socket | None = None
        self._accepting: threading.Thread | None = None

    @property
    def endpoint_url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._guard.getsockname()[1]}"

    def __enter__(self) -> FaultProxy:
        self.down = False
        return self

    def __exit__(self, *_: object) -> None:
        for hold in self._holds:
            hold.release()
        self.down = True
        with self._lock:
            remaining = dict(self._connections)
        for connection, thread in remaining.items():
            connection.abandon()
            thread.join(10)
        self._guard.close()

    @property
    def down(self) -> bool:
        """Whether the store seems to be down: connections are refused, those that were open are reset."""
        return self._listener is None

    @down.setter
    def down(self, is_down: bool) -> None:
        if is_down == self.down:
            return
        if is_down:
            self._stop_listening()
        else:
            self._start_listening()

    def hold(self, match: Callable[[Request], bool], *, after: bool = False) -> Hold:
        """Hold matching requests back until the block ends or `Hold.release` is called.

        Args:
            match: Tells which requests.
            after: Hold them when the store has acted and before the client hears of it, rather than before the store
                is asked.
        """
        hold = Hold(match, after=after)
        with self._lock:
            self._holds.append(hold)
        return hold

    @property
    def journal(self) -> list[Record]:
        """All requests so far, in the order they came."""
        with self._lock:
            return [replace(record) for record in self._records]

    def count(self) -> Counter[Fault | None]:
        """Return how many requests met each fault; None counts those that met none."""
        return Counter(record.fault for record in self.journal)

    def dump(self, path: Path) -> None:
        """Write the journal as JSON lines."""
        path.write_text("".join(json.dumps(asdict(record)) + "\n" for record in self.journal))

    def _start_listening(self) -> None:
        listener = _bound_socket(self._guard.getsockname()[1])
        listener.listen(1024)
        self._listener = listener
        self._accepting = threading.Thread(target=self._accept, args=(listener,), name="fault-proxy", daemon=True)
        self._accepting.start()

    def _stop_listening(self) -> None:
        listener, accepting, self._listener = self._listener, self._accepting, None
        assert listener is not None
        assert accepting is not None
        listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        accepting.join(10)
        listener.close()
        with self._lock:
            open_ones = dict(self._connections)
        for connection in open_ones:
            connection.cut()
        for connection, thread in open_ones.items():
            if not connection.is_consulting:  # the caller may be the callback
                thread.join(2)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = _Connection(client, self._target)
            thread = threading.Thread(target=self._serve, args=(connection,), name="fault-proxy", daemon=True)
            with self._lock:
                self._connections[connection] = thread
            thread.start()

    def _serve(self, connection: _Connection) -> None:
        try:
            while self._exchange(connection):
                pass
            connection.finish()
        except (OSError, _CutError):
            connection.reset()
        except BaseException:
            connection.reset()  # a callback failed: its client must not wait for ever
            raise
        finally:
            with self._lock:
                del self._connections[connection]

    def _exchange(self, connection: _Connection) -> bool:
        """Serve one request; tell whether another may follow on this connection."""
        head = connection.client.read_head()
        if head is None:
            return False
        request, record, fault = self._admit(head)
        fault = self._consult(connection, request, after=False) or fault
        if fault is Fault.RESET:
            record.fault = fault
            raise _CutError
        if fault is Fault.STATUS:
            record.fault = fault
            return self._answer(connection, request)
        reply = connection.ask(head, request)
        record.status = reply.status
        fault = self._consult(connection, request, after=True) or fault
        return self._pass_on(connection, request, reply, record, fault)

    def _admit(self, head: bytes) -> tuple[Request, Record, Fault | None]:
        """Number a request, and decide what befalls it."""
        method, target, headers = _parse_request(head)
        path, _, query = target.partition("?")
        request = Request(n=0, method=method, path=path, query=query, headers=headers, seen=0)
        with self._lock:
            history = self._histories.setdefault(hashlib.sha256(_identity(request)).digest(), _History())
            request = replace(request, n=len(self._records), seen=history.seen)
            fault = self._decide(request, history.in_a_row)
            history.seen += 1
            history.in_a_row = history.in_a_row + 1 if fault else 0
            record = Record(n=request.n, method=method, path=path, query=query)
            self._records.append(record)
        return request, record, fault

    def _decide(self, request: Request, in_a_row: int) -> Fault | None:
        faults = self.faults
        if faults.max_per_request is not None and in_a_row >= faults.max_per_request:
            return None
        fault = (faults.reads if request.is_read else faults.writes).pick(request.draw(self._seed, "fault"))
        return None if fault is Fault.FLIP and not request.is_object else fault

    def _consult(self, connection: _Connection, request: Request, *, after: bool) -> Fault | None:
        """Stop where the test says so, and ask it what should happen."""
        with self._lock:
            holds = tuple(self._holds)
        callback = self.on_reply if after else self.on_request
        connection.is_consulting = True
        try:
            for hold in holds:
                hold.pass_through(request, after=after)
            return callback(request) if callback else None
        finally:
            connection.is_consulting = False

    def _answer(self, connection: _Connection, request: Request) -> bool:
        """Answer in the store's place."""
        expects = _expects_continue(request.headers)
        if not expects:
            for _ in connection.client.pieces(_request_framing(request.headers)):
                pass
        slow = request.draw(self._seed, "status") < 0.5
        code, reason, message = (
            ("SlowDown", "503 Service Unavailable", "Please reduce your request rate.")
            if slow
            else ("InternalError", "500 Internal Server Error", "We encountered an internal error. Please try again.")
        )
        body = (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message>'
            f"<RequestId>{request.n:016X}</RequestId></Error>"
        ).encode()
        if request.method == "HEAD":
            body = b""
        # Who was answered instead of told to continue may or may not send the body: only a new connection is clean.
        keep = not expects and _keeps_alive(request.headers)
        head = (
            f"HTTP/1.1 {reason}\r\nContent-Type: application/xml\r\nx-amz-request-id: {request.n:016X}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: {'keep-alive' if keep else 'close'}\r\n\r\n"
        ).encode()
        connection.send(head + body)
        return keep

    def _pass_on(
        self, connection: _Connection, request: Request, reply: _Reply, record: Record, fault: Fault | None
    ) -> bool:
        """Send a reply on, or what the fault leaves of it."""
        pieces = connection.server.pieces(reply.framing)
        match fault:
            case Fault.LOST_REPLY | Fault.RESET | Fault.STATUS:
                record.fault = Fault.LOST_REPLY
                for _ in pieces:
                    pass
                raise _CutError
            case Fault.BROKEN_BODY | Fault.STALL:
                record.fault = fault
                self._pass_part(connection, request, reply, record)
                if fault is Fault.STALL:
                    connection.await_client_leaving(self.faults.stall_s)
                raise _CutError
            case Fault.FLIP if reply.framing != 0 and reply.status in (200, 206):
                record.fault = fault
                pieces = _flipped(pieces, reply.framing, request.draw(self._seed, "place"))
        connection.send(reply.head)
        for piece, is_payload in pieces:
            record.bytes += len(piece) if is_payload else 0
            connection.send(piece)
        return reply.keeps_alive and _keeps_alive(request.headers)

    def _pass_part(self, connection: _Connection, request: Request, reply: _Reply, record: Record) -> None:
        """Send the beginning of a reply: never all of it."""
        place = request.draw(self._seed, "place")
        if reply.framing == 0:
            connection.send(reply.head[: int(place * len(reply.head))])
            return
        connection.send(reply.head)
        left = int(place * (reply.framing if isinstance(reply.framing, int) else _UNKNOWN_LENGTH_BYTES))
        for piece, is_payload in connection.server.pieces(reply.framing):
            if not is_payload and piece.startswith(b"0"):
                return  # the last chunk, which would make the body whole
            part = piece[:left] if is_payload else piece
            record.bytes += len(part) if is_payload else 0
            connection.send(part)
            left -= len(part) if is_payload else 0
            if left == 0:
                return


class _CutError(Exception):
    """The client's connection is to be reset."""


@dataclass
class _History:
    """How often a request came, and how many times in a row up to now it was broken."""

    seen: int = 0
    in_a_row: int = 0


@dataclass(frozen=True)
class _Reply:
    """The head of a server's reply, and how its body ends."""

    head: bytes
    status: int
    framing: _Framing
    keeps_alive: bool


class _Wire:
    """A socket, and what it has received but nobody has taken yet."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._rest = b""

    def read_head(self) -> bytes | None:
        """Return everything up to and with the empty line; None if the other side closed before the first byte."""
        head = self._read_until(b"\r\n\r\n", at_least=1)
        return head or None

    def pieces(self, framing: _Framing) -> Iterator[tuple[bytes, bool]]:
        """Yield a body's bytes as they come, framing and all, and whether they are payload."""
        if framing == "chunked":
            yield from self._chunks()
        elif framing == "until close":
            while piece := self._take(_PIECE_BYTES):
                yield piece, True
        else:
            yield from self._stretch(framing)

    def _chunks(self) -> Iterator[tuple[bytes, bool]]:
        while True:
            line = self._read_until(b"\r\n")
            num_bytes = int(line.split(b";")[0], 16)
            if num_bytes == 0:
                trailer = line
                while (line := self._read_until(b"\r\n")) != b"\r\n":
                    trailer += line
                yield trailer + line, False
                return
            yield line, False
            yield from self._stretch(num_bytes)
            yield self._read_until(b"\r\n"), False

    def _stretch(self, num_bytes: int) -> Iterator[tuple[bytes, bool]]:
        while num_bytes:
            piece = self._take(min(num_bytes, _PIECE_BYTES))
            if not piece:
                raise ConnectionError("the other side closed in the middle of a body")
            num_bytes -= len(piece)
            yield piece, True

    def _take(self, num_bytes: int) -> bytes:
        if not self._rest:
            return self.sock.recv(num_bytes)
        piece, self._rest = self._rest[:num_bytes], self._rest[num_bytes:]
        return piece

    def _read_until(self, mark: bytes, at_least: int = 0) -> bytes:
        """Return all up to and with a mark; b"" if `at_least` allows it and the other side closed before that."""
        while (end := self._rest.find(mark)) < 0:
            if len(self._rest) > _MAX_HEAD_BYTES:
                raise ConnectionError("headers without an end")
            received = self.sock.recv(65536)
            if not received:
                if at_least and not self._rest:
                    return b""
                raise ConnectionError("the other side closed in the middle of a message")
            self._rest += received
        end += len(mark)
        taken, self._rest = self._rest[:end], self._rest[end:]
        return taken


class _Connection:
    """A client's connection, and the one to the server that belongs to it."""

    def __init__(self, client: socket.socket, target: tuple[str, int]) -> None:
        self.client = _Wire(client)
        self._target = target
        self._server: _Wire | None = None
        self._is_cut = False
        self.is_consulting = False

    @property
    def server(self) -> _Wire:
        """The connection to the server, which `ask` has opened."""
        assert self._server is not None
        return self._server

    def ask(self, head: bytes, request: Request) -> _Reply:
        """Send a request to the server, its body as the client sends it, and return the head of the final reply."""
        server = self._open_server()
        server.sock.sendall(head)
        if _expects_continue(request.headers):
            reply = self._read_reply(request)
            if reply.status != 100:
                # Who is not told to continue may or may not send the body: only a new connection is clean.
                return replace(reply, keeps_alive=False)
            self.send(reply.head)
        is_heard = True
        for piece, _ in self.client.pieces(_request_framing(request.headers)):
            if is_heard:
                try:
                    server.sock.sendall(piece)
                except OSError:
                    is_heard = False  # it has heard enough, and has answered
        reply = self._read_reply(request)
        while 100 <= reply.status < 200:
            self.send(reply.head)
            reply = self._read_reply(request)
        return replace(reply, keeps_alive=reply.keeps_alive and is_heard)

    def send(self, data: bytes) -> None:
        """Send something to the client."""
        if self._is_cut:
            raise _CutError
        self.client.sock.sendall(data)

    def await_client_leaving(self, timeout_s: float) -> None:
        """Wait until the client closes its side."""
        ready, _, _ = select.select([self.client.sock], [], [], timeout_s)
        if ready:
            self.client.sock.recv(1)

    def cut(self) -> None:
        """Make whoever serves this connection reset it."""
        self._is_cut = True
        self._shut(socket.SHUT_RD)

    def abandon(self) -> None:
        """Free whoever serves this connection from whatever it waits for."""
        self._is_cut = True
        self._shut(socket.SHUT_RDWR)

    def finish(self) -> None:
        """Close in good order: a close with unread bytes would be a reset, and could cost the client its reply."""
        if self._is_cut:
            self.reset()
            return
        sock = self.client.sock
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(1)
            while sock.recv(65536):
                pass
        sock.close()
        self._close_server()

    def reset(self) -> None:
        """Close with a reset, once what was sent has left."""
        sock = self.client.sock
        deadline = time.monotonic() + 1
        with contextlib.suppress(OSError):
            while not self._is_cut and _unsent_bytes(sock) and time.monotonic() < deadline:
                time.sleep(0.001)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        self._close_server()

    def _open_server(self) -> _Wire:
        if self._server is not None and select.select([self._server.sock], [], [], 0)[0]:
            self._close_server()  # it closed an idle connection
        if self._server is None:
            sock = socket.create_connection(self._target, _CONNECT_TIMEOUT_S)
            sock.settimeout(None)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._server = _Wire(sock)
            if self._is_cut:
                raise _CutError
        return self._server

    def _read_reply(self, request: Request) -> _Reply:
        head = self.server.read_head()
        if head is None:
            raise ConnectionError("the server closed without an answer")
        return _parse_reply(head, request.method)

    def _close_server(self) -> None:
        if self._server is not None:
            self._server.sock.close()
            self._server = None

    def _shut(self, how: int) -> None:
        for wire in (self.client, self._server):
            if wire is not None:
                with contextlib.suppress(OSError):
                    wire.sock.shutdown(how)


def _flipped(pieces: Iterator[tuple[bytes, bool]], framing: _Framing, place: float) -> Iterator[tuple[bytes, bool]]:
    """Yield the pieces with one bit of the payload flipped: of its first byte, if its length is not known ahead."""
    bit = int(place * 8 * (framing if isinstance(framing, int) else 1))
    for piece, is_payload in pieces:
        if is_payload and 0 <= bit < 8 * len(piece):
            changed = bytearray(piece)
            changed[bit // 8] ^= 1 << bit % 8
            yield bytes(changed), True
        else:
            yield piece, is_payload
        bit -= 8 * len(piece) if is_payload else 0


def _bound_socket(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    return sock


def _unsent_bytes(sock: socket.socket) -> int:
    unsent: int = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0"))[0]
    return unsent


def _identity(request: Request) -> bytes:
    """Return what makes a request the same as an earlier one: readers of stretches of one object must not mix."""
    target = f"{request.path}?{request.query}"
    return f"{request.method} {target} {request.headers.get('range', '')}".encode("latin-1")


def _parse_request(head: bytes) -> tuple[str, str, dict[str, str]]:
    line, headers = _parse_head(head)
    try:
        method, target, _ = line.split(" ")
    except ValueError as exc:
        raise ConnectionError(f"not a request: {line[:100]!r}") from exc
    return method, target, headers


def _parse_reply(head: bytes, method: str) -> _Reply:
    line, headers = _parse_head(head)
    status = int(line.split(" ")[1])
    framing: _Framing
    if method == "HEAD" or status < 200 or status in (204, 304):
        framing = 0
    elif "chunked" in headers.get("transfer-encoding", "").lower():
        framing = "chunked"
    elif "content-length" in headers:
        framing = int(headers["content-length"])
    else:
        framing = "until close"
    keeps_alive = framing != "until close" and _keeps_alive(headers) and line.startswith("HTTP/1.1")
    return _Reply(head, status, framing, keeps_alive)


def _parse_head(head: bytes) -> tuple[str, dict[str, str]]:
    line, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    pairs = (text.partition(":") for text in lines)
    return line, {name.lower(): value.strip() for name, _, value in pairs}


def _request_framing(headers: Mapping[str, str]) -> _Framing:
    if "chunked" in headers.get("transfer-encoding", "").lower():
        return "chunked"
    return int(headers.get("content-length", 0))


def _expects_continue(headers: Mapping[str, str]) -> bool:
    return headers.get("expect", "").lower() == "100-continue"


def _keeps_alive(headers: Mapping[str, str]) -> bool:
    return headers.get("connection", "").lower() != "close"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a proxy until SIGTERM or SIGINT; print where it listens, and in the end what it did, as JSON lines."""
    parser = argparse.ArgumentParser(description="Break some of the requests to a server.")
    parser.add_argument("--target", required=True, metavar="URL")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--max-per-request", type=int)
    parser.add_argument("--stall-seconds", type=float, default=Faults.stall_s)
    for kind in ("read", "write"):
        for odds in fields(Odds):
            parser.add_argument(f"--{kind}-{odds.name.replace('_', '-')}", type=float, default=0.0)
    given = vars(parser.parse_args(arguments))
    reads, writes = (
        Odds(**{odds.name: given[f"{kind}_{odds.name}"] for odds in fields(Odds)}) for kind in ("read", "write")
    )
    faults = Faults(
        reads=reads, writes=writes, max_per_request=given["max_per_request"], stall_s=given["stall_seconds"]
    )
    ending = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)  # the proxy's threads inherit this
    with FaultProxy(given["target"], given["seed"], faults, port=given["port"]) as proxy:
        print(json.dumps({"endpoint_url": proxy.endpoint_url}), flush=True)
        signal.sigwait(ending)
    if given["journal"]:
        proxy.dump(given["journal"])
    print(json.dumps({str(fault or "none"): count for fault, count in proxy.count().items()}), flush=True)


if __name__ == "__main__":
    main()
