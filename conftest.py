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

@pytest.fixture(scope="module")
def trained_models():
    """A small LRT of each variant that has learnt to continue sequences, so that its memory is used."""
    import torch

    from interleave import Schedule, TrainStep
    from model import GPT, GPTConfig
    models = {}
    for lrt in ("shared", "layerwise"):
        torch.manual_seed(0)
        model = GPT(GPTConfig(sequence_len=64, vocab_size=37, n_layer=4, n_head=2, n_kv_head=2, n_embd=32,
                              lrt=lrt, window_pattern="SL"))
        step = TrainStep(model, Schedule())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        g = torch.Generator().manual_seed(1)
        for _ in range(80):
            steps = torch.randint(7, (8, 65), generator=g).cumsum(1)
            factors = torch.randint(1, 4, (8, 1), generator=g)
            idx = steps * factors % 36
            loss, _ = step(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        models[lrt] = model
    return models

@pytest.fixture
def here(tmp_path, monkeypatch):
    """A new folder as the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
