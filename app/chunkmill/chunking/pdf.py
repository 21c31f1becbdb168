"""The text of a PDF file, with the position at which each page begins."""

from __future__ import annotations

import re
import sys
import threading
from typing import Any, BinaryIO, Final

from chunkmill.chunking.document import Document, paragraphs
from chunkmill.chunking.libraries import library
from chunkmill.chunking.running_lines import without_running_lines
from chunkmill.system.forks import renew_in_child

MAX_TEXT_LENGTH: Final = 64 * 1024 * 1024
"""The most characters of text that are taken from one file."""
_HYPHEN: Final = re.compile("[\x02\u00ad\ufffe\uffff]\n?")
"""What PDFium gives for the hyphen of a word that is divided at the end of a line."""
_CONTROL: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")

_mutex = threading.Lock()
"""PDFium may be used by one thread at a time."""
renew_in_child(sys.modules[__name__], "_mutex")


def read_pdf(file: BinaryIO) -> Document:
    """The document in ``file``, which is read as far as each page needs. Raises ValueError, which says why not."""
    pdfium = library("pypdfium2")
    pages: list[str] = []
    length = 0
    with _mutex:
        try:
            opened = pdfium.PdfDocument(file)
        except pdfium.PdfiumError as error:
            raise ValueError(_problem(pdfium, error)) from None
        try:
            for number in range(len(opened)):
                pages.append(_text_of(pdfium, opened, number))
                length += len(pages[-1])
                if length > MAX_TEXT_LENGTH:
                    raise ValueError(f"it has more than {MAX_TEXT_LENGTH:,} characters of text; split it")
        finally:
            opened.close()
    if not any(map(str.strip, pages)):
        raise ValueError("it has no text; if its pages are pictures, make a PDF with text of them by OCR")
    pages = without_running_lines(pages)
    starts, at = [], 0
    for page in pages:
        starts.append(at)
        at += len(page) + 1
    text = "\n".join(pages)
    return Document(text, paragraphs(text, 0, len(text)), starts)


def _text_of(pdfium: Any, opened: Any, number: int) -> str:
    try:
        page = opened[number]
    except pdfium.PdfiumError:
        raise ValueError(f"page {number + 1:,} is damaged; write the file again") from None
    try:
        of_page = page.get_textpage()
        try:
            text: str = of_page.get_text_bounded()
        finally:
            of_page.close()
    finally:
        page.close()
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROL.sub("", _HYPHEN.sub("", text)).strip()


def _problem(pdfium: Any, error: Any) -> str:
    if getattr(error, "err_code", None) == pdfium.raw.FPDF_ERR_PASSWORD:
        return "it is encrypted; save it without a password"
    return "it is no PDF file that can be read; write it again"
