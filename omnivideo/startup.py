"""Start and end quickly: execute modules of other libraries only if they are used, and collect no garbage then.

transformers and diffusers import modules at their top that a model here never calls: torch's compiler, sharding over
devices, and the __init__ of packages that read or import every model. `defer_imports` registers a finder, as importlib
provides for: a deferred module exists at once and is executed when it is first used. `preload_torch` loads torch's
libraries on another core meanwhile. This module does not import torch.
"""

import atexit
import ctypes
import gc
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, cached_property, wraps
from importlib.metadata import packages_distributions
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, ForwardRef

# The names of a deferred module that others import from it; using one executes the module.
DEFERRED_MODULES: dict[str, tuple[str, ...]] = {
    "scipy.optimize": ("linear_sum_assignment",),  # transformers' losses for the detection of objects
    "scipy.integrate": (),  # schedulers of diffusers other than UniPC
    "scipy.stats": (),
    "diffusers.models.autoencoders": (),
    "diffusers.models.transformers": (),
    "diffusers.models.unets": (),
    "diffusers.hooks": ("apply_group_offloading",),
    "transformers": ("AutoImageProcessor",),  # it reads every file of every model
    "transformers.models": (),
    "transformers.processing_utils": (),  # it executes transformers' __init__
    # MLLMs of other presets.
    "transformers.models.llama.modeling_llama": ("LlamaForCausalLM",),
    "transformers.models.siglip.modeling_siglip": ("SiglipVisionModel",),
    "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration",),
    "transformers.utils.auto_docstring": (  # it composes the docstrings of all models, and imports more for them
        "ClassAttrs", "ClassDocstring", "ImageProcessorArgs", "ModelArgs", "ModelOutputArgs", "auto_class_docstring",
        "auto_docstring", "get_args_doc_from_source", "parse_docstring", "set_min_indent",
    ),
    "requests": (),  # diffusers downloads with it
    # LangSmith's own types of runs, 220 modules: only its clients convert to them, and our turns are not traced.
    "langsmith._internal._v2_migration_utils": ("QueryBackend", "get_query_backend"),
    # The compiler: transformers and diffusers mark functions that it may leave alone.
    "torch._dynamo": ("allow_in_graph", "assume_constant_result", "disable"),
    "torch._dynamo._trace_wrapped_higher_order_op": ("TransformGetItemToIndex",),
    "torch.export": (),
    "torch.fx.experimental.symbolic_shapes": ("expect_true",),  # sympy; torch's checks of a condition ask for it
    # Models on several devices.
    "torch.distributed.tensor": ("DTensor", "Partial", "Placement", "Replicate", "Shard", "distribute_tensor"),
    "torch.distributed.tensor._utils": ("compute_local_shape_and_global_offset",),
    "torch.distributed.tensor.placement_types": ("Shard", "_StridedShard"),
    "torch.distributed.fsdp": ("CPUOffloadPolicy", "MixedPrecisionPolicy"),
    "torch.distributed._composable.fsdp": ("fully_shard",),
    "torch.distributed.checkpoint": (),
    "torch.distributed.checkpoint.hf_storage": ("HuggingFaceStorageReader", "HuggingFaceStorageWriter"),
    "transformers.distributed.expert_parallel": ("apply_expert_parallelism",),
    "transformers.distributed.tensor_parallel": (
        "apply_tensor_parallelism", "gather_state_dict_for_save", "get_kv_heads_per_rank", "verify_tp_plan",
    ),
    "boto3": (),  # accelerate's commands for a cloud
}  # fmt: skip
# The modules of these packages are imported without their __init__, which imports all others.
INDEPENDENT_PACKAGES = {
    "diffusers.hooks", "diffusers.models.autoencoders", "diffusers.models.transformers", "diffusers.models.unets",
    "transformers", "transformers.models",
}  # fmt: skip
# Modules that read the files of all installed distributions when they are executed, and seldom need them.
MODULES_THAT_READ_DISTRIBUTIONS = {"diffusers.utils.import_utils"}


# Names that a deferred module has from another module.
REEXPORTS = {
    "transformers.PreTrainedModel": "transformers.modeling_utils",
    "transformers.processing_utils.Unpack": "typing",
}


class DeferredName:
    """A function or a class of a deferred module: calling it, deriving from it or reading of it executes the module.

    A check of an object's type executes nothing: objects of the class exist only once the module was executed.
    """

    def __init__(self, module: "DeferredModule", name: str):
        self.deferred_module, self.__name__ = module, name

    def resolve(self) -> Any:
        return getattr(execute_deferred(self.deferred_module), self.__name__)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        substitute = SUBSTITUTES.get(f"{self.deferred_module.__name__}.{self.__name__}")
        if substitute is None or is_executed(self.deferred_module):
            return self.resolve()(*arguments, **options)
        return substitute(self, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{self.__name__!r} is not imported yet and has no attribute {name!r}")
        return getattr(self.resolve(), name)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (self.resolve(),)

    def __instancecheck__(self, value: Any) -> bool:
        return is_executed(self.deferred_module) and isinstance(value, self.resolve())

    def __subclasscheck__(self, value: type) -> bool:
        return is_executed(self.deferred_module) and issubclass(value, self.resolve())

    def __or__(self, other: Any) -> Any:
        """Return what an annotation such as `Tensor | DTensor` stands for."""
        return ForwardRef(self.__name__) | other

    def __ror__(self, other: Any) -> Any:
        return other | ForwardRef(self.__name__)


def note_registration(decorator: DeferredName, marked: Any) -> Any:
    """Return what a decorator marks, and mark it when the decorator's module is executed."""
    decorator.deferred_module.registrations.append((decorator.__name__, marked))
    return marked


def wrap_until_executed(decorator: DeferredName, function: Any, *arguments: Any, **options: Any) -> Callable[..., Any]:
    """Return a function that is decorated when it is first called after the decorator's module was executed."""
    if function is None:
        return lambda marked: wrap_until_executed(decorator, marked, *arguments, **options)
    if not isinstance(function, FunctionType):
        return decorator.resolve()(function, *arguments, **options)  # type: ignore[no-any-return]

    @cache
    def decorate() -> Callable[..., Any]:
        return decorator.resolve()(function, *arguments, **options)  # type: ignore[no-any-return]

    @wraps(function)
    def call(*call_arguments: Any, **named: Any) -> Any:
        return (decorate() if is_executed(decorator.deferred_module) else function)(*call_arguments, **named)

    return call


def return_bool(function: DeferredName, value: Any, *arguments: Any) -> Any:
    """Return a bool, as the function does; another value, such as a symbolic one, executes the function's module."""
    return value if type(value) is bool else function.resolve()(value, *arguments)


def leave_undecorated(decorator: DeferredName, marked: Any = None, **options: Any) -> Any:
    """Return what is decorated as it is; without it, a decorator that does so."""
    return marked if marked is not None else lambda late: late


# What functions do until their module is executed. Until then nothing is compiled, no size is symbolic, and
# models have no composed docstrings.
SUBSTITUTES: dict[str, Callable[..., Any]] = {
    "torch._dynamo.allow_in_graph": note_registration,
    "torch._dynamo.assume_constant_result": note_registration,
    "torch._dynamo.disable": wrap_until_executed,
    "torch.fx.experimental.symbolic_shapes.expect_true": return_bool,
    "transformers.utils.auto_docstring.auto_docstring": leave_undecorated,
}


class DeferredModule(ModuleType):
    """A module that is executed when an attribute of it is first read.

    The names that others import from it are stand-ins until then.
    """

    def __init__(self, name: str):
        super().__init__(name)
        self.registrations: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        loader, successor = vars(self).get("__loader__"), sys.modules.get(self.__name__, self)
        if successor is not self:  # by which it has replaced itself when it was executed
            return getattr(successor, name)
        if name == "__version__":
            return importlib.metadata.version(self.__name__)
        is_special = name.startswith("__") and name != "__all__"
        if is_special or not isinstance(loader, DeferringLoader) or loader.executing_thread == threading.get_ident():
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if definition := REEXPORTS.get(f"{self.__name__}.{name}"):
            return getattr(importlib.import_module(definition), name)
        if name in loader.names:
            return DeferredName(self, name)
        if self.__name__ in INDEPENDENT_PACKAGES and importlib.machinery.PathFinder.find_spec(
            f"{self.__name__}.{name}", self.__path__
        ):
            return importlib.import_module(f"{self.__name__}.{name}")
        return getattr(execute_deferred(self), name)  # of the executed module; what it does not have is missing now


def is_executed(module: ModuleType) -> bool:
    return not isinstance(module.__loader__, DeferringLoader)


def execute_deferred(module: ModuleType) -> ModuleType:
    """Execute a deferred module after the packages that contain it, and return what is imported under its name."""
    package = sys.modules.get(module.__name__.rpartition(".")[0])
    if isinstance(package, DeferredModule) and package.__name__ not in INDEPENDENT_PACKAGES:
        execute_deferred(package)
    if isinstance(module, DeferredModule) and isinstance(module.__loader__, DeferringLoader):
        module.__loader__.execute(module)
    return sys.modules.get(module.__name__, module)


class DeferringLoader(importlib.abc.Loader):
    """Creates a module that the `real` loader executes later, once."""

    def __init__(self, real: importlib.abc.Loader, names: tuple[str, ...]):
        self.real = real
        self.names = names
        self.lock = threading.RLock()
        self.executing_thread: int | None = None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return DeferredModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing yet."""

    def execute(self, module: DeferredModule) -> None:
        """Execute the module, unless it was; another thread waits until that has ended."""
        with self.lock:
            if module.__loader__ is not self or self.executing_thread is not None:
                return
            self.executing_thread = threading.get_ident()
            try:
                self.real.exec_module(module)
                module.__loader__ = self.real
                for name, marked in module.registrations:
                    vars(module)[name](marked)
            finally:
                self.executing_thread = None


class InstalledDistributions(Mapping[str, list[str]]):
    """What `importlib.metadata.packages_distributions` returns, read when an entry is first asked for."""

    @cached_property
    def entries(self) -> Mapping[str, list[str]]:
        return packages_distributions()

    def __getitem__(self, package: str) -> list[str]:
        return self.entries[package]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class DistributionsLoader(importlib.abc.Loader):
    """Executes a module, which gets the installed distributions without the time of reading all their files."""

    def __init__(self, real: importlib.abc.Loader):
        self.real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.real
        importlib.metadata.packages_distributions = InstalledDistributions
        try:
            self.real.exec_module(module)
        finally:
            importlib.metadata.packages_distributions = packages_distributions


class DeferringFinder(importlib.abc.MetaPathFinder):
    """Finds the deferred modules; all others are left to the finders behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in DEFERRED_MODULES:
            package = sys.modules.get(fullname.rpartition(".")[0])
            if isinstance(package, DeferredModule) and package.__name__ not in INDEPENDENT_PACKAGES:
                execute_deferred(package)
            if fullname not in MODULES_THAT_READ_DISTRIBUTIONS:
                return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            names = DEFERRED_MODULES.get(fullname)
            spec.loader = DistributionsLoader(spec.loader) if names is None else DeferringLoader(spec.loader, names)
        return spec


def defer_imports() -> None:
    """Register the finder; what is imported already stays as it is."""
    if not any(isinstance(finder, DeferringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, DeferringFinder())


def stop_deferring(*packages: str) -> None:
    """Import the modules of packages at once from now on; those that are deferred already stay so."""
    prefixes = tuple(f"{package}." for package in packages)
    for name in [name for name in DEFERRED_MODULES if name.startswith(prefixes)]:
        del DEFERRED_MODULES[name]


def preload_torch() -> None:
    """Load torch's largest library in a thread, while this one imports what comes before torch.

    It has 400 MB, and while it is loaded the interpreter runs on. torch reports what is wrong with it. A process that
    ends before waits for the thread: a library must not be loaded while others are already taken down.
    """
    spec = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return
    library = Path(spec.origin).parent / "lib" / "libtorch_cpu.so"

    def load() -> None:
        with suppress(OSError):
            ctypes.CDLL(str(library))

    threading.Thread(target=load, name="preload-torch").start()


def skip_final_collection() -> None:
    """End the process without a search for garbage among all objects of the libraries, which takes over a second."""
    atexit.register(gc.freeze)


def exempt_loaded_objects() -> None:
    """Let later searches for garbage skip what this process has loaded, which it keeps until it ends.

    A search among all of it stops every thread for 0.7 s: no request is answered meanwhile, and no step is taken.
    """
    gc.freeze()


@contextmanager
def pause_collection() -> Iterator[None]:
    """Collect no garbage while libraries or models are loaded: they create a million objects, and these stay.

    Afterwards these count as old. As young ones, the next three searches would each go through all of them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()  # into the oldest generation, without a search
            gc.enable()
