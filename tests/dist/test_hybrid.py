"""Hybrid models: the order of in_proj's rows, merging, and what is refused."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalora.adapters.merge import merge, unmerge
from megalora.adapters.rows import to_ranks, to_whole
from megalora.builder import apply_lora, named_adapters
from megalora.checkpoint.gather import gather_adapters, load_adapters
from megalora.config import LoRAConfig
from megalora.targets import Rows
from tests.dist.support.cases import KINDS, TP2, TP2_SP
from tests.dist.support.layouts import Layout, model_parallel, one_rank, over
from tests.dist.support.models import build_model
from tests.dist.support.parity import largest, lora_config, relative, start_values
from tests.dist.support.training import Run, train

IN_PROJ = "decoder.layers.0.mixer.in_proj"


def adapted(layout: Layout, **fields: Any) -> list[Any]:
    chunks = apply_lora(base(layout), lora_config("hybrid", **fields))
    load_adapters(chunks, start_values(chunks))
    return chunks


def base(layout: Layout) -> list[Any]:
    return build_model(layout, **KINDS["hybrid"].model)


@over(Layout())
def test_every_rank_owns_a_piece_of_every_part(layout: Layout) -> None:
    whole, rows = torch.arange(8)[:, None], Rows(blocks=(4, 4))
    ranks = to_ranks(whole, rows, 2, -2)
    assert ranks.flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert to_whole(ranks, rows, 2, -2).equal(whole)


@over(Layout(), TP2, Layout(pp=2))
def test_gathered_adapters_are_those_that_were_loaded(layout: Layout) -> None:
    with model_parallel(layout):
        chunks = apply_lora(base(layout), lora_config("hybrid"))
        start = start_values(chunks)
        load_adapters(chunks, start)
        gathered = gather_adapters(chunks)
    if dist.get_rank() == 0:
        assert largest(gathered, start) == 0.0
        assert gathered[f"{IN_PROJ}_lora.lora_B"].shape == (2 * 64 + 2 * 24 + 8, 4)


@over(TP2)
def test_a_rank_holds_the_rows_that_its_in_proj_computes(layout: Layout) -> None:
    with model_parallel(layout):
        chunks = apply_lora(base(layout), lora_config("hybrid"))
        start = start_values(chunks)
        load_adapters(chunks, start)
        own = dict(named_adapters(chunks))[f"{IN_PROJ}_lora"].lora_B
    parts = start[f"{IN_PROJ}_lora.lora_B"].split([64, 64, 24, 24, 8])
    assert own.equal(torch.cat([part.chunk(2)[dist.get_rank()] for part in parts]))


@over(Layout(), TP2_SP)
def test_a_merged_hybrid_computes_the_same(layout: Layout) -> None:
    with model_parallel(layout):
        active, plain = (loss(chunks, layout) for chunks in (adapted(layout), base(layout)))
        chunks = adapted(layout)
        before = [parameter.detach().clone() for parameter in chunks[0].parameters()]
        merge(chunks)
        unmerge(chunks)
        for parameter, weight in zip(chunks[0].parameters(), before, strict=True):
            torch.testing.assert_close(parameter, weight, rtol=1e-5, atol=1e-6)
        merge(chunks)
        assert loss(chunks, layout) == pytest.approx(active, rel=2e-6)
    assert abs(active / plain - 1) > 1e-3, "the adapters change too little to be noticed"


def loss(chunks: list[Any], layout: Layout) -> float:
    """Return the loss of the first batch; the chunks are not to be used again."""
    return float(train(chunks, layout, Run(num_steps=1))[0, 0])


@over(TP2)
def test_pissa_starts_as_on_one_rank(layout: Layout) -> None:
    found = []
    for where in (layout, one_rank(layout)):
        with model_parallel(where):
            chunks = apply_lora(base(where), lora_config("hybrid", init="pissa"))
            found.append({key: t.clone() for key, t in gather_adapters(chunks).items()})
    if dist.get_rank() == 0:
        factors = [f"{IN_PROJ}_lora.lora_{factor}" for factor in "BA"]
        # Singular vectors have a free sign, which their product has not.
        sharded, alone = (tensors[factors[0]] @ tensors[factors[1]] for tensors in found)
        assert relative(sharded, alone) < 1e-5


class OtherMixer(torch.nn.Module):
    """A layer whose in_proj has parts that nobody has named."""

    def __init__(self, mixer: Any) -> None:
        super().__init__()
        self.in_proj, self.out_proj = mixer.in_proj, mixer.out_proj


@over(Layout())
def test_projections_of_other_layers_are_refused_by_name(layout: Layout) -> None:
    with model_parallel(layout):
        chunks = base(layout)
        layer = chunks[0].decoder.layers[3]
        layer.mixer = OtherMixer(layer.mixer)
        message = r"decoder\.layers\.3\.mixer\.in_proj of OtherMixer.*names of the linears"
        with pytest.raises(ValueError, match=message):
            apply_lora(chunks, LoRAConfig(rank=4))
        assert next(named_adapters(chunks), None) is None
        apply_lora(chunks, LoRAConfig(rank=4, targets=("attn", "mlp", "decoder.layers.0.*")))
        assert f"{IN_PROJ}_lora" in dict(named_adapters(chunks))


@over(Layout())
def test_targets_that_a_mamba_model_lacks_are_refused_with_what_it_has(layout: Layout) -> None:
    with model_parallel(layout):
        chunks = build_model(layout, **{**KINDS["hybrid"].model, "pattern": "MM"})
        message = r"\['attn'\] match no module.*linears are in_proj, out_proj, output_layer\."
        with pytest.raises(ValueError, match=message):
            apply_lora(chunks, LoRAConfig(rank=4, targets=("attn",)))


@over(Layout())
def test_a_model_without_linears_says_so(layout: Layout) -> None:
    with model_parallel(layout):
        chunks = base(layout)
        chunks[0].decoder = chunks[0].output_layer = torch.nn.Identity()
        with pytest.raises(ValueError, match="none that an adapter could go to"):
            apply_lora(chunks, LoRAConfig(rank=4))
