"""The reinforcement learning example learns, on any layout, and goes on where it stopped."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.examples import run_example
from tests.support.forked import call
from tests.support.tiny import back_to

MODEL_AND_TRAINING = """
--cpu --num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4
--group-query-attention --num-query-groups 2 --kv-channels 16 --normalization RMSNorm
--disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope
--vocab-size 15 --make-vocab-size-divisible-by 16 --seq-length 8 --max-position-embeddings 8
--transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm
--no-bias-swiglu-fusion --no-rope-fusion --no-masked-softmax-fusion --init-method-std 0.1
--attention-dropout 0 --hidden-dropout 0 --use-cpu-initialization --lora-rank 8 --lr 2e-3
--lr-decay-style constant --weight-decay 0 --micro-batch-size 64 --global-batch-size 256
"""
# Always naming the largest token of all 16 is right this often.
CONSTANT_ANSWER = 1 - (15 / 16) ** 4


class Run:
    """The reward of each iteration and its distance from the base, by iteration."""

    def __init__(self, logs: Path, iterations: int, *more: object, world_size: int = 1) -> None:
        self.logs = logs
        flags: Sequence[object] = [*MODEL_AND_TRAINING.split(), "--train-iters", iterations, *more]
        text = run_example("rl_lora.py", flags, logs, world_size=world_size)
        found = re.findall(r"iteration (\d+)/\d+ \| reward: (\S+) \| distance.*?: (\S+)", text)
        self.by_iteration = {int(number): (float(r), float(d)) for number, r, d in found}
        self.rewards = [reward for reward, _ in self.by_iteration.values()]
        self.distances = [distance for _, distance in self.by_iteration.values()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    logs = tmp_path_factory.mktemp("whole")
    return Run(logs, 24, "--save", logs / "saved", "--save-interval", 20)


def test_answers_become_right(whole: Run) -> None:
    first, last = whole.rewards[0], sum(whole.rewards[-6:]) / 6
    assert first < 0.1
    assert last > 1.5 * CONSTANT_ANSWER


def test_the_reference_is_the_base_that_training_starts_from(whole: Run) -> None:
    assert whole.distances[0] == 0.0
    assert whole.distances[-1] > 1.0


def test_a_weight_on_the_distance_keeps_the_policy_near_the_base(tmp_path: Path) -> None:
    near = Run(tmp_path, 12, "--kl-weight", 2.0)
    assert 0 < max(near.distances) < 0.5


def test_two_tensor_parallel_ranks_train_as_one(tmp_path: Path, whole: Run) -> None:
    # One rank pads the vocabulary to 16 rows, and two to 2 x 8: the same start values.
    layout = ["--tensor-model-parallel-size", 2, "--sequence-parallel"]
    layout += ["--make-vocab-size-divisible-by", 8]
    split = Run(tmp_path, 4, *layout, world_size=2)
    for number, numbers in split.by_iteration.items():
        assert numbers == pytest.approx(whole.by_iteration[number], abs=2e-4)
    assert len(split.by_iteration) == 4


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, whole: Run) -> None:
    back_to(whole.logs / "saved", tmp_path / "saved", 20)
    rest = Run(tmp_path, 24, "--load", tmp_path / "saved")
    assert rest.by_iteration == {number: whole.by_iteration[number] for number in range(21, 25)}


def refusal(changes: dict[str, Any]) -> str:
    from examples.rl_lora import check_args

    fields: dict[str, Any] = {
        **dict.fromkeys(("pipeline_model_parallel_size", "context_parallel_size"), 1),
        **dict.fromkeys(("attention_dropout", "hidden_dropout"), 0.0),
        **dict.fromkeys(("moe_aux_loss_coeff", "moe_z_loss_coeff", "mtp_num_layers")),
        **{"calculate_per_token_loss": False, "lora_rank": 8, "lora_dropout": None},
        **{"global_batch_size": 64, "data_parallel_size": 2, "group_size": 8, "num_updates": 2},
    }
    try:
        check_args(argparse.Namespace(**fields | changes))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, ""),
        ({"pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size is 2"),
        ({"hidden_dropout": 0.1}, "hidden_dropout is 0.1"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"moe_z_loss_coeff": 1e-3}, "moe_z_loss_coeff is 0.001"),
        ({"global_batch_size": 48}, "global_batch_size 48 over 2 data-parallel ranks"),
    ],
)
def test_what_the_loop_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    assert call(refusal, changes).startswith(message)
