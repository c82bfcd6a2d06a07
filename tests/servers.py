"""Real servers for tests: an S3 store that checks signatures, and a TCP proxy that breaks connections on request."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import boto3
import botocore.exceptions
from botocore.config import Config

from tests.waiting import PATIENCE_S

_START_TIMEOUT_S: Final = 200
_ACCESS_KEY: Final = "lfmtestaccess"
_SECRET_KEY: Final = "lfmtestsecretlfmtestsecret"


@dataclass(frozen=True)
class S3Server:
    """A running S3 server on this machine.

    Attributes:
        endpoint_url: Where it listens.
        access_key: Of an identity that may do everything.
        secret_key: Of the same.
        pid: Of its process, which leads a process group.
        credentials_file: Has a profile for each other identity, which may do what its policy says.
    """

    endpoint_url: str
    access_key: str
    secret_key: str
    pid: int
    credentials_file: Path

    @property
    def port(self) -> int:
        """Where it listens on 127.0.0.1."""
        return int(self.endpoint_url.rsplit(":", 1)[1])

    @property
    def env(self) -> dict[str, str]:
        """Environment variables with which boto3 signs as the admin."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_SHARED_CREDENTIALS_FILE": str(self.credentials_file),
        }

    def client(self) -> Any:  # noqa: ANN401 - boto3 makes its client classes at run time
        """Return a boto3 client signed in as the admin, independent of the environment."""
        return self._client  # making one takes longer than most requests

    @functools.cached_property
    def _client(self) -> Any:  # noqa: ANN401
        return self.client_of(self.access_key)

    def client_of(self, access_key: str, *, read_timeout: float = PATIENCE_S) -> Any:  # noqa: ANN401
        """Return a new boto3 client signed in as another identity, whose access key is its name.

        A reply that is merely late must not make it ask again: what it asked for may have been done.
        """
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(
                retries={"mode": "standard", "max_attempts": 3},
                connect_timeout=3,
                read_timeout=read_timeout,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                s3={"addressing_style": "path"},
            ),
        )

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Store one object."""
        self.client().put_object(Bucket=bucket, Key=key, Body=data)


@contextlib.contextmanager
def run_s3_server(folder: Path, policies: Mapping[str, str] | None = None) -> Iterator[S3Server]:
    """Run SeaweedFS in `folder` until the block ends; ready once a signed create-bucket and put have succeeded.

    Args:
        folder: For all its files.
        policies: IAM policies by the name of the identity that has each, besides the admin.
    """
    policies = policies or {}
    ports = {name: (free_port(), free_port()) for name in ("master", "volume", "filer", "s3")}
    identity = {
        "name": "admin",
        "credentials": [{"accessKey": _ACCESS_KEY, "secretKey": _SECRET_KEY}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    others = [
        {"name": name, "credentials": [{"accessKey": name, "secretKey": _SECRET_KEY}], "policyNames": [name]}
        for name in policies
    ]
    contents = [{"name": name, "content": policy} for name, policy in policies.items()]
    config, log, data = folder / "s3.json", folder / "weed.log", folder / "data"
    config.write_text(json.dumps({"identities": [identity, *others], "policies": contents}))
    credentials_file = folder / "credentials"
    credentials_file.write_text(
        "".join(f"[{name}]\naws_access_key_id={name}\naws_secret_access_key={_SECRET_KEY}\n" for name in policies)
    )
    data.mkdir()
    command = [
        str(Path(sys.executable).with_name("weed")),
        "server",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-s3",
        f"-s3.config={config}",
        "-s3.port.lance=0",
        "-s3.port.iceberg=0",
        "-s3.iam=false",
        "-s3.autoCreateBucket=false",
        "-master.volumeSizeLimitMB=64",
        "-master.telemetry=false",
        "-volume.max=0",
        "-volume.minFreeSpace=100MiB",
    ]
    for name, (port, grpc_port) in ports.items():
        command += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc_port}"]
    with log.open("wb") as output:
        # A group of its own, so that its end takes every child with it and a Ctrl-C in pytest does not reach it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=folder, process_group=0
        )
    server = S3Server(f"http://127.0.0.1:{ports['s3'][0]}", _ACCESS_KEY, _SECRET_KEY, process.pid, credentials_file)
    try:
        _wait_until_ready(server, process, log)
        yield server
    finally:
        # Asked politely it takes 10 s, and its data are thrown away.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE_S)


def _wait_until_ready(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    client = server.client_of(_ACCESS_KEY, read_timeout=10)  # a server that is starting may never answer
    deadline = time.monotonic() + _START_TIMEOUT_S
    failure = "nothing answered"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            failure = f"it exited with {process.returncode}"
            break
        try:
            client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="probe", Body=b"probe")
        except botocore.exceptions.ClientError as exc:
            if exc.response["Error"]["Code"] in ("BucketAlreadyExists", "BucketAlreadyOwnedByYou"):
                with contextlib.suppress(botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError):
                    client.put_object(Bucket="ready", Key="probe", Body=b"probe")
                    return
            failure = str(exc)
        except botocore.exceptions.BotoCoreError as exc:
            failure = str(exc)
        else:
            return
        time.sleep(0.2)
    tail = log.read_text(errors="replace")[-3000:]
    raise RuntimeError(f"SeaweedFS was not ready after {_START_TIMEOUT_S} s: {failure}\n{tail}")


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nobody listens on, and that is given to nobody else while this process lives.

    It refuses connections until a server that binds it with SO_REUSEADDR, as nearly all do, listens on it.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    port = int(holder.getsockname()[1])
    holder.detach()  # nobody closes it
    return port


class FaultyProxy:
    """A TCP proxy in front of a server that cuts the first replies it is told to, then works.

    A reply is everything the server sends on one connection; a client that is cut off connects again.

    Args:
        target_port: Where the real server listens on 127.0.0.1.
        num_faults: Connections to break before it behaves.
        forward_bytes: Reply bytes a broken connection still gets to see; 0 loses the whole reply.
        match: Only connections whose request contains this are broken.
    """

    def __init__(self, target_port: int, num_faults: int, forward_bytes: int, match: bytes = b"") -> None:
        self._target_port = target_port
        self._faults_left = num_faults
        self._forward_bytes = forward_bytes
        self._match = match
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()
        self.num_broken = 0

    @property
    def endpoint_url(self) -> str:
        """Where the proxy listens."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> FaultyProxy:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(5)
        self._listener.close()

    def _start(self, target: Any, *args: object) -> None:  # noqa: ANN401
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = self._listener.accept()
                self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._target_port)) as server:
            client.settimeout(0.05)
            server.settimeout(0.05)
            broken, seen, forwarded = False, b"", 0
            while not self._stop.is_set():
                request = _receive(client)
                if request == b"":
                    return
                if request:
                    seen += request
                    broken = broken or self._take_fault(seen)
                    server.sendall(request)
                reply = _receive(server)
                if reply == b"":
                    return
                if reply is None or b"100 Continue" in reply[:32]:
                    with contextlib.suppress(OSError):
                        client.sendall(reply or b"")
                    continue
                if not broken:
                    with contextlib.suppress(OSError):
                        client.sendall(reply)
                    continue
                keep = reply[: self._forward_bytes - forwarded]
                client.sendall(keep)
                forwarded += len(keep)
                if forwarded >= self._forward_bytes:
                    return

    def _take_fault(self, request: bytes) -> bool:
        with self._lock:
            if self._faults_left == 0 or self._match not in request:
                return False
            self._faults_left -= 1
            self.num_broken += 1
            return True


def _receive(connection: socket.socket) -> bytes | None:
    """Return what has arrived, b"" once the other side closed, None if nothing came for a moment."""
    try:
        return connection.recv(65536)
    except TimeoutError:
        return None
    except OSError:
        return b""


@dataclass(frozen=True)
class Request:
    """What a `ScriptedServer` was asked."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass(frozen=True)
class Reply:
    """What a `ScriptedServer` answers."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class _ThreadingServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # with the usual 5, many clients at once wait seconds for a connection


class ScriptedServer:
    """An HTTP server that answers what a function says, for what the real store will not do on request.

    Args:
        answer: Called for every request, in the order they came.
    """

    def __init__(self, answer: Callable[[Request], Reply]) -> None:
        self.requests: list[Request] = []
        lock, requests = threading.Lock(), self.requests

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                headers = {key.lower(): value for key, value in self.headers.items()}
                request = Request(self.command, self.path, headers, body)
                with lock:
                    requests.append(request)
                    reply = answer(request)
                self.send_response(reply.status)
                for key, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(reply.body)

            do_GET = do_PUT = do_HEAD = do_POST = _serve  # noqa: N815 - the names http.server looks for

            def log_message(self, *_: object) -> None:
                """Keep quiet."""

        self._server = _ThreadingServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint_url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
