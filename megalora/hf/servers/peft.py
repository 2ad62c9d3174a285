"""PEFT 0.21.2 with transformers 5, by the library itself."""

from collections import defaultdict

from megalora.hf.factors import summarise
from megalora.hf.peft import Format
from megalora.hf.servers.outline import Outline, layout_of
from megalora.hf.servers.verdict import Server, Verdict, convert
from megalora.model.served import ServedModel

TITLE = "PEFT 0.21.2"
_PROJECTIONS = {"gate_proj", "up_proj", "down_proj"}, {"w1", "w2", "w3"}


def judge(outline: Outline, model: ServedModel) -> Verdict:
    """Say what PEFT does with an adapter on a model of transformers 5."""
    verdict = Verdict()
    if str(outline.config.get("peft_type")) != "LORA" and "peft_type" in outline.config:
        verdict.warnings.append("it is no LoRA, and only of LoRA is more known here")
    if not outline.config.get("modules_to_save") and outline.others:
        verdict.warnings.append(f"it has tensors that are no factors: {summarise(outline.others)}")
    if "unembed_tokens" in outline.leaves():
        verdict.problems.append(
            f"{TITLE} does not know unembed_tokens, as Tinker names lm_head: {convert('peft')}"
        )
    if "stacked" in outline.layouts:
        verdict.problems.append(
            f"{TITLE} does not read experts as Tinker has them (experts.w1): {convert('peft')}"
        )
    if "single" in outline.layouts:
        _judge_single(outline, model, verdict)
    if model.peft_refuses_out_proj and "out_proj" in outline.leaves():
        verdict.problems.append(
            f"{TITLE} refuses adapters of {model.architecture}'s out_proj, whose weight Mamba-2's "
            "kernels take without calling it: leave it out by --lora-targets attn mlp in_proj "
            "unembed, or merge the adapter into its base (megalora merge)"
        )
    if model.peft_renames_targets:
        _judge_beside(outline, model, verdict)
    return verdict


def _judge_beside(outline: Outline, model: ServedModel, verdict: Verdict) -> None:
    """Find modules beside the experts whose names it takes for the experts' own."""
    lost = [
        name
        for name in outline.ranks
        if not layout_of(name)
        and name.rpartition(".")[2] in model.names.projections
        and not _names_parameter(outline, f"{name}.weight")
    ]
    if lost:
        verdict.problems.append(
            f"{TITLE} takes the names of {summarise(sorted(lost))} for those of the experts, and "
            f"leaves them out: {convert('peft')}, which names their weights in target_parameters"
        )


def _names_experts(outline: Outline, model: ServedModel) -> bool:
    """Say whether it finds the experts: by their parameters, or by their projections."""
    targets = outline.config.get("target_modules")
    if model.peft_renames_targets:
        if isinstance(targets, str):
            return True
        ends = {str(target).rpartition(".")[2] for target in targets or []}
        if ends.issuperset(model.names.projections):
            return True
    return all(
        _names_parameter(outline, f"{model.names.as_loaded(prefix)}.{part}")
        for prefix, *_ in outline.experts()
        for part in model.names.parameters
    )


def _names_parameter(outline: Outline, name: str) -> bool:
    given = outline.config.get("target_parameters")
    listed = given if isinstance(given, list) else []
    return any(f".{name}".endswith(f".{end}") for end in listed)


def _judge_single(outline: Outline, model: ServedModel, verdict: Verdict) -> None:
    """Hold single experts to what its conversion takes: all projections, of the rank `r`."""
    if model.peft_experts_in_one:
        verdict.problems.append(
            f"{TITLE} loads none of the experts of {model.architecture} from keys of single ones: "
            f"{convert('peft-3d')}"
        )
    elif model.peft_experts_in_one is None:
        verdict.warnings.append(
            f"whether {TITLE} turns keys of single experts into those of "
            f"{model.architecture or 'this model'} is not known"
        )
    elif not _names_experts(outline, model):
        verdict.problems.append(
            f"{TITLE} loads none of the experts of {model.architecture}, which adapter_config.json "
            f"does not name as it takes them: {convert('peft')}"
        )
    layers: dict[str, set[str]] = defaultdict(set)
    for prefix, _, projection, _ in outline.experts():
        layers[prefix].add(projection)
    complete = (*_PROJECTIONS, set(model.names.projections))
    lacking = sorted(prefix for prefix, of in layers.items() if of not in complete)
    if lacking:
        verdict.problems.append(
            f"{TITLE} loads experts wrongly where a projection has no adapter: "
            f"{summarise(lacking)}: {convert('peft')}"
        )
    rank = outline.config.get("r")
    if any(its != rank for *_, its in outline.experts()):
        verdict.problems.append(
            f"{TITLE} takes the experts' rank from r, {rank}, and theirs is another: "
            f"{convert('peft')}"
        )


def choose(model: ServedModel, shares_outer: bool) -> Format:
    """Return the format for a model."""
    return "peft-3d" if model.peft_experts_in_one else "peft"


SERVER = Server(
    title=TITLE,
    seen="2026-11-27",
    formats=("peft", "uniform", "peft-3d"),
    choose=choose,
    judge=judge,
)
