"""The tests of a GPU run without one, up to each launch, and need nothing that a GPU machine may lack."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import stand_ins

from patience import patience

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
REFUSE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"hypothesis", "xdist", "pytest_timeout", "transformers", "accelerate", "matplotlib", "rich"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""


def pytest_in(*arguments: str, path: list[Path], seconds: float) -> str:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(seconds), env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_they_need_nothing_beyond_pytest_torch_triton_numpy_and_einops(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(REFUSE)
    without = [option for name in ("xdist", "timeout", "hypothesispytest") for option in ("-p", f"no:{name}")]
    said = pytest_in("--collect-only", "-q", *without, path=[tmp_path, ROOT], seconds=120)
    assert "test_errors_stay_within_the_budget[causal-none-S4096-D128-Dv128-H8-2-B2-bf16]" in said


@pytest.mark.skipif(bool(stand_ins.why_not()), reason=stand_ins.why_not() or "nothing is missing")
def test_todays_sample_runs_up_to_each_launch():
    said = pytest_in("-p", "pretended_gpu", "-q", "--pretend-sample", "8", path=[HERE, ROOT], seconds=200)
    assert "8 passed" in said


@pytest.mark.slow
@pytest.mark.timeout(5000)
@pytest.mark.parametrize("capability", [86, 90, 100])
@pytest.mark.skipif(bool(stand_ins.why_not()), reason=stand_ins.why_not() or "nothing is missing")
def test_they_run_up_to_each_launch_compiled(capability: int):
    """Each kernel of each test finds the shared memory that it asks for."""
    options = ["--pretend-capability", str(capability), "--pretend-compiles"]
    pytest_in("-p", "pretended_gpu", "-q", *options, path=[HERE, ROOT], seconds=1500)
