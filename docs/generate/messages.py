"""The page "When it says ...": every error and warning of megalora, its cause and its remedy.

The sentences are found in the source (`said/sentences.py`), so that none is forgotten. What to do
stands in most of them. For the others it is in `said/*.toml`, by the sentence as the page shows it:
`cause` and `remedy`, of which one is enough where the sentence says the other; or `fills`, the
sentence that it stands in.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from docs.generate.said.remedies import LABEL, split
from docs.generate.said.rooms import GROUPS, Group, room_of
from docs.generate.said.sentences import Said, sentences, sentences_of_ops
from docs.generate.said.source import Module, read_sources

SAID = Path(__file__).parent / "said"
MEGATRON = SAID / "megatron.toml"
HEAD = """# When it says ...

Every error and warning of megalora, with its cause and what to do, by what you were doing. Search
this page for a few words of what you see (without names and numbers of your own): `{name}` stands
for one. A sentence that begins with `error:` was said by a command or a run, and ends it; one with
`WARNING:` or `warning:` does not.

The page is made from the source, and a test fails where a sentence of the source is not here. With
`MEGALORA_TRACEBACK=1` a run also says where in the source each rank met an error.
"""


@dataclass
class Entry:
    """Sentences that one place in the source says, and what is written of them."""

    forms: list[str]
    met: str
    group: Group
    paths: list[str]
    written: dict[str, str]
    fillers: list[str] = field(default_factory=list)

    @property
    def cause(self) -> str | None:
        """Return why it is said: as written, else what the sentence complains of, in its words."""
        said = split(self.forms[0])
        return self.written.get("cause") or (code(said[0]) if said else None)

    @property
    def remedy(self) -> str | None:
        """Return what to do: as written, else as the sentence says."""
        says = {said[1] for said in map(split, self.forms) if said}
        own = "as each of them says" if len(says) > 1 else "".join(map(code, says))
        return self.written.get("remedy") or own or None


@cache
def sources() -> dict[str, Module]:
    """Return the files of the source, read once."""
    return read_sources()


@cache
def found() -> tuple[Said, ...]:
    """Return all sentences of the source."""
    return (*sentences(sources()), *sentences_of_ops())


@cache
def written() -> dict[str, dict[str, str]]:
    """Return what is written of messages, by the sentence: `cause`, `remedy` or `fills`."""
    files = sorted(path for path in SAID.glob("*.toml") if path != MEGATRON)
    return {text: row for path in files for text, row in tomllib.loads(path.read_text()).items()}


def entries() -> list[Entry]:
    """Return the messages of the page: those of one place together, each sentence once."""
    sites: dict[str, list[Said]] = {}
    for said in found():
        sites.setdefault(said.site, []).append(said)
    made: dict[str, Entry] = {}
    for saids in sites.values():
        _add(made, saids)
    by_form = {form: entry for entry in made.values() for form in entry.forms}
    inner = [entry for entry in made.values() if "fills" in entry.written]
    for entry in inner:
        if (outer := by_form.get(entry.written["fills"])) is not None:
            outer.fillers += entry.forms
    return [entry for entry in made.values() if entry not in inner]


def _add(made: dict[str, Entry], saids: Sequence[Said]) -> None:
    """Add the sentences of one place, to the entry that has the same first one, if any."""
    room = room_of(saids[0].path)
    if room is None:
        raise ValueError(f"{saids[0].path} is in no group of the page: add it to said/rooms.py")
    rows = [written()[said.text] for said in saids if said.text in written()]
    forms = list(dict.fromkeys(said.text for said in saids))
    known = made.get(forms[0])
    if known is None:
        made[forms[0]] = Entry(forms, room[1], room[0], [saids[0].path], rows[0] if rows else {})
    elif saids[0].path not in known.paths:
        known.paths.append(saids[0].path)


def page() -> str:
    """Return the page in Markdown."""
    parts, every, anchors = [HEAD], entries(), Anchors()
    for group in GROUPS:
        parts.append(f"## {group.title}\n\n{group.about}\n")
        own = [entry for entry in every if entry.group is group]
        for met in dict.fromkeys(group.files.values()):
            here = sorted((entry for entry in own if entry.met == met), key=_first_words)
            if here:
                parts.append(f"### {met[0].upper()}{met[1:]}\n\n{_sources(here)}\n")
                parts += [_shown(entry, anchors) for entry in here]
    parts.append(_of_megatron(anchors))
    return "\n".join(parts)


def _sources(here: Sequence[Entry]) -> str:
    """Return links to the files that say some messages."""
    paths = sorted({path for entry in here for path in entry.paths})
    return "Said by " + ", ".join(f"[{path}](../../{path})" for path in paths) + "."


class Anchors:
    """Names by which links find messages: their words, with a number where they are not alone."""

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()

    def of(self, message: str) -> str:
        """Return the name of a message."""
        words = re.findall(r"[a-z0-9]+", re.sub(r"\{[^{}]*\}", " ", message).lower())
        name = "-".join(["says", *words[:12]])
        self._count[name] += 1
        return f"{name}-{self._count[name]}" if self._count[name] > 1 else name


def _first_words(entry: Entry) -> str:
    """Return what a message is sorted by: its first words outside of placeholders."""
    text = re.sub(r"\{[^{}]*\}", " ", LABEL.sub("", entry.forms[0]))
    return " ".join(re.findall(r"\w[\w-]*", text)).lower()


def _shown(entry: Entry, anchors: Anchors) -> str:
    """Return an entry as an item of a list."""
    first, *others = entry.forms
    lines = [f'- <a id="{anchors.of(first)}"></a>**{code(first)}**']
    lines += [f"  - or {code(form)}" for form in others]
    lines += [f"  - where a part may be {code(form)}" for form in entry.fillers]
    cause = entry.written.get("cause", "as it says")
    lines += ["", f"  *Cause:* {_ended(cause)}\\", f"  *Remedy:* {_ended(entry.remedy)}", ""]
    return "\n".join(lines)


def _ended(text: str | None) -> str:
    text = (text or "").strip()
    return text if text.endswith((".", "?", "!")) else f"{text}."


def code(text: str) -> str:
    """Return a text as code in Markdown, with as many backticks around it as it needs."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    marks = "`" * (longest + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{marks}{space}{text}{space}{marks}"


def _of_megatron(anchors: Anchors) -> str:
    """Return what Megatron itself says, with the cause and the remedy."""
    rows = tomllib.loads(MEGATRON.read_text())
    parts = [
        "## What Megatron says",
        "",
        "Megatron's own errors that runs with LoRA meet, in the words of megatron-core 0.19.2.",
        "",
    ]
    for text, row in sorted(rows.items()):
        parts += [
            f'- <a id="{anchors.of(text)}"></a>**{code(text)}**',
            "",
            f"  *Cause:* {_ended(row['cause'])}\\",
            f"  *Remedy:* {_ended(row['remedy'])} (`megatron/{row['file']}`)",
            "",
        ]
    return "\n".join(parts)
