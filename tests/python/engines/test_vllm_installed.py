"""The layer of an installed vLLM with the backend: its own code around ours, on the device that vLLM serves with.

Not run where vLLM is not installed. Its Python files suffice, without its libraries and without a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attention_problems import assert_near, int32
from fp8kv import reference

pytest.importorskip("vllm")

NAME = "model.layers.0.self_attn.attn"
HEADS, KV_HEADS, HEAD_SIZE = 8, 2, 64


@pytest.fixture
def bfloat16() -> Any:
    """The default dtype, as while vLLM makes a model."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("bfloat16")
def test_a_layer_of_vllm() -> None:
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.platforms import current_platform
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from fp8kv.vllm import register

    register()
    from fp8kv.vllm.backend import Fp8KVBackend

    device = torch.device("cuda" if current_platform.is_cuda() else "cpu")
    config: Any = VllmConfig(device_config=DeviceConfig(device=device.type))
    config.cache_config.cache_dtype = "fp8"
    with set_current_vllm_config(config), device:
        layer: Any = Attention(
            HEADS,
            HEAD_SIZE,
            HEAD_SIZE**-0.5,
            KV_HEADS,
            cache_config=config.cache_config,
            prefix=NAME,
            attn_backend=Fp8KVBackend,
        )
        layer.process_weights_after_loading(torch.bfloat16)
    assert layer.query_quant is None
    layer._k_scale.fill_(0.03)
    layer._v_scale.fill_(0.02)
    layer.kv_cache = torch.zeros(16, 16, KV_HEADS, 2 * HEAD_SIZE, dtype=torch.uint8, device=device).transpose(1, 2)
    parts = vars(config) | {"model_config": SimpleNamespace(model="org/model", max_model_len=128)}
    builder = Fp8KVBackend.get_builder_cls()(None, [NAME], SimpleNamespace(**parts), device)
    table = torch.arange(16, dtype=torch.int32).view(2, 8)
    batch = CommonAttentionMetadata(
        query_start_loc=int32(0, 5, 25).to(device),
        query_start_loc_cpu=int32(0, 5, 25),
        seq_lens=int32(5, 20).to(device),
        num_reqs=2,
        num_actual_tokens=25,
        max_query_len=20,
        max_seq_len=20,
        block_table_tensor=table.to(device),
        slot_mapping=torch.cat([torch.arange(5), 128 + torch.arange(20)]).to(device),
        seq_lens_cpu_upper_bound=int32(5, 20),
    )
    query, key, value = (torch.randn(28, heads * HEAD_SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
    with set_forward_context({NAME: builder.build(0, batch)}, config, slot_mapping={NAME: batch.slot_mapping}):
        out = layer(query.to(device), key.to(device), value.to(device)).view(28, HEADS, HEAD_SIZE)[:25].cpu()

    caches = torch.zeros(2, 16, 16, KV_HEADS, HEAD_SIZE, dtype=torch.uint8)
    k_scale, v_scale = torch.tensor([[0.03], [0.02]], dtype=torch.float32)
    key, value = (x.view(28, KV_HEADS, HEAD_SIZE) for x in (key, value))
    reference.reshape_and_cache_flash(key, value, *caches, batch.slot_mapping.cpu(), "fp8", k_scale, v_scale)
    query = query.view(28, HEADS, HEAD_SIZE)[:25]
    expected = reference.paged_attention(
        query,
        *caches,
        table,
        batch.seq_lens.cpu(),
        k_scale=k_scale,
        v_scale=v_scale,
        cu_query_lens=batch.query_start_loc_cpu,
        out=torch.zeros(query.shape, dtype=torch.float64),
    )
    assert_near(out, expected, torch.full((25, HEADS), 5.0, dtype=torch.float64))


def test_the_checks_of_vllm() -> None:
    """A reason for each thing that can't be served, and none for a checkpoint with scales per head."""
    from vllm.platforms.interface import DeviceCapability

    from fp8kv.vllm.backend import Fp8KVBackend

    served: dict[str, Any] = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "fp8",
        "block_size": 48,
        "use_mla": False,
        "has_sink": True,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": True,
        "device_capability": DeviceCapability(8, 0),
        "attn_type": "decoder",
        "has_sliding_window": True,
        "use_kv_connector": True,
    }

    def reasons(**changes: Any) -> list[str]:
        return list(Fp8KVBackend.validate_configuration(**served | changes))

    assert reasons() == []
    assert reasons(device_capability=DeviceCapability(7, 5)) == ["compute capability not supported"]
    assert reasons(kv_cache_dtype="int8_per_token_head") == ["kv_cache_dtype not supported"]
    assert reasons(block_size=24) == ["block_size not supported"]
    assert reasons(use_mla=True) == ["MLA not supported"]
    assert reasons(attn_type="encoder_only") == ["attention type encoder_only not supported"]
    assert reasons(use_non_causal=True) == ["non-causal attention not supported"]
    assert reasons(use_batch_invariant=True) == ["batch invariance not supported"]
    assert reasons(use_pcp=True) == ["PCP not supported"]
    assert reasons(kv_cache_dtype="fp8_per_token_head", head_size=66) == [
        "head_size must be a multiple of 4 with fp8_per_token_head, got 66"
    ]
