"""Imports between modules of the package, its dependencies, and its old names."""

from __future__ import annotations

import ast
import importlib
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import fp8kv
from checkpoint_files import make_checkpoint
from fp8kv import bench, cli
from fp8kv._checks import require
from fp8kv.calibration import _progress
from fp8kv.evaluation import inspection

PACKAGE = Path(str(fp8kv.__file__)).parent
#: Packages that `import fp8kv` must not need. PyTorch imports NumPy if installed.
OPTIONAL = ("rich", "typer", "matplotlib", "safetensors", "transformers", "huggingface_hub", "numpy")
#: Modules that may import the reference, the ground truth for everything else.
OF_THE_REFERENCE = ("fp8kv.reference", "fp8kv.cli.doctor")
#: What can be imported where an engine is installed only; tests/python/engines has its own.
OF_ENGINES = ("fp8kv.vllm.backend", "fp8kv.vllm.queries", "fp8kv.vllm.versions", "fp8kv.vllm.writes")


def module_name(path: Path) -> str:
    parts = ("fp8kv", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


class Imports(ast.NodeVisitor):
    """The modules of the package that a module imports at any time, except for types only."""

    def __init__(self, path: Path) -> None:
        self.found: set[str] = set()
        self.visit(ast.parse(path.read_text(encoding="utf-8")))

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) != "TYPE_CHECKING":
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {alias.name for alias in node.names} & MODULES.keys()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "imports are absolute"
        module = str(node.module)
        for alias in node.names:
            full = f"{module}.{alias.name}"
            self.found |= {full if full in MODULES else module} & MODULES.keys()


IMPORTS = {name: Imports(path).found for name, path in MODULES.items()}


def interpreter(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def python(code: str) -> str:
    """The output of a fresh interpreter."""
    result = interpreter(code)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def without(*modules: str) -> str:
    """A preamble that makes these packages unavailable to an interpreter."""
    return f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        missing = any((name + '.').startswith(module + '.') for module in {modules})
        return None if missing else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


def test_no_modules_import_each_other() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith(OF_THE_REFERENCE)])
def test_the_product_does_not_import_the_reference(name: str) -> None:
    assert [module for module in IMPORTS[name] if module.startswith("fp8kv.reference")] == []


def test_no_module_of_the_product_brings_the_reference_along() -> None:
    product = [name for name in MODULES if not name.startswith((*OF_THE_REFERENCE, "fp8kv.__main__", *OF_ENGINES))]
    code = f"import importlib, sys\nfor name in {product}: importlib.import_module(name)\n"
    assert python(code + "print('fp8kv.reference' in sys.modules)") == "False"


def test_the_reference_is_an_attribute_of_the_package() -> None:
    assert python("import fp8kv; print(fp8kv.reference.__name__)") == "fp8kv.reference"


def test_an_unknown_attribute_is_an_error() -> None:
    with pytest.raises(AttributeError, match="module 'fp8kv' has no attribute 'nothing'"):
        fp8kv.nothing  # noqa: B018


def public_lists() -> Iterator[tuple[str, ModuleType]]:
    for name in MODULES:
        if name not in ("fp8kv.__main__", *OF_ENGINES):
            module = importlib.import_module(name)
            if hasattr(module, "__all__"):
                yield name, module


def test_every_name_in_every_list_of_public_names_exists() -> None:
    lists = dict(public_lists())
    assert {"fp8kv", "fp8kv.reference", "fp8kv.kv_cache", "fp8kv.nn", "fp8kv.checkpoint"} <= lists.keys()
    for name, module in lists.items():
        assert len(set(module.__all__)) == len(module.__all__), name
        for public in module.__all__:
            assert hasattr(module, public), f"{name}.{public}"


def test_the_reference_has_every_operator_of_the_package() -> None:
    import torch

    operators = {name for name in fp8kv.__all__ if hasattr(torch.ops.fp8kv, name)}
    assert "rope_quant_and_cache" in operators
    assert operators <= set(fp8kv.reference.__all__)


# Other packages


def test_import_needs_pytorch_alone() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import fp8kv\n"
        f"print([name for name in {OPTIONAL} if name in set(sys.modules) - before])"
    )
    assert python(code) == "[]"


PYTORCH_ALONE = """
import runpy, warnings
warnings.simplefilter("ignore")  # PyTorch misses NumPy
import torch, fp8kv
from fp8kv import reference

FP8 = torch.float8_e4m3fn
x = torch.linspace(-3, 3, 3 * 2 * 64).view(3, 2, 64)
flat, one, slots = x.flatten(1), torch.ones(1), torch.tensor([0, 1, 5])

def results(ops):
    q, dynamic_q, query = (torch.empty(shape, dtype=FP8) for shape in (flat.shape, flat.shape, x.shape))
    amax, token_scale, back = torch.zeros(3), torch.empty(3), torch.empty_like(flat)
    key, value = torch.empty(2, 3, 2, 64)
    caches, dynamic_caches, step_caches = torch.zeros(3, 2, 4, 16, 2, 64, dtype=FP8)
    scale_caches = torch.zeros(2, 4, 16, 2)
    ops.static_scaled_fp8_quant(q, flat, one)
    ops.dynamic_scaled_fp8_quant(dynamic_q, flat, token_scale, None, (1, -1))
    ops.scaled_fp8_dequant(back, dynamic_q, token_scale, (1, -1))
    ops.group_amax(amax, flat, (1, -1))
    ops.reshape_and_cache_flash(x, -x, *caches, slots, "fp8", one, one)
    ops.reshape_and_cache_flash_dynamic(x, -x, *dynamic_caches, *scale_caches, slots, "fp8")
    table = flat[:, :64].repeat(2, 1)
    ops.rope_quant_and_cache(
        x, x, -x, query, *step_caches, slots, "fp8", one, one, one, slots, table)
    block_table, sums = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    ops.gather_and_dequant_cache(*caches, key, value, block_table, sums, "fp8", one, one)
    return (q, dynamic_q, token_scale, back, amax, caches, dynamic_caches, scale_caches, query,
            step_caches, key, value)

for ours, theirs in zip(results(fp8kv), results(reference), strict=True):
    assert ours.view(torch.uint8).any()
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))

cache = fp8kv.PagedKVCache(4, 16, 2, 64)
scales = fp8kv.AttentionScales(2, 2, 64)
scales.update_cache(x.sign(), x.sign(), cache, slots[:2])
print(cache.gather(torch.tensor([[0]]), [2])[0].unique().tolist())
loaded = fp8kv.load_kv_scales(sys.argv[1])
fp8kv.AttentionScales(8, 4, 16, strategy="attn_head").load_scales(loaded[0])
print(len(loaded), loaded[0].k.shape)
runpy.run_module("fp8kv", run_name="__main__")
"""


def test_the_library_works_with_pytorch_alone(tmp_path: Path) -> None:
    """Every operator, a cache, scales and a checkpoint work; the command line names missing packages."""
    make_checkpoint(tmp_path)
    result = interpreter(without(*OPTIONAL, "fp8kv._introspect") + PYTORCH_ALONE, str(tmp_path))
    assert result.stdout.splitlines() == ["[-1.0, 1.0]", "3 torch.Size([4])"], result.stderr
    assert result.stderr == ("error: fp8kv: rich must be installed, for example with pip install 'fp8kv[cli]'\n")
    assert result.returncode == 1


def test_the_library_works_without_its_introspection() -> None:
    code = without("fp8kv._introspect") + (
        "import torch, fp8kv\n"
        "from fp8kv.cli import doctor\n"
        "isa = fp8kv.build_info()['cpu_isa']\n"
        "found = {check.name: check.ok for check in doctor.checks()}\n"
        "print(found['introspection'], found[f'self-test on CPU, {isa}'])\n"
        "print([name for name in found if name.startswith('self-test on CPU')])"
    )
    isa = fp8kv.build_info()["cpu_isa"]
    assert python(code).splitlines() == ["None True", f"['self-test on CPU, {isa}']"]


def test_a_missing_module_is_a_sentence_that_says_what_to_install() -> None:
    with pytest.raises(ImportError) as caught:
        require("no_such_module", "plot", "a picture")
    sentence = "a picture: no_such_module must be installed, for example with pip install 'fp8kv[plot]'"
    assert str(caught.value) == sentence
    assert caught.value.name == "no_such_module"


def import_the_cache() -> None:
    sys.modules.pop("fp8kv.transformers", None)
    importlib.import_module("fp8kv.transformers")


def draw_a_bar() -> None:
    with _progress.bar("x", 1):
        pytest.fail("rich is there")


NOTHING = inspection.Inspection("model", None, [], [])


@pytest.mark.parametrize(
    ("missing", "action", "what", "extra"),
    [
        ("typer", cli.main, "error: fp8kv", "cli"),
        ("rich", lambda: runpy.run_module("fp8kv", run_name="__main__"), "error: fp8kv", "cli"),
        ("transformers", import_the_cache, "fp8kv.transformers", "transformers"),
        ("matplotlib", lambda: inspection.plot(NOTHING, Path("x.png")), "a picture", "plot"),
        ("rich", lambda: inspection.table(NOTHING), "a table", "cli"),
        ("rich", draw_a_bar, "a progress bar", "cli"),
        ("numpy", lambda: bench.run("cpu", quick=True), "fp8kv.bench on the CPU", "cli"),
    ],
    ids=["console script", "python -m fp8kv", "Fp8Cache", "picture", "table", "progress", "bench"],
)
def test_what_needs_a_missing_package_says_what_to_install(
    missing: str,
    action: Callable[[], object],
    what: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "fp8kv.transformers", sys.modules.get("fp8kv.transformers"))
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises((ImportError, SystemExit)) as caught:
        action()
    assert str(caught.value) == (f"{what}: {missing} must be installed, for example with pip install 'fp8kv[{extra}]'")


# Old names

MOVED = {
    "attention_scales": "nn.attention_scales",
    "demo": "cli.demo",
    "doctor": "cli.doctor",
    "inspection": "evaluation.inspection",
    "observations": "nn.statistics",
    "observers": "calibration.observers",
    "quant_fp8": "nn.quant_fp8",
    "texts": "calibration.texts",
}


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_name_is_the_module_of_the_new_name(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, f"fp8kv.{old}", raising=False)
    monkeypatch.delitem(vars(fp8kv), old, raising=False)
    expected = importlib.import_module(f"fp8kv.{new}")
    spec = expected.__spec__
    with pytest.warns(DeprecationWarning, match=f"^fp8kv.{old} is now fp8kv.{new}$") as warned:
        assert importlib.import_module(f"fp8kv.{old}") is expected
    assert len(warned) == 1
    assert getattr(fp8kv, old) is expected
    assert (expected.__name__, expected.__spec__) == (f"fp8kv.{new}", spec)


def test_the_warning_shows_the_line_that_uses_the_old_name(tmp_path: Path) -> None:
    lines = {
        "observers": "import fp8kv.observers",
        "doctor": "from fp8kv import doctor",
        "observations": "from fp8kv.observations import Observed",
        "texts": "fp8kv.texts",
    }
    script = tmp_path / "script.py"
    script.write_text("\n".join(lines.values()))
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    for number, old in enumerate(lines, 1):
        warning = f"{script}:{number}: DeprecationWarning: fp8kv.{old} is now fp8kv.{MOVED[old]}"
        assert result.stderr.count(warning) == 1, result.stderr


def test_names_of_the_modules_that_moved_are_the_same_objects() -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore'); import fp8kv\n"
        "from fp8kv.attention_scales import AttentionScales\n"
        "from fp8kv.observations import Observations, Observed\n"
        "from fp8kv.observers import MinMaxObserver\n"
        "import fp8kv.calibration.observers as observers\n"
        "print(AttentionScales is fp8kv.AttentionScales, Observations is fp8kv.Observations,\n"
        "      MinMaxObserver is observers.MinMaxObserver)"
    )
    assert python(code) == "True True True"


def test_names_that_stay_warn_of_nothing() -> None:
    names = ["bench", "calibration", "checkpoint", "evaluation", "kv_cache", "reference", "transformers"]
    names.append("group_shape")
    code = (
        "import importlib, torch, transformers, warnings\n"
        "warnings.simplefilter('error', DeprecationWarning)\n"
        f"for name in {names}: print(importlib.import_module(f'fp8kv.{{name}}').__name__)"
    )
    assert python(code).split() == [f"fp8kv.{name}" for name in names]


def test_quantize_is_the_function_and_its_old_module_still_gives_names() -> None:
    code = (
        "import fp8kv.quantize as quantize\n"
        "from fp8kv.quantize import group_amax\n"
        "import fp8kv, fp8kv.quantize, fp8kv.quantization\n"
        "print(quantize is fp8kv.quantize is fp8kv.quantization.quantize, group_amax is fp8kv.group_amax)"
    )
    assert python(code) == "True True"
