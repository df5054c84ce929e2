"""Page: one HTML file, opened in a browser as people do."""

import json
import re
import shutil

import pytest
import torch
from graphs import Chain, adapted
from modules import Stack

from lorafx.showing import History, Line, Part, Stage, heats, write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def content_of(path):
    return json.loads(re.search(r'id="content">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)[1])


@pytest.fixture(scope="module")
def page_of_a_stack(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "new" / "graph.html"
    lora = adapted(Stack(), target_modules=["up"], r=2)
    lora.show("layers.1.up", torch.randn(5, 4), html=path)
    return lora, path


def test_the_page_is_one_file_without_addresses(page_of_a_stack):
    _, path = page_of_a_stack
    assert [each.name for each in path.parent.iterdir()] == ["graph.html"]
    text = path.read_text("utf-8")
    assert not re.search(r"""(src|href)\s*=|@import|fetch\(|https?://(?!www\.w3\.org/)""", text)
    assert not re.search(r"/\*[\w.]+\*/", text)  # every place for an asset was filled


def test_equal_parts_and_lines_of_stages_are_written_once(page_of_a_stack):
    _, path = page_of_a_stack
    content = content_of(path)
    assert content["open"] == {"part": "block_0", "module": "up"}
    assert len(content["parts"]) < len(content["stages"]) * len(content["stages"][0]["parts"])
    assert len({json.dumps(line) for line in content["lines"]}) == len(content["lines"])


def test_heats_are_the_norms_of_the_changes():
    lora = adapted(Chain(), target_modules=["first", "second"], r=2, lora_alpha=3, init_lora_weights=False)
    found = {heat.site: heat for heat in heats(lora, [*lora._lorafx.adapters.values()])}
    for name, module in (("first", lora.first), ("second", lora.second)):
        a, b = (m.default.weight.detach().double() for m in (module.lora_A, module.lora_B))
        # norms of entries of float32 below 1, by sums of 4 products
        assert found[name].change == pytest.approx((1.5 * b @ a).norm().item(), rel=16 * torch.finfo(torch.float32).eps)
        assert found[name].shapes["lora_A.weight"] == (2, module.in_features) and found[name].scaling == 1.5


def test_text_of_a_model_cannot_end_the_page(tmp_path):
    line = Line("y", "f(x)", source="</script><script>alert(1)</script>")
    write_page(tmp_path / "page.html", "a <b>", History([Stage("as captured", (Part("the call", ("",), (line,)),))]))
    assert (tmp_path / "page.html").read_text("utf-8").count("alert(1)") == 1
    assert content_of(tmp_path / "page.html")["lines"][0][6] == line.source


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here: opening the page was not tried")
    with api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def opened(browser, path):
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    failures = []
    page.on("pageerror", lambda error: failures.append(error))
    page.on("request", lambda request: failures.append(request.url) if "file://" not in request.url else None)
    page.goto(path.as_uri())
    return page, failures


@pytest.mark.slow
def test_it_opens_steps_folds_searches_and_draws(browser, page_of_a_stack):
    page, failures = opened(browser, page_of_a_stack[1])
    assert "block_0 / up" in page.inner_text("#place")
    assert page.inner_text(".pair .removed .name") and "lora_linear" in page.inner_text("#view")
    page.click("#passes li:has-text('fuse_lora')")
    assert page.locator(".pair .fused").count() == 1 and page.locator(".pair .removed").count() == 5
    page.click("#back")
    assert page.input_value("#after") == str(int(page.input_value("#before")) + 1)
    assert page.locator("#passes li.chosen").inner_text().startswith("elide_dropout")
    page.click("#whole")
    page.click(".group > summary")
    assert page.locator(".group[open]").count() == page.locator(".group").count() - 1
    page.click("[data-tab=graph]")
    assert page.locator("svg g.node.added, svg g.node.fused").count() >= 1
    page.click("[data-tab=heat]")
    assert page.locator("td.hot").count() == 4
    page.click("#tree .module:has-text('the call') >> nth=0")
    page.click("td.hot >> nth=1")
    assert page.inner_text("#place") == "block_0 / up" and page.locator(".pair .removed, .pair .added").count()
    assert page.inner_text(".pair.heads").splitlines() == ["as captured", "after checkpoint_blocks, the last pass"]
    page.fill("#search", "UP.LORA_A")
    assert page.locator("#view .found").count() >= 1
    page.click("#view .found > div")
    assert page.locator("#view .group").count() >= 1 and page.input_value("#search") == ""
    page.hover(".pair .name >> nth=0")
    assert "written by: " in page.inner_text("#tip")
    assert failures == []


@pytest.mark.slow
def test_ten_thousand_operators_open(browser, tmp_path):
    lines = [
        Line(f"v{n}", f"f(v{n - 1})", (f"v{n - 1}",), "(4, 4)", module=f"layers.{n // 300}.m{n // 50}")
        for n in range(10_000)
    ]
    more = [Line("w", "g(v0)", ("v0",), module="layers.0.m0"), *lines[:500], *lines[502:]]
    whole = [Stage(f"pass_{n}", (Part("the call", ("",), tuple(lines if n < 15 else more)),)) for n in range(30)]
    write_page(tmp_path / "page.html", "large", History(whole))
    page, failures = opened(browser, tmp_path / "page.html")
    assert page.locator("#passes li").count() == 29 and "−2 +1" in page.inner_text("#passes")
    assert page.locator(".group.changed[open]").count() == 2  # those without a change stay folded
    assert failures == []
