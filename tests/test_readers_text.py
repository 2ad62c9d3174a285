"""What strangers wrote is matched in bounded time, and shown in one line."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from megalora.checkpoint.description import parse_description
from megalora.data.examples import read_rows
from megalora.data.rows import load_rows, schema_of
from megalora.hf.patterns import Patterns, matches
from megalora.launch import clear_errors
from megalora.printable import printable
from tests.support.fuzzing import command, is_printable
from tests.support.honest import FACTORS, LLAMA, write_base, write_peft
from tests.support.soon import soon

MALFORMED = pytest.mark.bad_input("a malformed file")
UNBOUNDED = pytest.mark.bad_input("work without bound")
NAMES = [*FACTORS, "model.layers.10.self_attn.q_proj", "q_proj", "a" * 200]


def adapter_with(place: Path, **fields: object) -> Path:
    """Write an adapter whose configuration has other fields."""
    adapter = write_peft(place / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return adapter


# === Patterns ===


@UNBOUNDED
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+!",
        "(.*)*x!",
        "(a|a)*!",
        "(a|aa)+!",
        "(.*a){20}!",
        "(x+x+)+y",
        r"(\w+\.?)*!",
        "a?" * 900,
    ],
)
def test_patterns_that_backtrack_for_ever_are_matched_soon(
    tmp_path: Path, pattern: str, field: str
) -> None:
    adapter = adapter_with(tmp_path, **{field: {pattern: 2}})
    name = "a" * 400
    values = {f"base_model.model.{name}.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(values, adapter / "adapter_model.safetensors")
    with soon():
        command("inspect", adapter)


@UNBOUNDED
@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "layers_pattern"])
def test_other_patterns_are_not_matched_at_all(tmp_path: Path, name: str) -> None:
    adapter = adapter_with(tmp_path, **{name: "(a+)+!"})
    with soon():
        command("inspect", adapter)


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r"self_attn\.q_proj",
        "self_attn.q_proj",
        "self_attn_q_proj",
        "attn.q_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.q_pro.",
        r"model\.layers\.\d+\.self_attn\.(q_proj|k_proj)",
        r"^model\.layers\.(0|1)\..*",
        "^q_proj",
        "q_proj$",
        ".*",
        ".",
        "",
        "..h..d",
        r".*\.mlp\..*",
        "[qk]_proj",
        "(?i:Q_PROJ)",
        "q_proj|lm_head",
        "layers.1?0.self_attn.q_proj",
        "a{200}",
        "a{100,}",
        r"lm\_head",
        "(?P<x>lm)_head",
    ],
)
def test_a_pattern_means_what_it_means_to_peft(pattern: str) -> None:
    # And beside others, of which the first decides.
    others = {"lm_head": 1, pattern: 2, "self.attn.q_proj": 3, "model.*": 4}
    patterns = Patterns("rank_pattern", others)
    for name in NAMES:
        assert matches(pattern, name) == bool(re.match(rf"(.*\.)?({pattern})$", name)), name
        assert patterns.first(name, 9) == others.get(get_pattern_key(others, name), 9), name


@MALFORMED
@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("(", "is no pattern"),
        ("[", "is no pattern"),
        ("*", "is no pattern"),
        ("(?i)q", "is no pattern"),
        ("[[:alpha:]]", "is no pattern"),
        ("(?=q)q_proj", "write it as names"),
        ("(?<!k)q_proj", "write it as names"),
        (r"(q)\1", "write it as names"),
        ("a{,3}", "write it as names"),
        ("a{1001}", "write it as names"),
        ("(" * 500 + ")" * 500, "adapter_config rank_pattern"),
        ("(a|b)" * 500, "has 2,500 characters"),
    ],
)
def test_a_pattern_that_is_none_or_has_no_bound_is_refused(
    tmp_path: Path, pattern: str, sentence: str
) -> None:
    adapter = adapter_with(tmp_path, rank_pattern={pattern: 2})
    with pytest.raises(ValueError, match="adapter_config rank_pattern") as caught:
        command("inspect", adapter)
    assert sentence in str(caught.value)


@UNBOUNDED
def test_a_name_for_each_of_very_many_modules_is_looked_up() -> None:
    names = [f"model.layers.{n}.mlp.experts.{e}.up_proj" for n in range(100) for e in range(200)]
    values = {re.escape(name): number for number, name in enumerate(names)}
    with soon():
        patterns = Patterns("rank_pattern", values)
        assert [patterns.first(name, -1) for name in names] == list(range(len(names)))


@UNBOUNDED
@pytest.mark.parametrize("form", ["[a]{}", "{}.{}"])
def test_too_many_patterns_that_are_no_names_are_refused(form: str) -> None:
    values = {form.format("x" * n, n) if n else "y": 1 for n in range(1002)}
    with pytest.raises(ValueError, match="more than 1,000 patterns"):
        Patterns("rank_pattern", values)


@MALFORMED
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("target_parameters", value) for value in (1, "mlp", [1], {"a": 1})),
        *((name, value) for name in ("rank_pattern", "alpha_pattern") for value in ([1], "q", 1)),
        *(("peft_type", value) for value in ([], {}, 1, None)),
    ],
)
def test_a_field_of_a_wrong_type_is_refused_by_name(
    tmp_path: Path, field: str, value: object
) -> None:
    with pytest.raises(ValueError, match=f"adapter_config {field} is"):
        command("inspect", adapter_with(tmp_path, **{field: value}))


# === What is shown ===

UGLY = "a\x1b[31m\r\nerror: all is well\u202egnp\x00\x7f\x9b\u2028\ud800"
ESCAPED = (
    r"a\x1b[31m\r\nerror: all is well\u202egnp\x00\x7f\x9b\u2028\ud800"  # one line, no direction
)


@MALFORMED
def test_what_cannot_be_seen_is_escaped() -> None:
    assert printable(UGLY) == ESCAPED


@pytest.mark.parametrize(
    "text", ["", "plain", "é ñ 你好 😀 Ελλ\u200cά", "👩\u200d🔬", "a\u3000b\u00a0c", "ﷺ"]
)
def test_ordinary_text_stays(text: str) -> None:
    assert printable(text) == text


@MALFORMED
def test_a_long_text_keeps_its_start_and_its_end() -> None:
    shown = printable("start" + "x" * 10**6 + "end")
    assert len(shown) < 2000
    assert (shown[:6], shown[-4:]) == ("startx", "xend")


def names_in(place: Path) -> list[list[object]]:
    """Return commands that show a stranger's strings in what they refuse or print."""
    tensors = adapter_with(place / "1")
    pair = {f"{UGLY[:-1]}.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    file = tensors / "adapter_model.safetensors"
    save_file({**load_file(file), **pair}, file)
    base = write_base(place / "2" / "base", LLAMA)
    (base / "config.json").write_text(json.dumps({**LLAMA, "model_type": UGLY[:-1]}))
    field = adapter_with(place / "3", **{UGLY[:-1]: 1, "base_model_name_or_path": UGLY[:-1]})
    index = write_base(place / "4", LLAMA, shards=2)
    file = index / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {UGLY[:-1]: "model-00001-of-00002.safetensors"}}))
    named = write_base(place / UGLY[:9], LLAMA)
    return [
        ["inspect", tensors],
        ["flags", "--hf-model", base],
        ["inspect", field],
        ["flags", "--hf-model", index],
        ["recommend", "--model", named, "--rank", 2],
        ["flags", "--hf-model", place / UGLY[:-12]],
    ]


@MALFORMED
@pytest.mark.parametrize("number", range(6))
def test_no_command_shows_a_strangers_control_characters(tmp_path: Path, number: int) -> None:
    try:
        said = command(*names_in(tmp_path)[number])
    except ValueError as error:
        said = str(error)
    assert "\\x1b" in said or "\\n" in said, said
    assert all(is_printable(line) for line in said.splitlines())


@MALFORMED
def test_json_stays_json(tmp_path: Path) -> None:
    adapter = adapter_with(tmp_path, base_model_name_or_path=UGLY[:-1])
    found = json.loads(command("inspect", adapter, "--json"))
    assert found["base_model"] == UGLY[:-1]


@MALFORMED
def test_the_last_line_of_a_run_is_one_line(monkeypatch) -> None:
    monkeypatch.delenv("MEGALORA_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stopped, clear_errors():
        raise ValueError(UGLY)
    assert stopped.value.code == f"error: {ESCAPED}"


# === Rows and descriptions ===

ROWS = [
    '{"messages": ' + value + "}"
    for value in (
        *("[]", "{}", "1", '"["', '"' + "[" * 5000 + '"', "[1]", "[[]]", "[null]", '"[1"', "[{}]"),
        *('[{"role": []}]', '[{"role": null}]', '[{"from": [], "value": "x"}]', '[{"from": {}}]'),
        *('[{"role": "user", "content": 1}]', '[{"role": "user", "content": [1]}]'),
        '[{"role": "user", "content": "a", "weight": "x"}]',
        *('[{"role": "user", "content": "a", "tool_calls": 1}]',),
        '[{"role": "assistant", "tool_calls": [1]}]',
        '[{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}]',
        '[{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]',
        '[{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "' + "9" * 5000 + '"}]}]',
        '[{"role": "user", "content": "a", "tools": "x"}]',
    )
]
ROWS += [
    *("{", "[]x", "null", "1", '{"a": 1}', '{"text": "a", "text": "b"}', '{"text": "\\ud800"}'),
    *('{"text": NaN}', '{"text": null}', '{"text": 1}', '{"text": ' + "[" * 5000),
    '{"messages": [{"role": "user", "content": "a"}], "tools": [1]}',
    '{"messages": [{"role": "user", "content": "a"}], "documents": "{}"}',
    '{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": "1"}',
    '{"messages": [{"role": "user", "content": "a"}], "system": 1}',
    *('{"prompt": 1, "completion": "a"}', '{"prompt": [], "completion": []}'),
    '{"query": "a", "answers": "[[1]]", "tools": "[]"}',
]


def read_all(file: str) -> None:
    rows = load_rows(file)
    for _ in read_rows(rows, schema_of(rows, file)):
        pass


@MALFORMED
@pytest.mark.parametrize("row", ROWS)
def test_a_row_that_is_none_is_refused_with_its_place(tmp_path: Path, row: str) -> None:
    (tmp_path / "data.jsonl").write_text(row + "\n")
    file = str(tmp_path / "data.jsonl")
    with soon(), pytest.raises(ValueError, match=r"dataset .*data\.jsonl") as caught:
        read_all(file)
    assert type(caught.value) is ValueError


CONFIG = {"config": {"rank": 2}}
FACTS = {
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 2,
    "gated_linear_unit": True,
}


def test_a_description_is_read_as_it_was_written() -> None:
    weights = {"dtypes": ["float32"], "weights": {"a": [1, 0.5, 2]}}
    whole = {**CONFIG, "model": FACTS, "base": weights}
    assert parse_description(json.dumps(whole)) == whole


@MALFORMED
@pytest.mark.parametrize(
    "description",
    [
        *(None, [], 1, {}, {"config": 1}, {"config": {}}, CONFIG),
        {**CONFIG, "model": []},
        {**CONFIG, "model": {}},
        {**CONFIG, "model": {**FACTS, "new": 1}},
        {**CONFIG, "model": {**FACTS, "kv_channels": "2"}},
        {**CONFIG, "model": {**FACTS, "kv_channels": 10**30}},
        {**CONFIG, "model": {**FACTS, "gated_linear_unit": 1}},
        {**CONFIG, "model": {**FACTS, "moe_layer_freq": [2]}},
        {**CONFIG, "model": {**FACTS, "moe_layer_freq": [1] * 5000}},
        {**CONFIG, "model": {**FACTS, "hybrid_layer_pattern": 1}},
        *(
            {**CONFIG, "model": FACTS, "base": base}
            for base in (1, {}, {"weights": {}, "dtypes": 1})
        ),
        {**CONFIG, "model": FACTS, "base": {"dtypes": [], "weights": {"a": [1, 2]}}},
        {**CONFIG, "model": FACTS, "base": {"dtypes": [], "weights": {"a": ["1", 2, 3]}}},
    ],
)
def test_a_description_of_another_form_is_refused(description: object) -> None:
    text = None if description is None else json.dumps(description)
    with pytest.raises(ValueError, match=r"of its adapters|lora_"):
        parse_description(text)
