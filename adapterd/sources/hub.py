"""The Hugging Face Hub as a place: a revision is looked up once, and every file is then taken from that commit."""

import huggingface_hub
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, but not listed

from adapterd.errors import SourceMissing
from adapterd.sources.download import Held, Sink
from adapterd.sources.source import Source

LOOK_SECONDS = 30.0
READ_SECONDS = 60.0
"""How long nothing may come; the whole file has the time that the sink gives it."""


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
        """Streamed, and not by `hf_hub_download`: that writes the whole file elsewhere first, however long it takes."""
        source = held.source
        url = huggingface_hub.hf_hub_url(
            source.repository,
            name,
            subfolder=source.folder or None,
            revision=source.revision,
            endpoint=self._api.endpoint,
        )
        # The size that is compared afterwards is the file's, so nothing may be compressed on the way.
        headers = {**build_hf_headers(), "accept-encoding": "identity"}
        with huggingface_hub.get_session().stream(
            "GET", url, headers=headers, timeout=READ_SECONDS
        ) as response:
            try:
                huggingface_hub.hf_raise_for_status(response)
            except RemoteEntryNotFoundError as error:
                raise SourceMissing(f"the source {source} holds no {name} any more") from error
            for data in response.iter_bytes():
                sink.write(data)
