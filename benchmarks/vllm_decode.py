"""fp8kv in vLLM on a GPU: greedy tokens compared with a reference attention, and times of decode steps.

    python benchmarks/vllm_decode.py --quick                     # a minute or two: does it work
    python benchmarks/vllm_decode.py --out results/vllm.json     # all settings, batches and contexts
    python benchmarks/vllm_decode.py --settings fp8kv flash-fp8 --batches 64 --contexts 8192 --no-tokens

Needs vLLM and fp8kv with CUDA kernels. The model has the shape of Llama 3.1 8B with few layers, random
weights, and random scales for each head; nothing is downloaded. Each setting is a process of its own, as vLLM
has one engine in each. The result is JSON, and a table of it is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 32, 8, 128
VOCABULARY = 32000
#: Steps before those that are measured, and steps with a profiler after them.
WARM_UP, PROFILED = 5, 10
#: What kernels do, by their names, the first that fits.
KINDS = {
    "cache write": r"reshape_and_cache|append",
    "query quantization": r"scaled_fp8_quant|static.*quant|quantize",
    "attention": r"attention|attn|flash|splitkv|combine|merge_parts|gather_vectorized|gather_scalar",
}


class Setting(NamedTuple):
    """An engine.

    Attributes:
        backend: what vLLM calls it; "fp8kv": ours, under the name that this vLLM has for it.
        cache: `kv_cache_dtype`.
        environment: further variables.
        reference: attention is `fp8kv.reference.paged_attention`, which is slow and eager.
        mode: "eager", "graphs" or "compiled".
    """

    backend: str
    cache: str
    environment: dict[str, str] = {}  # noqa: RUF012
    reference: bool = False
    mode: str = "graphs"


SETTINGS = {
    "reference": Setting("fp8kv", "fp8", reference=True, mode="eager"),
    "fp8kv-eager": Setting("fp8kv", "fp8", mode="eager"),
    "fp8kv": Setting("fp8kv", "fp8"),
    "fp8kv-compiled": Setting("fp8kv", "fp8", mode="compiled"),
    "fp8kv-paged-prefill": Setting("fp8kv", "fp8", {"FP8KV_VLLM_PREFILL": "paged"}),
    "fp8kv-per-token": Setting("fp8kv", "fp8_per_token_head"),
    "fp8kv-16bit": Setting("fp8kv", "auto"),
    "flash-fp8": Setting("FLASH_ATTN", "fp8"),
    "flash-fp8-eager": Setting("FLASH_ATTN", "fp8", mode="eager"),
    "flash-fp8-writes": Setting("FLASH_ATTN", "fp8", {"FP8KV_VLLM_WRITES": "1"}),
    "flash-16bit": Setting("FLASH_ATTN", "auto"),
    "triton-per-token": Setting("TRITON_ATTN", "fp8_per_token_head"),
}
#: Their tokens are compared with those of the reference: the same cache, and queries in 16 bits.
LIKE_THE_REFERENCE = ("fp8kv-eager", "fp8kv", "fp8kv-compiled", "fp8kv-paged-prefill")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 32768])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs")
    parser.add_argument("--strategy", choices=["attn_head", "tensor"], default="attn_head")
    parser.add_argument("--memory", type=float, default=80.0, help="GiB of the caches of a GPU, at most")
    parser.add_argument("--steps", type=int, default=20, help="that are measured, of which the median is taken")
    parser.add_argument("--gpu-memory-utilization", type=float, help="of vLLM, where other programs use the GPU too")
    parser.add_argument("--no-tokens", action="store_true", help="leaves the comparison of tokens out")
    parser.add_argument("--no-steps", action="store_true", help="leaves the times out")
    parser.add_argument("--quick", action="store_true", help="three settings, one batch and context, 2 layers")
    parser.add_argument("--out", type=Path, help="where the JSON goes; default: none")
    parser.add_argument("--one", choices=SETTINGS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.settings, options.batches, options.contexts = ["reference", "fp8kv", "flash-fp8"], [8], [1024]
        options.layers = 2
    for name, least in (("batches", min(options.batches)), ("contexts", min(options.contexts)), ("steps", options.steps)):
        if least < 1:
            parser.error(f"--{name} must be at least 1")
    if NUM_KV_HEADS % options.tensor_parallel:
        parser.error(f"--tensor-parallel must divide {NUM_KV_HEADS}")
    return options


def longest_of(context: int, options: argparse.Namespace) -> int:
    """Tokens of a sequence after all steps."""
    return context + WARM_UP + int(options.steps) + PROFILED + 8


def cases(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Batches and contexts whose caches in 16 bits fit, the largest last."""
    of_token = 2 * 2 * options.layers * NUM_KV_HEADS * HEAD_SIZE // options.tensor_parallel
    pairs = [(b, c) for b in options.batches for c in options.contexts]
    fitting = [(b, c) for b, c in pairs if b * longest_of(c, options) * of_token <= options.memory * 2**30]
    return sorted(fitting, key=lambda case: case[0] * case[1])


# The processes


def main() -> None:
    options = parse()
    if options.one:
        print("RESULT " + json.dumps(run(options.one, options)))
        return
    results = {}
    for name in options.settings:
        begin = time.monotonic()
        environment = os.environ | environment_of(SETTINGS[name], options.tensor_parallel)
        command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found = re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
        results[name] = json.loads(found[1]) if found else {"error": last_words(done)}
        print(f"{name}: {results[name].get('error', 'done')} ({time.monotonic() - begin:.0f} s)", flush=True)
    report = {
        "options": {k: v for k, v in vars(options).items() if k not in ("one", "out")},
        "results": results,
        "comparison": compare_tokens(results),
    }
    print(table(report), json.dumps(report["comparison"], indent=1), sep="\n")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, default=str) + "\n", encoding="utf-8")
    if any("error" in result for result in results.values()):
        raise SystemExit(1)


def environment_of(setting: Setting, tensor_parallel: int) -> dict[str, str]:
    """Engine and model in the process itself, if it is one, where they can be inspected."""
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if tensor_parallel == 1 else {}
    return one_process | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} | setting.environment


def last_words(process: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (process.stdout + process.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\w*(Error|Exception): ", line)]
    return (errors or lines or ["no output"])[-1].strip()


# One setting


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import vllm

    import fp8kv

    engine = make_engine(SETTINGS[name], options)
    result: dict[str, Any] = {
        "versions": {"fp8kv": fp8kv.__version__, "vllm": vllm.__version__, "torch": torch.__version__},
        "gpu": torch.cuda.get_device_name(),
    }
    if not options.no_tokens:
        result["tokens"] = greedy_tokens(engine)
    if not options.no_steps and not SETTINGS[name].reference:
        result["steps"] = [measure(engine, *case, options.steps) for case in cases(options)]
    return result


def make_engine(setting: Setting, options: argparse.Namespace) -> Any:
    from vllm import LLM

    backend = setting.backend
    if backend == "fp8kv":
        from fp8kv.vllm.versions import BACKEND_NAME as backend  # noqa: N811
    if setting.reference:
        attend_by_the_reference()
    longest = max([1024 + 64, *(longest_of(c, options) for _, c in cases(options))])
    largest = max([8, *(b for b, _ in cases(options))])
    folder = tempfile.mkdtemp()
    config = model_config(options, longest, quantized=setting.cache == "fp8")
    Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
    sizes = sorted({8, *options.batches})
    how: dict[str, Any] = {
        "eager": {"enforce_eager": True},
        "graphs": {
            "compilation_config": {
                "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes
            }
        },
        "compiled": {"compilation_config": {"cudagraph_capture_sizes": sizes}},
    }[setting.mode]  # fmt: skip
    if options.gpu_memory_utilization is not None:
        how["gpu_memory_utilization"] = options.gpu_memory_utilization
    needed = max([8 * 1024, *(b * longest_of(c, options) for b, c in cases(options))]) * 1.1
    of_token = 2 * 2 * options.layers * NUM_KV_HEADS * HEAD_SIZE // options.tensor_parallel
    engine = LLM(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        kv_cache_dtype=setting.cache,
        attention_backend=backend,
        max_model_len=longest,
        max_num_seqs=largest,
        kv_cache_memory_bytes=int(needed * of_token) + (256 << 20),
        enable_prefix_caching=True,  # see measure
        tensor_parallel_size=options.tensor_parallel,
        seed=0,
        **how,
    )
    engine.apply_model(fill)
    return engine


def model_config(options: argparse.Namespace, longest: int, *, quantized: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": NUM_HEADS * HEAD_SIZE,
        "intermediate_size": 14336,
        "num_hidden_layers": options.layers,
        "vocab_size": VOCABULARY,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": longest,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if quantized:
        scheme = {
            "num_bits": 8, "type": "float", "strategy": options.strategy, "symmetric": True, "dynamic": False
        }  # fmt: skip
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "config_groups": {},
            "ignore": [],
            "kv_cache_scheme": scheme,
        }
    return config


def fill(model: Any) -> None:
    """Weights of a size that keeps activations near 1, and scales that differ from head to head."""
    import torch

    with torch.no_grad():
        torch.manual_seed(0)
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0)
            else:
                p.normal_(0.0, 1.0 if "embed" in name else p.shape[1] ** -0.5)
        for layer in model.modules():
            for name in ("_q_scale", "_k_scale", "_v_scale") if hasattr(layer, "_k_scale") else ():
                scale = getattr(layer, name)
                scale.copy_(torch.linspace(0.008, 0.018, scale.numel()).view_as(scale))


def attend_by_the_reference() -> None:
    """Puts fp64 on the dequantized values in the place of the backend's attention."""
    from fp8kv import reference
    from fp8kv.vllm.backend import Fp8KVImpl

    def forward(
        self: Any, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any,
        output: Any, output_scale: Any = None, output_block_scale: Any = None,
    ) -> Any:  # fmt: skip
        if attn_metadata is None:
            return output.fill_(0)
        cache = self._layer_cache(kv_cache)
        for part in attn_metadata.parts:
            reference.paged_attention(
                query[part.rows],
                cache.key_cache,
                cache.value_cache,
                attn_metadata.block_table[part.sequences],
                attn_metadata.seq_lens[part.sequences],
                kv_cache_dtype=cache.dtype,
                k_scale=layer._k_scale.detach(),
                v_scale=layer._v_scale.detach(),
                softmax_scale=self.scale,
                cu_query_lens=part.cu_query_lens,
                out=output[part.rows],
            )
        return output

    Fp8KVImpl.forward = forward  # type: ignore[method-assign]


# Tokens


def greedy_tokens(engine: Any) -> list[dict[str, Any]]:
    """16 of each of 8 prompts, with the two most likely ones and their logarithms at each."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=2)
    prompts = [{"prompt_token_ids": list(range(10 + 7 * i, 110 + 30 * i))} for i in range(8)]
    result = []
    for output in engine.generate(prompts, parameters, use_tqdm=False):
        best = output.outputs[0]
        top = [
            sorted(((token, x.logprob) for token, x in step.items()), key=lambda pair: -pair[1])[:2] for step in best.logprobs
        ]
        result.append({"tokens": list(best.token_ids), "top": top})
    return result


def compare_tokens(results: dict[str, Any]) -> dict[str, Any]:
    """For each setting like the reference: tokens before the first difference, and how near a tie it is."""
    expected = results.get("reference", {}).get("tokens")
    if expected is None:
        return {}
    comparison = {}
    for name in LIKE_THE_REFERENCE:
        actual = results.get(name, {}).get("tokens")
        if actual is not None:
            pairs = list(zip(expected, actual, strict=True))
            equal = sum(first_difference(a["tokens"], b["tokens"]) for a, b in pairs)
            gaps = [gap for gap in (gap_of_difference(a, b) for a, b in pairs) if gap is not None]
            total = sum(len(a["tokens"]) for a, _ in pairs)
            comparison[name] = {
                "tokens": total, "equal_before_a_difference": equal, "gaps": gaps,
                "largest_gap": max(gaps, default=0.0),
            }  # fmt: skip
    return comparison


def first_difference(a: list[int], b: list[int]) -> int:
    """The length of what they have in common at the beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def gap_of_difference(expected: dict[str, Any], actual: dict[str, Any]) -> float | None:
    """How much more likely, as a difference of logarithms, the reference finds its token than the other's.

    At the first difference; after it, prompts differ. None: there is none. Infinite: the other's token is not
    the second of the reference. A tie is near 0.
    """
    i = first_difference(expected["tokens"], actual["tokens"])
    if i == len(expected["tokens"]):
        return None
    (_, first), (second, its_logprob) = expected["top"][i]
    return float(first - its_logprob) if actual["tokens"][i] == second else float("inf")


# Steps


def measure(engine: Any, batch: int, context: int, steps: int) -> dict[str, Any]:
    """Decode steps of sequences that have `context` tokens at first: milliseconds, and times of kernels.

    With several GPUs the kernels run in other processes, and their times are 0.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile
    from vllm import SamplingParams

    core = engine.llm_engine
    wanted = WARM_UP + steps + PROFILED
    parameters = SamplingParams(max_tokens=wanted + 8, temperature=0.0, ignore_eos=True, detokenize=False)
    prompts: list[Any] = [
        {"prompt_token_ids": [(7 * i + j) % (VOCABULARY - 10) + 3 for j in range(context)]} for i in range(batch)
    ]
    begin = time.monotonic()
    one = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
    engine.generate(prompts, one, use_tqdm=False)
    prefill = time.monotonic() - begin

    # Their prefixes are cached now, so that all of them begin to decode at the same time.
    for i, prompt in enumerate(prompts):
        core.add_request(f"{batch}x{context}-{i}", prompt, parameters)
    begun: set[str] = set()
    while len(begun) < batch:
        begun |= {output.request_id for output in core.step() if output.outputs[0].token_ids}
    torch.cuda.synchronize()
    times = []
    for _ in range(WARM_UP + steps):
        begin = time.perf_counter()
        core.step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            core.step()
        torch.cuda.synchronize()
    kernels = {
        event.key: event.self_device_time_total / PROFILED
        for event in profiler.key_averages()
        if event.self_device_time_total > 0
    }
    core.abort_request([f"{batch}x{context}-{i}" for i in range(batch)])
    while core.has_unfinished_requests():
        core.step()
    return {
        "batch": batch,
        "context": context,
        "prefill_s": prefill,
        "step_ms": statistics.median(times[WARM_UP:]),
        "fastest_step_ms": min(times[WARM_UP:]),
        "kernels_us": sum(kernels.values()),
        **{f"{kind} us": us for kind, us in by_kind(kernels).items()},
        "longest": dict(sorted(kernels.items(), key=lambda item: -item[1])[:12]),
    }


def by_kind(kernels: dict[str, float]) -> dict[str, float]:
    """The times of `KINDS`."""
    result = dict.fromkeys(KINDS, 0.0)
    for name, us in kernels.items():
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), None)
        if kind is not None:
            result[kind] += us
    return result


def table(report: dict[str, Any]) -> str:
    """Of all steps, as Markdown."""
    columns = ["step_ms", "kernels_us", *(f"{kind} us" for kind in KINDS)]
    lines = [
        "| setting | batch x context | " + " | ".join(columns) + " |",
        "| --- | --- |" + " --- |" * len(columns),
    ]
    for name, result in report["results"].items():
        for step in result.get("steps", []):
            numbers = " | ".join(f"{step[column]:.3g}" for column in columns)
            lines.append(f"| {name} | {step['batch']} x {step['context']} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
