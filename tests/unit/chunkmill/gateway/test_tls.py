"""A certificate that cannot be used is refused before anybody is served with it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from chunkmill.errors import InvalidInput
from chunkmill.gateway.tls import server_context
from tests.support.tls import NEW_KEY, make_authority


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    make_authority(folder)
    request = ["req", *NEW_KEY, "-subj", "/CN=localhost", "-keyout", "old.key", "-out", "old.csr"]
    _openssl(folder, *request)
    (folder / "index.txt").touch()
    (folder / "ca.cnf").write_text(
        "[ca]\ndefault_ca = own\n[own]\ndatabase = index.txt\nnew_certs_dir = .\nrand_serial = yes\npolicy = any\n"
        "default_md = sha256\n[any]\ncommonName = supplied\n"
    )
    dates = ["-startdate", "20200101000000Z", "-enddate", "20200102000000Z"]
    own = ["ca", "-batch", "-selfsign", "-config", "ca.cnf", "-keyfile", "old.key", "-in", "old.csr", "-out", "old.crt"]
    _openssl(folder, *own, *dates)
    _openssl(folder, "pkey", "-in", "good.key", "-aes256", "-passout", "pass:x", "-out", "locked.key")
    (folder / "not.pem").write_text("hello\n")
    return folder


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, capture_output=True, check=True)


@pytest.mark.parametrize("name", ["good", "self"])
def test_a_certificate_with_its_key_can_be_served_with(folder: Path, name: str) -> None:
    server_context(folder / f"{name}.crt", folder / f"{name}.key")


@pytest.mark.parametrize(
    ("certificate", "key", "says"),
    [
        ("nowhere.crt", "good.key", "--tls-cert .*nowhere.crt cannot be read: No such file"),
        ("good.crt", "nowhere.key", "--tls-key .*nowhere.key cannot be read: No such file"),
        ("good.crt", "elsewhere.key", "elsewhere.key is not the key of the certificate"),
        ("not.pem", "good.key", "cannot be used"),
        ("good.crt", "not.pem", "cannot be used"),
        ("good.crt", "locked.key", "has a password"),
        ("old.crt", "old.key", "expired"),
    ],
)
def test_what_cannot_be_used_is_named_with_the_reason(folder: Path, certificate: str, key: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        server_context(folder / certificate, folder / key)
