"""Adapters of running models reach servers whole, and what these answer is the trainer's policy."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megalora.builder import apply_lora
from megalora.checkpoint.gather import gather_adapters, gather_layers
from megalora.config import LoRAConfig
from megalora.hf import files
from megalora.hf.peft import write_adapter
from megalora.model.config_json import model_shape, read_config
from megalora.model.families import names_of
from megalora.rollouts.engine import Answer, Engine, Sampling
from megalora.rollouts.sglang import SGLangEngine
from megalora.rollouts.vllm import VLLMEngine
from megalora.sync import Http, VersionedDirectory
from megalora.sync.pickled import pickle_tensors
from megalora.sync.tensors import RunningAdapters, replica_of
from tests.dist.support import hf
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import VOCAB_SIZE, build_model
from tests.dist.support.training import Run, Trainer
from tests.dist.test_hf_adapters import CONFIG, adapted, build, put, shared_directory
from tests.dist.test_hf_base import reference
from tests.support import hf_models
from tests.support.stand_in_servers import (
    Sampler,
    serving,
    sglang_routes,
    unpickled,
    vllm_routes,
)

MOE = "qwen3_moe"
LAYOUTS = (
    Layout(tp=2, sp=True),
    Layout(pp=2),
    Layout(dp=2, ep=2),
    Layout(tp=2, sp=True, ep=2),
    Layout(tp=2, sp=True, etp=2),
    Layout(tp=2, sp=True, pp=2, ep=2),
)


def running(chunks: list[Any], case: str, server: str, **options: Any) -> RunningAdapters:
    directory = str(reference(case)[0])
    return RunningAdapters(
        chunks, CONFIG, server=server, hf_model=directory, vocab_size=hf_models.VOCAB, **options
    )


def export(directory: Path, case: str, format: Any) -> Path:
    """Write what one rank would, of the factors that the model was given."""
    factors, _ = adapted(case)
    shape = model_shape(read_config(reference(case)[0]))
    write_adapter(
        directory,
        factors,
        base_model_name="",
        format=format,
        names=names_of(shape.model_type),
        num_layers=shape.num_layers,
        num_experts=shape.num_moe_experts or None,
        moe_layers=shape.moe_layers or None,
    )
    return directory


@pytest.mark.parametrize("bucket_bytes", [1, 2**26])
@over(*LAYOUTS)
def test_a_version_has_the_bytes_of_the_export_of_one_rank(
    layout: Layout, bucket_bytes: int, tmp_path: Path
) -> None:
    with model_parallel(layout):
        chunks = build(layout, MOE)
        put(chunks, MOE, adapted(MOE)[0], CONFIG)
        adapters = running(chunks, MOE, "vllm", bucket_bytes=bucket_bytes)
        versions, found = VersionedDirectory(tmp_path), []
        adapters.hand_over(
            lambda tensors: found.append(
                versions.write(7, lambda folder: adapters.plan.write(folder, tensors))
            )
        )
    if dist.get_rank() == 0:
        expected = export(tmp_path / "expected", MOE, adapters.format)
        assert found == [tmp_path / "policy-v00007"]
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (found[0] / name).read_bytes() == (expected / name).read_bytes(), name


@over(Layout(pp=2), Layout(tp=2, sp=True, ep=2))
def test_tensors_for_sglang_are_those_of_the_export_of_one_rank(
    layout: Layout, tmp_path: Path
) -> None:
    with model_parallel(layout):
        chunks = build(layout, MOE)
        put(chunks, MOE, adapted(MOE)[0], CONFIG)
        adapters = running(chunks, MOE, "sglang")
        pieces = b"".join(pickle_tensors(adapters.tensors(), piece_bytes=2**12))
    found = unpickled(pieces)
    assert adapters.format == "uniform"
    if dist.get_rank() == 0:
        expected = load_file(export(tmp_path / "a", MOE, "uniform") / "adapter_model.safetensors")
        assert found.keys() == expected.keys() == adapters.plan.sizes.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name
    else:
        assert found == {}


@over(*LAYOUTS)
def test_a_piece_takes_a_collective_for_each_group_and_a_message_for_its_stage(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("all_gather_into_tensor", "send", "recv"):
        real = getattr(dist, name)

        def counted(*args: Any, real: Any = real, name: str = name, **options: Any) -> Any:
            calls.append(name)
            return real(*args, **options)

        monkeypatch.setattr(dist, name, counted)
    with model_parallel(layout):
        chunks = build(layout, MOE)
        last = dist.get_rank() * layout.pp // dist.get_world_size() == layout.pp - 1
        for bucket_bytes in (1, 2**26):
            calls.clear()
            pieces = [piece for piece in gather_layers(chunks, bucket_bytes=bucket_bytes) if piece]
            # Of two layers with experts, and of the unembedding, which the last stage has alone.
            layers, heads = 2 // layout.pp, int(last)
            if bucket_bytes > 1:
                layers, heads = 1, 0
            # Where experts are split as the rest is, one group has both.
            of_layer = (layout.tp > 1) + (layout.ep > 1)
            gathers = layers * of_layer + heads * (layout.tp > 1)
            assert calls.count("all_gather_into_tensor") == gathers
            stages = (layout.pp - 1) * (1 if bucket_bytes > 1 else 2)
            if dist.get_rank() == 0:
                assert calls.count("recv") == stages
                assert len(pieces) == layers + heads + stages
            assert calls.count("send") <= stages


@over(Layout(dp=2))
def test_what_the_optimizer_made_is_handed_over_before_a_forward_gathers_it(
    layout: Layout,
) -> None:
    run, config = Run(distributed_optimizer=True, overlap=True), LoRAConfig(rank=4)

    def trainer() -> Trainer:
        return Trainer(apply_lora(build_model(layout), config), layout, run)

    with model_parallel(layout):
        plain, own = trainer(), trainer()
        for each in (plain, own):
            each.step(0)
        late = {name: t.clone() for name, t in gather_adapters(own.models).items()}
        adapters = RunningAdapters(own.models, config, server="peft", vocab_size=VOCAB_SIZE)
        found = {name: tensor.clone() for name, tensor in adapters.tensors()}
        own.models[0].start_param_sync(force_sync=True)
        whole = {name: tensor.clone() for name, tensor in gather_adapters(own.models).items()}
        # Training goes on as without it.
        assert own.step(1) == plain.step(1)
    if dist.get_rank() == 0:
        expected, stale = (dict(adapters.plan.tensors(each)) for each in (whole, late))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert not all(torch.equal(stale[name], tensor) for name, tensor in expected.items())


# === Rollouts ===


@over(
    *(Layout(tp=2, sp=True, pp=2), Layout(tp=2, cp=2), Layout(pp=2, cp=2), Layout(cp=2, dp=2)),
    *(Layout(tp=2, dp=2), Layout(dp=2, ep=2)),
)
def test_what_one_rank_says_reaches_all_ranks_of_its_replica_and_no_other(layout: Layout) -> None:
    with model_parallel(layout):
        replica = replica_of(torch.device("cpu"))
        said = torch.tensor([replica.index, 7, dist.get_rank()]).double()
        heard = replica.share(said if replica.speaks else None)
        empty = replica.share(torch.empty(0).double() if replica.speaks else None)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (replica.index, replica.speaks, heard.tolist()))
    speakers = {index: rank for rank, (index, speaks, _) in enumerate(everywhere) if speaks}
    assert len(speakers) == sum(speaks for _, speaks, _ in everywhere) == layout.dp
    for index, _, numbers in everywhere:
        assert numbers == [index, 7, speakers[index]]
    assert empty.numel() == 0


@contextlib.contextmanager
def stand_in(case: str, server: str, **options: Any) -> Iterator[tuple[str, Sampler | None]]:
    """Yield the URL of a server that rank 0 runs, on all ranks; what it holds on rank 0."""
    routes = {"vllm": vllm_routes, "sglang": sglang_routes}[server]
    base = reference(case)[0]
    with contextlib.ExitStack() as stack:
        told: list[Any] = [None]
        sampler = None
        if dist.get_rank() == 0:
            sampler = Sampler(base)
            told = [stack.enter_context(serving(routes(sampler, **options)))]
        dist.broadcast_object_list(told, src=0)
        yield told[0], sampler
        dist.barrier()


def engine_of(chunks: list[Any], case: str, server: str, url: str, folder: Path) -> Engine:
    adapters, http = running(chunks, case, server), Http(url=url, timeout_s=60)
    if server == "sglang":
        return SGLangEngine(adapters, http)
    return VLLMEngine(adapters, http, VersionedDirectory(folder, keep=1))


PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [3, 1, 4, 1, 5]]


def trainers(chunks: list[Any], answers: list[Answer]) -> torch.Tensor:
    """Return Megatron's log probabilities of all answers, one behind the other."""
    found = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        # As long for all, and even for sequence parallelism.
        ids = torch.tensor([[*prompt, *answer.tokens] + [0] * 16])[:, :16]
        logits = hf.logits(chunks, ids)[0, :, : hf_models.VOCAB].double().log_softmax(-1)
        places = torch.arange(len(answer.tokens)) + len(prompt) - 1
        found.append(logits[places, torch.tensor(answer.tokens)])
    return torch.cat(found)


def of(answers: list[Answer]) -> torch.Tensor:
    return torch.tensor([value for answer in answers for value in answer.logprobs]).double()


@pytest.mark.parametrize(("case", "server"), [(MOE, "vllm"), ("llama", "vllm"), (MOE, "sglang")])
@over(Layout(), Layout(pp=2), Layout(tp=2, sp=True, ep=2))
def test_log_probabilities_of_a_server_are_those_of_the_adapters_of_the_last_sync(
    layout: Layout, case: str, server: str
) -> None:
    if case == "llama" and layout.ep > 1:
        pytest.skip("it has no experts")
    folder, sampling = shared_directory(), Sampling(max_tokens=6, stop=(7, 11), seed=5)
    with model_parallel(layout), stand_in(case, server) as (url, sampler):
        chunks = build(layout, case)
        put(chunks, case, adapted(case)[0], CONFIG)
        engine = engine_of(chunks, case, server, url, folder)
        with pytest.raises(ValueError, match="call sync"):
            engine.generate(PROMPTS, sampling)
        engine.sync()
        first = engine.generate(PROMPTS, sampling)
        torch.testing.assert_close(of(first), trainers(chunks, first), atol=1e-5, rtol=1e-5)
        # The same prompt twice, and answers that differ: each has a seed of its own.
        assert first[0] != first[2]
        assert engine.generate(PROMPTS, sampling) == first
        with torch.no_grad():
            for chunk in chunks:
                for name, param in chunk.named_parameters():
                    if name.endswith("lora_B"):
                        param.mul_(-1.5)
        stale = engine.generate(PROMPTS, sampling)
        assert stale == first
        assert (of(stale) - trainers(chunks, stale)).abs().max() > 0.05
        engine.sync()
        second = engine.generate(PROMPTS, sampling)
        torch.testing.assert_close(of(second), trainers(chunks, second), atol=1e-5, rtol=1e-5)
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, second)
        assert everywhere.count(second) == len(everywhere) or layout.dp > 1
        if sampler is not None:
            assert len(sampler.loads) == 2
            assert len(sampler.adapters) == 1
            expected = ["policy-v00002"] if server == "vllm" else []
            assert [path.name for path in folder.iterdir()] == expected


# === What fails ends on all ranks ===


@pytest.mark.parametrize("problem", ["server", "disk", "adapter"])
@over(Layout(pp=2), Layout(tp=2, sp=True, ep=2))
@pytest.mark.bad_input("a rank that fails alone")
def test_a_sync_that_fails_on_rank_0_fails_on_all_and_the_next_one_works(
    layout: Layout, problem: str
) -> None:
    folder = shared_directory()
    with model_parallel(layout), stand_in(MOE, "vllm") as (url, _):
        chunks = build(layout, MOE)
        put(chunks, MOE, adapted(MOE)[0], CONFIG)
        engine = engine_of(chunks, MOE, "vllm", url, folder)
        # Of one stage and one layer alone, so that the others are on their way by then.
        broken = next((p for p in chunks[0].parameters() if p.requires_grad), None)
        assert broken is not None
        held = broken.detach().clone()
        if problem == "adapter":
            with torch.no_grad():
                broken.fill_(float("nan"))
            message = "NaN or infinite values"
        elif problem == "disk":
            message = "cannot be written: no room"
        else:
            engine = engine_of(chunks, MOE, "vllm", "http://127.0.0.1:9", folder)
            message = r"http://127.0.0.1:9/v1/load_lora_adapter does not answer"
        with contextlib.ExitStack() as stack:
            if problem == "disk":
                stack.enter_context(full_disk())
            with pytest.raises(ValueError, match=message):
                engine.sync()
        with torch.no_grad():
            broken.copy_(held)
        if problem == "server":
            with pytest.raises(ValueError, match="call sync"):
                engine.generate(PROMPTS, Sampling(max_tokens=2))
            engine = engine_of(chunks, MOE, "vllm", url, folder)
        engine.sync()
        answers = engine.generate(PROMPTS, Sampling(max_tokens=2))
        torch.testing.assert_close(of(answers), trainers(chunks, answers), atol=1e-5, rtol=1e-5)
        if dist.get_rank() == 0:
            assert len(list(folder.glob("policy-v*"))) == 1


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Let the third tensor of a file be one too many."""
    with pytest.MonkeyPatch.context() as patch:
        real, written = files._bytes, []

        def limited(*args: Any) -> Any:
            written.append(1)
            if len(written) == 3:
                raise OSError(28, "no room")
            return real(*args)

        patch.setattr(files, "_bytes", limited)
        yield


@over(Layout(), Layout(tp=2, sp=True))
@pytest.mark.bad_input("a rank that fails alone")
def test_an_answer_that_does_not_come_ends_on_all_ranks(layout: Layout) -> None:
    folder = shared_directory()
    with model_parallel(layout), stand_in(MOE, "vllm") as (url, sampler):
        chunks = build(layout, MOE)
        engine = engine_of(chunks, MOE, "vllm", url, folder)
        engine.sync()
        with pytest.raises(ValueError, match="prompt 1 of 2 has no tokens"):
            engine.generate([[1], []], Sampling(max_tokens=2))
        if sampler is not None:
            sampler.adapters.clear()
        with pytest.raises(ValueError, match=r"/v1/completions refuses .*`policy` does not exist"):
            engine.generate([[1], [2]], Sampling(max_tokens=2))
