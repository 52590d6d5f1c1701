"""From seconds on a device to shares of what it can do, and the table of them."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.floor import Shape, decode_floor, prefill_floor
from bench.offline import Steps


@dataclass(frozen=True)
class Measure:
    """What figures are held against: a model's shape, and the device's bytes and operations a second."""

    shape: Shape
    rank: int
    weight_bytes: float
    bandwidth: float
    matrix_rate: float

    def decode(
        self,
        batch: int,
        num_adapters: int,
        rounds: Sequence[Steps],
        replay_seconds: float | None,
        prompt_tokens: int,
        output_tokens: int,
    ) -> dict[str, Any]:
        """Of one mix of adapters over its rounds: medians, the floor half way through the answers, shares of it."""
        each_round = [statistics.median(found.decode) for found in rounds]
        steps = sorted(seconds for found in rounds for seconds in found.decode)
        step = statistics.median(each_round)
        floor = decode_floor(
            self.shape,
            self.bandwidth,
            float("inf"),
            batch=batch,
            context=prompt_tokens + output_tokens // 2,
            num_adapters=num_adapters,
            rank=self.rank,
            weight_bytes=self.weight_bytes,
        )
        prefill = statistics.median(sum(found.prefill) for found in rounds)
        return {
            "batch": batch,
            "num_adapters": num_adapters,
            "step_seconds": step,
            "step_seconds_each_round": each_round,
            "step_seconds_p99": steps[int(0.99 * (len(steps) - 1))],
            "replay_seconds": replay_seconds,
            "tokens_per_second": batch / step,
            "floor_bytes": floor.num_bytes,
            "floor_seconds": floor.memory_seconds,
            "floor_share": floor.memory_seconds / step,
            "floor_share_of_replay": floor.memory_seconds / replay_seconds if replay_seconds else None,
            "prefill_seconds": prefill,
            "prefill_tokens_per_second": batch * prompt_tokens / prefill,
            "num_prefill_steps": len(rounds[0].prefill),
        }

    def prefill(self, num_tokens: int, has_adapter: bool, seconds: float) -> dict[str, float]:
        floor = prefill_floor(
            self.shape,
            self.bandwidth,
            self.matrix_rate,
            num_tokens=num_tokens,
            rank=self.rank if has_adapter else None,
            weight_bytes=self.weight_bytes,
        )
        return {
            "seconds": seconds,
            "tokens_per_second": num_tokens / seconds,
            "flops_per_second": floor.flops / seconds,
            "share_of_rate": floor.flops / seconds / self.matrix_rate,
        }

    def compare_with_base(self, decode: dict[str, dict[str, Any]]) -> None:
        """Adds to each mix with adapters how much of the base's throughput times the ratio of bytes it reaches.

        The ratio is base / (base + adapters), weights alone, as in bench/README.md.
        """
        base_bytes = (self.shape.linear_elements + self.shape.head_elements) * self.weight_bytes
        for found in decode.values():
            base = decode.get(f"{found['batch']}:base")
            if base is None or not found["num_adapters"]:
                continue
            adapter_bytes = 2 * found["num_adapters"] * self.shape.adapter_elements(self.rank)
            found["bytes_ratio"] = base_bytes / (base_bytes + adapter_bytes)
            found["of_base"] = base["step_seconds"] / found["step_seconds"]
            found["of_bytes_ratio"] = found["of_base"] / found["bytes_ratio"]
            if found["replay_seconds"] and base["replay_seconds"]:
                of_base = base["replay_seconds"] / found["replay_seconds"]
                found["replay_of_bytes_ratio"] = of_base / found["bytes_ratio"]


def table(figures: dict[str, Any]) -> str:
    """What a person wants to see of the kept figures; parts that failed are missing."""
    settings = figures["settings"]
    names = ("shape", "dtype", "quantization")
    lines = [", ".join([figures["gpu"]["name"], *(settings[name] for name in names)])]
    if speeds := figures.get("bytes_per_second"):
        lines.append("GB/s: " + ", ".join(f"{way} {rate / 1e9:.0f}" for way, rate in speeds.items()))
    if rates := figures.get("flops_per_second"):
        lines.append("TFLOP/s: " + ", ".join(f"{n} tokens {rate / 1e12:.0f}" for n, rate in rates.items()))
    if decode := figures.get("decode"):
        lines.append(
            f"{'decode':14} {'step ms':>8} {'p99':>7} {'device':>7} {'floor':>7} {'share':>6} {'of dev':>6}"
            f" {'tokens/s':>9} {'of base':>7} {'bytes':>6} {'of it':>6} {'dev':>6}"
        )
        for name, found in decode.items():
            lines.append(
                f"{name:14} {1000 * found['step_seconds']:8.3f} {1000 * found['step_seconds_p99']:7.2f}"
                f" {_ms(found['replay_seconds'])} {_ms(found['floor_seconds'])} {found['floor_share']:6.2f}"
                f" {_ratio(found['floor_share_of_replay'])} {found['tokens_per_second']:9.1f}"
                f" {_ratio(found.get('of_base')):>7} {_ratio(found.get('bytes_ratio'))}"
                f" {_ratio(found.get('of_bytes_ratio'))} {_ratio(found.get('replay_of_bytes_ratio'))}"
            )
    if prefill := figures.get("prefill"):
        lines.append(f"{'prefill':24} {'ms':>8} {'tokens/s':>9} {'TFLOP/s':>8} {'of rate':>7}")
        lines += [
            f"{name:24} {1000 * found['seconds']:8.2f} {found['tokens_per_second']:9.0f}"
            f" {found['flops_per_second'] / 1e12:8.1f} {found['share_of_rate']:7.2f}"
            for name, found in prefill.items()
        ]
    lines += [f"FAILED {part}: {error[:160]}" for part, error in figures["errors"].items()]
    return "\n".join(lines)


def _ms(seconds: float | None) -> str:
    return f"{'-':>7}" if seconds is None else f"{1000 * seconds:7.3f}"


def _ratio(ratio: float | None) -> str:
    return f"{'-':>6}" if ratio is None else f"{ratio:6.2f}"
