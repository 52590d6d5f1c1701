"""The source of an adapter, as a string: a directory, or an address of the Hub, an object store or the web.

    /models/support   hf://OWNER/NAME[@REVISION][/FOLDER]   s3://BUCKET/PREFIX   gs://BUCKET/PREFIX
    https://HOST[:PORT]/FOLDER   ... each may end with #sha256=HEX, the hash of its weights file

Grammar only: `allow.py` says which are permitted, `download.py` fetches them.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from urllib.parse import quote, unquote

from adapterd.errors import InvalidRequest
from adapterd.file_names import ADAPTER_FILES, REQUIRED_FILES, WEIGHTS_FILE
from adapterd.model_name import shown

REMOTE_SCHEMES = ("hf", "s3", "gs", "https", "http")

Hashes = Mapping[str, str]
"""File name -> sha256 in hex. Empty: nothing was declared."""

NO_HASHES: Hashes = MappingProxyType({})

_MAX_LENGTH = 2048
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?(:[0-9]{1,5})?|\[[0-9a-f:.]{2,45}\](:[0-9]{1,5})?")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SEGMENT = re.compile(r"[A-Za-z0-9._~+=,@-]+")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_COMMIT = re.compile("[0-9a-f]{40}")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Source:
    """`authority` is the Hub's owner, the bucket or the host; "" for a directory, whose `path` may be relative.

    `path` has no leading or trailing slash otherwise, and no segment that means anything but itself.
    """

    scheme: str
    authority: str
    path: str
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        return self.scheme == "file"

    @property
    def is_pinned(self) -> bool:
        """Whether the address alone says which bytes are meant."""
        return self.scheme == "hf" and self.revision is not None and bool(_COMMIT.fullmatch(self.revision))

    @property
    def name(self) -> str:
        """The last part of the path: what an adapter is called that is given no name."""
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def repository(self) -> str:
        """OWNER/NAME of a Hub source."""
        return f"{self.authority}/{self.path.partition('/')[0]}"

    @property
    def folder(self) -> str:
        """The folder within a Hub repository, "" for its top."""
        return self.path.partition("/")[2]

    def at(self, revision: str) -> "Source":
        return replace(self, revision=revision)

    def __str__(self) -> str:
        if self.is_local:
            return self.path
        if self.scheme == "hf":
            revision = "" if self.revision is None else f"@{quote(self.revision, safe='')}"
            return f"hf://{self.repository}{revision}{self.folder and '/' + self.folder}"
        return f"{self.scheme}://{self.authority}/{self.path}"


def parse_source(text: str, *, param: str = "source") -> tuple[Source, Hashes]:
    """The source, and the hash that its #sha256= part declares. Raises InvalidRequest."""

    def refuse(reason: str) -> InvalidRequest:
        return InvalidRequest(f"the source {shown(text)} {reason}", param=param)

    if not text or len(text) > _MAX_LENGTH or not text.isprintable():
        raise refuse(f"must be 1 to {_MAX_LENGTH} printable characters")
    address, mark, fragment = text.partition("#")
    hashes = NO_HASHES
    if mark:
        key, _, value = fragment.partition("=")
        if key != "sha256":
            raise refuse("may have #sha256=HEX at its end, and no other part after #")
        hashes = parse_hashes(value, param=param)
    match = _SCHEME.match(address)
    if match is None:
        return Source("file", "", address), hashes
    scheme = match[1].lower()
    rest = address[match.end() :]
    if scheme == "file":
        if not rest.startswith("/"):
            raise refuse("must be file:///PATH: a directory of this machine")
        return Source("file", "", rest), hashes
    if scheme not in REMOTE_SCHEMES:
        raise refuse(f"is none of {', '.join(f'{known}://' for known in REMOTE_SCHEMES)} or a directory")
    return _remote(scheme, rest, refuse, param), hashes


def parse_declared(text: str, sha256: object = None, *, param: str = "source") -> tuple[Source, Hashes]:
    """A source and what was declared of it, at its end or beside it. Raises InvalidRequest.

    Plain http needs a declared hash.
    """
    source, hashes = parse_source(text, param=param)
    if sha256 is not None:
        if hashes:
            raise InvalidRequest(f"{shown(text)} has a sha256 of its own; give it once", param="sha256")
        hashes = parse_hashes(sha256)
    if source.scheme == "http" and not hashes:
        raise InvalidRequest(
            f"the source {shown(text)} is plain http, which anyone on the way can change; declare its sha256, or"
            " use https",
            param=param,
        )
    return source, hashes


def parse_hashes(value: object, *, param: str = "sha256") -> Hashes:
    """A hash of the weights file, or file -> hash of every file that may be read. Raises InvalidRequest."""
    hashes = {WEIGHTS_FILE: value} if isinstance(value, str) else value
    if not isinstance(hashes, Mapping) or not hashes:
        raise InvalidRequest(
            f"sha256 must be the hash of {WEIGHTS_FILE} in hex (in quotes), or an object of file names and hashes",
            param=param,
        )
    for name, digest in hashes.items():
        if name not in ADAPTER_FILES:
            raise InvalidRequest(
                f"sha256 names {shown(str(name))}; an adapter's files are {', '.join(sorted(ADAPTER_FILES))}",
                param=param,
            )
        if not isinstance(digest, str) or _SHA256.fullmatch(digest.lower()) is None:
            raise InvalidRequest(
                f"the sha256 of {name}, {shown(str(digest))}, must be 64 hexadecimal digits", param=param
            )
    missing = set(REQUIRED_FILES) - hashes.keys()
    if not isinstance(value, str) and missing:
        raise InvalidRequest(
            f"sha256 lists the files that may be read, and {' and '.join(sorted(missing))} is not among them",
            param=param,
        )
    return MappingProxyType({str(name): str(digest).lower() for name, digest in hashes.items()})


def hashes_text(hashes: Hashes) -> str | None:
    """As kept in a database; None for none."""
    return json.dumps(dict(hashes), sort_keys=True) if hashes else None


def hashes_from(text: str | None) -> Hashes:
    return NO_HASHES if text is None else MappingProxyType(json.loads(text))


def lists_files(hashes: Hashes) -> bool:
    """Whether every file that may be read is declared, rather than the weights alone."""
    return len(hashes) > 1


def _remote(scheme: str, rest: str, refuse: Callable[[str], InvalidRequest], param: str) -> Source:
    authority, _, path = rest.partition("/")
    path = path.rstrip("/")
    # Not repeated in the message, which may go to a log.
    if "@" in authority and scheme != "hf":
        raise InvalidRequest(
            f"a source of {scheme}:// must not hold a user or password; give credentials in the environment",
            param=param,
        )
    if "?" in rest:
        raise InvalidRequest(
            f"a source of {scheme}:// must not have a query: signed addresses are secrets, and expire",
            param=param,
        )
    revision = None
    if scheme == "hf":
        repository, _, folder = path.partition("/")
        name, mark, revision_text = repository.partition("@")
        revision = unquote(revision_text) if mark else None
        if _WORD.fullmatch(authority) is None or _WORD.fullmatch(name) is None:
            raise refuse("must be hf://OWNER/NAME, then perhaps @REVISION and /FOLDER")
        if revision is not None and (_REVISION.fullmatch(revision) is None or ".." in revision):
            raise refuse("must name a branch, a tag or a commit after @")
        path = f"{name}/{folder}" if folder else name
    elif scheme in ("http", "https"):
        authority = authority.lower().removesuffix(":443" if scheme == "https" else ":80")
        if _HOST.fullmatch(authority) is None:
            raise refuse(f"must be {scheme}://HOST/FOLDER")
    elif _WORD.fullmatch(authority) is None:
        raise refuse(f"must be {scheme}://BUCKET/PREFIX")
    for segment in path.split("/"):
        # Percent signs are out as well: what %2e%2e means is decided too late for the allow-list.
        if _SEGMENT.fullmatch(segment) is None or set(segment) == {"."}:
            raise refuse(
                "must be a path of letters, digits and . _ ~ + = , @ -, with no empty or dotted part"
            )
    return Source(scheme, authority, path, revision)
