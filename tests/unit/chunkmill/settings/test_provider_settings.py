"""Which servers a key may go to, and what a wrong setting of the paid routes stops: those, and nothing else."""

from __future__ import annotations

import json

import pytest

from chunkmill.domain.spaces import OnLong, Precision
from chunkmill.domain.states import Route
from chunkmill.errors import InvalidSetting, UnknownModel
from chunkmill.ledger.jobs.routing import lanes_of
from chunkmill.models import DEFAULT_SPEC
from chunkmill.openai.catalogue import model_for, provider_model, resolve_space
from chunkmill.openai.http import Provider
from chunkmill.settings import OF_THE_PROVIDER, Settings

WRONG = {
    "OPENAI_API_KEY": "sk two words",
    "OPENAI_BASE_URL": "http://api.example.com/v1",
    "OPENAI_HTTP_HOSTS": "tei:8080",
    "OPENAI_BATCHES": "perhaps",
    "OPENAI_MODELS": '{"a": {"dimension": 8}}',
    "OPENAI_REQUEST_INPUTS": "many",
    "OPENAI_TIMEOUT_SECONDS": "-1",
    "OPENAI_MONTHLY_BUDGET_USD": "a lot",
    "BUDGET_WEBHOOK_URL": "ftp://example.com",
}


@pytest.mark.parametrize(
    "url",
    [
        "http://tei:8080/v1",
        "http://TEI/v1",
        "http://vllm.embed.svc.cluster.local/v1",
        "http://host.docker.internal:11434/v1",
        "http://10.0.0.7/v1",
        "http://[fd00::7]:80/v1",
    ],
)
def test_http_goes_to_a_private_host_that_a_setting_names(url: str) -> None:
    hosts = "tei, vllm.embed.svc.cluster.local,host.docker.internal , 10.0.0.7,[fd00::7],"
    assert Settings.from_env(openai_http_hosts=hosts, openai_base_url=url).openai_base_url == url
    for others in ("tei2,svc.cluster.local,docker.internal,10.0.0.70,fd00::8", None):
        with pytest.raises(InvalidSetting, match="OPENAI_HTTP_HOSTS names"):
            Settings.from_env(openai_http_hosts=others, openai_base_url=url)


@pytest.mark.parametrize("hosts", ["*", "true", "all", "tei:8080", "http://tei", "10.0.0.0/8", "*.local", "te i", "-"])
def test_there_is_no_word_for_all_hosts(hosts: str) -> None:
    with pytest.raises(InvalidSetting, match=r"OPENAI_HTTP_HOSTS\): each entry must be the name"):
        Settings.from_env(openai_http_hosts=f"vllm,{hosts}", openai_base_url="http://vllm/v1")


@pytest.mark.parametrize("host", ["8.8.8.8", "2606:4700::1111", "0.0.0.0", "224.0.0.1"])  # noqa: S104
def test_no_address_of_the_internet_may_have_http(host: str) -> None:
    with pytest.raises(InvalidSetting, match="would cross the internet unencrypted") as wrong:
        Settings.from_env(openai_http_hosts=f"tei,{host}", openai_base_url="http://tei/v1")
    assert "OPENAI_BASE_URL" not in str(wrong.value)


def test_all_of_loopback_may_have_http() -> None:
    for url in ("http://127.0.0.2:8080/v1", "http://127.255.0.9/v1", "http://[::1]/v1"):
        assert Settings.from_env(openai_base_url=url, budget_webhook_url=url).openai_base_url == url
    with pytest.raises(InvalidSetting):
        Settings.from_env(openai_base_url="http://128.0.0.1/v1")


def test_an_address_may_have_azures_version_and_no_other_query() -> None:
    url = "https://name.openai.azure.com/openai/deployments/a"
    given = Settings.from_env(openai_base_url=f"{url}/?api-version=2024-10-21")
    assert given.openai_base_url == f"{url}?api-version=2024-10-21"
    for query in ("?key=x", "?api-version=1&key=x", "?api-version=", "?api-version=a%20b"):
        with pytest.raises(InvalidSetting, match="no query but"):
            Settings.from_env(openai_base_url=url + query)
    with pytest.raises(InvalidSetting):
        Settings.from_env(budget_webhook_url=f"{url}?api-version=2024-10-21")


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_of_the_paid_routes_stops_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, WRONG[name])
    monkeypatch.setenv("LEASE_SECONDS", "17")
    settings = Settings.from_env()
    assert settings.lease_seconds == 17
    assert f"{name}: " in str(settings.provider_problem)
    assert WRONG[name] not in str(settings.provider_problem)
    assert lanes_of(settings, DEFAULT_SPEC) == (Route.LOCAL,)
    assert space_of(settings, "all-MiniLM-L6-v2") == DEFAULT_SPEC
    for use in (settings.require_provider, lambda: Provider(settings)):
        with pytest.raises(InvalidSetting, match=f"the paid routes are off in this process.*{name}"):
            use()
    with pytest.raises(InvalidSetting, match=name):
        space_of(settings, "text-embedding-3-small")
    assert settings.model_copy(update={"embedding_threads": 3}).provider_problem == settings.provider_problem


def space_of(settings: Settings, name: str) -> object:
    return resolve_space(settings, name, on_long=OnLong.TRUNCATE, dimensions=None, precision=Precision.FLOAT)


def test_no_paid_lane_serves_a_space_while_another_setting_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = {"dimensions": 384, "max_tokens": 256, "tokenizer": "cl100k", "same_as": "all-MiniLM-L6-v2"}
    monkeypatch.setenv("OPENAI_MODELS", json.dumps({"remote": twin}))
    assert lanes_of(Settings.from_env(), DEFAULT_SPEC) == (Route.LOCAL, Route.OPENAI, Route.OPENAI_SYNC)
    monkeypatch.setenv("OPENAI_TIMEOUT_SECONDS", "-1")
    assert lanes_of(Settings.from_env(), DEFAULT_SPEC) == (Route.LOCAL,)


def test_every_wrong_setting_of_the_paid_routes_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WRONG.items():
        monkeypatch.setenv(name, value)
    said = Settings.from_env().provider_problem or ""
    # Which hosts may have http is not known here, so nothing can be said of the address.
    assert {name for name in WRONG if f"{name}: " in said} == WRONG.keys() - {"OPENAI_BASE_URL"}
    assert {name.lower() for name in WRONG} <= OF_THE_PROVIDER


def test_a_wrong_setting_of_all_still_stops_all_and_names_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEASE_SECONDS", "-1")
    monkeypatch.setenv("OPENAI_BATCHES", "perhaps")
    with pytest.raises(InvalidSetting, match=r"OPENAI_BATCHES.*LEASE_SECONDS|LEASE_SECONDS.*OPENAI_BATCHES"):
        Settings.from_env()
    monkeypatch.delenv("LEASE_SECONDS")
    monkeypatch.setenv("EMBEDDING_PROVIDER", "opnai")  # what a model's name means would be a guess
    with pytest.raises(InvalidSetting, match="EMBEDDING_PROVIDER"):
        Settings.from_env()


def test_an_argument_that_is_wrong_is_raised_at_once() -> None:
    with pytest.raises(InvalidSetting, match="OPENAI_BATCHES"):
        Settings.from_env(openai_batches="perhaps")


def test_a_name_that_a_wrong_description_has_is_never_taken_for_a_local_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise its documents would be embedded by another model, because one field was misspelt."""
    monkeypatch.setenv("OPENAI_MODELS", '{"all-MiniLM-L6-v2": {"dimension": 384}, "b": {"dimensions": 8}}')
    settings = Settings.from_env()
    for name in ("all-MiniLM-L6-v2", "b"):
        with pytest.raises(InvalidSetting, match="did you mean dimensions"):
            provider_model(settings, name)
    assert model_for(settings, DEFAULT_SPEC) is None
    with pytest.raises(UnknownModel, match=r"no-such-model.*If it is the provider's model.*OPENAI_MODELS"):
        space_of(settings, "no-such-model")
    monkeypatch.setenv("EMBEDDING_PROVIDER", "openai")  # every name is the provider's
    with pytest.raises(InvalidSetting, match="did you mean dimensions"):
        space_of(Settings.from_env(), "another")


def test_files_of_a_twin_that_cannot_be_read_stop_no_other_model(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = '{"m": {"dimensions": 8, "tokenizer": "cl100k", "same_as": "%s"}}'
    for name in ("/nowhere", "y" * 300, f"/{'y' * 300}"):
        monkeypatch.setenv("OPENAI_MODELS", twin % name)
        assert space_of(Settings.from_env(), "all-MiniLM-L6-v2") == DEFAULT_SPEC
