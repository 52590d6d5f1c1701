"""What `eval` is told."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from adapterd.config.serving import EngineSettings
from adapterd.config.settings import MAP, Expressions, Names, Settings


class TaskSettings(Settings):
    """What is asked of an adapter and what a good answer is: flags of `eval`, keys of eval.toml beside an adapter."""

    command: ClassVar[str] = "eval"

    data: Path | None = Field(
        None,
        description="held-out rows (default: heldout.jsonl in the adapter's folder, else the rows of --train that"
        " training held back)",
    )
    train: Path | None = Field(
        None, description="training rows to take examples from (default: train.jsonl in the adapter's folder)"
    )
    map: Names = Field((), description=MAP)
    system_prompt: str | None = Field(
        None, min_length=1, description="system message for the base with a better prompt"
    )
    system_prompt_file: Path | None = Field(None, description="the same, read from a file")
    shots: int = Field(5, ge=0, le=100, description="solved training rows shown to the base; 0 for none")
    format_regex: Expressions = Field(
        (), description="a valid answer matches one of these from end to end; named groups are its slots"
    )
    json_schema: Path | None = Field(None, description="a valid answer is JSON that satisfies this schema")
    metric: str | None = Field(
        None,
        description="what decides, as in exact or chrf (default: label accuracy for labels, else exact match)",
    )
    max_tokens: int = Field(160, ge=1, description="tokens of an answer at most")


class EvalSettings(TaskSettings, EngineSettings):
    command: ClassVar[str] = "eval"
    positional: ClassVar[str | None] = "adapters"

    adapter: Names = Field((), description="names of the adapters to evaluate (default: all)")
    limit: int | None = Field(None, ge=1, description="evaluate only the first rows")
    samples: int = Field(
        3,
        ge=0,
        le=100,
        description="answers a row, drawn with different seeds, to see whether they agree; 0 or 1: none",
    )
    temperature: float = Field(0.7, gt=0, le=10, description="temperature of those draws")
    general: Path | None = Field(
        None,
        description="text on which nothing should be forgotten, in paragraphs (default: a small one that is shipped)",
    )
    price_per_hour: float | None = Field(None, ge=0, description="what an hour of this machine costs")
    peer_url: str | None = Field(
        None, description="another OpenAI-compatible server to compare with, as in https://host/v1"
    )
    peer_model: Names = Field((), description="its models to ask")
    peer_key_env: str | None = Field(None, description="variable that holds its API key")
    peer_price_in: float | None = Field(None, ge=0, description="its price of a million prompt tokens")
    peer_price_out: float | None = Field(None, ge=0, description="its price of a million answer tokens")
    judge_url: str | None = Field(None, description="an OpenAI-compatible server that grades the answers")
    judge_model: str | None = Field(None, description="its model")
    judge_key_env: str | None = Field(None, description="variable that holds its API key")
    markdown_out: Path | None = Field(None, description="write the report to this file as Markdown")
    html_out: Path | None = Field(None, description="write the report to this file as one page of HTML")
    json_out: Path | None = Field(None, description="write the report to this file as JSON")
    write_card: bool = Field(False, description="write the result table into the adapter's README.md")
    fail_under: Names = Field(
        (),
        description="exit with 3 if a metric of the adapter is lower, as in exact=0.9, or the proven gain is not"
        " higher, as in gain=0",
    )
