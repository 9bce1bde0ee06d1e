"""No text of a data set, a configuration or a checkpoint is ever executed, and none gets into a report unescaped."""

from __future__ import annotations

import ast
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import backmatch
from backmatch.cli import compare as compare_module
from backmatch.cli import train as train_module
from backmatch.cli.compare import compare
from backmatch.cli.data import load_data
from backmatch.cli.protocol import CompareConfig

pytestmark = pytest.mark.timeout(60)

PACKAGE = Path(backmatch.__file__).parent
EXECUTING = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "subprocess", "yaml"}


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def imported(tree: ast.AST) -> set[str]:
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_that_executes_text(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not imported(tree) & FORBIDDEN_MODULES
    for name, call in calls(tree):
        assert name not in EXECUTING
        assert name not in ("os.system", "os.popen", "torch.hub.load", "torch.jit.load")
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("allow_pickle", "False") == "False"
        assert "trust_remote_code" not in given
        if name == "torch.load":
            assert given["weights_only"] == "True"


class Tags(HTMLParser):
    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_class_called_like_a_script_is_text_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = "<script>alert(1)</script>"
    data = replace(load_data("digits", limit=128), class_names=(hostile, *map(str, range(1, 10))))
    monkeypatch.setattr(train_module, "load_data", lambda *args, **settings: data)
    monkeypatch.setattr(compare_module, "_in_own_process", compare_module._train)
    settings = CompareConfig(
        data='"><img src=x onerror=alert(1)>',
        model="mlp",
        width=0.1,
        epochs=1,
        threads=1,
        optimizers=("sgd",),
        lr_factors=(1.0,),
        seeds=(0,),
    )
    compare(replace(settings, out=tmp_path / "out"))
    page = Tags((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert not page.tags & {"script", "img"}
    assert hostile in page.text
    assert settings.data in page.text


def test_the_script_of_a_data_set_is_not_run(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "digits_script"
    folder.mkdir()
    (folder / "digits_script.py").write_text(f"import os; os.mkdir({str(tmp_path / 'trap')!r})")
    with pytest.raises((FileNotFoundError, ValueError), match="digits_script"):
        load_data(str(folder))
    assert not (tmp_path / "trap").exists()
