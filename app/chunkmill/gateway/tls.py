"""The certificate of a gateway, looked at before anybody is served with it."""

from __future__ import annotations

import ssl
from pathlib import Path

from chunkmill.errors import InvalidInput


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """The context to serve with. ``certificate`` is PEM, the server's own first; ``key`` is PEM without a password.

    Raises :class:`InvalidInput` if a file cannot be read, if the key is not the certificate's, or if the certificate is
    not valid at this moment.
    """
    for option, path in (("--tls-cert", certificate), ("--tls-key", key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise InvalidInput(f"{option} {path} cannot be read: {error.strerror}. Name a file in PEM form.") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except _LockedKey:
        raise InvalidInput(f"--tls-key {key} has a password. Give a key without one, readable by this user.") from None
    except ssl.SSLError as error:
        if "MISMATCH" in (error.reason or ""):
            raise InvalidInput(f"--tls-key {key} is not the key of the certificate {certificate}.") from None
        raise InvalidInput(
            f"--tls-cert {certificate} or --tls-key {key} cannot be used ({error.reason or error}). Both must be in "
            "PEM form, and the server's own certificate must be the first one in its file."
        ) from None
    if problem := _problem(context, certificate):
        raise InvalidInput(f"--tls-cert {certificate} cannot be used: {problem}. Give a certificate that is valid now.")
    return context


class _LockedKey(Exception):
    """The key file asks for a password."""


def _no_password() -> str:
    raise _LockedKey


def _problem(server: ssl.SSLContext, certificate: Path) -> str | None:
    """What a client that trusts this very certificate says of it, in a handshake in memory; None if it is content."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(certificate)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                return str(error.verify_message)
            except ssl.SSLError as error:
                return str(error.reason or error)
    return None
