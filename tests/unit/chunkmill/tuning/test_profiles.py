"""Profiles: kept whole, and followed only where they hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from chunkmill.cli.start.doctor import profile_check
from chunkmill.domain.spaces import Precision
from chunkmill.embedded import Stack
from chunkmill.errors import EmbeddedStackError, InvalidSetting
from chunkmill.machine import Machine, versions
from chunkmill.models import DEFAULT_SPEC
from chunkmill.settings import Settings
from chunkmill.tuning.choose import Constraints, Setup, SetupMeasurement
from chunkmill.tuning.profiles import (
    Profile,
    ProfileLookup,
    ProfileNotWritten,
    find_profile,
    memory_folder,
    memory_limit,
    profile_path,
    read_profile,
    refusal,
    with_profile,
    write_profile,
)

MACHINE = Machine("AMD EPYC (family 25, model 17)", 2, ("avx2", "avx512_bf16"))
SETUP = Setup("native", "bfloat16", 512, 2, 4)
PROFILE = Profile(
    "all-MiniLM-L6-v2", DEFAULT_SPEC.fingerprint, SETUP, SetupMeasurement(0.99997, 0.99999, 12_345.6, 6.8, 512.25, 7),
    Constraints(0.9999, max_latency_ms=20.0), MACHINE, versions(), "2026-11-21T10:00:00+00:00",
)  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_env(chunkmill_home=tmp_path / "home", embedding_profile="auto")


def write(settings: Settings, profile: Profile = PROFILE) -> Path:
    path = profile_path(settings, PROFILE.fingerprint, MACHINE)
    write_profile(profile, path)
    return path


def find(settings: Settings) -> ProfileLookup:
    return find_profile(settings, DEFAULT_SPEC, MACHINE)


def test_a_profile_is_read_as_it_was_written(settings: Settings) -> None:
    assert find(settings) == ProfileLookup(profile_path(settings, PROFILE.fingerprint, MACHINE))  # none yet
    path = write(settings)
    assert read_profile(path) == PROFILE
    assert find(settings) == ProfileLookup(path, PROFILE)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # and nothing half written


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(ProfileNotWritten, match="CHUNKMILL_HOME"):
        write(Settings.from_env(chunkmill_home=tmp_path / "home"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fingerprint": replace(DEFAULT_SPEC, precision=Precision.INT8).fingerprint}, "made for the model"),
        ({"machine": replace(MACHINE, cores=4)}, "another machine"),
        ({"machine": replace(MACHINE, features=("avx2",))}, "another machine"),
        ({"machine": replace(MACHINE, gpu="NVIDIA H200")}, "another machine"),
        ({"versions": versions() | {"chunkmill": "0.0.9"}}, "made with chunkmill 0.0.9"),
        ({"versions": versions() | {"torch": "2.12.1"}}, "made with torch 2.12.1"),
        ({"versions": {}}, "made with chunkmill absent"),
    ],
)
def test_it_is_left_out_elsewhere_and_says_to_tune_again(
    settings: Settings, change: dict[str, object], said: str
) -> None:
    """A file that was copied or renamed: its content is looked at, not its name."""
    path = write(settings, replace(PROFILE, **change))  # type: ignore[arg-type]
    for profile in (find(settings), find(settings.model_copy(update={"embedding_profile": str(path)}))):
        assert profile.profile is None
        assert profile.problem is not None
        assert said in profile.problem
        assert "chunkmill tune" in profile.problem


def test_a_library_that_is_not_used_and_a_patch_release_do_not_matter() -> None:
    installed = {"chunkmill": "1.0", "torch": "2.13.0+cpu", "onnxruntime": "1.31.1"}
    profile = replace(PROFILE, versions={"chunkmill": "1.0", "torch": "2.13.1", "onnxruntime": "1.30.0"})
    assert refusal(profile, PROFILE.fingerprint, MACHINE, installed) is None
    on_onnx = replace(profile, setup=replace(SETUP, backend="onnx", dtype="float32"))
    problem = refusal(on_onnx, PROFILE.fingerprint, MACHINE, installed)
    assert problem is not None
    assert "onnxruntime 1.30.0" in problem


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"setup": {}}',
        json.dumps({"format": 2}),
        "[" * 200_000,
    ],
)
def test_a_broken_file_is_left_out_or_refused_if_it_was_named(settings: Settings, content: str) -> None:
    path = write(settings)
    path.write_text(content)
    profile = find(settings)
    assert profile.profile is None
    assert profile.problem is not None
    assert str(path) in profile.problem
    with pytest.raises(InvalidSetting, match="EMBEDDING_PROFILE"):
        find(settings.model_copy(update={"embedding_profile": str(path)}))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("setup", "backend"), "tensorrt"),
        (("setup", "dtype"), "int4"),
        (("setup", "batch_tokens"), 0),
        (("setup", "threads"), "many"),
        (("machine", "cores"), None),
        (("format",), 2),
    ],
)
def test_a_profile_with_one_wrong_value_is_no_profile(
    settings: Settings, place: tuple[str, ...], value: object
) -> None:
    path = write(settings)
    content = json.loads(path.read_text())
    inner = content
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="profile"):
        read_profile(path)


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a number without a name in a container: no HOME, and no entry among the system's users."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_has_no_profiles_and_works_all_the_same() -> None:
    settings = Settings.from_env(embedding_profile="auto")
    assert find(settings).profile is None
    assert memory_folder(settings) is None
    assert memory_limit(settings, DEFAULT_SPEC.fingerprint, PROFILE.setup) is None


@pytest.mark.usefixtures("homeless")
def test_without_a_home_the_embedded_stack_asks_for_a_folder(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedStackError, match="CHUNKMILL_HOME"):
        Stack()
    assert Stack(tmp_path).home == tmp_path


def test_off_is_off_and_a_path_is_that_file(settings: Settings, tmp_path: Path) -> None:
    path = write(settings)
    assert find(settings.model_copy(update={"embedding_profile": "off"})) == ProfileLookup(None)
    elsewhere = tmp_path / "mine.json"
    path.rename(elsewhere)
    assert find(settings).profile is None
    assert find(settings.model_copy(update={"embedding_profile": str(elsewhere)})).profile == PROFILE
    with pytest.raises(InvalidSetting, match="no such file"):
        find(settings.model_copy(update={"embedding_profile": str(tmp_path / "none.json")}))


def test_it_fills_what_the_settings_leave_open(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    chosen = with_profile(settings, PROFILE)
    assert (chosen.embedding_backend, chosen.embedding_dtype, chosen.embedding_batch_tokens) == (
        "native",
        "bfloat16",
        512,
    )
    assert (chosen.embedding_threads, chosen.embedding_parallel_batches) == (2, 4)
    assert with_profile(settings, None) is settings


def test_what_the_environment_states_wins(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDING_BATCH_TOKENS", "333")
    monkeypatch.setenv("EMBEDDING_THREADS", "1")
    monkeypatch.setenv("EMBEDDING_PARALLEL_BATCHES", "2")  # the default, but stated
    chosen = with_profile(Settings.from_env(), PROFILE)
    assert (chosen.embedding_batch_tokens, chosen.embedding_threads, chosen.embedding_parallel_batches) == (333, 1, 2)
    monkeypatch.delenv("EMBEDDING_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert with_profile(Settings.from_env(), PROFILE).embedding_threads == 0  # OMP_NUM_THREADS is a statement too


@pytest.mark.parametrize(
    ("name", "other", "same"),
    [
        ("embedding_dtype", "fp32", "bf16"),
        ("embedding_dtype", "float16", "bfloat16"),
        ("embedding_backend", "onnx", "native"),
    ],
)
def test_a_budget_measured_in_one_number_format_says_nothing_about_another(
    settings: Settings, name: str, other: str, same: str
) -> None:
    write(settings)
    profile = find(settings.model_copy(update={name: other}))
    assert profile.profile is None
    assert profile.overridden
    assert profile.problem is not None
    assert name.upper() in profile.problem
    assert find(settings.model_copy(update={name: same})).profile == PROFILE


def test_what_memory_said_is_found_where_it_lies_below(settings: Settings) -> None:
    folder = memory_folder(settings)
    folder.mkdir(parents=True)
    lesson = folder / f"amd-epyc-2-cores-{PROFILE.fingerprint[:16]}-native-bfloat16.json"
    assert memory_limit(settings, PROFILE.fingerprint, SETUP) is None
    lesson.write_text('{"batch_tokens": 512}')
    assert memory_limit(settings, PROFILE.fingerprint, SETUP) is None
    lesson.write_text('{"batch_tokens": 256}')
    assert memory_limit(settings, PROFILE.fingerprint, SETUP) == (lesson, 256)
    assert memory_limit(settings, PROFILE.fingerprint, replace(SETUP, dtype="float32")) is None
    for broken in ("[]", "[" * 200_000, '{"batch_tokens": 1e999}'):
        lesson.write_text(broken)
        assert memory_limit(settings, PROFILE.fingerprint, SETUP) is None


def test_the_doctor_says_which_profile_a_worker_would_follow() -> None:
    path = Path("p.json")
    good = profile_check(ProfileLookup(path, PROFILE), None)
    assert good.state == "ok"
    assert good.found == "native bf16, 512 tokens in a pass, 12,346 tokens/s, made on 2026-11-21"
    assert "limited to 256 tokens" in profile_check(ProfileLookup(path, PROFILE), (Path("l.json"), 256)).found
    stale = profile_check(ProfileLookup(path, problem="it was made with torch 2.12: run `chunkmill tune` again"), None)
    assert (stale.state, stale.advice) == ("warn", "it was made with torch 2.12: run `chunkmill tune` again")
    assert profile_check(ProfileLookup(path, problem="EMBEDDING_DTYPE is fp32", overridden=True), None).state == "ok"
    assert profile_check(ProfileLookup(path), None).state == profile_check(ProfileLookup(None), None).state == "ok"


def test_a_machine_has_a_name_for_files() -> None:
    assert MACHINE.slug == "amd-epyc-family-25-model-17-2-cores"
    named = Machine("Intel(R) Xeon(R) CPU E5-2690 @ 2.60GHz", 8, (), "NVIDIA H200")
    assert named.slug == "nvidia-h200-intel-xeon-e5-2690-8-cores"
