"""PEFT 0.21.2 with transformers 5, by the library itself."""

from collections import defaultdict

from megalora.hf.factors import summarise
from megalora.hf.peft import Format
from megalora.hf.servers.outline import Outline
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
    return verdict


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
    layers: dict[str, set[str]] = defaultdict(set)
    for prefix, _, projection, _ in outline.experts():
        layers[prefix].add(projection)
    lacking = sorted(prefix for prefix, of in layers.items() if of not in _PROJECTIONS)
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
