"""Who reads adapters, what each of them takes and refuses, known without running it.

A server is a file here with one row, SERVER: its version, the formats it may be given, and `judge`.
tests/test_{vllm,sglang}_reader.py hold the verdicts against the servers' own code.
"""

import functools
from collections.abc import Mapping

from megalora.hf.factors import LoRAFactors
from megalora.hf.peft import Format
from megalora.hf.servers import peft, sglang, tinker, vllm
from megalora.hf.servers.outline import Outline, outline_of_export
from megalora.hf.servers.verdict import Server, Verdict
from megalora.model.config_json import load_config
from megalora.model.served import ServedModel
from megalora.model.shape import ModelShape

SERVERS: Mapping[str, Server] = {
    "peft": peft.SERVER,
    "vllm": vllm.SERVER,
    "sglang": sglang.SERVER,
    "tinker": tinker.SERVER,
}


def check_reader(name: str | None, format: Format | None, *, export: str | None) -> None:
    """Raise ValueError where who is to read an export, and its format, cannot both be right."""
    for field, value in {"export_for": name, "export_format": format}.items():
        if value and not export:
            raise ValueError(f"{field} is {value!r} and nothing is exported: add --export-hf DIR")
    choose_format(name, format, ServedModel(), shares_outer=False)


def choose_format(
    name: str | None, format: Format | None, model: ServedModel, *, shares_outer: bool
) -> Format:
    """Return the format of an export: the one that is asked for, or its server's.

    name: of `SERVERS`; PEFT's is the format where none is named.
    shares_outer: experts share their outer factors.
    Raises ValueError where the format is none that the server reads.
    """
    if name is None:
        return format or peft.SERVER.choose(model, shares_outer)
    server = SERVERS[name]
    if format is None:
        return server.choose(model, shares_outer)
    if format not in server.formats:
        raise ValueError(
            f"format {format!r} and export_for {name!r} contradict each other: {name} reads "
            f"{' or '.join(server.formats)}: leave one of the two out"
        )
    return format


# Read when training starts: an export at its end must not fail because the base has gone.
@functools.cache
def _model_in(directory: str) -> ServedModel:
    return ServedModel.of(load_config(directory))


def served_model(hf_model: str | None, shape: ModelShape) -> ServedModel:
    """Return what a server finds of a base; without its directory, what its sizes say."""
    sizes = {
        "model_type": shape.model_type,
        "vocab_size": shape.vocab_size,
        "num_experts": shape.num_moe_experts,
        "intermediate_size": shape.ffn_hidden_size,
        "shared_expert_intermediate_size": shape.moe_shared_expert_intermediate_size,
    }
    return _model_in(hf_model) if hf_model else ServedModel.of(sizes)


def judge_export(
    factors: Mapping[str, LoRAFactors], format: str, model: ServedModel, name: str | None
) -> list[str]:
    """Say what a server does with an export: what it needs, as sentences.

    factors: of any values. name: of `SERVERS`; None for warnings of what vLLM would refuse. Raises
    ValueError where the server refuses it, or would load it wrongly.
    """
    outline = outline_of_export(factors, format, model.names)
    if name is None:
        problems = SERVERS["vllm"].judge(outline, model).problems
        return [f"{'; '.join(problems)} (or name who it is for: --export-for)"] if problems else []
    verdict = SERVERS[name].judge(outline, model)
    if verdict.problems:
        raise ValueError(f"the export is for {name}: {'; '.join(verdict.problems)}")
    return describe(name, outline, verdict)


def describe(name: str, outline: Outline, verdict: Verdict) -> list[str]:
    """Return what is to be known of an adapter that a server takes, as sentences."""
    ranks = f"the largest rank is {outline.largest_rank}"
    flags = f"start it with {' '.join(verdict.flags)}" if verdict.flags else ""
    title = SERVERS[name].title
    return ["; ".join(filter(None, [f"{title} takes it", ranks, flags])), *verdict.warnings]
