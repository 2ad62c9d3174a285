"""Import single files of a server's source, everything else of the server being stubs.

`make servers` puts the source where it is looked for. A stub module has whatever is asked of it: a
class of its own name, which is a torch module, so that the server's own `isinstance` works.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from tests.support.forked import ROOT

SERVERS = ROOT / ".servers"


class Stub(nn.Module):
    """An object that takes any arguments and has none of its class's abilities."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    def __class_getitem__(cls, _: object) -> type:
        return cls

    def forward(self, *args: object, **kwargs: object) -> None:
        """Do nothing, as a decorator or a logger would not either."""


class Quiet:
    """A logger of everybody's."""

    def __getattr__(self, _: str) -> Any:
        return lambda *args, **kwargs: None


class _StubModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (Stub,), {})
        setattr(self, name, value)
        return value


class _Finder(MetaPathFinder, Loader):
    def __init__(self, root: Path, real: set[str], given: Mapping[str, Mapping[str, Any]]) -> None:
        self.root, self.real, self.given = root, real, given
        self.package = next(iter(real)).partition(".")[0]

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name.partition(".")[0] != self.package:
            return None
        if name in self.real:
            file = self.root.joinpath(*name.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _StubModule(spec.name)
        vars(module).update(self.given.get(spec.name, {}))
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Leave a stub as it is."""


@contextmanager
def imported(
    folder: str, real: set[str], given: Mapping[str, Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the real modules by name; the server's package is gone again afterwards.

    folder: in SERVERS. given: what stub modules have beside stub classes.
    """
    finder = _Finder(SERVERS / folder, real, given)
    sys.meta_path.insert(0, finder)
    try:
        yield {name: importlib.import_module(name) for name in sorted(real)}
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.partition(".")[0] == finder.package]:
            del sys.modules[name]
