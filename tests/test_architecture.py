"""The house plan: imports point one way, the core knows no pass and no kind by name, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
CORE, PASSES = ROOT / "lorafx", ROOT / "passes"
# The rooms and the few files beside them, bottom up: each may import what stands before it.
ORDER = [
    *("errors", "tables", "tree", "ops", "graph", "adapters", "pipeline", "passes"),
    *("capture", "lowering", "merging", "files", "serving", "model"),
    *("api", "compat", "__init__", "testing", "bench", "__main__"),
]


def imports() -> nx.DiGraph:
    """Which file of lorafx imports which, by dotted name below `lorafx`, `if TYPE_CHECKING` aside."""
    graph = nx.DiGraph()
    for file in [*CORE.rglob("*.py"), *PASSES.rglob("*.py")]:
        name = ".".join(file.relative_to(ROOT if PASSES in file.parents else CORE).with_suffix("").parts)
        graph.add_node(name)
        for target in _targets(ast.parse(file.read_text()), name):
            graph.add_edge(name, target)
    return graph


def _targets(tree: ast.Module, name: str) -> list[str]:
    found = []
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom):
            continue
        above = name.split(".")[: -node.level] if node.level else []
        module = node.module or ""
        if node.level == 0:
            if module.partition(".")[0] != "lorafx":
                continue
            module = module.partition(".")[2]
        base = ".".join([*above, *filter(None, [module])])
        for alias in node.names:
            inner = f"{base}.{alias.name}".lstrip(".")
            found.append(inner if _is_file(inner) else base or "__init__")
    return found


def _is_file(name: str) -> bool:
    path = (ROOT if name.partition(".")[0] == "passes" else CORE).joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def room(name: str) -> str:
    return name.partition(".")[0]


def test_every_room_has_its_place():
    assert {room(name) for name in imports()} - set(ORDER) == set()


def test_imports_between_rooms_point_one_way():
    wrong = [f"{a} imports {b}" for a, b in imports().edges if ORDER.index(room(b)) > ORDER.index(room(a))]
    assert wrong == []


def test_files_import_each_other_in_no_circle():
    assert nx.is_directed_acyclic_graph(imports())


def test_every_room_says_what_it_is_for():
    for init in CORE.rglob("*/__init__.py"):
        assert len(ast.get_docstring(ast.parse(init.read_text())) or "") > 60, f"{init} has no paragraph"


def test_the_graph_core_knows_nothing_of_printing_and_waiting_logits():
    for name, target in imports().edges:
        if room(name) == "graph" and name != "graph.printing":
            assert target not in ("graph.printing", "ops.deferred"), name


@pytest.mark.parametrize("file", sorted(PASSES.glob("*.py")), ids=lambda file: file.stem)
def test_passes_know_no_kind_by_name(file):
    names = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
    assert not names & {"Lora", "lora"}
    assert "lorafx.adapters.kinds" not in file.read_text().split('"""', 2)[2]


@pytest.mark.parametrize("file", sorted([*CORE.rglob("*.py"), *PASSES.glob("*.py")]), ids=lambda file: file.stem)
def test_files_and_functions_stay_small(file):
    source = file.read_text()
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.end_lineno - node.body[0].lineno + 1
            assert body <= 40, f"{node.name} has {body} lines"


def test_every_pass_has_a_file_and_a_test_of_its_name():
    import lorafx

    for name in (each.name for each in lorafx.passes.default):
        assert (PASSES / f"{name}.py").exists()
        assert (ROOT / "tests" / "passes" / f"test_{name}.py").exists()


# Rooms in which each module of more than a hundred lines has a test file of its name; in the others not each has.
TESTED = ("api", "compat", "files", "graph", "model", "passes", "pipeline", "tree")


def test_a_module_of_more_than_a_hundred_lines_has_a_test_of_its_name():
    missing = []
    for file in [*CORE.rglob("*.py"), *PASSES.glob("*.py")]:
        parts = file.relative_to(CORE if CORE in file.parents else ROOT).with_suffix("").parts
        if parts[0] in TESTED and file.stem != "__init__" and len(file.read_text().splitlines()) > 100:
            folder = parts[0] if len(parts) > 1 else ""
            missing += [file.name] * (not (ROOT / "tests" / folder / f"test_{file.name}").exists())
    assert missing == []


@pytest.mark.slow
def test_importing_lorafx_imports_no_test_or_demo_dependency():
    script = "import sys, lorafx; print(*{'peft', 'hypothesis', 'matplotlib', 'bitsandbytes'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
