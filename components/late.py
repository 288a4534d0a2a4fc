"""A large module imported when something of it is first used, or not at all.

The standard library's LazyLoader is no help: a second `import` looks at the module's `__spec__`, and that already loads it.
"""

from __future__ import annotations

import gc
import sys
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any


def import_late(name: str) -> None:
    """Have `import name` do nothing before something of the module is asked for. For a command that may not need it: call it
    before anything imports the module. Threads must not be the first to ask."""
    spec = None if name in sys.modules else find_spec(name)
    if spec is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    module.__class__ = _Late
    module.__dict__.pop("__path__", None)  # to import a submodule is to use it
    sys.modules[name] = module


def import_now(module: ModuleType) -> None:
    """Run a module that is late, before processes are forked that would each have to."""
    if isinstance(module, _Late):
        module.run()


class _Late(ModuleType):
    """Not yet run."""

    def __getattr__(self, name: str) -> Any:
        """Run it; its own attribute."""
        self.run()
        return getattr(self, name)

    def run(self) -> None:
        """Become what it is. Nothing is collected meanwhile, and what it made not later either: to look through all of torch's
        objects for garbage a few times takes a tenth of its import (measured), and would give every fork pages of its own."""
        spec = self.__spec__
        assert spec is not None
        assert spec.loader is not None
        self.__class__ = ModuleType  # type: ignore[assignment]
        if spec.submodule_search_locations is not None:
            self.__path__ = spec.submodule_search_locations
        gc.disable()
        try:
            spec.loader.exec_module(self)
        except BaseException:
            sys.modules.pop(self.__name__, None)
            raise
        finally:
            gc.freeze()
            gc.enable()
