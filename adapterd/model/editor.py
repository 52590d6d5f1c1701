"""Where edits run: forward hooks on the modules that the step about to run needs changed for some of its rows.

Nothing of the base is wrapped for it. A step whose segments have no edits has no hook and pays nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from adapterd.core import BaseModules
from adapterd.model.edits import Call
from adapterd.model.lora import LoraLinear, LoraStep, Segment


class Editor:
    """Keeps the hooks of a model in line with what the step about to run needs."""

    def __init__(self, model: nn.Module, step: LoraStep, modules: BaseModules) -> None:
        self._model = model
        self._step = step
        self._input_axes = modules.input_axes
        self._head = modules.head
        self._handles: dict[str, RemovableHandle] = {}
        self._spans: dict[str, list[tuple[Segment, slice]]] = {}
        self._num_tokens = 0
        self._num_kept = 0
        self._is_editing = False

    def begin(self, segments: Sequence[Segment], num_tokens: int, kept: Sequence[int]) -> None:
        """The step about to run: its segments with edits, all its tokens, and the rows that the head will see."""
        edited = [segment for segment in segments if segment.edits]
        self._num_tokens, self._num_kept = num_tokens, len(kept)
        self._spans = {}
        for segment in edited:
            inside = [i for i, row in enumerate(kept) if segment.start <= row < segment.end]
            for path in segment.edits:
                rows = slice(segment.start, segment.end)
                if path == self._head:
                    rows = slice(inside[0], inside[-1] + 1) if inside else slice(0, 0)
                if rows.stop > rows.start:
                    self._spans.setdefault(path, []).append((segment, rows))
        for path in self._handles.keys() - self._spans.keys():
            self._handles.pop(path).remove()
        for path in self._spans.keys() - self._handles.keys():
            module = self._model.get_submodule(path)
            self._handles[path] = module.register_forward_hook(self._hook(path))
        if self._step.edited != self._spans.keys():
            self._step.edited = frozenset(self._spans)

    @property
    def is_active(self) -> bool:
        return bool(self._handles)

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def rewrite(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if self._is_editing:  # an edit that runs the module itself, with other tensors
                return output
            inner = module.inner if isinstance(module, LoraLinear) else module
            axis = self._input_axes[path]
            wanted = self._num_kept if path == self._head else self._num_tokens
            if inputs[0].shape[axis] != wanted:
                raise RuntimeError(f"{path} saw {inputs[0].shape[axis]} of {wanted} tokens")
            self._is_editing = True
            try:
                for segment, rows in self._spans[path]:
                    for edit in segment.edits[path]:
                        edit.apply(Call(inner, inputs, output, axis, rows))
            finally:
                self._is_editing = False
            return output

        return rewrite
