from __future__ import annotations

from pathlib import Path

import pytest

from chunkmill.system.certificates import require_certificate_folder


def test_a_folder_of_certificates_that_is_not_there_is_noticed_unless_another_place_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    require_certificate_folder()
    monkeypatch.setenv("SSL_CERT_DIR", f"/nowhere:{tmp_path}")
    require_certificate_folder()
    monkeypatch.setenv("SSL_CERT_DIR", "/nowhere:/nor/here")
    with pytest.raises(FileNotFoundError, match="SSL_CERT_DIR"):
        require_certificate_folder()
    monkeypatch.setenv("SSL_CERT_FILE", "/etc/ca.pem")  # the library opens this one, and reads no folder
    require_certificate_folder()
