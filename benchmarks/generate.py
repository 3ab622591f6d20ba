"""Measures steps of decoding with a language model: KV caches in 16 bits and in FP8, eager and compiled.

    python benchmarks/generate.py --layers 16 --json benchmarks/results/generate_h200.json
    python benchmarks/generate.py --device cpu --quick

The model has the shape of Llama-3.1-8B, random weights in bfloat16, and as many of its 32 layers as --layers
says. A cache is filled with random keys and values; then steps of one token for each sequence are timed, the
median of several rounds. Peak memory is that of these steps, the weights included.

The context that fits is computed for the whole model: what its weights leave of --memory, divided by the
bytes that a token takes in the caches of 16 sequences, and in the 16-bit copy of one layer where attention
reads such a copy.

On the CPU, "compiled" is traced and not translated: it shows that it works, not how fast it is.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    QuantizedCache,
    StaticCache,
)

import fp8kv
from fp8kv.transformers import Fp8Cache

SHAPE = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
}  # fmt: skip
QUICK_SHAPE = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
}  # fmt: skip
#: Sequences, and tokens of each before the first step.
SIZES = ((1, 1024), (1, 32768), (16, 8192))
QUICK_SIZES = ((1, 32), (2, 48))
ALL_LAYERS = 32  # of Llama-3.1-8B
BATCH = 16  # of the context that fits
#: Its name before Transformers 5.24.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
WARM_UP, ROUNDS, STEPS = 3, 5, 10


@dataclass(frozen=True)
class Kind:
    """A kind of cache.

    Attributes:
        make: an empty one for a config, with room for as many tokens.
        compiled: whether the model is compiled.
        itemsize: bytes of an element.
        copies: whether attention reads a 16-bit copy of a layer.
    """

    name: str
    make: Callable[[LlamaConfig, int], Any]
    compiled: bool = False
    itemsize: int = 1
    copies: bool = False


@dataclass(frozen=True)
class Row:
    """What was measured; None: not here, or `note` says why.

    Attributes:
        fits: tokens that each of `BATCH` sequences may have beside the weights of the whole model.
    """

    cache: str
    compiled: bool
    batch: int
    context: int
    ms: float | None = None
    peak_gib: float | None = None
    fits: int | None = None
    note: str = ""


def kinds() -> Iterator[Kind]:
    """Those that the installed versions have."""
    yield Kind("16-bit dynamic", lambda config, _: DynamicCache(config=config), itemsize=2)
    for compiled in (False, True):
        yield Kind("16-bit static", lambda config, size: StaticCache(config, size), compiled, itemsize=2)
    if hasattr(transformers.cache_utils, "Fp8QuantizedLayer"):
        yield Kind("FP8 of Transformers", lambda config, _: QuantizedCache("fp8", config), copies=True)
    has_direct = "direct" in inspect.signature(Fp8Cache).parameters
    for direct in (False, True) if has_direct else (False,):
        more = {"direct": direct} if has_direct else {}
        name = f"Fp8Cache, {'direct' if direct else 'dequantized'}"

        def dynamic(config: LlamaConfig, _: int, more: Any = more) -> Any:
            return Fp8Cache(config, **more)

        def static(config: LlamaConfig, size: int, more: Any = more) -> Any:
            return Fp8Cache(config, max_cache_len=size, **more)

        yield Kind(f"{name}, dynamic", dynamic, copies=not direct)
        for compiled in (False, True):
            yield Kind(f"{name}, static", static, compiled, copies=not direct)


def make_model(config: LlamaConfig, device: torch.device) -> Any:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@torch.no_grad()
def measure(kind: Kind, model: Any, batch: int, context: int, memory: float) -> Row:
    """One row; a cache that does not fit, or does not work here, says so in its note."""
    device, row = model.device, Row(kind.name, kind.compiled, batch, context)
    model.set_attn_implementation("sdpa")  # whatever an `Fp8Cache` has chosen
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        cache = kind.make(model.config, context + WARM_UP + ROUNDS * STEPS)
        fill(cache, model.config, batch, context, device)
        ms, peak_gib = time_steps(compiled(model) if kind.compiled else model, cache, batch, device)
    except (RuntimeError, ValueError) as error:
        return replace(row, note=f"{type(error).__name__}: {error}".splitlines()[0])
    return replace(row, ms=ms, peak_gib=peak_gib, fits=fitting(kind, model, memory))


def fill(cache: Any, config: LlamaConfig, batch: int, context: int, device: torch.device) -> None:
    """Puts random tokens into it."""
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        key, value = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
        cache.update(key, value, layer)


def compiled(model: Any) -> Callable[..., Any]:
    how = {"mode": "reduce-overhead"} if model.device.type == "cuda" else {"backend": "aot_eager"}
    return torch.compile(model.forward, fullgraph=True, **how)


def time_steps(step: Callable[..., Any], cache: Any, batch: int, device: torch.device) -> tuple[float, float | None]:
    """Milliseconds of a step, and GiB at the peak."""
    token = torch.zeros(batch, 1, dtype=torch.int64, device=device)

    def run(count: int) -> float:
        nonlocal token
        wait(device)
        start = time.perf_counter()
        for _ in range(count):
            logits = step(input_ids=token, use_cache=True, **{CACHE_ARGUMENT: cache}).logits
            token = logits[:, -1:].argmax(-1)
        wait(device)
        return 1000 * (time.perf_counter() - start) / count

    run(WARM_UP)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ms = statistics.median(run(STEPS) for _ in range(ROUNDS))
    return ms, torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fitting(kind: Kind, model: Any, memory: float) -> int:
    """The context that fits into so many GiB: see the description of this file."""
    config = model.config
    layer = sum(x.nbytes for x in model.model.layers[0].parameters())
    weights = sum(x.nbytes for x in model.parameters()) + layer * (ALL_LAYERS - config.num_hidden_layers)
    elements = 2 * config.num_key_value_heads * config.head_dim
    token = elements * (ALL_LAYERS * kind.itemsize + (2 if kind.copies else 0))
    return max(0, int((memory * 2**30 - weights) / (BATCH * token)))


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| batch x context | cache | | ms a step | peak GiB | fits beside 16 |", "| --- " * 6 + "|"]
    for row in rows:
        ms = row.note if row.ms is None else f"{row.ms:.2f}"
        peak = "" if row.peak_gib is None else f"{row.peak_gib:.1f}"
        fits = "" if row.fits is None else f"{row.fits:,}"
        mode = "compiled" if row.compiled else "eager"
        lines.append(f"| {row.batch} x {row.context} | {row.cache} | {mode} | {ms} | {peak} | {fits} |")
    return "\n".join(lines)


def size(text: str) -> tuple[int, int]:
    batch, context = map(int, text.split("x"))
    return batch, context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", help='"cuda" or "cpu"')
    parser.add_argument("--layers", type=int, default=ALL_LAYERS, help="layers of the model, of 32")
    parser.add_argument("--only", nargs="+", default=[""], help="only caches whose name contains one of these")
    parser.add_argument("--sizes", nargs="+", type=size, metavar="BATCHxCONTEXT", help="default: 1x1024 1x32768 16x8192")
    parser.add_argument("--memory", type=float, help="GiB to fit into; default: the GPU's, or 80")
    parser.add_argument("--quick", action="store_true", help="a tiny model, short contexts")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    memory = options.memory or (torch.cuda.mem_get_info(device)[1] / 2**30 if on_gpu else 80)
    torch.manual_seed(0)
    layers = min(2, options.layers) if options.quick else options.layers
    model = make_model(LlamaConfig(**(QUICK_SHAPE if options.quick else SHAPE), num_hidden_layers=layers), device)
    rows = []
    for batch, context in options.sizes or (QUICK_SIZES if options.quick else SIZES):
        for kind in kinds():
            if not any(part in kind.name for part in options.only):
                continue
            rows.append(measure(kind, model, batch, context, memory))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            if options.json:
                report = {
                    "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
                    "fp8kv": fp8kv.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
                    "layers": layers, "memory_gib": memory, "rows": [asdict(row) for row in rows],
                }  # fmt: skip
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
