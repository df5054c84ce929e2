"""README.md as the first page of the documentation, with links relative to this folder; docs/README.md comes second.

Docstrings are read from files, so lorafx is copied to where it is put together as when installed, with `passes/` in it.
"""

import shutil
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_startup(**_: Any) -> None:
    """What mkdocs calls first of all: makes out/package, where mkdocstrings looks if it is there by then."""
    root = Path(__file__).parent.parent
    package = root / "out/package/lorafx"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(root / "lorafx", package)
    shutil.copytree(root / "passes", package / "passes", dirs_exist_ok=True)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """What mkdocs calls with the files that it has found."""
    files.src_uris["README.md"].dest_uri = "tasks.html"
    text = (Path(config.config_file_path).parent / "README.md").read_text("utf-8")
    files.append(File.generated(config, "index.md", content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What mkdocs calls with the text of each page."""
    return markdown.replace("](../README.md", "](index.md")
