"""Adapters of gated delta nets: which rows they have, in checkpoints, merged, by presets."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import apply_factories

from megalora.adapters.factors import from_checkpoint, to_checkpoint
from megalora.adapters.kinds import LoRA
from megalora.adapters.merge import merge, unmerge
from megalora.builder import apply_lora, model_facts, named_adapters
from megalora.checkpoint.gather import gather_adapters, load_adapters
from megalora.config import LoRAConfig
from tests.dist.support.cases import KINDS, RECOMPUTED, TP2, TP2_SP
from tests.dist.support.layouts import Layout, model_parallel, one_rank, over
from tests.dist.support.models import DELTA, build_model
from tests.dist.support.parity import largest, lora_config, relative, start_values
from tests.dist.support.training import Run, train

KIND = "gated delta nets"
IN_PROJ = "decoder.layers.0.self_attention.in_proj"
PARTS = {"query": 24, "key": 24, "value": 80, "z": 80, "beta": 8, "alpha": 8}
GATES = {"delta_gates": True}


def base(layout: Layout, **fields: Any) -> list[Any]:
    return build_model(layout, **{**KINDS[KIND].model, **fields})


def adapted(layout: Layout, **fields: Any) -> list[Any]:
    chunks = apply_lora(base(layout), lora_config(KIND, **fields))
    load_adapters(chunks, start_values(chunks))
    return chunks


def loss(chunks: list[Any], layout: Layout) -> float:
    """Return the loss of the first batch; the chunks are not to be used again."""
    return float(train(chunks, layout, Run(num_steps=1))[0, 0])


@pytest.mark.parametrize(
    ("fields", "num_a", "parts"),
    [({}, 4, 4), ({"shared_a": True}, 1, 4), (GATES, 6, 6), ({"shared_a": True, **GATES}, 1, 6)],
)
@over(TP2)
def test_each_part_of_in_proj_but_the_gates_has_an_adapter(
    layout: Layout, fields: dict[str, Any], num_a: int, parts: int
) -> None:
    with model_parallel(layout):
        chunks = adapted(layout, **fields)
        whole = start_values(chunks)
        gathered = gather_adapters(chunks)
        own = dict(named_adapters(chunks))[f"{IN_PROJ}_lora"].lora_B
    rows = list(PARTS.values())[:parts]
    assert whole[f"{IN_PROJ}_lora.lora_A"].shape == (num_a * 4, 32)
    assert whole[f"{IN_PROJ}_lora.lora_B"].shape == (sum(rows), 4)
    mine = [b.chunk(2)[dist.get_rank()] for b in whole[f"{IN_PROJ}_lora.lora_B"].split(rows)]
    assert own.equal(torch.cat(mine))
    if dist.get_rank() == 0:
        assert largest(gathered, whole) == 0.0


@pytest.mark.parametrize("fields", [{}, GATES])
@over(Layout())
def test_a_checkpoint_stores_the_parts_by_their_names(
    layout: Layout, fields: dict[str, Any]
) -> None:
    with model_parallel(layout):
        chunks = adapted(layout, **fields)
        whole, facts = gather_adapters(chunks), model_facts(chunks[0])
        entries = {
            key: tensor
            for name, adapter in named_adapters(chunks)
            for key, tensor in adapter.sharded_tensors(f"{name}.").items()
        }
        apply_factories(entries)
    stored = to_checkpoint(whole, LoRA.factors, facts)
    parts = [part for part in PARTS if fields or part not in ("beta", "alpha")]
    prefix = f"{IN_PROJ}_lora.lora_B."
    assert [key.removeprefix(prefix) for key in stored if key.startswith(prefix)] == parts
    sharded = {t.key for e in entries.values() for t in (e if isinstance(e, list) else [e])}
    assert stored.keys() == sharded
    assert largest(from_checkpoint(stored, LoRA.factors, facts), whole) == 0.0


@pytest.mark.parametrize("fields", [{}, GATES])
@over(Layout(), TP2_SP)
def test_a_merged_delta_net_computes_the_same(layout: Layout, fields: dict[str, Any]) -> None:
    with model_parallel(layout):
        active = loss(adapted(layout, **fields), layout)
        plain = loss(base(layout), layout)
        chunks = adapted(layout, **fields)
        before = {name: p.detach().clone() for name, p in chunks[0].named_parameters()}
        merge(chunks)
        for name, parameter in chunks[0].named_parameters():
            if name.endswith("in_proj.weight"):
                gates = 16 // layout.tp
                kept = parameter[-gates:].equal(before[name][-gates:])
                assert kept == (not fields), "rows of the gates"
        unmerge(chunks)
        for name, parameter in chunks[0].named_parameters():
            torch.testing.assert_close(parameter, before[name], rtol=1e-5, atol=1e-6)
        merge(chunks)
        assert loss(chunks, layout) == pytest.approx(active, rel=2e-6)
    assert abs(active / plain - 1) > 1e-3, "the adapters change too little to be noticed"


@over(TP2)
def test_pissa_starts_as_on_one_rank_and_changes_nothing(layout: Layout) -> None:
    found, losses = [], []
    for where in (layout, one_rank(layout)):
        with model_parallel(where):
            chunks = apply_lora(base(where), lora_config(KIND, init="pissa"))
            found.append({key: t.clone() for key, t in gather_adapters(chunks).items()})
            losses += [float(train(chunks, where, Run(num_steps=1, one_rank=True))[0, 0])]
            losses += [float(train(base(where), where, Run(num_steps=1, one_rank=True))[0, 0])]
    assert losses == pytest.approx(losses[:1] * 4, rel=1e-5)
    if dist.get_rank() == 0:
        for first, rows in ((0, slice(0, 24)), (3, slice(128, 208))):
            # Singular vectors have a free sign, which their product has not.
            sharded, alone = (
                t[f"{IN_PROJ}_lora.lora_B"][rows]
                @ t[f"{IN_PROJ}_lora.lora_A"][4 * first : 4 * first + 4]
                for t in found
            )
            assert relative(sharded, alone) < 1e-5


@over(Layout(), TP2_SP)
def test_recomputation_repeats_the_mask_of_dropout(layout: Layout) -> None:
    found = []
    for fields, dropout in (({}, 0.4), (RECOMPUTED["fields"], 0.4), ({}, 0.0)):
        with model_parallel(layout):
            chunks = apply_lora(base(layout, **fields), lora_config(KIND, dropout=dropout))
            load_adapters(chunks, start_values(chunks))
            found.append(train(chunks, layout, Run(num_steps=1)))
    assert relative(found[1], found[0]) < 1e-6
    assert relative(found[2], found[0]) > 1e-4


@over(Layout())
def test_presets_tell_delta_nets_from_mamba(layout: Layout) -> None:
    hybrid = {"pattern": "M*G", **KINDS["hybrid"].model, **DELTA} | {"pattern": "M*G"}
    found = {}
    for target in ("attn", "mamba", "in_proj"):
        with model_parallel(layout):
            chunks = apply_lora(
                build_model(layout, **hybrid), LoRAConfig(rank=4, targets=(target,))
            )
            found[target] = {
                name.removeprefix("decoder.layers.").removesuffix("_lora")
                for name, _ in named_adapters(chunks)
            }
    delta = {"2.self_attention.in_proj", "2.self_attention.out_proj"}
    attention = {"1.self_attention.linear_qkv", "1.self_attention.linear_proj"}
    assert found["attn"] == delta | attention
    assert found["mamba"] == {"0.mixer.in_proj", "0.mixer.out_proj"}
    assert found["in_proj"] == {"0.mixer.in_proj", "2.self_attention.in_proj"}


@over(Layout())
def test_a_base_is_stored_as_transformer_engines_layers_store_it(layout: Layout) -> None:
    experts = {**KINDS["experts"].model, "num_layers": 2, "moe_layer_freq": [0, 1]}
    with model_parallel(layout):
        (chunk,) = base(layout, **experts)
        keys = {tensor.key for tensor in chunk.sharded_state_dict().values()}
    # With experts they have no norm to fuse.
    assert {key for key in keys if "norm" in key and ".layers." in key} == {
        "decoder.layers.0.self_attention.in_proj.layer_norm_weight",
        "decoder.layers.0.self_attention.out_norm.weight",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.1.self_attention.q_layernorm.weight",
        "decoder.layers.1.self_attention.k_layernorm.weight",
        "decoder.layers.1.pre_mlp_layernorm.weight",
    }
