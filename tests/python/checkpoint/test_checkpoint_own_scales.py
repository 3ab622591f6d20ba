"""The subfolder `fp8kv` of a checkpoint: what is written, read, checked and left to other engines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoint_files as files
import fp8kv
from checkpoint_files import SIZES, make_checkpoint, weights, write_checkpoint
from fp8kv import CheckpointError, KVCacheScheme, KVScales, LayerScales
from fp8kv.evaluation import inspection

LAYERS, HEADS, SIZE = (SIZES[n] for n in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
NAMES = ("k", "v", "k_offset", "v_offset")
STEM = "model.layers.{}.self_attn.{}"


def random(*shape: int, seed: int = 0) -> Tensor:
    return 0.02 + 0.06 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def own_scales(query: bool = False, **options: Any) -> KVScales:
    """A layer of each kind: INT8 per channel; E4M3 per head with offsets; E5M2 per tensor with one of K."""
    channels, shift = random(HEADS, SIZE), random(HEADS, SIZE, seed=1) - 0.05
    q = random(HEADS, seed=2) if query else None
    layers = {
        0: LayerScales(q, channels, 2 * channels, dtype="int8"),
        1: LayerScales(q, random(HEADS), random(HEADS, seed=3), shift, -shift),
        2: LayerScales(q, torch.tensor([2.0**-10]), torch.tensor([2.0**-11]), k_offset=shift, dtype="fp8_e5m2"),
    }
    return KVScales(layers, KVCacheScheme("auto", query, "static_minmax"), errors={0: 0.01, 1: 0.25}, **options)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = files.config()
    del config["quantization_config"]
    return write_checkpoint(tmp_path / "source", weights(), config)


@pytest.fixture
def saved(source: Path, tmp_path: Path) -> Path:
    own_scales().save(tmp_path / "saved", source)
    return tmp_path / "saved"


def assert_same(actual: KVScales, expected: KVScales) -> None:
    assert actual.keys() == expected.keys()
    for index, layer in expected.items():
        assert actual[index].dtype == layer.dtype
        for name in NAMES:
            a, e = getattr(actual[index], name), getattr(layer, name)
            assert (a is None) == (e is None), (index, name)
            assert a is None or torch.equal(a, e), (index, name)


# What is written


def test_the_files(saved: Path) -> None:
    tensors = load_file(saved / "fp8kv" / "scales.safetensors")
    expected = own_scales()
    assert {name: list(x.shape) for name, x in tensors.items()} == {
        STEM.format(0, "k_scale"): [HEADS, SIZE], STEM.format(0, "v_scale"): [HEADS, SIZE],
        STEM.format(1, "k_scale"): [HEADS], STEM.format(1, "v_scale"): [HEADS],
        STEM.format(1, "k_offset"): [HEADS, SIZE], STEM.format(1, "v_offset"): [HEADS, SIZE],
        STEM.format(2, "k_scale"): [1], STEM.format(2, "v_scale"): [1],
        STEM.format(2, "k_offset"): [HEADS, SIZE],
    }  # fmt: skip
    assert {x.dtype for x in tensors.values()} == {torch.float32}
    assert torch.equal(tensors[STEM.format(1, "k_offset")], expected[1].k_offset)
    content = json.loads((saved / "fp8kv" / "scales.json").read_text())
    assert (content["version"], content["strategy"]) == (1, "auto")
    assert content["layers"]["0"] == {
        "dtype": "int8", "strategy": "channel", "error": 0.01,
        "tensors": [STEM.format(0, "k_scale"), STEM.format(0, "v_scale")],
    }  # fmt: skip
    assert [content["layers"][n]["strategy"] for n in "012"] == ["channel", "attn_head", "tensor"]
    assert "error" not in content["layers"]["2"]


def of_heads(x: Tensor) -> Tensor:
    return x.amax(1).view(HEADS, 1, 1)


def test_other_engines_get_fp8_scales_of_k_and_v_themselves(saved: Path) -> None:
    """Derived from above: as large as all that scale and offset can keep, rounded up to the model's bf16."""
    scheme = json.loads((saved / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (scheme["type"], scheme["num_bits"], scheme["strategy"]) == ("float", 8, "attn_head")
    own, tensors = own_scales(), load_file(saved / "model.safetensors")
    shift = own[1].k_offset
    assert shift is not None
    for layer, letter, bound in (
        (0, "k", own[0].k * 127),
        (0, "v", own[0].v * 127),
        (1, "k", own[1].k.view(-1, 1) * 448 + shift.abs()),
        (2, "k", 2.0**-10 * 57344 + shift.abs()),
        (2, "v", torch.full((HEADS, 1), 2.0**-11 * 57344)),
    ):  # fmt: skip
        stored = tensors[STEM.format(layer, f"{letter}_scale")]
        exact = of_heads(bound) / 448
        assert stored.dtype == torch.bfloat16
        assert (stored.float() >= exact * (1 - 1e-6)).all()
        assert (stored.float() <= exact * (1 + 2**-7)).all()


def test_scales_for_other_engines_that_are_known_are_written(source: Path, tmp_path: Path) -> None:
    standard = {n: LayerScales(None, random(HEADS, seed=n), random(HEADS, seed=n + 9)) for n in range(LAYERS)}
    own_scales(standard=standard).save(tmp_path / "saved", source)
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    for n, layer in standard.items():
        stored = tensors[STEM.format(n, "k_scale")].float().flatten()
        assert ((stored >= layer.k) & (stored <= layer.k * (1 + 2**-7))).all()


def test_fp8_with_offsets_per_tensor_stays_per_tensor(source: Path, tmp_path: Path) -> None:
    shift = random(HEADS, SIZE)
    layer = LayerScales(None, torch.tensor([0.5]), torch.tensor([0.25]), shift)
    KVScales(dict.fromkeys(range(LAYERS), layer), KVCacheScheme("tensor")).save(tmp_path / "saved", source)
    stored = load_file(tmp_path / "saved" / "model.safetensors")[STEM.format(0, "k_scale")]
    assert stored.shape == (1,)
    assert 0.5 + shift.abs().max() / 448 <= stored.float().item() <= 1.01 * (0.5 + shift.abs().max() / 448)
    loaded = fp8kv.load_kv_scales(tmp_path / "saved")
    assert loaded.scheme.strategy == "tensor"
    assert torch.equal(loaded[0].k_offset, shift)


def test_plain_scales_have_no_subfolder_and_remove_an_older_one(saved: Path) -> None:
    plain = {n: LayerScales(None, random(HEADS), random(HEADS)) for n in range(LAYERS)}
    KVScales(plain, KVCacheScheme("attn_head")).save(saved)
    assert not (saved / "fp8kv").exists()
    assert fp8kv.load_kv_scales(saved).scheme.strategy == "attn_head"


def test_an_older_subfolder_is_replaced_and_other_files_in_it_stay(saved: Path) -> None:
    (saved / "fp8kv" / "notes.txt").write_text("mine")
    changed = {n: LayerScales(None, 3 * random(HEADS, SIZE), random(HEADS)) for n in range(LAYERS)}
    KVScales(changed, KVCacheScheme("channel")).save(saved)
    assert_same(fp8kv.load_kv_scales(saved), KVScales(changed, KVCacheScheme("channel")))
    assert sorted(x.name for x in (saved / "fp8kv").iterdir()) == [
        "notes.txt",
        "scales.json",
        "scales.safetensors",
    ]


def test_a_copy_of_the_source_is_written_over(saved: Path, source: Path) -> None:
    own_scales().save(saved, source)
    assert_same(fp8kv.load_kv_scales(saved), own_scales())


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (LayerScales(None, random(2, SIZE), random(HEADS)),
         r"scales\[0\].k must have an element for each of the 4 KV heads of .*, got 2 \(of one tensor"),
        (LayerScales(None, torch.ones(1), torch.ones(1), random(2, SIZE)),
         r"scales\[0\].k.* must .* for .*the 4 KV heads of .*, got .*2.* \(of one tensor"),
        (LayerScales(None, random(HEADS), random(HEADS), torch.full((HEADS, SIZE), float("nan"))),
         r"scales\[0\].k must be finite and above 0, got nan"),
        (LayerScales(None, random(HEADS, SIZE), -random(HEADS, SIZE)),
         r"scales\[0\].v must be finite and above 0, got -"),
        (LayerScales(None, None, random(HEADS, SIZE)), r"scales\[0\].k must be a tensor, got None"),
    ],
    ids=["one rank", "offset of one rank", "NaN", "negative", "none"],
)  # fmt: skip
def test_what_cannot_be_saved_changes_nothing(saved: Path, layer: LayerScales, sentence: str) -> None:
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        KVScales(dict.fromkeys(range(LAYERS), layer), KVCacheScheme("channel")).save(saved)
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before


# What is read


@pytest.mark.parametrize("query", [False, True], ids=["", "query"])
def test_scales_survive_a_save_and_a_load(source: Path, tmp_path: Path, query: bool) -> None:
    own_scales(query).save(tmp_path / "saved", source)
    loaded = fp8kv.load_kv_scales(tmp_path / "saved")
    assert_same(loaded, own_scales(query))
    assert loaded.problems == []
    assert loaded.errors == {0: 0.01, 1: 0.25}
    assert loaded.scheme == KVCacheScheme("auto", query, "static_minmax")
    assert (loaded[0].q is not None) == query
    loaded.save(tmp_path / "again", source)
    for file in ("model.safetensors", "config.json", "fp8kv/scales.json", "fp8kv/scales.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()


def test_ranks_get_their_heads(saved: Path) -> None:
    whole = own_scales()
    ranks = [fp8kv.load_kv_scales(saved, tp_rank=rank, tp_size=2) for rank in range(2)]
    for index, name in ((0, "k"), (0, "v"), (1, "k"), (1, "k_offset"), (2, "k_offset")):
        parts = [getattr(rank[index], name) for rank in ranks]
        assert torch.equal(torch.cat(parts), getattr(whole[index], name))
    assert [rank[2].k.tolist() for rank in ranks] == [[2.0**-10]] * 2
    many = fp8kv.load_kv_scales(saved, tp_rank=3, tp_size=8)
    assert torch.equal(many[0].k, whole[0].k[1:2])
    with pytest.raises(ValueError, match="layer 0: tp_size must divide the 4 KV heads"):
        fp8kv.load_kv_scales(saved, tp_size=3)


def test_fnuz_doubles_scales_of_fp8_only(saved: Path) -> None:
    whole, doubled = own_scales(), fp8kv.load_kv_scales(saved, fnuz=True)
    assert torch.equal(doubled[0].k, whole[0].k)
    assert torch.equal(doubled[1].k, 2 * whole[1].k)
    assert torch.equal(doubled[2].v, 2 * whole[2].v)
    assert torch.equal(doubled[1].k_offset, whole[1].k_offset)


def test_one_file_has_the_scales_of_other_engines(saved: Path) -> None:
    loaded = fp8kv.load_kv_scales(saved / "model.safetensors")
    assert loaded.is_plain
    assert loaded[0].k.shape == (HEADS,)


def test_the_scheme_of_the_config_is_that_of_other_engines(saved: Path) -> None:
    assert KVCacheScheme.from_config(saved).strategy == "attn_head"
    for word in ("channel", "auto"):
        with pytest.raises(ValueError, match="strategy must be"):
            KVCacheScheme.from_config({"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": word}})


def test_the_summary(saved: Path) -> None:
    assert fp8kv.load_kv_scales(saved).summary().split("\n")[:5] == [
        "strategy auto, observer static_minmax, by compressed-tensors",
        "3 layers, 1 or 4 KV heads",
        "layer 0: int8 per channel, error 0.01",
        "layer 1: fp8 per head, offset of K and V, error 0.25",
        "layer 2: fp8_e5m2 per tensor, offset of K",
    ]


def test_the_inspection(saved: Path) -> None:
    rows = inspection.inspect_checkpoint(saved).as_dict()["layers"]
    assert [(row["format"], row["error"]) for row in rows] == [
        ("int8 per channel", 0.01), ("fp8 per head, offset of K and V", 0.25),
        ("fp8_e5m2 per tensor, offset of K", None),
    ]  # fmt: skip
    assert "format" not in inspection.inspect_checkpoint(saved / "model.safetensors").as_dict()["layers"][0]


# What doesn't fit


def recalibrated(folder: Path) -> None:
    """Somebody has other scales for the engines."""
    tensors = load_file(folder / "model.safetensors")
    tensors[STEM.format(1, "v_scale")] *= 1.5
    save_file(tensors, folder / "model.safetensors")


def test_scales_that_were_found_later_make_it_outdated(saved: Path) -> None:
    recalibrated(saved)
    problem, *_ = fp8kv.audit_checkpoint(saved)
    assert (problem.kind, problem.severity) == ("fp8kv-outdated", "error")
    assert problem.message == f"{saved / 'fp8kv'} must belong to the scales in the model's files, which have changed."
    with pytest.raises(CheckpointError, match="must belong to the scales in the model's files"):
        fp8kv.load_kv_scales(saved)
    with pytest.warns(UserWarning, match="must belong to"):
        loaded = fp8kv.load_kv_scales(saved, on_problem="warn")
    assert loaded.is_plain
    assert len(loaded) == LAYERS


def change_json(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "scales.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_layer(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        layers = json.loads((folder / "scales.json").read_text())["layers"]
        change_json(layers=layers | {"0": layers["0"] | changes})(folder)

    return change


def change_tensor(name: str, x: Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "scales.safetensors")
        tensors.pop(STEM.format(0, name), None)
        save_file(tensors | ({} if x is None else {STEM.format(0, name): x}), folder / "scales.safetensors")

    return change


def without_layer_2(folder: Path) -> None:
    layers = json.loads((folder / "scales.json").read_text())["layers"]
    del layers["2"]
    change_json(layers=layers)(folder)
    tensors = load_file(folder / "scales.safetensors")
    save_file({n: x for n, x in tensors.items() if ".2." not in n}, folder / "scales.safetensors")


def of_two_heads(folder: Path) -> None:
    tensors = load_file(folder / "scales.safetensors")
    halves = {name: x[:2].clone() if ".0." in name else x for name, x in tensors.items()}
    save_file(halves, folder / "scales.safetensors")


K = STEM.format(0, "k_scale")
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no JSON": (lambda x: (x / "scales.json").unlink(), "scales.json must be a file, but does not exist"),
    "no tensors": (lambda x: (x / "scales.safetensors").unlink(), "scales.safetensors must be a file"),
    "JSON": (lambda x: (x / "scales.json").write_text("{"), "scales.json must be JSON, got"),
    "list": (lambda x: (x / "scales.json").write_text("[]"), "scales.json must hold an object, got list"),
    "cut": (lambda x: (x / "scales.safetensors").write_bytes(b"123456789"), "is no whole safetensors file"),
    "version": (change_json(version=2), "version must be 1, got 2"),
    "strategy": (change_json(strategy="row"), 'strategy must be "tensor", "attn_head", "channel" or "auto"'),
    "layers": (change_json(layers=[]), "layers must be objects by number, got []"),
    "layer": (change_json(layers={"x": {}}), "layers must be objects by number"),
    "format": (change_layer(dtype="int4"), 'layer 0: dtype must be "fp8", "fp8_e4m3"'),
    "error": (change_layer(error="few"), "layer 0: error must be a number that is not negative, got 'few'"),
    "names": (change_layer(tensors=[K]), "layer 0: tensors must have the names of scales and offsets"),
    "foreign": (change_layer(tensors=["a"]), "layer 0: tensors must have the names of scales and offsets"),
    "gone": (change_tensor("k_scale", None), f"{K} must be in scales.safetensors, but does not exist"),
    "extra": (change_tensor("k_offset", torch.ones(HEADS, SIZE)), "the tensors that scales.json names"),
    "dtype": (change_tensor("k_scale", torch.ones(4).half()), f"{K} must be float32"),
    "shape": (change_tensor("k_scale", torch.ones(4, 1, 1)), "got F32 of shape [4, 1, 1]"),
    "heads": (change_tensor("k_scale", torch.ones(3, SIZE)), "must have heads of one number and size"),
    "NaN": (change_tensor("k_scale", torch.full((HEADS, SIZE), float("nan"))),
            f"{K} must be finite and above 0 in fp32, got nan for head 0, channel 0"),
    "fewer heads": (of_two_heads, f"{K} in fp8kv must be for 4 KV heads, as the scales in the model's files"),
    "fewer layers": (without_layer_2, "must have the layers that have scales in the files of the model"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_an_error_and_never_passed_over(saved: Path, damage: str) -> None:
    change, sentence = DAMAGES[damage]
    change(saved / "fp8kv")
    problem, *others = fp8kv.audit_checkpoint(saved)
    assert (problem.kind, problem.severity) == ("fp8kv-damaged", "error")
    assert sentence in problem.message
    assert not [x for x in others if x.severity == "error"]
    with pytest.raises(CheckpointError):
        fp8kv.load_kv_scales(saved)
    with pytest.warns(UserWarning, match="load_kv_scales: "):
        assert len(fp8kv.load_kv_scales(saved, on_problem="warn")) == 0


def test_a_folder_of_that_name_with_something_else_does_not_matter(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    (folder / "fp8kv").mkdir()
    (folder / "fp8kv" / "README").write_text("notes")
    assert fp8kv.load_kv_scales(folder).is_plain


def test_a_subfolder_of_another_checkpoint_is_outdated(saved: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other")
    shutil.copytree(saved / "fp8kv", other / "fp8kv")
    assert [x.kind for x in fp8kv.audit_checkpoint(other)] == ["fp8kv-outdated"]


# ModelOpt's affine cache


def affine(folder: Path, **changes: Tensor) -> Path:
    """`changes` by the ends of names in layer 1, such as `k_bias`."""
    config = files.config()
    config["quantization_config"] = {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}
    tensors = {}
    for layer in range(LAYERS):
        for letter in "kv":
            stem = STEM.format(layer, f"{letter}_proj")
            tensors[f"{stem}.{letter}_scale"] = random(1, seed=layer)[0]
            bias = random(1, HEADS, 1, SIZE, seed=layer).bfloat16()
            tensors[f"{stem}.{letter}_bias"] = changes.get(f"{letter}_bias", bias) if layer == 1 else bias
            tensors[f"{stem}.bias"] = torch.ones(HEADS * SIZE)
    return write_checkpoint(folder, weights() | tensors, config)


def test_biases_of_an_affine_cache_are_offsets(tmp_path: Path) -> None:
    folder = affine(tmp_path / "checkpoint")
    problems = fp8kv.audit_checkpoint(folder)
    assert [(x.kind, x.severity) for x in problems] == [("affine", "warning")]
    assert problems[0].message == (
        "model.layers.0.self_attn.k_proj.k_bias and 5 more tensors are subtracted from K and V before these "
        "are quantized (ModelOpt's affine cache), and an engine that ignores them clips."
    )
    scales = fp8kv.load_kv_scales(folder)
    for layer in range(LAYERS):
        expected = random(1, HEADS, 1, SIZE, seed=layer).bfloat16().float().view(HEADS, SIZE)
        assert torch.equal(scales[layer].k_offset, expected)
        assert torch.equal(scales[layer].v_offset, expected)
        assert scales[layer].k.tolist() == random(1, seed=layer).tolist()
    with pytest.raises(ValueError, match=r"^load_kv_scales: layer 0: tp_size must divide the 4 KV heads"):
        fp8kv.load_kv_scales(folder, tp_size=3)
    second = fp8kv.load_kv_scales(folder, tp_rank=1, tp_size=2)
    assert torch.equal(second[0].k_offset, scales[0].k_offset[2:])
    assert fp8kv.remap_scale_name("model.layers.0.self_attn.k_proj.k_bias") is None


def test_an_affine_cache_can_be_saved_for_all_engines(tmp_path: Path, source: Path) -> None:
    scales = fp8kv.load_kv_scales(affine(tmp_path / "affine"))
    scales.save(tmp_path / "saved", source)
    assert_same(fp8kv.load_kv_scales(tmp_path / "saved"), scales)
    k = load_file(tmp_path / "saved" / "model.safetensors")[STEM.format(0, "k_scale")].float()
    assert k.item() >= (scales[0].k * 448 + scales[0].k_offset.abs().max()).item() / 448


@pytest.mark.parametrize(
    ("bias", "kind", "sentence"),
    [
        (
            torch.ones(1, 3, 1, SIZE),
            "head-count",
            "must have the shape [1, 4, 1, head_size], got [1, 3, 1, 16]",
        ),
        (torch.ones(HEADS * SIZE), "head-count", "must have the shape [1, 4, 1, head_size], got [64]"),
        (torch.full((1, HEADS, 1, SIZE), float("inf")), "not-finite", "must be finite, got inf"),
        (torch.ones(1, HEADS, 1, SIZE).int(), "wrong-dtype", "must be float32, float16 or bfloat16, got I32"),
    ],
    ids=["heads", "flat", "infinite", "integers"],
)
def test_biases_that_cannot_be_used(tmp_path: Path, bias: Tensor, kind: str, sentence: str) -> None:
    folder = affine(tmp_path / "checkpoint", v_bias=bias)
    problem = fp8kv.audit_checkpoint(folder)[0]
    assert (problem.kind, problem.severity, problem.layer) == (kind, "error", 1)
    assert problem.message == f"Layer 1: model.layers.1.self_attn.v_proj.v_bias {sentence}."
    with pytest.raises(CheckpointError):
        fp8kv.load_kv_scales(folder)
    with pytest.warns(UserWarning, match="load_kv_scales: "):
        loaded = fp8kv.load_kv_scales(folder, on_problem="warn")
    assert loaded[1].v is None
    assert loaded[1].k_offset is not None
