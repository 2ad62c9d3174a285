"""SGLang 0.5.23, by its LoRAConfig, LoRAAdapter, LoRAManager and LoRAMemoryPool."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable

from megalora.hf.factors import same_scale, summarise
from megalora.hf.peft import Format
from megalora.hf.servers.outline import Outline, layout_of, patterns
from megalora.hf.servers.verdict import Server, Verdict, convert, used_fields
from megalora.model.served import ServedModel

TITLE = "SGLang 0.5.23"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_UNUSED = {
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "use_bdlora": None,
    "use_qalora": False,
}
_FUSED: dict[str, str] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up_proj"),
    "w2": "down_proj",
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj_with_mqa"),
    **dict.fromkeys(("vocab_emb", "embeddings", "word_embeddings"), "embed_tokens"),
    **dict.fromkeys(("output", "unembed_tokens"), "lm_head"),
    **dict.fromkeys(("in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z"), "in_proj_qkvz"),
}
_KNOWN = _names("""
    qkv_proj qkvr o_proj wo_ud out_proj in_proj in_proj_qkvz up_proj gate_up_proj down_proj
    fc1_latent_proj fc2_latent_proj embed_tokens lm_head fused_qkv_a_proj_with_mqa q_b_proj
    kv_b_proj wq_b wk weights_proj
""")
# The choices of --lora-target-modules.
_CHOICES = _names("""
    q_proj k_proj v_proj o_proj q_a_proj kv_a_proj_with_mqa q_b_proj kv_b_proj wq_b wk
    weights_proj gate_proj up_proj down_proj qkv_proj gate_up_proj embed_tokens lm_head
""")
# Of keys it knows them, of target_modules it does not.
_KEYS_ALONE = _names("w1 w2 w3")
_ALL = ("all", "all-linear")
_PARTS_OF_DELTA = ("in_proj_q", "in_proj_k", "in_proj_v")
_LAYER = re.compile(r".*\.layers?\.\d+\.")


def judge(outline: Outline, model: ServedModel) -> Verdict:
    """Say what SGLang does with an adapter, and which flags it needs for that."""
    verdict = Verdict(flags=["--enable-lora", "--max-lora-rank", str(outline.largest_rank)])
    used = used_fields(outline.config, _UNUSED)
    if used:
        verdict.problems.append(
            f"{TITLE} does not read {', '.join(used)}: merge the adapter with PEFT, or train it "
            "as plain LoRA"
        )
    if outline.others:
        verdict.problems.append(
            f"{TITLE} leaves out {summarise(outline.others)}: merge the adapter with PEFT"
        )
    _judge_ranks(outline, verdict)
    _judge_scales(outline, verdict)
    _judge_targets(outline, verdict)
    _judge_layout(outline, verdict)
    _judge_parts(outline, model, verdict)
    _judge_shared(outline, model, verdict)
    _judge_attention(outline, model, verdict)
    _judge_delta_nets(outline, verdict)
    return verdict


def _judge_attention(outline: Outline, model: ServedModel, verdict: Verdict) -> None:
    """Find adapters of gated attention and of delta nets where it does not know their sizes."""
    attention = sorted(n for n in outline.ranks if ".self_attn." in n or ".linear_attn." in n)
    if attention and not model.sglang_sizes_attention:
        verdict.problems.append(
            f"{TITLE} takes {model.architecture}'s attention for one without gates and delta nets, "
            f"and ends at {summarise(attention)}: train with --lora-targets mlp, or merge the "
            "adapter into its base (megalora merge)"
        )


def _judge_shared(outline: Outline, model: ServedModel, verdict: Verdict) -> None:
    """Find adapters of Qwen2-MoE's shared expert, which it takes for as wide as a dense MLP."""
    shared, dense = model.shared_expert_intermediate_size, model.intermediate_size
    has_some = any(".shared_expert." in name for name in outline.ranks)
    if has_some and shared not in (0, dense) and not model.sglang_sizes_shared_experts:
        verdict.problems.append(
            f"{TITLE} makes room for adapters of the shared expert by intermediate_size {dense}, "
            f"and shared_expert_intermediate_size is {shared}: leave shared_experts.linear_fc1 and "
            "shared_experts.linear_fc2 out of --lora-targets, or merge the adapter into its base "
            "(megalora merge)"
        )


def _judge_ranks(outline: Outline, verdict: Verdict) -> None:
    rank = outline.config.get("r")
    other = sorted(name for name, its in outline.ranks.items() if its not in (0, rank))
    if other:
        verdict.problems.append(
            f"{TITLE} takes one rank, r {rank}, and {summarise(other)} have others: "
            f"{convert('uniform')}"
        )


def _judge_scales(outline: Outline, verdict: Verdict) -> None:
    """It scales everything by lora_alpha / r, without a word about what says otherwise."""
    config = outline.config
    rank, alpha = outline.rank_outside_patterns, config.get("lora_alpha")
    if not rank or not isinstance(alpha, int | float):
        verdict.problems.append("adapter_config.json has no r or no lora_alpha: save it by PEFT")
        return
    alphas = patterns(config, "alpha_pattern").values()
    if any(not same_scale(float(other), float(alpha)) for other in alphas):
        verdict.problems.append(
            f"{TITLE} does not read alpha_pattern and would scale by lora_alpha / r: "
            f"{convert('uniform')}"
        )
    if config.get("use_rslora") and rank > 1:
        verdict.problems.append(
            f"{TITLE} does not read use_rslora and would scale by lora_alpha / r: "
            f"{convert('uniform')}"
        )


def _judge_targets(outline: Outline, verdict: Verdict) -> None:
    targets = outline.config.get("target_modules")
    fused: Collection[str] = _KNOWN
    if isinstance(targets, str) and targets in _ALL:
        verdict.flags += ["--lora-target-modules", "all"]
    elif isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        leaves = _leaves(targets)
        shown = ["all"] if leaves - _CHOICES else sorted(leaves)
        verdict.flags += ["--lora-target-modules", *shown]
        fused = {leaf if leaf in _KEYS_ALONE else _FUSED.get(leaf, leaf) for leaf in leaves}
    else:
        verdict.problems.append(
            f"{TITLE} takes target_modules as a list of names or 'all-linear', not "
            f"{str(targets)!r:.100}: write the modules' names there"
        )
        return
    if letters := sorted(_KEYS_ALONE.intersection(fused)):
        verdict.problems.append(
            f"{TITLE} knows {', '.join(letters)} in tensors' names and not in target_modules: "
            f"{convert('uniform')}, which has gate_proj, up_proj and down_proj there"
        )
        return
    _judge_named(outline, fused, verdict)


def _leaves(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def _judge_named(outline: Outline, fused: Collection[str], verdict: Verdict) -> None:
    """Find modules that target_modules does not name, which it serves without or ends at."""
    leaves = {name.rpartition(".")[2] for name in outline.ranks if layout_of(name) != "in one"}
    unknown = sorted({*fused, *(_FUSED.get(leaf, leaf) for leaf in leaves)} - _KNOWN)
    if unknown:
        verdict.problems.append(
            f"{TITLE} has no LoRA for {summarise(unknown)}: leave them out of --lora-targets, or "
            "merge the adapter into its base (megalora merge)"
        )
    unnamed = sorted(leaf for leaf in leaves if _FUSED.get(leaf, leaf) in _KNOWN - {*fused})
    if unnamed:
        verdict.problems.append(
            f"{TITLE} serves what target_modules names, and {summarise(unnamed)} is not there: "
            "add it to adapter_config.json"
        )


def _judge_layout(outline: Outline, verdict: Verdict) -> None:
    layouts = outline.layouts
    if "in one" in layouts or len(layouts) > 1:
        verdict.problems.append(
            f"{TITLE} does not read the experts of a layer from one 3-D parameter: "
            f"{convert('uniform')}"
        )
        return
    names = [name for name in outline.ranks if layout_of(name)]
    fused = {_FUSED.get(leaf, leaf) for leaf in (name.rpartition(".")[2] for name in names)}
    targets = outline.config.get("target_modules")
    if isinstance(targets, list):
        fused |= {_FUSED.get(leaf, leaf) for leaf in (t.rpartition(".")[2] for t in targets)}
    if names and not {"gate_up_proj", "down_proj"} <= fused:
        verdict.problems.append(
            f"{TITLE} adapts experts where gate, up and down all have adapters, and would serve "
            f"these without a word: {convert('uniform')}"
        )


def _judge_parts(outline: Outline, model: ServedModel, verdict: Verdict) -> None:
    """Find what it cannot stack: q without v, k or v without q, up without gate.

    Of MLPs without a gate it is not known whether it serves them rightly.
    """
    cure = "train q, k and v (linear_qkv), and gate and up (linear_fc1), together"
    if not model.vllm_gated_experts:
        cure = "merge the adapter into its base (megalora merge)"
    modules: dict[str, set[str]] = defaultdict(set)
    for name in outline.ranks:
        if _LAYER.match(name):
            parent, _, leaf = name.rpartition(".")
            modules[parent].add(leaf)
    for parent, leaves in sorted(modules.items()):
        qkv = leaves & {"q_proj", "k_proj", "v_proj"}
        if qkv and not {"q_proj", "v_proj"} <= qkv:
            problem = f"{parent} has adapters of {', '.join(sorted(qkv))} alone"
        elif leaves & {"up_proj", "w3"} and not leaves & {"gate_proj", "w1"}:
            problem = f"{parent} has an adapter of up_proj and none of gate_proj"
        else:
            continue
        verdict.problems.append(f"{TITLE} cannot fuse them: {problem}: {cure}")
        return


def _judge_delta_nets(outline: Outline, verdict: Verdict) -> None:
    """Find in_proj_z without what it stacks it with, which it drops without a word."""
    places = {name.rpartition(".")[0] for name in outline.ranks if name.endswith(".in_proj_z")}
    for place in sorted(places):
        if not all(f"{place}.{part}" in outline.ranks for part in _PARTS_OF_DELTA):
            verdict.problems.append(
                f"{TITLE} drops {place}.in_proj_z without {', '.join(_PARTS_OF_DELTA)} of their "
                "own: leave in_proj out of --lora-targets, or merge the adapter into its base "
                "(megalora merge)"
            )
            return


def choose(model: ServedModel, shares_outer: bool) -> Format:
    """Return the format for a model."""
    return "tinker" if shares_outer else "uniform"


SERVER = Server(
    title=TITLE,
    seen="2026-11-27",
    formats=("uniform", "peft", "tinker"),
    choose=choose,
    judge=judge,
)
