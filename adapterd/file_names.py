"""The files of an adapter's directory that count, by name. Everything else that lies there is left alone."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SEAL_FILE = "adapterd.json"

REQUIRED_FILES = (CONFIG_FILE, WEIGHTS_FILE)

OPTIONAL_FILES = (
    SEAL_FILE,
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)

ADAPTER_FILES = frozenset((*REQUIRED_FILES, *OPTIONAL_FILES))

REFUSED_FILES = frozenset({"adapter_model.bin", "adapter_model.safetensors.index.json"})
"""Weights in another form: a directory that holds one is refused, since it is unclear which of them is meant."""
