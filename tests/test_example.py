"""The launch script that people copy: equal losses on every topology, clear errors before work."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.forked import Ranks
from tests.support.tiny import EXPERTS, LORA, MODEL, TRAIN, flags

EXAMPLE = Path(__file__).parent.parent / "examples" / "pretrain_lora.py"
MODELS = {"dense": MODEL, "moe": [*MODEL, *EXPERTS]}
NUM_ITERS = 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions and answers of a few bytes."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(12) for b in range(9)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module", params=sorted(MODELS))
def base(
    request: pytest.FixtureRequest, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path]:
    """A base of each kind, saved by the example itself without LoRA."""
    model, directory = MODELS[request.param], tmp_path_factory.mktemp(request.param) / "base"
    more = ["--save", directory, "--make-vocab-size-divisible-by", 8]
    start(1, model, dataset, directory, *more, iters=1).succeed()
    return model, directory


def start(
    world_size: int,
    model: list[str],
    dataset: Path,
    logs: Path,
    *more: object,
    iters: int,
    env: Mapping[str, str] | None = None,
) -> Ranks:
    """Start the example as torchrun would."""
    data = ["--byte-tokenizer", "--dataset", dataset, "--train-iters", iters]
    words = [word for word in model if word not in ("--vocab-size", "255")]
    logs = logs.with_name(f"{logs.name}-logs")
    words = [*words, *TRAIN, *data, *more]
    return Ranks(world_size, words, logs, script=EXAMPLE, by_megalora=False, env=env)


def test_losses_agree_on_one_two_and_four_processes(
    base: tuple[list[str], Path], dataset: Path, tmp_path: Path
) -> None:
    model, directory = base
    layouts = {1: "", 2: "tp2 sp", 4: "tp2 sp pp2"}
    if "--num-experts" in model:
        layouts = {1: "", 2: "ep2", 4: "tp2 sp ep2 etp1"}
    curves = {}
    for world_size, layout in layouts.items():
        more = ["--pretrained-checkpoint", directory, *LORA, *flags(layout)]
        # A calm rate: a loss that jumps up and down would magnify rounding.
        more += ["--make-vocab-size-divisible-by", 8, "--lr", "2e-3"]
        logs = tmp_path / str(world_size)
        run = start(world_size, model, dataset, logs, *more, iters=NUM_ITERS).succeed()
        curves[world_size] = run.losses()
    assert sorted(curves[1]) == list(range(1, NUM_ITERS + 1))
    assert curves[1][NUM_ITERS] < curves[1][1] - 0.1
    for world_size in (2, 4):
        assert curves[world_size] == pytest.approx(curves[1], rel=1e-4)


def test_overlapped_expert_communication_trains_the_same(dataset: Path, tmp_path: Path) -> None:
    bias = ["--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"]
    more = [*LORA, *flags("ep2"), *bias, "--bf16", "--no-packing"]
    # Megatron asks for more than one connection; there is none on the CPU.
    env = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    curves = []
    for overlap in ([], ["--overlap-moe-expert-parallel-comm"]):
        logs = tmp_path / str(len(overlap))
        run = start(2, MODELS["moe"], dataset, logs, *more, *overlap, iters=3, env=env).succeed()
        curves.append(run.losses())
    assert curves[0] == curves[1]
    assert curves[0][3] < curves[0][1] - 0.1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora-rank", "-1"], "lora_rank is -1"),
        (["--lora-rank", "3"], "lora_rank 3 is not divisible by moe_router_topk 2: use 2, 4, 6"),
        (["--lora-alpha", "16"], "set --lora-rank"),
        (["--lora-rank", "8", "--lora-targets", "linear_fc3"], "'linear_fc3'"),
        (["--lora-rank", "8", "--lora-targets", "linear_kv_up_proj"], "match no module"),
        (["--lora-rank", "8", "--lora-dropout", "1.5"], "lora_dropout is 1.5"),
        (["--lora-rank", "8", "--dataset", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--lora-rank", "8", "--pretrained-checkpoint", "/nowhere"], "/nowhere"),
        (["--lora-rank", "8", "--hf-model", "/nowhere"], "/nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_flags_end_in_one_message(
    more: list[str], message: str, dataset: Path, tmp_path: Path
) -> None:
    run = start(1, MODELS["moe"], dataset, tmp_path / "run", *more, iters=1)
    text = run.fail()
    assert message in text
    assert "iteration        1/" not in text
