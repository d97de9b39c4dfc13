"""What several test files share: prepared data, and a folder to work in."""

import importlib
import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Prepared data: a few modules of the standard library, vocabulary 512."""
    from test_cli import shell
    folder = tmp_path_factory.mktemp("corpus")
    texts = [Path(importlib.import_module(name).__file__).read_text("utf-8")
             for name in ("argparse", "ast", "calendar", "configparser", "csv", "datetime", "difflib", "dis", "doctest", "enum")]
    with open(folder / "text.jsonl", "w") as f:
        for text in texts * 3:
            f.write(json.dumps({"text": text}) + "\n")
    done = shell("prepare_data.py", folder / "text.jsonl", "--vocab-size", 512, "--out", folder / "data")
    assert done.returncode == 0, done.stderr
    return folder / "data"

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path
