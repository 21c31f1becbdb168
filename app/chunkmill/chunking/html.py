"""The text of a page's main content, with its headings. Menus, scripts and footers are left out."""

from __future__ import annotations

import re
from typing import Any, Final

from chunkmill.chunking.document import Document, DocumentBuilder
from chunkmill.chunking.libraries import library

_UNREAD: Final = frozenset((
    "audio", "button", "canvas", "dialog", "embed", "footer", "head", "iframe", "input", "map", "nav",
    "noscript", "object", "script", "select", "style", "svg", "template", "textarea", "video",
))  # fmt: skip
"""Elements that are not part of the text."""
_AROUND: Final = frozenset(("aside", "header"))
"""Elements that stand around the text, unless the page names its main content and they are inside of it."""
_ROLES: Final = frozenset(("banner", "complementary", "contentinfo", "navigation", "search"))
_HEADINGS: Final = {f"h{level}": level for level in range(1, 7)}
_BLOCKS: Final = frozenset((
    "address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "div", "dl",
    "dt", "fieldset", "figcaption", "figure", "form", "header", "hgroup", "hr", "legend", "li", "main", "ol",
    "p", "pre", "section", "summary", "table", "tbody", "tfoot", "thead", "ul",
)) | frozenset(_HEADINGS)  # fmt: skip
_LARGE: Final = "h1, h2, h3, h4, h5, h6, table, pre, ul, ol, dl, section, article"
"""What stands in a cell of a table that lays out a page, and not in a cell of a table of data."""
_SIGNS: Final = frozenset(("¶", "§", "🔗"))
"""The text of a link to the place where it stands. In a heading it may also be #."""
MOST_NESTED: Final = 1_000
"""How deeply elements may nest; Chromium flattens deeper than 512. The parser's time grows with size times depth."""
MANY_LINKS: Final = 20
"""How many links an index has at least."""
SHARE_OF_LINKS: Final = 0.75
"""How much of an index's text is in links. Of the pages of the manuals of Python 3.11 and Git 2.39, all those with 0.75
or more are indexes and tables of contents, and so are those of 0.66 to 0.75, which are read."""
_TAG: Final = re.compile(r"<(/?)([a-z][a-z0-9-]*)", re.IGNORECASE)
_UNCLOSED: Final = frozenset((
    "area", "base", "br", "col", "dd", "dt", "embed", "hr", "img", "input", "li", "link", "meta", "option", "p",
    "param", "source", "td", "th", "tr", "track", "wbr",
))  # fmt: skip
"""Elements that often have no end tag."""
_WHITE: Final = re.compile(r"[ \t\n\r\f\v]+")


def read_html(html: str) -> Document:
    """The document of a page. Positions are those in the text that is taken out of it.

    Raises ValueError if its elements nest too deeply.
    """
    if _depth(html) > MOST_NESTED:
        raise ValueError(f"its elements nest more than {MOST_NESTED:,} deep, which no real page does")
    page = library("selectolax.lexbor").LexborHTMLParser(html)
    joined = DocumentBuilder()
    if page.body is not None:
        root, is_main = _main(page)
        walk = _Walk(joined, is_main=is_main)
        walk.run(root)
        return joined.document(has_only_links=walk.has_only_links)
    return joined.document()


def _depth(html: str) -> int:
    """How deeply elements nest, counted by their tags. It is an estimate, because texts and scripts may have tags."""
    depth = deepest = 0
    for tag in _TAG.finditer(html):
        if tag[2].lower() not in _UNCLOSED:
            depth = max(0, depth + (-1 if tag[1] else 1))
            deepest = max(deepest, depth)
    return deepest


def _is_link(node: Any) -> bool:
    return node.tag == "a" and "href" in node.attributes


def _without_empty_cells(line: str) -> str:
    """A line of a table without the signs of the cells at its end that have no text."""
    end = len(line)
    while line.endswith(" |", 0, end):
        end -= 2
    return "" if line[:end] == "|" else line[:end]


def _main(page: Any) -> tuple[Any, bool]:
    """The element with the main content, and whether the page says so."""
    for name in ("main", "[role=main]", "article"):
        marked = page.css(name)
        if marked and (name != "article" or len(marked) == 1) and marked[0].text(deep=True).strip():
            return marked[0], True
    return page.body, False


class _Walk:
    """Goes through the elements in their order and collects blocks. It does not recurse, because pages nest deeply."""

    def __init__(self, joined: DocumentBuilder, *, is_main: bool) -> None:
        self._joined = joined
        self._unread = _UNREAD if is_main else _UNREAD | _AROUND
        self._line: list[str] = []
        self._level = 0
        self._listings = 0
        self._cells = 0
        self._is_item = False
        self._was_item = False
        self._links = 0
        self._in_links = 0
        self._length = 0
        self._of_links = 0

    @property
    def has_only_links(self) -> bool:
        return self._links >= MANY_LINKS and self._of_links >= SHARE_OF_LINKS * self._length

    def run(self, root: Any) -> None:
        end = root.mem_id
        node = root
        while True:
            is_read = self._enter(node)
            if is_read and (child := node.child) is not None:
                node = child
                continue
            if is_read:
                self._leave(node)
            while node.mem_id != end and (after := node.next) is None:
                node = node.parent
                self._leave(node)
            if node.mem_id == end:
                self._flush()
                return
            node = after

    def _enter(self, node: Any) -> bool:
        """Whether what is inside the node is read."""
        tag = node.tag
        if tag == "-text":
            text = node.text_content or ""
            length = len(text.strip())
            self._length += length
            self._of_links += length if self._in_links else 0
            self._line.append(text if self._listings else _WHITE.sub(" ", text))
            return False
        if tag.startswith(("-", "!")) or tag in self._unread or self._is_left_out(node, tag):
            return False
        if _is_link(node):
            self._links += 1
            self._in_links += 1
        elif tag in ("br", "tr"):
            self._line.append("\n")
        elif tag in ("td", "th"):
            self._cells += bool(self._cells) or node.css_first(_LARGE) is None
        elif tag in _BLOCKS and self._is_line(tag):
            self._line.append(" ")
        elif tag in _BLOCKS:
            self._flush()
            self._level = _HEADINGS.get(tag, self._level)
            self._listings += tag == "pre"
            self._is_item = tag == "li" or (self._is_item and tag in ("p", "div"))
        return True

    def _leave(self, node: Any) -> None:
        tag = node.tag
        if _is_link(node):
            self._in_links -= 1
        elif tag in ("td", "th") and self._cells:
            self._cells -= 1
            self._line.append(" | ")
        elif (tag in _BLOCKS or tag in ("td", "th")) and not self._is_line(tag):
            self._flush()
            self._level = 0 if tag in _HEADINGS else self._level
            self._listings -= tag == "pre"

    def _is_line(self, tag: str) -> bool:
        """Whether a block continues on the same line, because it stands in a cell of data or in a heading."""
        return self._cells > 0 or (self._level > 0 and tag not in _HEADINGS)

    def _is_left_out(self, node: Any, tag: str) -> bool:
        attributes = node.attributes
        if not attributes:
            return False
        if "hidden" in attributes or attributes.get("aria-hidden") == "true" or attributes.get("role") in _ROLES:
            return True
        if tag != "a":
            return False
        text = node.text(deep=True).strip()
        return text in _SIGNS or (text == "#" and self._level > 0)

    def _flush(self) -> None:
        text = "".join(self._line)
        self._line.clear()
        if self._listings:
            text = text.strip("\n").rstrip()
        else:
            lines = (_without_empty_cells(" ".join(filter(None, line.split(" ")))) for line in text.split("\n"))
            text = "\n".join(filter(None, lines))
        if not text.strip():
            return
        is_item = self._is_item and not self._level
        self._joined.add(f"- {text}" if is_item else text, self._level, is_near=is_item and self._was_item)
        self._was_item, self._is_item = is_item, False
