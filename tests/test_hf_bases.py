"""A base is what transformers would load: which files, whose unembedding, which numbers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalora.config import LoRAConfig
from megalora.hf.adapters import from_hf
from megalora.hf.block_scaled import PlainFiles
from megalora.hf.cuts import Placement, Shard
from megalora.hf.factors import LoRAFactors
from megalora.hf.merge import merge_adapter
from megalora.hf.safetensors_files import HFWeights
from megalora.hf.weights import Weights
from megalora.model.config_json import model_shape, read_config
from megalora.model.megatron import megatron_args
from megalora.model.presets import named_shape
from megalora.model.rope import Yarn, rope
from tests.support import fp8, hf_bases
from tests.support.hf_bases import LLAMA3
from tests.support.hf_models import hf_model, logits, merged, random_factors, transformers

NUMBERS = pytest.mark.bad_input("a number that is not one")
MALFORMED = pytest.mark.bad_input("a malformed file")
RANKS = {"experts": (4, 0.5), "": (8, 2.0)}
BLOCK = (16, 24)
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def save(family: str, directory: Path, *, tied: bool = False, **options: object) -> torch.nn.Module:
    model = hf_model(family, tied=tied)
    model.save_pretrained(str(directory), **options)
    return model


def config_of(directory: Path) -> dict[str, object]:
    return json.loads((directory / "config.json").read_text())


# === Whose unembedding ===


@pytest.mark.parametrize("lm_head", [True, False])
def test_merging_keeps_the_own_head_of_a_base_that_says_it_is_tied(lm_head, tmp_path):
    save("llama", tmp_path / "base", tied=True)
    fp8.change(tmp_path / "base", hf_bases.own_head)
    model = hf_bases.loaded(tmp_path / "base")
    factors = random_factors(model, RANKS, lm_head=lm_head)
    assert not merge_adapter(tmp_path / "base", factors, tmp_path / "out"), "it was not tied"
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    found = hf_bases.loaded_logits(tmp_path / "out")
    torch.testing.assert_close(found, logits(merged(model, factors)), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize(("head", "tied"), [("own", False), ("equal", True), (None, True)])
def test_all_readers_tie_what_transformers_ties(head, tied, tmp_path):
    base = tmp_path / "base"
    save("qwen3", base, tied=True)
    if head:
        equal = lambda tensors: {**tensors, HEAD: tensors[TABLE].clone()}  # noqa: E731
        fp8.change(base, hf_bases.own_head if head == "own" else equal)
    assert hf_bases.loaded(base).config.tie_word_embeddings is tied
    config = read_config(base)
    assert megatron_args(config)["untie_embeddings_and_output_weights"] is not tied
    assert named_shape(str(base)).tied_embeddings is tied


@MALFORMED
def test_an_untied_base_without_a_head_is_refused_with_what_to_do(tmp_path):
    save("qwen3", tmp_path, tied=True)
    fp8.change(tmp_path, tie_word_embeddings=False)
    config = read_config(tmp_path)
    expected = Weights(config, Placement(Shard(), Shard(), Shard())).expected()
    with pytest.raises(ValueError, match=r"missing lm_head\.weight.* set tie_word_embeddings true"):
        HFWeights(tmp_path).check(expected, tied=False)


def test_a_copy_of_the_embedding_is_untied_by_an_adapter_and_leaves_no_empty_file(tmp_path):
    base = tmp_path / "base"
    model = save("qwen3", base, tied=True)
    fp8.change(base, lambda t: {**t, HEAD: t[TABLE].clone()})
    split(base, lambda name: "head" if name == HEAD else "rest")
    factors = random_factors(model, RANKS)
    assert merge_adapter(base, factors, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["rest.safetensors"]
    found = hf_bases.loaded_logits(tmp_path / "out")
    torch.testing.assert_close(found, logits(merged(model, factors)), atol=5e-6, rtol=1e-5)


def test_a_tied_base_with_a_head_alone_is_merged_but_not_untied(tmp_path):
    model = save("qwen3", tmp_path / "base", tied=True)
    fp8.change(tmp_path / "base", lambda t: {HEAD if n == TABLE else n: t[n] for n in t})
    factors = random_factors(model, RANKS)
    with pytest.raises(ValueError, match=r"is tied and has no model\.embed_tokens\.weight"):
        merge_adapter(tmp_path / "base", factors, tmp_path / "out")
    del factors["lm_head"]
    assert not merge_adapter(tmp_path / "base", factors, tmp_path / "out")
    found = hf_bases.loaded_logits(tmp_path / "out")
    torch.testing.assert_close(found, logits(merged(model, factors)), atol=5e-6, rtol=1e-5)


@MALFORMED
def test_an_untied_base_without_an_embedding_is_refused(tmp_path):
    save("qwen3", tmp_path)
    fp8.change(tmp_path, lambda t: {n: tensor for n, tensor in t.items() if n != TABLE})
    weights = Weights(read_config(tmp_path), Placement(Shard(), Shard(), Shard()))
    with pytest.raises(ValueError, match=r"missing model\.embed_tokens\.weight"):
        HFWeights(tmp_path).check(weights.expected(), tied=False)


# === Which files ===


def test_no_weights_from_before_are_copied_beside_merged_ones(tmp_path):
    base = tmp_path / "base"
    model = save("qwen3", base)
    stale = ("model-00001-of-00002.safetensors", "pytorch_model.bin", "x.gguf", "tf_model.h5")
    for name in (*stale, "pytorch_model.bin.index.json", "model.safetensors.index.json", "a.json"):
        (base / name).write_text("{}")
    merge_adapter(base, random_factors(model, RANKS), tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {
        *("model.safetensors", "config.json", "generation_config.json", "a.json", "megalora.json")
    }


def test_a_whole_file_comes_before_an_index(tmp_path):
    base = tmp_path / "base"
    save("qwen3", base, max_shard_size="20KB")
    whole = save("qwen3", tmp_path / "whole")
    fp8.change(tmp_path / "whole", lambda t: {**t, HEAD: -t[HEAD]})
    shutil.copy(tmp_path / "whole" / "model.safetensors", base)
    head = hf_bases.loaded(base).lm_head.weight
    assert torch.equal(head, -whole.lm_head.weight)
    assert torch.equal(HFWeights(base).read(HEAD, 0, 66), head)
    merge_adapter(base, random_factors(whole, RANKS, lm_head=False), tmp_path / "out")
    assert torch.equal(hf_bases.loaded(tmp_path / "out").lm_head.weight, head)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    # Of shards that are not loaded some may be missing.
    next(base.glob("model-*")).unlink()
    assert read_config(base)["vocab_size"] == 66


def test_a_tensor_that_a_shard_holds_and_no_index_names_is_there(tmp_path):
    base = tmp_path / "base"
    model = save("qwen3", base, max_shard_size="20KB")
    index = base / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    del text["weight_map"][HEAD]
    index.write_text(json.dumps(text))
    assert torch.equal(hf_bases.loaded(base).lm_head.weight, model.lm_head.weight)
    factors = random_factors(model, RANKS)
    merge_adapter(base, factors, tmp_path / "out")
    found = hf_bases.loaded_logits(tmp_path / "out")
    torch.testing.assert_close(found, logits(merged(model, factors)), atol=5e-6, rtol=1e-5)


@MALFORMED
@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("pytorch_model.bin", "is a pickle, .*convert it to safetensors, by transformers'"),
        ("pytorch_model.bin.index.json", "is a pickle, .*convert it"),
        ("pytorch_model-00001-of-00002.bin", "is a pickle, .*convert it"),
        ("consolidated.00.pth", "is a pickle, .*convert it"),
        ("model-Q4_K_M.gguf", "is a GGUF file, .*give the safetensors"),
        ("model.fp16.safetensors", r"is a variant, .*rename it to model\.safetensors"),
        ("consolidated.safetensors", r"give the directory with model\.safetensors"),
        ("README.md", r"has neither model\.safetensors nor"),
    ],
)
def test_a_directory_of_another_form_is_refused_with_what_to_do(file, sentence, tmp_path):
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match=f"{file}.*{sentence}|{tmp_path} {sentence}"):
        HFWeights(tmp_path)


# === FP8 with block scales ===


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_fp8_is_read_as_transformers_reads_it(family, scales, tmp_path):
    save(family, tmp_path)
    block = (8, 8)
    quantised = fp8.fp8_config(block, modules_to_not_convert=["lm_head", "mlp.gate"])
    fp8.change(tmp_path, fp8.in_fp8(block, scales), quantization_config=quantised)
    expected = hf_bases.loaded(tmp_path).state_dict()
    files = HFWeights(tmp_path)
    assert files.files.is_scaled("model.layers.0.self_attn.q_proj.weight")
    for name, (rows, *_) in files.shapes.items():
        if ".experts." in name:
            continue
        assert torch.equal(files.read(name, 0, rows), expected[name]), name
    if family == "qwen3_moe":
        gate, up = (
            files.read(f"model.layers.1.mlp.experts.12.{part}_proj.weight", 0, 24)
            for part in ("gate", "up")
        )
        assert torch.equal(
            torch.cat([gate, up]), expected["model.layers.1.mlp.experts.gate_up_proj"][12]
        )


@pytest.mark.parametrize("stack", [(), (3,)], ids=["one", "stacked"])
@pytest.mark.parametrize("block", [(128, 128), (64, 128)], ids=str)
def test_any_slice_of_fp8_is_that_of_the_whole_product(stack, block, tmp_path):
    name = "model.layers.0.mlp.experts.gate_up_proj" if stack else "a.weight"
    generator = torch.Generator().manual_seed(3)
    grid = [-(-size // each) for size, each in zip((200, 300), block, strict=True)]
    codes = torch.randn(*stack, 200, 300, generator=generator).to(fp8.FP8)
    scales = torch.rand(*stack, *grid, generator=generator) + 0.5
    tensors = {name: codes, f"{name}_scale_inv": scales}
    save_file(tensors, tmp_path / "model.safetensors")
    text = json.dumps({"quantization_config": fp8.fp8_config(block)})
    (tmp_path / "config.json").write_text(text)
    pairs = zip(codes.reshape(-1, 200, 300), scales.reshape(-1, *grid), strict=True)
    whole = torch.stack([fp8.scale_grid(*pair, block) for pair in pairs]).view(codes.shape)
    files = PlainFiles(tmp_path)
    assert list(files) == [name]
    assert torch.equal(files.tensor(name), whole)
    first = (slice(1, 2),) if stack else ()
    for rows, columns in [((0, 200), (0, 300)), ((5, 130), (127, 129)), ((128, 200), (256, 300))]:
        index = (*first, slice(*rows), slice(*columns))
        assert torch.equal(files.part(name, index), whole[index]), (rows, columns)
    assert torch.equal(
        files.part(name, (*first, slice(190, 200))), whole[(*first, slice(190, 200))]
    )


def test_of_the_scales_only_those_of_the_slice_are_read(tmp_path, monkeypatch):
    tensors = {"a.weight": torch.ones(512, 512).to(fp8.FP8)}
    tensors["a.weight_scale_inv"] = torch.full((4, 4), float("nan"))
    tensors["a.weight_scale_inv"][1:3, 2] = 2.0
    save_file(tensors, tmp_path / "model.safetensors")
    text = json.dumps({"quantization_config": fp8.fp8_config((128, 128))})
    (tmp_path / "config.json").write_text(text)
    files = PlainFiles(tmp_path)
    read = []
    handle = files._handle("model.safetensors")

    class Watched:
        def get_slice(self, name):
            stored = handle.get_slice(name)

            class Slice:
                get_shape = stored.get_shape

                def __getitem__(self, index):
                    read.append((name, stored[index].numel()))
                    return stored[index]

            return Slice()

    monkeypatch.setitem(files._open, "model.safetensors", Watched())
    part = files.part("a.weight", (slice(200, 300), slice(256, 384)))
    assert torch.equal(part, torch.full((100, 128), 2.0))
    assert read == [("a.weight", 100 * 128), ("a.weight_scale_inv", 2)]


@pytest.mark.parametrize("shards", [1, 3])
def test_merging_into_fp8_writes_bfloat16_and_no_scales(shards, tmp_path):
    base, factors = tmp_path / "base", random_factors(hf_model("qwen3"), RANKS)
    save("qwen3", tmp_path / "plain")
    fp8.change(tmp_path / "plain", fp8.in_fp8(BLOCK), quantization_config=fp8.fp8_config(BLOCK))
    stored = fp8.tensors_of(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", base)
    if shards > 1:
        # Scales are in other files than what they scale.
        split(base, lambda name: f"model-{len(name) % shards}")
    merge_adapter(base, factors, tmp_path / "out")
    plain = fp8.out_of_fp8(BLOCK)(stored)
    expected = {
        name: tensor + factors[module].delta()
        if (module := name[: -len(".weight")]) in factors
        else tensor
        for name, tensor in plain.items()
    }
    expected |= {n: t.bfloat16() for n, t in expected.items() if f"{n}_scale_inv" in stored}
    found: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    assert "quantization_config" not in config_of(tmp_path / "out")
    if shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == expected.keys()
    assert hf_bases.loaded(tmp_path / "out") is not None


def split(directory: Path, file_of: Callable[[str], str]) -> None:
    """Write a directory of one file as several with an index."""
    tensors = fp8.tensors_of(directory)
    (directory / "model.safetensors").unlink()
    place = {name: f"{file_of(name)}.safetensors" for name in sorted(tensors)}
    for file in set(place.values()):
        save_file({n: t for n, t in tensors.items() if place[n] == file}, directory / file)
    text = json.dumps({"metadata": {}, "weight_map": place})
    (directory / "model.safetensors.index.json").write_text(text)


# === Which numbers of config.json ===

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "vocab_size": 66,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
    "rope_theta": 5e5,
}
CLASSES = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "qwen3_moe": transformers.Qwen3MoeConfig,
}
# transformers' attribute -> Megatron's argument.
MEANT = {
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
}


FIELDS = [*MEANT, "tie_word_embeddings", "norm_topk_prob", "rope_theta"]
# Of the others transformers refuses null.
NULLABLE = [
    *((family, "num_key_value_heads") for family in ("llama", "qwen2", "qwen3")),
    *((family, "head_dim") for family in ("llama", "qwen2", "qwen3_moe")),
    *((family, "rope_theta") for family in CLASSES),
]


@pytest.mark.parametrize(
    ("family", "field", "nothing"),
    [(family, field, {}) for family in CLASSES for field in FIELDS]
    + [(family, field, {field: None}) for family, field in NULLABLE],
    ids=str,
)
def test_a_field_without_a_number_means_what_it_means_to_transformers(family, field, nothing):
    given = {**SIZES, "model_type": family}
    del given[field]
    given |= nothing
    theirs = CLASSES[family](**given)
    ours = megatron_args(given)
    for name, argument in MEANT.items():
        meant = getattr(theirs, name, None) or SIZES["hidden_size"] // SIZES["num_attention_heads"]
        assert ours[argument] == meant, name
    assert model_shape(given).tied_embeddings == theirs.tie_word_embeddings
    if family == "qwen3_moe":
        assert ours["moe_router_pre_softmax"] is not theirs.norm_topk_prob
    # Null crashes transformers.
    assert rope(given).theta == (theirs.rope_parameters["rope_theta"] or 10000.0)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 7e5}


@pytest.mark.parametrize("theta", [{}, {"rope_theta": 5e5}], ids=["no theta", "theta"])
@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": PLAIN},
        {"rope_parameters": PLAIN, "rope_scaling": LLAMA3},
        {"rope_parameters": {**PLAIN, **LLAMA3}, "rope_scaling": {"type": "default"}},
        {"rope_parameters": PLAIN, "rope_scaling": None},
        {"rope_parameters": PLAIN, "rope_scaling": {}},
        {"rope_parameters": None, "rope_scaling": {**LLAMA3, "rope_theta": 9e5}},
        {"rope_parameters": {k: v for k, v in LLAMA3.items() if not k.startswith("original")}},
        {"rope_scaling": YARN},
        {"rope_parameters": {**PLAIN, **YARN}},
        # As the cards of Qwen's models say.
        {"rope_scaling": {"type": "yarn", **{k: v for k, v in YARN.items() if k != "rope_type"}}},
    ],
    ids=range(10),
)
def test_the_rotary_embedding_is_that_of_transformers(fields, theta):
    config = {**SIZES, "model_type": "llama", **fields, **theta}
    if not theta:
        del config["rope_theta"]
    theirs = transformers.LlamaConfig(**json.loads(json.dumps(config))).rope_parameters
    ours = rope(config)
    assert ours.theta == theirs["rope_theta"]
    assert ours.factor == (theirs["factor"] if theirs["rope_type"] == "llama3" else 1.0)
    if ours.yarn or theirs["rope_type"] == "yarn":
        name = "original_max_position_embeddings"
        assert ours.yarn == Yarn(factor=theirs["factor"], **{name: theirs[name]})


@NUMBERS
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rope_parameters": PLAIN, "rope_scaling": LONG}, "'longrope' in rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' in rope_scaling"),
        ({"rope_parameters": {"full_attention": PLAIN}}, "rope_parameters has an embedding for"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, "factor of the llama3 rope is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor of .* is None"),
        # transformers takes the length at the top where there is one.
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 4096}, "is 4096: Megatron"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        ({"layer_types": "full_attention"}, "layer_types is"),
    ],
    ids=range(10),
)
def test_another_embedding_or_attention_is_refused_by_name(fields, sentence):
    with pytest.raises(ValueError, match=rf"config\.json {sentence}|config\.json .*{sentence}"):
        megatron_args({**SIZES, "model_type": "qwen3", **fields})


# === Whose vocabulary ===


@NUMBERS
@pytest.mark.parametrize("rows", [60, 72])
def test_an_adapter_of_another_vocabulary_is_refused_by_merge_and_import(rows, tmp_path):
    save("qwen3", tmp_path / "base")
    factors = {"lm_head": LoRAFactors(torch.ones(2, 32), torch.ones(rows, 2), 1.0)}
    sentence = rf"adapter has {rows} rows of lm_head, its base's vocabulary 66: .*resized"
    with pytest.raises(ValueError, match=sentence):
        merge_adapter(tmp_path / "base", factors, tmp_path / "out")
    shape = model_shape(read_config(tmp_path / "base"))
    with pytest.raises(ValueError, match=sentence):
        from_hf(factors, LoRAConfig(rank=2, targets=("unembed",)), shape, padded_vocab_size=128)


@MALFORMED
@pytest.mark.parametrize("name", [TABLE, HEAD])
def test_a_resized_table_is_refused_with_what_to_do(name, tmp_path):
    save("qwen3", tmp_path)
    fp8.change(tmp_path, lambda t: {**t, name: torch.cat([t[name], t[name][:6]])})
    with pytest.raises(ValueError, match=r"66 \(its tensors 72\).*correct vocab_size"):
        read_config(tmp_path)
