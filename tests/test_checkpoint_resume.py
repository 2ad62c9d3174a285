"""Adapter checkpoints go on exactly where they stopped, on any layout."""

from pathlib import Path

import pytest

from tests.forked import call
from tests.tiny import EXPERTS, LORA, MODEL, back_to, flags, same_tensors, train

MOE = [*MODEL, *EXPERTS]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense base that one step of full training saved."""
    directory = tmp_path_factory.mktemp("dense") / "base"
    train(1, directory, "--no-save-optim", iters=1).succeed()
    return directory


@pytest.fixture(scope="module")
def moe_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with experts."""
    directory = tmp_path_factory.mktemp("moe") / "base"
    train(1, directory, "--no-save-optim", model=MOE, iters=1).succeed()
    return directory


class Trained:
    """Six iterations that saved the third and the last, and their losses."""

    def __init__(self, base: Path, directory: Path, layout: str, model: list[str]) -> None:
        self.base, self.directory, self.layout, self.model = base, directory, layout, model
        run = train(4, directory, *LORA, *flags(layout), *self.base_flags(), model=model)
        self.losses = run.succeed().losses()

    def base_flags(self) -> list[object]:
        """Return the flags that name the base."""
        return ["--pretrained-checkpoint", self.base]

    def resume(self, target: Path, layout: str, world_size: int = 4) -> dict[int, float]:
        """Go on from the third iteration on another layout; return the losses."""
        back_to(self.directory, target, 3)
        more = [*LORA, *flags(layout), *self.base_flags()]
        return train(world_size, target, *more, model=self.model).succeed().losses()


@pytest.fixture(scope="module")
def dense(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(base, tmp_path_factory.mktemp("d") / "run", "tp2 sp pp2", MODEL)


@pytest.fixture(scope="module")
def dense_do(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(base, tmp_path_factory.mktemp("do") / "run", "tp2 do", MODEL)


@pytest.fixture(scope="module")
def moe(moe_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(moe_base, tmp_path_factory.mktemp("m") / "run", "tp2 sp ep2 etp1 do", MOE)


def check_continued(losses: dict[int, float], trained: Trained) -> None:
    assert sorted(losses) == [4, 5, 6]
    # NOTE: Megatron logs the mean of the first two iterations after a start as the second's.
    for iteration in (4, 6):
        assert losses[iteration] == pytest.approx(trained.losses[iteration], rel=TOLERANCE)


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
