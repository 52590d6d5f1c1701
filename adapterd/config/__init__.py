"""Settings of each command, as declared in this package, and all commands together."""

from collections.abc import Mapping
from pathlib import Path

from adapterd.config.evaluation import EvalSettings, TaskSettings
from adapterd.config.serving import (
    AdaptersSettings,
    EngineSettings,
    ProveSettings,
    PullSettings,
    ServeSettings,
)
from adapterd.config.settings import Bytes, S, Settings, flag, parse_bytes, read_settings, takes_many
from adapterd.config.training import CheckSettings, EstimateSettings, TrainSettings

__all__ = [
    "COMMANDS",
    "AdaptersSettings",
    "Bytes",
    "CheckSettings",
    "EngineSettings",
    "EstimateSettings",
    "EvalSettings",
    "ProveSettings",
    "PullSettings",
    "S",
    "ServeSettings",
    "Settings",
    "TaskSettings",
    "TrainSettings",
    "flag",
    "load_settings",
    "parse_bytes",
    "takes_many",
]

COMMANDS: tuple[type[Settings], ...] = (
    ServeSettings,
    CheckSettings,
    EstimateSettings,
    TrainSettings,
    EvalSettings,
    PullSettings,
    AdaptersSettings,
    ProveSettings,
)


def load_settings(
    settings: type[S], flags: Mapping[str, object], environ: Mapping[str, str], config: Path | None = None
) -> S:
    """Settings from flags, `ADAPTERD_` variables and the TOML file, in this order of weight.

    A variable that no command knows is refused; one of another command's is let pass. Raises ConfigError: a line
    for each thing that is wrong, naming the flag, variable or key it came from.
    """
    fields = (field for command in COMMANDS for field in command.model_fields)
    return read_settings(settings, flags, environ, config, known_fields=fields)
