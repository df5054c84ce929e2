"""Draws the pictures of the documentation again: what a browser makes of the page that `show` writes.

Needs Chromium. Run it as `make pictures`, and look at what has changed before you commit it.
"""

import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from playwright.sync_api import sync_playwright

import lorafx

HERE = Path(__file__).parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def page_of_a_llama(path: Path) -> None:
    """The page of the model that docs/inspecting.md looks at."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=90, num_key_value_heads=2, **sizes)
    lora = lorafx.compile(
        transformers.LlamaForCausalLM(config), lorafx.LoraConfig(r=4, target_modules="all-linear"), random_state=0
    )
    ids = torch.randint(0, 90, (2, 9))
    lora.show("model.layers.1.mlp", input_ids=ids, labels=ids, html=path)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "graph.html"
        page_of_a_llama(path)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        page.goto(path.as_uri())
        page.click("#passes li:has-text('fuse_lora')")
        page.screenshot(path=HERE / "page.png")


if __name__ == "__main__":
    main()
