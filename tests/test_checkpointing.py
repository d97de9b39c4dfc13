"""
The run folder: checkpoints that are whole, damaged, hostile, older or newer than this version; how they are
found; the log; and a run that is taken back to an earlier step.
"""

import copy
import os
import pickle
import shutil
import threading
import zipfile
from argparse import Namespace
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL, assert_refused, cli, log, no_open_files

import checkpointing
import common
import interleave
import train
from checkpointing import (
    CHECKPOINT,
    MAX_SET_ASIDE,
    VERSION,
    Damaged,
    Log,
    Saver,
    copy_out,
    default_name,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_model,
    load_optimizers,
    new_run_folder,
    newest_checkpoint,
    read_log,
    rewind,
    share_path,
    start_from,
    step_of,
    verify_together,
)
from common import Unreadable, UserError
from eval_core import recurrent_losses
from interleave import Schedule
from optim import make_optimizers
from recipes import OptimizerConfig
from test_model import make, tokens


@pytest.fixture
def run(trained, here):
    """The newest checkpoint of a copy of the trained run, to be changed or damaged."""
    shutil.copytree(trained[0] / "runs/d2_shared", "run")
    return find_checkpoint("run")

def edit(path, **changes):
    """Replace entries of a checkpoint, as no script of ours would."""
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | changes, path)

def load_in_every_script(path):
    """What sample.py, eval_core.py and train.py make of a run's newest checkpoint, in this order."""
    return [
        cli("sample.py", "--checkpoint", path.parent),
        cli("eval_core.py", "--checkpoint", path.parent),
        cli("train.py", "--resume", path),
    ]


# -----------------------------------------------------------------------------
# Checkpoints of this version, of older and of newer ones

def test_a_checkpoint_has_the_keys_of_the_schema(trained):
    raw = torch.load(find_checkpoint(trained[0] / "runs/d2_shared"), weights_only=True)
    assert raw.keys() == CHECKPOINT.keys()
    assert raw["version"] == VERSION

@pytest.fixture(params=["layerwise", "recurrent"])
def old_run(request):
    """A run folder that was written before checkpoints had a version, and what that program computed."""
    expected = {
        "layerwise": (6.253376483917236, "def e e e e e e \n"),
        "recurrent": (6.412601470947266, "def f f f f f f \n"),
    }
    return ROOT / f"tests/checkpoints/v0_{request.param}", *expected[request.param]

def test_checkpoints_without_a_version_give_the_same_losses(old_run):
    folder, nats, _ = old_run
    checkpoint = load_checkpoint(find_checkpoint(folder))
    assert checkpoint["version"] == 0
    model = load_model(checkpoint, "cpu")
    idx = torch.arange(32).view(2, 16) * 8
    losses = recurrent_losses(model, idx, idx.roll(-1, 1))
    assert losses.mean().item() == pytest.approx(nats, abs=1e-6)

def test_checkpoints_without_a_version_give_the_same_text(old_run):
    folder, _, text = old_run
    code, out, err = cli("sample.py", "--checkpoint", folder, "--prompt", "def ", "--temperature", 0,
                         "--max-new-tokens", 12, "--device", "cpu")
    assert code == 0, err
    assert out == text

def test_checkpoints_without_a_version_have_their_optimizers(old_run):
    path = find_checkpoint(old_run[0])
    checkpoint = load_checkpoint(path)
    model = load_model(checkpoint, "cpu")
    optimizers = make_optimizers(model, OptimizerConfig())
    load_optimizers(optimizers, checkpoint, path)
    for optimizer, saved in zip(optimizers, checkpoint["optimizers"], strict=True):
        state = optimizer.state_dict()["state"]
        assert state.keys() == saved["state"].keys() and state
        for key, theirs in saved["state"].items():
            for name, value in theirs.items():
                torch.testing.assert_close(state[key][name], value, rtol=0, atol=0)

@pytest.mark.parametrize("name", ["v1_shared", "v2_two_processes", "v3_two_processes"])
def test_runs_of_every_version_go_on(name, here):
    """From their newest checkpoint to their end, on one process, as they did then: their logs say how."""
    shutil.copytree(ROOT / f"tests/checkpoints/{name}", "run")
    shutil.copytree(ROOT / "tests/checkpoints/data", "data")
    then = [row["loss"] for row in log("run")]
    saved = load_checkpoint(find_checkpoint("run"))
    assert saved["version"] == int(name[1])
    assert saved["commit"] == ("unknown" if name == "v1_shared" else name[:2])
    code, _, err = cli("train.py", "--resume", "run", "--data", "data", "--keep", 1)
    assert code == 0, err
    assert len(then) == saved["args"]["num_iterations"] > saved["step"]
    assert [row["loss"] for row in log("run")] == pytest.approx(then, rel=1e-3)
    now, = list_checkpoints("run")
    assert load_checkpoint(now)["version"] == VERSION
    assert [path.name for path in Path("run").glob("ckpt*")] == [now.name]

def test_there_is_a_checkpoint_of_every_version():
    """A change of the format comes with one: a small run, as in CONTRIBUTING.md."""
    versions = {int(path.name[1]) for path in (ROOT / "tests/checkpoints").glob("v*")}
    assert versions == set(range(VERSION + 1))

@pytest.mark.parametrize("changes", [{}, {"model": None, "shards_sha256": None}])
def test_a_checkpoint_of_a_newer_version_is_refused(changes, run):
    """Whether it has the keys of this version or others."""
    edit(run, version=VERSION + 1, **changes)
    for result in load_in_every_script(run):
        assert_refused(result, f"{run} has version {VERSION + 1}", f"reads versions up to {VERSION}")


def test_a_newer_version_is_not_passed_over(run):
    """It is whole: an older checkpoint must not take its place."""
    torch.save(torch.load(run, weights_only=True), "run/ckpt_0000100.pt")
    edit(run, version=VERSION + 1)
    with pytest.raises(UserError, match="reads versions up to"):
        newest_checkpoint("run")


# -----------------------------------------------------------------------------
# Checkpoints that cannot be read now

def test_what_cannot_be_read_now_is_not_damaged(run):
    """No older checkpoint takes its place, the folder is not taken for an empty one, and nothing changes."""
    torch.save(torch.load(run, weights_only=True), "run/ckpt_0000100.pt")
    before = {path.name: path.stat() for path in Path("run").iterdir()}
    for read in (find_checkpoint, newest_checkpoint, read_log, lambda folder: rewind(Path(folder), -1)):
        with no_open_files(), pytest.raises(Unreadable, match="cannot read run.*Too many open files"):
            read("run")
    for verify in (False, True):
        with no_open_files(), pytest.raises(Unreadable, match="cannot read .*150.pt .Too many open files"):
            load_checkpoint(run, verify)
    assert {path.name: path.stat() for path in Path("run").iterdir()} == before

def test_a_pipe_in_the_place_of_a_checkpoint_is_not_waited_for(run):
    os.mkfifo("run/ckpt_0000200.pt")
    with pytest.raises(Unreadable, match="cannot read run/ckpt_0000200.pt: it is a pipe"):
        newest_checkpoint("run")

def test_a_path_that_torch_cannot_open_is_not_damage(run):
    before = sorted(os.listdir("run"))
    os.rename("run", "caf\udce9")
    with pytest.raises(UserError, match="which is not UTF-8: rename the folder"):
        newest_checkpoint("caf\udce9")
    assert sorted(os.listdir("caf\udce9")) == before

def test_resuming_stops_at_a_checkpoint_that_cannot_be_read_now(run, monkeypatch):
    torch.save(torch.load(run, weights_only=True), "run/ckpt_0000100.pt")
    load = torch.load

    def failing_load(path, **options):
        if path == run:
            raise RuntimeError(f"unable to mmap 99 bytes from file <{path}>: Cannot allocate memory (12)")
        return load(path, **options)

    monkeypatch.setattr(torch, "load", failing_load)
    assert_refused(cli("train.py", "--resume", "run"), f"cannot read {run} (Cannot allocate memory)")
    assert sorted(path.name for path in Path("run").glob("ckpt_*")) == ["ckpt_0000100.pt", "ckpt_0000150.pt"]


# -----------------------------------------------------------------------------
# Damaged and hostile checkpoints

@pytest.mark.parametrize("size", [0, 100, 100000])
def test_a_truncated_checkpoint(size, run):
    run.write_bytes(run.read_bytes()[:size])
    for result in load_in_every_script(run):
        assert_refused(result, "ckpt_0000150.pt is damaged")

def test_a_compressed_checkpoint(run):
    """torch would not notice, and read tensors from the wrong places."""
    with zipfile.ZipFile(run) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(run, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in records.items():
            archive.writestr(name, raw)
    with pytest.raises(Damaged, match="is compressed, which torch does not do"):
        load_checkpoint(run)

def test_a_file_of_another_program(run):
    torch.save({"weights": torch.zeros(3)}, run)
    for result in load_in_every_script(run):
        assert_refused(result, "is damaged or no checkpoint of nanolrt")

@pytest.mark.parametrize("changes", [
    dict(args=[]),
    dict(step="4"),
    dict(step=-1),
    dict(rows_seen=2**70),
    dict(seconds=float("nan")),
    dict(optimizers={}),
    dict(schedule={"kind": "x"}),
    dict(config={"n_embd": 5}),
    dict(version="1"),
    dict(version=-1),
    dict(version=True),
    dict(version=torch.ones(2)),
    dict(step=True),
    dict(args={"data": 3}),
    dict(args={"data": "a\0b"}),
    dict(model={"wte.weight": torch.ones(2, dtype=torch.int64)}),
    dict(model={"wte.weight": "x"}),
])
def test_a_checkpoint_with_odd_entries(changes, run):
    edit(run, **changes)
    for result in load_in_every_script(run):
        assert_refused(result, "is damaged or no checkpoint of nanolrt")

@pytest.mark.parametrize("key, changes", [
    ("config", dict(n_layer=2.0)),
    ("config", dict(n_layer=10**9)),  # would be built for hours
    ("config", dict(sequence_len=10**9)),
    ("config", dict(vocab_size=True)),
    ("config", dict(vocab_size=10**30)),
    ("config", dict(source_layer=0.0)),
    ("config", dict(dest_layers=[0, 1.0])),
    ("config", dict(smear=1)),
    ("config", dict(rotary_base=True)),
    ("schedule", dict(subsets=2.0)),
    ("schedule", dict(kind="refine", refinements=10**9)),
    ("schedule", dict(kind="draft", drafts=10**9)),
    ("schedule", dict(kv_refresh="no")),
    ("schedule", dict(loss_weights=[1.0])),
])
def test_settings_of_another_type_or_beyond_all_bounds(key, changes, run):
    edit(run, **{key: load_checkpoint(run)[key] | changes})
    with pytest.raises(UserError, match="is damaged or no checkpoint of nanolrt"):
        load_checkpoint(run)

def test_whole_numbers_are_numbers(run):
    config = load_checkpoint(run)["config"] | dict(rotary_base=10000, value_gate=2)
    edit(run, config=config)
    assert load_checkpoint(run)["config"] == config

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_has_diverged_says_nothing(value, run):
    weights = torch.load(run, weights_only=True)["model"]  # all of it, as it will be written over
    weights["wte.weight"][3, 1] = value
    edit(run, model=weights)
    for result in load_in_every_script(run)[:2]:
        assert_refused(result, "wte.weight of the checkpoint after step 150 is not finite")

def test_a_pipe_under_the_name_of_a_checkpoint(run):
    os.mkfifo("run/ckpt_0000999.pt")
    results = load_in_every_script(Path("run/ckpt_0000999.pt"))[:2]
    for result in (*results, cli("train.py", "--resume", "run")):
        assert_refused(result, "ckpt_0000999.pt", "regular file")

@pytest.mark.parametrize("old, new", [
    # what is --schedule draft today
    (dict(kind="refine", subsets=2, refinements=2, forward_passes=2, loss_weights=None),
     Schedule("draft", refinements=2, drafts=2)),
    # a model is scored by the passes, whichever of them ran forward only
    (dict(kind="interleaved", subsets=4, refinements=3, forward_passes=1, loss_weights=None),
     Schedule(subsets=4)),
    (dict(kind="refine", subsets=2, refinements=3, forward_passes=1, loss_weights=None), Schedule("refine")),
])
def test_a_schedule_from_when_forward_passes_had_a_number_of_their_own(old, new, run):
    edit(run, schedule=old | dict(chunk=64, kv_refresh=False, detach=False))
    assert Schedule(**load_checkpoint(run)["schedule"]) == new

@pytest.mark.parametrize("memory", [
    dict(lrt="shared"),
    dict(lrt="layerwise", dest_layers=[1, 1]),
    dict(lrt="shared", inject="input"),
    dict(lrt="shared", first_memory="embedding", value_embeds="none"),
])
@torch.no_grad()
def test_new_memory_changes_nothing_at_first(memory):
    """A model with memory that starts from a plain one, of random weights, computes what that does."""
    value_embeds = memory.get("value_embeds", "alternate")
    plain = make(lrt="none", value_embeds=value_embeds)
    model = make(seed=1, **dict(value_embeds=value_embeds) | memory)
    start_from(model, dict(model=plain.state_dict()), "x")
    idx, _ = tokens(9)
    (_, expected, _), = interleave.run(plain, idx, [range(9)])
    for _, hidden, _ in interleave.run(model, idx, [range(9)] * 3):
        torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-12)

def test_a_checkpoint_under_the_name_of_another_step(run):
    """A copy of an older one, renamed, would take the run back and set the newest aside."""
    copied = shutil.copy("run/ckpt_0000100.pt", "run/ckpt_0000999.pt")
    with pytest.raises(UserError, match="ckpt_0000999.pt is damaged .* of step 100"):
        load_checkpoint(copied)
    assert newest_checkpoint("run")[0] == run
    best = shutil.copy("run/ckpt_0000100.pt", "run/best.pt")  # any other name says nothing
    assert newest_checkpoint(best)[1]["step"] == 100

@pytest.mark.parametrize("optimizers", [[{}, {}], []])
def test_optimizers_that_do_not_fit(optimizers, run):
    edit(run, optimizers=optimizers)
    resumed = load_in_every_script(run)[2]
    assert_refused(resumed, "the optimizer state of run")

def test_weights_of_another_configuration(run):
    wider = load_checkpoint(run)["config"] | {"n_embd": 48, "n_head": 3, "n_kv_head": 3}
    edit(run, config=wider)
    for result in load_in_every_script(run)[:2]:
        assert_refused(result, "not of its own configuration")

def test_no_weights(run):
    edit(run, model={})
    for result in load_in_every_script(run):
        assert_refused(result, "not of its own configuration")

def test_a_checkpoint_runs_no_code(here):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("pwned",)

    (here / "run").mkdir()
    torch.save({"model": Evil(), "step": 1}, "run/ckpt_0000001.pt")
    assert_refused(cli("sample.py", "--checkpoint", "run"), "is damaged or no checkpoint")
    assert not (here / "pwned").exists()


# -----------------------------------------------------------------------------
# Writing in the background

class Disk:
    """Stands in for write_tmp(): writes when it is told to, and fails if it is told to."""

    def __init__(self, monkeypatch):
        self.may_write = threading.Event()
        self.error = None
        self.writing = 0  # how many are at it
        self.write_tmp = checkpointing.write_tmp
        monkeypatch.setattr(checkpointing, "write_tmp", self)

    def __call__(self, path, write):
        self.writing += 1
        assert self.writing == 1
        assert self.may_write.wait(60)
        self.writing -= 1
        if self.error is not None:
            raise self.error
        return self.write_tmp(path, write)

class Training:
    """A model of one matrix with AdamW, and what a Saver needs to know about it."""

    def __init__(self, folder, keep=9):
        self.model = torch.nn.Linear(3, 3)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.saver = Saver(folder, Log(folder, run_id="x"), keep)
        self.step = 0

    def train(self):
        self.model.weight.grad = torch.full((3, 3), float(self.step + 1))
        self.saver.wait_for_copy()
        self.optimizer.step()
        self.step += 1

    def save(self, final=False):
        about = {key: kind() for key, kind in CHECKPOINT.items() if key not in
                 ("version", "optimizers", "shares", "step", "save_id", "torch_rng")}
        about |= dict(config=TINY_CONFIG, schedule=asdict(Schedule()), model=self.model.state_dict())
        self.saver.save([self.optimizer], self.step, final, torch_rng=torch.get_rng_state(), **about)

    def state(self):
        """A copy of weights and optimizer state."""
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()["state"]))

TINY_CONFIG = dict(sequence_len=8, vocab_size=9, n_layer=1, n_head=1, n_kv_head=1, n_embd=8)

def assert_holds(path, state):
    """Weights and optimizer state of a checkpoint are these, bit for bit."""
    checkpoint = load_checkpoint(path)
    weights, optimizer_state = state
    for name, x in weights.items():
        assert torch.equal(checkpoint["model"][name], x)
    saved = checkpoint["optimizers"][0]["state"]
    assert saved.keys() == optimizer_state.keys() and saved
    for i, tensors in optimizer_state.items():
        for name, x in tensors.items():
            assert torch.equal(saved[i][name], x)

def test_training_goes_on_while_a_checkpoint_is_written(here, monkeypatch):
    """What is written is the state between two steps, however long it takes; until then there is nothing."""
    disk = Disk(monkeypatch)
    training = Training(here)
    training.train()
    first = training.state()
    training.save()
    for _ in range(3):
        training.train()
    assert list_checkpoints(here) == []
    disk.may_write.set()
    training.saver.wait()
    assert_holds(here / "ckpt_0000001.pt", first)

    # the second copy goes into the same memory, and not before the first is written
    disk.may_write.clear()
    second = training.state()
    training.save()
    training.train()
    threading.Timer(0.2, disk.may_write.set).start()
    third = training.state()
    training.save()
    training.train()
    training.saver.wait()
    assert_holds(here / "ckpt_0000004.pt", second)
    assert_holds(here / "ckpt_0000005.pt", third)
    assert_holds(here / "ckpt_0000001.pt", first)
    assert not list(here.glob("*.tmp"))

def test_a_copy_is_made_beside_the_next_step(here, monkeypatch):
    """save() does not wait for it; who changes the weights does."""
    may_copy = threading.Event()
    finish_copy = Saver.finish_copy

    def held_up(self, copies):
        may_copy.wait(10)
        finish_copy(self, copies)

    monkeypatch.setattr(Saver, "finish_copy", held_up)
    training = Training(here)
    training.train()
    saved = training.state()
    training.save()
    assert not training.saver.copied.is_set()
    threading.Timer(0.2, may_copy.set).start()
    training.train()
    training.saver.wait()
    assert_holds(here / "ckpt_0000001.pt", saved)

def test_a_copy_that_fails_is_raised(here, monkeypatch):
    """And nobody waits for it for ever."""
    def copy_wrongly(value, buffers, copies, place=()):
        copies.append((torch.zeros(2), torch.zeros(3)))
        return copy_out(value, buffers, copies, place)

    monkeypatch.setattr(checkpointing, "copy_out", copy_wrongly)
    training = Training(here)
    training.save()
    assert training.saver.copied.wait(60)
    with pytest.raises(RuntimeError, match="size of tensor"):
        training.saver.wait()

def test_states_are_not_gathered(here, monkeypatch):
    """What ranks tell each other when they save is small: each writes what it holds."""
    sent = []

    def noting(value, group=None):
        sent.append(len(pickle.dumps(value)))
        return [value]

    monkeypatch.setattr(checkpointing, "from_all_ranks", noting)
    training = Training(here)
    training.train()
    training.save(final=True)
    assert len(sent) == 3 and max(sent) < 100

def test_a_final_checkpoint_is_waited_for(here, monkeypatch):
    disk = Disk(monkeypatch)
    training = Training(here)
    training.train()
    threading.Timer(0.2, disk.may_write.set).start()
    training.save(final=True)
    assert [path.name for path in list_checkpoints(here)] == ["ckpt_0000001.pt"]

def test_a_checkpoint_is_written_where_no_thread_can_be_started(here, monkeypatch):
    """As in a container whose number of processes is limited: training waits for it."""
    def refuse(thread):
        raise RuntimeError(common.NO_MORE_THREADS)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    training = Training(here)
    for _ in range(2):
        training.train()
        training.save()
        assert_holds(here / f"ckpt_000000{training.step}.pt", training.state())
    training.saver.wait()

def test_a_checkpoint_that_is_not_written_is_said_and_the_next_one_tried(here, monkeypatch, capsys):
    disk = Disk(monkeypatch)
    disk.may_write.set()
    disk.error = OSError(28, "No space left on device")
    training = Training(here)
    training.train()
    training.save()
    training.saver.wait()
    assert "warning: step 1 was not saved: cannot write" in capsys.readouterr().out
    with pytest.raises(UserError, match="step 1 was not saved: .*No space left.*; make room, then --re"):
        training.save(final=True)
    assert capsys.readouterr().out == ""
    disk.error = None
    training.train()
    training.save(final=True)
    assert [path.name for path in list_checkpoints(here)] == ["ckpt_0000002.pt"]

def test_what_breaks_in_the_thread_is_raised(here, monkeypatch):
    """As when another rank is gone, and they cannot agree."""
    def broken(*args):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(checkpointing, "from_all_ranks", broken)
    training = Training(here)
    training.save()
    with pytest.raises(RuntimeError, match="closed by peer"):
        training.save()

def test_old_checkpoints_are_removed_when_a_newer_one_is_known_to_be_good(here):
    """With --keep 1 there are two until the evaluation of the newer one."""
    training = Training(here, keep=1)

    def names():
        training.saver.wait()
        return [step_of(path) for path in list_checkpoints(here)]

    for step in range(1, 5):
        training.train()
        training.save()
        assert names() == [step - 1, step] if step > 1 else [step]
        training.saver.remove_old(good=step)
        assert names() == [step]

    # the evaluation may end before the writing
    training.train()
    training.saver.thread = blocked = threading.Thread(target=lambda: None)
    blocked.start()
    training.save()
    training.saver.remove_old(good=5)
    assert names() == [5]

def test_minutes(here, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(checkpointing.time, "monotonic", lambda: clock[0])
    saver = Saver(here, Log(here), keep=1)
    assert not saver.minutes_over(2)
    clock[0] += 121
    assert saver.minutes_over(2)
    assert not saver.minutes_over(0)
    saver.save([], step=1, final=False)
    assert not saver.minutes_over(2)


# -----------------------------------------------------------------------------
# Checkpoints in several files

@pytest.fixture
def shared_run(here):
    """A copy of a run on two processes: checkpoints of steps 4 and 8, each with a share."""
    shutil.copytree(ROOT / "tests/checkpoints/v2_two_processes", "run")
    return Path("run")

def test_the_shares_of_a_checkpoint_belong_to_it(shared_run):
    """A share that is missing, damaged or of another save makes a checkpoint that is passed over."""
    newest, older = shared_run / "ckpt_0000008.pt", shared_run / "ckpt_0000004.pt"
    share = share_path(newest, 1)
    whole = share.read_bytes()
    state = load_checkpoint(newest, shares=True)["optimizers"][1]["state"]
    assert len(state) > len(load_checkpoint(newest)["optimizers"][1]["state"]) > 0

    def other_save():
        edit(share, save_id="another")

    def other_rank():
        edit(share, rank=2)

    def cut():
        os.truncate(share, 1000)

    def flip():
        raw = bytearray(whole)
        raw[whole.index(b"PK", 2000) - 300] ^= 1
        share.write_bytes(raw)

    for damage, words in [
        (share.unlink, "ckpt_0000008.share_1.pt is missing"),
        (other_save, "does not belong to"),
        (other_rank, "does not belong to"),
        (cut, "is damaged"),
        (flip, "is damaged"),
    ]:
        share.write_bytes(whole)
        damage()
        with pytest.raises(Damaged, match=words):
            load_checkpoint(newest, shares=True)
        assert load_checkpoint(newest)["step"] == 8  # generation needs no shares
    share.unlink()
    assert newest_checkpoint("run")[0] == older

def test_checkpoints_are_moved_and_removed_with_their_shares(shared_run):
    rewind(shared_run, 4)
    assert [path.name for path in sorted((shared_run / "set_aside").iterdir())] == [
        "ckpt_0000008.pt", "ckpt_0000008.share_1.pt"]
    assert load_checkpoint(shared_run / "set_aside/ckpt_0000008.pt", shares=True)["step"] == 8
    (shared_run / "ckpt_0000005.share_1.pt").touch()
    (shared_run / "ckpt_0000005.share_2.pt.tmp").touch()
    rewind(shared_run, 4)
    assert [path.name for path in sorted(shared_run.glob("ckpt*"))] == [
        "ckpt_0000004.pt", "ckpt_0000004.share_1.pt"]
    checkpointing.remove_checkpoint(shared_run / "ckpt_0000004.pt")
    assert not list(shared_run.glob("ckpt*"))

def test_every_rank_verifies_a_part(shared_run, monkeypatch):
    """Together all of it, and none of it twice; what is found on one rank is known on all."""
    path = shared_run / "ckpt_0000008.pt"
    checkpoint = load_checkpoint(path, shares=True)
    files = [path, share_path(path, 1)]
    n_records = sum(len(zipfile.ZipFile(file).infolist()) for file in files)
    read = Counter()
    zip_open = zipfile.ZipFile.open

    def noting_open(archive, info, *args):
        read[archive.filename, info.filename] += 1
        return zip_open(archive, info, *args)

    monkeypatch.setattr(zipfile.ZipFile, "open", noting_open)
    for rank in range(3):
        monkeypatch.setattr(checkpointing, "rank_and_world_size", lambda rank=rank: (rank, 3))
        before = read.total()
        assert verify_together(path, checkpoint) is None
        assert n_records // 3 <= read.total() - before <= n_records // 3 + 1
    assert len(read) == n_records and set(read.values()) == {1}

    monkeypatch.setattr(checkpointing, "from_all_ranks", lambda error, group: [error, "of rank 1"])
    assert "of rank 1" in str(verify_together(path, checkpoint))


def test_tensors_are_read_once(shared_run, monkeypatch):
    """Not by every rank on its own, before all of them verify the checkpoint together."""
    read = Counter()
    zip_open = zipfile.ZipFile.open

    def noting_open(archive, info, *args):
        read["/data/" in info.filename] += 1
        return zip_open(archive, info, *args)

    monkeypatch.setattr(zipfile.ZipFile, "open", noting_open)
    for path in (shared_run, shared_run / "ckpt_0000008.pt"):
        newest_checkpoint(path)
    assert read[False] > 0 and read[True] == 0

def test_the_random_state_goes_on(run):
    """Nothing in training draws from it, so far."""
    checkpoint = load_checkpoint(run)
    model = load_model(checkpoint, "cpu")
    checkpoint["torch_rng"] = torch.Generator().manual_seed(7).get_state()
    train.resume(checkpoint, run, model, make_optimizers(model, OptimizerConfig()))
    assert torch.equal(torch.get_rng_state(), checkpoint["torch_rng"])


# -----------------------------------------------------------------------------
# Finding checkpoints, making folders

def touch(path, mtime):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (mtime, mtime))

def test_find_checkpoint(here):
    touch("runs/a/ckpt_0000010.pt", mtime=3)
    touch("runs/a/ckpt_0000009.pt", mtime=4)
    touch("runs/b/ckpt_0000100.pt", mtime=2)
    touch("runs/b/ckpt_0000200.pt.tmp", mtime=5)
    Path("runs/b/ckpt_0000001.pt").symlink_to("gone")  # as one that a run removes just now
    assert find_checkpoint() == Path("runs/a/ckpt_0000009.pt")  # written last, of all runs
    assert find_checkpoint("runs/a") == Path("runs/a/ckpt_0000010.pt")  # most steps, of this run
    assert find_checkpoint("runs/b") == Path("runs/b/ckpt_0000100.pt")
    assert find_checkpoint("runs/a/ckpt_0000009.pt") == Path("runs/a/ckpt_0000009.pt")

def test_no_checkpoint(here):
    (here / "empty").mkdir()
    assert_refused(cli("sample.py", "--checkpoint", "empty"), "no checkpoint in empty")
    assert_refused(cli("sample.py", "--checkpoint", "nowhere"), "no such run or checkpoint: nowhere")
    assert_refused(cli("sample.py"), "no run in runs/", "train.py")

@pytest.mark.parametrize("arch, lrt, name", [
    ("gpt", None, "d4_shared"),
    ("gpt", "layerwise", "d4_layerwise"),
    ("recurrent", None, "d4_recurrent"),
])
def test_default_name(arch, lrt, name):
    assert default_name(Namespace(depth=4, arch=arch, lrt=lrt)) == name

def test_run_folders_are_numbered_or_named(here):
    folders = [new_run_folder("runs", None, "d2") for _ in range(3)]
    assert folders == [Path("runs/d2"), Path("runs/d2_2"), Path("runs/d2_3")]
    assert new_run_folder("runs", "x", "d2") == Path("runs/x")
    with pytest.raises(UserError, match="runs/x exists: go on with it by --resume runs/x"):
        new_run_folder("runs", "x", "d2")
    assert new_run_folder("runs", "x", "d2", exist_ok=True) == Path("runs/x")
    (here / "file").touch()
    with pytest.raises(UserError, match="cannot make file/d2"):
        new_run_folder("file", None, "d2")
    (here / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(UserError, match=f"{name} is no folder: give another --name"):
            new_run_folder(".", name, "d2", exist_ok=True)


# -----------------------------------------------------------------------------
# The log

class SmallDisk:
    """A file on a disk with `room` bytes left."""

    def __init__(self, file, room):
        self.file = file
        self.room = room

    def write(self, raw):
        if self.room == 0:
            raise OSError(28, "No space left on device")
        written = self.file.write(raw[:self.room])
        self.room -= written
        return written

    def fileno(self):
        return self.file.fileno()

def test_what_a_full_disk_does_not_take_is_logged_later(here):
    rows = [dict(kind="train", step=step) for step in range(4)]
    run_log = Log(here)
    run_log.add(**rows[0])
    run_log.file = disk = SmallDisk(run_log.file, room=10)
    run_log.add(**rows[1])  # a part of it
    run_log.add(**rows[2])  # nothing
    assert read_log(here) == rows[:1]
    assert len((here / "log.jsonl").read_bytes().splitlines()[1]) == 10
    with pytest.raises(OSError, match="No space left"):
        run_log.sync()
    disk.room = 10**6
    run_log.add(**rows[3])
    assert read_log(here) == rows
    run_log.sync()

def test_a_checkpoint_is_never_ahead_of_its_log(here):
    run_log = Log(here)
    run_log.file = SmallDisk(run_log.file, room=0)
    run_log.add(kind="train", step=0)
    with pytest.raises(UserError, match="step 1 was not saved: .*No space left"):
        Saver(here, run_log, keep=1).save([], step=1, final=True)
    assert [path.name for path in here.iterdir()] == ["log.jsonl"]

def test_the_log_is_on_the_disk_before_its_checkpoint(here, monkeypatch):
    calls = []
    monkeypatch.setattr(checkpointing, "fsync", lambda fd: calls.append(os.readlink(f"/proc/self/fd/{fd}")))
    monkeypatch.setattr(checkpointing, "publish", lambda tmp, path: calls.append(str(path)))
    training = Training(here)
    training.save(final=True)
    assert calls == [str(here / "log.jsonl"), str(here / "ckpt_0000000.pt")]

def test_only_rank_0_logs(here):
    Log(here, rank=1).add(kind="train", step=0)
    assert list(here.iterdir()) == []

def test_lines_that_are_no_rows_are_left_out(here):
    assert read_log(here) == []
    (here / "log.jsonl").write_bytes(b'[1]\n\xff\n{"kind": "eval", "step": 3}\n{"step": 4}\n3\n{"kind": "tr')
    assert read_log(here) == [{"kind": "eval", "step": 3}]
    steps = [b'"4"', b"null", b"-1", b"true", b"4.5", b"NaN", b"9" * 30, b"[" * 100_000]
    (here / "log.jsonl").write_bytes(b"".join(b'{"kind": "eval", "step": %s}\n' % step for step in steps))
    assert read_log(here) == []
    assert rewind(here, 4) == -1


# -----------------------------------------------------------------------------
# Going back

def test_rewind(here):
    """Evaluations at the step are kept: they came before its checkpoint, and its training step after it."""
    run_log = Log(here)
    for step in range(6):
        if step % 2 == 0:
            run_log.add(kind="eval", step=step)
        run_log.add(kind="train", step=step)
    for name in ("ckpt_0000002.pt", "ckpt_0000004.pt", "ckpt_0000005.pt", "ckpt_0000002.pt.tmp"):
        (here / name).touch()

    assert rewind(here, 4) == 4
    assert [row["step"] for row in log(here)] == [0, 1, 2, 3]
    assert [row["step"] for row in log(here, "eval")] == [0, 2, 4]
    assert sorted(path.name for path in here.glob("ckpt*")) == ["ckpt_0000002.pt", "ckpt_0000004.pt"]

    assert rewind(here, -1) == -1  # a run that ended before its first checkpoint
    assert read_log(here) == [] and not list(here.glob("ckpt*"))

def test_what_is_in_the_way_of_going_back(here):
    """A folder that bears the name of a half-written checkpoint; a file that bears that of the folder."""
    (here / "ckpt_0000003.pt.tmp").mkdir()
    assert rewind(here, 3) == -1
    (here / "ckpt_0000004.pt").write_text("newer")
    (here / "set_aside").touch()
    with pytest.raises(UserError, match="cannot move .*ckpt_0000004.pt into .*set_aside"):
        rewind(here, 3)
    assert (here / "ckpt_0000004.pt").read_text() == "newer"

def test_newer_checkpoints_are_set_aside(here):
    """Not deleted; a bounded number of them, the last that were; and nothing finds them there."""
    for step in (1, 2, 3, 4, 12345678):
        (here / f"ckpt_{step:07d}.pt").write_text(str(step))
    (here / "ckpt_best.pt").write_text("the user's own")
    assert find_checkpoint(here).name == "ckpt_12345678.pt"
    rewind(here, 3)
    assert find_checkpoint(here).name == "ckpt_0000003.pt"
    rewind(here, 2)
    aside = here / "set_aside"
    names = ["ckpt_0000003.pt", "ckpt_12345678.pt"]
    assert sorted(path.name for path in aside.iterdir()) == names
    assert len(names) == MAX_SET_ASIDE
    assert (aside / "ckpt_0000003.pt").read_text() == "3"
    assert sorted(path.name for path in here.glob("*.pt")) == [
        "ckpt_0000001.pt", "ckpt_0000002.pt", "ckpt_best.pt"]
    for path in (aside, aside / "ckpt_0000003.pt"):
        with pytest.raises(UserError, match="was set aside: move it to"):
            newest_checkpoint(path)

def test_going_back_to_an_older_checkpoint(data, here):
    """What came after it is done again, not mixed with the new; a log that was cut short is no obstacle."""
    run = here / "runs/x"
    code, _, err = cli("train.py", "--data", data, *SMALL, "--num-iterations", 9, "--eval-every", 3,
                       "--save-every", 3, "--keep", 9, "--name", "x")
    assert code == 0, err
    whole = [row["loss"] for row in log(run)]
    with open(run / "log.jsonl", "ab") as f:
        f.write(b'[1]\n\xff\n{"kind": "train", "step": 9, "lo')
    (run / "ckpt_0000099.pt.tmp").write_bytes(b"killed")
    code, _, err = cli("train.py", "--resume", "runs/x/ckpt_0000003.pt", "--keep", 1)
    assert code == 0, err
    assert [row["loss"] for row in log(run)] == whole
    assert [row["step"] for row in log(run, "eval")] == [0, 3, 6, 9]
    assert [path.name for path in run.glob("ckpt_*")] == ["ckpt_0000009.pt"]

    (run / "log.jsonl").unlink()
    code, _, err = cli("train.py", "--resume", "runs/x")
    assert code == 0, err
