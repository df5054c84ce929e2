"""README.md as the first page of the documentation, its links made relative to this folder."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """What mkdocs calls with the files that it has found."""
    text = (Path(config.config_file_path).parent / "README.md").read_text("utf-8")
    files.append(File.generated(config, "index.md", content=text.replace("](docs/", "](")))
    return files
