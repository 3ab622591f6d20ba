"""Scales for the FP8 cache of a language model, in a checkpoint, and what each kind of cache costs the model.

    python examples/calibrate_evaluate.py MODEL TEXT OUT

MODEL is a directory with a causal language model of Transformers, TEXT a file with text such as the model
will read, OUT the directory that becomes a copy of MODEL with scales. Needs `pip install 'fp8kv[all]'`. The
commands `fp8kv calibrate` and `fp8kv eval` do the same, with more options.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fp8kv
from fp8kv import evaluation
from fp8kv.calibration import text_batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--window", type=int, default=1024, help="tokens that are read together")
    parser.add_argument("--windows", type=int, default=4, help="windows to calibrate on, and to evaluate on")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(device).eval()
    text = args.text.read_text(encoding="utf-8")

    # One scale per KV head, from windows spread over the text; written next to the weights.
    batches = text_batches(tokenizer, text, num_samples=args.windows, seq_len=args.window)
    scales = fp8kv.calibrate(model, batches, strategy="attn_head", progress=True)
    scales.save(args.out, source=args.model)

    # What an engine does when it starts: read the scales, and refuse those that can't be right.
    loaded = fp8kv.load_kv_scales(args.out)

    # The same windows with each cache; all are compared with the first.
    windows = evaluation.windows_of(tokenizer, text, args.windows, args.window)
    names = ["16-bit", "e4m3 scale 1.0", "calibrated", "e4m3 per token-head"]
    caches = evaluation.caches(model.config, names, {"calibrated": loaded})
    print(f"{'cache':20} {'perplexity':>10} {'KL to 16-bit':>12} {'same top token':>14} {'MiB':>8}")
    for row in evaluation.evaluate(model, windows, caches):
        mib = row.nbytes / 2**20
        print(f"{row.cache:20} {row.perplexity:10.3f} {row.kl:12.4f} {row.agreement:14.1%} {mib:8.3f}")


if __name__ == "__main__":
    main()
