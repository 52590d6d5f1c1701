"""Settings: where each value comes from, and what is said when it is wrong."""

from pathlib import Path

import pytest

from adapterd.config import (
    COMMANDS,
    EvalSettings,
    ProveSettings,
    ServeSettings,
    TrainSettings,
    load_settings,
    parse_bytes,
)
from adapterd.errors import ConfigError


def toml(directory: Path, text: str) -> Path:
    file = directory / "adapterd.toml"
    file.write_text(text)
    return file


def refusal(flags: dict[str, object] | None = None, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as raised:
        load_settings(ServeSettings, flags or {}, environ or {})
    return raised.value.message


def test_a_flag_wins_over_a_variable_over_the_file_over_the_default(tmp_path: Path) -> None:
    file = toml(tmp_path, "port = 1\nmax_queue = 1\nmax_num_seqs = 1")
    environ = {"ADAPTERD_PORT": "2", "ADAPTERD_MAX_QUEUE": "2"}
    settings = load_settings(ServeSettings, {"port": "3"}, environ, file)
    assert (settings.port, settings.max_queue, settings.max_num_seqs) == (3, 2, 1)
    assert settings.max_num_batched_tokens == ServeSettings().max_num_batched_tokens


def test_a_variable_can_name_the_file(tmp_path: Path) -> None:
    file = toml(tmp_path, "port = 7")
    assert load_settings(ServeSettings, {}, {"ADAPTERD_CONFIG": str(file)}).port == 7


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("512MiB", 512 * 2**20), ("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("1048576", 2**20), ("7b", 7)],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes
    assert load_settings(ServeSettings, {"kv_memory": text}, {}).kv_memory == num_bytes


@pytest.mark.parametrize("text", ["9 parsecs", "MiB", "-1", "0", "1e9", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    assert refusal({"kv_memory": text}).startswith(f"--kv-memory: {text!r} ")


def test_several_directories_from_flags_variable_and_file(tmp_path: Path) -> None:
    assert load_settings(ServeSettings, {"adapters": ["a", "b"]}, {}).adapters == (Path("a"), Path("b"))
    environ = {"ADAPTERD_ADAPTERS": "a:b"}
    assert load_settings(ServeSettings, {}, environ).adapters == (Path("a"), Path("b"))
    file = toml(tmp_path, 'adapters = ["a", "/b"]')
    assert load_settings(ServeSettings, {}, {}, file).adapters == (tmp_path / "a", Path("/b"))


def test_a_recipe_lies_beside_its_rows(tmp_path: Path) -> None:
    file = toml(tmp_path, 'name = "support"\ndata = "train.jsonl"\ntarget_modules = "all-linear"')
    settings = load_settings(TrainSettings, {}, {}, file)
    assert settings.data == tmp_path / "train.jsonl"
    assert settings.target_modules == ("all-linear",)


@pytest.mark.parametrize("recipe", sorted(Path("adapters").glob("*/recipe.toml")), ids=str)
def test_the_shipped_recipes_are_valid(recipe: Path) -> None:
    assert load_settings(TrainSettings, {}, {}, recipe).name == recipe.parent.name


def test_every_wrong_value_has_a_line_that_names_where_it_came_from(tmp_path: Path) -> None:
    file = toml(tmp_path, 'dtype = "int8"')
    with pytest.raises(ConfigError) as raised:
        load_settings(ServeSettings, {"port": "x"}, {"ADAPTERD_MAX_QUEUE": "0"}, file)
    dtype, queue, port = sorted(raised.value.message.splitlines(), key=lambda line: "dtype" not in line)
    assert dtype == f"'dtype' in {file}: 'int8' should be 'auto', 'float32', 'bfloat16' or 'float16'"
    assert queue.startswith("ADAPTERD_MAX_QUEUE: '0' should be greater than or equal to 1")
    assert port.startswith("--port: 'x' should be a valid integer")


def test_unknown_names_are_refused_with_the_nearest_one(tmp_path: Path) -> None:
    message = "unknown variable ADAPTERD_MAX_QUEU; did you mean ADAPTERD_MAX_QUEUE?"
    assert refusal(environ={"ADAPTERD_MAX_QUEU": "1"}) == message
    file = toml(tmp_path, "kv_memori = 1")
    with pytest.raises(ConfigError, match=r"unknown key 'kv_memori' in .*; did you mean kv_memory\?"):
        load_settings(ServeSettings, {}, {}, file)


def test_a_variable_of_another_command_is_let_pass() -> None:
    assert load_settings(EvalSettings, {}, {"ADAPTERD_PORT": "1", "HOME": "/"}) == EvalSettings()


def test_what_is_required_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="--data is required"):
        load_settings(TrainSettings, {"name": "x"}, {})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*missing\.toml: No such file"):
        load_settings(ServeSettings, {}, {}, tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_settings(ServeSettings, {}, {}, toml(tmp_path, "port = "))


@pytest.mark.parametrize("settings", COMMANDS)
def test_every_setting_has_help_and_a_valid_default(settings: type) -> None:
    for field, info in settings.model_fields.items():
        assert info.description, field
        if not info.is_required():
            settings.__pydantic_validator__.validate_assignment(
                settings.model_construct(), field, info.default
            )


def test_vllms_flags_mean_what_they_say_or_are_refused() -> None:
    modules = ["a=/x", '{"name": "b", "path": "/y"}']
    flags = {"enable_lora": True, "lora_modules": modules, "max_loras": "4", "max_lora_rank": "16"}
    settings = load_settings(ServeSettings, flags, {})
    assert [(module.name, str(module.path)) for module in settings.lora_modules] == [("a", "/x"), ("b", "/y")]
    assert (settings.max_loras, settings.max_lora_rank) == (4, 16)
    with pytest.raises(ConfigError, match="--enable-lora: False cannot be"):
        load_settings(ServeSettings, {"enable_lora": False}, {})
    with pytest.raises(ConfigError, match=r"--lora-modules: .* is neither NAME=PATH"):
        load_settings(ServeSettings, {"lora_modules": ["a"]}, {})
    with pytest.raises(ConfigError, match="--max-loras and --adapter-memory both say"):
        load_settings(ServeSettings, {"max_loras": "4", "adapter_memory": "1GiB"}, {})


def test_lora_modules_in_a_variable_and_in_a_file(tmp_path: Path) -> None:
    variable = {"ADAPTERD_LORA_MODULES": 'a=/x\n{"name": "b", "path": "/y"}', "ADAPTERD_ENABLE_LORA": "true"}
    file = tmp_path / "serve.toml"
    file.write_text('lora_modules = ["a=/x", {name = "b", path = "/y"}]\n')
    for settings in (
        load_settings(ServeSettings, {}, variable),
        load_settings(ServeSettings, {}, {}, config=file),
    ):
        assert [module.name for module in settings.lora_modules] == ["a", "b"]


def test_how_adapters_are_called_depends_on_who_looks_for_them() -> None:
    plain = load_settings(ServeSettings, {}, {})
    assert (plain.listed_spellings, plain.router_spellings) == (("prefixed",), ("prefixed", "bare"))
    loading = load_settings(ServeSettings, {"allow_runtime_adapters": True}, {})
    assert loading.listed_spellings == ("prefixed", "bare")
    bare = load_settings(ServeSettings, {"allow_runtime_adapters": True, "model_id_style": "bare"}, {})
    assert bare.listed_spellings == bare.router_spellings == ("bare",)


def test_proofs_on_a_base_whose_weights_cannot_be_had_are_refused_by_name() -> None:
    for settings, flags in ((ServeSettings, {"prove_idle": "60"}), (ProveSettings, {})):
        what = "--prove-idle" if flags else "adapters prove"
        with pytest.raises(ConfigError, match=f"{what} cannot go with --quantization bnb-4bit"):
            load_settings(settings, {**flags, "quantization": "bnb-4bit"}, {})
        load_settings(settings, {**flags, "quantization": "int8"}, {})
    load_settings(ServeSettings, {"quantization": "bnb-4bit"}, {})
