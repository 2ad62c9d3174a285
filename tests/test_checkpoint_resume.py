"""Adapter checkpoints go on exactly where they stopped, on any layout."""

import re
from pathlib import Path

import pytest

from tests.support.forked import call
from tests.support.tiny import EXPERTS, LORA, MODEL, back_to, flags, same_tensors, train

MOE = [*MODEL, *EXPERTS]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def moe_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with experts."""
    directory = tmp_path_factory.mktemp("moe") / "base"
    train(1, directory, "--no-save-optim", model=MOE, iters=1).succeed()
    return directory


class Trained:
    """Six iterations that saved the third and the last, and their losses."""

    def __init__(
        self, base: Path, directory: Path, layout: str, model: list[str], world_size: int = 4
    ) -> None:
        self.base, self.directory, self.layout, self.model = base, directory, layout, model
        self.world_size = world_size
        run = train(world_size, directory, *LORA, *flags(layout), *self.base_flags(), model=model)
        self.losses = run.succeed().losses()

    def base_flags(self) -> list[object]:
        """Return the flags that name the base."""
        return ["--pretrained-checkpoint", self.base]

    def resume(
        self, target: Path, layout: str, world_size: int | None = None, *given: str
    ) -> dict[int, float]:
        """Go on from the third iteration on another layout; return the losses."""
        back_to(self.directory, target, 3)
        more = [*LORA, *flags(layout), *self.base_flags(), *given]
        run = train(world_size or self.world_size, target, *more, model=self.model)
        return run.succeed().losses()


@pytest.fixture(scope="module")
def dense(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(base, tmp_path_factory.mktemp("d") / "run", "tp2 sp pp2", MODEL)


def check_continued(
    losses: dict[int, float], trained: Trained, tolerance: float = TOLERANCE
) -> None:
    assert sorted(losses) == [4, 5, 6]
    # NOTE: Megatron logs the mean of the first two iterations after a start as the second's.
    for iteration in (4, 6):
        assert losses[iteration] == pytest.approx(trained.losses[iteration], rel=tolerance)


def test_resuming_on_the_same_layout_changes_no_bit(dense: Trained, tmp_path: Path) -> None:
    check_continued(dense.resume(tmp_path / "run", dense.layout), dense)
    names = call(same_tensors, dense.directory, tmp_path / "run", 6)
    assert any(name.startswith("optimizer") for name in names)
    assert "output_layer_lora.lora_B" in names


def test_a_dense_run_goes_on_in_one_process(dense: Trained, tmp_path: Path) -> None:
    check_continued(dense.resume(tmp_path / "run", "dp", 1), dense)


def test_experts_with_a_distributed_optimizer_go_on_over_fewer_ranks(
    moe_base: Path, tmp_path: Path
) -> None:
    moe = Trained(moe_base, tmp_path / "moe", "tp2 sp ep2 etp1 do", MOE)
    check_continued(moe.resume(tmp_path / "run", "tp2 sp ep1 etp2 do", 2), moe)


@pytest.fixture(scope="module")
def moe_plain(moe_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Experts without the distributed optimizer: each expert's states are tensors of their own."""
    return Trained(moe_base, tmp_path_factory.mktemp("mp") / "run", "ep2", MOE, world_size=2)


def test_experts_without_a_distributed_optimizer_go_on_with_all_in_one_rank(
    moe_plain: Trained, tmp_path: Path
) -> None:
    check_continued(moe_plain.resume(tmp_path / "run", "dp", 1), moe_plain)


def test_another_start_of_the_optimizer_is_seen_in_the_losses(
    moe_plain: Trained, tmp_path: Path
) -> None:
    losses = moe_plain.resume(tmp_path / "run", "dp", 1, "--no-load-optim")
    assert losses[6] != pytest.approx(moe_plain.losses[6], rel=10 * TOLERANCE)


UNEVEN = {
    "experts alone": (1, "dp", ["--lora-targets", "*.experts.linear_fc1"], MOE),
    # The first stage, whose rank writes for all, has nothing to train.
    "the last stage alone": (2, "pp2 do", ["--lora-targets", "unembed", "--bf16"], MODEL),
}


@pytest.mark.parametrize("case", UNEVEN)
def test_a_run_without_parameters_in_places_changes_no_bit(case: str, tmp_path: Path) -> None:
    world_size, layout, targets, model = UNEVEN[case]
    more = [*LORA, *flags(layout), *targets]
    # The base has start values of its own, the same in every run.
    whole = train(world_size, tmp_path / "whole", *more, model=model).succeed()
    back_to(tmp_path / "whole", tmp_path / "run", 3)
    resumed = train(world_size, tmp_path / "run", *more, model=model).succeed()
    assert resumed.losses()[6] == whole.losses()[6]
    assert call(same_tensors, tmp_path / "whole", tmp_path / "run", 6)


# fp32: weight and two moments of Adam; bf16: the weight once more, in bf16.
@pytest.mark.parametrize(("precision", "bytes_each"), [([], 12), (["--bf16"], 14)])
def test_a_checkpoint_is_hardly_larger_than_its_tensors(
    base: Path, tmp_path: Path, precision: list[str], bytes_each: int
) -> None:
    # Large enough that what does not grow with the rank, some 60 KB, is small beside it.
    more = ["--lora-rank", 256, "--pretrained-checkpoint", base, *precision]
    run = train(1, tmp_path / "run", *more, "--save-interval", 1, iters=1).succeed()
    found = re.search(r"LoRA: ([\d,]+) trained parameters", run.text())
    assert found
    needed = bytes_each * int(found[1].replace(",", ""))
    directory = tmp_path / "run" / "iter_0000001"
    assert needed < sum(file.stat().st_size for file in directory.iterdir()) < 1.1 * needed
    names = call(same_tensors, tmp_path / "run", tmp_path / "run", 1)
    assert all("_lora.lora_" in name or name.startswith("rng_state") for name in names), names
