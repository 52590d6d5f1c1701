"""Build the C++ operators and check that they load: `python -m adapterd.model.native`.

`--portable DIR` builds them for every level of processors, below DIR, and loads none.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from adapterd.model import native


def main(arguments: Sequence[str]) -> int:
    if len(arguments) == 2 and arguments[0] == "--portable":
        return _portable(Path(arguments[1]))
    if arguments:
        print("usage: python -m adapterd.model.native [--portable DIR]", file=sys.stderr)
        return 2
    compiler = native.find_compiler()
    if not native.library_path().exists() and compiler is not None:
        print(f"compiling the C++ operators with {compiler} (half a minute)", flush=True)
    try:
        path = native.build()
    except native.BuildFailed as error:
        print(f"the C++ operators were not built, adapterd runs without them: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0 if native.load() else 1


def _portable(directory: Path) -> int:
    try:
        for path in native.build_portable(directory):
            print(path, flush=True)
    except native.BuildFailed as error:
        print(f"the C++ operators were not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
