"""What servers take of which model: one table, by transformers' class, which they choose theirs by.

Read in the wheels of vLLM 0.33.0, SGLang 0.5.23 and PEFT 0.21.2 with transformers 5.24 on
2026-11-27. What a class of vLLM declares is held against this table by tests/test_vllm_reader.py,
where the wheel is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalora.model.families import FAMILIES
from megalora.model.family import DEFAULT_NAMES, Names


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Their classes declare `embedding_modules`, which adapters of lm_head and embed_tokens need.
_VLLM_WITH_UNEMBEDDING = _names("""
    ApertusForCausalLM Cohere2ForCausalLM CohereForCausalLM DeciLMForCausalLM Ernie4_5ForCausalLM
    Exaone4ForCausalLM ExaoneForCausalLM ExaoneMoEForCausalLM ExaoneMoeForCausalLM
    FalconH1ForCausalLM GraniteForCausalLM GraniteMoeForCausalLM GraniteMoeHybridForCausalLM
    GraniteMoeSharedForCausalLM HyperCLOVAXForCausalLM InternLM3ForCausalLM JambaForCausalLM
    Lfm2ForCausalLM Lfm2MoeForCausalLM Llama4ForCausalLM LlamaForCausalLM MiniCPM3ForCausalLM
    MiniCPMForCausalLM MixtralForCausalLM NemotronForCausalLM NemotronHForCausalLM
    NemotronHPuzzleForCausalLM Phi3ForCausalLM PhiMoEForCausalLM Qwen3ForCausalLM
    Qwen3MoeForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM SolarForCausalLM
    TeleChat2ForCausalLM TeleFLMForCausalLM
    Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration
    Qwen3_5ForConditionalGeneration Qwen3_5MoeForConditionalGeneration
""")
_VLLM_WITHOUT_UNEMBEDDING = _names("""
    AfmoeForCausalLM BailingMoeForCausalLM BailingMoeV2ForCausalLM DeepseekForCausalLM
    DeepseekV2ForCausalLM DeepseekV3ForCausalLM Ernie4_5_MoeForCausalLM Gemma2ForCausalLM
    Gemma3ForCausalLM Gemma4ForCausalLM GemmaForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM
    Glm4MoeLiteForCausalLM GlmMoeDsaForCausalLM GptOssForCausalLM HYV3ForCausalLM
    InternLM2ForCausalLM LongcatFlashForCausalLM MiMoForCausalLM MiniMaxM2ForCausalLM
    Ministral3ForCausalLM MistralForCausalLM OPTForCausalLM OlmoHybridForCausalLM OlmoeForCausalLM
    Plamo3ForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3NextForCausalLM
    Mistral3ForConditionalGeneration Qwen2_5_VLForConditionalGeneration
""")
# Their classes are no `SupportsLoRA`.
_VLLM_WITHOUT_LORA = _names("""
    BloomForCausalLM Cohere2MoeForCausalLM DbrxForCausalLM FalconForCausalLM FalconMambaForCausalLM
    GPT2LMHeadModel GPTJForCausalLM Gemma3nForCausalLM Mamba2ForCausalLM MambaForCausalLM
    MiMoV2FlashForCausalLM OrionForCausalLM StableLmForCausalLM Step3TextForCausalLM
    Zamba2ForCausalLM
""")
# Their classes set `is_3d_moe_weight`: adapters of a layer's experts in one tensor.
_VLLM_EXPERTS_IN_ONE = _names("""
    GptOssForCausalLM Qwen3VLMoeForConditionalGeneration Qwen3_5MoeForConditionalGeneration
""")
# Their experts have no gate.
_VLLM_WITHOUT_GATE = _names("NemotronHForCausalLM NemotronHPuzzleForCausalLM")
# Of these PEFT turns keys of single experts into its own, and the names of their projections in
# target_modules; of Qwen2-MoE the keys alone; of the last ones it loads none, or raises.
_PEFT_SINGLE_EXPERTS = _names("""
    DeepseekV3ForCausalLM Ernie4_5_MoeForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM
    GlmMoeDsaForCausalLM MiniMaxM2ForCausalLM MixtralForCausalLM Qwen3MoeForCausalLM
    Qwen3NextForCausalLM
""")
_PEFT_EXPERTS_BY_PARAMETERS = _names("Qwen2MoeForCausalLM")
_PEFT_EXPERTS_IN_ONE = _names("""
    Gemma4ForCausalLM GptOssForCausalLM NemotronHForCausalLM Qwen3_5MoeForCausalLM
    Qwen3_5MoeForConditionalGeneration
""")
# Of these it refuses adapters of out_proj.
_PEFT_WITHOUT_OUT_PROJ = _names("NemotronHForCausalLM FalconH1ForCausalLM")
# Of SGLang's classes, one that leaves the sizes of gated attention and delta nets to a default, and
# those that say how large their shared expert is.
_SGLANG_WITHOUT_ATTENTION = _names("Qwen3NextForCausalLM")
_SGLANG_WITH_SHARED_EXPERT = _names("Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration")
_SIZES = ("intermediate_size", "shared_expert_intermediate_size")
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What a server finds of a base; an empty architecture, and 0, where it is not known.

    vocab_size: rows of the unembedding. num_experts: routed ones of a layer. intermediate_size: of
    a dense MLP. shared_expert_intermediate_size: of the expert that Qwen2-MoE's tokens share.
    """

    architecture: str = ""
    vocab_size: int = 0
    num_experts: int = 0
    intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "ServedModel":
        """Take them from config.json, of whatever family."""
        named = config.get("architectures")
        family = FAMILIES.get(str(config.get("model_type")))
        known = family.architecture if family else ""
        first = named[0] if isinstance(named, list) and named else known
        text = config.get("text_config")
        text = {**config, **text} if isinstance(text, dict) else config
        return cls(
            architecture=first if isinstance(first, str) else known,
            vocab_size=_count(text, ("vocab_size",)),
            num_experts=_count(text, _NUM_EXPERTS),
            **{name: _count(text, (name,)) for name in _SIZES},
        )

    @property
    def vllm_lora(self) -> bool | None:
        """Say whether vLLM has LoRA for it; None where the table does not say."""
        if self.architecture in _VLLM_WITHOUT_LORA:
            return False
        return True if self.vllm_unembedding is not None else None

    @property
    def vllm_unembedding(self) -> bool | None:
        """Say whether vLLM takes adapters of lm_head; None where the table does not say."""
        if self.architecture in _VLLM_WITH_UNEMBEDDING:
            return True
        return False if self.architecture in _VLLM_WITHOUT_UNEMBEDDING else None

    @property
    def vllm_experts_in_one(self) -> bool:
        """Say whether vLLM reads a layer's experts from one tensor."""
        return self.architecture in _VLLM_EXPERTS_IN_ONE

    @property
    def vllm_gated_experts(self) -> bool:
        """Say whether vLLM stacks gate, up and down of each expert, not up and down alone."""
        return self.architecture not in _VLLM_WITHOUT_GATE

    @property
    def sglang_sizes_attention(self) -> bool:
        """Say whether SGLang knows how large what attends is."""
        return self.architecture not in _SGLANG_WITHOUT_ATTENTION

    @property
    def sglang_sizes_shared_experts(self) -> bool:
        """Say whether SGLang knows how large a shared expert is, not a dense MLP alone."""
        return self.architecture in _SGLANG_WITH_SHARED_EXPERT

    @property
    def peft_experts_in_one(self) -> bool | None:
        """Say whether PEFT needs a layer's experts in one tensor; None where it is not known."""
        if self.architecture in _PEFT_EXPERTS_IN_ONE:
            return True
        single = _PEFT_SINGLE_EXPERTS | _PEFT_EXPERTS_BY_PARAMETERS
        return False if self.architecture in single else None

    @property
    def peft_renames_targets(self) -> bool:
        """Say whether PEFT takes the names of an expert's projections for those of all experts."""
        return self.architecture in _PEFT_SINGLE_EXPERTS

    @property
    def peft_refuses_out_proj(self) -> bool:
        """Say whether PEFT refuses adapters of the linear out of a layer of Mamba-2."""
        return self.architecture in _PEFT_WITHOUT_OUT_PROJ

    @property
    def names(self) -> Names:
        """Return what files call its modules, those of most families where it is not known."""
        rows = (f.names for f in FAMILIES.values() if f.architecture == self.architecture)
        return next(filter(None, rows), DEFAULT_NAMES)


def architectures_in_vllm() -> frozenset[str]:
    """Return the classes of which the table says something of vLLM."""
    known = _VLLM_WITH_UNEMBEDDING | _VLLM_WITHOUT_UNEMBEDDING
    return known | _VLLM_WITHOUT_LORA | _VLLM_EXPERTS_IN_ONE


def _count(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    values = (config.get(name) for name in names)
    whole = (value for value in values if isinstance(value, int) and not isinstance(value, bool))
    return next(whole, 0)
