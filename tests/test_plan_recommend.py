"""`megalora recommend` counts by formula what a plan builds: one description of one run."""

from collections.abc import Sequence
from typing import Any

import pytest

from megalora.config import LoRAConfig
from megalora.model.presets import preset_shape
from megalora.recommend.costs import stage_memory
from megalora.recommend.layout import Layout
from tests.support import forked
from tests.support.plans import in_a_world
from tests.test_plan_models import ON_512, RANK, Job

# Without tensor parallelism: Megatron's own layers would split the projections down to a latent,
# which TransformerEngine's, that `recommend` counts, have whole on every rank.
DEEPSEEK = ON_512["deepseek-v3"]._replace(tp=1)
JOBS = {
    "experts": (ON_512["qwen3-30b-a3b"], 3),
    "uneven stages": (ON_512["llama-3.1-405b"], 15),
    "latent attention": (DEEPSEEK, 15),
}


def read(rank: int, world_size: int, argv: Sequence[str]) -> tuple[Any, Layout]:
    """Build a rank; return what it holds between steps, and its layout."""
    from dataclasses import asdict

    from megalora.plan.assumed import assumptions
    from megalora.plan.memory import static
    from megalora.plan.meter import Meter
    from megalora.plan.processes import OWN_SCRIPT
    from megalora.plan.script import Built, build

    def use(built: Built) -> tuple[Any, Layout]:
        with assumptions(), Meter():
            built.optimizer.step()
        return asdict(static(built)), Layout.from_megatron_args(built.args)

    with in_a_world(rank, world_size):
        return build(OWN_SCRIPT, argv, use)


@pytest.mark.parametrize("case", JOBS)
def test_a_stage_holds_what_recommend_says(case: str) -> None:
    job: Job
    job, stage = JOBS[case]
    held, layout = forked.call(read, job.rank_of(stage), job.world_size, job.argv)
    told = stage_memory(preset_shape(job.model), LoRAConfig(rank=RANK), layout)[stage]
    padding = next(part for part in held["parts"] if part["name"] == "padding")
    assert told.weights == held["weights"] - padding["weights"]
    assert told.gradients == held["gradients"] - padding["gradients"]
    # What is cut into equal parts ends in padding: the last rank's part is the least.
    assert held["optimizer_least"] <= told.optimizer <= held["optimizer_most"]
    assert held["optimizer_most"] < 1.001 * told.optimizer
