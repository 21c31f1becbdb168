"""Writes small PDF files: one line of text below the other, on each page."""

from __future__ import annotations

from collections.abc import Sequence


def pdf(pages: Sequence[Sequence[str]], *, encrypted: bool = False, action: str = "") -> bytes:
    """A PDF file with these lines of ASCII on each page. If it is ``encrypted``, nobody knows its password.

    ``action`` is what a reader is to do when the file is opened, as in ``/URI /URI (http://…)``.
    """
    kids = [4 + 2 * number for number in range(len(pages))]
    objects = [
        f"<< /Type /Catalog /Pages 2 0 R {f'/OpenAction << /S {action} >> ' if action else ''}>>".encode(),
        f"<< /Type /Pages /Count {len(pages)} /Kids [{' '.join(f'{kid} 0 R' for kid in kids)}] >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for kid, lines in zip(kids, pages, strict=True):
        shown = "".join(f"({line}) Tj T* " for line in lines)
        stream = f"BT /F1 10 Tf 12 TL 40 800 Td {shown}ET".encode()
        objects += [
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Resources << /Font << /F1 3 0 R >> >> "
            + f"/Contents {kid + 1} 0 R >>".encode(),
            f"<< /Length {len(stream)} >>\nstream\n".encode() + stream + b"\nendstream",
        ]
    content, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(content))
        content += f"{number} 0 obj\n".encode() + body + b"\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    key = "0" * 64
    locked = (
        f"/Encrypt << /Filter /Standard /V 1 /R 2 /O <{key}> /U <{key}> /P -4 >> /ID [<00> <00>] " if encrypted else ""
    )
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n<< /Size {len(objects) + 1} /Root 1 0 R "
    return content + f"{end}{locked}>>\nstartxref\n{len(content)}\n%%EOF\n".encode()
