"""The house plan: imports point one way, the core knows no pass and no kind by name, files stay small."""

import ast
import functools
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
CORE, PASSES = ROOT / "lorafx", ROOT / "passes"


def in_order(text: str) -> list[str]:
    return text.split()


# The rooms and the few files beside them, bottom up: each may import what stands before it.
ORDER = in_order(
    "checkout errors tables progress torch_private tree ops graph adapters pipeline passes capture lowering files "
    "showing merging serving model api compat functions optimizers absent __init__ testing bench commands __main__"
)
# The same within the larger rooms, where a folder is one step.
INSIDE = {
    "ops": in_order(
        "modes calls dtypes library cpu cuda offload deferral dropout own_forward own_weight linear fourier_linear "
        "circulant_linear attention rms_norm rotary row_norms orthogonal updates lora_linear lora_linears "
        "own_lora_linears lora_by_row by_expert linear_cross_entropy float8 float8_linear float8_lora_linears"
    ),
    "graph": in_order(
        "description values match emit blocks writes effects rule module_stacks modules regions outline masks verify "
        "printing"
    ),
    "adapters": in_order(
        "peft_itself default_targets config naming low_rank combining room readings storages notes site kinds "
        "parameters tying mismatches experts selection expert_names adapter planning start_values building slots "
        "equation by_row"
    ),
    "pipeline": in_order("context definition step text pipeline"),
    "lowering": in_order("backend cuda_graphs eager inductor pieces errors_in_graphs lower"),
    "capture": in_order(
        "arguments batches padding contexts caches frames purity loops autograd_use layout_use process_use outside_use "
        "foreign_tensors written_arguments repeated export"
    ),
    "serving": in_order(
        "attribute_guards tree_state call_key choosing checkpointing scripts own_backward programs adapted_modules "
        "free_counters before early_calls site_table direct concerned methods adapted_tensors operator_call values "
        "turned per_site interpret settling misses rebinding graph_builder adapter_hooks site_graphs site_policy keys "
        "by_sites acting traced program_maker dispatcher whole_process"
    ),
}


@functools.cache
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


@pytest.mark.parametrize("within", INSIDE)
def test_imports_within_a_room_point_one_way(within):
    order = {name: place for place, name in enumerate(INSIDE[within])}
    files = {name.split(".")[1] for name in imports() if name.startswith(f"{within}.")} - {"__init__"}
    assert files == set(order)
    both = [
        (a.split(".")[1], b.split(".")[1]) for a, b in imports().edges if {room(a), room(b)} == {within} and "." in b
    ]
    wrong = [f"{a} imports {b}" for a, b in both if order[b] > order.get(a, len(order))]
    assert wrong == []


def test_files_import_each_other_in_no_circle():
    assert nx.is_directed_acyclic_graph(imports())


def test_every_room_says_what_it_is_for():
    for init in CORE.rglob("*/__init__.py"):
        assert len(ast.get_docstring(ast.parse(init.read_text())) or "") > 60, f"{init} has no paragraph"


NAMED = {*INSIDE, "torch_private", "tree", "files", "merging", "model", "showing", "bench"} - {"ops"}  # one an operator


@pytest.mark.parametrize("within", sorted(NAMED))
def test_every_room_says_what_each_of_its_files_is(within):
    folder = CORE / within
    said = set(re.findall(r"`(\w+)/?`", ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""))
    there = {path.stem for path in folder.iterdir() if not path.name.startswith("_")}
    assert there - said == set()


def test_the_graph_core_knows_nothing_of_printing_and_waiting_logits():
    for name, target in imports().edges:
        if room(name) == "graph" and name != "graph.printing":
            assert target not in ("graph.printing", "ops.deferral"), name


@pytest.mark.parametrize("kind", ["ops.cpu.", "ops.cuda."])
def test_what_is_for_one_kind_of_device_has_one_entrance(kind):
    edges = imports().edges
    assert [f"{a} imports {b}" for a, b in edges if kind in b and not a.startswith(kind)] == []


def test_triton_is_imported_by_kernels_alone():
    """It is not there on every platform. `test_importing_lorafx…` says that kernels are loaded when needed."""
    importing = [
        file.stem for file in CORE.rglob("*.py") if re.search(r"^\s*(import|from) triton", file.read_text(), re.M)
    ]
    assert importing and all(name.endswith("_kernel") for name in importing)


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


# Modules and names of torch with an underscore that all of lorafx may use; `lorafx/torch_private/__init__.py` says why.
PRIVATE_FOR_ALL = {"torch.utils._pytree", "torch._ops", "_parameters", "_buffers", "_modules"}
NAMED_TUPLES = {"_replace", "_asdict"}


@pytest.mark.parametrize("file", sorted([*CORE.rglob("*.py"), *PASSES.glob("*.py")]), ids=lambda file: file.stem)
def test_private_parts_of_torch_are_reached_through_one_room(file):
    if CORE / "torch_private" not in file.parents:
        assert _private_parts(ast.parse(file.read_text())) == set()


def _private_parts(tree: ast.Module) -> set[str]:
    """The modules and attributes with an underscore that a file uses, and that are not lorafx's own."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and not _is_operator(path := ast.unparse(node)):
            found.add(path if path.startswith("torch.") else node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            found |= {arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)}
    return {name for name in found if _is_private(name)}


def _is_private(name: str) -> bool:
    if name.startswith("torch.fx.experimental.proxy_tensor"):
        return True
    atoms = name.split(".")
    known = any(".".join(atoms[:end]) in PRIVATE_FOR_ALL for end in range(1, len(atoms) + 1))
    private = any(atom.startswith("_") and not atom.startswith("__") for atom in atoms)
    own = name.startswith(("lorafx.", "_lorafx")) or name in _own_names() | NAMED_TUPLES
    return private and not known and not own


def _is_operator(path: str) -> bool:
    return path.startswith(("torch.ops.", "aten."))


@functools.cache
def _own_names() -> set[str]:
    """What lorafx's classes define, and what its objects assign to themselves."""
    names = set()
    for file in [*CORE.rglob("*.py"), *PASSES.glob("*.py")]:
        if CORE / "torch_private" in file.parents:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                names |= {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                names |= {target.id for item in node.body if isinstance(item, ast.Assign) for target in item.targets}
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                names.add(node.attr)
    return names


def test_private_parts_are_seen():
    source = """
from torch._dynamo import lookup_backend
from torch.fx.experimental.proxy_tensor import get_proxy_slot
from torch.utils import _pytree as pytree
torch._C._nn.gelu(module._parameters["a"]._version)
getattr(node, "_erased"), torch.ops.aten._to_copy, self.tree._replace()
"""
    expected = {
        "torch._dynamo.lookup_backend",
        "torch.fx.experimental.proxy_tensor.get_proxy_slot",
        "_version",
        "_erased",
    }
    assert _private_parts(ast.parse(source)) == expected | {"torch._C", "torch._C._nn", "torch._C._nn.gelu"}


def test_every_pass_has_a_file_and_a_test_of_its_name():
    import lorafx

    for name in (each.name for each in lorafx.passes.default):
        assert (PASSES / f"{name}.py").exists()
        assert (ROOT / "tests" / "passes" / f"test_{name}.py").exists()


def test_no_two_test_files_have_one_name():
    """pytest imports them by that, and leaves out the second."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_a_module_of_more_than_a_hundred_lines_has_a_test_of_its_name():
    """But the bench and the testing room: tests/bench and tests/properties use them as a whole."""
    missing = []
    for file in [*CORE.rglob("*.py"), *PASSES.glob("*.py")]:
        long = file.stem != "__init__" and len(file.read_text().splitlines()) > 100
        if long and file.parent.name not in ("bench", "testing"):
            missing += [file.name] * (not any((ROOT / "tests").rglob(f"test_{file.name}")))
    assert missing == []


@pytest.mark.slow
def test_a_wheel_has_every_file_and_is_built_without_a_warning(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(CORE, tmp_path / "lorafx", ignore=lambda at, _: {"__pycache__", *(["passes"] * (at == str(CORE)))})
    shutil.copytree(PASSES, tmp_path / "passes", ignore=shutil.ignore_patterns("__pycache__"))
    expected = {file.relative_to(tmp_path) for file in (tmp_path / "lorafx").rglob("*.*")}
    expected |= {Path("lorafx/passes") / file.name for file in (tmp_path / "passes").iterdir()}
    build = "from setuptools.build_meta import build_editable, build_wheel; build_editable('.'); build_wheel('.')"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [line for line in (done.stdout + done.stderr).splitlines() if "Warning:" in line] == []
    (wheel,) = {*tmp_path.glob("*.whl")} - {*tmp_path.glob("*editable*")}
    assert {Path(name) for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == expected


@pytest.mark.slow
def test_importing_lorafx_imports_no_test_or_demo_dependency_no_kernel_and_no_compiler():
    names = {"peft", "hypothesis", "matplotlib", "bitsandbytes", "lorafx.ops.cuda.cross_entropy_kernel"}
    names |= {"torch._dynamo", "torch._inductor", "scipy", "torchao", "transformers.modeling_utils"}  # seconds
    script = f"import sys, lorafx; print(*{names} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_checkout_finds_the_passes_beside_the_package(tmp_path, monkeypatch):
    for name in ("package_of_a_checkout", "passes"):
        (tmp_path / name).mkdir()
    (tmp_path / "package_of_a_checkout" / "__init__.py").write_text("from . import checkout, passes")
    (tmp_path / "package_of_a_checkout" / "checkout.py").write_text((CORE / "checkout.py").read_text())
    (tmp_path / "passes" / "__init__.py").write_text("from . import one\nfrom .. import checkout")
    (tmp_path / "passes" / "one.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    package = importlib.import_module("package_of_a_checkout")
    assert package.passes.one.__name__ == "package_of_a_checkout.passes.one"
