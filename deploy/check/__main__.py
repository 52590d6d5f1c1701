"""Render, validate and lint manifests: `python -m deploy.check [DIRECTORY...]`.

Without a directory: the base, each component upon it, and each overlay of deploy/. With some: those kustomizations,
your own overlays for instance. Exit status 1 if anything was found.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deploy.check.lint import lint
from deploy.check.manifests import Manifests, kustomizations, render, render_parts
from deploy.check.schemas import VERSIONS, schema_errors


def findings(manifests: Manifests) -> list[str]:
    """Everything wrong, of all versions and rules."""
    schemas = [f"schema {v}: {e}" for v in VERSIONS for e in schema_errors(manifests, v)]
    return [*schemas, *lint(manifests)]


def main(arguments: Sequence[str]) -> int:
    failed = False
    for name, parts in dict.fromkeys(arguments).items() if arguments else kustomizations().items():
        try:
            if parts is None:
                manifests = render(Path(name))
            else:
                with tempfile.TemporaryDirectory() as scratch:
                    manifests = render_parts(parts, Path(scratch))
        except RuntimeError as error:
            print(f"{name}: {error}")
            failed = True
            continue
        found = findings(manifests)
        failed = failed or bool(found)
        print(f"{name}: {len(manifests.objects)} objects, {len(found) or 'nothing'} found")
        for sentence in found:
            print(f"  {sentence}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
