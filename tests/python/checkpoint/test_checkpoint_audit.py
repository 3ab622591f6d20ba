"""audit_checkpoint: one problem for each defect that checkpoints have, and none for healthy ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoint_files import (
    ATTENTION,
    SIZES,
    config,
    make_checkpoint,
    scales,
    scheme,
    weights,
    write_checkpoint,
)
from fp8kv import Problem, audit_checkpoint, load_kv_scales
from fp8kv.checkpoint.problems import KINDS

ROOT = Path(__file__).parents[3]
STEM = ATTENTION.format(layer=1)
Q, K, V = (f"{STEM}.{letter}_scale" for letter in "qkv")
NAN, INF = float("nan"), float("inf")
MIN_SCALE = 1 / (448 * 512)


def per_head(*values: float) -> Tensor:
    return torch.tensor(values).reshape(-1, 1, 1)


def audit(
    folder: Path,
    changes: dict[str, Tensor | None],
    *,
    strategy: str = "attn_head",
    query: bool = False,
    fields: dict[str, Any] | None = None,
) -> list[Problem]:
    """The problems about a healthy checkpoint after changes of tensors and of fields of its config."""
    tensors = weights() | scales(strategy, query=query) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return audit_checkpoint(write_checkpoint(folder, kept, config(strategy, query=query) | (fields or {})))


def kinds(problems: list[Problem]) -> list[str]:
    return [problem.kind for problem in problems]


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
@pytest.mark.parametrize("query", [False, True], ids=["kv", "qkv"])
@pytest.mark.parametrize("shards", [1, 3])
def test_nothing_is_wrong_with_a_healthy_checkpoint(tmp_path: Path, strategy: str, query: bool, shards: int) -> None:
    assert audit_checkpoint(make_checkpoint(tmp_path, strategy, query=query, shards=shards)) == []


# Values


@pytest.mark.parametrize(
    ("name", "values", "kind", "sentence", "value"),
    [
        (
            K,
            (0.05, 0.05, NAN, 0.05),
            "not-finite",
            "must be finite, got nan for head 2 (1 of 4 heads)",
            "nan",
        ),
        (V, (INF, INF, 0.05, 0.05), "not-finite", "must be finite, got inf for head 0 (2 of 4 heads)", "inf"),
        (
            K,
            (0.05, -INF, 0.05, 0.05),
            "not-finite",
            "must be finite, got -inf for head 1 (1 of 4 heads)",
            "-inf",
        ),
        (V, (0.05, 0.05, 0.05, 0.0), "not-positive", "must be above 0, got 0 for head 3 (1 of 4 heads)", "0"),
        (
            K,
            (-0.0, 0.05, 0.05, 0.05),
            "not-positive",
            "must be above 0, got -0 for head 0 (1 of 4 heads)",
            "-0",
        ),
        (
            V,
            (-3.0, -0.05, -1.0, -2),
            "not-positive",
            "must be above 0, got -3 for head 0 (4 of 4 heads)",
            "-3",
        ),
    ],
    ids=["nan", "inf", "-inf", "zero", "-zero", "negative"],
)
def test_values_that_are_no_scales(
    tmp_path: Path, name: str, values: tuple[float, ...], kind: str, sentence: str, value: str
) -> None:
    (problem,) = audit(tmp_path, {name: per_head(*values)})
    assert problem.message == f"Layer 1: {name} {sentence}."
    assert (problem.kind, problem.severity, problem.layer) == (kind, "error", 1)
    assert (problem.tensor, problem.value) == (name, value)


def test_different_defects_of_a_tensor_are_different_problems(tmp_path: Path) -> None:
    problems = audit(tmp_path, {K: per_head(NAN, 0.0, 0.05, 400.0)})
    assert kinds(problems) == ["not-finite", "not-positive", "implausible"]


@pytest.mark.parametrize(
    ("name", "strategy", "factor"),
    [
        (K, "attn_head", 1e3),
        (V, "attn_head", 1e-3),
        (K, "tensor", 1e-3),
        (V, "tensor", 1e3),
        (K, "attn_head", 1e30),
        (V, "tensor", 1e-30),
    ],
    ids=["k-heads-1e3", "v-heads-1e-3", "k-tensor-1e-3", "v-tensor-1e3", "k-heads-1e30", "v-tensor-1e-30"],
)
def test_scales_far_from_those_of_other_layers(tmp_path: Path, name: str, strategy: str, factor: float) -> None:
    healthy = scales(strategy, dtype=torch.float32)[name]
    (problem,) = audit(tmp_path, {name: healthy * factor}, strategy=strategy)
    assert (problem.kind, problem.severity, problem.layer) == ("implausible", "error", 1)
    assert problem.tensor == name
    assert re.search(r"must be near 0\.0\d+, the median of other layers, got ", problem.message)


@pytest.mark.parametrize("factor", [100, 10, 0.1, 0.01])
def test_scales_within_two_orders_of_magnitude_are_plausible(tmp_path: Path, factor: float) -> None:
    assert audit(tmp_path, {K: per_head(0.05, 0.05, 0.05, 0.05) * factor}) == []


def test_one_head_far_from_others(tmp_path: Path) -> None:
    (problem,) = audit(tmp_path, {V: per_head(0.05, 0.05, 70.0, 0.05)})
    assert problem.kind == "implausible"
    assert problem.message.endswith("got 70 for head 2 (1 of 4 heads).")


def test_keys_and_values_may_be_far_apart(tmp_path: Path) -> None:
    tensors = {name: x * (1e-3 if name.endswith("v_scale") else 1) for name, x in scales().items()}
    assert audit(tmp_path, dict(tensors)) == []


@pytest.mark.parametrize("value", [1e-30, 1e-9, 1e6, 1e30], ids=str)
def test_scales_that_no_layer_can_have(tmp_path: Path, value: float) -> None:
    same_everywhere = {name: torch.full_like(x, value) for name, x in scales(dtype=torch.float32).items()}
    problems = audit(tmp_path, dict(same_everywhere))
    assert kinds(problems) == ["implausible"] * 6


def test_a_16_bit_subnormal_is_implausible_and_not_zero(tmp_path: Path) -> None:
    (problem,) = audit(tmp_path, {K: torch.full((4, 1, 1), 1e-40).to(torch.bfloat16)})
    assert problem.kind == "implausible"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_scale_of_a_head_that_is_always_zero_is_plausible(tmp_path: Path, dtype: torch.dtype) -> None:
    (problem,) = audit(tmp_path, {K: per_head(0.05, MIN_SCALE, 0.05, MIN_SCALE).to(dtype)})
    assert (problem.kind, problem.severity, problem.layer) == ("zero-head", "note", 1)
    assert problem.message.endswith("for head 1 (2 of 4 heads).")


# Query scales


@pytest.mark.parametrize(
    ("first", "shown"),
    [
        (NAN, "nan"), (-INF, "-inf"), (0.0, "0"), (-0.0072, "-0.0072"), (1e34, "1e+34"), (2.5e-21, "2.5e-21"),
        (1e-42, "1.00053e-42"), (10624.0, "10624"), (9.2e-7, "9.2e-07"),
    ],
    ids=str,
)  # fmt: skip
def test_query_scales_of_uninitialized_memory(tmp_path: Path, first: float, shown: str) -> None:
    (problem,) = audit(tmp_path, {Q: per_head(first, *[0.05] * 6, first)}, query=True)
    assert (problem.kind, problem.severity, problem.layer) == ("query-scale", "error", 1)
    assert (problem.tensor, problem.value) == (Q, shown)
    assert "query=False" in problem.remedy
    assert problem.message.endswith(f"got {shown} for head 0 (2 of 8 heads).")


@pytest.mark.parametrize("value", [NAN, 1e34], ids=str)
def test_a_query_scale_of_uninitialized_memory_per_tensor(tmp_path: Path, value: float) -> None:
    (problem,) = audit(tmp_path, {Q: torch.tensor([value])}, strategy="tensor", query=True)
    assert (problem.kind, problem.severity, problem.layer) == ("query-scale", "error", 1)
    assert problem.message.endswith(f"got {value:.6g}.")


def test_garbage_of_all_kinds_in_one_query_scale_is_one_problem(tmp_path: Path) -> None:
    problems = audit(tmp_path, {Q: per_head(0.05, NAN, -1, 0, 1e34, 1e-42, INF, 0.05)}, query=True)
    assert [(p.kind, p.value) for p in problems] == [("query-scale", "nan")]
    assert problems[0].message.endswith("for head 1 (6 of 8 heads).")


def test_the_same_garbage_in_all_query_scales(tmp_path: Path) -> None:
    garbage = {f"{ATTENTION.format(layer=n)}.q_scale": torch.tensor([2.5e-21]) for n in range(3)}
    problems = audit(tmp_path, dict(garbage), strategy="tensor", query=True)
    assert kinds(problems) == ["query-scale"] * 3
    assert [problem.layer for problem in problems] == [0, 1, 2]


def test_a_query_scale_that_is_not_there(tmp_path: Path) -> None:
    (problem,) = audit(tmp_path, {Q: None}, query=True)
    assert (problem.kind, problem.severity, problem.layer) == ("query-scale-missing", "error", 1)
    assert problem.tensor == Q


def test_no_query_scales_at_all(tmp_path: Path) -> None:
    absent = {f"{ATTENTION.format(layer=n)}.q_scale": None for n in range(3)}
    (problem,) = audit(tmp_path, dict(absent), query=True)
    assert (problem.kind, problem.layer) == ("query-scale-missing", None)


def test_query_scales_that_the_config_does_not_mention(tmp_path: Path) -> None:
    garbage = {f"{ATTENTION.format(layer=n)}.q_scale": per_head(*[NAN] * 8) for n in range(3)}
    (problem,) = audit(tmp_path, dict(garbage))
    assert (problem.kind, problem.severity, problem.value) == ("unused-query-scale", "note", "3")


# Presence and counts


def test_a_layer_without_scales(tmp_path: Path) -> None:
    (problem,) = audit(tmp_path, {K: None, V: None})
    assert (problem.kind, problem.severity, problem.layer) == ("layer-missing", "error", 1)
    assert "1.0" in problem.remedy


def test_the_last_layer_without_scales(tmp_path: Path) -> None:
    (problem,) = audit(tmp_path, {}, fields={"num_hidden_layers": 4})
    assert (problem.kind, problem.layer) == ("layer-missing", 3)


def test_a_gap_between_layers_where_the_config_does_not_count_them(tmp_path: Path) -> None:
    tensors = {name: x for name, x in scales().items() if name not in (K, V)}
    problems = audit_checkpoint(write_checkpoint(tmp_path, tensors, config()["quantization_config"]))
    assert [(problem.kind, problem.layer) for problem in problems] == [("layer-missing", 1)]


def test_no_scales_at_all(tmp_path: Path) -> None:
    (problem,) = audit_checkpoint(write_checkpoint(tmp_path, weights(), config()))
    assert (problem.kind, problem.severity, problem.layer) == ("layer-missing", "error", None)


def test_layers_without_attention_need_no_scales(tmp_path: Path) -> None:
    types = ["full_attention", "linear_attention", "full_attention"]
    assert audit(tmp_path, {K: None, V: None}, fields={"layer_types": types}) == []


@pytest.mark.parametrize(("absent", "present"), [(K, V), (V, K)], ids=["k", "v"])
def test_only_one_of_keys_and_values(tmp_path: Path, absent: str, present: str) -> None:
    (problem,) = audit(tmp_path, {absent: None})
    assert (problem.kind, problem.severity, problem.layer) == ("scale-missing", "error", 1)
    assert problem.message == f"Layer 1: {absent} must be there, as {present} is."
    assert problem.tensor == absent


def test_a_layer_that_the_config_does_not_have(tmp_path: Path) -> None:
    more = {f"model.layers.3.self_attn.{letter}_scale": per_head(*[0.05] * 4) for letter in "kv"}
    (problem,) = audit(tmp_path, dict(more))
    assert (problem.kind, problem.severity, problem.layer) == ("unexpected-layer", "note", 3)


@pytest.mark.parametrize(
    ("name", "count", "strategy", "sentence"),
    [
        (K, 3, "attn_head", "must have 4 elements, one for each KV head, got 3"),
        (V, 8, "attn_head", "must have 4 elements, one for each KV head, got 8"),
        (K, 1, "attn_head", "must have 4 elements, one for each KV head, got 1"),
        (V, 0, "attn_head", "must have 4 elements, one for each KV head, got 0"),
        (Q, 4, "attn_head", "must have 8 elements, one for each query head, got 4"),
        (Q, 9, "attn_head", "must have 8 elements, one for each query head, got 9"),
        (K, 4, "tensor", "must have 1 element, as the strategy is tensor, got 4"),
        (V, 0, "tensor", "must have 1 element, as the strategy is tensor, got 0"),
        (Q, 8, "tensor", "must have 1 element, as the strategy is tensor, got 8"),
    ],
)
def test_a_number_of_heads_that_is_not_the_model_s(tmp_path: Path, name: str, count: int, strategy: str, sentence: str) -> None:
    (problem,) = audit(tmp_path, {name: per_head(*[0.05] * count)}, strategy=strategy, query=True)
    assert (problem.kind, problem.severity, problem.layer) == ("head-count", "error", 1)
    assert problem.message == f"Layer 1: {name} {sentence}."
    assert (problem.tensor, problem.value) == (name, str(count))


@pytest.mark.parametrize(
    ("name", "count", "sentence"),
    [
        (V, 3, "must have 4 elements, as many as that of K, got 3"),
        (Q, 7, "must have a multiple of 4 elements, one for each query head, got 7"),
        (Q, 0, "must have a multiple of 4 elements, one for each query head, got 0"),
    ],
)
def test_numbers_of_heads_that_do_not_agree_where_the_config_has_none(
    tmp_path: Path, name: str, count: int, sentence: str
) -> None:
    tensors = scales(query=True) | {name: per_head(*[0.05] * count)}
    bare = config(query=True)["quantization_config"]
    (problem,) = audit_checkpoint(write_checkpoint(tmp_path, tensors, bare))
    assert problem.message == f"Layer 1: {name} {sentence}."


def test_query_heads_that_the_kv_heads_do_not_divide(tmp_path: Path) -> None:
    names = [f"{ATTENTION.format(layer=n)}.q_scale" for n in range(3)]
    tensors: dict[str, Tensor | None] = {name: per_head(*[0.05] * 9) for name in names}
    problems = audit(tmp_path, tensors, query=True, fields={"num_attention_heads": 9})
    assert kinds(problems) == ["head-count"] * 3
    assert problems[0].message.endswith("must have a multiple of 4 elements, one for each query head, got 9.")


# Types, zero points, copies


@pytest.mark.parametrize(
    ("dtype", "shown"),
    [(torch.int8, "I8"), (torch.int64, "I64"), (torch.bool, "BOOL"), (torch.float8_e4m3fn, "F8_E4M3")],
)
def test_scales_of_another_dtype(tmp_path: Path, dtype: torch.dtype, shown: str) -> None:
    (problem,) = audit(tmp_path, {K: torch.ones(4, 1, 1).to(dtype)})
    assert (problem.kind, problem.severity, problem.layer) == ("wrong-dtype", "error", 1)
    assert problem.message == f"Layer 1: {K} must be float32, float16 or bfloat16, got {shown}."
    assert problem.value == shown


@pytest.mark.parametrize(
    ("letter", "dtype"),
    [("q", torch.float8_e4m3fn), ("k", torch.bfloat16), ("v", torch.int8)],
    ids=["q", "k", "v"],
)
def test_zero_points_that_are_not_zero(tmp_path: Path, letter: str, dtype: torch.dtype) -> None:
    name = f"{STEM}.{letter}_zero_point"
    (problem,) = audit(tmp_path, {name: per_head(0, -2, 0, 1).to(dtype)}, query=True)
    assert (problem.kind, problem.severity, problem.layer) == ("zero-point", "error", 1)
    assert (problem.tensor, problem.value) == (name, "-2")


def test_a_zero_point_of_nan(tmp_path: Path) -> None:
    (problem,) = audit(tmp_path, {f"{STEM}.k_zero_point": torch.tensor([NAN])}, query=True)
    assert (problem.kind, problem.value) == ("zero-point", "nan")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int32], ids=str)
def test_zero_points_are_numbers_of_any_type(tmp_path: Path, dtype: torch.dtype) -> None:
    assert audit(tmp_path, {f"{STEM}.k_zero_point": torch.zeros(4, dtype=dtype)}, query=True) == []
    (problem,) = audit(tmp_path, {f"{STEM}.k_zero_point": torch.tensor([0, 3, 0, 0]).to(dtype)}, query=True)
    assert (problem.kind, problem.value) == ("zero-point", "3")


def test_a_zero_point_that_is_no_number(tmp_path: Path) -> None:
    name = f"{STEM}.k_zero_point"
    (problem,) = audit(tmp_path, {name: torch.zeros(4, dtype=torch.bool)}, query=True)
    assert (problem.kind, problem.tensor, problem.value) == ("wrong-dtype", name, "BOOL")
    assert problem.message == f"Layer 1: {name} must be a number, got BOOL."


def test_a_zero_point_without_its_scale(tmp_path: Path) -> None:
    zero_point = f"{STEM}.k_zero_point"
    problems = audit(tmp_path, {K: None, zero_point: torch.ones(4)}, query=True)
    assert [(problem.kind, problem.tensor) for problem in problems] == [
        ("zero-point", zero_point),
        ("scale-missing", K),
    ]


def test_the_same_scale_under_two_names(tmp_path: Path) -> None:
    again = f"{STEM}.k_proj.k_scale"
    (problem,) = audit(tmp_path, {again: scales()[K].clone()})
    assert (problem.kind, problem.severity, problem.layer) == ("duplicate-scale", "note", 1)
    assert problem.message == f"Layer 1: {again} and {K} are the same scale."
    assert problem.tensor == K


@pytest.mark.parametrize("other", [per_head(0.05, 0.06, 0.07, 0.08), torch.tensor([0.05])], ids=["values", "size"])
def test_different_scales_under_two_names(tmp_path: Path, other: Tensor) -> None:
    again = f"{STEM}.k_proj.k_scale"
    (problem,) = audit(tmp_path, {again: other})
    assert (problem.kind, problem.severity, problem.layer) == ("conflicting-scales", "error", 1)
    assert problem.message.startswith(f"Layer 1: {again} and {K} must be equal, got ")


def test_a_scale_for_both_that_contradicts_that_of_the_keys(tmp_path: Path) -> None:
    (problem,) = audit(tmp_path, {f"{STEM}.kv_scale": torch.tensor([0.5]), V: None}, strategy="tensor")
    assert (problem.kind, problem.layer) == ("conflicting-scales", 1)


def test_a_defect_of_a_scale_for_both_is_one_problem(tmp_path: Path) -> None:
    both = f"{STEM}.kv_scale"
    (problem,) = audit(tmp_path, {both: torch.tensor([NAN]), K: None, V: None}, strategy="tensor")
    assert (problem.kind, problem.tensor) == ("not-finite", both)


def test_different_scales_of_one_name_in_two_files(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    save_file({K: per_head(0.05, 0.06, 0.07, 0.08)}, tmp_path / "more.safetensors")
    (problem,) = audit_checkpoint(tmp_path)
    assert problem.kind == "conflicting-scales"
    assert "model.safetensors" in problem.message
    assert "more.safetensors" in problem.message


# Files


Damage = Callable[[bytes], bytes]


def header(contents: Any) -> bytes:
    text = contents if isinstance(contents, bytes) else json.dumps(contents).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: (1 << 63).to_bytes(8, "little") + data[8:],
        lambda data: data[:8] + b"\xff" * 50 + data[58:],
        lambda data: header(b"[" * 100_000),
        lambda data: header([]),
        lambda data: header({K: 3}),
        lambda data: header({K: {"dtype": "F32", "shape": [1]}}),
        lambda data: header({K: {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 0]}}),
        lambda data: header({K: {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}),
        lambda data: header({K: {"dtype": "F32", "shape": [1], "data_offsets": [0.5, 0.5]}}),
        lambda data: header({K: {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}) + b"\0" * 4,
        lambda data: header({K: {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}) + b"\0" * 4,
    ],
    ids=["empty", "5 bytes", "cut in the header", "cut at the end", "too long", "huge header", "no text",
         "too deep", "a list", "a number", "no offsets", "a text as shape", "a negative shape", "fractions",
         "offsets swapped", "beyond the end"],
)  # fmt: skip
def test_a_corrupt_file(tmp_path: Path, damage: Damage) -> None:
    file = make_checkpoint(tmp_path) / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    problems = audit_checkpoint(tmp_path)
    assert kinds(problems) == ["file-corrupt"]
    assert problems[0].severity == "error"
    assert str(file) in problems[0].message


def test_a_scale_with_fewer_bytes_than_its_shape_needs(tmp_path: Path) -> None:
    entries = {f"{STEM}.{letter}_scale": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]} for letter in "kv"}
    (tmp_path / "model.safetensors").write_bytes(header(entries) + b"\0" * 8)
    sizes = SIZES | {"layer_types": ["conv", "full_attention", "conv"]}
    (tmp_path / "config.json").write_text(json.dumps(config() | sizes))
    problems = audit_checkpoint(tmp_path)
    assert [(problem.kind, problem.tensor) for problem in problems] == [
        ("file-corrupt", K),
        ("file-corrupt", V),
    ]
    assert "8 bytes for F32 of shape [4]" in problems[0].message


@pytest.mark.parametrize("index", [True, False], ids=["with an index", "without an index"])
def test_a_missing_shard(tmp_path: Path, index: bool) -> None:
    make_checkpoint(tmp_path, shards=3)
    missing = tmp_path / "model-00003-of-00003.safetensors"
    missing.unlink()
    if not index:
        (tmp_path / "model.safetensors.index.json").unlink()
    (problem,) = audit_checkpoint(tmp_path)
    assert (problem.kind, problem.severity) == ("file-missing", "error")
    assert str(missing) in problem.message


def test_tensors_that_the_index_names_and_their_shard_lacks(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=2)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shard = index["weight_map"][K]
    index["weight_map"] |= {"model.norm.weight": shard, "lm_head.weight": shard}
    file.write_text(json.dumps(index))
    (problem,) = audit_checkpoint(tmp_path)
    assert (problem.kind, problem.severity) == ("tensor-missing", "error")
    assert (problem.tensor, problem.value) == ("model.norm.weight", "2")
    assert str(tmp_path / shard) in problem.message


@pytest.mark.parametrize("contents", [b"", b"[]", b'{"weight_map": 3}', b'{"weight_map": {"a": 3}}', b"\xff"], ids=str)
def test_a_corrupt_index(tmp_path: Path, contents: bytes) -> None:
    make_checkpoint(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").write_bytes(contents)
    (problem,) = audit_checkpoint(tmp_path)
    assert (problem.kind, problem.severity) == ("file-corrupt", "error")
    assert "model.safetensors.index.json" in problem.message


def test_no_safetensors_at_all(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"...")
    (problem,) = audit_checkpoint(tmp_path)
    assert (problem.kind, problem.severity) == ("file-missing", "error")


def test_an_index_with_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=2)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], 5000 * "x")
    file.write_text(json.dumps(index))
    assert kinds(audit_checkpoint(tmp_path)) == ["file-missing"]


def test_a_directory_in_place_of_a_file(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, shards=2)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    shard.unlink()
    shard.mkdir()
    assert kinds(audit_checkpoint(tmp_path)) == ["file-missing"]


# The config


@pytest.mark.parametrize("contents", [None, b"", b"{", b"[]", b"\xff", b'{"a":' * 450 + b"1" + b"}" * 450])
def test_an_unreadable_config(tmp_path: Path, contents: bytes | None) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    if contents is not None:
        (tmp_path / "config.json").write_bytes(contents)
    (problem,) = audit_checkpoint(tmp_path)
    assert (problem.kind, problem.severity) == ("config-unreadable", "error")
    assert str(tmp_path / "config.json") in problem.message


def test_an_unsupported_scheme(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, scales(), config(kv_cache_scheme=scheme(type="int")))
    (problem,) = audit_checkpoint(tmp_path)
    assert (problem.kind, problem.severity) == ("scheme-unsupported", "error")
    assert problem.message == 'kv_cache_scheme.type must be "float", got "int".'


def test_scales_without_a_scheme(tmp_path: Path) -> None:
    (problem,) = audit_checkpoint(write_checkpoint(tmp_path, scales(), dict(SIZES)))
    assert (problem.kind, problem.severity) == ("scheme-missing", "error")


def test_scales_without_a_scheme_are_checked_all_the_same(tmp_path: Path) -> None:
    tensors = scales() | {K: per_head(NAN, NAN, NAN, NAN)}
    assert kinds(audit_checkpoint(write_checkpoint(tmp_path, tensors, dict(SIZES)))) == [
        "scheme-missing",
        "not-finite",
    ]


def test_neither_a_scheme_nor_scales(tmp_path: Path) -> None:
    (problem,) = audit_checkpoint(write_checkpoint(tmp_path, weights(), dict(SIZES)))
    assert (problem.kind, problem.severity) == ("not-quantized", "error")


@pytest.mark.parametrize(
    ("observer", "sentence"),
    [
        (None, "The observer is not specified; the default of some versions keeps only the last batch."),
        ("minmax", 'The observer is "minmax", which keeps only the last batch in some versions.'),
        ("memoryless_minmax", 'The observer is "memoryless_minmax", which keeps only the last batch.'),
    ],
)
def test_observers_that_may_have_seen_the_last_batch_only(tmp_path: Path, observer: str | None, sentence: str) -> None:
    (problem,) = audit_checkpoint(write_checkpoint(tmp_path, scales(), config(kv_cache_scheme=scheme(observer=observer))))
    assert (problem.kind, problem.severity, problem.layer) == ("observer", "warning", None)
    assert problem.message == sentence
    assert problem.value == (observer or "null")


@pytest.mark.parametrize("observer", ["static_minmax", "mse", "percentile"])
def test_observers_that_keep_all_batches(tmp_path: Path, observer: str) -> None:
    fields = config(kv_cache_scheme=scheme(observer=observer))
    assert audit_checkpoint(write_checkpoint(tmp_path, scales(), fields)) == []


def test_producers_that_do_not_name_observers_are_not_suspected(tmp_path: Path) -> None:
    modelopt = {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}
    folder = write_checkpoint(tmp_path, scales("tensor"), SIZES | {"quantization_config": modelopt})
    assert audit_checkpoint(folder) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": "3"}, {"num_hidden_layers": -1}, {"num_hidden_layers": True},
        {"num_hidden_layers": []},
        {"num_key_value_heads": "4"}, {"num_key_value_heads": {}}, {"num_key_value_heads": [4]},
        {"num_attention_heads": None}, {"layer_types": 3}, {"layer_types": [[], {}, None]},
        {"block_configs": [1]},
        {"block_configs": {}}, {"attn_layer_period": 0}, {"attn_layer_period": 2, "attn_layer_offset": "x"},
        {"block_types": []}, {"text_config": 3}, {"multi_query": "yes"}, {"num_kv_shared_layers": "all"},
    ],
    ids=str,
)  # fmt: skip
def test_strange_sizes_in_the_config_raise_nothing(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert all(problem.severity == "note" for problem in audit(tmp_path, {}, fields=fields))


# All of it


def test_errors_come_first_and_layers_in_order(tmp_path: Path) -> None:
    changes: dict[str, Tensor | None] = {
        "model.layers.2.self_attn.k_scale": per_head(NAN, 1, 1, 1),
        "model.layers.0.self_attn.v_scale": None,
        "model.layers.9.self_attn.v_scale": per_head(0.05, 0.05, 0.05, 0.05),
    }
    fields = config(kv_cache_scheme=scheme(observer=None))
    problems = audit(tmp_path, changes, fields=fields)
    assert [(problem.severity, problem.kind, problem.layer) for problem in problems] == [
        ("error", "scale-missing", 0),
        ("error", "not-finite", 2),
        ("warning", "observer", None),
        ("note", "unexpected-layer", 9),
    ]


@pytest.mark.parametrize(("v", "kinds"), [(0.05, []), (0.06, ["latent-scales"])])
def test_latent_attention_has_one_scale_for_its_row(tmp_path: Path, v: float, kinds: list[str]) -> None:
    tensors = {name: torch.tensor([0.05]) for name in scales("tensor")} | {V: torch.tensor([v])}
    folder = write_checkpoint(tmp_path, tensors, config("tensor") | {"kv_lora_rank": 32})
    assert [problem.kind for problem in audit_checkpoint(folder)] == kinds


def test_a_scale_of_keys_is_enough_for_latent_attention(tmp_path: Path) -> None:
    tensors = {name: torch.tensor([0.05]) for name in scales("tensor") if name.endswith(".k_scale")}
    folder = write_checkpoint(tmp_path, tensors, config("tensor") | {"kv_lora_rank": 32})
    assert audit_checkpoint(folder) == []
    loaded = load_kv_scales(folder)
    assert [(x.k, x.v) for x in loaded.values()] == [(torch.tensor([0.05]), torch.tensor([0.05]))] * 3
    write_checkpoint(tmp_path, tensors | {K: torch.tensor([NAN])})
    assert [(problem.kind, problem.tensor) for problem in audit_checkpoint(folder)] == [("not-finite", K)]


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        audit_checkpoint(tmp_path / "nowhere")
    assert str(error.value) == (
        f"audit_checkpoint: checkpoint must be a directory or a .safetensors file, but {tmp_path / 'nowhere'} does not exist"
    )


def test_every_kind_is_documented_with_its_severity() -> None:
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| `([a-z0-9-]+)` \| (error|warning|note) \|", page, re.MULTILINE))
    assert documented == {kind: severity for kind, (severity, _) in KINDS.items()}
