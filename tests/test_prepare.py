"""Preparation as a whole: names become cards, cards are found again, nothing half-made counts."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
from contextlib import suppress

import msgspec
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer

from llm_serving.cli import main
from llm_serving.commands.console import ConsoleProgress
from llm_serving.errors import ConfigError
from llm_serving.model_card import ModelCard
from llm_serving.prepare.cache import cache_home, find_prepared, load, prepared_key, store
from llm_serving.prepare.dtypes import cpu_has_bfloat16
from llm_serving.prepare.hub import download_snapshot
from llm_serving.prepare.prepare import prepare
from llm_serving.prepare.progress import Quiet
from llm_serving.prepare.sources import Source, find_source
from tests.native_kernels import needs_native
from tests.tiny_gguf import CONFIG, END, from_hf, metadata, random_tensors, write_gguf
from tests.tiny_tokenizer import tiny_tokenizer_path

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llm-serving"


@pytest.fixture
def gguf(tmp_path: pathlib.Path) -> pathlib.Path:
    return write_gguf(tmp_path / "tiny.F32.gguf", from_hf(random_tensors()))


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("saved")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        dtype="float32",
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer_path(folder)
    return folder


@pytest.fixture
def folder(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / "tiny-llama"))


def prepared(model: object, dtype: str = "auto") -> ModelCard:
    return prepare(str(model), dtype, Quiet())


# ---- cards ----


def test_a_gguf_file_becomes_a_card(gguf: pathlib.Path) -> None:
    card = prepared(gguf)
    assert (card.name, card.source) == ("tiny.F32", str(gguf))
    assert (card.architecture, card.config) == ("LlamaForCausalLM", CONFIG)
    assert (card.dtype, card.weights_kind) == ("float32", "F32")
    assert (card.bos_token_id, card.eos_token_ids) == (END, [END])
    weights = load_file(card.weights[0])
    for name, weight in random_tensors().items():
        assert torch.equal(weights[name], torch.from_numpy(weight)), name
    assert Tokenizer.from_file(card.tokenizer).encode(" the").tokens == ["Ġthe"]


def test_a_folder_becomes_a_card_and_its_weights_stay(folder: pathlib.Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    card = prepared(folder)
    assert (card.name, card.source) == ("tiny-llama", str(folder))
    assert card.weights == [str(folder / "model.safetensors")]
    assert (card.dtype, card.weights_kind) == ("float32", "float32")
    assert card.chat_template == "{{ messages }}"
    assert Tokenizer.from_file(card.tokenizer).encode("the").tokens == ["▁", "the"]


def test_fields_of_which_nothing_is_known_are_told_by_name(folder: pathlib.Path) -> None:
    class Listening(Quiet):
        def __init__(self) -> None:
            self.sentences: list[str] = []

        def say(self, sentence: str) -> None:
            self.sentences.append(sentence)

    told = Listening()
    prepare(str(folder), "float32", told)
    assert told.sentences == []
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"frobnication": 3, "zeal": 1}))
    prepare(str(folder), "float32", told)
    (sentence,) = told.sentences
    assert "config.json: nothing is known of frobnication, zeal; the model is served" in sentence


def test_a_dtype_that_is_asked_for_is_another_preparation(gguf: pathlib.Path) -> None:
    first, second = prepared(gguf), prepared(gguf, "bfloat16")
    assert first.weights != second.weights
    assert load_file(second.weights[0])["model.norm.weight"].dtype == torch.bfloat16
    assert first.digest == second.digest
    with pytest.raises(ConfigError, match="dtype 'int8' is not known"):
        prepared(gguf, "int8")


@pytest.mark.parametrize(
    ("cpuinfo", "has"),
    [
        ("flags\t: fpu avx512f avx512_bf16\n", True),
        ("flags\t: fpu amx_bf16 amx_tile\n", True),
        ("flags\t: fpu avx512f avx2\n", False),
        ("Features : fp asimd\n", False),
    ],
)
def test_bfloat16_is_chosen_where_the_processor_has_it(
    tmp_path: pathlib.Path, cpuinfo: str, has: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert cpu_has_bfloat16(tmp_path / "cpuinfo") == has
    assert not cpu_has_bfloat16(tmp_path / "absent")


def test_the_default_model_is_found_and_described(smollm2_card: ModelCard) -> None:
    assert smollm2_card.name == "SmolLM2-135M-Instruct.Q4_1"
    assert smollm2_card.weights_kind == "Q4_1"
    assert smollm2_card.config.tie_word_embeddings
    assert (smollm2_card.bos_token_id, smollm2_card.eos_token_ids) == (1, [2])
    assert smollm2_card.chat_template is not None


# ---- found again ----


def test_what_was_prepared_is_found_until_its_source_changes(gguf: pathlib.Path) -> None:
    assert find_prepared(str(gguf), "auto") is None
    card = prepared(gguf)
    assert find_prepared(str(gguf), "auto") == card
    assert find_prepared(str(gguf), "float16") is None
    os.utime(gguf, ns=(1, 1))
    assert find_prepared(str(gguf), "auto") is None


def test_a_relative_path_is_the_same_source(
    gguf: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = prepared(gguf)
    monkeypatch.chdir(gguf.parent)
    assert find_prepared(gguf.name, "auto") == card


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_any_file_of_a_folder_counts(folder: pathlib.Path, name: str) -> None:
    card = prepared(folder)
    assert find_prepared(str(folder), "auto") == card
    os.utime(folder / name, ns=(1, 1))
    assert find_prepared(str(folder), "auto") is None


def test_a_file_that_appears_counts_too(folder: pathlib.Path) -> None:
    prepared(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert prepared(folder).eos_token_ids == [7]


@pytest.mark.parametrize("name", ["card.json", "files.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
def test_a_damaged_preparation_is_made_again(gguf: pathlib.Path, name: str, damage: str) -> None:
    card = prepared(gguf)
    path = pathlib.Path(card.tokenizer).with_name(name)
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    assert find_prepared(str(gguf), "auto") is None
    assert prepared(gguf) == card
    assert name == "files.json" or path.read_bytes() == whole  # which holds times


def test_a_card_of_another_version_is_not_believed(gguf: pathlib.Path) -> None:
    card = prepared(gguf)
    path = pathlib.Path(card.tokenizer).with_name("card.json")
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(card, version=0)))
    assert find_prepared(str(gguf), "auto") is None


def test_looking_imports_nothing_heavy(gguf: pathlib.Path) -> None:
    prepared(gguf)
    script = (
        "import sys\n"
        "from llm_serving.prepare.cache import find_prepared\n"
        "assert find_prepared(sys.argv[1], 'auto') is not None\n"
        "heavy = {'torch', 'gguf', 'transformers', 'tokenizers', 'numpy', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(gguf)], check=True)


# ---- atomic ----


def test_an_interrupted_preparation_leaves_nothing_that_is_believed(
    gguf: pathlib.Path, cache: pathlib.Path
) -> None:
    key = prepared_key(Source("tiny", gguf), "auto")

    def build(partial: pathlib.Path, final: pathlib.Path) -> ModelCard:
        (partial / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(key, build, lambda: None)
    assert load(key) is None
    assert [path.suffix for path in (cache / "prepared").iterdir()] == [".lock"]


def test_what_a_killed_preparation_left_is_swept(gguf: pathlib.Path, cache: pathlib.Path) -> None:
    left = cache / "prepared" / "0123.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    prepared(gguf)
    assert not left.exists()


def test_of_two_at_a_time_the_second_waits_and_makes_nothing(
    gguf: pathlib.Path, cache: pathlib.Path
) -> None:
    card = prepared(gguf)
    key, other = "k", "other"
    begun, go_on = threading.Event(), threading.Event()
    made: list[str] = []

    def build(partial: pathlib.Path, final: pathlib.Path) -> ModelCard:
        made.append(final.name)
        if final.name == key:
            begun.set()
            assert go_on.wait(30)
            assert partial.exists()  # another's sweep left it alone
        return card

    first = threading.Thread(target=store, args=(key, build, lambda: None))
    first.start()
    assert begun.wait(30)
    store(other, build, lambda: None)  # another model need not wait
    assert store(key, build, go_on.set) == card
    first.join(30)
    assert made == [key, other]


def test_a_source_that_changes_meanwhile_is_noticed(gguf: pathlib.Path) -> None:
    class Touching(Quiet):
        def phase(self, name: str) -> None:
            os.utime(gguf)

    with pytest.raises(ConfigError, match="changed while it was read"):
        prepare(str(gguf), "auto", Touching())


def test_a_full_disk_is_one_sentence(gguf: pathlib.Path) -> None:
    def build(partial: pathlib.Path, final: pathlib.Path) -> ModelCard:
        raise OSError(28, "No space left on device", str(partial))

    with pytest.raises(ConfigError, match=r"cannot prepare the model in .*No space left"):
        store("k", build, lambda: None)


# ---- names ----


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ("nothing", "no model 'nothing': it is neither a folder or .gguf file"),
        ("./no/such.gguf", "no model './no/such.gguf'"),
        ("", "no model ''"),
        (__file__, "neither a folder with config.json"),
    ],
)
def test_a_name_that_means_nothing_is_explained(model: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        prepared(model)


def test_a_catalogue_name_means_the_file_in_the_cache(cache: pathlib.Path) -> None:
    assert find_prepared("smollm2-135m-instruct", "auto") is None
    cache.mkdir(parents=True)
    (cache / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    source = find_source("smollm2-135m-instruct")
    assert source is not None
    assert source.path == cache / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_relative_cache_home_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_home() == pathlib.Path("/home/somebody/.cache/llm-serving")


def test_a_hub_id_means_the_snapshot_it_was_last_downloaded_as(folder: pathlib.Path) -> None:
    def download(repo_id: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert "*.safetensors" in allow_patterns
        return str(folder)

    assert find_prepared("org/tiny", "auto") is None
    download_snapshot("org/tiny", download)
    source = find_source("org/tiny")
    assert source == Source("org/tiny", folder)
    shutil.rmtree(folder)
    assert find_source("org/tiny") is None


def test_an_unreachable_hub_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-m", "llm_serving", "prepare", "org/never-seen"],
        env=os.environ | offline,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "cannot download org/never-seen: the Hugging Face hub can not be reached" in done.stderr
    assert "Traceback" not in done.stderr


# ---- the command ----


def test_the_command_prints_phases_and_ends_with_the_card(
    gguf: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", str(gguf), "--dtype", "float16", "--json"]) == 0
    out, err = capfd.readouterr()
    card = msgspec.json.decode(out.splitlines()[-1], type=ModelCard)
    assert card == find_prepared(str(gguf), "float16")
    phases = [line for line in err.splitlines() if line.endswith(" s")]
    assert [line.split(":")[0] for line in phases] == [
        "read the file",
        "build the tokenizer",
        "convert the weights from F32 to float16",
        "fingerprint the file",
    ]
    assert main(["prepare", str(gguf), "--dtype", "float16"]) == 0
    assert "is prepared already" in capfd.readouterr().err


def test_a_model_that_can_not_be_served_is_exit_code_1(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    meta = metadata() | {"llama.expert_count": 8}
    path = write_gguf(tmp_path / "m.gguf", from_hf(random_tensors()), meta)
    assert main(["prepare", str(path)]) == 1
    err = capfd.readouterr().err
    assert "llm-serving prepare:" in err
    assert "expert_count = 8 is not supported" in err
    assert "Traceback" not in err


def test_more_tokens_than_embeddings_is_a_mismatch(tmp_path: pathlib.Path) -> None:
    config = msgspec.structs.replace(CONFIG, vocab_size=200)
    tensors = from_hf(random_tensors(config), config)
    path = write_gguf(tmp_path / "m.gguf", tensors, metadata(config))
    with pytest.raises(ConfigError, match=r"261 tokens, but token_embd.weight has 200 rows"):
        prepared(path)


def test_a_folder_without_config_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no config.json"):
        prepared(tmp_path / "empty")


def test_a_terminal_sees_a_bar_and_keeps_only_the_phases(tmp_path: pathlib.Path) -> None:
    """A pseudo-terminal, as a person would have it."""
    parent, child = os.openpty()
    with open(child, "w") as stream, ConsoleProgress(stream) as progress:
        progress.phase("convert")
        progress.advance(50, 100)
        progress.advance(100, 100)
        progress.say("done")
    shown = _all_of(parent)
    assert "convert" in shown
    assert re.search(r"convert: \d+\.\d s", shown)
    assert "done" in shown


def _all_of(terminal: int) -> str:
    """Whatever was written; a terminal whose other end is closed ends with EIO."""
    shown = b""
    with suppress(OSError):
        while part := os.read(terminal, 65536):
            shown += part
    os.close(terminal)
    return shown.decode()


def test_the_json_of_a_card_is_one_line(
    folder: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", str(folder), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["architecture"] == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("flags", "weights"),
    [
        pytest.param([], "auto", marks=needs_native),
        pytest.param(["--weights", "int8"], "int8", marks=needs_native),
        (["--kernels", "reference"], None),
    ],
)
def test_the_command_prepares_what_serve_with_the_same_flags_looks_for(
    gguf: pathlib.Path, flags: list[str], weights: str | None
) -> None:
    assert main(["prepare", str(gguf), *flags]) == 0
    card = find_prepared(str(gguf), "auto", weights)
    assert card is not None
    assert (card.packed is None) == (weights is None)
    others = {"auto", "int8", None} - {weights}
    assert [find_prepared(str(gguf), "auto", other) for other in others] == [None, None]


def test_weights_that_reference_kernels_do_not_have_are_refused(
    gguf: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", str(gguf), "--weights", "int8", "--kernels", "reference"]) == 1
    assert "model.weights: int8 needs the native kernels, but agent.kernels is reference" in (
        capsys.readouterr().err
    )
