"""What the plug-in for vLLM does, and refuses, before anything is served."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_standins
from vllm_layer import config

import fp8kv
from checkpoint_files import make_checkpoint
from fp8kv.vllm.scales import check_at_start

BACKEND = "fp8kv.vllm.backend.Fp8KVBackend"


@pytest.fixture
def plugin(vllm: str) -> Iterator[Any]:
    """The package, as vLLM finds it in a new process, but for what the registry has of other tests."""
    vllm_standins.forget_the_plugin()
    yield importlib.import_module("fp8kv.vllm")
    vllm_standins.forget_the_plugin()


def registry() -> Any:
    return importlib.import_module("vllm.v1.attention.backends.registry")


# Asked for


def test_the_entry_point_of_the_package() -> None:
    pyproject = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."vllm.general_plugins"]\nfp8kv = "fp8kv.vllm:register"\n' in pyproject


def test_the_backend_is_known_under_its_name(plugin: Any) -> None:
    """As often as the processes of vLLM ask for it; FLASH_ATTN stays vLLM's."""
    before = registry().AttentionBackendEnum["FLASH_ATTN"].get_path()
    plugin.register()
    plugin.register()
    versions = importlib.import_module("fp8kv.vllm.versions")
    added = hasattr(registry().AttentionBackendEnum, "register")
    assert ("FP8KV" if added else "CUSTOM") == versions.BACKEND_NAME
    assert registry().AttentionBackendEnum[versions.BACKEND_NAME].get_path() == BACKEND
    module, name = BACKEND.rsplit(".", 1)
    assert getattr(importlib.import_module(module), name).get_name() == versions.BACKEND_NAME
    assert registry().AttentionBackendEnum["FLASH_ATTN"].get_path() == before


def test_a_backend_of_another_plug_in_stays(plugin: Any, caplog: pytest.LogCaptureFixture) -> None:
    names = registry()
    custom = names.AttentionBackendEnum["CUSTOM"]
    before = custom.get_path() if custom.is_overridden() else BACKEND
    names.register_backend(custom, "other.Backend")
    try:
        with caplog.at_level(logging.WARNING, logger="vllm.fp8kv"):
            plugin.register()
        assert custom.get_path() == "other.Backend"
        own_name = hasattr(names.AttentionBackendEnum, "register")
        assert ("CUSTOM is other.Backend already" in caplog.text) == (not own_name)
    finally:
        names.register_backend(custom, before)


@pytest.mark.parametrize("writes", ["0", "1"])
def test_registering_imports_no_backend(writes: str) -> None:
    """It happens in every process of vLLM, before configuration."""
    code = (
        "import os, sys; sys.path.insert(0, 'tests/python/engines'); import vllm_standins\n"
        f"os.environ['FP8KV_VLLM_WRITES'] = '{writes}'\n"
        "sys.modules.update(vllm_standins.modules('0.26'))\n"
        "from fp8kv.vllm import register; register()\n"
        "print([name for name in sys.modules if name in ('fp8kv.vllm.backend', 'fp8kv.vllm.writes')])"
    )
    root = Path(__file__).parents[3]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert result.stdout.strip() == "[]"


def test_a_vllm_that_lacks_an_interface(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A warning if nothing was asked for, else an error."""
    vllm_standins.forget_the_plugin()
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.utils", None)
    plugin = importlib.import_module("fp8kv.vllm")
    sentence = "fp8kv.vllm: vLLM must be installed, in a version with the attention backends of 0.26 or newer ("
    with caplog.at_level(logging.WARNING, logger="vllm.fp8kv"):
        plugin.register()
    assert sentence in caplog.text
    assert "its backend is unavailable" in caplog.text
    monkeypatch.setenv("FP8KV_VLLM_WRITES", "1")
    plugin.settings.cache_clear()
    with pytest.raises(ImportError) as caught:
        plugin.register()
    assert str(caught.value).startswith(sentence)
    vllm_standins.forget_the_plugin()


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"FP8KV_VLLM_WRITES": "yes"}, 'FP8KV_VLLM_WRITES must be "0" or "1", got \'yes\''),
        ({"FP8KV_VLLM_OBSERVE": "-1"}, "FP8KV_VLLM_OBSERVE must be a number of tokens, got '-1'"),
        ({"FP8KV_VLLM_PREFILL": "fast"}, 'FP8KV_VLLM_PREFILL must be "gather" or "paged", got \'fast\''),
        (
            {"FP8KV_VLLM_WRITES": "1", "FP8KV_VLLM_OBSERVE": "9"},
            "FP8KV_VLLM_OBSERVE must be 0 with FP8KV_VLLM_WRITES=1, as FLASH_ATTN quantizes queries too and "
            "their scales are not calculated, got 9",
        ),
    ],
    ids=["writes", "observe", "prefill", "both"],
)
def test_variables_with_other_values(
    plugin: Any, variables: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as caught:
        plugin.register()
    assert str(caught.value) == f"fp8kv.vllm: {sentence}"


# Scales


def layer(k: Any = 0.03, v: Any = 0.02, q: Any = 0.01, dtype: str = "fp8", target: str | None = None) -> Any:
    k, v, q = (torch.tensor(x, dtype=torch.float32) for x in (k, v, q))
    return SimpleNamespace(
        num_kv_heads=2,
        kv_cache_dtype=dtype,
        _k_scale=k,
        _v_scale=v,
        _q_scale=q,
        kv_sharing_target_layer_name=target,
    )


def start(layers: dict[str, Any], letters: str = "kv", observe: int = 0, **changes: Any) -> None:
    vllm_config = config(**changes)
    vllm_config.compilation_config.static_forward_context = layers
    check_at_start(vllm_config, list(layers), letters=letters, observe=observe)


WAY_OUT = "calibrate the model again, for example with fp8kv calibrate, or serve it with --kv-cache-dtype auto"


@pytest.mark.parametrize(
    ("scales", "sentence"),
    [
        ({"k": 0.0}, "k_scale of a.1 must be finite and above 0 in fp32, got 0.0"),
        ({"v": [0.5, torch.nan]}, "v_scale of a.1 must be finite and above 0 in fp32, got nan for head 1"),
        (
            {"k": [1.0, 2.0, 3.0]},
            "k_scale of a.1 must have 1 or 2 elements, the KV heads of this rank, got 3",
        ),
        (
            {"target": "a.0", "v": 0.5},
            "a.1 reads the cache of another layer and must have its scales, got others",
        ),
    ],
    ids=["zero", "nan", "number", "shared"],
)
def test_scales_that_are_refused(scales: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        start({"a.0": layer(), "a.1": layer(**scales)})
    assert str(caught.value) == f"fp8kv.vllm: {sentence}; {WAY_OUT}"


def test_scales_of_queries_matter_where_they_are_used() -> None:
    layers = {"a.0": layer(q=0.0)}
    start(layers)
    with pytest.raises(ValueError, match=r"^fp8kv.vllm: q_scale of a.0 must be finite and above 0"):
        start(layers, letters="qkv")


def test_layers_that_share_a_cache_and_its_scales() -> None:
    start({"a.0": layer(k=[0.5]), "a.1": layer(k=0.5, target="a.0")})


def test_made_up_weights_and_caches_without_scales_are_not_checked() -> None:
    start({"a.0": layer(k=-1.0)}, load_config=SimpleNamespace(load_format="dummy"))
    start({"a.0": layer(k=-1.0, dtype="auto"), "a.1": layer(k=-1.0, dtype="fp8_per_token_head")})


def test_scales_of_1_are_not_silent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm.fp8kv"):
        start({"a.0": layer(k=1.0), "a.1": layer(v=[1.0, 1.0])})
        assert caplog.text == ""
        start({"a.0": layer(), "a.1": layer(k=1.0, v=[1.0, 1.0])})
    assert "1 of 2 layers have no scales, a.1 the first of them: their K and V are quantized with 1.0" in (caplog.text)


def test_a_checkpoint_that_the_audit_refuses(tmp_path: Path) -> None:
    """vLLM would take 1.0 for the layer that has no scales."""
    make_checkpoint(tmp_path)
    start({"a.0": layer()}, model_config=SimpleNamespace(model=str(tmp_path)))
    from safetensors.torch import load_file, save_file

    file = next(tmp_path.glob("*.safetensors"))
    tensors = {name: x for name, x in load_file(file).items() if ".1." not in name}
    save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"^fp8kv.vllm: the scales of {tmp_path} can't be used: "):
        start({"a.0": layer()}, model_config=SimpleNamespace(model=str(tmp_path)))


def test_what_vllm_does_not_read_is_not_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "fp8kv").mkdir()
    (tmp_path / "fp8kv" / "scales.json").write_text("damaged")
    assert "fp8kv-damaged" in [problem.kind for problem in fp8kv.audit_checkpoint(tmp_path)]
    start({"a.0": layer()}, model_config=SimpleNamespace(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("layers", "changes", "what"),
    [
        ({"a.0": layer()}, {"kv_transfer_config": SimpleNamespace()}, "a KV connector"),
        (
            {"a.0": layer(), "a.1": layer(target="a.0")},
            {},
            "a.1, which reads the cache of another layer",
        ),
    ],
    ids=["engines", "layers"],
)
def test_scales_do_not_change_while_a_cache_is_shared(layers: dict[str, Any], changes: dict[str, Any], what: str) -> None:
    start(layers, **changes)
    with pytest.raises(ValueError) as caught:
        start(layers, observe=100, **changes)
    assert str(caught.value) == (
        f"fp8kv.vllm: FP8KV_VLLM_OBSERVE must be 0 with {what}, as all that share a cache must have the same scales"
    )
