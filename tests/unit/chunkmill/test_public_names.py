from __future__ import annotations

import subprocess
import sys

import pytest

import chunkmill


def test_every_public_name_is_there_and_no_other() -> None:
    assert sorted(chunkmill.__all__) == chunkmill.__all__
    for name in chunkmill.__all__:
        assert getattr(chunkmill, name).__name__ == name
    assert set(chunkmill._HOME_OF) == set(chunkmill.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Klient'"):
        chunkmill.Klient  # noqa: B018


def test_importing_the_package_alone_brings_nothing_along() -> None:
    script = "import sys, app; assert not {'sqlalchemy', 'celery', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_client_brings_no_torch() -> None:
    script = "import sys; from chunkmill import Client; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True)
