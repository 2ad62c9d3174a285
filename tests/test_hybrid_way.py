"""Runs of a Hugging Face base as a HybridModel, and their checkpoints resumed as a GPT model."""

import json
import shlex
from pathlib import Path

import pytest

from tests.support.forked import ROOT, SCRIPT, Ranks, call
from tests.support.tiny import LORA, TRAIN, back_to, flags, read_all, train

HYBRID_SCRIPT = SCRIPT.with_name("pretrain_hybrid.py")
EXAMPLE = ROOT / "examples" / "pretrain_lora.py"
LOCAL = shlex.split("""
--seq-length 16 --make-vocab-size-divisible-by 64 --transformer-impl local
--no-gradient-accumulation-fusion --no-persist-layer-norm --no-bias-swiglu-fusion --no-rope-fusion
--no-masked-softmax-fusion --attention-dropout 0 --hidden-dropout 0
""")
TOLERANCE = 1e-5
BASES = ("mixed", "llama")


def make(place: Path) -> dict[str, str]:
    """Write bases, and GPT models' checkpoints of them; return the flags of the hybrid ones.

    The first layer of one has an MLP, the second experts; the other has scaled frequencies.
    """
    from tests.support.hf_models import hf_model

    hf_model("qwen3_moe", mlp_only_layers=[0], vocab_size=255).save_pretrained(str(place / "mixed"))
    hf_model("llama", vocab_size=255).save_pretrained(str(place / "llama"))
    for name in ("mixed", "llama"):
        words = ["--hf-model", place / name, "--output", place / f"{name} by Megatron"]
        said_by("import-base", *words, "--dtype", "float32")
    return {name: said_by("flags", "--hf-model", place / name, "--hybrid") for name in BASES}


def said_by(*words: object) -> str:
    from tests.support.hf_commands import run

    status, out, errors = run([str(word) for word in words])
    assert status == 0, errors
    return out


class Place:
    """A directory with bases, and the flags of the hybrid models that equal them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.flags: dict[str, str] = call(make, directory)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("hybrid-way"))


@pytest.fixture(scope="module")
def base(place: Place) -> Path:
    return place.directory / "mixed"


def start(base: Path, directory: Path, layout: str, *more: object, hybrid: bool) -> Ranks:
    way = ["--hybrid"] if hybrid else []
    given = ["--hf-model", base, *way, *LORA, *flags(layout), *more]
    script = HYBRID_SCRIPT if hybrid else SCRIPT
    return train(2, directory, *given, model=LOCAL, script=script)


class Trained:
    """Six iterations on two ranks that saved the third and the last, and their losses."""

    def __init__(self, base: Path, directory: Path, layout: str, *, hybrid: bool) -> None:
        self.base, self.directory, self.hybrid = base, directory, hybrid
        self.losses = start(base, directory, layout, hybrid=hybrid).succeed().losses()

    def check_resumed_the_other_way(self, target: Path, layout: str) -> None:
        """Go on from the third iteration as the other model on another layout, and compare."""
        back_to(self.directory, target, 3)
        run = start(self.base, target, layout, hybrid=not self.hybrid)
        losses = run.succeed().losses()
        assert sorted(losses) == [4, 5, 6]
        # NOTE: Megatron logs the mean of the first two iterations after a start as the second's.
        for iteration in (4, 6):
            assert losses[iteration] == pytest.approx(self.losses[iteration], rel=TOLERANCE)
        distances = call(distances_of_states, self.directory, target)
        # Of 9 linears: weights and both moments of A and B.
        assert len(distances) >= 3 * 2 * 9
        assert max(distances.values()) < 1e-3, distances


def distances_of_states(one: Path, other: Path) -> dict[str, float]:
    """Return how far the adapters and their moments are apart."""
    first, second = read_all(one, 6), read_all(other, 6)
    assert first.keys() == second.keys()
    keys = [key for key in first if key.rpartition(".")[2] in ("lora_A", "lora_B")]
    return {key: float((first[key] - second[key]).norm() / first[key].norm()) for key in keys}


@pytest.fixture(scope="module")
def gpt(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(base, tmp_path_factory.mktemp("gpt") / "run", "tp2 sp do", hybrid=False)


@pytest.fixture(scope="module")
def hybrid(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(base, tmp_path_factory.mktemp("hybrid") / "run", "pp2", hybrid=True)


def test_both_ways_train_alike(gpt: Trained, hybrid: Trained) -> None:
    assert sorted(hybrid.losses) == [1, 2, 3, 4, 5, 6]
    assert hybrid.losses == pytest.approx(gpt.losses, rel=TOLERANCE)


def test_a_gpt_run_goes_on_as_a_hybrid_with_its_distributed_optimizer(
    gpt: Trained, tmp_path: Path
) -> None:
    gpt.check_resumed_the_other_way(tmp_path / "run", "do")


def test_a_hybrid_run_goes_on_as_a_gpt_model(hybrid: Trained, tmp_path: Path) -> None:
    hybrid.check_resumed_the_other_way(tmp_path / "run", "tp2 sp")


@pytest.mark.parametrize("name", BASES)
def test_a_hybrid_takes_a_megatron_checkpoint_of_the_gpt_model_for_its_base(
    name: str, place: Place, tmp_path: Path
) -> None:
    base = place.directory / name
    by_flags = ["--pretrained-checkpoint", f"{base} by Megatron", *shlex.split(place.flags[name])]
    losses = [
        train(
            1, tmp_path / str(len(given)), *LORA, *given, model=LOCAL, iters=1, script=HYBRID_SCRIPT
        )
        .succeed()
        .losses()
        for given in (["--hf-model", base, "--hybrid"], by_flags)
    ]
    assert losses[0] == losses[1]


def test_the_example_trains_a_hybrid_at_the_rule_s_rate_and_exports_it(
    base: Path, tmp_path: Path
) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text(json.dumps({"text": "What is said three times is true. " * 40}) + "\n")
    given = ["--hf-model", base, "--byte-tokenizer", "--dataset", data, *LOCAL, *TRAIN, *LORA]
    given += ["--lr", "auto", "--train-iters", "2", "--vocab-size", "255"]
    losses, exports = [], [tmp_path / "gpt", tmp_path / "hybrid"]
    for exported, way in zip(exports, [[], ["--hybrid"]], strict=True):
        words = [*given, *way, "--export-hf", exported, "--save", f"{exported} run"]
        logs = tmp_path / f"{exported.name} logs"
        run = Ranks(1, words, logs, script=EXAMPLE, by_megalora=False).succeed()
        assert "> lr auto: " in run.text()
        losses.append(run.losses())
    assert losses[0] == losses[1]
    again = tmp_path / "again"
    words = ["export", f"{exports[1]} run", "--base-name", base, "--output", again]
    call(said_by, *words)
    written = [sorted(path.iterdir()) for path in exports]
    names = [path.name for path in written[0] if path.suffix == ".safetensors"]
    assert [(again / name).read_bytes() for name in names] == [
        (exports[0] / name).read_bytes() for name in names
    ]
    for one, other in zip(*written, strict=True):
        assert (one.name, one.read_bytes()) == (other.name, other.read_bytes())


@pytest.mark.parametrize(
    ("script", "more", "message"),
    [
        (HYBRID_SCRIPT, ["--hybrid-layer-pattern", "*E*-"], "has the layers '*-*E'"),
        (HYBRID_SCRIPT, ["--hybrid-layer-pattern", "M-*E"], "whose layer 0 is Mamba (M)"),
        (HYBRID_SCRIPT, [], "builds a HybridModel: add --hybrid"),
        (SCRIPT, ["--hybrid"], "builds a GPTModel: run one that builds a HybridModel"),
    ],
    ids=["order", "mamba", "without --hybrid", "script of GPT models"],
)
def test_a_hybrid_that_the_base_is_not_is_refused(
    script: Path, more: list[str], message: str, base: Path, tmp_path: Path
) -> None:
    given = ["--hf-model", base, *LORA, *more]
    assert message in train(1, tmp_path / "run", *given, model=LOCAL, script=script).fail()
