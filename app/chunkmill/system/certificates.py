"""Notices an SSL_CERT_DIR that OpenSSL would ignore."""

from __future__ import annotations

import os


def require_certificate_folder() -> None:
    """Raises FileNotFoundError if certificates are looked for in SSL_CERT_DIR, and no folder of it exists.

    The HTTP library opens SSL_CERT_FILE itself, which counts more. Of a folder that is not there OpenSSL says nothing,
    and then trusts no server, so that each request fails as if the server's certificate were wrong.
    """
    folders = os.environ.get("SSL_CERT_DIR")
    if folders and not os.environ.get("SSL_CERT_FILE") and not any(map(os.path.isdir, folders.split(os.pathsep))):
        raise FileNotFoundError("no folder of SSL_CERT_DIR exists")
