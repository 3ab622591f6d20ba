"""Query quantization of vLLM by our operator. It needs vLLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8

from fp8kv._dtypes import REAL_DTYPES
from fp8kv.quantization import static_scaled_fp8_quant

_NAME = "QuantFP8"


def replace_quantization() -> None:
    """Puts the class below in the place of vLLM's. It may be called many times.

    Raises:
        ValueError: another plug-in has done so.
    """
    present = op_registry_oot.get(_NAME)
    if present is None:
        ours: Any = Fp8KVQuantFP8
        CustomOp.register_oot(name=_NAME)(ours)
        ours.name = vars(QuantFP8)["name"]  # by which custom_ops turns it on and off
    elif present is not Fp8KVQuantFP8:
        raise ValueError(
            f"fp8kv.vllm: {_NAME} must be vLLM's own with FP8KV_VLLM_WRITES=1, got {present.__qualname__} of another plug-in"
        )


class Fp8KVQuantFP8(QuantFP8):
    """Quantizes queries, and whatever else has given scales, with the same bytes."""

    def forward_cuda(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        scale_ub: Tensor | None = None,
        use_triton: bool = False,
    ) -> tuple[Tensor, Tensor]:
        if scale is None or self.num_token_padding is not None or x.dtype not in REAL_DTYPES:
            given: tuple[Tensor, Tensor] = super().forward_cuda(x, scale, scale_ub, use_triton)
            return given
        result = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
        static_scaled_fp8_quant(result, x, scale, tuple(self.group_shape))
        return result, scale
