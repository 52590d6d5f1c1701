"""Every kernel that a small model launches compiles for a device that is not there, without spilling registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent.parent


def test_kernels_compile_for_compute_capability_9_without_a_device(tmp_path: Path) -> None:
    """In a process of its own: here Triton's kernels are the interpreter's."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.gpu_compile", "--only", "mini", "--cases", "1:identical"]
    found = subprocess.run(
        command,
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    [compiled] = json.loads(found.stdout.splitlines()[-1])["parts"].values()
    names = {one["name"] for one in compiled}
    assert names >= {"attend_kernel", "expand_kernel", "few_tokens_linear_kernel", "shrink_kernel"}
    assert {"rms_norm_kernel", "silu_mul_kernel", "turn_and_write_kernel", "write_kernel"} <= names
    assert all(one["num_registers"] > 0 for one in compiled)
    assert not [one for one in compiled if one["spilled_bytes"]]
