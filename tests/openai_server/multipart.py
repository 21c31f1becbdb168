"""A form of one file and some fields, taken apart on the disk: 200 MB never stand in memory."""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass, field
from email.message import Message
from email.parser import BytesHeaderParser
from pathlib import Path

from tests.openai_server.errors import bad

BLOCK = 1 << 20


@dataclass
class Form:
    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    """Of the part named ``file``, whose bytes are now at ``path``."""


def read_form(raw: Path, content_type: str, path: Path) -> Form:
    """Takes the body in ``raw`` apart; the file's bytes go to ``path``. ApiError: this is no such form."""
    match = re.fullmatch(r'multipart/form-data;\s*boundary="?([^";]+)"?', content_type.strip())
    if match is None or raw.stat().st_size == 0:
        raise bad("Expected a multipart/form-data body with a boundary.")
    delimiter = b"--" + match[1].encode()
    form = Form()
    with raw.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as body:
        if body[: len(delimiter)] != delimiter:
            raise bad("The multipart body does not begin with its boundary.")
        start = len(delimiter)
        while body[start : start + 2] == b"\r\n":
            end = body.find(b"\r\n" + delimiter, start)
            head_end = body.find(b"\r\n\r\n", start)
            if end < 0 or head_end < 0:
                raise bad("The multipart body is cut.")
            headers = BytesHeaderParser().parsebytes(body[start + 2 : head_end])
            name = _parameter(headers, "name")
            if name is None:
                raise bad("A part of the multipart body has no name.")
            if name == "file":
                form.filename = _parameter(headers, "filename")
                _copy(body, head_end + 4, end, path)
            else:
                form.fields[name] = body[head_end + 4 : end].decode()
            start = end + 2 + len(delimiter)
        if body[start : start + 2] != b"--":
            raise bad("The multipart body has no end.")
    return form


def _parameter(headers: Message, name: str) -> str | None:
    value = headers.get_param(name, header="content-disposition")
    return value if isinstance(value, str) else None


def _copy(body: mmap.mmap, start: int, end: int, path: Path) -> None:
    with path.open("wb") as target:
        for position in range(start, end, BLOCK):
            target.write(body[position : min(position + BLOCK, end)])
