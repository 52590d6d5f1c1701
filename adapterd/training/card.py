"""The model card of a trained adapter: what it was made from, how, and a place for the held-out table."""

from collections.abc import Mapping, Sequence

from adapterd.training.curve import CURVE_FILE

CARD_FILE = "README.md"
RESULTS_BEGIN, RESULTS_END = "<!-- results:begin -->", "<!-- results:end -->"


def model_card(
    *, name: str, base: str, facts: Sequence[tuple[str, str]], settings: Mapping[str, object], proof: str
) -> str:
    """Markdown with Hugging Face's header. `facts` are the rows of its first table, in order."""
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
            f"Not measured yet: `adapterd eval {name} --data HELDOUT.jsonl --write-card` fills this in.",
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
