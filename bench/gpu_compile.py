"""Compile what the GPU benches launch, for a device that is not there: does it compile, and what does it take?

Triton needs no device to compile, and its interpreter, in which kernels are tested on a CPU, knows nothing of types,
registers or shared memory. So the benches run here over one layer of the real shape, with kernels that are compiled
and never launched, and with torch's own large products left out: all numbers are zeros.

    python -m bench.gpu_compile                                    # for compute capability 9.0: H100, H200
    python -m bench.gpu_compile --only mini --dtypes float32,bfloat16
    TRITON_CACHE_DIR=triton-cache python -m bench.gpu_compile      # then carry the folder to the device: the same
    TRITON_CACHE_DIR=triton-cache python -m bench.gpu_all ...      # Triton on the same Python finds all compiled

The exit status is 1 if something does not compile, or spills registers in 16 bits. The last line of stdout is JSON.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined, so before the imports below

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from adapterd.model import int8, kernels, launch_triton, runner, seams
from adapterd.model.base import Base
from adapterd.model.cuda_graphs import GraphedForward
from adapterd.model.kv import KVPool
from adapterd.model.lora_triton import TritonLoraStep
from bench import gpu_decode, gpu_upload

_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_SHARED_BYTES = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}
"""Of one program at most, by compute capability. Source: CUDA C++ programming guide, technical specifications."""

_NUM_PROCESSORS = 132
"""Of an H100 or H200: tilings depend on it."""

_FRESH_BYTES = 64 << 20
"""So much memory comes from the system, zeroed, and takes none of the machine's until it is touched."""

PARTS: dict[str, list[str]] = {
    "decode": [],
    "int8": ["--quantization", "int8", "--cases", "1:base,32:base,32:distinct", "--prefill", "512"],
    "mini": ["--shape", "mini", "--cases", "1:base,16:distinct", "--prefill", "", "--output-tokens", "8"],
    "upload": [],
}


@dataclass(frozen=True)
class Compiled:
    """What one variant of a kernel takes of a processor. Bytes."""

    name: str
    num_registers: int
    spilled_bytes: int
    shared_bytes: int


class CompileOnly:
    """Triton's driver of a device that is not there. `compiled` is every variant that would have been loaded."""

    def __init__(self, capability: int) -> None:
        self._capability = capability
        self.compiled: list[Compiled] = []
        self.utils = self  # Triton asks the driver's `utils` for the two below

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED_BYTES[self._capability], "multiprocessor_count": _NUM_PROCESSORS}

    def load_binary(
        self, name: str, binary: bytes, shared_bytes: int, *others: object
    ) -> tuple[object, int, int, int, int]:
        """(module, function, registers, spilled, most threads) of what is not loaded."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            command = [str(_BINARIES / "cuobjdump"), "-res-usage", file.name]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = (int(re.findall(rf"{what}:(\d+)", said)[-1]) for what in ("REG", "STACK"))
        self.compiled.append(Compiled(name, registers, stack, shared_bytes))
        return object(), 1, registers, stack, 1024

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *arguments, **keywords: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _run_again(forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """In place of a CUDA graph."""
    forward()
    return forward


def _graphs(base: Base, kv: KVPool, max_num_seqs: int, has_adapters: bool) -> GraphedForward:
    assert isinstance(base.lora_step, TritonLoraStep)
    graphs = GraphedForward(base, base.lora_step, kv, max_num_seqs, _run_again)
    with torch.inference_mode():
        graphs.record_all(has_adapters)
    return graphs


@contextlib.contextmanager
def no_device(capability: int) -> Iterator[CompileOnly]:
    """Inside, models on the CPU run the kernels of a device, which are compiled only, over zeros."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def zeroed(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*arguments: Any, **keywords: Any) -> torch.Tensor:
            tensor = make(*arguments, **keywords)
            is_fresh = tensor.nbytes >= _FRESH_BYTES or tensor.device.type != "cpu"
            return tensor if is_fresh else tensor.zero_()

        return made

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], weight.shape[0])

    def into(*operands: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return out if out is not None else operands[-2].new_zeros(len(operands[-2]), operands[-1].shape[1])

    def unchanged(self: torch.Tensor, *arguments: object, **keywords: object) -> torch.Tensor:
        return self

    def rows_of_zeros(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(weight.shape, dtype=torch.int8), torch.ones(len(weight))

    with torch.device("cpu"):
        torch.empty(0)  # torch now knows which functions a device is for, before some are replaced
    device = CompileOnly(capability)
    driver.set_active(device)
    replaced: list[tuple[object, str, object]] = [
        (kernels, "_why_not_triton", lambda device, dtype: None),
        (launch_triton, "can_chain", lambda device: capability >= 90),
        (seams, "use_fastest_linears", lambda model, is_native: None),
        (runner, "_graphs", _graphs),
        (int8, "quantize_rows", rows_of_zeros),
        # The checks by which modules are fused compare numbers, and all are zero.
        (torch, "allclose", lambda *arguments, **keywords: True),
        (torch, "empty", zeroed(empty)),
        (torch, "empty_like", zeroed(empty_like)),
        (torch.Tensor, "new_empty", zeroed(new_empty)),
        (torch.nn.functional, "linear", product),
        (torch, "mm", into),
        (torch, "addmm", into),
        (gpu_decode, "matrix_rates", lambda *arguments: {"any": 1.0}),
        *((torch.Tensor, name, unchanged) for name in ("addmm_", "normal_", "uniform_")),
    ]
    replaced += [
        (module, "num_processors", lambda device: _NUM_PROCESSORS)
        for name, module in list(sys.modules.items())
        if name.startswith("adapterd.model.") and hasattr(module, "num_processors")
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in replaced:
            stack.enter_context(patch.object(owner, name, replacement))
        yield device


def run(part: str, dtype: str, cases: str | None, device: CompileOnly) -> tuple[list[Compiled], bool]:
    """The variants that a part compiles beyond those that were, and whether it ran to its end."""
    before = len(device.compiled)
    settings = ["--device", "cpu", "--layers", "1", "--rounds", "1", "--dtype", dtype, *PARTS[part]]
    if cases is not None and part != "upload":
        settings += ["--cases", cases]
    if part == "upload":
        status = gpu_upload.main([*settings, "--newcomers", "3"])
    else:
        status = gpu_decode.main([*settings, "--megabytes", "64"])
    return device.compiled[before:], status == 0


def table(found: Sequence[Compiled]) -> str:
    lines = [f"  {'variants':>8} {'registers':>9} {'spilled':>7} {'shared':>7}  kernel"]
    lines += [
        f"  {count:8} {one.num_registers:9} {one.spilled_bytes:7} {one.shared_bytes:7}  {one.name}"
        for one, count in sorted(
            Counter(found).items(), key=lambda item: (item[0].name, item[0].num_registers)
        )
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.set_grad_enabled(False)
    is_good = True
    result: dict[str, Any] = {"bench": "gpu_compile", "capability": arguments.capability, "parts": {}}
    with no_device(arguments.capability) as device:
        for dtype in arguments.dtypes.split(","):
            for part in arguments.only.split(","):
                began = time.perf_counter()
                with contextlib.redirect_stdout(sys.stderr):
                    found, ended = run(part, dtype, arguments.cases, device)
                seconds = time.perf_counter() - began
                spills = dtype != "float32" and any(one.spilled_bytes for one in found)
                is_good &= ended and not spills
                print(
                    f"{part}, {dtype}: {len(found)} more variants in {seconds:.0f} s{'' if ended else ', FAILED'}"
                )
                print(table(found), flush=True)
                result["parts"][f"{part}, {dtype}"] = [asdict(one) for one in found]
    result["max_resident_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(result))
    return int(not is_good)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default=",".join(PARTS), help="some of the parts")
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--cases", help="other batches and popularities than the part has")
    parser.add_argument("--capability", type=int, choices=sorted(_SHARED_BYTES), default=90)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
