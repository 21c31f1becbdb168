"""What makes a result a table: in a notebook as HTML, and for ``print`` and IPython as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, SupportsIndex, TypeVar, overload

if TYPE_CHECKING:
    from chunkmill.domain.tables import Table

Item = TypeVar("Item")


class _PrintedResult:
    """Prints the tables of ``_tables``."""

    __slots__ = ()

    def _tables(self) -> Sequence[Table]:
        raise NotImplementedError

    def _otherwise(self) -> str:
        return "Nothing."

    # The modules are imported when something is printed: they know all results, which begin with this one.

    def __str__(self) -> str:
        from chunkmill.domain import tables

        return tables.as_text(self._tables(), otherwise=self._otherwise())

    def _repr_html_(self) -> str:
        from chunkmill.domain import tables

        return tables.as_html(self._tables(), otherwise=self._otherwise())

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        # Inside of a list or a dict, a table would stand among brackets.
        is_inside = cycle or len(getattr(printer, "stack", ())) > 1
        printer.text(repr(self) if is_inside else str(self))


class PrintedResult(_PrintedResult):
    """A result that prints as a list of its fields. ``repr`` stays on one line, for logs and debuggers."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        # IPython takes the first of the two that it meets on its way up, and a dataclass has a __repr__ of its own.
        super().__init_subclass__()
        cls._repr_pretty_ = _PrintedResult._repr_pretty_  # type: ignore[method-assign]

    def _tables(self) -> Sequence[Table]:
        from chunkmill.domain import views

        return views.of_one(self)


class Rows(_PrintedResult, list[Item], Generic[Item]):
    """A list of results that prints as a table. It is a list in all else; a slice of it prints as a table too."""

    __slots__ = ("_of",)

    def __init__(self, items: Iterable[Item] = (), of: type[Item] | None = None) -> None:
        super().__init__(items)
        self._of = of

    @overload
    def __getitem__(self, index: SupportsIndex) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Item | list[Item]:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        return Rows(super().__getitem__(index), self._of)

    def __repr__(self) -> str:
        # The prompt of Python shows this, and knows no other way.
        return str(self)

    def _tables(self) -> Sequence[Table]:
        from chunkmill.domain import views

        return [views.of_rows(self)] if self else []

    def _otherwise(self) -> str:
        from chunkmill.domain import views

        return f"No {views.plural_of(self._of)}."
