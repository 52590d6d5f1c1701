import pytest

from adapterd.errors import InvalidRequest, ModelNotFound
from adapterd.model_name import Part, is_adapter_name, nearest_names, parse_model_name


@pytest.mark.parametrize("model", ["mini", "base"])
def test_base_and_its_alias_name_no_adapter(model: str) -> None:
    assert parse_model_name(model, base_name="mini") == ()


@pytest.mark.parametrize("model", ["support", "mini:support", "base:support"])
def test_one_adapter_with_and_without_its_base(model: str) -> None:
    assert parse_model_name(model, base_name="mini") == (Part("support", None, 1.0),)


def test_base_name_may_hold_slash_and_colon() -> None:
    assert parse_model_name("Qwen/Qwen3-0.6B", base_name="Qwen/Qwen3-0.6B") == ()
    assert parse_model_name("qwen3:0.6b:sql", base_name="qwen3:0.6b") == (Part("sql", None, 1.0),)


def test_versions_and_weights() -> None:
    assert parse_model_name("mini:sql@abcdef0", base_name="mini") == (Part("sql", "abcdef0", 1.0),)
    assert parse_model_name("mini:a*0.7+b-2@123456*-0.25+c.d", base_name="mini") == (
        Part("a", None, 0.7),
        Part("b-2", "123456", -0.25),
        Part("c.d", None, 1.0),
    )


@pytest.mark.parametrize("version", ["1", "12345", "stable", "canary-2", "v1.2", "3fa94c"])
def test_a_version_is_a_number_an_alias_or_the_beginning_of_a_digest(version: str) -> None:
    assert parse_model_name(f"mini:sql@{version}", base_name="mini") == (Part("sql", version, 1.0),)


@pytest.mark.parametrize(
    "model",
    [
        *("", ":", "mini:", "other:support", "../etc/passwd", "mini:../x", "mini:a/b", "a\0b", "mini:%2e%2e"),
        *(
            "x" * 129,
            "mini:a+",
            "mini:.a",
            "mini:a@",
            "mini:a@.x",
            "Mini:support",
            "mini:support ",
            "mini::a",
        ),
        "mini:\u2024",
    ],
)
def test_what_can_be_no_name_is_not_found(model: str) -> None:
    with pytest.raises(ModelNotFound) as refusal:
        parse_model_name(model, base_name="mini")
    assert refusal.value.param == "model"


@pytest.mark.parametrize(
    "model",
    [
        "a*",
        "a*x",
        "a*0",
        "a*0.0",
        "a*nan",
        "a*inf",
        "a*1e3",
        "a*1001",
        "a*0.5*0.5",
        "a@abcde",
        "a@0",
        "+".join("abcdefghi"),
    ],
)
def test_bad_compositions_are_the_clients_error(model: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_model_name(f"mini:{model}", base_name="mini")


def test_messages_do_not_repeat_a_novel_or_control_characters() -> None:
    with pytest.raises(ModelNotFound) as refusal:
        parse_model_name("\x1b[31m" + "x" * 10_000, base_name="mini")
    assert len(refusal.value.message) < 300
    assert "\x1b" not in refusal.value.message


def test_adapter_names() -> None:
    assert all(map(is_adapter_name, ["a", "9.A_b-c", "x" * 128]))
    assert not any(map(is_adapter_name, ["", ".a", "-a", "a b", "ä", "x" * 129, "a\n", "a/b"]))


def test_nearest_names_come_first_and_are_few() -> None:
    names = [f"adapter-{i}" for i in range(10_000)] + ["support", "moderation"]
    nearest = nearest_names("suport", names)
    assert nearest[0] == "support"
    assert len(nearest) == 20
    assert nearest_names("x", []) == []
