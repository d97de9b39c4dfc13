"""
Every protection broken on purpose: a test is done when it fails for what it protects.

    python tests/mutations.py DIR                  all of them, in a copy of the code in DIR, one by one
    python tests/mutations.py DIR --only save      those whose subject or description has this word
    python tests/mutations.py DIR --check          only whether every change still applies

A mutation takes one protection out of the code, or weakens it, and runs the tests that should fail then. What
came of it is in DIR/mutations.jsonl: caught or not. What was caught there is not run again: for that take
another DIR. Those with several processes take half a minute each.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import pytest  # noqa: E402
import torch._dynamo  # noqa: E402, F401 (here once, for all that is forked)
import torch.distributed.fsdp  # noqa: E402, F401

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 400  # that the tests of a mutation may take
CKPT, WATCH, FAULTS = "tests/test_checkpointing.py", "tests/test_watchdog.py", "tests/test_faults.py"
SOUND, SHARD, DATA = "tests/test_soundness.py", "tests/test_sharding.py", "tests/test_dataset.py"
WHOLE, TRAIN, PLAN = "tests/test_integrity.py", "tests/test_train.py", "tests/test_plan.py"

# (subject, what is taken away, file, the code, what it becomes, tests that fail then and a -k expression)
MUTATIONS = [
    # saving in the background
    ("save", "one at a time", "checkpointing.py",
     "        self.wait()\n        self.saved_at", "        self.saved_at", CKPT, "goes_on_while"),
    ("save", "a copy, not the live tensors", "checkpointing.py",
     "        copies.append((buffer, value))\n        return buffer", "        return value", CKPT,
     "goes_on_while"),
    ("save", "the update waits for the copy", "train.py",
     "            saver.wait_for_copy()\n", "", FAULTS, "while_they_are_copied"),
    ("save", "save() itself does not", "checkpointing.py",
     "            self.thread.start()\n", "            self.thread.start()\n            self.copied.wait()\n",
     CKPT, "copy_is_made_beside"),
    ("save", "nobody waits for a copy that failed", "checkpointing.py",
     "        finally:\n            self.copied.set()", "        finally:\n            pass", CKPT,
     "copy_that_fails"),
    ("save", "the last one is waited for", "checkpointing.py",
     "        if final:\n            self.wait()", "        if final:", CKPT, "final_checkpoint"),
    ("save", "a failed write is said", "checkpointing.py",
     '            if self.rank == 0 and not final:\n                say(f"warning: {self.error}',
     '            if False:\n                say(f"warning: {self.error}', CKPT, "not_written_is_said"),
    ("save", "a last save that fails is an error", "checkpointing.py",
     '            if self.error is not None:\n                raise UserError(f"{self.error}, then',
     '            if False:\n                raise UserError(f"{self.error}, then', CKPT,
     "not_written_is_said"),
    ("save", "an error is forgotten when the next save succeeds", "checkpointing.py",
     "            self.together(publish_checkpoint)\n            self.error = None",
     "            self.together(publish_checkpoint)", CKPT, "not_written_is_said"),
    ("save", "what breaks in the thread is raised", "checkpointing.py",
     "        if self.failure is not None:\n            raise self.failure", "        pass", CKPT,
     "breaks_in_the_thread"),
    ("save", "a share of a failed checkpoint is removed", "checkpointing.py",
     "                unlink(tmp)\n                unlink(mine)", "                unlink(tmp)", FAULTS,
     "share_that_cannot"),
    ("save", "the half-written file of a failed checkpoint is removed", "checkpointing.py",
     "                unlink(tmp)\n                unlink(mine)", "                unlink(mine)", FAULTS,
     "share_that_cannot"),
    ("save", "named only when all ranks have written", "checkpointing.py",
     "            self.together(write_file)", "            write_file()", FAULTS, "share_that_cannot"),
    ("save", "written beside, then renamed", "common.py",
     '    tmp = f"{path}.tmp"\n    try:', "    tmp = str(path)\n    try:", FAULTS,
     "killed_at_24 or written_means"),
    ("save", "a file is on the disk before it is renamed", "common.py",
     "            write(f)\n            f.flush()\n            fsync(f.fileno())", "            write(f)",
     FAULTS, "written_means"),
    ("save", "a checkpoint is not ahead of its log", "checkpointing.py",
     "            if error is not None:\n                raise error\n            if log_file",
     "            if log_file", CKPT, "never_ahead"),
    ("save", "the log is on the disk before its checkpoint", "checkpointing.py",
     "                fsync(log_file.fileno())  # a", "                pass  # a", CKPT, "log_is_on"),
    ("save", "the optimizers' states are not gathered", "checkpointing.py",
     "        states = [optimizer.state_dict() for optimizer in optimizers]\n",
     "        states = [optimizer.state_dict() for optimizer in optimizers]\n"
     "        from_all_ranks(states)\n", CKPT, "gather"),
    ("save", "only one's own share of the optimizers' states", "optim.py",
     "        mine = [i for i, owner in enumerate(self.owner) if owner == self.rank and i in state]",
     "        mine = list(state)", FAULTS, "four_processes_go_on"),
    ("save", "the thread's collectives are not training's", "train.py",
     "saver = Saver(folder, log, args.keep, group)", "saver = Saver(folder, log, args.keep)", FAULTS,
     "py_hands_on"),
    ("save", "begun before the evaluation", "train.py",
     "        save_now = save_due and state.step > began\n        if save_now:",
     "        save_now = save_due and state.step > began\n"
     "        if save_now and due(args.eval_every, state.step):\n"
     "            evaluate(model, val_rows, data, plan, args, saver, state.step)\n"
     "        if save_now:", FAULTS, "saved_before_it_is_evaluated"),
    ("save", "a checkpoint whose evaluation is not finite is set aside", "train.py",
     "            set_aside([path for path in list_checkpoints(saver.folder) if step_of(path) == step])",
     "            pass", FAULTS, "evaluation_is_not_finite"),
    ("save", "the newest good one stays", "checkpointing.py",
     "                if path not in known_good[-1:]:", "                if True:", CKPT + " " + FAULTS,
     "known_to_be_good or evaluation_is_not_finite"),
    ("save", "--save-minutes", "train.py",
     "finished or stopping or minutes_over or due(", "finished or stopping or due(", FAULTS,
     "by_the_minute"),
    ("save", "--save-minutes: the clock of rank 0 alone", "train.py",
     "float(rank == 0 and saver.minutes_over(args.save_minutes))",
     "float(saver.minutes_over(args.save_minutes))", FAULTS, "by_the_minute"),
    ("save", "--save-minutes: from the last save on", "checkpointing.py",
     "        self.wait()\n        self.saved_at = time.monotonic()", "        self.wait()", CKPT,
     "test_minutes"),

    # restarting
    ("restart", "the whole checkpoint is verified", "train.py",
     "    args, checkpoint = verify_checkpoint(args, checkpoint, group)\n", "", FAULTS,
     "before_a_damaged_one"),
    ("restart", "every rank verifies a part", "checkpointing.py",
     "mine = records[rank::world_size]", "mine = records", CKPT, "verifies_a_part"),
    ("restart", "what one rank finds all know", "checkpointing.py",
     "    errors = [e for e in from_all_ranks(error, group) if e is not None]",
     "    errors = [e for e in [error] if e is not None]", CKPT, "verifies_a_part"),
    ("restart", "tensors are read once, not by every rank", "checkpointing.py",
     "            checkpoint = load_checkpoint(candidate, shares=True, verify=False)",
     "            checkpoint = load_checkpoint(candidate, shares=True)", CKPT, "read_once"),
    ("restart", "a shard that was verified is not hashed again", "dataset.py",
     "if not stamps.has(*file, vocab_size)], vocab", "], vocab", DATA, "verified_once"),
    ("restart", "the stamp has the file's times", "dataset.py",
     "stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, sha256", "stat.st_size, sha256", DATA,
     "verified_once"),
    ("restart", "the stamp has both times", "dataset.py",
     "stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, sha256", "stat.st_size, stat.st_mtime_ns, sha256",
     DATA, "verified_once"),
    ("restart", "the stamp has the checksum", "dataset.py",
     "stat.st_ctime_ns, sha256, vocab_size]", "stat.st_ctime_ns, vocab_size]", DATA, "verified_once"),
    ("restart", "the stamp is of the file before it was read", "dataset.py",
     "        stamps.add(path.parent, row)",
     "        stamps.add(path.parent, stamps.row_of(path, expected, vocab_size))", DATA, "changes_while"),
    ("restart", "every rank hashes its shards", "dataset.py",
     "        mine = files[rank::world_size]", "        mine = files", DATA, "by_one_rank"),
    ("restart", "shares of shards do not depend on what others have noted", "dataset.py",
     "        mine = files[rank::world_size]  # first: the other ranks may be noting theirs by now\n"
     "        verify_shards([file for file in mine if not stamps.has(*file, vocab_size)], vocab_size, "
     "stamps)",
     "        files = [file for file in files if not stamps.has(*file, vocab_size)]\n"
     "        verify_shards(files[rank::world_size], vocab_size, stamps)", DATA, "different_times"),
    ("restart", "noted in the run where the data may not be written", "dataset.py",
     "            self.unwritten.append(row)", "            pass", DATA, "may_not_be_written"),
    ("restart", "and by train.py", "train.py",
     "    data.stamps.write_to(folder)\n", "", FAULTS, "py_hands_on"),
    ("restart", "no collective of ten minutes waits for it", "train.py",
     "    wait_for_all(patient_group)", "    wait_for_all(group and side_group(TIMEOUT))", FAULTS,
     "py_hands_on"),

    # detection
    ("detect", "a closed connection is a death", "watchdog.py",
     "            if rank is not None and rank.left is None:\n", "            if False:\n", WATCH,
     "dies_is_known and 1-2"),
    ("detect", "keepalive probes", "watchdog.py",
     "                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)",
     "                pass", WATCH, "probed_for"),
    ("detect", "hangs are judged", "watchdog.py",
     "        numbers = hanging(known, now)\n", "        numbers = []\n", WATCH, "stuck_in_python"),
    ("detect", "rank 0 is judged, too", "watchdog.py",
     "            if now - known[0].heard <= SILENT:  # it judges itself", "            if True:", WATCH,
     "stopped_rank_is_known and 0"),
    ("detect", "victims in a collective are not accused", "watchdog.py",
     "        is_behind = rank.progress.count == least\n", "        is_behind = True\n", WATCH,
     "who_hangs"),
    ("detect", "an evaluation, a save, compilation are not timed", "watchdog.py",
     "if is_behind and rank.progress.timed and now", "if is_behind and now", WATCH, "who_hangs"),
    ("detect", "of those behind, the silent one", "watchdog.py",
     "    return silent or late", "    return late", WATCH, "who_hangs"),
    ("detect", "who has left is not waited for", "watchdog.py",
     "for number, rank in ranks.items() if rank.left is None}", "for number, rank in ranks.items()}",
     WATCH, "have_left"),
    ("detect", "the allowance is learnt", "watchdog.py",
     "        allowance = max(LEAST_ALLOWANCE, ALLOWANCE * self.slowest)",
     "        allowance = LEAST_ALLOWANCE", WATCH, "allowance"),
    ("detect", "the first steps of a kind are not timed", "watchdog.py",
     "timed=self.begun[kind] > 2)", "timed=True)", WATCH, "allowance"),
    ("detect", "nothing is learnt behind a save", "watchdog.py",
     "self.begun[kind] > 1 and not self.interrupted", "self.begun[kind] > 1", WATCH, "allowance"),
    ("detect", "train.py says that it saves", "train.py",
     '            watch.between("save", state.step)\n', "", WATCH, "is_said"),
    ("detect", "train.py says that it waits for a copy", "train.py",
     '            watch.between("copy", state.step)\n', "", WATCH, "is_said"),
    ("detect", "train.py says that it evaluates", "train.py",
     '            watch.between("evaluation", state.step)\n', "", WATCH, "is_said"),
    ("detect", "train.py says that it scores CORE", "train.py",
     '            watch.between("CORE", state.step)\n', "", WATCH, "is_said"),
    ("detect", "train.py says that it goes back", "train.py",
     '                watch.between("rewind", state.step)\n', "", WATCH, "is_said"),
    ("detect", "a machine that stands still accuses nobody", "watchdog.py",
     "                self.lost += late", "                pass", WATCH, "stands_still"),
    ("detect", "the line names the place", "watchdog.py",
     "            progress.frame = innermost_frame(self.main_thread)", "            pass", WATCH,
     "stuck_in_python"),
    ("detect", "a hanging rank shows its stack", "watchdog.py",
     "            faulthandler.dump_traceback(2)", "            pass", WATCH, "stuck_in_python"),
    ("detect", "a stopped rank is made to show its stack", "watchdog.py",
     "((1, (signal.SIGUSR1, signal.SIGCONT)), (STACK", "((1, (signal.SIGCONT,)), (STACK", WATCH,
     "stuck_outside_python"),
    ("detect", "a stopped rank is killed", "watchdog.py",
     "(STACK_SECONDS, (signal.SIGKILL,))", "(STACK_SECONDS, ())", WATCH, "stuck_outside_python"),
    ("detect", "one line on a machine", "watchdog.py",
     "        if self.rank == min(innocent or here):\n", "        if True:\n", WATCH,
     "dies_is_known and 2-3 or stuck_in_python"),
    ("detect", "an error waits for the news of another rank's death", "watchdog.py",
     "            time.sleep(PATIENCE)\n", "            pass\n", WATCH, "explains_it"),
    ("detect", "one rank's error ends the others", "watchdog.py",
     "            if rank.reason is not None and now - rank.left > GRACE:", "            if False:", WATCH,
     "told_after_a_while"),
    ("detect", "a stranger is turned away", "watchdog.py",
     'if not isinstance(hello, dict) or hello.get("token") != self.token:', "if False:", WATCH, "stranger"),

    # integrity
    ("integrity", "checksums of a checkpoint's tensors", "checkpointing.py",
     "                if tensors or not is_tensor:", "                if not is_tensor:", WHOLE,
     "refused_or"),
    ("integrity", "checksums of the rest, before anything is believed", "checkpointing.py",
     "        compare_checksums([path], tensors=verify)\n",
     "        if verify:\n            compare_checksums([path])\n", WHOLE, "flags_and_position"),
    ("integrity", "no compressed records", "checkpointing.py",
     "if info.compress_type != zipfile.ZIP_STORED:", "if False:", CKPT, "compressed"),
    ("integrity", "types and values in a checkpoint", "checkpointing.py",
     "        check_content(checkpoint)\n", "", CKPT, "odd_entries"),
    ("integrity", "a share belongs to its checkpoint", "checkpointing.py",
     '            if share["save_id"] != checkpoint["save_id"] or share["rank"] != rank:',
     "            if False:", CKPT, "belong_to_it"),
    ("integrity", "the step in a checkpoint's name", "checkpointing.py",
     '        if step_of(path) not in (None, checkpoint["step"]):', "        if False:", CKPT,
     "another_step"),
    ("integrity", "nothing in a checkpoint is executed", "checkpointing.py",
     "weights_only=True, mmap=True", "weights_only=False, mmap=True", CKPT, "runs_no_code"),
    ("integrity", "a checkpoint of another run", "checkpointing.py",
     '    if there is not None and there != checkpoint["run_id"]:', "    if False:", FAULTS,
     "of_another_run_is_not"),
    ("integrity", "checksums of shards", "dataset.py",
     "        if sha256_file(path) != expected:", "        if False:", DATA, "flipped_bit"),
    ("integrity", "tokens beyond the vocabulary", "dataset.py",
     "        if largest >= vocab_size:", "        if False:", DATA, "beyond_the_vocabulary"),
    ("integrity", "the checksum of the tokenizer", "dataset.py",
     "    same_files = tokenizer_sha256(folder) == tokenizer_digest", "    same_files = True",
     DATA + " " + WHOLE, "changed_files or refused_or"),
    ("integrity", "the bytes of the tokens", "dataset.py",
     '    if not np.array_equal(load_shard(folder / "token_bytes.npy"), sizes):', "    if False:",
     DATA + " " + WHOLE, "changed_files or refused_or"),
    ("integrity", "the numbers in meta.json", "dataset.py",
     "        check_meta(meta)\n", "", DATA + " " + WHOLE,
     "changed_files or refused_or or damaged or metadata"),
    ("integrity", "lines of the log that are no rows", "checkpointing.py",
     'if isinstance(row, dict) and is_whole(row.get("step"), 0, 2**63 - 1) and "kind" in row:', "if True:",
     CKPT, "no_rows"),
    ("integrity", "steps that the log lacks are said", "checkpointing.py",
     "    if len(in_log) < step:", "    if False:", WHOLE, "refused_or"),
    ("integrity", "shards that change under a run", "dataset.py",
     "        if size_and_mtime(path) != self.states[i]:", "        if False:", FAULTS, "change_under"),
    ("spike", "a spike is found", "train.py",
     "        if finite and score > SPIKE:", "        if False:", SOUND, "are_reported"),
    ("spike", "by the median", "soundness.py",
     "        median = statistics.median(self.recent)\n",
     "        median = statistics.mean(self.recent)\n", SOUND, "jump_is_a_spike"),
    ("spike", "by the median absolute deviation", "soundness.py",
     "1.4826 * statistics.median(abs(x - median) for x in self.recent)", "statistics.pstdev(self.recent)",
     SOUND, "jump_is_a_spike"),
    ("spike", "a least deviation", "soundness.py",
     "max(deviation, LEAST_DEVIATION * abs(median))", "max(deviation, 1e-9)", SOUND, "jump_is"),
    ("spike", "a few losses tell nothing", "soundness.py",
     "        if len(self.recent) < LEAST_LOSSES:\n            return 0.0\n", "", SOUND, "few_losses"),
    ("spike", "batches are left out", "train.py",
     "    before.left_out = sorted({*state.left_out, *left_out})\n", "", SOUND, "leads_back"),
    ("spike", "what is left out is in the checkpoint", "train.py",
     "                left_out=state.left_out,\n", "                left_out=[],\n", SOUND, "leads_back"),
    ("spike", "the losses before a restart count", "train.py",
     "    spikes = LossSpikes(recent_losses(folder))\n\n", "    spikes = LossSpikes()\n\n", SOUND,
     "leads_back"),
    ("spike", "three times at most", "train.py",
     " or rewinds.get(step_of(paths[-1]), 0) == MAX_REWINDS:", ":", SOUND, "three_times"),
    ("spike", "back to a regular checkpoint", "train.py",
     "    paths = regular or paths\n", "", SOUND, "was_stopped"),
    ("spike", "the checkpoint that is being written is waited for", "train.py",
     "        saver.wait()  # for the newest one, that may still be being written\n", "", SOUND,
     "being_written"),
    ("spike", "a loss that is not finite", "train.py",
     "        finite = math.isfinite(losses[0]) and math.isfinite(norm)", "        finite = True", FAULTS,
     "not_finite_stops"),
    ("flip", "--check-every compares", "train.py",
     "        if due(args.check_every, state.step):", "        if False:", SOUND, "flipped_bit_is_caught"),
    ("flip", "the gradients' bits", "soundness.py",
     "        self.sums[i] = 3 * self.sums[i] + checksum(grad)", "        pass", SOUND,
     "flipped_bit_is_caught"),
    ("flip", "every bit counts", "soundness.py",
     "words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]\n"
     "    return x.detach().contiguous().view(words).sum(dtype=torch.int64)",
     "return x.detach().double().sum().view(torch.int64)", SOUND, "sees_every_bit"),
    ("flip", "before the ranks exchange them", "train.py",
     "                              [int(checksum(losses)), *sums.tolist()])",
     "                              [int(checksum(losses)), *sums.tolist()]) and [0]", SOUND,
     "flipped_bit_is_caught and 2-1"),
    ("flip", "gradients of the first run are cleared", "train.py",
     "    clear_gradients(optimizers)\n    with GradientChecksums(model) as sums:",
     "    with GradientChecksums(model) as sums:", SOUND, "run_twice"),
    ("flip", "on a GPU only with --deterministic", "train.py",
     '    if args.check_every and device.type == "cuda" and not args.deterministic:', "    if False:",
     SOUND, "gpu_needs"),

    # versions
    ("version", "a newer version is refused", "checkpointing.py",
     '        newer = content["version"] > VERSION', "        newer = False", CKPT, "newer_version"),
    ("version", "a newer version is not passed over", "checkpointing.py",
     '        raise UserError(f"{path} has version', '        raise Damaged(f"{path} has version', CKPT,
     "newer_version"),
    ("version", "what older versions lack", "checkpointing.py",
     'commit="unknown", shares=1, save_id="", left_out=[])', 'commit="unknown", shares=1, save_id="")',
     CKPT, "every_version"),
    ("version", "older schedules", "checkpointing.py",
     '        update_schedule(checkpoint["schedule"])\n', "", CKPT, "schedule or version"),
    ("version", "the commit is in a checkpoint", "train.py",
     "        commit=code_commit(),", '        commit="unknown",', FAULTS, "py_hands_on"),
    ("version", "every version has a fixture", "checkpointing.py",
     "VERSION = 3", "VERSION = 4", CKPT, "of_every_version"),

    # --deterministic
    ("deterministic", "torch's switch", "soundness.py",
     "    torch.use_deterministic_algorithms(True)", "    pass", SOUND, "test_deterministic"),
    ("deterministic", "cuBLAS is told", "soundness.py",
     '        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"', "        pass", SOUND,
     "test_deterministic"),

    # --shard
    ("shard", "the gradient's norm is that of all ranks", "sharding.py",
     "    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest_norm)\n",
     "    grads = [p.grad for p in model.parameters()]\n"
     "    grads = [x.to_local() if isinstance(x, DTensor) else x for x in grads]\n"
     "    norm = torch.nn.utils.get_total_norm(grads)\n"
     "    torch.nn.utils.clip_grads_with_norm_(model.parameters(), largest_norm, norm)\n", SHARD,
     "interchange"),
    ("shard", "gradients add up in float32", "sharding.py",
     "reduce_dtype=model.wte.weight.dtype", "reduce_dtype=model.compute_dtype", SHARD, "add_up"),
    ("shard", "checkpoints are whole: weights", "sharding.py",
     "        whole = p.full_tensor()\n        if dist", "        whole = p.to_local()\n        if dist",
     SHARD, "interchange"),
    ("shard", "checkpoints are whole: optimizers", "sharding.py",
     "                    x = distributed(x, self.params[i]).full_tensor()", "                    pass",
     SHARD, "interchange"),
    ("shard", "states are loaded by rows", "sharding.py",
     "rows_of(x, rank, world_size).clone() if x.dim() > 0 else x", "x", SHARD, "interchange"),
    ("shard", "the state of a matrix is at its owner only", "sharding.py",
     "            self.stand_ins[i].data = self.stand_ins[i].new_empty(0)", "            pass", SHARD,
     "holds_its_share"),
    ("shard", "layers are taken apart", "sharding.py",
     "        fully_shard(block, mesh=mesh, mp_policy=policy)", "        pass", SHARD, "holds_its_share"),
    ("shard", "not with --compile", "flags.py",
     "    if args.compile:", "    if False:", SHARD, "does_not_go"),
    ("shard", "not with --arch recurrent", "flags.py",
     '    if args.arch == "recurrent":\n        raise UserError("--shard',
     '    if False:\n        raise UserError("--shard', SHARD, "does_not_go"),
    ("shard", "not with passes without a loss", "flags.py",
     "    if args.loss_weights is not None and 0 in args.loss_weights:", "    if False:", SHARD,
     "does_not_go"),
    ("shard", "not on one process", "train.py",
     "    if args.shard and not dist.is_initialized():", "    if False:", SHARD, "does_not_go"),
    ("shard", "--dry-run says which fits", "plan.py",
     "--shard does", "--shard may", SHARD, "what_fits"),

    # kills
    ("kill", "the log is taken back", "checkpointing.py",
     '        if row["step"] < step or (row["step"] == step and row["kind"] == "eval"):',
     "        if True:", CKPT, "test_rewind"),
    ("kill", "an evaluation is not done twice", "train.py",
     "        if state.step > evaluated and (finished or", "        if (finished or", FAULTS,
     "saved_before_it_is_evaluated"),
    ("kill", "half-written files and orphans are removed", "checkpointing.py",
     "    remove_leftovers(folder)\n    kept", "    kept", CKPT, "test_rewind or moved_and_removed"),
    ("kill", "orphaned shares are removed", "checkpointing.py",
     "        if not path.exists():\n            leftovers.append(share)", "        pass", CKPT,
     "moved_and_removed"),
    ("kill", "shares go with their checkpoint", "checkpointing.py",
     "    for share in shares:\n        share.unlink(missing_ok=True)", "    pass", CKPT,
     "moved_and_removed"),
    ("kill", "old checkpoints are removed", "checkpointing.py",
     "                    remove_checkpoint(path)\n\n", "                    pass\n\n", CKPT,
     "known_to_be_good"),
    ("kill", "what was set aside is bounded", "checkpointing.py",
     "            for old in moved[:-MAX_SET_ASIDE]:", "            for old in []:", CKPT, "set_aside"),
    ("kill", "torch's random state", "train.py",
     '    torch.set_rng_state(checkpoint["torch_rng"])\n', "", CKPT, "random_state"),
    ("kill", "the position in the data", "train.py",
     '    return TrainState(checkpoint["step"], checkpoint["rows_seen"], checkpoint["seconds"],',
     '    return TrainState(checkpoint["step"], 0, checkpoint["seconds"],', FAULTS, "before_a_damaged_one"),
    ("kill", "the optimizers' states", "train.py",
     "    load_optimizers(optimizers, checkpoint, path)\n", "", FAULTS, "before_a_damaged_one"),
    ("kill", "DDP's buckets are settled", "train.py",
     "        settle_buckets(train_step, batch, plan.schedule_at(0), optimizers)", "        pass", FAULTS,
     "four_processes_go_on"),
    ("kill", "and the gradients of that are forgotten", "train.py",
     "    loss.backward()\n"
     "    for optimizer in optimizers:\n"
     "        optimizer.zero_grad(set_to_none=False)", "    loss.backward()", FAULTS,
     "four_processes_go_on or a_flipped or train_alike"),
    ("kill", "the run's folder is locked", "checkpointing.py",
     '        self.lock = lock(self.path, "training")\n',
     "        self.lock = open(self.path / '.lock', 'w')\n", TRAIN + " " + FAULTS,
     "one_at_a_time or takes_the_place"),
    ("kill", "a log that was removed is put back", "checkpointing.py",
     "        if is_in_place(self.file, self.path):\n            return\n        if self.run_folder",
     "        return\n        if self.run_folder", FAULTS, "removed_or_moved and remove_log"),
    ("kill", "nodes without a shared folder", "train.py",
     "    if len(set(steps)) > 1:", "    if False:", FAULTS, "without_a_shared_folder"),
    ("kill", "an unreadable checkpoint is not a damaged one", "checkpointing.py",
     "        raise_if_unreadable(path, e)\n        reason", "        reason", CKPT, "cannot_be_read_now"),
]


def apply(folder, file, old, new):
    """
    Make one change in a copy of the code. Returns what the file was. Raises ValueError unless the code is
    there, once.
    """
    path = folder / file
    text = path.read_text()
    if text.count(old) != 1:
        raise ValueError(f"{file} has this {text.count(old)} times: {old!r}")
    path.write_text(text.replace(old, new))
    return text

def files_of_the_code():
    """All files of the repository, as they are now, that git does not ignore."""
    git = ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(git, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]

def copy_code(folder):
    """Put the code into a folder, new."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in files_of_the_code():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)

def run_tests(folder, tests, words):
    """
    caught, not caught or no test, and which one failed. The tests run in a process forked from this one,
    which has imported torch; pytest stops at the first failure.
    """
    said = folder.parent / "said.txt"
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(folder)
        for descriptor in (1, 2):
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), descriptor)
        sys.path[:0] = [str(folder), str(folder / "tests")]
        # and those of test_faults.py from that one
        context = multiprocessing.get_context("fork")
        context.set_forkserver_preload = lambda modules: None
        multiprocessing.get_context = lambda method=None: context
        options = ["-q", "-x", "-s", "-m", "", "-p", "no:cacheprovider", "-c", str(folder / "pyproject.toml")]
        os._exit(pytest.main([*options, *tests.split(), "-k", words]))
    end = time.time() + SECONDS
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.time() < end:
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):  # what outlives its test
        os.killpg(child, signal.SIGKILL)
    if done[0] == 0:
        os.waitpid(child, 0)
        return "caught", f"it took more than {SECONDS} s"
    text = said.read_text(errors="replace")
    outcome = {0: "not caught", 1: "caught", 5: "no test"}.get(os.waitstatus_to_exitcode(done[1]), "broken")
    failed = re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", text, re.MULTILINE)
    return outcome, failed[0] if failed else text.splitlines()[-1][:200]

def main():
    parser = argparse.ArgumentParser(description="Break every protection, and see which test fails.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="a word of their subject or description")
    parser.add_argument("--check", action="store_true", help="only whether every change applies")
    args = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if args.only in f"{mutation[0]}: {mutation[1]}"]
    code = args.folder.absolute() / "code"
    copy_code(code)
    if args.check:
        for subject, what, file, old, _, _, _ in chosen:
            if (code / file).read_text().count(old) != 1:
                print(f"{subject}: {what}: {file} has it {(code / file).read_text().count(old)} times")
        print(len(chosen), "mutations")
        return

    record = args.folder / "mutations.jsonl"
    rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    outcomes = Counter()
    for subject, what, file, old, new, tests, words in chosen:
        key = dict(subject=subject, what=what, file=file, old=old, new=new)
        row = next((row for row in rows if row | key == row and row["outcome"] == "caught"), None)
        if row is None:
            before = apply(code, file, old, new)
            begin = time.time()
            outcome, test = run_tests(code, tests, words)
            (code / file).write_text(before)
            row = key | dict(outcome=outcome, test=test, seconds=round(time.time() - begin))
            with open(record, "a") as f:
                f.write(json.dumps(row) + "\n")
        outcomes[row["outcome"]] += 1
        print(f"{row['outcome']:10}  {subject}: {what}  ({row['test']}, {row['seconds']} s)", flush=True)
    print(dict(outcomes))

if __name__ == "__main__":
    main()
