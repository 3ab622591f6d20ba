"""`QuantFP8`: quantization as a module, with the call signature of vLLM's layer of that name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp8kv.group_shape import GroupShape
from fp8kv.quantization import quantize


class QuantFP8(nn.Module):
    """Quantizes its input to FP8, with a given scale (static) or a computed one (dynamic).

    Args:
        static: whether the scale is passed to `forward`.
        group_shape: which elements share a scale; see `GroupShape`.
        dtype: float8_e4m3fn or float8_e5m2.
        num_token_padding: the result has at least this many rows (its first dimension); additional rows are
            zero. For matrix products that require a minimum number of rows. Scales are not padded.

    Example:
        >>> import torch
        >>> from fp8kv import GroupShape, QuantFP8
        >>> layer = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN, num_token_padding=4)
        >>> q, scale = layer(torch.ones(3, 64, dtype=torch.bfloat16))
        >>> q.shape, scale.shape
        (torch.Size([4, 64]), torch.Size([3, 1]))
    """

    def __init__(
        self,
        static: bool,
        group_shape: GroupShape,
        *,
        dtype: torch.dtype = torch.float8_e4m3fn,
        num_token_padding: int | None = None,
    ) -> None:
        super().__init__()
        self.static = static
        self.group_shape = GroupShape(*group_shape)
        self.dtype = dtype
        self.num_token_padding = num_token_padding

    def forward(self, x: Tensor, scale: Tensor | None = None, scale_ub: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Quantizes `x`; see `fp8kv.quantize` for shapes and dtypes.

        Args:
            x: float32, float16 or bfloat16; with `num_token_padding` of at least two dimensions.
            scale: float32. Static only, and needed there.
            scale_ub: float32, one element; bounds computed scales. Dynamic only.

        Returns:
            ``(q, scale)``: `q` in the shape of `x`, except for padding; `scale` as given, or as computed by
            `fp8kv.quantize`.

        Raises:
            ValueError: a scale is missing or unexpected, or padding is requested for a vector.
            RuntimeError: as `fp8kv.quantize`.
        """
        if self.static and scale is None:
            raise ValueError("QuantFP8: scale must be given when static=True, got None")
        if not self.static and scale is not None:
            raise ValueError(
                "QuantFP8: scale must be None when static=False, as scales are computed, "
                f"got a tensor of shape {list(scale.shape)}"
            )
        out = self._padded_result(x) if self.num_token_padding is not None else None
        q, scale = quantize(
            x,
            scale,
            group_shape=self.group_shape,
            dtype=self.dtype,
            scale_ub=scale_ub,
            out=None if out is None else out[: x.shape[0]],
        )
        return (q if out is None else out), scale

    def _padded_result(self, x: Tensor) -> Tensor:
        if x.dim() < 2:
            raise ValueError(f"QuantFP8: x must have at least 2 dimensions with num_token_padding, got shape {list(x.shape)}")
        num_tokens = x.shape[0]
        padded = torch.empty((max(num_tokens, self.num_token_padding or 0), *x.shape[1:]), dtype=self.dtype, device=x.device)
        padded[num_tokens:].view(torch.uint8).zero_()
        return padded

    def extra_repr(self) -> str:
        padding = "" if self.num_token_padding is None else f", num_token_padding={self.num_token_padding}"
        return f"static={self.static}, group_shape={tuple(self.group_shape)}, dtype={self.dtype}{padding}"
