"""Kernels that may start before their predecessor has ended access no memory before they wait for it.

ptxas may move a load of read-only memory across the wait, so the machine code is what counts. Not run without the CUDA
operators, or where there is no cuobjdump, which the CUDA Toolkit and Triton bring.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fp8kv import _introspect

LIBRARY = Path(_introspect.__file__).with_name("_ops_cuda.so")
#: Kernels that are launched with cuda::launch_dependent or LaunchShape::dependent, in mangled names.
DEPENDENT = re.compile(
    r"append_|gather_|attention_|merge_parts|elementwise_"
    r"|quantize_(groups|rows_|units_contiguous|elements|across_groups|redundant)"
)
WAIT = re.compile(r"\bACQBULK\b")
ACCESS = re.compile(r"\b(LDG|LDGSTS|LD|STG|ST|ATOMG|ATOM|RED)\.")


def cuobjdump() -> str:
    triton = importlib.util.find_spec("triton")
    with_triton = Path(str(triton.origin)).parent / "backends/nvidia/bin" if triton else Path()
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(with_triton))
    if found is None:
        pytest.skip("cuobjdump is not installed")
    return found


def early_accesses(code: str) -> dict[str, list[str]]:
    """For each kernel of `DEPENDENT` in a disassembly, what it accesses before its wait; all if it has none."""
    result = {}
    for function in code.split("Function : ")[1:]:
        name, *lines = function.splitlines()
        if DEPENDENT.search(name):
            wait = next((i for i, line in enumerate(lines) if WAIT.search(line)), len(lines))
            result[name] = [line.strip() for line in lines[:wait] if ACCESS.search(line)]
    return result


def test_the_search_finds_a_load_before_the_wait() -> None:
    code = "Function : gather_x\n/*0*/ LDG.E.CONSTANT R1 ;\n/*1*/ ACQBULK ;\n/*2*/ STG.E R1 ;\nFunction : other\n LDG.E R2 ;\n"
    assert early_accesses(code) == {"gather_x": ["/*0*/ LDG.E.CONSTANT R1 ;"]}


def test_no_kernel_reads_before_it_waits(tmp_path: Path) -> None:
    if not LIBRARY.exists():
        pytest.skip("built without CUDA")
    tool = cuobjdump()
    subprocess.run([tool, "-xelf", "all", str(LIBRARY)], cwd=tmp_path, check=True, capture_output=True)
    cubins = [x for x in tmp_path.glob("*.cubin") if DEPENDENT.search(x.read_bytes().decode("latin-1"))]
    cubins = [x for x in cubins if not re.search(r"sm_8\d", x.name)]  # which have no dependent launches

    def of(cubin: Path) -> dict[str, list[str]]:
        return early_accesses(subprocess.run([tool, "-sass", str(cubin)], check=True, capture_output=True, text=True).stdout)

    with ThreadPoolExecutor(2) as pool:
        found = {name: accesses for kernels in pool.map(of, cubins) for name, accesses in kernels.items()}
    assert len(found) > 100
    assert {name: accesses for name, accesses in found.items() if accesses} == {}
