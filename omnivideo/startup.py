"""Start and end quickly: execute modules of other libraries only if they are used, and collect no garbage then.

transformers and diffusers import modules at their top that a model here never calls, and the __init__ of some of
diffusers' packages imports every model. `defer_imports` registers a finder, as importlib provides for: a deferred
module exists at once and is executed when an attribute of it is first read. This module does not import torch.
"""

import atexit
import gc
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# The functions of a deferred module that others import by name; calling one executes the module.
DEFERRED_MODULES: dict[str, tuple[str, ...]] = {
    "scipy.optimize": ("linear_sum_assignment",),  # transformers' losses for the detection of objects
    "scipy.integrate": (),  # schedulers of diffusers other than UniPC
    "scipy.stats": (),
    "diffusers.models.autoencoders": (),
    "diffusers.models.transformers": (),
    "diffusers.models.unets": (),
    "transformers.models": (),  # it reads every file of every model
}


class DeferredModule(ModuleType):
    """A module that is executed when an attribute of it is first read; a package's own modules are found before."""

    def __getattr__(self, name: str) -> Any:
        loader, successor = vars(self).get("__loader__"), sys.modules.get(self.__name__, self)
        if successor is not self:  # by which it has replaced itself when it was executed
            return getattr(successor, name)
        is_special = name.startswith("__") and name != "__all__"
        if is_special or not isinstance(loader, DeferringLoader) or loader.executing_thread == threading.get_ident():
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name in loader.function_names:
            return loader.build_function(self, name)
        loader.execute(self)
        return getattr(self, name)  # of the executed module; what it does not have is missing now


class DeferringLoader(importlib.abc.Loader):
    """Creates a module that the `real` loader executes later, once."""

    def __init__(self, real: importlib.abc.Loader, function_names: tuple[str, ...]):
        self.real = real
        self.function_names = function_names
        self.lock = threading.RLock()
        self.executing_thread: int | None = None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return DeferredModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing yet."""

    def execute(self, module: ModuleType) -> None:
        """Execute the module, unless it was; another thread waits until that has ended."""
        with self.lock:
            if module.__loader__ is not self or self.executing_thread is not None:
                return
            self.executing_thread = threading.get_ident()
            try:
                self.real.exec_module(module)
                module.__loader__ = self.real
            finally:
                self.executing_thread = None

    def build_function(self, module: ModuleType, name: str) -> Callable[..., Any]:
        def call_deferred(*arguments: Any, **options: Any) -> Any:
            self.execute(module)
            return vars(module)[name](*arguments, **options)

        return call_deferred


class DeferringFinder(importlib.abc.MetaPathFinder):
    """Finds the deferred modules; all others are left to the finders behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in DEFERRED_MODULES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = DeferringLoader(spec.loader, DEFERRED_MODULES[fullname])
        return spec


def defer_imports() -> None:
    """Register the finder; what is imported already stays as it is."""
    if not any(isinstance(finder, DeferringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, DeferringFinder())


def skip_final_collection() -> None:
    """End the process without a search for garbage among all objects of the libraries, which takes over a second."""
    atexit.register(gc.freeze)


@contextmanager
def pause_collection() -> Iterator[None]:
    """Collect no garbage while libraries or models are loaded: they create a million objects, and these stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
