"""The decode loop of an engine, with random weights in place of a model; on a GPU a step is a CUDA graph.

    python examples/decode_loop.py [--steps 32]

In every step each sequence gets one token: its K and V are appended, and its query attends to all tokens so
far.
"""

import argparse
from collections.abc import Callable

import torch

import fp8kv

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 2, 8, 2, 64
HIDDEN = NUM_HEADS * HEAD_SIZE
NUM_SEQS, BLOCK_SIZE, BLOCKS_PER_SEQ = 3, 16, 4
MAX_LEN = BLOCK_SIZE * BLOCKS_PER_SEQ


class Engine:
    """Weights, caches, and the buffers of a step, all at fixed addresses, as a CUDA graph wants them."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        columns = HIDDEN + 2 * NUM_KV_HEADS * HEAD_SIZE
        self.weights = torch.randn(NUM_LAYERS, HIDDEN, columns, device=device).bfloat16() / HIDDEN**0.5
        self.caches = [
            fp8kv.PagedKVCache(NUM_SEQS * BLOCKS_PER_SEQ, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE, device=device)
            for _ in range(NUM_LAYERS)
        ]
        blocks = torch.randperm(NUM_SEQS * BLOCKS_PER_SEQ, device=device).int()
        self.block_table = blocks.view(NUM_SEQS, BLOCKS_PER_SEQ)
        self.seq_lens = torch.zeros(NUM_SEQS, dtype=torch.int32, device=device)
        self.x = torch.randn(NUM_SEQS, HIDDEN, device=device).bfloat16()

    def step(self) -> None:
        """Appends one token to every sequence. Only kernels are launched: nothing is read back."""
        position = self.seq_lens
        block = self.block_table.gather(1, (position // BLOCK_SIZE).long()[:, None])[:, 0]
        slots = block.long() * BLOCK_SIZE + position % BLOCK_SIZE
        self.seq_lens += 1
        x = self.x
        for weight, cache in zip(self.weights, self.caches, strict=True):
            sizes = [HIDDEN, NUM_KV_HEADS * HEAD_SIZE, NUM_KV_HEADS * HEAD_SIZE]
            query, key, value = (part.unflatten(1, (-1, HEAD_SIZE)) for part in (x @ weight).split(sizes, 1))
            cache.append(key, value, slots)  # slices of one tensor: no copy is needed
            x = cache.attend(query, self.block_table, self.seq_lens).flatten(1)
        self.x.copy_(x / x.float().std().bfloat16())  # the input of the next step; a model would sample a token

    def captured_step(self) -> Callable[[], None]:
        """`step` as a CUDA graph, which runs with one launch."""
        state = self.seq_lens.clone(), self.x.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()  # once before the capture, so that kernels and libraries are loaded
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        for tensor, before in zip((self.seq_lens, self.x), state, strict=True):
            tensor.copy_(before)  # the first step is made once more
        return graph.replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=32, help=f"at most {MAX_LEN}")
    steps = parser.parse_args().steps
    if not 1 <= steps <= MAX_LEN:
        parser.error(f"--steps must be from 1 to {MAX_LEN}, got {steps}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = Engine(device)
    step = engine.captured_step() if device == "cuda" else engine.step
    for _ in range(steps):
        step()
    how = ", in a CUDA graph" if device == "cuda" else ""
    print(f"{steps} steps of {NUM_SEQS} sequences on {device}{how}")
    print(f"tokens in the cache: {engine.seq_lens.tolist()}, {engine.caches[0]}")


if __name__ == "__main__":
    main()
