"""`megalora run` on a hybrid model's script: training, resharding its checkpoints, refusals."""

from pathlib import Path

import pytest

from tests.forked import SCRIPT, call
from tests.tiny import EXPERTS, HYBRID, LORA, MODEL, back_to, flags, same_tensors, train

HYBRID_SCRIPT = SCRIPT.with_name("pretrain_hybrid.py")
HYBRID_MODEL = [*MODEL, *EXPERTS, *HYBRID]
TOLERANCE = 1e-5


def run(world_size: int, directory: Path, *more: object, iters: int = 6) -> "Ranks":
    given = (world_size, directory, *more)
    return train(*given, model=HYBRID_MODEL, script=HYBRID_SCRIPT, iters=iters)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hybrid") / "base"
    run(1, directory, "--no-save-optim", iters=1).succeed()
    return directory

@pytest.mark.parametrize("layout", ["tp2 sp", "tp2 sp do"])
def test_x(base, tmp_path, layout):
    r = run(2, tmp_path/"run", *LORA, *flags(layout), "--pretrained-checkpoint", base).succeed()
    print(r.text()[-6000:])
    print(r.losses())
    for lay, ws in (("dp", 1), ("pp2", 2), ("tp2 sp",2)):
        lay += " do" if "do" in layout else ""
        back_to(tmp_path/"run", tmp_path/lay, 3)
        r = run(ws, tmp_path/lay, *LORA, *flags(lay), "--pretrained-checkpoint", base).succeed()
        print(lay, r.losses())
