"""One vocabulary for every granularity of scales: the extent of a group over the matrix view of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple


class _Extents(NamedTuple):
    rows: int
    cols: int


class GroupShape(_Extents):
    """Extents of the groups that share a scale, over the view ``[prod(shape[:-1]), shape[-1]]`` of a tensor.

    -1 is the whole extent.

    ====================  =================  ==========================  ====================
    name                  group              scale, for an [M, N] input  typical use
    ====================  =================  ==========================  ====================
    ``PER_TENSOR``        (-1, -1)           [] or [1]                   weights
    ``PER_TOKEN``         (1, -1)            [M] or [M, 1]               activations
    ``PER_CHANNEL``       (-1, 1)            [N] or [1, N]               output channels
    ``per_head(D)``       (-1, D)            [H] or [1, H], N = H * D    heads of Q, K and V
    ``GroupShape(m, n)``  (m, n)             [ceil(M/m), ceil(N/n)]      1x128, 128x128
    ====================  =================  ==========================  ====================

    The last group of a row or column may be smaller than the others. Extents below 1, other than -1, are
    refused by the ops. It is a named tuple, so a plain ``(rows, cols)`` does wherever a group shape is
    wanted.

    Example:
        >>> from fp8kv import GroupShape
        >>> GroupShape.PER_TOKEN
        GroupShape(rows=1, cols=-1)
        >>> GroupShape(1, 128).scale_shape((4, 300))
        (4, 3)
    """

    __slots__ = ()

    PER_TENSOR: ClassVar[GroupShape]
    PER_TOKEN: ClassVar[GroupShape]
    PER_CHANNEL: ClassVar[GroupShape]

    @staticmethod
    def per_head(head_size: int) -> GroupShape:
        """The group of one attention head of an input ``[num_tokens, num_heads * head_size]``.

        Raises:
            ValueError: head_size is below 1.

        Example:
            >>> from fp8kv import GroupShape
            >>> GroupShape.per_head(128).scale_shape((16, 1024))
            (1, 8)
        """
        if head_size < 1:
            raise ValueError(f"GroupShape.per_head: head_size must be at least 1, got {head_size}")
        return GroupShape(-1, head_size)

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scales that `fp8kv.quantize` computes for an input of `shape`.

        ``(1,)`` per tensor; ``shape[:-1] + (C,)`` for groups of one row, which makes ``shape[:-1] + (1,)``
        per token; otherwise the matrix ``(R, C)``, which makes ``(1, N)`` per channel. R and C are the
        numbers of groups along rows and columns.

        Example:
            >>> from fp8kv import GroupShape
            >>> GroupShape.PER_TOKEN.scale_shape((2, 3, 64))
            (2, 3, 1)
            >>> GroupShape.PER_CHANNEL.scale_shape((2, 3, 64))
            (1, 64)
        """
        if self.rows == -1 and self.cols == -1:
            return (1,)
        leading = tuple(shape[:-1])
        num_rows = 1
        for size in leading:
            num_rows *= size
        cols = _num_groups(shape[-1] if len(shape) else 1, self.cols)
        return (*leading, cols) if self.rows == 1 else (_num_groups(num_rows, self.rows), cols)


def _num_groups(size: int, extent: int) -> int:
    return 1 if extent < 1 else -(-size // extent)


GroupShape.PER_TENSOR = GroupShape(-1, -1)
GroupShape.PER_TOKEN = GroupShape(1, -1)
GroupShape.PER_CHANNEL = GroupShape(-1, 1)
