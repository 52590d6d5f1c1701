"""A directory of this machine as a place, for what copies adapters. A daemon reads such a directory where it is."""

import hashlib
import json
import stat
from pathlib import Path

from adapterd.sources.download import Held, Sink
from adapterd.sources.source import Source


class Local:
    def look(self, source: Source) -> Held:
        listing = {path.name: path.stat() for path in sorted(Path(source.path).iterdir())}
        files = {name: status for name, status in listing.items() if stat.S_ISREG(status.st_mode)}
        marks = [[name, status.st_size, status.st_mtime_ns, status.st_ino] for name, status in files.items()]
        state = hashlib.sha256(json.dumps(marks).encode()).hexdigest()
        return Held(source, state, {name: status.st_size for name, status in files.items()})

    def fetch(self, held: Held, name: str, sink: Sink) -> None:
        with (Path(held.source.path) / name).open("rb") as file:
            while data := file.read(1 << 20):
                sink.write(data)
