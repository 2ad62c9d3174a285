"""What is no message: rules, each with its reason, that account for the rest of the source."""

# Errors that carry no sentence to a user, by the name in the source.
PROTOCOL = {
    "IndexError": "Python's protocol: a sequence ends, and `for` stops there",
    "AttributeError": "Python's protocol: a module has no such name",
    "NotImplementedError": "a method that its subclasses have, never called itself",
    "FileNotFoundError": "the operating system's own words, which the command says with the path",
    "OSError": "the operating system's own words, which the command says with the path",
    "Stop": "ends a plan where training would start, and is caught there",
    "Stopped": "a signal that a command ends by: it says `error: stopped by`",
    "FailedError": "brings what a rank of a plan said, which the command says",
    "TimeoutError": "caught where the request says how long it waited",
    "CheckpointException": "brings what a rank met, which is said where it is caught",
}

# A `raise` that says what another function found: those sentences are found where they are made.
FORWARDS = {
    "megalora/adapters/finite.py:refuse": "its callers make the sentence, around names of tensors",
    "megalora/checkpoint/ranks.py:on_all_ranks": "the first problem that a rank has met",
    "megalora/cpu/__init__.py:install_if_wanted": "`cpu/signs.py` makes it",
    "megalora/hf/foreign.py:refuse_foreign": "what a file or a directory is, from tables",
    "megalora/launch.py:clear_errors": "an exit code: the sentence was said before",
    "megalora/model/config_json.py:mapped_family": "`mapping_problem` makes it",
    "megalora/model/config_json.py:model_shape": "says `config.json` before what it caught",
    "megalora/model/stored.py:TensorFiles._locate": "what a file is, from the table above it",
    "megalora/sync/http.py:Http._request": "`_failure` makes it",
    "megalora/training/session.py:check_ops": "what the first use of the compiled ops would say",
    "megalora/training/flags.py:refuse": "the check that is handed to it makes it",
}

# What stands before the sentences of a table or a function, where they are raised.
BEGINNINGS = {
    "megalora/hf/foreign.py:_MARKS": "{path} ",
    "megalora/hf/foreign.py:_of_file": "{path} ",
    "megalora/hf/foreign.py:_of_directory": "{path} ",
    "megalora/hf/foreign.py:_of_adapter": "{path} ",
    "megalora/model/stored.py:_PICKLE": "{found} ",
    "megalora/model/stored.py:_OTHER_FORMS": "{found} ",
}

# Texts that are no messages, by folder, file, function or constant.
HELP = "--help says it"
REPORT = "a line of a report or of progress, with nothing to mend"
WORKS = "names and sources of the code itself, which are not printed"
WHY = "why something of Megatron is replaced: docs/patches.md has them"
NOT_MESSAGES = {
    "examples/demo.py": REPORT,
    "examples/finetune_smollm2.py:fine_tune": REPORT,
    "examples/launching.py:shorten": REPORT,
    "examples/finetune_smollm2.py:table": REPORT,
    "examples/finetune_smollm2.py:draw": REPORT,
    "examples/dpo_lora.py:train": REPORT,
    "examples/verify_export.py": WORKS,
    "megalora/__init__.py:__getattr__": "Python's own words for a name that a module has not",
    "megalora/adapters/bases.py:Style": WORKS,
    "megalora/adapters/factors.py:Axis": WORKS,
    "megalora/adapters/factors.py:Sharding.stored.build": "an invariant of ours (assert)",
    "megalora/adapters/routes.py": WORKS,
    "megalora/cpu/async_save.py": WHY,
    "megalora/cpu/gloo.py": WHY,
    "megalora/cpu/kernels.py": WHY,
    "megalora/cpu/megatron_devices.py": WHY,
    "megalora/data/build.py:describe": REPORT,
    "megalora/data/preferences.py:_describe": REPORT,
    "megalora/hf/check.py:check": REPORT,
    "megalora/hf/cli.py": HELP,
    "megalora/hf/commands.py:import_base": REPORT,
    "megalora/hf/commands.py:_say_done": REPORT,
    "megalora/hf/commands.py:merge": REPORT,
    "megalora/hf/files.py:save_stream": "an invariant of ours (assert)",
    "megalora/hf/run_flags.py": REPORT,
    "megalora/hf/servers/__init__.py:describe": REPORT,
    "megalora/hf/servers/verdict.py:convert": "the end of sentences about servers, which have it",
    "megalora/mends/dataset_helpers.py:patches": WHY,
    "megalora/mends/delta_net.py": WHY,
    "megalora/mends/latent_attention.py:_LOST": WHY,
    "megalora/mends/optimizer.py:_WHY": WHY,
    "megalora/plan/cli.py": HELP,
    "megalora/plan/engine/": WORKS,
    "megalora/plan/facts.py": REPORT,
    "megalora/plan/fit.py": REPORT,
    "megalora/plan/flags.py": "what a plan says that it does otherwise than a run, in its report",
    "megalora/plan/ranks.py": REPORT,
    "megalora/plan/report.py": REPORT,
    "megalora/plan/script.py": WORKS,
    "megalora/plan/untouched.py": "why a plan leaves something of Megatron undone, and notes on it",
    "megalora/plan/world.py": WORKS,
    "megalora/model/served.py": "classes of models that servers know",
    "megalora/recommend/cli.py:_add_run": HELP,
    "megalora/recommend/cli.py:_add_model": HELP,
    "megalora/recommend/cli.py:_add_adapter": HELP,
    "megalora/recommend/output.py": REPORT,
    "megalora/recommend/rules.py:data_bits": REPORT,
    "megalora/environment/packages.py": REPORT,
    "megalora/environment/report.py:as_text": REPORT,
    "megalora/quiet.py": "warnings of others that mean nothing, and why they are not shown",
    "megalora/rollouts/arguments.py:_add_updates": HELP,
    "megalora/training/parsing.py:add_arguments": HELP,
    "megalora/training/rates.py:factor_overrides": WORKS,
    "megalora/training/fingerprints.py": "what ranks compare: shown in `ranks disagree`",
    "megalora/hf/inspect.py:AdapterReport.said_of_b": REPORT,
    "megalora/hf/picture.py:PANELS": WORKS,
    "megalora/hf/picture.py:figure_of": WORKS,
    "megalora/hf/picture.py:_title": REPORT,
    "megalora/training/inside.py:Inside.log": REPORT,
    "megalora/training/inside.py:_in_short": REPORT,
}

# Calls whose texts are no messages.
NOT_MESSAGES_IN = {
    "Patch": WHY,
    "Progress": REPORT,
    "add_argument_group": HELP,
    "setup": "what the package says of itself",
    "compile": WORKS,
}
