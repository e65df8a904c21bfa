"""Read the import graph of omnivideo/ and draw it into README.md and docs/architecture.md.

    python docs/import_graph.py          writes the diagrams between their markers
    python docs/import_graph.py --check  exits with 1 if a diagram is out of date

tests/test_architecture.py reads the same graph to check who may import whom.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "omnivideo"


def find_modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name; `omnivideo` itself is its `__init__`."""
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def is_type_checking(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"


def iterate_statements(node: ast.AST, typing: bool, lazy: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the import statements below `node`, with or without those for type checkers and those in functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and is_type_checking(child.test) and not typing:
            for statement in child.orelse:
                yield from iterate_statements(statement, typing, lazy)
        elif lazy or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from iterate_statements(child, typing, lazy)


def read_imports(path: Path, *, typing: bool = True, lazy: bool = True) -> set[str]:
    """Return the dotted names that a file imports; `from a import b` yields `a` and `a.b`.

    `typing` includes imports under TYPE_CHECKING, `lazy` those inside functions. The package has no relative imports.
    """
    names: set[str] = set()
    for statement in iterate_statements(ast.parse(path.read_text()), typing, lazy):
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        elif statement.module:
            names |= {statement.module} | {f"{statement.module}.{alias.name}" for alias in statement.names}
    return names


def build_graph(modules: dict[str, Path], *, typing: bool = True, lazy: bool = True) -> dict[str, set[str]]:
    """Return, for each module, the modules of omnivideo/ that it imports.

    `from package import module` counts as an import of the module alone, because our packages' `__init__` are empty.
    """
    graph = {}
    for name, path in modules.items():
        found = {target for target in read_imports(path, typing=typing, lazy=lazy) if target in modules}
        packages = {target for target in found if any(other.startswith(f"{target}.") for other in found)}
        graph[name] = found - packages - {name}
    return graph


def find_cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one module (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    cycles = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            position = stack.index(name)
            component = stack[position:]
            del stack[position:]
            if len(component) > 1:
                cycles.append(sorted(component))

    for name in graph:
        if name not in index:
            visit(name)
    return cycles


# ---------------------------------------------------------------- diagrams

# Single modules that every package may import.
BASE = (
    "contracts",
    "cpu_threads",
    "startup",
    "errors",
    "manifests",
    "network",
    "ports",
    "presets",
    "records",
    "settings",
    "turns",
    "validation",
)
LABELS = {
    "cli": "command line",
    "sdk": "Studio, Client",
    "wiring": "composition root",
    "api": "HTTP service",
    "agent": "planner",
    "backends": "run the models: MLLM, renderer, workers, queues",
    "training": "engine, data, recipes",
    "evaluation": "prompts, scorers",
    "models": "the paper in tensors: networks, denoising loop, weights",
    "storage": "objects, database",
    "media": "clips in and out",
    "synthetic": "the rendered world",
}
MARKED = re.compile(r"(<!-- import graph: (\w+) -->\n).*?(<!-- end of import graph -->)", flags=re.S)
PAGES = (ROOT / "README.md", ROOT / "docs" / "architecture.md")


def group_by_package(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return which packages each package imports; the modules of BASE count as one package, `base`."""
    packages: dict[str, set[str]] = {}
    for name, targets in graph.items():
        if name != "omnivideo":
            packages.setdefault(package_of(name), set()).update(package_of(target) for target in targets)
    return {name: targets - {name} for name, targets in packages.items()}


def package_of(module: str) -> str:
    top = module.split(".")[1] if "." in module else module
    return "base" if top in BASE else top


def drop_implied_edges(packages: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the edges that no longer path implies (the transitive reduction)."""

    def reach(name: str) -> set[str]:
        return set().union(*({target} | reach(target) for target in packages[name]))

    return {
        name: {target for target in targets if not any(target in reach(other) for other in targets - {target})}
        for name, targets in packages.items()
    }


def draw_diagram(packages: dict[str, set[str]]) -> str:
    """Return a Mermaid flowchart: an arrow points from a package to one that it imports."""
    lines = ["```mermaid", "flowchart TD"]
    lines += [f'    {name}["<b>{name}</b><br>{LABELS[name]}"]' for name in LABELS]
    lines += [f'    base["<b>{", ".join(BASE)}</b>"]']
    edges = drop_implied_edges(packages)
    lines += [f"    {name} --> {target}" for name in LABELS for target in sorted(edges[name])]
    return "\n".join([*lines, "```", ""])


def write_table(packages: dict[str, set[str]], modules: dict[str, Path]) -> str:
    """Return a Markdown table of every package, its size and all of its imports."""
    lines = ["| package | modules | imports |", "|---|---|---|"]
    for name in LABELS:
        count = sum(package_of(module) == name for module in modules)
        imports = ", ".join(f"`{target}`" for target in sorted(packages[name] - {"base"}))
        lines.append(f"| `{name}` | {count} | {imports or 'nothing but the base'} |")
    return "\n".join([*lines, ""])


def render_page(text: str) -> str:
    """Return a page with its marked parts written anew: `chart` is the diagram, `table` the table."""
    modules = find_modules()
    packages = group_by_package(build_graph(modules))
    parts = {"chart": draw_diagram(packages), "table": write_table(packages, modules)}
    return MARKED.sub(lambda match: match[1] + parts[match[2]] + match[3], text)


def main() -> None:
    stale = [page for page in PAGES if page.read_text() != render_page(page.read_text())]
    if "--check" in sys.argv[1:]:
        names = ", ".join(page.name for page in stale)
        sys.exit(f"out of date: {names}; run python docs/import_graph.py" if stale else 0)
    for page in stale:
        page.write_text(render_page(page.read_text()))
        print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
