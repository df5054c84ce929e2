"""The house plan: imports point one way, the core knows no pass and no kind by name, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
CORE, PASSES = ROOT / "lorafx", ROOT / "passes"
# Each layer may import itself and the layers before it.
LAYERS = [
    {
        "errors",
        "config",
        "targets",
        "autocast",
        "blocks",
        "report",
        "tree",
        "residual",
        "folder",
        "hub",
        "watch",
        "pure",
        "filled",
        "key",
        "layout",
        "caches",
        "answers",
        "hidden",
        "settled",
        "offload",
        "deferred",
        "in_place",
        "ops",
    },
    {"forms", "rewrite", "sites", "by_onednn"},
    {"rooted", "regions", "effects"},
    {"outline", "once", "sizes", "direct"},
    {"positions"},
    {"folded"},
    {"kinds"},
    {"adapter"},
    {"verify", "pipeline", "merge", "checkpoint"},
    {"passes"},
    {"capture", "lower"},
    {"by_sites", "programs"},
    {"misses"},
    {"dispatch"},
    {"state"},
    {"saving", "trainers"},
    {"model"},
    {"api"},
    {"compat"},
    {"testing", "__init__"},
    {"bench"},
    {"__main__"},
]


def imports() -> nx.DiGraph:
    """Which module of lorafx imports which, `if TYPE_CHECKING` aside; a folder is one module."""
    graph = nx.DiGraph()
    for file in [*CORE.rglob("*.py"), *PASSES.rglob("*.py")]:
        relative = file.relative_to(ROOT)
        package = relative.parts[0] == "passes" or len(relative.parts) > 2
        module = "passes" if relative.parts[0] == "passes" else relative.parts[1].removesuffix(".py")
        graph.add_node(module)
        for target in _targets(ast.parse(file.read_text()), package):
            if target != module:
                graph.add_edge(module, target, file=str(relative))
    return graph


def _targets(tree: ast.Module, package: bool) -> list[str]:
    found = []
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom):
            continue
        absolute = node.level == 0 and (node.module or "").split(".")[0] == "lorafx"
        if absolute:
            names = (node.module or "").split(".")[1:2] or [alias.name for alias in node.names]
        elif node.level == (2 if package else 1):
            names = [(node.module or "").split(".")[0]] if node.module else [alias.name for alias in node.names]
        else:
            continue
        found += names
    return found


def test_every_module_has_its_layer():
    assert set(imports()) - set().union(*LAYERS) == set()


def test_imports_point_one_way():
    rank = {module: index for index, layer in enumerate(LAYERS) for module in layer}
    wrong = [
        f"{data['file']} imports {target}" for a, target, data in imports().edges(data=True) if rank[target] > rank[a]
    ]
    assert wrong == []
    assert nx.is_directed_acyclic_graph(imports())


@pytest.mark.parametrize("file", sorted(PASSES.glob("*.py")), ids=lambda file: file.stem)
def test_passes_know_no_kind_by_name(file):
    names = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
    assert not names & {"Lora", "lora"}
    assert "lorafx.kinds" not in file.read_text().split('"""', 2)[2]


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
        assert (ROOT / "tests" / f"test_{name}.py").exists()


def test_importing_lorafx_imports_no_test_or_demo_dependency():
    script = "import sys, lorafx; print(*{'peft', 'hypothesis', 'matplotlib', 'bitsandbytes'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
