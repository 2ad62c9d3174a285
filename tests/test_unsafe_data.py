"""No code from templates, tokenizers, data sets, and the pickles beside safetensors."""

import io
import json
import os
import pickle
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import jinja2
import pyarrow
import pyarrow.parquet
import pytest

from megalora.__main__ import main
from megalora.data import template_limits
from megalora.data.rows import load_rows
from megalora.hf.peft import write_adapter
from tests.support.chat_templates import CHATML, SAID, texts
from tests.support.forgery import Payload, runs
from tests.support.forked import call
from tests.support.hf_models import hf_model, random_factors

code_in_a_file = pytest.mark.bad_input("code in a file")

# --- chat templates ---

# Each makes a directory where jinja2 has no sandbox.
HOSTILE = {
    "cycler": "{{ cycler.__init__.__globals__.os.mkdir('AT') }}",
    "joiner": "{{ joiner.__init__.__globals__['os'].mkdir('AT') }}",
    "lipsum": "{{ lipsum.__globals__.os.mkdir('AT') }}",
    "the template": "{{ self.__init__.__globals__.__builtins__.__import__('os').mkdir('AT') }}",
    "a filter": "{{ (lipsum | attr('__globals__')).get('os').mkdir('AT') }}",
    "a block": "{% for m in messages %}{% generation %}"
    "{{ cycler.__init__.__globals__.os.mkdir('AT') }}{% endgeneration %}{% endfor %}",
}


@code_in_a_file
@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_reaches_nothing_of_python(name: str, tmp_path: Path) -> None:
    at = tmp_path / "made"
    template = HOSTILE[name].replace("AT", str(at))
    plain = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    jinja2.Environment().from_string(plain).render(messages=SAID[:1])
    assert at.is_dir()
    at.rmdir()
    with pytest.raises(ValueError, match="the chat template refuses it"):
        texts({"messages": SAID}, template)
    assert not at.exists()


def test_a_template_cannot_change_the_chat() -> None:
    with pytest.raises(ValueError, match="the chat template refuses it"):
        texts({"messages": SAID}, "{{ messages.append(messages[0]) }}" + CHATML)


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    "a long range": "{{ range(10 ** 9) | list }}",
    "loops in loops": LOOPS,
    "loops in a block": "{% generation %}" + LOOPS + "{% endgeneration %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "a text of a TB": "{{ 'a'.center(10 ** 12) }}",
}


@pytest.mark.bad_input("work without bound")
@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_ends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(ValueError, match="the chat template refuses it"):
        texts({"messages": SAID}, CHATML + ENDLESS[name])
    assert time.monotonic() - start < 30


def test_the_limit_of_one_template_is_not_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.05)
    with template_limits.template_errors():
        pass
    time.sleep(0.1)
    message = r"TimeoutError: it takes more than 0\.05 s"
    with pytest.raises(ValueError, match=message), template_limits.template_errors():
        time.sleep(1)


# --- tokenizers ---


def stranger(tmp_path: Path) -> Path:
    """Return a tokenizer that brings Python, which writes `marker` beside it."""
    directory = tmp_path / "stranger"
    directory.mkdir()
    auto = {"auto_map": {"AutoTokenizer": ["own.Own", None], "AutoConfig": "own.Own"}}
    (directory / "config.json").write_text(json.dumps({"model_type": "own", **auto}))
    config = {"tokenizer_class": "Own", **auto}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text(
        f"open({str(tmp_path / 'marker')!r}, 'w')\n"
        "from transformers import PreTrainedTokenizer\nclass Own(PreTrainedTokenizer): pass\n"
    )
    return directory


def build(kind: str, directory: Path, **more: object) -> None:
    """Build a tokenizer as a run of adapters does."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import arguments

    from megalora.training.trust import build_tokenizer as guarded

    argv, sys.argv = sys.argv, ["run"]
    args = arguments.parse_args()
    sys.argv = argv
    given = {"tokenizer_type": kind, "tokenizer_model": str(directory), "lora_rank": 8, **more}
    guarded(build_tokenizer, Namespace(**{**vars(args), "rank": 0, **given}))


def hugging_face(directory: Path) -> None:
    build("HuggingFaceTokenizer", directory)


def sft(directory: Path) -> None:
    build("SFTTokenizer", directory, sft_tokenizer_prompt_format="identity")


def with_megatrons_flag(directory: Path) -> None:
    build("HuggingFaceTokenizer", directory, trust_remote_code=True)


def recommend(directory: Path) -> None:
    from megalora.recommend.cli import _hf_tokenizer

    _hf_tokenizer(str(directory))


def trusting(directory: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(directory, trust_remote_code=True)


def asking(directory: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(directory)


SAFE = (hugging_face, sft, recommend, with_megatrons_flag)
# The proof that there is something to run; what is imported once is not run again.
UNSAFE = (asking, trusting)


def try_tokenizers(directory: Path) -> dict[str, tuple[str, bool]]:
    """Return of each way to load it its error, and whether code ran; every question has a yes."""
    from transformers import dynamic_module_utils

    dynamic_module_utils.HF_MODULES_CACHE = str(directory.parent / "modules")
    marker, said = directory.parent / "marker", {}
    for load in (*SAFE, *UNSAFE):
        sys.stdin, error = io.StringIO("y\n" * 9), ""
        try:
            load(directory)
        except Exception as refusal:
            error = f"{type(refusal).__name__}: {refusal}"
        said[load.__name__] = error, marker.exists()
        marker.unlink(missing_ok=True)
        for name in [name for name in sys.modules if name.startswith("transformers_modules.")]:
            del sys.modules[name]
    return said


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, bool]]:
    return call(try_tokenizers, stranger(tmp_path_factory.mktemp("tokenizer")))


@code_in_a_file
@pytest.mark.parametrize("load", SAFE, ids=lambda load: load.__name__)
def test_a_tokenizers_own_python_is_not_run(
    load: Callable[[Path], None], loaded: dict[str, tuple[str, bool]]
) -> None:
    error, has_run = loaded[load.__name__]
    assert error.startswith("ValueError: ")
    assert "trust_remote_code" in error
    assert not has_run


@pytest.mark.parametrize("load", UNSAFE, ids=lambda load: load.__name__)
def test_the_tokenizer_of_these_tests_runs_where_it_is_trusted(
    load: Callable[[Path], None], loaded: dict[str, tuple[str, bool]]
) -> None:
    assert loaded[load.__name__][1]


# --- data sets ---


@code_in_a_file
def test_the_script_of_a_dataset_is_not_run(tmp_path: Path, datasets_cache: None) -> None:
    (tmp_path / "data").mkdir()
    script = tmp_path / "data" / "data.py"
    script.write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    with pytest.raises(ValueError, match="is not files of one kind"):
        load_rows(str(tmp_path / "data"))
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "a"}')
    assert len(load_rows(str(tmp_path / "data"))) == 1
    assert not (tmp_path / "marker").exists()
    exec(script.read_text())
    assert (tmp_path / "marker").exists()


@code_in_a_file
def test_a_type_of_arrow_is_not_unpickled(tmp_path: Path, datasets_cache: None) -> None:
    marker = tmp_path / "marker"
    payload = pickle.dumps(Payload(marker))
    assert runs(payload, marker)
    field = pyarrow.field("text", pyarrow.string()).with_metadata(
        {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payload}
    )
    table = pyarrow.table([pyarrow.array(["a"])], schema=pyarrow.schema([field]))
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    try:
        list(load_rows(str(tmp_path / "data.parquet")))
    finally:
        assert not marker.exists()


# --- the pickles beside an adapter and a base ---

BESIDE = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "state.pkl")


COMMANDS = {
    "inspect": "inspect adapter",
    "import": "import adapter --hf-model base --output imported",
    "merge": "merge adapter --hf-model base --output merged",
    "import-base": "import-base --hf-model base --output base-ckpt",
    "flags": "flags --hf-model base",
    "recommend": "recommend --model base --rank 8 --tokens 1000",
}
# These read weights.
READING = ("inspect", "import", "merge", "import-base")
Ran = dict[tuple[str, bool], tuple[int, str, bool]]


def exchanged(place: Path) -> Path:
    """Return a place with `base` and `adapter`, and payloads in all files but their weights."""
    hf_model("qwen3").save_pretrained(str(place / "base"))
    factors = random_factors(hf_model("qwen3"), {"": (2, 1.0)})
    write_adapter(place / "adapter", factors, base_model_name="tiny")
    marker = place / "marker"
    payload = pickle.dumps(Payload(marker))
    assert runs(payload, marker)
    names = ("pytorch_model.bin", "adapter_model.bin", *BESIDE)
    for path in (place / kind / name for kind in ("base", "adapter") for name in names):
        path.write_bytes(payload)
    (place / "base" / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')")
    config = place / "base" / "config.json"
    auto = {"auto_map": {"AutoConfig": "modeling_own.Own"}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **auto}))
    return place


def run_commands(place: Path) -> Ran:
    """Return of each command, with weights and without: status, error, whether a payload ran."""
    os.chdir(place)
    ran: Ran = {}
    for has_weights in (True, False):
        for weights in place.glob("*/*.safetensors") if not has_weights else ():
            weights.unlink()
        for name in COMMANDS if has_weights else READING:
            sys.stderr = io.StringIO()
            words = COMMANDS[name].replace(
                "--output ", "--output " if has_weights else "--output no-"
            )
            status = main(words.split())
            ran[name, has_weights] = status, sys.stderr.getvalue(), (place / "marker").exists()
    return ran


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return call(run_commands, exchanged(tmp_path_factory.mktemp("exchanged")))


@code_in_a_file
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_does_not_open_the_pickles_beside(name: str, ran: Ran) -> None:
    status, error, has_run = ran[name, True]
    assert status == 0, error
    assert not has_run


@code_in_a_file
@pytest.mark.parametrize("name", READING)
def test_a_command_refuses_weights_in_a_pickle(name: str, ran: Ran) -> None:
    status, error, has_run = ran[name, False]
    assert status
    assert "a pickle, which can run code and is never loaded" in error
    assert not has_run
