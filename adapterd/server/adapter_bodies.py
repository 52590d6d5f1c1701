"""What a client may ask of adapters: of /v1/adapters, checked strictly, and by the paths of other servers, less so."""

from typing import Annotated

from pydantic import ConfigDict, Field

from adapterd.server.protocol import Body

MAX_DEADLINE_SECONDS = 3600.0

Name = Annotated[str, Field(min_length=1, max_length=128)]
SourceText = Annotated[str, Field(min_length=1, max_length=2048)]
Sha256 = str | dict[str, str]
Selector = Annotated[str | int, Field(union_mode="left_to_right")]


class LoadBody(Body):
    """`sha256`: of the weights file, or file -> sha256 of every file that may be read. Without `replace` a name that
    serves other content is a conflict."""

    name: Name
    source: SourceText
    sha256: Sha256 | None = None
    replace: bool = False
    pinned: bool = False


class UpdateBody(Body):
    """Without a source, the one that the adapter has is read again."""

    source: SourceText | None = None
    sha256: Sha256 | None = None


class UnloadBody(Body):
    """How long running requests may keep the memory before an answer is given; `abort` ends them then."""

    deadline_seconds: float = Field(30.0, ge=0, le=MAX_DEADLINE_SECONDS)
    abort: bool = False


class AliasBody(Body):
    """`version`: a number, another alias, or the beginning of a digest; the current one if it is left out."""

    alias: Name
    version: Selector | None = None


class RollbackBody(Body):
    """Back to the version before, or to a named one."""

    version: Selector | None = None


class EmptyBody(Body):
    """No fields."""


class LoadAdapterRequest(Body):
    """vLLM's body. Controllers send keys of their own beside it (`base_model_name`), which are let pass."""

    model_config = ConfigDict(extra="ignore")

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False


class UnloadAdapterRequest(Body):
    model_config = ConfigDict(extra="ignore")

    lora_name: str = ""
    lora_int_id: int | None = None


class SglangLoadRequest(Body):
    """SGLang's body for the same."""

    model_config = ConfigDict(extra="ignore")

    lora_name: str
    lora_path: str
    pinned: bool = False


class SglangUnloadRequest(Body):
    model_config = ConfigDict(extra="ignore")

    lora_name: str
