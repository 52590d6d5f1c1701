"""The model card of a trained adapter: what it was made from, how, and a place for the held-out table."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from adapterd.training.curve import CURVE_FILE
from adapterd.training.recipe import Recipe

CARD_FILE = "README.md"
RESULTS_BEGIN, RESULTS_END = "<!-- results:begin -->", "<!-- results:end -->"


def model_card(
    *,
    name: str,
    base: str,
    facts: Sequence[tuple[str, str]],
    settings: Mapping[str, object],
    proof: str,
    measured_by: str,
) -> str:
    """Markdown with Hugging Face's header. `facts` are the rows of its first table, in order.

    measured_by: the command that fills in the results.
    """
    header = [
        "---",
        f"base_model: {base}",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags: [lora, adapterd]",
        "---",
    ]
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts)]
    told = [
        "| setting | value |",
        "|---|---|",
        *(f"| `{key}` | {value} |" for key, value in settings.items()),
    ]
    return "\n".join(
        [
            *header,
            "",
            f"# {name}",
            "",
            f"A LoRA adapter for `{base}`, made by `adapterd train`. Served as `{base}:{name}`.",
            "",
            *table,
            "",
            f"![loss by step]({CURVE_FILE})",
            "",
            "## Results on held-out rows",
            "",
            RESULTS_BEGIN,
            f"Not measured yet: `{measured_by} --write-card` fills this in.",
            RESULTS_END,
            "",
            "## Round trip",
            "",
            f"Loaded by a fresh engine as it is served: {proof}.",
            "",
            "## Settings",
            "",
            *told,
            "",
        ]
    )


def eval_command(folder: str, recipe: Recipe, *, full_paths: bool) -> str:
    """How an adapter just trained is measured: on the held-out rows, else on those that training held back."""
    arguments = ["adapterd", "eval", folder]
    if recipe.base != "mini":
        arguments += ["--base", recipe.base]
    if recipe.quantization != "none":
        arguments += ["--quantization", recipe.quantization]  # on another base it is refused
    if recipe.heldout is None and recipe.validation is not None:
        arguments += ["--data", "HELDOUT"]
    for flag, path in (("--data", recipe.heldout), ("--train", recipe.data)):
        if path is not None:
            arguments += [flag, _shown(path) if full_paths else path.name]
    if recipe.map:
        arguments += ["--map", *recipe.map]
    return shlex.join(arguments)


def _shown(path: Path) -> str:
    """As a person would type it from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
