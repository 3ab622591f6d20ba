"""The plug-in, and what stands in for vLLM, against the sources of a release.

They are read where FP8KV_TEST_VLLM names a folder with the Python files of a wheel (its `vllm` is in there),
and not run, so neither a GPU nor what vLLM depends on is needed.
"""

from __future__ import annotations

import ast
import os
from functools import cache
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[3] / "python" / "fp8kv" / "vllm"
STANDINS = Path(__file__).with_name("vllm_standins.py")
FOLDER = os.environ.get("FP8KV_TEST_VLLM")

pytestmark = pytest.mark.skipif(FOLDER is None, reason="FP8KV_TEST_VLLM names no unpacked wheel of vLLM")

BACKEND = "vllm.v1.attention.backend"
FLASH_ATTN = "vllm.v1.attention.backends.flash_attn"
QUANT_FP8 = "vllm.model_executor.layers.quantization.input_quant_fp8"
#: Class of the plug-in, its file, and what it derives from.
CLASSES = [
    ("Fp8KVBackend", "backend.py", BACKEND, "AttentionBackend"),
    ("Fp8KVMetadataBuilder", "backend.py", BACKEND, "AttentionMetadataBuilder"),
    ("Fp8KVImpl", "backend.py", BACKEND, "AttentionImpl"),
    ("WritesBackend", "writes.py", FLASH_ATTN, "FlashAttentionBackend"),
    ("WritesBuilder", "writes.py", FLASH_ATTN, "FlashAttentionMetadataBuilder"),
    ("WritesImpl", "writes.py", FLASH_ATTN, "FlashAttentionImpl"),
    ("Fp8KVQuantFP8", "queries.py", QUANT_FP8, "QuantFP8"),
]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def release(module: str) -> ast.Module:
    path = Path(FOLDER or "", *module.split("."))
    return parsed(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))


def names(module: ast.Module) -> set[str]:
    """Whatever is defined, assigned or imported anywhere in it."""
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def methods(module: ast.Module, cls: str) -> dict[str, ast.FunctionDef]:
    node = next(node for node in ast.walk(module) if isinstance(node, ast.ClassDef) and node.name == cls)
    return {f.name: f for f in node.body if isinstance(f, ast.FunctionDef)}


def parameters(function: ast.FunctionDef) -> list[str]:
    return [x.arg for x in (*function.args.posonlyargs, *function.args.args) if x.arg not in ("self", "cls")]


def imported() -> list[tuple[str, str]]:
    """What the plug-in imports of vLLM: modules and names."""
    found = set()
    for path in PLUGIN.glob("*.py"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vllm"):
                found |= {(str(node.module), alias.name) for alias in node.names}
    return sorted(found)


@pytest.mark.parametrize(("module", "name"), imported(), ids="{0}".format)
def test_every_name_that_is_imported_exists(module: str, name: str) -> None:
    path = Path(FOLDER or "", *module.split("."))
    assert (path / f"{name}.py").exists() or name in names(release(module))


@pytest.mark.parametrize(("ours", "file", "module", "theirs"), CLASSES, ids=[row[0] for row in CLASSES])
def test_overrides_take_the_arguments_of_the_release(ours: str, file: str, module: str, theirs: str) -> None:
    mine, base = methods(parsed(PLUGIN / file), ours), methods(release(module), theirs)
    common = mine.keys() & base.keys()
    assert common
    for name in common:
        expected, actual = parameters(base[name]), parameters(mine[name])
        if mine[name].args.vararg is not None:
            expected = expected[: len(actual)]
        assert actual[: len(expected)] == expected, name
        optional = len(mine[name].args.defaults)
        assert len(actual) - optional <= len(expected), name


@pytest.mark.parametrize("index", range(3), ids=[row[0] for row in CLASSES[:3]])
def test_all_that_is_abstract_is_there(index: int) -> None:
    ours, file, module, theirs = CLASSES[index]
    abstract = {
        name
        for name, f in methods(release(module), theirs).items()
        if any(ast.unparse(d) == "abstractmethod" for d in f.decorator_list)
    }
    present = methods(parsed(PLUGIN / file), ours).keys()
    if ours == "Fp8KVBackend":
        present = present | methods(parsed(PLUGIN / "versions.py"), "CacheLayout").keys()
    assert abstract
    assert abstract <= present


def test_the_methods_that_stand_in_have_the_parameters_of_the_release() -> None:
    compared = 0
    for node in parsed(STANDINS).body:
        if not isinstance(node, ast.ClassDef):
            continue
        module = next((m for m in (BACKEND, FLASH_ATTN, QUANT_FP8) if node.name in names(release(m))), None)
        assert module is not None, node.name
        if node.name not in {x.name for x in ast.walk(release(module)) if isinstance(x, ast.ClassDef)}:
            continue
        theirs = methods(release(module), node.name)
        for name, function in methods(parsed(STANDINS), node.name).items():
            if name in theirs and function.args.vararg is None:
                assert parameters(function) == parameters(theirs[name]), f"{node.name}.{name}"
                compared += 1
    assert compared > 8


def test_the_fields_of_a_batch() -> None:
    """In the order in which the stand-in has them without defaults; the rest by name."""

    def fields(module: ast.Module) -> list[str]:
        node = next(x for x in ast.walk(module) if getattr(x, "name", "") == "CommonAttentionMetadata")
        assert isinstance(node, ast.ClassDef)
        return [str(f.target.id) for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]

    released, standing_in = fields(release(BACKEND)), fields(parsed(STANDINS))
    assert released[:10] == standing_in[:10]
    assert set(standing_in) <= set(released)


def test_what_is_called_takes_the_arguments() -> None:
    flash = release("vllm.vllm_flash_attn.flash_attn_interface")
    function = next(x for x in ast.walk(flash) if getattr(x, "name", "") == "flash_attn_varlen_func")
    assert isinstance(function, ast.FunctionDef)
    used = {
        "q", "k", "v", "out", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "causal",
        "fa_version", "softmax_scale", "softcap", "s_aux",
    }  # fmt: skip
    assert used <= set(parameters(function))
    functions = {
        x.name: parameters(x)
        for module in ("fa_utils", "utils")
        for x in ast.walk(release(f"vllm.v1.attention.backends.{module}"))
        if isinstance(x, ast.FunctionDef)
    }
    assert "head_size" in functions["get_flash_attn_version"]
    assert functions["flash_attn_supports_sinks"] == []
    assert functions["split_decodes_and_prefills"][:2] == ["common_attn_metadata", "decode_threshold"]


def test_layers_have_what_is_read_of_them() -> None:
    source = ast.unparse(release("vllm.model_executor.layers.attention.attention"))
    for text in (
        "self.kv_cache_dtype = ", "self.num_kv_heads = ", "self.kv_sharing_target_layer_name = ",
        "self.layer_name = ", "layer._k_scale_float = ", "static_forward_context[prefix] = self",
        "impl.do_kv_cache_update(attn_layer, key, value, kv_cache, layer_slot_mapping)",
    ):  # fmt: skip
        assert text in source
    assert "DEFAULT_PLUGINS_GROUP = 'vllm.general_plugins'" in ast.unparse(release("vllm.plugins"))
