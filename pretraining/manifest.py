"""The hashes of a directory's files, so that what is shipped is known to be what was measured.

    python -m pretraining.manifest adapterd/mini

Writes `manifest.json`: file name -> SHA-256, for the files that a loader reads.
"""

import argparse
import hashlib
import json
from pathlib import Path

NAME = "manifest.json"
UNHASHED = (NAME, "README.md")  # the manifest itself, and the card, which is prose


def hashes(directory: Path) -> dict[str, str]:
    """File name -> SHA-256 in hexadecimal, for every file of `directory` except the manifest and the card."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name not in UNHASHED)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    """Write the manifest of the directory named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    (directory / NAME).write_text(json.dumps(hashes(directory), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
