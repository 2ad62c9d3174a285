"""Adapters of real Megatron models: the same logits in Megatron, in PEFT and merged."""

import copy
import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model

from megalora.builder import apply_lora
from megalora.checkpoint.gather import gather_adapters, load_adapters
from megalora.config import LoRAConfig
from megalora.hf import exchange
from megalora.hf.adapters import from_hf, to_hf
from megalora.hf.base_out import hf_config, save_hf_base
from megalora.hf.exchange import export_adapter, load_adapter
from megalora.hf.factors import LoRAFactors
from megalora.hf.peft import read_adapter, write_adapter
from megalora.hf.servers import choose_format, served_model
from megalora.model.config_json import model_shape, read_config
from megalora.model.families import names_of
from tests.dist.support import hf
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.test_hf_base import reference
from tests.support import hf_models

TOLERANCE = 1e-4
CONFIG = LoRAConfig(rank=8, alpha=16.0, expert_rank=4)
RANKS = {".experts.": (4, 4.0), "": (8, 2.0)}
# Of Nemotron-H it refuses out_proj, and finds experts in one tensor alone.
TAKEN_BY_PEFT = {"nemotron_h": ("attn", "mlp", "in_proj", "unembed")}
WITH_EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "glm4_moe_lite", "deepseek_v3"]
WITH_EXPERTS += ["gpt_oss", "qwen3_next", "nemotron_h"]


@functools.cache
def adapted(case: str) -> tuple[dict[str, LoRAFactors], torch.Tensor]:
    """Return factors for a tiny model and the logits of the model that has them merged."""
    directory, _ = reference(case)
    model = hf_models.hf_model_from(directory)
    factors = hf_models.random_factors(model, RANKS)
    return factors, hf_models.logits(hf_models.merged(model, factors))


def build(layout: Layout, case: str, config: LoRAConfig = CONFIG, **options: Any) -> list[Any]:
    directory, _ = reference(case)
    return apply_lora(hf.load(layout, directory, **options), config)


def put(chunks: list[Any], case: str, factors: dict[str, LoRAFactors], config: LoRAConfig) -> None:
    shape = exchange.model_shape(chunks, str(reference(case)[0]))
    shape = replace(shape, vocab_size=hf_models.VOCAB)
    load_adapters(chunks, from_hf(factors, config, shape, padded_vocab_size=hf.PADDED_VOCAB))


def write(
    directory: Path, case: str, factors: dict[str, LoRAFactors], reader: str | None = None
) -> None:
    base = reference(case)[0]
    shape = model_shape(read_config(base))
    write_adapter(
        directory,
        factors,
        base_model_name=str(base),
        names=names_of(shape.model_type),
        num_layers=shape.num_layers,
        num_experts=shape.num_moe_experts,
        moe_layers=shape.moe_layers,
        delta_layers=shape.delta_layers,
        format=choose_format(reader, None, served_model(str(base), shape), shares_outer=False),
    )


def shared_directory() -> Path:
    path: list[Any] = [tempfile.mkdtemp(prefix="megalora-") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(path, src=0)
    return Path(path[0])


def assert_exchanges(layout: Layout, case: str, **options: Any) -> None:
    factors, expected = adapted(case)
    shape = model_shape(read_config(reference(case)[0]))
    with model_parallel(layout):
        chunks = build(layout, case, **options)
        plain = hf.logits(chunks, hf_models.IDS)[..., : hf_models.VOCAB]
        put(chunks, case, factors, CONFIG)
        found = hf.logits(chunks, hf_models.IDS)[..., : hf_models.VOCAB]
        gathered = gather_adapters(chunks)
    assert (found - plain).abs().max() > 0.05
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    if dist.get_rank() == 0:
        exported = to_hf(gathered, CONFIG, shape)
        assert exported.keys() == factors.keys()
        for name, module in factors.items():
            assert torch.equal(exported[name].lora_A, module.lora_A), name
            assert torch.equal(exported[name].lora_B, module.lora_B), name
            assert exported[name].scale == module.scale


@pytest.mark.parametrize(
    "case",
    [
        "llama",
        "mistral",
        "phi3",
        "qwen2",
        "qwen3_moe-mixed",
        "deepseek_v3-plain",
        "qwen3_next-mixed",
    ]
    + ["qwen3_5_text", "qwen3_5_moe", "qwen2_5_vl", "qwen3_vl", "mistral3", *WITH_EXPERTS],
)
@over(Layout())
def test_imported_adapters_give_the_logits_of_the_merged_model(layout: Layout, case: str) -> None:
    assert_exchanges(layout, case)


@pytest.mark.parametrize(
    "case", ["qwen2", "phi3", "deepseek_v3-plain", "qwen3_5_text", *WITH_EXPERTS]
)
@over(Layout(tp=2, sp=True), Layout(pp=2))
def test_dense_sharding_exchanges_the_same_adapters(layout: Layout, case: str) -> None:
    assert_exchanges(layout, case)


@pytest.mark.parametrize("case", WITH_EXPERTS)
@over(Layout(dp=2, ep=2), Layout(tp=2, sp=True, ep=2), Layout(tp=2, sp=True, etp=2))
def test_expert_sharding_exchanges_the_same_adapters(layout: Layout, case: str) -> None:
    assert_exchanges(layout, case)


@over(Layout(), Layout(tp=2), Layout(tp=2, sp=True))
def test_adapters_of_a_joint_down_projection_are_exchanged_as_two(layout: Layout) -> None:
    assert_exchanges(layout, "deepseek_v3", mla_down_proj_fusion=True)


@pytest.mark.parametrize("case", ["qwen3_moe", "glm4_moe"])
@over(Layout(tp=2, sp=True, pp=2, ep=2))
def test_all_kinds_of_sharding_exchange_the_same_adapters(layout: Layout, case: str) -> None:
    assert_exchanges(layout, case)


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        ("qwen3_moe", "per_expert"),
        ("qwen3_moe", "shared_outer"),
        ("mixtral", "shared_outer"),
        ("phi3", "per_expert"),
        ("qwen2_moe", "per_expert"),
        ("glm4_moe", "per_expert"),
        ("deepseek_v3", "per_expert"),
        ("deepseek_v3-plain", "per_expert"),
        ("nemotron_h", "per_expert"),
        ("gpt_oss", "per_expert"),
        ("qwen3_next", "per_expert"),
        ("qwen3_5_text", "per_expert"),
        ("qwen3_5_moe", "per_expert"),
        ("qwen3_vl", "per_expert"),
        ("mistral3", "per_expert"),
    ],
)
@over(Layout())
def test_a_trained_megatron_adapter_gives_the_same_logits_in_peft(
    layout: Layout, case: str, mode: Any, tmp_path: Path
) -> None:
    config = LoRAConfig(rank=12, expert_mode=mode, targets=TAKEN_BY_PEFT.get(case, ("all",)))
    directory, _ = reference(case)
    with model_parallel(layout):
        chunks = build(layout, case, config)
        for _ in range(2):
            sgd_step(chunks[0], [p for p in chunks[0].parameters() if p.requires_grad], lr=0.5)
        expected = hf.logits(chunks, hf_models.IDS)[..., : hf_models.VOCAB]
        tensors = gather_adapters(chunks)
    factors = to_hf(tensors, config, model_shape(read_config(directory)))
    assert min(m.lora_B.abs().max().item() for n, m in factors.items() if "o_proj" in n) > 1e-4
    write(tmp_path / "a", case, factors, "peft")
    model = hf_models.hf_model_from(directory)
    plain, loaded = hf_models.logits(model), hf_models.peft_model(model, tmp_path / "a")
    assert (plain - expected).abs().max() > 1e-2
    torch.testing.assert_close(hf_models.logits(loaded), expected, atol=TOLERANCE, rtol=TOLERANCE)


# Of gpt-oss, PEFT reaches experts and routers by their parameters alone.
OF_PARAMETERS = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "mlp.router.weight"],
}


@functools.cache
def with_routers(case: str) -> tuple[Path, torch.Tensor]:
    """Return an adapter that PEFT made of all linears, routers among them, and its logits."""
    model = hf_models.hf_model_from(reference(case)[0])
    targets: Any = OF_PARAMETERS if case == "gpt_oss" else {"target_modules": "all-linear"}
    config = LoraConfig(r=6, lora_alpha=9, task_type="CAUSAL_LM", **targets)
    torch.manual_seed(3)
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, param in peft.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.1)
    directory = shared_directory()
    if dist.get_rank() == 0:
        peft.save_pretrained(str(directory))
    dist.barrier()
    return directory, hf_models.logits(peft.eval())


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "glm4_moe", "gpt_oss"])
@over(Layout(), Layout(tp=2, sp=True, ep=2))
def test_adapters_of_routers_give_the_logits_of_peft_both_ways(layout: Layout, case: str) -> None:
    adapter, expected = with_routers(case)
    directory, _ = reference(case)
    factors = read_adapter(adapter, names=names_of(case), hidden_size=hf_models.HIDDEN)
    # Of GLM-4.5's linears PEFT leaves out those that are named like an expert's.
    targets = ("attn", "experts.linear_fc1", "experts.linear_fc2", "router")
    config = LoRAConfig(rank=8, alpha=12.0, expert_rank=12, targets=targets)
    routers = {name: m for name, m in factors.items() if name.endswith((".gate", ".router"))}
    silent = {n: replace(m, lora_B=torch.zeros_like(m.lora_B)) for n, m in routers.items()}
    with model_parallel(layout):
        chunks = build(layout, case, config)
        put(chunks, case, {**factors, **silent}, config)
        without = hf.logits(chunks, hf_models.IDS)[..., : hf_models.VOCAB]
        base, again = {"hf_model": str(directory)}, shared_directory() / "a"
        load_adapter(chunks, adapter, config, **base)
        found = hf.logits(chunks, hf_models.IDS)[..., : hf_models.VOCAB]
        export_adapter(chunks, again, config=config, vocab_size=hf_models.VOCAB, **base)
    assert len(routers) == len(model_shape(read_config(directory)).moe_layers)
    assert (without - expected).abs().max() > 0.01
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    if dist.get_rank() == 0:
        model = hf_models.hf_model_from(directory)
        exported = hf_models.logits(hf_models.peft_model(model, again))
        torch.testing.assert_close(exported, expected, atol=TOLERANCE, rtol=TOLERANCE)
        assert read_adapter(again, names=names_of(case)).keys() == factors.keys()


def loss_of(model: Any) -> torch.Tensor:
    """Return the mean loss of predicting the next token, for both worlds."""
    ids = hf_models.IDS
    if hasattr(model, "decoder"):
        positions = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
        found = model(ids, positions, None)[..., : hf_models.VOCAB]
    else:
        found = model(ids).logits
    return torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def sgd_step(model: Any, params: list[torch.nn.Parameter], lr: float) -> None:
    loss_of(model).backward()
    with torch.no_grad():
        for param in params:
            # Megatron's experts without tokens have no gradient.
            if param.grad is not None:
                param.sub_(lr * param.grad)
                param.grad = None


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LATENT = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
# What PEFT adapts and what Megatron does.
GOING_ON: dict[str, tuple[dict[str, list[str]], tuple[str, ...]]] = {
    "qwen2": ({"target_modules": [*ATTENTION, *MLP]}, ("attn", "mlp")),
    "mixtral": (
        {"target_modules": ATTENTION, "target_parameters": ["experts.down_proj", "gate.weight"]},
        ("attn", "experts.linear_fc2", "router"),
    ),
    "glm4_moe": (
        {
            "target_modules": ATTENTION,
            "target_parameters": [f"shared_experts.{name}.weight" for name in MLP],
        },
        ("attn", "shared_experts.linear_fc1", "shared_experts.linear_fc2"),
    ),
    "qwen2_5_vl": (
        {"target_modules": rf".*language_model\..*({'|'.join([*ATTENTION, *MLP])})"},
        ("attn", "mlp"),
    ),
    "deepseek_v3": ({"target_modules": ["q_a_proj", "q_b_proj", *LATENT]}, ("attn",)),
    "deepseek_v3-plain": ({"target_modules": ["q_proj", *LATENT]}, ("attn",)),
    "phi3": ({"target_modules": ["o_proj", "down_proj"]}, ("linear_proj", "linear_fc2")),
    "nemotron_h": (
        {
            "target_modules": ["in_proj", *ATTENTION, "up_proj", "down_proj"],
            "target_parameters": ["experts.up_proj", "experts.down_proj"],
        },
        ("attn", "mlp", "in_proj"),
    ),
    "qwen3_5_text": (
        {"target_modules": [*ATTENTION, *MLP, "in_proj_z", "out_proj"]},
        ("attn", "mlp"),
    ),
}


@pytest.mark.parametrize("case", GOING_ON)
@over(Layout())
def test_training_goes_on_from_an_adapter_that_peft_trained(
    layout: Layout, case: str, tmp_path: Path
) -> None:
    directory, _ = reference(case)
    torch.manual_seed(3)
    adapted, targets = GOING_ON[case]
    peft = get_peft_model(
        copy.deepcopy(hf_models.hf_model_from(directory)),
        LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **adapted),
    )
    params = [p for p in peft.parameters() if p.requires_grad]
    for _ in range(2):
        sgd_step(peft, params, lr=1.0)
    peft.save_pretrained(str(tmp_path))
    config = LoRAConfig(rank=8, alpha=16.0, expert_rank=8, targets=targets)
    factors = read_adapter(tmp_path, names=names_of(case.partition("-")[0]))
    with model_parallel(layout):
        chunks = build(layout, case, config)
        put(chunks, case, factors, config)
        own = [p for p in chunks[0].parameters() if p.requires_grad]
        losses = []
        for _ in range(3):
            losses.append((loss_of(peft).item(), loss_of(chunks[0]).item()))
            sgd_step(peft, params, lr=1.0)
            sgd_step(chunks[0], own, lr=1.0)
    theirs, ours = torch.tensor(losses).T
    assert (theirs[0] - theirs[-1]) > 0.01, "the steps have to change the loss to be compared"
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


MODEL_TYPES = {
    "llama-tied": "llama",
    "llama-yarn": "llama",
    "mistral": "mistral",
    "mistral-without-window": "mistral",
    "mixtral": "mixtral",
    "mixtral-window": "mixtral",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2_moe",
    "glm4_moe": "glm4_moe",
    "glm4_moe-plain": "glm4_moe",
    "glm4_moe_lite": "glm4_moe_lite",
    "deepseek_v3": "deepseek_v3",
    "deepseek_v3-plain": "deepseek_v3",
    "gpt_oss": "gpt_oss",
    "gpt_oss-plain": "gpt_oss",
    "qwen3_moe-mixed": "qwen3_moe",
    "qwen3_moe-yarn": "qwen3_moe",
    "nemotron_h": "nemotron_h",
    "nemotron_h-dense": "nemotron_h",
    "nemotron_h-latent": "nemotron_h",
    "qwen3_next": "qwen3_next",
    "qwen3_next-mixed": "qwen3_next",
    "qwen3_5_text": "qwen3_5_text",
}


def assert_saves_base(layout: Layout, case: str, *, hybrid: bool = False, **options: Any) -> None:
    directory, expected = reference(case)
    target = shared_directory()
    with model_parallel(layout):
        chunks = hf.load(layout, directory, hybrid=hybrid)
        config = hf_config(chunks[0], model_type=MODEL_TYPES[case], vocab_size=hf_models.VOCAB)
        # Some have a token by default that is none of so few.
        config["pad_token_id"] = 0
        save_hf_base(chunks, target, config, **options)
    if dist.get_rank() == 0:
        saved = hf_models.hf_model_from(target)
        # A configuration made from the model has no rope scaling.
        original = hf_models.hf_model_from(directory)
        weights = original.state_dict()
        assert all(torch.equal(v, weights[k]) for k, v in saved.state_dict().items())
        if case != "llama-tied":
            torch.testing.assert_close(hf_models.logits(saved), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", MODEL_TYPES)
@over(Layout())
def test_a_saved_base_is_the_model_that_was_loaded(layout: Layout, case: str) -> None:
    assert_saves_base(layout, case)
    assert_saves_base(layout, case, max_shard_bytes=20_000)


@pytest.mark.parametrize(
    "case", ["qwen3_moe-mixed", "glm4_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "nemotron_h"]
)
@over(Layout(tp=2, sp=True, ep=2), Layout(pp=2))
def test_a_sharded_base_is_saved_whole(layout: Layout, case: str) -> None:
    assert_saves_base(layout, case)


@over(Layout())
def test_a_configuration_of_another_model_is_refused(layout: Layout, tmp_path: Path) -> None:
    directory, _ = reference("qwen2")
    with model_parallel(layout):
        chunks = hf.load(layout, directory)
        with pytest.raises(ValueError, match="add_qkv_bias is True, must be False"):
            hf_config(chunks[0], model_type="llama", vocab_size=hf_models.VOCAB)
        config = {**read_config(directory), "num_hidden_layers": 3}
        with pytest.raises(ValueError, match="num_layers is 2, must be 3"):
            save_hf_base(chunks, tmp_path / "x", config)
    assert list(tmp_path.iterdir()) == []
