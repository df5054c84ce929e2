"""Commands: how words are taken, and what comes back."""

import pytest

from lorafx import commands
from lorafx.__main__ import main


def test_help_names_each_command_with_an_example(capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(commands.importlib, "import_module", None)  # the list of all imports none: that takes seconds
        assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n│ {name} " in printed for name in commands.NAMES) and "shard by shard" in printed
    for name in commands.NAMES:
        assert main([name, "--help"]) == 0
        assert f"Example: lorafx {name} " in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_words_that_no_command_takes_are_refused(capsys):
    assert main(["frobnicate"]) == 2 and "No such command 'frobnicate'" in capsys.readouterr().err
    assert main(["info"]) == 2 and "Missing argument" in capsys.readouterr().err


def test_a_command_that_lacks_a_library_says_what_to_install(monkeypatch, capsys):
    def missing(name, package):
        raise ModuleNotFoundError("No module named 'peft'", name="peft")

    monkeypatch.setattr(commands.importlib, "import_module", missing)
    assert main(["bench"]) == 2
    assert capsys.readouterr().err == "bench needs peft: pip install 'lorafx[bench]'\n"


@pytest.mark.slow
def test_show_prints_a_site_and_writes_the_page(on_disk, capsys, tmp_path):
    folder, _ = on_disk
    words = ["show", str(folder / "base"), str(folder / "adapter")]
    assert main([*words, "model.layers.1.mlp.up_proj", "--html", str(tmp_path / "g.html")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("model.layers.1.mlp.up_proj, in block_0") and "lora_linear" in printed.split("now\n")[1]
    assert (tmp_path / "g.html").stat().st_size > 50_000
    assert main([*words, "up_prj"]) == 1
    assert "nearest: " in capsys.readouterr().err
