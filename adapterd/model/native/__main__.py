"""Build the C++ operators and check that they load: `python -m adapterd.model.native`."""

import sys

from adapterd.model import native


def main() -> int:
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


if __name__ == "__main__":
    sys.exit(main())
