"""The documentation runs."""

import re
from pathlib import Path

import pytest
import zoo

import lorafx
from lorafx.adapters import kinds
from lorafx.adapters.kinds.lora_with_tokens import WITH_TOKENS
from lorafx.bench import cases

ROOT = Path(__file__).parent.parent


def blocks(file: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", file.read_text(), flags=re.DOTALL)


@pytest.mark.slow
def test_the_page_about_passes_runs_from_top_to_bottom(capsys):
    namespace: dict = {"__name__": "page"}
    exec(compile("\n".join(blocks(ROOT / "docs/writing-a-pass.md")), "writing-a-pass.md", "exec"), namespace)
    printed = capsys.readouterr().out
    for part in (
        "mul = mul.Tensor(linear_3, 2.0)",
        "add = add.Tensor(linear_1, mul)",
        "expected aten.add.Tensor, found aten.relu.default",
        "clamp_updates{limit=0.01}",
        "clamp_updates requires `adapters`, which insert_adapters establishes only later",
        "0.up\n0.down\n1.up\n1.down\n2.up\n2.down\n",
    ):
        assert part in printed


def test_the_page_about_kinds_runs_from_top_to_bottom(capsys):
    namespace: dict = {"__name__": "page"}
    try:
        exec(compile("\n".join(blocks(ROOT / "docs/writing-a-kind.md")), "writing-a-kind.md", "exec"), namespace)
    finally:
        kinds.KINDS.pop("GAIN", None)
    printed = capsys.readouterr().out
    assert "mul = mul.Tensor(linear_2, _2_gain_g_default)" in printed
    assert "1 sites" in printed and not namespace["fresh"][2].gain_B.gain.isnan().any()


def test_the_table_of_kinds_has_a_row_for_each():
    rows = [line.strip("|").split("|") for line in (ROOT / "docs/kinds.md").read_text().splitlines() if "`" in line]
    found = [(row[0].split("`")[1], row[-1].strip()) for row in rows if len(row) == 6]
    listed = [kind for each in kinds.KINDS.values() for kind in each if type(kind) not in WITH_TOKENS[1:]]
    known = [(kind.config.__name__, kind.additive) for kind in listed]
    assert sorted(found) == sorted((name, "yes" if additive else "no") for name, additive in known)
    assert all(hasattr(lorafx, name) for name, _ in known)


def test_the_page_of_kinds_trains_one_with_its_allocation():
    exec(compile("\n".join(blocks(ROOT / "docs/kinds.md")), "kinds.md", "exec"), {"__name__": "page"})


@pytest.mark.slow
def test_the_page_about_migration_runs_from_top_to_bottom(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "page"}
    exec(compile("\n".join(blocks(ROOT / "docs/migration.md")), "migration.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "trainable params: 5,760 ||" in printed
    assert "lorafx does not implement this yet, and will not ignore it: megatron_config={'fp16': True}" in printed


def test_the_page_about_quantised_bases_runs_from_top_to_bottom(capsys):
    pytest.importorskip("bitsandbytes")
    exec(compile("\n".join(blocks(ROOT / "docs/quantised.md")), "quantised.md", "exec"), {"__name__": "page"})
    assert "2 sites" in capsys.readouterr().out


@pytest.mark.slow
def test_the_page_about_several_adapters_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "page"}
    exec(compile("\n".join(blocks(ROOT / "docs/adapters.md")), "adapters.md", "exec"), namespace)
    assert namespace["tokens"].shape[0] == 4 and set(namespace["losses"]) == {"a", "b"}


@pytest.mark.slow
def test_the_page_about_inspecting_runs_from_top_to_bottom(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks(ROOT / "docs/inspecting.md")), "inspecting.md", "exec"), {"__name__": "page"})
    printed = capsys.readouterr().out
    assert printed.startswith("model.layers.1.self_attn.q_proj, in block_0, run by model.layers.0 … model.layers.3")
    assert "lora_linear_6 = lorafx.lora_linear(rms_norm_3, self_attn.q_proj.weight" in printed
    assert "insert_adapters lm_head " in printed and (tmp_path / "graph.html").exists()


def test_the_architecture_page_names_every_module_and_pass():
    page = (ROOT / "docs/architecture.md").read_text()
    import lorafx

    for each in lorafx.passes.default:
        assert f"`{each.name}`" in page
    for room in (ROOT / "lorafx").iterdir():
        if room.is_dir() and room.name not in ("__pycache__", "passes"):
            assert f"`{room.name}/`" in page, room.name
    for file in (ROOT / "lorafx").rglob("*.py"):
        inside = file.relative_to(ROOT / "lorafx").parts
        if len(inside) == 2 and file.stem != "__init__":
            assert f"{file.stem}" in page, f"{file} is not on the page"


def test_the_page_about_performance_has_a_row_for_each_bar():
    page = (ROOT / "docs/performance.md").read_text()
    for case in (*cases.CPU, *cases.CUDA):
        for bar in case.bars:
            assert f"| {case.name} | {bar.contestant} / {bar.reference}, {bar.of} | {bar.limit:.2f} |" in page
    listed = re.findall(r"^\| ([\w-]+) \| [^|/]+ / [^|/]+, (?:time|peak) \|", page, flags=re.MULTILINE)
    assert len(listed) == sum(len(case.bars) for case in (*cases.CPU, *cases.CUDA))


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_site_has_every_page_and_its_reference_every_public_name():
    site = (ROOT / "mkdocs.yml").read_text()
    pages = [file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f": {page}\n" not in site] == []
    reference = "".join(file.read_text() for file in (ROOT / "docs/api").glob("*.md"))
    named = {*re.findall(r"^::: lorafx\.(\w+)$", reference, flags=re.MULTILINE), *kinds.__all__}
    assert [name for name in lorafx.__all__ if name not in named] == []


def test_the_page_of_models_misses_none_and_shows_no_failure():
    page = (ROOT / "docs/models.md").read_text()
    assert [name for name in zoo.ENTRIES if f"| {name} |" not in page] == [] and "failed" not in page
