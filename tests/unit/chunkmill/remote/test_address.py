from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest

from chunkmill.errors import InvalidSetting
from chunkmill.remote import AsyncRemoteClient, RemoteClient, RemoteEmbedder, http
from chunkmill.remote.address import read_address, read_hosts

KEY = "cmk_secret"


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("https://embed.example.com", ()),
        ("https://embed.example.com:8443/prefix/", ()),
        ("http://localhost:8080", ()),
        ("http://127.0.0.1:8080", ()),
        ("http://127.9.9.9", ()),
        ("http://[::1]:8080", ()),
        ("http://gateway:8080", ("gateway",)),
        ("http://Gateway:8080", ("other", "GATEWAY")),
        ("http://10.0.0.7", ("10.0.0.7",)),
    ],
)
def test_https_loopback_and_named_hosts_are_taken(url: str, hosts: tuple[str, ...]) -> None:
    assert read_address("base_url", url, hosts).url == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        "http://embed.example.com",
        "http://10.0.0.7",
        "http://localhost.example.com",
        "http://127.0.0.1.example.com",
        "http://localhost@embed.example.com",
        "https://user:password@embed.example.com",
        "https://embed.example.com?key=1",
        "https://embed.example.com#part",
        "https://",
        "https://embed.example.com:port",
        "ftp://localhost",
        "https://embed.exam ple.com",
        "https://embed.example.com\n",
        "localhost:8080",
        "",
        None,
    ],
)
def test_all_other_addresses_are_refused_before_the_key_is_sent(url: Any) -> None:
    if url == "https://embed.example.com\n":
        assert read_address("base_url", url).url == "https://embed.example.com"
        return
    for client in (RemoteClient, AsyncRemoteClient):
        with pytest.raises(InvalidSetting, match="base_url"):
            client(url, KEY)
        with pytest.raises(InvalidSetting, match="fallback"):
            client("https://embed.example.com", KEY, fallback=url or "x")


@pytest.mark.parametrize("host", ["*", "all", "any", "true", "8.8.8.8", "0.0.0.0", "http://gateway", "a/b"])  # noqa: S104
def test_no_word_and_no_address_of_the_internet_opens_http(host: str) -> None:
    hosts = [host]
    with pytest.raises(InvalidSetting, match="http_hosts"):
        read_hosts(hosts)
    with pytest.raises(InvalidSetting):
        RemoteClient("http://gateway", KEY, http_hosts=hosts)


@pytest.mark.parametrize("key", ["", "  ", "word word", "word\nword", "schlüssel", None])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key: Any) -> None:
    with pytest.raises(InvalidSetting, match="key") as raised:
        RemoteClient("https://embed.example.com", key)
    assert not key or not key.strip() or key not in str(raised.value)


def test_the_environment_names_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHUNKMILL_URL", "CHUNKMILL_API_KEY", "CHUNKMILL_HTTP_HOSTS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InvalidSetting, match="CHUNKMILL_URL is not set"):
        RemoteClient.from_env()
    monkeypatch.setenv("CHUNKMILL_URL", "http://gateway:8080")
    with pytest.raises(InvalidSetting, match=r"CHUNKMILL_URL.*unencrypted"):
        RemoteClient.from_env()
    monkeypatch.setenv("CHUNKMILL_HTTP_HOSTS", "other,gateway")
    with pytest.raises(InvalidSetting, match="CHUNKMILL_API_KEY is missing"):
        AsyncRemoteClient.from_env()
    monkeypatch.setenv("CHUNKMILL_API_KEY", KEY)
    assert repr(RemoteClient.from_env()) == "RemoteClient('http://gateway:8080')"
    assert repr(AsyncRemoteClient.from_env()) == "AsyncRemoteClient('http://gateway:8080')"
    assert KEY not in repr(RemoteEmbedder("http://gateway:8080", http_hosts=["gateway"]))


@pytest.mark.parametrize("verify", [False, None, "", "/no/such/file.pem"])
def test_certificates_are_always_verified(verify: Any) -> None:
    with pytest.raises(InvalidSetting, match="verify"):
        RemoteClient("https://embed.example.com", KEY, verify=verify)


@pytest.mark.parametrize(
    ("name", "value"), [("SSL_CERT_FILE", "/nowhere/a.pem"), ("SSL_CERT_DIR", "/nowhere:/nor/here")]
)
def test_certificates_of_the_machine_that_are_not_there_are_a_wrong_setting(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    http._default_context.cache_clear()
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)  # it counts more than SSL_CERT_DIR
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidSetting, match=name):
        RemoteClient("https://embed.example.com", KEY)


def test_a_private_ca_is_the_only_one_that_is_trusted(tmp_path: Path) -> None:
    from tests.support.tls import make_authority

    ca = make_authority(tmp_path).ca
    for verify in (ca, str(ca), ssl.create_default_context(cafile=ca)):
        context = RemoteClient("https://embed.example.com", KEY, verify=verify)._runner._verify
        assert context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname
        assert [one["subject"] for one in context.get_ca_certs()] == [((("commonName", "Throw-away CA"),),)]
