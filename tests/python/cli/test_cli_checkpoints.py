"""`fp8kv inspect` and `fp8kv calibrate`, as a user calls them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import checkpoint_files as files
from command_line import PNG, invoke
from fp8kv import KVCacheScheme, Problem
from fp8kv.evaluation import inspection

LAYERS = files.SIZES["num_hidden_layers"]
RED, PINK, GRAY = (214, 39, 40), (255, 95, 210), (207, 216, 227)


def attention(layer: int) -> str:
    return files.ATTENTION.format(layer=layer)


def parse_strictly(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    parsed: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return parsed


def colors(picture: Path) -> set[tuple[int, ...]]:
    from matplotlib import image

    red, green, blue = torch.from_numpy(image.imread(picture)).mul(255).round().int().unbind(-1)[:3]
    numbers = (red << 16 | green << 8 | blue).unique().tolist()
    return {(number >> 16, number >> 8 & 255, number & 255) for number in numbers}


# inspect: contents


@pytest.mark.parametrize("query", [False, True], ids=["kv", "qkv"])
@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_inspect_is_content_with_a_healthy_checkpoint(strategy: str, query: bool, tmp_path: Path) -> None:
    output = invoke("inspect", files.make_checkpoint(tmp_path / "m", strategy, query=query, shards=2))
    assert "no problems" in output
    assert strategy in output
    assert "static_minmax" in output
    assert "compressed-tensors" in output


@pytest.mark.parametrize("name", ["k", "v", "q"])
def test_the_table_has_smallest_and_largest_scale_of_a_layer(name: str, tmp_path: Path) -> None:
    output = invoke("inspect", files.make_checkpoint(tmp_path / "m", query=True))
    for layer in range(LAYERS):
        scale = files.scales(query=True)[f"{attention(layer)}.{name}_scale"].float()
        assert f"{scale.min().item():.3g} - {scale.max().item():.3g}" in output


def test_the_table_has_the_value_per_tensor(tmp_path: Path) -> None:
    output = invoke("inspect", files.make_checkpoint(tmp_path / "m", "tensor"))
    for scale in files.scales("tensor").values():
        assert f"{scale.item():.3g}" in output


def test_the_table_counts_heads(tmp_path: Path) -> None:
    assert "│ 4, q 8 │" in invoke("inspect", files.make_checkpoint(tmp_path / "m", query=True))


def test_json_has_scheme_and_every_scale(tmp_path: Path) -> None:
    target = tmp_path / "scales.json"
    invoke("inspect", files.make_checkpoint(tmp_path / "m", query=True), "--json", target)
    found = parse_strictly(target.read_text())
    assert found["ok"] is True
    assert found["problems"] == []
    assert found["scheme"] == {
        "strategy": "attn_head",
        "quantizes_query": True,
        "observer": "static_minmax",
        "producer": "compressed-tensors",
    }
    expected = files.scales(query=True)
    assert [row["layer"] for row in found["layers"]] == list(range(LAYERS))
    for row in found["layers"]:
        for name in "qkv":
            scale = expected[f"{attention(row['layer'])}.{name}_scale"]
            assert row[name] == scale.float().flatten().tolist()


def test_json_to_stdout_is_alone_there(tmp_path: Path) -> None:
    folder = files.make_checkpoint(tmp_path / "m")
    result = subprocess.run(
        [sys.executable, "-m", "fp8kv", "inspect", str(folder), "--json", "-"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert parse_strictly(result.stdout)["layers"][0]["q"] is None


def test_a_healthy_picture_has_none_of_the_special_colors(tmp_path: Path) -> None:
    picture = tmp_path / "scales.png"
    invoke("inspect", files.make_checkpoint(tmp_path / "m", query=True), "--plot", picture)
    assert not colors(picture) & {RED, PINK, GRAY}


@pytest.mark.parametrize(("layers", "heads"), [(80, 8), (2, 1), (1, 128)], ids=lambda count: str(count))
def test_pictures_of_any_size_stay_readable(layers: int, heads: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(layers, heads, generator=generator).add(0.01).tolist()
    rows = [inspection.LayerRow(layer, None, scale, scale) for layer, scale in enumerate(scales)]
    found = inspection.Inspection("m", KVCacheScheme("attn_head"), rows, [])
    inspection.plot(found, tmp_path / "scales.png")
    from matplotlib import image

    height, width, _ = image.imread(tmp_path / "scales.png").shape
    assert height >= 10 * layers
    assert width >= 2 * 5 * heads
    assert max(height, width) < 4000


# inspect: problems


def spoil(name: str, value: float, head: int = 1, layer: int = 1) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{attention(layer)}.{name}_scale"][head] = value

    return change


def drop(*names: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in names:
            del tensors[f"{attention(1)}.{name}_scale"]

    return change


def set_tensor(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{attention(1)}.{name}"] = tensor

    return change


DEFECTS = {
    "nan": (spoil("k", math.nan), ["Layer 1", "nan"]),
    "infinite": (spoil("v", math.inf), ["Layer 1", "inf"]),
    "zero": (spoil("k", 0.0), ["Layer 1", "0"]),
    "negative": (spoil("v", -0.25), ["Layer 1", "-0.25"]),
    "implausible": (spoil("k", 2.0**20), ["Layer 1", "1.05e+06"]),
    "no scales": (drop("k", "v"), ["Layer 1", "missing"]),
    "no k": (drop("k"), ["Layer 1", "missing"]),
    "head count": (set_tensor("k_scale", torch.full((3, 1, 1), 0.05)), ["Layer 1", "3"]),
    "zero point": (set_tensor("k_zero_point", torch.full((4, 1, 1), 2.0)), ["k_zero_point"]),
    "garbage in q": (spoil("q", 1e34), ["Layer 1", "1e+34", "query"]),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_inspect_shows_a_defect_with_its_remedy_and_exits_with_1(defect: str, tmp_path: Path) -> None:
    change, words = DEFECTS[defect]
    query = defect == "garbage in q"
    tensors = files.scales(query=query)
    change(tensors)
    folder = files.write_checkpoint(tmp_path / "m", tensors, files.config(query=query))
    output = invoke("inspect", folder, status=1)
    assert "error" in output
    assert "remedy: " in output
    assert "must not be used" in output
    for word in words:
        assert word in output


@pytest.mark.parametrize("defect", DEFECTS)
def test_json_has_a_defect_with_its_remedy(defect: str, tmp_path: Path) -> None:
    query = defect == "garbage in q"
    tensors = files.scales(query=query)
    DEFECTS[defect][0](tensors)
    folder = files.write_checkpoint(tmp_path / "m", tensors, files.config(query=query))
    target = tmp_path / "scales.json"
    invoke("inspect", folder, "--json", target, status=1)
    found = parse_strictly(target.read_text())
    assert found["ok"] is False
    errors = [problem for problem in found["problems"] if problem["severity"] == "error"]
    assert {problem["layer"] for problem in errors} == {1}
    assert all(problem["remedy"] for problem in errors)


@pytest.mark.parametrize(
    ("value", "written"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (-2.0, -2.0)], ids=str
)
def test_json_has_bad_values_as_they_are(value: float, written: object, tmp_path: Path) -> None:
    tensors = files.scales()
    spoil("k", value, head=2)(tensors)
    folder = files.write_checkpoint(tmp_path / "m", tensors, files.config())
    target = tmp_path / "scales.json"
    invoke("inspect", folder, "--json", target, status=1)
    assert parse_strictly(target.read_text())["layers"][1]["k"][2] == written


def test_json_has_null_for_a_missing_scale(tmp_path: Path) -> None:
    tensors = files.scales()
    drop("v")(tensors)
    folder = files.write_checkpoint(tmp_path / "m", tensors, files.config())
    target = tmp_path / "scales.json"
    invoke("inspect", folder, "--json", target, status=1)
    row = parse_strictly(target.read_text())["layers"][1]
    assert row["v"] is None
    assert len(row["k"]) == 4


@pytest.mark.parametrize(
    ("defect", "color"),
    [
        ("nan", RED),
        ("negative", RED),
        ("implausible", PINK),
        ("no k", GRAY),
    ],
)
def test_the_picture_shows_bad_values_in_a_color_of_their_own(defect: str, color: tuple[int, int, int], tmp_path: Path) -> None:
    tensors = files.scales()
    DEFECTS[defect][0](tensors)
    folder = files.write_checkpoint(tmp_path / "m", tensors, files.config())
    invoke("inspect", folder, "--plot", tmp_path / "scales.png", status=1)
    assert colors(tmp_path / "scales.png") & {RED, PINK, GRAY} == {color}


def test_the_table_is_whole_on_a_narrow_terminal() -> None:
    from rich.console import Console

    numbers = [0.000123, 0.000456]
    found = inspection.Inspection("m", None, [inspection.LayerRow(10, numbers, numbers, numbers)], [])
    console = Console(width=60)
    with console.capture() as capture:
        console.print(inspection.table(found))
    assert "…" not in capture.get()
    assert capture.get().count("0.000456") == 3


def test_a_defect_of_all_layers_is_said_once(tmp_path: Path) -> None:
    tensors = files.scales(query=True)
    for layer in range(LAYERS):
        spoil("q", math.nan, layer=layer)(tensors)
    folder = files.write_checkpoint(tmp_path / "m", tensors, files.config(query=True))
    output = invoke("inspect", folder, status=1)
    assert output.count("remedy: ") == 1
    assert "3 times, in layers 0-2" in output


def test_layers_of_a_group_are_ranges() -> None:
    problems = [Problem("x", "error", f"layer {n}", "none", n) for n in (7, 0, 1, 2, 9, 10)]
    lines = [str(getattr(line, "plain", "")) for line in inspection.problem_lines(problems)]
    assert lines[0] == "error x: 6 times, in layers 0-2, 7, 9-10. The first: layer 7"


def test_brackets_in_names_are_no_markup() -> None:
    row = inspection.LayerRow(0, None, [0.1], [0.1])
    found = inspection.Inspection("m[red]", None, [row], [Problem("x", "error", "in m[/bold]", "[/b]", 0)])
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        for part in inspection.report(found):
            console.print(part)
    for text in ("m[red]", "in m[/bold]", "[/b]"):
        assert text in capture.get()


def test_a_warning_is_shown_and_does_not_change_the_exit_status(tmp_path: Path) -> None:
    scheme = files.scheme(observer="memoryless_minmax")
    config = files.config(kv_cache_scheme=scheme)
    output = invoke("inspect", files.write_checkpoint(tmp_path / "m", files.scales(), config))
    assert "memoryless_minmax" in output
    assert "warning" in output
    assert "remedy: " in output
    assert "can be used" in output


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "4 bytes", "100 bytes", "last byte missing"])
def test_a_truncated_file_is_a_problem_that_names_it(keep: int, tmp_path: Path) -> None:
    folder = files.make_checkpoint(tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    output = invoke("inspect", folder, status=1)
    assert "model.safetensors" in output
    assert "remedy: " in output


def test_a_missing_shard_is_a_problem_and_the_others_are_shown(tmp_path: Path) -> None:
    folder = files.make_checkpoint(tmp_path / "m", shards=3)
    lost = folder / "model-00002-of-00003.safetensors"
    there = [scale for path in folder.glob("*.safetensors") if path != lost for scale in load_file(path)]
    lost.unlink()
    target = tmp_path / "scales.json"
    assert lost.name in invoke("inspect", folder, status=1)
    invoke("inspect", folder, "--json", target, status=1)
    for row in parse_strictly(target.read_text())["layers"]:
        for name in "kv":
            assert (row[name] is not None) == (f"{attention(row['layer'])}.{name}_scale" in there)


def test_an_unsupported_scheme_is_a_problem(tmp_path: Path) -> None:
    config = files.config(kv_cache_scheme=files.scheme(num_bits=4))
    output = invoke("inspect", files.write_checkpoint(tmp_path / "m", files.scales(), config), status=1)
    assert "num_bits must be 8, got 4" in output


def test_a_config_that_is_no_json_is_a_problem(tmp_path: Path) -> None:
    folder = files.make_checkpoint(tmp_path / "m")
    (folder / "config.json").write_text("{")
    assert "config.json" in invoke("inspect", folder, status=1)


# inspect: usage


@pytest.mark.parametrize("what", ["missing", "a file", "an empty folder"])
def test_inspect_refuses_what_is_no_checkpoint(what: str, tmp_path: Path) -> None:
    path = tmp_path / "nothing"
    if what == "a file":
        path.write_text("x")
    elif what == "an empty folder":
        path.mkdir()
    assert "nothing" in invoke("inspect", path, status=2)


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_inspect_refuses_a_target_in_a_folder_that_is_not_there(option: str, tmp_path: Path) -> None:
    target = tmp_path / "no" / "such"
    output = invoke("inspect", files.make_checkpoint(tmp_path / "m"), option, target, status=2)
    assert f"{option} must be a file in a directory that exists, got {target}" in output


# calibrate

WORDS = [a + b for a in ("ba", "do", "ke", "li", "mu", "no", "ra", "si") for b in ("n", "r", "s", "t")]
NUM_SAMPLES, SEQ_LEN = 6, 16
#: Exactly the number in the windows, so that their positions do not matter. 0 is the unknown word.
TOKENS = torch.randint(1, len(WORDS) + 1, (NUM_SAMPLES, SEQ_LEN), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights, whose tokens are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 1, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *WORDS])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(" ".join(WORDS[token - 1] for token in TOKENS.flatten().tolist()))
    return path


@pytest.fixture(scope="module")
def calibrated(model_folder: Path, text_file: Path) -> Path:
    """Calibrated in one process, per head and with query scales."""
    out = model_folder.parent / "calibrated"
    invoke(*arguments(model_folder, out, text_file, "--strategy", "attn_head", "--query"))
    return out


def arguments(model: Path, out: Path, text: Path, *more: str | Path) -> list[str | Path]:
    """The last of repeated options counts."""
    return [
        "calibrate", model, "-o", out, "--text", text, "--num-samples", str(NUM_SAMPLES),
        "--seq-len", str(SEQ_LEN), "--batch-size", "2", "--device", "cpu", *more,
    ]  # fmt: skip


def scales_of(checkpoint: Path) -> dict[str, Tensor]:
    return {name: x for name, x in load_file(checkpoint / "model.safetensors").items() if "_scale" in name}


def assert_same_scales(actual: Path, expected: Path) -> None:
    a, e = scales_of(actual), scales_of(expected)
    assert a.keys() == e.keys()
    assert e
    for name in e:
        assert torch.equal(a[name], e[name]), name


def assert_rounded_up(stored: Tensor, exact: Tensor) -> None:
    below = (stored.view(torch.int16) - 1).view(torch.bfloat16)
    assert (stored.float() >= exact).all()
    assert (below.float() < exact).all()


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_calibrate_writes_the_scales_of_what_a_cache_holds(
    strategy: str, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    invoke(*arguments(model_folder, tmp_path / "out", text_file, "--strategy", strategy))
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        cache = model(TOKENS, use_cache=True).past_key_values
    found = scales_of(tmp_path / "out")
    assert len(found) == 4
    for layer in range(2):
        for name, states in (("k", cache.layers[layer].keys), ("v", cache.layers[layer].values)):
            amax = states.float().abs().amax((0, 2, 3))
            amax, shape = (amax.amax(0, True), (1,)) if strategy == "tensor" else (amax, (2, 1, 1))
            stored = found[f"{attention(layer)}.{name}_scale"]
            assert stored.shape == shape
            assert_rounded_up(stored.flatten(), amax / 448)


@pytest.mark.parametrize(
    ("more", "formats"),
    [
        (["--kv-cache-dtype", "int8", "--strategy", "channel", "--headroom", "1.5"], {"int8 per channel"}),
        (["--offset", "mean"], {"fp8 per tensor, offset of K and V"}),
        (["--kv-cache-dtype", "auto"], None),
    ],
    ids=["int8", "offset", "auto"],
)
def test_calibrate_writes_other_formats_beside_what_every_engine_reads(
    more: list[str], formats: set[str] | None, model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    output = invoke(*arguments(model_folder, tmp_path / "out", text_file, *more))
    rows = inspection.inspect_checkpoint(tmp_path / "out").layers
    if formats is None:
        assert all(row.error is not None and 0 < row.error < 1 for row in rows)
    else:
        assert {row.format for row in rows} == formats
    assert "in fp8kv" in output
    assert "no problems" in output
    assert len(scales_of(tmp_path / "out")) == 4


def test_calibrate_copies_the_model(calibrated: Path, model_folder: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder, calibrated))
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name
    for name in ("tokenizer.json", "generation_config.json"):
        assert (calibrated / name).read_bytes() == (model_folder / name).read_bytes()


def test_calibrate_shows_the_table_and_what_to_do_next(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "out", tmp_path / "scales.png"
    output = invoke(*arguments(model_folder, out, text_file, "--plot", picture))
    for scale in scales_of(out).values():
        assert f"{scale.item():.3g}" in output
    assert "no problems" in output
    assert f"fp8kv inspect {out}" in output
    assert f"vllm serve {out} --kv-cache-dtype fp8" in output
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.parametrize("observer", ["static_minmax", "percentile", "mse"])
def test_what_calibrate_wrote_says_how(observer: str, model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    invoke(*arguments(model_folder, tmp_path / "out", text_file, "--observer", observer, "--query"))
    target = tmp_path / "found.json"
    invoke("inspect", tmp_path / "out", "--json", target)
    assert parse_strictly(target.read_text())["scheme"] == {
        "strategy": "tensor",
        "quantizes_query": True,
        "observer": observer,
        "producer": "compressed-tensors",
    }


def test_calibrate_says_how_many_windows_a_short_text_gives(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    output = invoke(*arguments(model_folder, tmp_path / "out", text_file, "--num-samples", "1000"))
    assert "6 windows of 16 tokens" in output


def test_a_low_percentile_gives_smaller_scales(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    for percentile in ("50", "100"):
        out = tmp_path / percentile
        observer = ("--observer", "percentile", "--percentile", percentile)
        invoke(*arguments(model_folder, out, text_file, *observer))
    low, high = scales_of(tmp_path / "50"), scales_of(tmp_path / "100")
    assert all(low[name] < 0.5 * high[name] for name in high)


def test_calibrate_takes_the_text_of_cpython_by_default(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = ("--num-samples", "2", "--seq-len", "8")
    invoke("calibrate", model_folder, "-o", out, *sizes, "--device", "cpu")
    assert len(scales_of(out)) == 4


@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_scales_that_the_model_has_already_are_replaced_and_have_no_influence(
    value: float, calibrated: Path, text_file: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(calibrated, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_scale"):
            tensor.fill_(value)
    files.write_checkpoint(broken, tensors)
    out = tmp_path / "out"
    invoke(*arguments(broken, out, text_file, "--strategy", "attn_head", "--query"))
    assert_same_scales(out, calibrated)


def test_calibrate_replaces_a_checkpoint_when_told_so(
    model_folder: Path, text_file: Path, calibrated: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(calibrated, tmp_path / "out")
    (out / "more.txt").write_text("x")
    invoke(*arguments(model_folder, out, text_file, "--overwrite"))
    assert len(scales_of(out)) == 4
    assert not (out / "more.txt").exists()


def test_calibrate_can_write_over_the_model(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    model = shutil.copytree(model_folder, tmp_path / "model")
    invoke(*arguments(model, model, text_file, "--overwrite"))
    assert len(scales_of(model)) == 4


# calibrate: usage and failures


USAGE = {
    "strategy": (["--strategy", "row"], "--strategy must be tensor, attn_head or channel, got 'row'"),
    "format": (["--kv-cache-dtype", "fp4"],
               "--kv-cache-dtype must be fp8, fp8_e4m3, fp8_e5m2, int8 or auto, got 'fp4'"),
    "offset": (["--offset", "max"], "--offset must be none, mean or mid, got 'max'"),
    "headroom": (["--headroom", "0"], "headroom must be finite and above 0, got 0.0"),
    "auto": (["--kv-cache-dtype", "auto", "--offset", "mid"], 'offset must be "none" with dtype "auto"'),
    "two ways": (["--strategy", "channel", "--observer", "mse"], 'observer must be "static_minmax" with'),
    "observer": (["--observer", "max"], "--observer must be static_minmax, percentile or mse, got 'max'"),
    "dtype": (["--dtype", "int8"], "--dtype must be auto, bfloat16, float16 or float32, got 'int8'"),
    "device": (["--device", "abacus"], '--device must be "auto", "cpu", "cuda" or "cuda:N", got \'abacus\''),
    "another device": (["--device", "meta"], '"cuda" or "cuda:N", got \'meta\''),
    "number of a CPU": (["--device", "cpu:0"], '"cuda" or "cuda:N", got \'cpu:0\''),
    "no number": (["--device", "cuda:"], '"cuda" or "cuda:N", got \'cuda:\''),
    "GPU": (["--device", "cuda:99"], "--device=cuda:99 needs 100 GPUs, PyTorch finds"),
    "device map": (["--device-map", "auto"], "--device-map places the model itself and excludes --device"),
    "samples": (["--num-samples", "0"], "--num-samples must be at least 1, got 0"),
    "length": (["--seq-len", "-1"], "--seq-len must be at least 1, got -1"),
    "long": (["--seq-len", "65"], "--seq-len must be at most 64, the max_position_embeddings of the model"),
    "batch": (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    "percentile 0": (["--percentile", "0"], "--percentile must be in (0, 100], got 0.0"),
    "percentile 101": (["--percentile", "101"], "--percentile must be in (0, 100], got 101.0"),
    "percentile nan": (["--percentile", "nan"], "--percentile must be in (0, 100], got nan"),
    "text": (["--text", "no/such.txt"], "--text must be a file, got no/such.txt"),
    "short text": (["--seq-len", "64", "--text", "{short}"], "--text must have --seq-len=64 tokens, got 3"),
    "no text": (["--text", "{empty}"], "text must have at least one token"),
    "picture": (["--plot", "no/such.png"], "--plot must be a file in a directory that exists"),
}  # fmt: skip


@pytest.mark.parametrize("case", USAGE)
def test_calibrate_refuses_arguments_before_anything_is_loaded(
    case: str, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def load(*args: object, **kwargs: object) -> None:
        pytest.fail("the model is loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    texts = {"short": tmp_path / "short.txt", "empty": tmp_path / "empty.txt"}
    texts["short"].write_text("ban don ken")
    texts["empty"].write_text("")
    more, sentence = USAGE[case]
    more = [argument.format(**texts) for argument in more]
    output = invoke(*arguments(model_folder, tmp_path / "out", text_file, *more), status=2)
    assert output.startswith("error: ")
    assert sentence in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--device", "auto"], "--device=auto needs 2 GPUs, PyTorch finds 1"),
        (["--device", "cuda"], "--device=cuda needs 2 GPUs, PyTorch finds 1"),
        (["--device", "cuda:0"], "--device must be without a number under torchrun, got 'cuda:0'"),
        (["--device", "auto", "--device-map", "auto"], "--device-map spreads a model over all GPUs"),
    ],
    ids=["auto", "cuda", "cuda:0", "device map"],
)
def test_calibrate_refuses_devices_that_processes_cannot_share(
    more: list[str], sentence: str, model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    output = invoke(*arguments(model_folder, Path("out"), text_file, *more), status=2)
    assert sentence in output


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["", "--overwrite"])
def test_calibrate_leaves_a_folder_alone_that_is_no_checkpoint(
    overwrite: tuple[str, ...], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "letter.txt").write_text("dear reader")
    output = invoke(*arguments(model_folder, tmp_path, text_file, *overwrite), status=2)
    assert f"got {tmp_path}" in output
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_calibrate_leaves_a_checkpoint_alone_without_overwrite(
    model_folder: Path, text_file: Path, calibrated: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(calibrated, tmp_path / "out")
    output = invoke(*arguments(model_folder, out, text_file), status=2)
    assert "--output must be a new or an empty directory without --overwrite" in output
    assert_same_scales(out, calibrated)


@pytest.mark.parametrize("where", ["inside", "a file", "below a file"])
def test_calibrate_refuses_an_output_that_cannot_be(where: str, model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    out = {
        "inside": model_folder / "out",
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "x",
    }
    assert "--output must " in invoke(*arguments(model_folder, out[where], text_file), status=2)
    assert (tmp_path / "file").read_text() == "x"
    assert not (model_folder / "out").exists()


def test_calibrate_refuses_a_folder_without_config(text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    output = invoke(*arguments(tmp_path / "m", tmp_path / "out", text_file), status=2)
    assert f"MODEL must have a config.json, got {tmp_path / 'm'}" in output


def test_calibrate_refuses_a_model_that_is_not_there(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fetch(name: str) -> str:
        raise OSError(f"nobody has {name}\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    output = invoke(*arguments(Path("no/model"), tmp_path / "out", text_file), status=2)
    expected = "MODEL must be a directory or the id of a model that can be fetched, got 'no/model'"
    assert output == f"error: {expected}: nobody has no/model"


def test_calibrate_takes_an_id(model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", {"some/model": str(model_folder)}.get)
    invoke(*arguments(Path("some/model"), tmp_path / "out", text_file))
    assert len(scales_of(tmp_path / "out")) == 4


def test_calibrate_says_what_to_install(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    output = invoke(*arguments(model_folder, tmp_path / "out", text_file), status=1)
    assert output == "error: transformers is not installed; this installs it: pip install 'fp8kv[transformers]'"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("model.safetensors", "no checkpoint can be made from"),
        ("tokenizer.json", "the tokenizer of"),
        ("config.json", "no checkpoint can be made from"),
    ],
)
def test_a_damaged_model_is_one_sentence(name: str, sentence: str, model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    (broken / name).write_text("{")
    output = invoke(*arguments(broken, tmp_path / "out", text_file), status=1)
    assert output.startswith("error: ")
    assert sentence in output
    assert not (tmp_path / "out").exists()


def test_an_unknown_type_of_model_is_one_sentence(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    strange = shutil.copytree(model_folder, tmp_path / "strange")
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps(config | {"model_type": "abacus"}))
    output = invoke(*arguments(strange, tmp_path / "out", text_file), status=1)
    assert output.startswith("error: ")
    assert "abacus" in output


# calibrate: many processes


#: PyTorch asks for the names of addresses; without a network, each question waits for its time limit.
RESOLVER = {"RES_OPTIONS": "timeout:1 attempts:1"}
ONE_THREAD = {**os.environ, **RESOLVER, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
#: `python -m fp8kv`, which at the end also writes how many threads it has, of Python or not, to a file.
COUNTING = """
import atexit, os, pathlib
from fp8kv.cli import main

report = pathlib.Path(__file__).with_name("threads_of_" + os.environ.get("RANK", "one"))
atexit.register(lambda: report.write_text(str(len(os.listdir("/proc/self/task")))))
main()
"""


def test_two_processes_give_the_scales_of_one(calibrated: Path, model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    script = tmp_path / "counting.py"
    script.write_text(COUNTING)
    command = arguments(model_folder, tmp_path / "out", text_file, "--strategy", "attn_head", "--query")
    # Machines need not be able to resolve their own names.
    alone = ("--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")
    for launcher in ((), ("-m", "torch.distributed.run", *alone)):
        result = subprocess.run(
            [sys.executable, *map(str, (*launcher, script, *command))],
            capture_output=True, text=True, timeout=120, env=ONE_THREAD | {"CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert_same_scales(tmp_path / "out", calibrated)
        assert result.stdout.count("no problems") == 1
        shutil.rmtree(tmp_path / "out")
    # A thread of gloo that outlives its process group can abort the process. CUDA and allocators have threads of their own.
    one, *both = (int((tmp_path / f"threads_of_{rank}").read_text()) for rank in ("one", 0, 1))
    assert both == [one, one]


def test_what_fails_in_one_process_ends_all_and_the_first_says_why(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank, seq_len in (("0", "8"), ("1", "65")):
        command = arguments(model_folder, tmp_path / "out", text_file, "--seq-len", seq_len)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment = {**ONE_THREAD, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "fp8kv", *map(str, command)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            )
        )  # fmt: skip
    first, second = (process.communicate(timeout=120) for process in processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert "error: --seq-len must be at most 64" in first[1]
    assert "error" not in second[0] + second[1]
    assert not (tmp_path / "out").exists()


# inspect: models, files and findings of other producers


def test_inspect_shows_the_model_that_is_asked_for(tmp_path: Path) -> None:
    talker = {f"talker.model.layers.0.self_attn.{x}_scale": torch.tensor([0.75]) for x in "kv"}
    folder = files.write_checkpoint(tmp_path, files.scales("tensor") | talker, files.config("tensor"))
    assert "0.75" not in invoke("inspect", folder)
    assert "0.75" in invoke("inspect", folder, "--model", "talker")
    assert "model must be" in invoke("inspect", folder, "--model", "x", status=2)


def test_inspect_shows_scales_of_1_that_no_tensor_has(tmp_path: Path) -> None:
    modelopt = {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}
    folder = files.write_checkpoint(tmp_path, files.weights(), files.SIZES | {"quantization_config": modelopt})
    found = inspection.inspect_checkpoint(folder)
    assert [(row.k, row.v) for row in found.layers] == [([1.0], [1.0])] * LAYERS
    assert "unit-scales" in invoke("inspect", folder)


def test_inspect_names_what_it_does_not_understand(tmp_path: Path) -> None:
    tensors = {f"{attention(n)}.{x}_scale_inv": torch.ones(1) for n in range(LAYERS) for x in "kv"}
    folder = files.write_checkpoint(tmp_path, tensors, files.config("tensor"))
    output = invoke("inspect", folder, status=1)
    assert "unknown-scale" in output
    assert "missing" in output


def test_inspect_reads_a_json_file_of_scales(tmp_path: Path) -> None:
    file = tmp_path / "scales.json"
    file.write_text(json.dumps({"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {"0": 0.75}}}}))
    assert "0.75" in invoke("inspect", file)
