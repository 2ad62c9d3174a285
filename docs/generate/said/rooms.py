"""Where messages are met, in a user's words: groups of the page, and the files of each."""

from typing import NamedTuple


class Group(NamedTuple):
    """A part of the page: its title, what it is about, and the files whose messages it has."""

    # Of the file of causes and remedies: flags.toml.
    name: str
    title: str
    about: str
    # By path, or the beginning of paths: where a message from there is met.
    files: dict[str, str]


_FLAGS = Group(
    "flags",
    "Flags of a run",
    "Said at the start of `torchrun ... SCRIPT.py` or `megalora run`, on rank 0, before a step. "
    "`lora_rank` in a sentence is the flag `--lora-rank`, and so with every other name.",
    {
        "megalora/config.py": "the fields of `LoRAConfig`, which are the flags `--lora-*`",
        "megalora/arguments.py": "the flags `--lora-*` of a run",
        "megalora/adapters/kinds.py": "`--lora-kind`",
        "megalora/adapters/pissa.py": "`--lora-init pissa`, when the base's weights are there",
        "megalora/targets.py": "`--lora-targets`, when the model is built",
        "megalora/builder.py": "which linears of the model get adapters, when it is built",
        "megalora/adapters/bases.py": "which linears of the model can have adapters",
        "megalora/training/flags.py": "flags of a run beside each other",
        "megalora/training/trust.py": "flags by which files could run code, and the tokenizer",
        "megalora/training/auto_lr.py": "`--lr auto`",
        "megalora/training/rates.py": "learning rates of lora_A and lora_B",
        "megalora/training/outputs.py": "`--export-hf` and `--save-merged`",
        "megalora/training/session.py": "base and checkpoint of a run against its flags",
        "megalora/training/patches.py": "the end of the training data",
        "megalora/training/not_finite.py": "a loss or a gradient that is not finite, in training",
        "megalora/data/arguments.py": "flags of the data: `--dataset` and its like",
        "megalora/data/build.py": "lengths and splits of the data",
        "megalora/cpu/": "whether a run is meant for the CPU or for GPUs",
        "megalora/mends/": "what this machine's packages can run of the model",
        "megalora/training/needed.py": "what every run needs of its flags",
        "megalora/training/": "flags of a run beside each other",
        "megalora/misspelt.py": "words on a command line that no flag is called",
        "megalora/run.py": "`megalora run SCRIPT.py ...`",
        "megalora/environment/": "`megalora env`",
        "megalora/__main__.py": "the command `megalora`",
        # Where a file has no place of its own here.
        "megalora/": "anywhere in a run or a command",
    },
)
_DATA = Group(
    "data",
    "Data",
    "Said while `--dataset` is read, before training. A sentence about one row begins with its "
    "place: `dataset FILE line 12: ...` or `dataset FILE row 3 (the first is 0): ...`.",
    {
        "megalora/data/batch.py": "the loss of a batch",
        "megalora/data/rows.py": "files, splits and columns of `--dataset`",
        "megalora/data/sources.py": "JSON and JSON lines of `--dataset`",
        "megalora/data/examples.py": "rows of `--dataset` as examples to train on",
        "megalora/data/chats.py": "a chat in a row of `--dataset`",
        "megalora/data/chat_template.py": "the tokenizer's chat template on a row",
        "megalora/data/template_limits.py": "the tokenizer's chat template on a row",
        "megalora/data/tokenizers.py": "the tokenizer",
        "megalora/data/pairs.py": "a pair of answers of `examples/dpo_lora.py`",
        "megalora/data/preferences.py": "pairs of answers of `examples/dpo_lora.py`",
        "megalora/data/prompts.py": "prompts of `examples/rl_lora.py`",
        "megalora/data/corpus.py": "`--dataset stdlib-text` and `stdlib-docstrings`",
        "megalora/data/indexed.py": "Megatron's own data sets (`--data-path`)",
    },
)
_CHECKPOINTS = Group(
    "checkpoints",
    "Checkpoints and resuming",
    "Said when `--load`, `--pretrained-checkpoint` or `--lora-load` is read, when `--save` is "
    "written, and by `megalora export` and `inspect` of a checkpoint.",
    {
        "megalora/checkpoint/lock.py": "one run at a time in `--save`",
        "megalora/checkpoint/find.py": "the checkpoint to go on from",
        "megalora/checkpoint/layout.py": "files and checksums of a checkpoint",
        "megalora/checkpoint/base.py": "`--pretrained-checkpoint`, and whether it is the same base",
        "megalora/checkpoint/description.py": "what a checkpoint says of its adapters",
        "megalora/checkpoint/read.py": "a checkpoint of adapters, read without a model",
        "megalora/checkpoint/loading.py": "files of a checkpoint",
        "megalora/checkpoint/unpickle.py": "pickles in a checkpoint, none of which may run code",
        "megalora/checkpoint/gather.py": "adapters put into a model",
        "megalora/adapters/factors.py": "adapters put into a model",
        "megalora/checkpoint/state.py": "a checkpoint that a model loads",
        "megalora/checkpoint/schedule.py": "the schedule of a resumed run",
        "megalora/checkpoint/": "a checkpoint that is saved",
    },
)
_FILES = Group(
    "files",
    "Files from elsewhere",
    "Said of any file that megalora did not write itself: `config.json`, safetensors, JSON.",
    {
        "megalora/reading.py": "a file that is read, or the JSON in it",
        "megalora/hf/copies.py": "files that are copied beside the weights",
        "megalora/hf/directories.py": "a directory to write (`--output`, `--export-hf`)",
        "megalora/hf/written.py": "a directory to write, with `--overwrite`",
    },
)
_BASES = Group(
    "models",
    "Hugging Face directories: models",
    "Said of the directory in `--hf-model`, `megalora import-base`, `flags`, `merge` and "
    "`recommend --model`.",
    {
        "megalora/model/arguments.py": "sizes of the model in Megatron's flags",
        "megalora/model/presets.py": "`megalora recommend --model`",
        "megalora/model/hybrid.py": "layers of a hybrid model",
        "megalora/model/shape.py": "sizes of the model",
        "megalora/model/not_yet.py": "families that are not exchanged with Hugging Face",
        "megalora/model/stored.py": "the safetensors files of a model",
        "megalora/model/loaded.py": "the safetensors files of a model, and quantised ones",
        "megalora/model/mxfp4.py": "gpt-oss' experts in MXFP4",
        "megalora/model/": "`config.json` of the model",
        "megalora/hf/base.py": "weights loaded into the model",
        "megalora/hf/base_out.py": "a base that is written for Hugging Face",
        "megalora/hf/block_scaled.py": "quantised weights of a model",
        "megalora/hf/built.py": "the model that a script built, against `config.json`",
        "megalora/hf/cuts.py": "how tensors are cut over ranks",
        "megalora/hf/rotary.py": "`save_hf_base` from Python",
        "megalora/hf/safetensors_files.py": "sizes of a model's tensors",
        "megalora/hf/stacked_weights.py": "experts stored in one tensor",
        "megalora/hf/weights.py": "the model that was built, against `config.json`",
        "megalora/hf/one_process.py": "`megalora import-base` and `export`",
    },
)
_ADAPTERS = Group(
    "adapters",
    "Adapters of others",
    "Said of a PEFT directory in `--lora-load`, `megalora import`, `merge`, `check` and `inspect`.",
    {
        "megalora/hf/foreign.py": "a directory or a file that is given as an adapter",
        "megalora/hf/adapters_in.py": "an adapter against the model",
        "megalora/hf/misfits.py": "an adapter against the model",
        "megalora/hf/joined.py": "an adapter against the model",
        "megalora/hf/wide_parts.py": "an adapter against the model",
        "megalora/hf/offline.py": "an adapter against the model",
        "megalora/hf/head_rows.py": "an adapter of the unembedding",
        "megalora/hf/factors.py": "factors of an adapter",
        "megalora/hf/merge.py": "`megalora merge`",
        "megalora/hf/patterns.py": "patterns in `adapter_config.json`",
        "megalora/hf/peft_config.py": "`adapter_config.json`",
        "megalora/hf/peft_fields.py": "`adapter_config.json`",
        "megalora/hf/peft_targets.py": "`adapter_config.json`",
        "megalora/hf/peft_keys.py": "keys of `adapter_model.safetensors`",
        "megalora/hf/peft_experts": "adapters of experts",
        "megalora/hf/stacked_experts.py": "adapters of experts in one tensor",
        "megalora/hf/whole_layers.py": "layers that were trained whole beside the factors",
        "megalora/hf/exchange.py": "`--lora-load`",
    },
)
_EXPORT = Group(
    "export",
    "Export, and servers",
    "Said by `megalora export`, `check` and `inspect`, and at the start of a run with "
    "`--export-hf` for what its end could not write.",
    {
        "megalora/hf/adapters.py": "adapters in Hugging Face's form",
        "megalora/hf/commands.py": "`megalora export` and `import`",
        "megalora/hf/inspect.py": "`megalora inspect`",
        "megalora/hf/picture.py": "`megalora inspect --plot`",
        "megalora/hf/linears.py": "which linears Hugging Face's models have",
        "megalora/hf/peft.py": "`--format` and `--export-format`",
        "megalora/hf/uniform.py": "`--export-format uniform`",
        "megalora/hf/servers/__init__.py": "`--export-for`, `--for` and `--export-format`",
        "megalora/hf/servers/outline.py": "the adapter that a server is to read",
        "megalora/hf/servers/peft.py": "`--export-for peft`",
        "megalora/hf/servers/sglang.py": "`--export-for sglang`",
        "megalora/hf/servers/tinker.py": "`--export-for tinker`",
        "megalora/hf/servers/verdict.py": "`--export-for`",
        "megalora/hf/servers/vllm.py": "`--export-for vllm`",
        "examples/verify_export.py": "`examples/verify_export.py`",
        "megalora/adapters/merge.py": "`--save-merged`, and `merge` from Python",
    },
)
_RECOMMEND = Group(
    "recommend",
    "Recommend",
    "Said by `megalora recommend`.",
    {"megalora/recommend/": "`megalora recommend`, and `--lr auto`"},
)
_PLAN = Group(
    "plan",
    "Plan",
    "Said by `megalora plan`; what its script and flags meet is said as in a run.",
    {"megalora/plan/": "`megalora plan`"},
)
_RL = Group(
    "rl",
    "Reinforcement learning, preferences and rollout servers",
    "Said by `examples/rl_lora.py` and `examples/dpo_lora.py`, and from Python by "
    "`megalora.rollouts`, `megalora.sync`, `megalora.policy` and `megalora.losses`.",
    {
        "examples/rl_lora.py": "flags of `examples/rl_lora.py`",
        "examples/dpo_lora.py": "flags of `examples/dpo_lora.py`",
        "megalora/rollouts/arguments.py": "flags of `examples/rl_lora.py`",
        "megalora/rollouts/advice.py": "flags of `examples/rl_lora.py`",
        "megalora/rollouts/supported.py": "`--rollout megatron`",
        "megalora/rollouts/megatron.py": "`--rollout megatron`",
        "megalora/rollouts/rewards.py": "`--reward`",
        "megalora/rollouts/sglang.py": "`--rollout sglang`",
        "megalora/rollouts/vllm.py": "`--rollout vllm`",
        "megalora/rollouts/": "answers of a rollout",
        "megalora/sync/http.py": "a server of rollouts, over HTTP",
        "megalora/sync/": "adapters handed to a server",
        "megalora/policy/": "a step on answers (`megalora.policy`)",
        "megalora/losses.py": "`megalora.losses`",
    },
)
_RANKS = Group(
    "ranks",
    "Ranks that disagree or fail",
    "Said once for a run, by rank 0 or by the rank that met it, on standard error.",
    {
        "megalora/training/agree.py": "what must be equal on all ranks",
        "megalora/training/compared.py": "what must be equal on all ranks",
        "megalora/training/replicas.py": "the base on ranks that hold the same part of it",
        "megalora/training/alarm.py": "a rank that fails, and those that hear of it",
    },
)
_BUILD = Group(
    "build",
    "Building and installing",
    "Said by `pip install` and at the first import of what was built.",
    {
        "setup.py": "`pip install`, which builds csrc",
        "megalora/ops/fused.py": "the first use of the compiled ops",
        "megalora/built.py": "the first use of the compiled ops",
        "megalora/installed.py": "a command that needs Megatron",
        "megalora/replace.py": "an import of megalora beside another version of Megatron",
        "examples/demo.py": "`make demo`",
        "examples/launching.py": "`make demo`, `make real`",
        "examples/finetune_smollm2.py": "`make real`",
        "examples/smollm2.py": "`make real`",
        "examples/side_by_side.py": "`make real`",
        "csrc/cuda/": "CUDA ops, at their first call",
    },
)
_PYTHON = Group(
    "python",
    "Python API and ops",
    "Said to code that calls `megalora` or `torch.ops.megalora` itself.",
    {
        "megalora/adapters/adapter.py": "`apply_lora`",
        "megalora/ops/": "`--lora-ops`, `MEGALORA_OPS`, and the ops in plain torch",
        "csrc/": "an argument of an op of `torch.ops.megalora`",
    },
)
GROUPS = (
    *(_FLAGS, _DATA, _CHECKPOINTS, _FILES, _BASES, _ADAPTERS, _EXPORT, _RECOMMEND, _PLAN, _RL),
    *(_RANKS, _BUILD, _PYTHON),
)


def room_of(path: str) -> tuple[Group, str] | None:
    """Return the group of a file, and where its messages are met; the longest path decides."""
    found = [
        (start, group, met)
        for group in GROUPS
        for start, met in group.files.items()
        if path.startswith(start)
    ]
    if not found:
        return None
    _, group, met = max(found, key=lambda each: len(each[0]))
    return group, met
