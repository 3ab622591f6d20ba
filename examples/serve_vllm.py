"""Text from a model in vLLM, whose attention reads the FP8 cache with this library.

python examples/serve_vllm.py MODEL "The capital of France is"

MODEL is best a checkpoint with a scale per head, as `fp8kv calibrate MODEL -o OUT --strategy attn_head` writes.
Needs a GPU, and vLLM 0.26 or newer with fp8kv in its environment. As a server:

vllm serve MODEL --kv-cache-dtype fp8 --attention-backend CUSTOM
"""

import argparse

from vllm import LLM, SamplingParams

from fp8kv.vllm.versions import BACKEND_NAME  # "CUSTOM", or "FP8KV" from vLLM 0.33 on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory or an id")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()

    # vLLM loads the plug-in by itself. The two arguments about the cache are all that differs from 16 bits.
    engine = LLM(options.model, kv_cache_dtype="fp8", attention_backend=BACKEND_NAME)
    for result in engine.generate(options.prompts, SamplingParams(temperature=0.0, max_tokens=options.max_tokens)):
        print(f"{result.prompt}{result.outputs[0].text}")


if __name__ == "__main__":  # vLLM may start processes that import this file
    main()
