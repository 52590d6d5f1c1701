"""`adapterd check` from its settings to its text. No torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from adapterd.errors import InvalidRequest
from adapterd.model.base_config import exact_context, read_config
from adapterd.model.find import find_base
from adapterd.render import Renderer
from adapterd.training.check import Report, check_rows
from adapterd.training.check_view import as_json, as_text, mask_json, mask_text, wants_colour
from adapterd.training.fix import Fixed, write_fixed
from adapterd.training.rows import Row, scan_rows
from adapterd.training.tables import parse_columns


class CheckRequest(Protocol):
    """What a check is told; `config.CheckSettings` is the real thing."""

    @property
    def data(self) -> Path: ...
    @property
    def base(self) -> str: ...
    @property
    def heldout(self) -> Path | None: ...
    @property
    def map(self) -> Sequence[str]: ...
    @property
    def max_length(self) -> int | None: ...
    @property
    def show_mask(self) -> int | None: ...
    @property
    def fix(self) -> Path | None: ...
    @property
    def strict(self) -> bool: ...
    @property
    def json_(self) -> bool: ...


def run(request: CheckRequest, *, stream: TextIO, environ: Mapping[str, str]) -> tuple[str, bool]:
    """What to print, and whether the rows (the cleaned copy, if one was written) can be trained on.

    Raises InvalidRequest, ConfigError or BaseRefused for what cannot even be looked at.
    """
    columns = parse_columns(request.map)
    directory = find_base(request.base)
    renderer = Renderer.load(directory)
    colour = wants_colour(stream, environ)
    if request.show_mask is not None:
        row = _row_at(request.show_mask, request.data, scan_rows(request.data, columns=columns).rows)
        if request.json_:
            return _dumps(mask_json(row, renderer)), True
        return mask_text(row, renderer, colour=colour), True

    context = exact_context(read_config(directory, request.base), request.max_length, flag="--max-length")
    report = check_rows(
        request.data,
        renderer,
        base=request.base,
        context=context,
        columns=columns,
        heldout=request.heldout,
    )
    fixed: Fixed | None = None
    reports = [report]
    if request.fix is not None:
        fixed = write_fixed(request.data, request.fix, drops=report.drops, columns=columns)
        if fixed.num_kept:
            reports.append(
                check_rows(request.fix, renderer, base=request.base, context=context, heldout=request.heldout)
            )
    last = reports[-1]
    is_usable = last.is_usable and not (request.strict and last.of("warning"))
    if fixed is not None and not fixed.num_kept:
        is_usable = False
    if request.json_:
        return _dumps(_with_fix(report, fixed, reports)), is_usable
    text = as_text(report, colour=colour)
    if fixed is not None:
        text += (
            f"\n\nwrote {fixed.path}: {fixed.num_kept} rows, {fixed.num_repaired} of them repaired;"
            f" {fixed.num_dropped} left out, listed in {fixed.dropped}"
        )
        if fixed.num_kept:
            text += "\n\n" + as_text(last, colour=colour)
    return text, is_usable


def _row_at(line: int, path: Path, rows: Sequence[Row]) -> Row:
    for row in rows:
        if row.line == line:
            return row
    raise InvalidRequest(f"{path}: no usable row stands in line {line}", param="show_mask")


def _with_fix(report: Report, fixed: Fixed | None, reports: Sequence[Report]) -> dict[str, Any]:
    whole = as_json(report)
    if fixed is not None:
        whole["fix"] = {
            "path": str(fixed.path),
            "dropped_path": str(fixed.dropped),
            "num_kept": fixed.num_kept,
            "num_repaired": fixed.num_repaired,
            "num_dropped": fixed.num_dropped,
            "report": as_json(reports[-1]) if fixed.num_kept else None,
        }
    return whole


def _dumps(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
