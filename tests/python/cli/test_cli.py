"""The command line, as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fp8kv
from command_line import PNG, output_of
from fp8kv import bench, cli
from fp8kv.cli import _app, doctor

runner = CliRunner()
Wrong = Callable[[torch.Tensor], object]


def test_python_m_fp8kv_shows_the_commands() -> None:
    result = subprocess.run([sys.executable, "-m", "fp8kv", "--help"], capture_output=True, text=True, check=True)
    for command in ("doctor", "bench", "demo", "eval"):
        assert command in result.stdout


# doctor


def test_doctor_is_content() -> None:
    output = output_of("doctor")
    assert fp8kv.__version__ in output
    assert f"PyTorch: {torch.__version__}" in output
    assert "self-test on CPU" in output
    assert "FAIL" not in output


def test_doctor_tests_every_instruction_set_and_leaves_the_one_in_use() -> None:
    before = fp8kv.build_info()["cpu_isa"]
    names = [check.name for check in doctor.checks()]
    for isa in fp8kv.build_info()["cpu_isas"]:
        assert f"self-test on CPU, {isa}" in names
    assert fp8kv.build_info()["cpu_isa"] == before


def test_the_self_test_passes(device: torch.device) -> None:
    assert doctor.self_test(device) == []


def test_doctor_exits_with_1_when_bytes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = fp8kv.quantize

    def off_by_one(*args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        q, scale = honest(*args, **kwargs)
        q.view(torch.uint8)[0, 0] ^= 1
        return q, scale

    monkeypatch.setattr(fp8kv, "quantize", off_by_one)
    result = runner.invoke(_app.app, ["doctor"])
    assert result.exit_code == 1
    assert "FAIL" in result.output
    assert "static_scaled_fp8_quant (bfloat16, float8_e4m3fn, per token)" in result.output.replace("\n", " ")


@pytest.mark.parametrize("wrong", [lambda x: x.mul_(1.01), lambda x: x.view(-1)[7].add_(0.1)], ids=["all", "one"])
def test_doctor_sees_attention_that_is_not_near(monkeypatch: pytest.MonkeyPatch, wrong: Wrong) -> None:
    honest = fp8kv.paged_attention

    def off(*args: object, **kwargs: object) -> torch.Tensor:
        out = honest(*args, **kwargs)
        wrong(out)
        return out

    monkeypatch.setattr(fp8kv, "paged_attention", off)
    failures = doctor.self_test("cpu")
    assert len(failures) == 3 * 2 * 4
    assert "paged_attention (bfloat16, float8_e5m2, per token and head)" in failures


@pytest.mark.parametrize(
    ("given", "complete"),
    [
        ("doctor --json", "doctor --json -"),
        ("bench decode --json --only rope", "bench decode --json - --only rope"),
        ("bench --json - --quick", "bench --json - --quick"),
        ("bench --json out.json", "bench --json out.json"),
        ("doctor", "doctor"),
    ],
)
def test_json_without_a_file_means_stdout(given: str, complete: str) -> None:
    assert cli.arguments(given.split()) == complete.split()


def test_the_command_of_doctor_writes_json_alone() -> None:
    result = subprocess.run([sys.executable, "-m", "fp8kv", "doctor", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["ok"] is True


def test_doctor_writes_json(tmp_path: Path) -> None:
    result = runner.invoke(_app.app, ["doctor", "--json", "-"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["ok"] is True
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["PyTorch"]["ok"] is True
    assert checks["PyTorch"]["detail"].startswith(torch.__version__)
    assert all(set(tip) == {"name", "detail"} for tip in found["faster"])


def test_a_failure_is_in_the_json_of_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "self_test", lambda device: ["some_operator"])
    result = runner.invoke(_app.app, ["doctor", "--json", "-"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["ok"] is False
    assert {
        "name": f"self-test on CPU, {fp8kv.build_info()['cpu_isa']}",
        "ok": False,
        "detail": "some_operator",
    } in (found["checks"])


def test_what_would_make_it_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    info = fp8kv.build_info() | {"cpu_isa": "generic", "cpu_isas": ["generic", "avx2"]}
    monkeypatch.setattr(fp8kv, "build_info", lambda: info)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 1000)
    found = {check.name: check.detail for check in doctor.advice()}
    assert found["FP8KV_CPU_ISA"] == "without it the CPU kernels use avx2, not generic"
    assert found["OMP_NUM_THREADS"] == f"operators on the CPU use {torch.get_num_threads()} of 1000 CPUs"
    assert ("GPU" in found) == (not torch.cuda.is_available())


def test_what_a_build_without_cuda_needs_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    info = fp8kv.build_info() | {"cuda_architectures": None}
    monkeypatch.setattr(fp8kv, "build_info", lambda: info)
    monkeypatch.setattr(doctor.cuda, "is_available", lambda: True)
    found = {check.name: check.detail for check in doctor.advice()}
    assert found["CUDA library"] == "install an nvcc of version 12.8 or newer and fp8kv again, to use the GPU"


def test_nothing_is_said_of_what_is_at_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    info = fp8kv.build_info()
    monkeypatch.setattr(fp8kv, "build_info", lambda: info | {"cpu_isa": info["cpu_isas"][-1]})
    assert {check.name for check in doctor.advice()} <= {"GPU", "FP8KV_PDL", "CUDA architectures"}


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("90-real", (9, 0), True),
        ("90-real", (10, 0), False),
        ("90-real", (8, 9), False),
        ("80-real;90-real", (8, 9), True),
        ("120-virtual", (12, 1), True),
        ("120-virtual", (10, 0), False),
        ("90", (12, 0), True),
        ("90a-real", (9, 0), True),
        ("90a-real", (10, 0), False),
        ("80-real;89-real;90-real;100-real;120-real;120-virtual", (10, 3), True),
    ],
)
def test_which_architectures_run_on_which_gpu(architectures: str, capability: tuple[int, int], runs: bool) -> None:
    assert doctor.architecture_runs(architectures, *capability) is runs


# bench

QUANTIZATION = {"static tensor", "static token"}
CACHE = {"append tensor NHD", "append tensor HND", "append token-head NHD"}


@pytest.mark.parametrize(
    ("what", "only", "works"),
    [
        ([], "static t", QUANTIZATION),
        (["quantize"], "static t", QUANTIZATION),
        (["cache"], "append t", CACHE),
        (["decode"], "step rope", {"step rope NHD", "step rope HND", "step rope int8 channel NHD"}),
    ],
    ids=["default", "quantize", "cache", "decode"],
)
def test_bench_writes_table_json_and_picture(
    device: torch.device, what: list[str], only: str, works: set[str], tmp_path: Path
) -> None:
    numbers, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    output = output_of(
        "bench", *what, "--quick", "--device", str(device), "--only", only,
        "--json", str(numbers), "--plot", str(picture),
    )  # fmt: skip
    bench.Report.read_json(numbers).write_json(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == numbers.read_text()
    report = json.loads(numbers.read_text())
    assert report["torch"] == torch.__version__
    assert report["fp8kv"] == fp8kv.__version__
    assert report["device"]
    assert {row["work"] for row in report["rows"]} == works
    for row in report["rows"]:
        assert row["work"] in output
        assert row["us"] > 0
        assert row["floor_us"] > 0
        assert row["share"] == pytest.approx(row["floor_us"] / row["us"], rel=0.01, abs=2e-4)
    assert "torch.zero_" in report["host"]
    assert picture.read_bytes().startswith(PNG)


def test_bench_refuses_what_matches_nothing() -> None:
    result = runner.invoke(_app.app, ["bench", "--device", "cpu", "--only", "no such work"])
    assert result.exit_code == 2
    assert "no work matches" in result.output


def test_bench_refuses_an_unknown_benchmark() -> None:
    result = runner.invoke(_app.app, ["bench", "nothing", "--device", "cpu"])
    assert result.exit_code == 2
    sentence = " ".join(result.output.replace("│", " ").split())
    assert 'what must be "quantize", "cache", "decode" or "attention", got "nothing"' in sentence


def test_bench_writes_json_to_stdout_and_nothing_else() -> None:
    result = runner.invoke(_app.app, ["bench", "--quick", "--device", "cpu", "--only", "static tensor", "--json", "-"])
    assert result.exit_code == 0
    assert {row["work"] for row in json.loads(result.stdout)["rows"]} == {"static tensor"}


def test_bench_of_attention_writes_tables_json_and_picture(tmp_path: Path) -> None:
    numbers, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    output = output_of(
        "bench", "attention", "--quick", "--device", "cpu", "--only", "decode head NHD|ragged",
        "--json", numbers, "--plot", picture,
    )  # fmt: skip
    report = bench.Report.read_json(numbers)
    assert (report.what, report.against) == ("attention", "read")
    assert {row.work for row in report.rows} == {"decode head NHD", "ragged head NHD"}
    assert all(row.errors["fp8kv"] <= 2.5e-3 for row in report.rows)
    for words in ("share of read", "Compared with peers", "gather", "SDPA", "paged_attention"):
        assert words in output
    assert picture.read_bytes().startswith(PNG)


def test_bench_of_attention_on_cuda(cuda: torch.device, tmp_path: Path) -> None:
    numbers = tmp_path / "bench.json"
    output_of("bench", "attention", "--quick", "--device", "cuda", "--only", "decode head NHD", "--json", numbers)
    assert all(row.errors["fp8kv"] <= 2.5e-3 for row in bench.Report.read_json(numbers).rows)
