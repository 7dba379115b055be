from __future__ import annotations

import math
import pathlib
import re

import msgspec
import pytest

from llm_serving.config import ServingConfig, load_config
from llm_serving.errors import ConfigError

HOUSE = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(HOUSE.glob("configs/**/*.yaml"))


def all_keys() -> set[str]:
    sections = msgspec.structs.fields(ServingConfig)
    return {f"{s.name}.{f.name}" for s in sections for f in msgspec.structs.fields(s.type)}


def test_every_configuration_that_ships_is_valid() -> None:
    assert len(CONFIGS) >= 3
    for path in CONFIGS:
        load_config(path)


def test_the_default_configuration_says_what_the_code_does() -> None:
    shipped = load_config(HOUSE / "configs/smollm2_135m.yaml")
    assert shipped.model.names == ServingConfig().model.names
    names = msgspec.structs.replace(shipped.model, served_names=None)
    assert msgspec.structs.replace(shipped, model=names) == ServingConfig()


def test_every_key_is_documented_with_its_default() -> None:
    text = (HOUSE / "docs/configuration.md").read_text()
    assert set(re.findall(r"^\| `(\w+\.\w+)` \|", text, re.M)) == all_keys()
    for section in msgspec.structs.fields(ServingConfig):
        for field in msgspec.structs.fields(section.type):
            value = getattr(getattr(ServingConfig(), section.name), field.name)
            row = next(li for li in text.splitlines() if f"`{section.name}.{field.name}`" in li)
            if value is not None:
                shown = str(value).lower() if isinstance(value, bool) else f"{value}"
                assert f"| `{shown.removesuffix('.0')}` |" in row, row


def test_flags_override_the_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("scheduler: {max_num_seqs: 3}\nserver: {port: 1}\n")
    config = load_config(path, {"server.port": 2, "model.path": "x/LLaMA.gguf"})
    assert (config.scheduler.max_num_seqs, config.server.port) == (3, 2)
    assert config.model.names == ("llama2", "llama")


@pytest.mark.parametrize(("text", "stretch"), [("3", 3.0), ("1.5", 1.5), (".inf", math.inf)])
def test_the_share_of_prompts_is_any_multiple_or_no_limit(
    tmp_path: pathlib.Path, text: str, stretch: float
) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(f"scheduler: {{max_step_stretch: {text}}}\n")
    assert load_config(path).scheduler.max_step_stretch == stretch


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("scheduler: {max_num_seq: 3}", "unknown key scheduler.max_num_seq; did you mean sch"),
        ("shceduler: {}", "unknown key shceduler; did you mean scheduler?"),
        ("zzz: {}", "unknown key zzz; known: model, server"),
        ("scheduler: {max_num_seqs: 0}", "scheduler.max_num_seqs: expected `int` >= 1, found 0"),
        ("scheduler: {max_step_stretch: 1}", "scheduler.max_step_stretch: expected `float` > 1"),
        ("scheduler: {max_step_stretch: .nan}", "scheduler.max_step_stretch: expected `float` > 1"),
        ("server: {port: many}", "server.port: expected `int`, got `str`, found 'many'"),
        (
            "model: {dtype: int3}",
            "model.dtype: expected one of auto, float32, .*float16, found 'int3'",
        ),
        ("model: {served_names: [1]}", r"model.served_names\[0\]: expected `str`"),
        ("model: {served_names: ['']}", "model.served_names: '' cannot stand in a URL"),
        ("model: {served_names: [a/generate]}", "model.served_names: 'a/generate' cannot stand"),
        ("model: {served_names: [a b]}", "model.served_names: 'a b' cannot stand"),
        ("scheduler: 3", "scheduler is a section, found 3"),
        ("just words", "expected sections such as 'model:'"),
        ("a: [", "is not YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: pathlib.Path, text: str, problem: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_a_wrong_flag_is_not_blamed_on_the_file() -> None:
    with pytest.raises(ConfigError, match=r"^command line: server.port: expected `int` <= 65535"):
        load_config(HOUSE / "configs/smollm2_135m.yaml", {"server.port": 99999})


@pytest.mark.parametrize(
    ("path", "own"),
    [("a/b c.gguf", "b-c"), ("org/Name-7B", "name-7b"), ("/", "llama2"), (".", "main")],
)
def test_a_model_is_called_by_its_own_name_too(
    path: str, own: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "main").mkdir()
    monkeypatch.chdir(tmp_path / "main")
    names = load_config(None, {"model.path": path}).model.names
    assert names == tuple(dict.fromkeys(("llama2", own)))


def test_a_file_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration: .*none.yaml"):
        load_config(tmp_path / "none.yaml")
