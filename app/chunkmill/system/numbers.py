"""NumPy, which is imported when a number is first needed.

Its import takes longer than all queries of most commands, which need no array. The modules that those commands import
anyway take ``np`` from here, and ask it for nothing at their top level. The other names are for annotations alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, DTypeLike, NDArray
else:

    class _NumPy:
        """Stands for the module. An attribute is looked up there once."""

        def __getattr__(self, name: str) -> Any:
            import numpy

            value = getattr(numpy, name)
            setattr(self, name, value)
            return value

    class _NDArray:
        """Is subscripted by those who read annotations."""

        def __getitem__(self, of: Any) -> Any:
            from numpy.typing import NDArray

            return NDArray[of]

    np, NDArray = _NumPy(), _NDArray()
    ArrayLike = DTypeLike = Any

__all__ = ["ArrayLike", "DTypeLike", "NDArray", "np"]
