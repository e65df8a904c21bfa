"""Modules that are executed on use: what they are, that they work, and that generating needs none of them."""

import gc
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

from omnivideo import startup
from omnivideo.startup import DEFERRED_MODULES, DeferredModule, DeferringFinder, pause_collection

ROOT = Path(__file__).parents[1]


@pytest.fixture
def defer(monkeypatch, tmp_path):
    """Return a function that writes a module, defers it, and imports it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [DeferringFinder(), *sys.meta_path])
    names = []

    def write_and_import(name: str, text: str, *functions: str):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.setitem(startup.DEFERRED_MODULES, name, functions)
        names.append(name)
        return __import__(name)

    yield write_and_import
    for name in names:
        sys.modules.pop(name, None)


def test_a_deferred_module_is_executed_at_the_first_attribute_only(defer, capsys):
    module = defer("deferred_one", "print('executed')\nVALUE = 3\n")
    assert isinstance(module, DeferredModule) and module.__file__.endswith("deferred_one.py")
    assert not hasattr(module, "__path__") and capsys.readouterr().out == ""
    assert module.VALUE == 3 and module.VALUE == 3 and capsys.readouterr().out == "executed\n"
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        getattr(module, "missing")  # noqa: B009


def test_a_function_of_a_deferred_module_can_be_imported_by_name(defer, capsys):
    defer("deferred_two", "print('executed')\ndef double(x):\n    return 2 * x\n", "double")
    from deferred_two import double

    assert capsys.readouterr().out == "" and double(4) == 8 and double(5) == 10
    assert capsys.readouterr().out == "executed\n"


def test_a_module_may_replace_itself_when_it_is_executed(defer):
    text = "import sys, types\nsys.modules[__name__] = types.SimpleNamespace(VALUE=3, later=4)\n"
    module = defer("deferred_five", text)
    assert (module.VALUE, module.later) == (3, 4) and sys.modules["deferred_five"].VALUE == 3
    from deferred_five import later

    assert later == 4 and not hasattr(module, "missing")


def test_threads_execute_a_module_once_and_see_all_of_it(defer, capsys):
    module = defer("deferred_three", "import time\nFIRST = 1\nprint('executed')\ntime.sleep(0.3)\nLAST = 2\n")
    found = []
    threads = [threading.Thread(target=lambda: found.append(module.LAST)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [2] * 4 and capsys.readouterr().out == "executed\n"


def test_a_module_that_fails_reports_its_error_each_time(defer):
    module = defer("deferred_four", "raise ImportError('it needs more')\n")
    for _ in range(2):
        with pytest.raises(ImportError, match="it needs more"):
            getattr(module, "VALUE")  # noqa: B009


def test_a_name_of_a_deferred_module_is_checked_called_and_derived_from(defer, capsys):
    text = "print('executed')\nclass Shape:\n    corners = 3\n\nclass Square(Shape):\n    corners = 4\n"
    module = defer("deferred_six", text, "Shape", "Square")
    from deferred_six import Shape, Square

    def count(shape: Shape | None = None, other: "int | Shape" = 1) -> int:
        return 1

    assert not isinstance(3, Shape) and not isinstance(count, (int, Shape)) and not issubclass(int, Shape)
    assert capsys.readouterr().out == ""
    assert Square.corners == 4 and capsys.readouterr().out == "executed\n"

    class Own(Shape):
        pass

    assert isinstance(Square(), Shape) and issubclass(module.Square, Shape) and Own.__mro__[1] is module.Shape


def test_the_package_of_a_module_is_executed_before_it(defer, tmp_path, capsys):
    """As it is on import: so a package and its modules may import from each other."""
    package = tmp_path / "deferred_seven"
    package.mkdir()
    (package / "__init__.py").write_text("print('package')\nfrom deferred_seven.part import VALUE\n")
    (package / "part.py").write_text("print('part')\nfrom deferred_seven import other\nVALUE = 3\n")
    (package / "other.py").write_text("print('other')\n")
    startup.DEFERRED_MODULES["deferred_seven.part"] = ()
    try:
        defer("deferred_seven", "")
        part = importlib.import_module("deferred_seven.part")
        assert capsys.readouterr().out == "" and part.VALUE == 3
        assert capsys.readouterr().out == "package\npart\nother\n"
    finally:
        del startup.DEFERRED_MODULES["deferred_seven.part"]
        for name in ("deferred_seven.part", "deferred_seven.other"):
            sys.modules.pop(name, None)


def test_marks_of_a_decorator_wait_until_its_module_is_executed(defer, monkeypatch, capsys):
    text = "marked = []\ndef mark(f):\n    marked.append(f)\n    return f\ndef double(f, plus=0):\n"
    text += "    print('executed')\n    return lambda x: 2 * f(x) + plus\n"
    module = defer("deferred_eight", text, "mark", "double")
    monkeypatch.setitem(startup.SUBSTITUTES, "deferred_eight.mark", startup.note_registration)
    monkeypatch.setitem(startup.SUBSTITUTES, "deferred_eight.double", startup.wrap_until_executed)
    from deferred_eight import double, mark

    @mark
    @double(None, plus=1)
    def add_one(x):
        return x + 1

    assert add_one(3) == 4 and isinstance(module.__loader__, startup.DeferringLoader)
    assert module.marked == [add_one] and add_one(3) == 9 and add_one(4) == 11
    assert capsys.readouterr().out == "executed\n"  # it decorates once


def test_a_module_of_an_independent_package_is_imported_by_its_name_alone(defer, monkeypatch, tmp_path, capsys):
    package = tmp_path / "deferred_nine"
    package.mkdir()
    (package / "__init__.py").write_text("print('package')\nVALUE = 3\n")
    (package / "part.py").write_text("NUMBER = 4\n")
    monkeypatch.setattr(startup, "INDEPENDENT_PACKAGES", {"deferred_nine"})
    defer("deferred_nine", (package / "__init__.py").read_text())
    (tmp_path / "deferred_nine.py").unlink()
    sys.modules.pop("deferred_nine")
    importlib.invalidate_caches()
    from deferred_nine import part

    assert part.NUMBER == 4 and capsys.readouterr().out == ""
    from deferred_nine import VALUE

    assert VALUE == 3 and capsys.readouterr().out == "package\n"
    sys.modules.pop("deferred_nine.part")


def test_a_plain_condition_is_returned_and_another_one_is_passed_on(defer, monkeypatch, capsys):
    defer("deferred_ten", "print('executed')\ndef expect(value):\n    return value == 'symbolic'\n", "expect")
    monkeypatch.setitem(startup.SUBSTITUTES, "deferred_ten.expect", startup.return_bool)
    from deferred_ten import expect

    assert expect(True) is True and expect(False) is False and capsys.readouterr().out == ""
    assert expect("symbolic") is True and capsys.readouterr().out == "executed\n"


def test_a_decorator_that_only_documents_leaves_everything_as_it_is_until_its_module_is_executed(defer, monkeypatch):
    text = "def document(marked=None, **options):\n    return 'documented'\nVALUE = 3\n"
    module = defer("deferred_twelve", text, "document")
    monkeypatch.setitem(startup.SUBSTITUTES, "deferred_twelve.document", startup.leave_undecorated)
    from deferred_twelve import document

    assert document(len) is len and document(intro="...")(len) is len
    assert module.VALUE == 3 and document(len) == "documented"


def test_a_name_from_another_module_is_that_modules_own(defer, monkeypatch, capsys):
    defer("deferred_thirteen", "print('executed')\nfrom pathlib import Path\n")
    monkeypatch.setitem(startup.REEXPORTS, "deferred_thirteen.Path", "pathlib")
    from deferred_thirteen import Path as path_class

    assert path_class is Path and capsys.readouterr().out == ""


def test_the_installed_distributions_are_read_when_a_module_asks_for_one(defer, monkeypatch):
    monkeypatch.setattr(startup, "MODULES_THAT_READ_DISTRIBUTIONS", {"deferred_eleven"})
    text = "import importlib.metadata\nDISTRIBUTIONS = importlib.metadata.packages_distributions()\n"
    module = defer("deferred_eleven", text)
    assert type(module).__name__ == "DeferredModule"  # which is first
    monkeypatch.delitem(startup.DEFERRED_MODULES, "deferred_eleven")
    sys.modules.pop("deferred_eleven")
    distributions = importlib.import_module("deferred_eleven").DISTRIBUTIONS
    assert "entries" not in vars(distributions)
    read_directly = importlib.metadata.packages_distributions()
    assert distributions["PIL"] == ["pillow"] and dict(distributions) == read_directly


PRELOAD = """
import sys, threading
from pathlib import Path
from omnivideo.startup import preload_torch
preload_torch()
for thread in threading.enumerate():
    if thread.name == "preload-torch":
        thread.join()
print("torch" in sys.modules, "libtorch_cpu" in Path("/proc/self/maps").read_text())
import torch
preload_torch()
print(torch.ones(2).sum().item(), threading.active_count())
"""


def test_the_library_of_torch_is_loaded_before_torch_is_imported():
    completed = subprocess.run(
        [sys.executable, "-c", PRELOAD], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert completed.stdout.splitlines() == ["False True", "2.0 1"]


def test_collection_is_paused_and_continues():
    assert gc.isenabled()
    with pytest.raises(ValueError), pause_collection():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()


def test_what_is_created_in_a_pause_counts_as_old():
    """As young objects, those of the libraries were searched three times: 0.85 of the 5.5 CPU seconds of `serve`."""
    gc.collect()
    num_objects = 20_000
    with pause_collection():
        kept = [[] for _ in range(num_objects)]
        cycle = [threading.Event()]
        cycle.append(cycle)
        event = weakref.ref(cycle[0])
        del cycle
    assert len(gc.get_objects(generation=0)) < num_objects / 10 and len(kept) == num_objects
    gc.collect()
    assert event() is None  # garbage is still found


CONVERSE = """
import sys
from omnivideo.startup import defer_imports
defer_imports()
import omnivideo.agent.conversations
print("langsmith.types" in sys.modules)
from langsmith._internal._v2_migration_utils import get_query_backend
print(get_query_backend(None).__class__.__name__, "langsmith.types" in sys.modules)
"""


def test_conversations_load_no_types_of_langsmiths_server():
    completed = subprocess.run(
        [sys.executable, "-c", CONVERSE], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert completed.stdout.splitlines() == ["False", "QueryBackend True"], completed.stderr[-2000:]


GENERATE = """
import json, sys
from omnivideo import Studio
studio = Studio(weights=sys.argv[1], home=sys.argv[2])
studio.generate("a red ball", image=True, steps=1)
from omnivideo.startup import DEFERRED_MODULES
print(json.dumps(sorted(set(sys.argv[3:]) & set(sys.modules))))
present = {name: sys.modules[name] for name in DEFERRED_MODULES if name in sys.modules}
print(json.dumps([type(module.__loader__).__name__ for module in present.values()]))
import torch
print(torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1)).item())
from diffusers.hooks import HookRegistry
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.distributed.sharding_utils import DTensor as StandIn
print(CPUOffloadPolicy().pin_memory, issubclass(DTensor, StandIn), isinstance(torch.zeros(1), StandIn))
import scipy.stats
from diffusers.models.autoencoders import AutoencoderKL
from diffusers.models.transformers import FluxTransformer2DModel
from scipy.optimize import linear_sum_assignment, minimize
import transformers.models
from transformers.models import bert, BertModel
print(round(scipy.stats.norm.cdf(0), 3), AutoencoderKL.__name__, FluxTransformer2DModel.__name__, minimize.__name__)
print(bert.__name__, BertModel.__name__, transformers.models.T5Config.__name__, transformers.BertTokenizer.__name__)
print(linear_sum_assignment([[1, 0], [0, 1]])[1].tolist())
import requests
from torch.fx.experimental.symbolic_shapes import expect_true, guard_or_false
from transformers import LlamaForCausalLM, Qwen3VLMoeForConditionalGeneration, SiglipVisionModel, initialization
print(torch.export.Dim("n").__name__, requests.Session.__name__, guard_or_false(expect_true(True)))
with torch.device("meta"):
    print(torch.nn.Conv2d(3, 4, 1)(torch.randn(1, 3, 8, 8)).shape[1], transformers.__version__.split(".")[0])
"""


# Modules that generating a clip does not use, and that libraries would import.
UNUSED_MODULES = (
    "scipy.optimize", "scipy.stats", "torch._dynamo.convert_frame", "torch._inductor", "torch.distributed.tensor._api",
    "torch.distributed.fsdp._fully_shard", "diffusers.loaders.lora_pipeline", "diffusers.hooks.first_block_cache",
    "diffusers.pipelines", "boto3.session", "langgraph", "sqlalchemy", "fastapi", "celery", "alembic", "matplotlib",
    "sympy", "requests.sessions", "torch.export.dynamic_shapes",
)  # fmt: skip


def test_generating_executes_none_of_them_and_all_can_be_used_afterwards(weights, tmp_path):
    """A library that imports more from them would make the start slower: DEFERRED_MODULES says which."""
    completed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", GENERATE, str(weights), str(tmp_path), *UNUSED_MODULES],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr[-3000:]
    imported, loaders, compiled, sharding, used, models, assigned, also_used, meta = completed.stdout.splitlines()
    assert set(json.loads(imported)) <= set(DEFERRED_MODULES), imported
    assert float(compiled) == 1 and sharding == "True True False"
    assert set(json.loads(loaders)) == {"DeferringLoader"}, loaders
    assert models == "transformers.models.bert BertModel T5Config BertTokenizer"
    assert also_used == "n Session True" and meta == "4 5"
    assert used == "0.5 AutoencoderKL FluxTransformer2DModel minimize" and assigned == "[1, 0]"
