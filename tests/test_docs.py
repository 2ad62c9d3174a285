"""The documents: links, tables of contents, and that the reference leaves nothing out."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import megalora
from docs.generate import PAGES, commands, flags, included, python
from docs.generate.markdown import paragraphs, prose, sentence
from megalora.config import LoRAConfig, field_texts
from tests.support.forked import ROOT

DOCS = ROOT / "docs"
# Written by hand, or by benchmarks; docs/reference/ is made by Sphinx's configuration.
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/*.md", "benchmarks/**/*.md") for path in ROOT.glob(pattern)
)
MADE = {f"docs/reference/{name}.md" for name in (*PAGES, *included.FILES.values())}
CODE = re.compile(r"^(```+).*?^\1|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+(?:\([^()\s]*\)[^()\s]*)*)(?: \"[^\"]*\")?\)")


def name_of(path: Path) -> str:
    """Return a document's path in the repository."""
    return path.relative_to(ROOT).as_posix()


@cache
def anchors(path: Path) -> frozenset[str]:
    """Return what a link into a document can name: its headings, as a forge makes anchors."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: list[str] = re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text)
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        again = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", each) is not None for each in found)
        found.append(f"{slug}-{again}" if again else slug)
    return frozenset(found)


def dead_links(path: Path, text: str) -> Iterator[str]:
    """Say which relative links of a text that stands at a path lead nowhere."""
    for link in LINK.findall(CODE.sub("", text)):
        place, _, anchor = link.partition("#")
        if urlsplit(link).scheme:
            continue
        target = (path.parent / place).resolve() if place else path
        if not target.is_relative_to(ROOT):
            yield f"{link} leads out of the repository"
        elif name_of(target) in MADE:
            continue
        elif not target.exists():
            yield f"{link} does not exist"
        elif anchor and anchor not in anchors(target):
            yield f"{link}: {name_of(target)} has no such heading"


def bad_urls(text: str) -> Iterator[str]:
    """Say which addresses that a text links to are not https with a host's name."""
    for url in [*LINK.findall(CODE.sub("", text)), *re.findall(r"<(https?://[^>\s]*)>", text)]:
        parts = urlsplit(url)
        if parts.scheme and (parts.scheme != "https" or "." not in (parts.hostname or "")):
            yield url


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_link_of_a_document_leads_somewhere(path: Path) -> None:
    assert list(dead_links(path, path.read_text())) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_what_a_document_links_to_elsewhere_is_https(path: Path) -> None:
    assert list(bad_urls(path.read_text())) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_no_document_says_where_packages_come_from(path: Path) -> None:
    assert re.findall(r"(?i)pypi|pythonhosted|index-url|/simple\b", path.read_text()) == []


def test_links_that_lead_nowhere_are_found() -> None:
    text = (
        "# Two words\n[a](nowhere.md) [b](rl.md#nothing) [c](#two-words) [d](../../etc) `[e](f)`\n"
        "![g](rl/none.png) [h](reference/flags.md#x) [i](https://example.org/a) [j](patches.md)\n"
        "[k](../examples)\n```\n[l](m)\n```\n[n](data.md#training-data)"
    )
    assert list(dead_links(DOCS / "patches.md", text)) == [
        "nowhere.md does not exist",
        "rl.md#nothing: docs/rl.md has no such heading",
        "#two-words: docs/patches.md has no such heading",
        "../../etc leads out of the repository",
        "rl/none.png does not exist",
    ]
    assert list(
        bad_urls("[a](http://a.org) <https://host> [b](ftp://a.org) [c](https://a.org)")
    ) == [
        "http://a.org",
        "ftp://a.org",
        "https://host",
    ]


def test_headings_have_the_anchors_that_a_forge_gives_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b`, [c](d): E-f_g!\n```\n# no\n```\n## Same\n### Same\n")
    assert anchors(page) == {"a-b-c-e-f_g", "same", "same-1"}


def test_every_page_is_in_one_table_of_contents_and_on_the_front_page() -> None:
    index = (DOCS / "index.md").read_text()
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", index, re.MULTILINE | re.DOTALL)
    entries = [line for tree in trees for line in tree.splitlines() if line and line[0] != ":"]
    pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    made = {name.removeprefix("docs/").removesuffix(".md") for name in MADE}
    assert sorted(entries) == sorted(pages | made)
    for entry in entries:
        assert f"]({entry}.md)" in index


# === The reference leaves nothing out ===


# What megalora reads before Megatron does.
MEGATRONS = {"--hybrid-layer-pattern", "--mtp-num-layers"}
# Programs of their own.
PROGRAMS = {"demo.py", "verify_export.py", "finetune_smollm2.py", "side_by_side.py"}


@cache
def flags_in_source() -> frozenset[str]:
    """Return every flag that a call of add_argument, or of what stands for it, adds by its name."""
    folders = ("megalora", "examples")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = set()
    for path in paths:
        if path.name in PROGRAMS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args:
                name, first = ast.unparse(node.func).split(".")[-1], node.args[0]
                is_flag = isinstance(first, ast.Constant) and str(first.value).startswith("--")
                if name in ("add", "add_argument") and is_flag:
                    found.add(str(first.value))
    return frozenset(found)


def test_the_reference_has_every_flag() -> None:
    fields = {f"--lora-{name.replace('_', '-')}" for name in LoRAConfig.__dataclass_fields__}
    on_page = set(re.findall(r"^````\{option\} (--[\w-]+)", flags.page(), re.MULTILINE))
    of_commands = set(re.findall(r"^````\{option\}.*?(--[\w-]+)", commands.page(), re.MULTILINE))
    assert len(flags_in_source()) > 60
    assert flags_in_source() | fields <= on_page | of_commands | MEGATRONS | {"--version"}
    assert {"--lora-rank", "--hf-model", "--dataset", "--beta", "--reward", "--cpu"} <= on_page


def test_a_flag_of_a_field_is_shown_with_the_fields_text() -> None:
    page = flags.page()
    for name, text in field_texts().items():
        flag = f"--lora-{name.replace('_', '-')}"
        block = page.split(f"\n````{{option}} {flag}")[1].split("\n````\n")[0]
        assert prose(text.split("`")[0])[1:].removesuffix(".") in block
        assert f"megalora.LoRAConfig.{name}`" in block


def test_the_reference_has_every_command_and_its_help() -> None:
    page = commands.page()
    for name, about, parser in commands.commands():
        section = page.split(f"\n## `megalora {name}`\n")[1].split("\n## ")[0]
        assert f"[`megalora {name}`](#megalora-{name}) | {prose(sentence(about))} |" in page
        for action in parser._actions:
            assert any(word in section for word in (action.option_strings or [action.dest]))
    assert "It is 2 where the user's input is wrong" in page


def test_the_reference_has_every_variable_of_the_environment() -> None:
    texts = [(ROOT / "setup.py").read_text()]
    texts += [path.read_text() for path in (ROOT / "megalora").rglob("*.py")]
    # A name alone in its quotes: one in a sentence is not read.
    found = {name for text in texts for name in re.findall(r"\"(MEGALORA_\w+)\"", text)}
    compiled = [path.read_text() for path in (ROOT / "csrc").rglob("*.cpp")]
    found |= {name for text in compiled for name in re.findall(r"getenv\(\"(MEGALORA_\w+)", text)}
    assert found == set(flags.VARIABLES)


def test_the_reference_has_the_public_names() -> None:
    page = python.page()
    for name in megalora.__all__:
        assert re.search(rf"^`+\{{py:(class|function)\}} megalora\.{name}\(", page, re.MULTILINE)
    assert "`{py:method} megalora.rollouts.engine.Engine.generate(prompts: " in page
    assert "\n* `learner_logprobs`: \\[s, b\\], of the sampled tokens" in page
    assert "{py:obj}`policy_gradient_loss <megalora.losses.policy_gradient_loss>`" in page


def test_markup_in_a_docstring_is_shown_as_it_is_written() -> None:
    assert prose("x: [s, b] of `a_b` by --lora-rank, 2 * <n>_") == (
        "x: \\[s, b\\] of `a_b` by `--lora-rank`, 2 \\* \\<n\\>\\_"
    )


def test_what_a_docstring_says_of_parameters_is_a_list() -> None:
    text = (
        "Say x: y.\n\none: [b]\nand more. two, three: it. not: this. Raises E for one: 1.\n\nEnd."
    )
    assert paragraphs(text, ["one", "two", "three"]) == (
        "Say x: y.\n\n* `one`: \\[b\\] and more.\n* `two`, `three`: it. not: this.\n\n"
        "Raises E for one: 1.\n\nEnd."
    )
    assert paragraphs(text) == prose(" ".join(text.split()).replace(". End", ".\n\nEnd")).replace(
        "y. one", "y.\n\none"
    )


def test_a_file_of_the_root_has_its_links_moved_and_links_to_it_lead_to_its_page() -> None:
    text = "[a](docs/rl.md#b) ![c](docs/rl/larger.png) [d](LICENSE) [e](https://a.org) [f](#g)"
    assert included.moved(text) == (
        "[a](../rl.md#b) ![c](../rl/larger.png) [d](../../LICENSE) [e](https://a.org) [f](#g)"
    )
    assert included.on_site("[a](../SECURITY.md#b) [c](../README.md#d) [e](rl.md)", "") == (
        "[a](reference/security.md#b) [c](index.md) [e](rl.md)"
    )
    assert included.on_site("[a](../../SECURITY.md)", "../") == "[a](../reference/security.md)"
