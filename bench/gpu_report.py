"""Figures that are kept as soon as they are known, in parts that fail alone: device time is short."""

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Report:
    """A JSON file that is whole after each part. Without a file it only counts failures."""

    def __init__(self, out: Path | None, **head: Any) -> None:
        self._out = out
        self.figures: dict[str, Any] = {**head, "errors": {}, "part_seconds": {}}
        self._write()

    def keep(self, name: str, figures: Any) -> None:
        self.figures[name] = figures
        self._write()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What goes wrong inside is printed and kept, and the next part begins."""
        began = time.perf_counter()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.figures["errors"][name] = f"{type(error).__name__}: {str(error)[:500]}"
        self.figures["part_seconds"][name] = round(time.perf_counter() - began, 1)
        print(f"[{name}: {self.figures['part_seconds'][name]} s]", flush=True)
        self._write()

    @property
    def failed(self) -> bool:
        return bool(self.figures["errors"])

    def _write(self) -> None:
        if self._out is not None:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._out.write_text(json.dumps(self.figures, indent=1) + "\n")
