"""
What differs on GPUs, as far as a CPU can show it: DDP around the compiled step, over gloo; and everything
that runs on CUDA, traced and lowered on fake tensors by a CPU build of torch that takes itself for one with
an H100 (fakecuda.py). Nothing is computed there: it shows shapes, dtypes, devices, layouts and graphs.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, shell
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

import train
from flags import make_parser
from interleave import Schedule, TrainStep
from model import GPT, GPTConfig
from plan import make_plan

# -----------------------------------------------------------------------------
# DDP

@pytest.fixture
def process_group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()

def graph_counter(counts):
    """A backend that counts forward graphs and backward graphs in the two numbers of `counts`."""
    def compiler(i):
        def compile(graph, inputs):
            counts[i] += 1
            return graph
        return compile

    return aot_autograd(fw_compiler=compiler(0), bw_compiler=compiler(1))

def compile_with(backend, monkeypatch):
    """Give torch.compile another backend."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compile(f, backend=backend, **kwargs))

def setup(flags):
    args = make_parser().parse_args(flags.split())
    plan = make_plan(args, 512, 1, torch.float32)
    return train.setup_training(args, plan, torch.device("cpu"), torch.float32)

DDP_FLAGS = "--depth 2 --aspect-ratio 64 --head-dim 32 --max-seq-len 32 --lrt shared --num-iterations 1 " \
    "--total-batch-size 64"

def test_the_compiled_step_is_one_graph_under_ddp(process_group, monkeypatch):
    """Its parameters, some of them used in every pass, are many of DDP's first bucket of 1 MiB."""
    counts = [0, 0]
    torch._dynamo.reset()
    compile_with(graph_counter(counts), monkeypatch)
    model, _, step = setup(f"{DDP_FLAGS} --compile")
    assert isinstance(step, torch.nn.parallel.DistributedDataParallel)
    assert 4 * sum(p.numel() for p in model.parameters()) > 2 * 2**20
    idx = torch.randint(512, (2, 32))
    for _ in range(2):
        with step.no_sync():
            step(idx, idx)[0].backward()
        step(idx, idx)[0].backward()
    assert counts == [1, 1]

def test_gradients_live_in_the_buckets_of_ddp(process_group):
    """From before the first micro-batch: there is never a second copy of all of them."""
    model, optimizers, step = setup(f"{DDP_FLAGS} --no-compile")

    def bytes_of_gradients():
        storages = {p.grad.untyped_storage()._cdata: p.grad.untyped_storage() for p in model.parameters()}
        return sum(storage.nbytes() for storage in storages.values()), len(storages)

    total = 4 * sum(p.numel() for p in model.parameters())
    n_parameters = len(list(model.parameters()))
    idx = torch.randint(512, (2, 32))
    size, n_buckets = bytes_of_gradients()
    assert total <= size < total + 64 * n_parameters and n_buckets < n_parameters / 4
    for _ in range(2):
        with step.no_sync():
            step(idx, idx)[0].backward()
        step(idx, idx)[0].backward()
        size, n_buckets = bytes_of_gradients()
        assert total <= size < total + 64 * n_parameters and n_buckets < n_parameters / 4


# -----------------------------------------------------------------------------
# Forward-only passes

def products(schedule):
    """How many matrix products the compiled step of a schedule has, forward and backward."""
    counts = [0, 0]

    def compiler(i):
        def compile(graph, inputs):
            counts[i] += sum(node.target == torch.ops.aten.mm.default for node in graph.graph.nodes)
            return graph
        return compile

    torch._dynamo.reset()
    torch.manual_seed(0)
    config = GPTConfig(sequence_len=16, vocab_size=32, n_layer=4, n_head=2, n_kv_head=2, n_embd=16,
                       window_pattern="L", lrt="shared", inject="kv")
    backend = aot_autograd(fw_compiler=compiler(0), bw_compiler=compiler(1),
                           partition_fn=min_cut_rematerialization_partition)
    step = torch.compile(TrainStep(GPT(config), schedule), backend=backend, dynamic=False, fullgraph=True)
    idx = torch.randint(32, (2, 16))
    step(idx, idx)[0].backward()
    return counts

def test_forward_only_passes_have_no_backward_when_compiled():
    """
    The first of two passes ends at the source layer, and nothing of it is computed twice or backwards.
    """
    forward, backward = products(Schedule("draft"))
    shared = 4  # in layer 0 both passes have the same inputs, and so q, k, v and gates
    first, second = 3 * 7, 4 * 7 + 2  # products a layer, gates among them, and the two of the memory
    loss = 3  # the head, and its two gradients
    assert forward == first + second - shared + loss
    # each product has two gradients but the two of the memory, which needs none itself
    assert backward == 2 * (second - 2) + 2


# -----------------------------------------------------------------------------
# The Recurrent Transformer

def test_a_deep_recurrent_transformer_stays_compiled(monkeypatch):
    """Dynamo gives up on a function that it compiles for the ninth time, unless told otherwise."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    compile_with("eager", monkeypatch)
    flags = "--arch recurrent --depth 12 --aspect-ratio 2 --head-dim 2 --max-seq-len 8 --num-iterations 1"
    _, _, step = setup(f"{flags} --lrt none --total-batch-size 16 --compile")
    idx = torch.zeros(2, 8, dtype=torch.int64)
    for _ in range(2):
        step(idx, idx)[0].backward()


# -----------------------------------------------------------------------------
# Fake CUDA

@pytest.fixture(scope="session")
def guard(tmp_path_factory):
    """fakecuda_guard.cpp, compiled."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler to make the fake device with")
    if torch.cuda.is_available():
        pytest.skip("torch has a device of its own")
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    torch_folder = Path(torch.__file__).parent
    include, lib = torch_folder / "include", torch_folder / "lib"
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    flags = f"-O1 -shared -fPIC -std=c++20 -D_GLIBCXX_USE_CXX11_ABI={abi} -I{include} " \
        f"-I{include}/torch/csrc/api/include -L{lib} -lc10 -ltorch_cpu -Wl,-rpath,{lib}"
    command = [compiler, ROOT / "tests/fakecuda_guard.cpp", "-o", library, *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library

def fake(guard, case, *args):
    """Run a case of fakecuda.py; returns what it prints."""
    done = shell("tests/fakecuda.py", case, *args, FAKECUDA_GUARD=str(guard))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

@pytest.mark.parametrize("case", ["training", "checkpoints", "inference", "decoding", "trace"])
def test_on_fake_cuda(case, guard):
    fake(guard, case)

@pytest.mark.slow
@pytest.mark.parametrize("case", ["recurrent_training", "trace_all", "recomputation"])
def test_on_fake_cuda_longer(case, guard):
    fake(guard, case)

@pytest.fixture
def triton():
    if "TRITON_DIR" not in os.environ and importlib.util.find_spec("triton") is None:
        pytest.skip("no triton: pip install --no-deps --target DIR triton; TRITON_DIR=DIR")

@pytest.mark.slow
def test_generated_code(guard, triton):
    fake(guard, "lower")

@pytest.mark.slow
def test_the_step_becomes_machine_code_for_an_h100(guard, triton):
    """At depth 2, which has all that deeper models have, in a minute; OPERATIONS.md says how at depth 20."""
    printed = fake(guard, "machine_code", *"--depth 2 --lrt shared --device-batch-size 2".split())
    n_kernels, n_binaries = map(int, re.search(r"(\d+) kernels, (\d+) binaries for sm_90", printed).groups())
    assert n_binaries >= n_kernels > 20
