"""Adapter checkpoints go on exactly where they stopped, on any layout."""

import re
from pathlib import Path

import pytest

from tests.forked import call
from tests.tiny import EXPERTS, LORA, MODEL, back_to, flags, same_tensors, train

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


@pytest.fixture(scope="module")
def dense_do(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(base, tmp_path_factory.mktemp("do") / "run", "tp2 do", MODEL)


@pytest.fixture(scope="module")
def moe(moe_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(moe_base, tmp_path_factory.mktemp("m") / "run", "tp2 sp ep2 etp1 do", MOE)


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


def test_a_resumed_distributed_optimizer_changes_no_bit(dense_do: Trained, tmp_path: Path) -> None:
    dense_do.resume(tmp_path / "run", dense_do.layout)
    assert call(same_tensors, dense_do.directory, tmp_path / "run", 6)


@pytest.mark.parametrize(("layout", "world_size"), [("dp", 1), ("tp4 sp", 4), ("pp2 vpp1", 4)])
def test_a_dense_run_goes_on_in_any_layout(
    dense: Trained, tmp_path: Path, layout: str, world_size: int
) -> None:
    check_continued(dense.resume(tmp_path / "run", layout, world_size), dense)


@pytest.mark.parametrize(("layout", "world_size"), [("pp2 do", 2), ("tp4 sp do", 4)])
def test_a_distributed_optimizer_goes_on_in_any_layout(
    dense_do: Trained, tmp_path: Path, layout: str, world_size: int
) -> None:
    check_continued(dense_do.resume(tmp_path / "run", layout, world_size), dense_do)


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [("tp2 sp ep4 etp1 do", 4), ("tp2 sp ep1 etp2 do", 2), ("pp2 ep2 do", 4)],
)
def test_experts_go_on_in_any_layout(
    moe: Trained, tmp_path: Path, layout: str, world_size: int
) -> None:
    check_continued(moe.resume(tmp_path / "run", layout, world_size), moe)


@pytest.fixture(scope="module")
def moe_plain(moe_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Experts without the distributed optimizer: each expert's states are tensors of their own."""
    return Trained(moe_base, tmp_path_factory.mktemp("mp") / "run", "ep2", MOE, world_size=2)


def test_experts_without_a_distributed_optimizer_change_no_bit(
    moe_plain: Trained, tmp_path: Path
) -> None:
    check_continued(moe_plain.resume(tmp_path / "run", moe_plain.layout), moe_plain)
    names = call(same_tensors, moe_plain.directory, tmp_path / "run", 6)
    assert any(name.startswith("optimizer") and ".experts." in name for name in names)


def test_experts_without_a_distributed_optimizer_go_on_with_all_in_one_rank(
    moe_plain: Trained, tmp_path: Path
) -> None:
    check_continued(moe_plain.resume(tmp_path / "run", "dp", 1), moe_plain)


def test_experts_without_a_distributed_optimizer_go_on_over_more_ranks(
    moe_base: Path, tmp_path: Path
) -> None:
    whole = Trained(moe_base, tmp_path / "whole", "dp", MOE, world_size=1)
    check_continued(whole.resume(tmp_path / "run", "tp2 sp ep2 etp1", 2), whole)


def test_another_start_of_the_optimizer_is_seen_in_the_losses(
    moe_plain: Trained, tmp_path: Path
) -> None:
    losses = moe_plain.resume(tmp_path / "run", "dp", 1, "--no-load-optim")
    assert losses[6] != pytest.approx(moe_plain.losses[6], rel=10 * TOLERANCE)


@pytest.fixture(scope="module", params=["tp2", "dp do"])
def half(request, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Weights in bf16, with the fp32 ones in the optimizer."""
    directory = tmp_path_factory.mktemp("half") / "run"
    return Trained(base, directory, request.param, [*MODEL, "--bf16"], world_size=2)


def test_resuming_in_bf16_changes_no_bit(half: Trained, tmp_path: Path) -> None:
    assert half.resume(tmp_path / "run", half.layout)[6] == half.losses[6]
    names = call(same_tensors, half.directory, tmp_path / "run", 6)
    kinds = {name.split(".decoder")[0] for name in names if "linear_proj_lora.lora_B" in name}
    # Weights in bf16 alone would lose updates that are smaller than their last bit.
    assert any(kind.endswith(("fp32_param", "state.param")) for kind in kinds), kinds


def test_a_bf16_run_goes_on_in_another_layout(half: Trained, tmp_path: Path) -> None:
    # Over the pipeline with the distributed optimizer; on one rank without.
    layout, world_size = ("pp2 do", 2) if "do" in half.layout else ("dp", 1)
    losses = half.resume(tmp_path / "run", layout, world_size)
    check_continued(losses, half, tolerance=2e-3)


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
