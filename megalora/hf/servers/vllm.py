"""vLLM 0.33.0, by its PEFTHelper, LoRAModel and LoRAModelManager."""

from collections import defaultdict

from megalora.hf.factors import summarise
from megalora.hf.peft import Format
from megalora.hf.servers.outline import Outline
from megalora.hf.servers.verdict import (
    LEAVE_OUT_UNEMBEDDING,
    Server,
    Verdict,
    convert,
    used_fields,
    without_unembedding,
)
from megalora.model.served import ServedModel

TITLE = "vLLM 0.33.0"
# The values of --max-lora-rank, and the rows of a vocabulary that it can adapt.
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
MAX_VOCABULARY = 258_048

_UNUSED = {
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "use_bdlora": None,
    "use_qalora": False,
}
# Those that leave the base as it is.
_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_EMBEDDINGS = ("lm_head", "embed_tokens", "unembed_tokens")
_GATED = {"gate_proj", "up_proj", "down_proj"}, {"w1", "w2", "w3"}
_NOT_GATED = ({"up_proj", "down_proj"},)


def max_lora_rank(rank: int) -> int | None:
    """Return the smallest --max-lora-rank for a rank; None above all."""
    return next((limit for limit in MAX_RANKS if limit >= rank), None)


def judge(outline: Outline, model: ServedModel) -> Verdict:
    """Say what vLLM does with an adapter, and which flags it needs for that."""
    verdict = Verdict(flags=["--enable-lora"])
    if model.vllm_lora is False:
        verdict.problems.append(
            f"{TITLE} has no LoRA for {model.architecture}: merge the adapter into its base "
            "(megalora merge)"
        )
    elif model.vllm_lora is None and model.architecture:
        verdict.warnings.append(f"{model.architecture} is not in the table of {TITLE}")
    _judge_config(outline, verdict)
    _judge_rank(outline, verdict)
    _judge_unembedding(outline, model, verdict)
    _judge_names(outline, model, verdict)
    _judge_layout(outline, model, verdict)
    _judge_experts(outline, model, verdict)
    return verdict


def _judge_config(outline: Outline, verdict: Verdict) -> None:
    config = outline.config
    used = used_fields(config, _UNUSED)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _STARTS:
        used.append(f"init_lora_weights={start}")
    if used:
        verdict.problems.append(
            f"{TITLE} does not read {', '.join(used)}: merge the adapter with PEFT, or train it "
            "as plain LoRA"
        )
    missing = [name for name in ("r", "lora_alpha", "target_modules") if name not in config]
    if missing:
        verdict.problems.append(f"adapter_config.json has no {', '.join(missing)}: save it by PEFT")
    if outline.others:
        verdict.problems.append(
            f"{TITLE} reads factors alone, not {summarise(outline.others)}: merge the adapter "
            "with PEFT"
        )


def _judge_rank(outline: Outline, verdict: Verdict) -> None:
    largest = outline.largest_rank
    limit = max_lora_rank(largest)
    if limit is None:
        verdict.problems.append(
            f"{TITLE} takes no rank above {MAX_RANKS[-1]}, this adapter has {largest}: train with "
            "a lower --lora-rank, or merge the adapter into its base (megalora merge)"
        )
    else:
        verdict.flags += ["--max-lora-rank", str(limit)]


def _judge_unembedding(outline: Outline, model: ServedModel, verdict: Verdict) -> None:
    leaves = sorted(outline.leaves().intersection(_EMBEDDINGS))
    if "unembed_tokens" in leaves:
        verdict.problems.append(
            f"{TITLE} does not know unembed_tokens, as Tinker names lm_head: {convert('peft')}, or "
            "leave it out by --lora-targets attn mlp"
        )
    elif leaves and model.vllm_unembedding is False:
        who = f"{TITLE}'s {model.architecture}"
        verdict.problems.append(without_unembedding(leaves, who))
    elif leaves and model.vllm_unembedding is None:
        verdict.warnings.append(
            f"{TITLE} takes adapters of {', '.join(leaves)} for some models only: give --hf-model"
        )
    if model.vllm_unembedding is not False and model.vocab_size > MAX_VOCABULARY:
        if leaves:
            verdict.problems.append(
                f"{TITLE} takes adapters of {', '.join(leaves)} up to {MAX_VOCABULARY} rows, "
                f"this base has {model.vocab_size}: {LEAVE_OUT_UNEMBEDDING}"
            )
        else:
            # Else it makes room for an adapter of lm_head, and ends at start.
            modules = sorted(outline.leaves() | ({"experts"} if outline.layouts else set()))
            verdict.flags += ["--lora-target-modules", *modules]


def _judge_names(outline: Outline, model: ServedModel, verdict: Verdict) -> None:
    """Find modules under the names of transformers' class, where vLLM's has those of files."""
    names = model.names
    wanted = {name: names.as_adapted(names.as_stored(name)) for name in outline.ranks}
    # What published files have for `model.` it takes as well.
    files = {name: names.in_files(names.as_stored(name)) for name in wanted}
    renamed = sorted(
        name
        for name, other in wanted.items()
        if other != name and not (names.written == names.language and files[name] == name)
    )
    if renamed:
        verdict.problems.append(
            f"{TITLE}'s {model.architecture} calls {summarise(renamed)} as the base's files do "
            f"({wanted[renamed[0]]}), and would serve without a word and without "
            f"them: {convert('peft')}"
        )


def _judge_layout(outline: Outline, model: ServedModel, verdict: Verdict) -> None:
    layouts = outline.layouts
    if len(layouts) > 1:
        verdict.problems.append(
            f"its experts lie in {len(layouts)} ways ({', '.join(sorted(layouts))}), of which "
            f"{TITLE} reads one: {convert('peft')}"
        )
    elif layouts == {"stacked"}:
        verdict.flags.append("--enable-moe-shared-loras")
    elif layouts and (layouts == {"in one"}) != model.vllm_experts_in_one:
        verdict.flags.append("--enable-mixed-moe-lora-format")
        if layouts == {"in one"}:
            verdict.warnings.append('load it with "is_3d_lora_weight": true in --lora-modules')


def _judge_experts(outline: Outline, model: ServedModel, verdict: Verdict) -> None:
    """Hold single experts to what it stacks: all of a layer, all projections, one rank each."""
    layers: dict[str, dict[str, dict[int, int]]] = defaultdict(lambda: defaultdict(dict))
    for prefix, number, projection, rank in outline.experts():
        layers[prefix][projection][number] = rank
    complete_sets = _GATED if model.vllm_gated_experts else _NOT_GATED
    for prefix, projections in sorted(layers.items()):
        wanted = set(range(model.num_experts)) or {n for of in projections.values() for n in of}
        complete = all(of.keys() == wanted for of in projections.values())
        if not complete or set(projections) not in complete_sets:
            problem = f"{prefix} lacks adapters of some of {len(wanted)} experts or projections"
        elif any(len(set(of.values())) > 1 for of in projections.values()):
            problem = f"{prefix} has experts of several ranks"
        else:
            continue
        verdict.problems.append(f"{problem}, which {TITLE} cannot stack: {convert('peft')}")
        return


def choose(model: ServedModel, shares_outer: bool) -> Format:
    """Return the format for a model."""
    return "peft-3d" if model.vllm_experts_in_one else "peft"


SERVER = Server(
    title=TITLE,
    seen="2026-11-27",
    formats=("peft", "uniform", "peft-3d", "tinker"),
    choose=choose,
    judge=judge,
)
