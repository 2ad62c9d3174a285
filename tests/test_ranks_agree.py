"""What one rank was given, or reads, differently ends all of them before they train."""

import json
import shutil
from pathlib import Path

import pytest

from megalora.training import agree
from tests.support.forked import SCRIPT, Ranks
from tests.support.honest import write_base
from tests.support.tiny import LORA, MODEL, TRAIN, flags
from tests.test_example import EXAMPLE

pytestmark = pytest.mark.bad_input("a rank that disagrees")

# The message alone, as users see it.
PLAIN = {"MEGALORA_TRACEBACK": ""}
GIVEN = [*MODEL, *TRAIN, *LORA, "--train-iters", 2]


def refused(run: Ranks) -> str:
    """Return the one message of a run that all its ranks have left before the first step."""
    assert run.end() == [1] * len(run.logs), run.text()
    assert "Traceback" not in run.text()
    assert run.losses() == {}
    found = [line for line in run.text().splitlines() if line.startswith("error: ")]
    assert len(found) == 1, run.text()
    (message,) = found
    return message.removeprefix("error: ranks disagree: ")


def one_differs(logs: Path, *own: object, rank: int = 1, ranks: int = 2, **more: object) -> Ranks:
    return Ranks(ranks, GIVEN, logs, env=PLAIN, own_flags={rank: own}, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ("--lora-rank 16", "lora_rank is 16 on rank 1 (HOST), but 8 on rank 0 (HOST)"),
        ("--lora-targets attn", "lora_targets is ['attn'] on rank 1 (HOST), but "),
        ("--lr 2e-2", "lr is 0.02 on rank 1 (HOST), but 0.01 on rank 0 (HOST)"),
        ("--seed 7", "seed is 7 on rank 1 (HOST), but 1234 on rank 0 (HOST)"),
        # Megatron itself would wait for ranks that make other groups.
        ("--tensor-model-parallel-size 2", "tensor_model_parallel_size is 2 on rank 1 (HOST)"),
        ("--lora-rank 16 --lr 2e-2", "lora_rank is 16 on rank 1 (HOST), but 8 on rank 0 (HOST); "),
    ],
)
def test_a_flag_that_one_rank_was_given(own: str, said: str, tmp_path: Path) -> None:
    assert said in without_hosts(refused(one_differs(tmp_path, *own.split())))


def without_hosts(message: str) -> str:
    import socket

    return message.replace(f"({socket.gethostname()})", "(HOST)")


def test_the_rank_that_differs_from_three_is_named(tmp_path: Path) -> None:
    message = refused(one_differs(tmp_path, "--lora-alpha", 64, rank=2, ranks=4))
    assert without_hosts(message) == (
        "lora_alpha is 64.0 on rank 2 (HOST), but not given on rank 0 (HOST) and 2 more: "
        "start all ranks with the same flags"
    )


def test_a_switch_in_the_environment_of_one_rank(tmp_path: Path) -> None:
    message = refused(one_differs(tmp_path, own_env={1: {"NVTE_FLASH_ATTN": "0"}}))
    assert message.startswith("environment variable NVTE_FLASH_ATTN is '0' on rank 1 (")
    assert "but not there on rank 0" in message


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("import numpy, importlib.metadata as m; m.version = lambda name: '9'", "version of "),
        # As another version of megalora or Megatron would have it.
        ("import argparse; argparse.Namespace.__init__ = _with_more", "new_flag is 1 on rank 1 ("),
    ],
    ids=["other packages", "a flag that the others do not know"],
)
def test_other_software_on_one_rank(before: str, said: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "def _with_more(self, **given):\n    vars(self).update(given, new_flag=1)\n"
        f"if os.environ['RANK'] == '1':\n    {before}\n{SCRIPT.read_text()}"
    )
    assert said in refused(Ranks(2, GIVEN, tmp_path / "logs", script=script, env=PLAIN))


def copy_with_another_byte(source: Path, target: Path, pattern: str) -> Path:
    shutil.copytree(source, target)
    (file, *_) = sorted(target.rglob(pattern))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return target


@pytest.mark.parametrize("layout", ["dp", "tp2 sp"])
def test_another_base_on_one_rank(layout: str, base: Path, tmp_path: Path) -> None:
    other = copy_with_another_byte(base, tmp_path / "base", "*.distcp")
    own = {rank: ["--pretrained-checkpoint", path] for rank, path in enumerate([base, other])}
    given = [*GIVEN, *flags(layout)]
    message = refused(Ranks(2, given, tmp_path / "logs", env=PLAIN, own_flags=own))
    assert message.startswith("what pretrained_checkpoint holds is ")
    assert message.endswith(": give every node the same files")


def test_the_same_base_by_another_path_is_the_same(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    own = {r: ["--pretrained-checkpoint", p] for r, p in enumerate([base, tmp_path / "base"])}
    run = Ranks(2, GIVEN, tmp_path / "logs", env=PLAIN, own_flags=own).succeed()
    assert set(run.losses()) == {1, 2}


def test_a_directory_that_one_rank_does_not_see(base: Path, tmp_path: Path) -> None:
    own = {0: ["--pretrained-checkpoint", base], 1: ["--pretrained-checkpoint", tmp_path / "no"]}
    text = Ranks(2, GIVEN, tmp_path / "logs", env=PLAIN, own_flags=own)
    assert "is not readable (No such file or directory) on rank 1 (" in refused(text)


def test_another_hugging_face_base_on_one_rank(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    copy_with_another_byte(write_base(tmp_path / "a", config), tmp_path / "b", "*.safetensors")
    words = "--transformer-impl local --no-gradient-accumulation-fusion --vocab-size 256"
    switches = "--no-bias-swiglu-fusion --no-rope-fusion --no-masked-softmax-fusion"
    given = [*words.split(), *switches.split(), "--seq-length", 16, *TRAIN, *LORA]
    given += ["--train-iters", 2]
    own = {rank: ["--hf-model", tmp_path / name] for rank, name in enumerate("ab")}
    message = refused(Ranks(2, given, tmp_path / "logs", env=PLAIN, own_flags=own))
    assert message.startswith("what hf_model holds is 2 files with digest ")


def example(logs: Path, *files: Path, layout: str = "dp") -> Ranks:
    words = [word for word in MODEL if word not in ("--vocab-size", "255")]
    given = [*words, *TRAIN, *LORA, "--byte-tokenizer", "--train-iters", 1, *flags(layout)]
    own = {rank: ["--dataset", path] for rank, path in enumerate(files)}
    return Ranks(2, given, logs, script=EXAMPLE, by_megalora=False, env=PLAIN, own_flags=own)


@pytest.fixture
def two_files(tmp_path: Path) -> list[Path]:
    """Data that differs in the last of many rows."""
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, last in zip(paths, ("7", "8"), strict=True):
        rows = [{"prompt": f"{a}+1=", "completion": str(a + 1)} for a in range(50)]
        rows.append({"prompt": "3+4=", "completion": last})
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return paths


def test_another_row_of_data_on_one_rank(two_files: list[Path], tmp_path: Path) -> None:
    message = refused(example(tmp_path / "logs", *two_files))
    assert message.startswith("data set 0 is 4 samples with digest ")
    assert message.endswith(": give every node the same data and tokenizer")


def test_only_ranks_that_read_data_are_compared(two_files: list[Path], tmp_path: Path) -> None:
    example(tmp_path / "logs", *two_files, layout="tp2 sp").succeed()


# === Without processes ===


def exchanged(own: list[agree.Fields | None]) -> list[int]:
    """Return what the all-reduce gives for the fields of all ranks."""
    return [max(numbers) for numbers in zip(*map(agree.digest, own), strict=True)]


def test_sixteen_bytes_tell_whether_thousands_of_ranks_agree() -> None:
    fields = {f"flag {number}": str(number) for number in range(20)}
    own: list[agree.Fields | None] = [dict(fields) for _ in range(4096)]
    assert agree.agreed(exchanged(own))
    own[17] = None
    assert agree.agreed(exchanged(own))
    for rank in (0, 2000, 4095):
        assert not agree.agreed(exchanged([*own[:rank], {**fields, "a": "b"}, *own[rank + 1 :]]))
    assert agree.agreed(exchanged([None] * 4096))


def test_of_thousands_of_ranks_those_that_differ_are_named() -> None:
    first = {"lr": "1.0", "seed": "1"}
    told: list[agree.Told] = [(f"node{rank // 8}", {}) for rank in range(4096)]
    for rank, own in ((8, {"lr": "2.0"}), (90, {"lr": "2.0", "more": "x"})):
        told[rank] = (told[rank][0], agree.differing_fields({**first, **own}, first))
    assert agree.describe(first, told, range(4096)) == (
        "lr is 2.0 on rank 8 (node1) and 1 more, but 1.0 on rank 0 (node0) and 4093 more; "
        "more is x on rank 90 (node11), but not there on rank 0 (node0) and 4094 more"
    )


def test_where_rank_0_is_the_odd_one_it_is_named_first() -> None:
    told: list[agree.Told] = [("a", {}), ("b", {"lr": "1"}), ("c", {"lr": "1"})]
    said = agree.describe({"lr": "2"}, told, range(3))
    assert said == "lr is 2 on rank 0 (a), but 1 on rank 1 (b) and 1 more"
