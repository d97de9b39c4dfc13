"""Fixtures that several test files share: prepared data, a trained run, and a folder to work in."""

import importlib
import json
from pathlib import Path

import pytest

# standard-library modules whose source is the corpus of the tests
MODULES = "argparse ast calendar configparser csv datetime difflib dis doctest enum".split()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Prepared data: a few modules of the standard library, vocabulary 512."""
    from helpers import shell
    folder = tmp_path_factory.mktemp("corpus")
    texts = [Path(importlib.import_module(name).__file__).read_text("utf-8") for name in MODULES]
    with open(folder / "text.jsonl", "w") as f:
        for text in texts * 3:
            f.write(json.dumps({"text": text}) + "\n")
    done = shell("prepare_data.py", folder / "text.jsonl", "--vocab-size", 512, "--out", folder / "data")
    assert done.returncode == 0, done.stderr
    return folder / "data"

@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A folder with a shared LRT in runs/d2_shared, trained for 150 steps, and what its training printed."""
    from helpers import SMALL, shell
    folder = tmp_path_factory.mktemp("trained")
    done = shell("train.py", "--data", data, "--out", folder / "runs", "--lrt", "shared", *SMALL,
                 "--num-iterations", 150, "--eval-every", 50, "--save-every", 100)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout

@pytest.fixture
def here(tmp_path, monkeypatch):
    """A new folder as the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
