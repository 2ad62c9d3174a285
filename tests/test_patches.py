"""What is replaced in Megatron: what docs/patches.md lists, once, and only where it fits."""

import functools
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megalora import replace
from megalora.replace import Patch, around
from tests.support.forked import ROOT, call

# Stand-ins for devices, which docs/patches.md lists in words.
DEVICES = "cuda_facade.py"


def documented() -> set[tuple[str, str]]:
    """Return place and reason of each row in docs/patches.md."""
    text = (ROOT / "docs" / "patches.md").read_text()
    return set(re.findall(r"^\| `([\w.]+)` \| (.+?) \|", text, re.MULTILINE))


def install_everything() -> list[Patch]:
    """Install all tables, in a process that `megalora.cpu` is installed in; return their rows."""
    from megalora import mends
    from megalora.cpu import gloo, kernels, megatron_devices
    from megalora.mends import latent_attention
    from megalora.run import Launcher
    from megalora.training import patches

    launcher = Launcher()
    patches.install(patches.PARSING)
    launcher.install()
    patches.install(patches.TRAINING)
    patches.install(latent_attention.HUGGING_FACE)
    return [
        *(*mends.patches(), *gloo.PATCHES, *megatron_devices.PATCHES, *kernels.PATCHES),
        *(*patches.PARSING, *patches.TRAINING, *launcher.patches()),
        *latent_attention.HUGGING_FACE,
    ]


def short(place: str) -> str:
    """Name a collective by where users find it; torch.distributed looks it up in another module."""
    return place.replace(".distributed_c10d", "")


def found_in_modules() -> dict[str, object]:
    """Return what in Megatron and torch.distributed is made of megalora's code, by place."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "megatron" or name.startswith("torch.distributed"):
            for owner in (module, *_classes(module)):
                for member, value in vars(owner).items():
                    if _is_ours(value):
                        found[short(replace.place(owner, member))] = value
    return found


def _classes(module: types.ModuleType) -> Iterator[type]:
    for value in list(vars(module).values()):
        if isinstance(value, type) and value.__module__ == module.__name__:
            yield value


def _is_ours(value: Any) -> bool:
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, functools.partial):
        value = value.func
    if isinstance(value, type):
        return value.__module__.startswith("megalora")
    code = getattr(value, "__code__", None)
    path = Path(code.co_filename) if isinstance(code, types.CodeType) else Path()
    return path.is_relative_to(ROOT / "megalora") and path.name != DEVICES


def rows_and_replaced() -> tuple[set[tuple[str, str]], set[str], set[str]]:
    """Return the tables' rows, what was replaced, and what is replaced in no table."""
    rows = {(short(patch.place), patch.why) for patch in install_everything()}
    found = found_in_modules()
    listed = {id(value) for place, value in found.items() if place in {place for place, _ in rows}}
    # Others that have imported it by name have the same.
    unlisted = {place for place, value in found.items() if id(value) not in listed}
    return rows, {short(place) for place in replace.places()}, unlisted


def test_the_document_lists_all_that_is_replaced_and_nothing_else() -> None:
    rows, replaced, unlisted = call(rows_and_replaced)
    assert rows == documented()
    assert replaced == {place for place, _ in rows}
    assert unlisted == set()


def unlisted_after_a_change() -> set[str]:
    from megatron.training import training

    training.evaluate = around(lambda original: None)(training.evaluate)
    return rows_and_replaced()[2]


def test_what_is_replaced_in_no_table_is_noticed() -> None:
    assert call(unlisted_after_a_change) == {"megatron.training.training.evaluate"}


def changed_by_installing_again() -> list[str]:
    rows = install_everything()
    before = [vars(patch.owner)[patch.name] for patch in rows]
    after = [vars(patch.owner)[patch.name] for patch in install_everything()]
    return [
        patch.place
        for patch, one, other in zip(rows, before, after, strict=True)
        if one is not other
    ]


def test_installing_twice_is_installing_once() -> None:
    assert call(changed_by_installing_again) == []


def test_the_args_of_a_run_are_written_in_one_place() -> None:
    written = []
    for path in sorted((ROOT / "megalora").glob("training/*.py")) + [
        ROOT / "megalora" / name for name in ("launch.py", "run.py")
    ]:
        written += re.findall(
            r"^ *(?:vars|setattr)\(\w*args\b.*|\bargs\.\w+ [-+*]?= .*",
            path.read_text(),
            re.MULTILINE,
        )
    assert [line.strip() for line in written] == ["vars(args).update(changes)"]


def module_with(**members: object) -> types.ModuleType:
    module = types.ModuleType("megatron.somewhere")
    vars(module).update(members)
    return module


@pytest.mark.parametrize(
    ("members", "beginning"),
    [
        ({}, "megatron.somewhere.save is missing"),
        (
            {"save": lambda path: path},
            "megatron.somewhere.save is not what megalora expects (expected: a function of "
            "iteration, model)",
        ),
        ({"save": 3}, "megatron.somewhere.save is not what megalora expects"),
    ],
    ids=["missing", "another signature", "no function"],
)
def test_what_megatron_has_changed_ends_in_one_sentence(
    members: dict[str, object], beginning: str
) -> None:
    module = module_with(**members)
    with pytest.raises(RuntimeError) as error:
        replace.replace(module, "save", ("iteration", "model"), around(print))
    assert str(error.value).startswith(beginning)
    assert "megalora knows megatron-core 0.19 and 0.20, this is" in str(error.value)
    assert vars(module).get("save") is members.get("save")


def double(original: Any, *args: Any) -> Any:
    return 2 * original(*args)


def test_two_reasons_to_replace_a_function_both_hold_once() -> None:
    def triple(original: Any, x: int) -> Any:
        return 3 * original(x)

    module = module_with(count=lambda x: x)
    for wrapper in (double, triple, double):
        replace.replace(module, "count", ("x",), around(wrapper))
    assert module.count(1) == 6


def test_static_and_class_methods_stay_what_they_are() -> None:
    class Owner:
        factor = 5

        @staticmethod
        def static(x: int) -> int:
            return x

        @classmethod
        def of_class(cls, x: int) -> int:
            return cls.factor * x

    for name in ("static", "of_class"):
        replace.replace(Owner, name, ("x",), around(double))
    assert (Owner.static(1), Owner().static(1), Owner.of_class(1)) == (2, 2, 10)
