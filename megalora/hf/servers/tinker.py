"""Tinker: the layout that its service hands out, as its published sizes and SGLang have it."""

from megalora.hf.peft import Format
from megalora.hf.servers.outline import Outline
from megalora.hf.servers.verdict import Server, Verdict
from megalora.model.served import ServedModel

TITLE = "Tinker"


def judge(outline: Outline, model: ServedModel) -> Verdict:
    """Say whether an adapter has Tinker's layout: one rank and scale, shared outer factors."""
    verdict = Verdict()
    ranks = set(outline.ranks.values()) - {0}
    if len(ranks) > 1:
        verdict.problems.append(f"{TITLE} has one rank, this adapter {len(ranks)}: {_REMEDY}")
    if outline.layouts - {"stacked"}:
        verdict.problems.append(
            f"{TITLE} has the experts of a layer as experts.w1, w2 and w3, outer factors shared: "
            f"{_REMEDY}"
        )
    if "lm_head" in outline.leaves():
        verdict.problems.append(f"{TITLE} names the unembedding unembed_tokens: {_REMEDY}")
    return verdict


_REMEDY = (
    "export it as tinker (megalora export --format tinker), from a run with --lora-expert-mode "
    "shared_outer"
)


def choose(model: ServedModel, shares_outer: bool) -> Format:
    """Return the format for a model."""
    return "tinker"


SERVER = Server(title=TITLE, seen="2026-11-27", formats=("tinker",), choose=choose, judge=judge)
