"""What the benches that run the engine on a CUDA device ask alike: the model, the device, and where figures go."""

import argparse
from pathlib import Path

import torch

from bench.gpu_device import describe
from bench.gpu_report import Report
from bench.models import SHAPES
from bench.report import machine


def engine_parser(bench: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of `bench`'s command line that knows these arguments; the bench adds its own."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{bench}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="llama-3-8b")
    add("--layers", type=int, help="fewer than the shape has, to try something out")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--kernels", choices=("auto", "torch", "triton"), default="triton")
    add("--rank", type=int, default=16)
    add("--out", type=Path, help="write the figures here as they come")
    return parser


def report_of(bench: str, arguments: argparse.Namespace) -> Report:
    """A report that begins with the machine and with what was asked."""
    return Report(
        arguments.out,
        bench=bench,
        machine=machine(),
        gpu=describe(torch.device(arguments.device)),
        settings={key: str(value) for key, value in vars(arguments).items() if key != "out"},
    )
