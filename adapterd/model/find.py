"""Where a base lies: embedded, in a directory, or on the hub. No torch, so that checking rows needs none."""

from pathlib import Path

from adapterd.errors import BaseRefused

EMBEDDED_BASE = "mini"
_EMBEDDED_DIRECTORY = Path(__file__).resolve().parent.parent / "mini"


def find_base(name_or_dir: str) -> Path:
    """The directory of a base: the embedded one, a local one, or a hub snapshot, downloaded if need be."""
    if name_or_dir == EMBEDDED_BASE:
        return _EMBEDDED_DIRECTORY
    local = Path(name_or_dir).expanduser()
    if local.is_dir():
        return local.resolve()
    if name_or_dir.count("/") != 1 or name_or_dir.startswith((".", "/", "~")):
        raise BaseRefused(
            f"base '{name_or_dir}': no such directory; give '{EMBEDDED_BASE}', a directory with config.json, "
            "or a Hugging Face Hub id such as Qwen/Qwen3-0.6B"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(name_or_dir, allow_patterns=wanted))
    except HFValidationError as error:
        raise BaseRefused(f"base '{name_or_dir}': no such directory, and no Hub id: {error}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BaseRefused(
            f"base '{name_or_dir}' could not be fetched from the Hugging Face Hub ({type(error).__name__}); "
            "check the id and the network, or give a local directory"
        ) from error
