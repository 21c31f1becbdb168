"""TLS in front of a real server that was built without it: a throw-away CA, and a proxy that speaks TLS to clients.

A client checks a certificate in the same way, whoever ends the TLS connection. A Postgres client first asks in plain
text whether the server offers TLS, and the proxy answers as Postgres does.
"""

from __future__ import annotations

import contextlib
import selectors
import shutil
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.waiting import PATIENCE

NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
SSL_REQUEST = struct.pack(">ii", 8, 80877103)


@dataclass(frozen=True, slots=True)
class Authority:
    """The CA of this test run and the certificates it signed. ``good`` is for ``localhost``, ``elsewhere`` is not."""

    ca: Path
    good: Path
    elsewhere: Path
    self_signed: Path
    """Each file except ``ca`` holds a certificate and its key."""


def make_authority(folder: Path) -> Authority:
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command is not installed, which makes the throw-away certificates")
    _openssl(folder, "req", "-x509", *NEW_KEY, "-days", "2",
             "-subj", "/CN=Throw-away CA", "-keyout", "ca.key", "-out", "ca.crt")  # fmt: skip
    for name, host in (("good", "localhost"), ("elsewhere", "elsewhere.example")):
        _openssl(folder, "req", *NEW_KEY, "-subj", f"/CN={host}",
                 "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
        (folder / f"{name}.ext").write_text(f"subjectAltName=DNS:{host}\n")
        _openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
                 "-days", "2", "-extfile", f"{name}.ext", "-out", f"{name}.crt")  # fmt: skip
    _openssl(folder, "req", "-x509", *NEW_KEY, "-days", "2",
             "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", "self.key",
             "-out", "self.crt")  # fmt: skip
    made = {}
    for name in ("good", "elsewhere", "self"):
        made[name] = folder / f"{name}.pem"
        made[name].write_text((folder / f"{name}.crt").read_text() + (folder / f"{name}.key").read_text())
    return Authority(folder / "ca.crt", made["good"], made["elsewhere"], made["self"])


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@contextlib.contextmanager
def tls_proxy(certificate: Path, backend: Path | int, *, postgres: bool = False) -> Iterator[int]:
    """A port on loopback that ends TLS and passes the bytes on to ``backend``, a Unix socket or a port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with socket.create_server(("127.0.0.1", 0)) as server:
        stop = threading.Event()
        threads: list[threading.Thread] = []

        def accept() -> None:
            while not stop.is_set():
                client, _ = server.accept()
                if stop.is_set():
                    client.close()
                    return
                threads.append(threading.Thread(target=serve, args=(client,), daemon=True))
                threads[-1].start()

        def serve(client: socket.socket) -> None:
            # The tests are about clients that end the handshake.
            with client, contextlib.suppress(OSError):
                client.settimeout(PATIENCE)
                if postgres:
                    if client.recv(8, socket.MSG_WAITALL) != SSL_REQUEST:
                        return  # a client that would continue in plain text
                    client.sendall(b"S")
                with context.wrap_socket(client, server_side=True) as inside, _connect(backend) as behind:
                    _pass_on(inside, behind, stop)

        threads.append(threading.Thread(target=accept, daemon=True))
        threads[0].start()
        try:
            yield server.getsockname()[1]
        finally:
            stop.set()
            socket.create_connection(server.getsockname()).close()
            for thread in threads:
                thread.join(PATIENCE)


def _connect(backend: Path | int) -> socket.socket:
    if isinstance(backend, int):
        return socket.create_connection(("127.0.0.1", backend))
    behind = socket.socket(socket.AF_UNIX)
    behind.connect(str(backend))
    return behind


def _pass_on(inside: ssl.SSLSocket, behind: socket.socket, stop: threading.Event) -> None:
    with selectors.DefaultSelector() as ready:
        ready.register(inside, selectors.EVENT_READ, behind)
        ready.register(behind, selectors.EVENT_READ, inside)
        while not stop.is_set():
            for key, _ in ready.select(0.2):
                source, target = key.fileobj, key.data
                data = source.recv(65536)  # type: ignore[union-attr]
                if isinstance(source, ssl.SSLSocket):
                    while source.pending():  # these bytes are already decrypted, so no selector reports them
                        data += source.recv(65536)
                if not data:
                    return
                target.sendall(data)
