"""The Hugging Face Hub as a place: a revision is looked up once, and every file is then taken from that commit."""

import tempfile
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from adapterd.errors import SourceMissing
from adapterd.sources.download import Held, Sink
from adapterd.sources.source import Source

LOOK_SECONDS = 30.0


class Hub:
    """HF_TOKEN, and HF_ENDPOINT unless `endpoint` is given, hold as in huggingface_hub."""

    def __init__(self, endpoint: str | None = None) -> None:
        self._api = huggingface_hub.HfApi(endpoint)

    def look(self, source: Source) -> Held:
        try:
            info = self._api.model_info(
                source.repository, revision=source.revision, files_metadata=True, timeout=LOOK_SECONDS
            )
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            what = "repository" if isinstance(error, RepositoryNotFoundError) else "revision"
            raise SourceMissing(
                f"the source {source} does not exist, or this token may not see it: no such {what}"
            ) from error
        if info.sha is None:
            raise ValueError("the Hub gave no commit")
        prefix = f"{source.folder}/" if source.folder else ""
        sizes = {
            sibling.rfilename.removeprefix(prefix): sibling.size
            for sibling in info.siblings or ()
            if sibling.rfilename.startswith(prefix)
        }
        return Held(source.at(info.sha), info.sha, {n: size for n, size in sizes.items() if "/" not in n})

    def fetch(self, held: Held, name: str, sink: Sink) -> None:
        source = held.source
        # A directory of its own: huggingface_hub keeps notes beside what it writes, and none of them is an adapter's.
        with tempfile.TemporaryDirectory(prefix="adapterd-hub-") as directory:
            try:
                path = huggingface_hub.hf_hub_download(
                    source.repository,
                    name,
                    subfolder=source.folder or None,
                    revision=source.revision,
                    local_dir=directory,
                    endpoint=self._api.endpoint,
                )
            except RemoteEntryNotFoundError as error:
                raise SourceMissing(f"the source {source} holds no {name} any more") from error
            with Path(path).open("rb") as file:
                while data := file.read(1 << 20):
                    sink.write(data)
