"""The page "When it says ...": no sentence of the source is forgotten, and none is made up."""

import ast
import difflib
import io
import re
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from docs.generate.messages import (
    MEGATRON,
    SAID,
    Entry,
    entries,
    found,
    page,
    sources,
    written,
)
from docs.generate.said import rules
from docs.generate.said.rooms import GROUPS, room_of
from docs.generate.said.sentences import Raised, raises, sentences_of_ops
from docs.generate.said.source import ROOT


@cache
def raised() -> list[Raised]:
    return raises(sources())


@cache
def forms() -> tuple[str, ...]:
    """Return all sentences of the page, the longest first."""
    return tuple(sorted({said.text for said in found()}, key=len, reverse=True))


def test_every_message_has_a_cause_and_a_remedy() -> None:
    lacking = [entry for entry in entries() if not (entry.cause and entry.remedy)]
    assert not lacking, "\n".join(["messages without a cause or a remedy:", *map(_advice, lacking)])


def _advice(entry: Entry) -> str:
    """Say what to add, and where, for a message that lacks something."""
    key = entry.forms[0]
    gone = [text for text in written() if text not in forms()]
    before = difflib.get_close_matches(key, gone, n=1, cutoff=0.5)
    quoted = key.replace("\\", "\\\\").replace('"', '\\"')
    return "\n".join(
        [
            f"{entry.paths[0]} says {key!r}, and not what to do.",
            '  End the sentence in what to do ("...: set --flag"), which is best; or add to',
            f"  {SAID.relative_to(ROOT)}/{entry.group.name}.toml:",
            f'    ["{quoted}"]',
            '    cause = "..."',
            '    remedy = "..."',
            '  (or fills = "...", where it is a part of that sentence; or, where no user meets it,',
            "  a line in rules.py)",
            *([f"  It may be the changed form of {before[0]!r}: rename that."] if before else []),
        ]
    )


def test_what_is_written_is_of_a_message_that_there_is() -> None:
    dead = [text for text in written() if text not in forms()]
    said = [f"{text!r}, now perhaps {difflib.get_close_matches(text, forms(), 1)}" for text in dead]
    assert not dead, f"{SAID.relative_to(ROOT)}/*.toml has what nothing says any more: {said}"
    outer = {row["fills"] for row in written().values() if "fills" in row} - set(forms())
    assert not outer, f"fills what nothing says any more: {sorted(outer)}"


def test_what_is_written_of_a_message_stands_once_in_the_file_of_its_group() -> None:
    names: dict[str, set[str]] = {}
    for said in found():
        names.setdefault(said.text, set()).add(_group_of(said.path))
    seen: Counter[str] = Counter()
    for path in (path for path in SAID.glob("*.toml") if path != MEGATRON):
        for text in tomllib.loads(path.read_text()):
            seen[text] += 1
            assert path.stem in names.get(text, {path.stem}), (text, names[text])
    assert [text for text, times in seen.items() if times > 1] == []


def _group_of(path: str) -> str:
    room = room_of(path)
    assert room is not None, path
    return room[0].name


def test_what_is_written_says_something_else_than_the_message() -> None:
    known = {"cause", "remedy", "fills"}
    for text, row in written().items():
        assert row, text
        assert set(row) <= known, text
        assert "fills" not in row or len(row) == 1, text
        assert all(value and value != text for value in row.values()), text


def test_every_raise_is_accounted_for() -> None:
    unknown = [one for one in raised() if not one.texts and one.rule is None]
    said = [f"{one.path}:{one.line}: raise {one.source}" for one in unknown]
    assert not said, f"say in docs/generate/said/rules.py what these raise: {said}"


def test_as_many_raises_are_accounted_for_as_there_are() -> None:
    # Counted in the text itself, by another reader.
    counted = Counter()
    for path in sources():
        tokens = tokenize.generate_tokens(io.StringIO((ROOT / path).read_text()).readline)
        counted[path] = sum(
            token.type == tokenize.NAME and token.string == "raise" for token in tokens
        )
    assert Counter(one.path for one in raised()) == +counted
    assert counted.total() > 500


def test_what_raises_say_is_on_the_page() -> None:
    shown = {form for entry in entries() for form in (*entry.forms, *entry.fillers)}
    said = {" ".join(text.split()) for one in raised() for text in one.texts}
    assert said - shown == set()


def test_as_many_checks_of_the_ops_are_found_as_there_are() -> None:
    files = [path for path in ROOT.glob("csrc/**/*") if path.suffix in (".h", ".cpp", ".cu")]
    called = r"^ .*\bcheck_(value|that)\("
    counted = sum(len(re.findall(called, path.read_text(), re.MULTILINE)) for path in files)
    assert len({said.site for said in sentences_of_ops()}) == counted > 20


def test_no_rule_is_left_over() -> None:
    assert found()
    used = set().union(*(module.rules for module in sources().values()))
    assert {*rules.NOT_MESSAGES, *rules.NOT_MESSAGES_IN} - used == set()
    reasons = {one.rule for one in raised()}
    assert {*rules.PROTOCOL.values(), *rules.FORWARDS.values()} - reasons == set()


def test_every_message_is_in_a_group_and_each_group_has_some() -> None:
    assert {said.path for said in found() if room_of(said.path) is None} == set()
    assert {entry.group.title for entry in entries()} == {group.title for group in GROUPS}
    for start in (start for group in GROUPS for start in group.files if start != "megalora/"):
        assert any(said.path.startswith(start) for said in found()), start


def test_the_page_has_every_message_with_cause_and_remedy() -> None:
    text = page()
    for form in forms():
        assert form in text, form
    told = text.partition("## What Megatron says")[0]
    count = told.count("\n- ")
    assert count == told.count("*Cause:*") == told.count("*Remedy:*") == len(entries())
    assert "*Cause:* ." not in text
    assert "*Remedy:* ." not in text


def test_no_two_messages_have_one_anchor() -> None:
    names = re.findall(r'<a id="([^"]+)"', page())
    assert [name for name, times in Counter(names).items() if times > 1] == []
    assert "says-lora-rank-is-not-divisible-by-moe-router-topk-use-or-set" in names


# === What tests provoke ===

# What tests expect and the page has not in these words.
ELSEWHERE = {
    # torch and PEFT say it.
    "Blocked unsafe global",
    "No adapter found for /b$",
    "'out_proj' is incompatible with Mamba-based models",
    # An invariant of ours, or what tests and measurements use.
    "no place for what a\\.py writes",
    "nothing came for",
    "nothing written for 1\\.0 s\\n.*\\nstarted",
    "read as something else",
    "weight was not supplied",
    # Almost all of it are values.
    "device is cpu on rank 1 .*, but cuda on rank 0 ",
    "'gpt2': supported are .*, kimi_k2, llama, mistral, .*mixtral, nemotron_h, phi3, qwen2",
    "config.json cannot be read \\(Permission denied\\)",
    "policy-v00001.* cannot be written: No space left",
    "returns None \\(NoneType\\) for rows.jsonl line 4",
    "returns inf \\(float\\) for rows.jsonl line 4",
    "reward number fails for rows.jsonl line 4 .*no number",
}


def test_messages_that_tests_provoke_are_on_the_page() -> None:
    expected = sorted(set(_expected_messages()))
    assert len(expected) > 300
    assert {text for text in expected if not _is_said(text)} - ELSEWHERE == set()
    assert ELSEWHERE - set(expected) == set()


def test_what_nothing_says_is_not_found() -> None:
    assert not _is_said("lora_rank is purple: paint it green")
    assert _is_said(r"lora_rank 12 is not divisible by moe_router_topk 8: use 8, 16, 24, \.\.\.")


def _expected_messages() -> Iterator[str]:
    """Yield the constant texts of three words and more that tests expect of an error.

    They are given to `match=`, or to the parameter of that name which is.
    """
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        for name in set(re.findall(r"match=(\w+)", text)) | {"match"} if "match=" in text else ():
            for node in _nodes(path):
                yield from (one for one in _given(node, name) if len(_words(one)) > 2)


@cache
def _nodes(path: Path) -> tuple[ast.keyword | ast.Call, ...]:
    found = ast.walk(ast.parse(path.read_text()))
    return tuple(node for node in found if isinstance(node, ast.keyword | ast.Call))


def _given(node: ast.keyword | ast.Call, name: str) -> Iterator[str]:
    """Yield the texts that a keyword gives a name, or a parametrize its parameter."""
    if isinstance(node, ast.keyword):
        values = [node.value] if node.arg == name else []
    elif ast.unparse(node.func) == "pytest.mark.parametrize" and len(node.args) > 1:
        values = list(_values(node.args[0], node.args[1], name))
    else:
        values = []
    for value in values:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.value


def _values(names: ast.expr, rows: ast.expr, name: str) -> Iterator[ast.expr]:
    known = ast.literal_eval(names)
    known = known.split(",") if isinstance(known, str) else known
    if name not in known or not isinstance(rows, ast.List | ast.Tuple):
        return
    place = list(known).index(name)
    for row in rows.elts:
        inside = row.args if isinstance(row, ast.Call) else getattr(row, "elts", [row])
        if place < len(inside):
            yield inside[place]


def _words(text: str) -> frozenset[str]:
    """Return the plain words of a pattern or a sentence, without what stands in quotes."""
    plain = re.sub(r"\\[a-zA-Z]|\\?\[[^]]*\]|'[^' ]*'|\{[^{}]*\}", " ", text)
    return frozenset(re.findall(r"(?<![\w'/.-])[A-Za-z][a-z]+(?![\w'/=-])", plain))


@cache
def _words_of_entries() -> tuple[frozenset[str], ...]:
    """Return the words of each message, and with it of each part that can stand in it."""
    return tuple(
        _words(" ".join([form, part]))
        for entry in entries()
        for form in entry.forms
        for part in ["", *entry.fillers]
    )


def _is_said(pattern: str) -> bool:
    """Say whether most words of a pattern are those of one message: the others are values."""
    own = _words(pattern)
    return any(len(own & words) >= 0.6 * len(own) for words in _words_of_entries())


# === What Megatron says ===


@pytest.mark.parametrize("text", tomllib.loads(MEGATRON.read_text()))
def test_megatron_says_what_the_page_has_of_it(text: str) -> None:
    row = tomllib.loads(MEGATRON.read_text())[text]
    package = find_spec("megatron.core")
    assert package is not None
    assert package.origin is not None
    source = (Path(package.origin).parents[1] / row["file"]).read_text()
    said = "\n".join([" ".join(source.split()), *_strings(source)])
    for part in re.split(r"\{[^{}]*\}", text):
        assert part.strip() in said, part
    assert row["cause"]
    assert row["remedy"]


def _strings(source: str) -> Iterator[str]:
    """Yield the texts of a source, with what is filled in left out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            texts = [part.value for part in node.values if isinstance(part, ast.Constant)]
            yield "\n".join(map(str, texts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
