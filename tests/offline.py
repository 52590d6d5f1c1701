"""An engine over a base directory, without registry and tokenizer: requests are token ids, adapters are handed in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adapterd.adapter import Adapter, read_adapter
from adapterd.core import AdapterId, AdapterMix, Request, RequestId, SamplingParams
from adapterd.engine.build import build_engine
from adapterd.engine.detokenizer import Vocabulary
from adapterd.engine.offline import Finished, collect
from adapterd.model.base import DeviceName, load_base
from adapterd.model.checkpoint import DtypeName, QuantizationName
from adapterd.model.kernels import KernelName
from adapterd.peft_proof import AdapterProver
from adapterd.token_table import TokenizerIdentity, TokenTable

NO_TOKENIZER = TokenizerIdentity(frozenset(), {})


@dataclass(frozen=True)
class OfflineSettings:
    base: str
    served_name: str | None = None
    adapters: Sequence[Path] = ()
    dtype: DtypeName = "float32"
    device: DeviceName = "cpu"
    kv_memory: int | None = None
    adapter_memory: int | None = 8 << 20
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 16
    max_model_len: int | None = None
    max_queue: int = 1024
    max_loras: int | None = None
    max_lora_rank: int | None = None
    host_memory: int | None = None
    max_cpu_loras: int | None = None
    kernels: KernelName = "auto"
    quantization: QuantizationName = "none"


@dataclass
class Offline:
    """`adapters` by name; a name may be given another version at any time, as the registry does it."""

    settings: OfflineSettings
    adapters: dict[str, Adapter] = field(default_factory=dict)
    num_requests: int = 0

    def __post_init__(self) -> None:
        self.base = load_base(
            self.settings.base,
            dtype=self.settings.dtype,
            device=self.settings.device,
            max_model_len=self.settings.max_model_len,
            kernels=self.settings.kernels,
            quantization=self.settings.quantization,
        )
        self._prover = AdapterProver(self.base.spec)
        self._versions: dict[AdapterId, Adapter] = {}
        token_bytes = tuple(f"<{i}>".encode() for i in range(self.base.spec.vocab_size))
        vocabulary = Vocabulary(TokenTable(token_bytes, strips_leading_space=False), frozenset())
        self.runner, self.engine = build_engine(
            self.base, vocabulary, lambda adapter_id: self._versions[adapter_id], self.settings
        )

    def load(self, name: str, directory: Path) -> AdapterId:
        adapter = read_adapter(
            directory,
            name=name,
            spec=self.base.spec,
            tokenizer=NO_TOKENIZER,
            base_weights=self.base.weights,
            prover=self._prover,
        )
        self.adapters[name] = self._versions[adapter.id] = self.base.lay_out(adapter)
        return adapter.id

    def bring(self, *names: str) -> None:
        """Have adapters in memory before anyone asks for them."""
        for name in names:
            self.engine.prefetch(self.adapters[name].id)
        collect(self.engine)

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        adapters: Mapping[str, float] | None = None,
        num_sequences: int = 1,
    ) -> RequestId:
        mix: AdapterMix = tuple((self.adapters[name].id, scale) for name, scale in (adapters or {}).items())
        self.num_requests += 1
        request = Request(
            id=RequestId(f"request-{self.num_requests}"),
            prompt_token_ids=tuple(prompt),
            params=params,
            mix=mix,
            eos_token_ids=frozenset(),
            arrival_seconds=0.0,
            num_sequences=num_sequences,
        )
        self.engine.submit(request)
        return request.id

    def run(self) -> dict[tuple[RequestId, int], Finished]:
        """Step until idle; the books must balance and nothing may be held after."""
        finished = collect(self.engine)
        self.engine.check_integrity()
        self.runner.bank.check_integrity()
        stats = self.engine.stats()
        assert stats.kv_blocks_held == 0
        assert stats.adapter_bytes_held == 0
        return finished
