"""run.py in this process: one clear line and exit code 2 for bad input, and what works."""

import errno
import functools
import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import run
from dsjax.checkpoint import CheckpointStore, saving
from dsjax.commands import COMMANDS, folders, terminal
from dsjax.data import JsonTokenizer, read_corpus, train_bpe
from dsjax.hf import from_pretrained
from dsjax.hf.folder import Folder
from dsjax.parallel import build_mesh
from dsjax.train import CHECKPOINTS, runtime
from tests.train.conftest import quick_compilation, shared_steps, write_text

__all__ = ["quick_compilation"]

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
RECIPE = """
from dataclasses import replace
from pathlib import Path
from dsjax.config import Run
from tests.train.conftest import make_run

def recipe() -> Run:
    return replace(make_run(Path({corpus!r})), name={name!r})
"""


@pytest.fixture(autouse=True)
def one_device(monkeypatch) -> None:
    monkeypatch.setattr(runtime, "build_mesh", functools.partial(build_mesh, devices=1))


@pytest.fixture(scope="module")
def build_once() -> Callable:
    return shared_steps()


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("corpus") / "words.txt")


@pytest.fixture
def recipe(words, tmp_path, monkeypatch, build_once) -> str:
    monkeypatch.setattr(runtime, "build_step", build_once)
    return write_recipe(tmp_path / "recipe.py", words)


def write_recipe(path: Path, corpus: Path, name: str = "tiny") -> str:
    path.write_text(RECIPE.format(corpus=str(corpus), name=name))
    return str(path)


@pytest.fixture(scope="module")
def trained(words, build_once, tmp_path_factory) -> Path:
    """A finished run; read it only."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "build_mesh", functools.partial(build_mesh, devices=1))
        patch.setattr(runtime, "build_step", build_once)
        recipe = write_recipe(folder / "recipe.py", words)
        assert run.main(["train", recipe, "--out", str(folder / "run"), "--sample", "0"]) == 0
    return folder / "run"


@pytest.fixture
def refused(capfd) -> Callable[..., str]:
    """Runs a command that must end with exit code 2; returns its error."""

    def check(*arguments: object, one_line: bool = True) -> str:
        capfd.readouterr()
        try:
            status = run.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        out, err = capfd.readouterr()
        assert status == 2, err
        assert "Traceback" not in out + err
        if one_line:
            assert len(err.strip().splitlines()) == 1, err
            assert err.startswith("error: ")
        return re.sub(r"[\s│]+", " ", err)

    return check


@pytest.fixture
def works(capfd) -> Callable[..., str]:
    """Runs a command that must succeed; returns what it printed, white space made even."""

    def check(*arguments: object) -> str:
        capfd.readouterr()
        status = run.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert status == 0, err
        assert "Traceback" not in out + err
        return re.sub(r"[\s│]+", " ", out)

    return check


# --- what is refused -----------------------------------------------------------------------------


def test_unknown_command_prints_the_usage(refused):
    assert "{train,generate,convert,info,tokenize,compare" in refused("trian", one_line=False)


def test_help_is_no_error(capfd):
    assert run.main(["--help"]) == 0
    text = capfd.readouterr().out
    assert "usage: run.py" in text
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_file(name):
    assert callable(importlib.import_module(f"dsjax.commands.{name}").run)


def test_unknown_config_key_is_named(refused, recipe):
    assert "--model.dmi" in refused("train", recipe, "--model.dmi", "3", one_line=False)


def test_value_of_the_wrong_type_is_named(refused, recipe):
    assert "many" in refused("train", recipe, "--train.steps", "many", one_line=False)


def test_missing_recipe(refused, tmp_path):
    assert "there is no recipe" in refused("train", tmp_path / "nothing.py")


def test_file_that_is_no_recipe(refused, tmp_path):
    (tmp_path / "plain.py").write_text("x = 1\n")
    assert "no function recipe()" in refused("train", tmp_path / "plain.py")
    (tmp_path / "words.txt").write_text("to be or not")
    assert "not a Python file" in refused("train", tmp_path / "words.txt")


def test_recipe_with_a_syntax_error(refused, tmp_path):
    (tmp_path / "broken.py").write_text("def recipe(:\n")
    assert "invalid syntax" in refused("train", tmp_path / "broken.py")


def test_recipe_that_raises(refused, tmp_path):
    (tmp_path / "raising.py").write_text("from dsjax.config import Nothing\n")
    assert "Nothing" in refused("train", tmp_path / "raising.py")


def test_missing_corpus(refused, recipe, tmp_path):
    arguments = ("--data.paths", tmp_path / "gone", "--out", tmp_path / "out")
    assert "matches nothing" in refused("train", recipe, *arguments)
    assert not (tmp_path / "out").exists()


def test_empty_corpus(refused, recipe, tmp_path):
    (tmp_path / "empty.txt").touch()
    arguments = ("--data.paths", tmp_path / "empty.txt", "--out", tmp_path / "out")
    assert "no text in" in refused("train", recipe, *arguments)


def test_sequence_longer_than_the_corpus(refused, recipe, tmp_path):
    (tmp_path / "short.txt").write_text("to be\nor not\n" * 4)
    arguments = ("--data.paths", tmp_path / "short.txt", "--data.seq-len", 100)
    assert "seq_len=100" in refused("train", recipe, *arguments, "--out", tmp_path / "out")


def test_tokenizer_larger_than_the_vocabulary(refused, recipe, tmp_path):
    arguments = ("--model.vocab-size", 100, "--out", tmp_path / "out")
    message = refused("train", recipe, *arguments)
    assert "260 tokens" in message
    assert "vocab_size=100" in message


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--model.groups", 3, "groups=3 does not divide experts=4"),
        ("--model.top-k", 9, "top_k=9"),
        ("--model.qk-rope-dim", 3, "qk_rope_dim is 3"),
        ("--data.seq-len", 4000, "seq_len=4000"),
        ("--train.micro-batches", 3, "micro_batches=3 does not divide batch=8"),
        ("--optimizer.peak-lr", -1, "peak_lr is -1"),
        ("--mesh.fsdp", 0, "mesh fsdp is 0"),
    ],
)
def test_setting_that_does_not_fit_is_named(refused, recipe, option, value, named):
    assert named in refused("train", recipe, option, value, one_line=False)


def test_mesh_that_does_not_fit(refused, recipe, tmp_path):
    assert "fsdp=5" in refused("train", recipe, "--mesh.fsdp", 5, "--out", tmp_path / "out")


def test_output_below_a_file(refused, recipe, tmp_path):
    (tmp_path / "file").touch()
    message = refused("train", recipe, "--out", tmp_path / "file" / "run")
    assert "cannot write checkpoints" in message


def test_output_that_holds_a_run(refused, recipe, trained):
    assert "already holds a run" in refused("train", recipe, "--out", trained)


def test_resume_of_another_architecture(refused, recipe, trained):
    arguments = ("--model.dim", 48, "--out", trained, "--resume")
    assert "dim" in refused("train", recipe, *arguments)


def test_full_disk_leaves_the_last_good_step(refused, recipe, tmp_path, monkeypatch):
    write, written = saving.write_durably, []

    def write_until_full(path: Path, content: bytes) -> None:
        written.append(path)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(saving, "write_durably", write_until_full)
    message = refused("train", recipe, "--out", tmp_path / "run", one_line=False)
    (line,) = [line for line in message.split("error: ") if "newest good step is 2" in line]
    assert "saving step 4 failed" in line
    assert "No space left on device" in line
    with CheckpointStore(tmp_path / "run" / CHECKPOINTS) as store:
        assert store.steps() == [2]
        assert store.read_meta()[0] == 2


def test_generate_from_a_folder_that_is_no_model(refused, tmp_path):
    assert "neither a run" in refused("generate", "--model", tmp_path, "--prompt", "to be")


def test_generate_with_an_empty_prompt(refused, trained):
    assert "prompt is empty" in refused("generate", "--model", trained, "--prompt", "")


def test_generate_beyond_the_context(refused, trained):
    arguments = ("--prompt", "to be", "--max-new-tokens", 500)
    assert "context of 128" in refused("generate", "--model", trained, *arguments)


def test_generate_without_a_tokenizer(refused):
    message = refused("generate", "--model", GOLDEN / "v3_tiny", "--prompt", "to be")
    assert "tokenizer.json" in message


def test_generate_with_a_token_beyond_the_vocabulary(refused, tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "v3_tiny", tmp_path / "model"))
    documents = read_corpus((str(ROOT / "dsjax" / "model"),)).documents
    tokenizer = train_bpe(documents, 700, folder / "tokenizer.json")
    late = tokenizer.decode([699])
    assert max(tokenizer.encode(late)) >= 512
    message = refused("generate", "--model", folder, "--prompt", late)
    assert "outside the vocabulary of 512" in message


def test_convert_of_nothing(refused, tmp_path):
    assert "neither a run" in refused("convert", tmp_path, tmp_path / "out")


def test_convert_of_truncated_weights(refused, tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "v3_tiny", tmp_path / "model"))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "model.safetensors" in refused("convert", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_convert_of_weights_of_another_shape(refused, tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "v3_tiny", tmp_path / "model"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "moe_intermediate_size": 32}))
    message = refused("convert", folder, tmp_path / "out")
    assert "has shape" in message
    assert "expected" in message


def test_convert_of_a_damaged_config(refused, tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "v3_tiny", tmp_path / "model"))
    (folder / "config.json").write_text("{")
    assert "config.json" in refused("convert", folder, tmp_path / "out")


def test_info_of_nothing(refused, tmp_path):
    assert "there is no recipe" in refused("info", tmp_path / "nothing.py")


def test_tokenize_with_too_small_a_vocabulary(refused, words, tmp_path):
    arguments = ("--out", tmp_path / "t.json", "--paths", words, "--vocab-size", 100)
    assert "vocab_size is 100" in refused("tokenize", *arguments)


# --- what works ----------------------------------------------------------------------------------

PARAMETERS = {"v3": "671.03B", "v2": "235.74B", "v2_lite": "15.71B"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_info_prints_the_figures_of_every_recipe(works, path):
    text = works("info", path)
    assert PARAMETERS.get(path.stem, "") in text
    for row in ("parameters", "active a token", "latent cache", "GFLOP a token", "routed"):
        assert row in text


def test_info_of_a_published_folder(works):
    assert "4 of 16 routed" in works("info", GOLDEN / "v3_tiny")


def test_convert_keeps_fp8_bit_for_bit(works, tmp_path):
    works("convert", GOLDEN / "v3_tiny_fp8", tmp_path / "out")
    before, after = Folder(GOLDEN / "v3_tiny_fp8"), Folder(tmp_path / "out")
    assert set(before) == set(after)
    for name in before:
        assert before[name].dtype == after[name].dtype, name
        assert before[name].tobytes() == after[name].tobytes(), name


def test_convert_to_bfloat16_loads(works, tmp_path):
    works("convert", GOLDEN / "v3_tiny_fp8", tmp_path / "out", "--dtype", "bfloat16")
    files = Folder(tmp_path / "out")
    assert {files.spec(name).dtype.name for name in files} <= {"bfloat16", "float32"}
    model = from_pretrained(tmp_path / "out")
    assert model.config == from_pretrained(GOLDEN / "v3_tiny_fp8").config


def test_train_reports_and_prints_a_sample(works, recipe, tmp_path):
    text = works("train", recipe, "--out", tmp_path / "run", "--sample", 8)
    assert "bits per byte (xz -9 of the same text" in text
    assert "MaxVio_global" in text
    assert "sample: def " in text
    assert (tmp_path / "run" / "loss.png").is_file()


def test_generate_continues_the_prompt_the_same_way_each_time(works, trained):
    arguments = ("generate", "--model", trained, "--prompt", "to be", "--max-new-tokens", 8)
    first = works(*arguments)
    assert first.startswith("to be")
    assert len(first) > len("to be ")
    assert works(*arguments) == first


def test_convert_of_a_run_is_a_published_checkpoint(works, trained, tmp_path):
    works("convert", trained, tmp_path / "out", "--dtype", "float32")
    assert "2 of 4 routed" in works("info", tmp_path / "out")
    assert from_pretrained(tmp_path / "out", "float32").config.vocab_size == 300


def test_tokenize_writes_what_train_accepts(works, recipe, words, tmp_path):
    path = tmp_path / "tokenizer.json"
    text = works("tokenize", "--out", path, "--paths", words, "--vocab-size", 280)
    size = JsonTokenizer(path).vocab_size
    assert 260 < size <= 280
    assert f"{size} tokens" in text
    out = tmp_path / "run"
    works("train", recipe, "--out", out, "--sample", 0, "--data.tokenizer", path)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 10


def test_fp8_needs_widths_that_fit(refused, recipe, tmp_path):
    text = refused("train", recipe, "--out", tmp_path / "run", "--precision", "fp8")
    assert "kv_down is 32 wide in and 20 out" in text
    assert "multiples of 16" in text


def test_simulated_fp8_is_said_to_be(capsys):
    terminal.hint_at_simulated_fp8("bf16")
    assert not capsys.readouterr().out
    terminal.hint_at_simulated_fp8("fp8")
    assert "simulated here" in capsys.readouterr().out


def test_default_folder_is_the_next_free_one_or_the_last_to_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "RUNS", tmp_path)
    assert folders.default_folder("tiny", resume=False) == tmp_path / "tiny"
    assert folders.default_folder("tiny", resume=True) == tmp_path / "tiny"
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny-2").mkdir()
    assert folders.default_folder("tiny", resume=False) == tmp_path / "tiny-3"
    assert folders.default_folder("tiny", resume=True) == tmp_path / "tiny-2"


def test_convert_to_fp8_loads(works, tmp_path):
    works("convert", GOLDEN / "v3_tiny", tmp_path / "out", "--dtype", "fp8")
    assert Folder(tmp_path / "out").spec("model.layers.1.self_attn.o_proj.weight").dtype == (
        Folder(GOLDEN / "v3_tiny_fp8").spec("model.layers.1.self_attn.o_proj.weight").dtype
    )
    assert hasattr(from_pretrained(tmp_path / "out"), "fp8_scales")
