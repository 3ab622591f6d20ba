"""The plug-in for SGLang: its pool is written as the reference says, or by SGLang.

With FP8KV_TEST_SGLANG, a folder with the Python files of a wheel, what stands in for it is compared with it.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8kv import reference, sglang
from fp8kv.sglang.store import set_kv_buffer
from helpers import assert_same_bytes

HEADS, HEAD_DIM, PAGE, PAGES = 2, 64, 16, 4
FOLDER = os.environ.get("FP8KV_TEST_SGLANG")


class MHATokenToKVPool:
    """As much of SGLang's as is read of it."""

    def __init__(self, *, use_hnd: bool = False, dtype: torch.dtype = torch.float8_e4m3fn) -> None:
        self.dtype, self.use_hnd = dtype, use_hnd
        self.kv_cache_layout = "hnd" if use_hnd else "nhd"
        self.head_dim = self.v_head_dim = HEAD_DIM
        self.start_layer = 10
        self.is_quantized_kv_cache = False
        shape = (PAGES, HEADS, PAGE, HEAD_DIM) if use_hnd else (PAGES * PAGE, HEADS, HEAD_DIM)
        store = torch.uint8 if dtype.itemsize == 1 else dtype
        self.k_buffer, self.v_buffer = ([torch.zeros(shape, dtype=store) for _ in range(3)] for _ in "kv")
        self.checked: list[Any] = []

    def _check_physical_write_loc(self, loc_info: Any, where: str) -> None:
        self.checked.append(loc_info)


class Derived(MHATokenToKVPool):
    pass


def tokens() -> tuple[Tensor, Tensor]:
    key, value = 30 * torch.randn(2, 5, HEADS, HEAD_DIM).bfloat16()
    key[0, 0, 0] = 1e6  # beyond the range
    return key, value


def refuse(*args: Any) -> None:
    pytest.fail("left to SGLang")


SLOTS = torch.tensor([3, 17, 60, 0, 33])


@pytest.mark.parametrize("use_hnd", [False, True], ids=["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize(
    "scales", [(None, None), (0.5, 2), (torch.tensor(0.5), torch.nn.Parameter(torch.tensor([2.0])))], ids=str
)
def test_bytes_are_the_references(scales: tuple[Any, Any], dtype: torch.dtype, use_hnd: bool) -> None:
    pool = MHATokenToKVPool(use_hnd=use_hnd, dtype=dtype)
    key, value = tokens()
    before = key.clone(), value.clone()
    loc = SimpleNamespace(loc=SLOTS)
    set_kv_buffer(refuse, pool, SimpleNamespace(layer_id=11), loc, key, value, *scales)
    assert pool.checked == [loc]
    assert torch.equal(key, before[0])
    assert torch.equal(value, before[1])
    name = "fp8_e4m3" if dtype == torch.float8_e4m3fn else "fp8_e5m2"
    expected = torch.zeros(2, PAGES, PAGE, HEADS, HEAD_DIM, dtype=torch.uint8)
    k_scale, v_scale = (
        torch.ones(1) if s is None else torch.tensor([float(s.item() if isinstance(s, Tensor) else s)]) for s in scales
    )
    reference.reshape_and_cache_flash(key, value, *expected, SLOTS, name, k_scale, v_scale)
    for buffers, stored in zip((pool.k_buffer, pool.v_buffer), expected, strict=True):
        in_pages = buffers[1].transpose(1, 2) if use_hnd else buffers[1].view(stored.shape)
        assert_same_bytes(in_pages.contiguous(), stored)
        assert not buffers[0].any()
        assert not buffers[2].any()


def test_another_layer_and_bare_slots() -> None:
    pool = MHATokenToKVPool()
    set_kv_buffer(refuse, pool, None, SLOTS.int(), *tokens(), layer_id_override=12)
    assert [bool(x.any()) for x in pool.k_buffer] == [False, False, True]


@pytest.mark.parametrize(
    "case",
    ["mask", "derived", "16 bits", "quantized", "layout", "head_dim", "scale dtype", "scales", "FP8 tokens"],
)
def test_what_is_left_to_sglang(case: str) -> None:
    pool: Any = MHATokenToKVPool()
    key, value = tokens()
    arguments: list[Any] = [None, None, None, None]
    match case:
        case "mask":
            arguments[3] = torch.ones(5, dtype=torch.bool)
        case "derived":
            pool = Derived()
        case "16 bits":
            pool = MHATokenToKVPool(dtype=torch.bfloat16)
        case "quantized":
            pool.is_quantized_kv_cache = True
        case "layout":
            pool.kv_cache_layout = "vectorized_5d"
        case "head_dim":
            pool.v_head_dim = 32
        case "scale dtype":
            arguments[0] = torch.ones(1, dtype=torch.float64)
        case "scales":
            arguments[1] = torch.ones(2)
        case "FP8 tokens":
            key = key.to(torch.float8_e4m3fn)
    seen: list[Any] = []
    layer = SimpleNamespace(layer_id=11)
    result = set_kv_buffer(lambda *args: seen.append(args) or "theirs", pool, layer, SLOTS, key, value, *arguments)
    assert result == "theirs"
    ((first, *rest),) = seen
    assert first is pool
    assert [x is y for x, y in zip(rest, [layer, SLOTS, key, value, *arguments], strict=True)] == [True] * 8
    assert not any(x.any() for x in pool.k_buffer)


# Registration


class HookType(Enum):
    AROUND = "around"


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    registered: list[Any] = []
    module = ModuleType("sglang.srt.plugins.hook_registry")
    names = SimpleNamespace(register=lambda *args: registered.append(args))
    vars(module).update(HookRegistry=names, HookType=HookType)
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        package = ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return registered


def test_nothing_happens_unless_it_is_asked_for(hooks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sglang.register()
    assert hooks == []
    monkeypatch.setenv("FP8KV_SGLANG_WRITES", "1")
    sglang.register()
    assert hooks == [(sglang.TARGET, set_kv_buffer, HookType.AROUND)]


def test_another_value_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8KV_SGLANG_WRITES", "on")
    with pytest.raises(ValueError, match=r'^fp8kv.sglang: FP8KV_SGLANG_WRITES must be "0" or "1", got \'on\'$'):
        sglang.register()


def test_a_sglang_without_plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8KV_SGLANG_WRITES", "1")
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", None)
    with pytest.raises(ImportError, match=r"^fp8kv.sglang: SGLang must be installed, in a version with plug-ins"):
        sglang.register()


def test_the_entry_point_of_the_package() -> None:
    pyproject = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."sglang.srt.plugins"]\nfp8kv = "fp8kv.sglang:register"\n' in pyproject


# A release

released = pytest.mark.skipif(FOLDER is None, reason="FP8KV_TEST_SGLANG names no unpacked wheel of SGLang")


@released
def test_the_pool_of_the_release() -> None:
    path = Path(FOLDER or "", "sglang", "srt", "mem_cache", "memory_pool.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    pool = next(x for x in ast.walk(tree) if isinstance(x, ast.ClassDef) and x.name == "MHATokenToKVPool")
    method = next(x for x in pool.body if isinstance(x, ast.FunctionDef) and x.name == "set_kv_buffer")
    assert [x.arg for x in method.args.args] == [
        "self", "layer", "loc_info", "cache_k", "cache_v", "k_scale", "v_scale", "layer_id_override",
        "dcp_kv_mask",
    ]  # fmt: skip
    source = ast.unparse(tree)
    for text in (
        "def _check_physical_write_loc(self, loc_info, where: str)",
        "def is_quantized_kv_cache(self) -> bool",
        "self.use_hnd = ",
        "self.kv_cache_layout = ",
        "self.start_layer = ",
        "(self.num_pages, self.head_num, self.page_size, self.head_dim)",
        "(rows, self.head_num, self.head_dim)",
        "self.k_buffer[layer_id - self.start_layer]",
    ):
        assert text in source


@released
def test_the_hooks_of_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are put around a method of that name, in a module of that name, which stands in for SGLang's."""
    path = Path(FOLDER or "", "sglang", "srt", "plugins", "hook_registry.py")
    namespace: Any = ModuleType("hook_registry")
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(namespace))
    for name in ("sglang", "sglang.srt", "sglang.srt.mem_cache", "sglang.srt.mem_cache.memory_pool"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in ("srt", "srt.mem_cache", "srt.mem_cache.memory_pool"):
        parent, _, child = f"sglang.{name}".rpartition(".")
        setattr(sys.modules[parent], child, sys.modules[f"sglang.{name}"])

    class Pool(MHATokenToKVPool):
        def set_kv_buffer(self, layer: Any, loc_info: Any, *args: Any, **kwargs: Any) -> Any:
            pytest.fail("left to SGLang")

    Pool.__name__ = "MHATokenToKVPool"
    module: Any = importlib.import_module("sglang.srt.mem_cache.memory_pool")
    module.MHATokenToKVPool = Pool
    namespace.HookRegistry.register(sglang.TARGET, set_kv_buffer, namespace.HookType.AROUND)
    namespace.HookRegistry.apply_hooks()
    pool: Any = Pool()
    pool.set_kv_buffer(SimpleNamespace(layer_id=10), SLOTS, *tokens(), 0.5, 0.5)
    assert pool.k_buffer[0].any()
