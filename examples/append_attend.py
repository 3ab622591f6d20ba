"""A paged FP8 cache: tokens of two sequences stored, and attention to them.

python examples/append_attend.py
"""

from types import SimpleNamespace

import torch
from torch.nn.functional import scaled_dot_product_attention

import fp8kv

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
num_heads, num_kv_heads, head_size, block_size = 32, 8, 128, 16

# One cache per layer of a model; here one layer. A scale per KV head for K, one for all of V. Scales usually
# come from a checkpoint (fp8kv.load_kv_scales) or from calibration (fp8kv.calibrate).
scales = SimpleNamespace(k=torch.linspace(0.02, 0.03, num_kv_heads), v=0.02)
cache = fp8kv.PagedKVCache(64, block_size, num_kv_heads, head_size, scales=scales, device=device)

# Two sequences, of 37 and 20 tokens, and the blocks that each owns. Unused entries of the table are not read.
seq_lens = [37, 20]
block_table = torch.tensor([[7, 3, 12], [5, 0, -1]], dtype=torch.int32, device=device)


def slots_of(sequence: int) -> torch.Tensor:
    """Where the tokens of a sequence go: block * block_size + offset."""
    position = torch.arange(seq_lens[sequence], device=device)
    return block_table[sequence, position // block_size].long() * block_size + position % block_size


key, value = torch.randn(2, sum(seq_lens), num_kv_heads, head_size, dtype=torch.bfloat16, device=device)
cache.append(key, value, torch.cat([slots_of(0), slots_of(1)]))

# The query of the last token of each sequence.
query = torch.randn(2, num_heads, head_size, dtype=torch.bfloat16, device=device)


def attend_to(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """PyTorch's attention of one query [num_heads, head_size] to the tokens of its sequence."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query[None], key, value))
    return scaled_dot_product_attention(q, k, v, enable_gqa=True)[0, :, 0]


def attend_to_all(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The same for all sequences, whose tokens follow each other."""
    parts = zip(query, keys.split(seq_lens), values.split(seq_lens), strict=True)
    return torch.stack([attend_to(*part) for part in parts])


out = cache.attend(query, block_table, seq_lens)

# What FP8 costs: the same attention to the keys and values that were never quantized.
expected = attend_to_all(key, value)
error = ((out - expected).norm() / expected.norm()).item()
print(f"{cache}")
print(f"{2 * key.numel() * key.element_size():,} bytes of K and V, {2 * key.numel():,} in the cache")
print(f"relative error of the attention: {error:.4f}")
