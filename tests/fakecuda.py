"""
The paths that run on CUDA, on fake tensors and a CPU build of torch. test_gpu_path.py calls this file in a
process of its own, because the device of fakecuda_guard.cpp must be there before torch is:

    FAKECUDA_GUARD=guard.so python tests/fakecuda.py CASE      a function of this file; raises what is wrong

`lower` needs triton, which a CPU build of torch does not bring: from the folder TRITON_DIR, or installed.
"""

import ctypes
import dataclasses
import functools
import os
import re
import sys
import tempfile
import time
import types
from functools import partial
from types import SimpleNamespace

ctypes.CDLL(os.environ["FAKECUDA_GUARD"])
sys.path.append(os.environ.get("TRITON_DIR", ""))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch._functorch.partitioners import min_cut_rematerialization_partition  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import attention  # noqa: E402
import core  # noqa: E402
import optim  # noqa: E402
import recurrent  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from attention import KVCache, take  # noqa: E402
from checkpointing import VERSION, copy_out, load_checkpoint, load_optimizers, load_weights  # noqa: E402
from flags import make_parser  # noqa: E402
from interleave import Schedule, TrainStep, prefill  # noqa: E402
from model import GPTConfig  # noqa: E402
from plan import make_plan  # noqa: E402
from recipes import NANOCHAT_BACKBONE  # noqa: E402
from recurrent import RecurrentConfig, build_model  # noqa: E402

aten = torch.ops.aten
SMALL = dict(sequence_len=24, vocab_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL")
SCHEDULES = [
    Schedule(),
    Schedule(subsets=3),
    Schedule(subsets=99),
    Schedule(kv_refresh=True),
    Schedule("draft", subsets=2, detach=True),
    Schedule("draft", drafts=2),
    Schedule("chunked", chunk=7),
    Schedule("sequential"),
]


def on_cuda(config):
    """Inside a FakeTensorMode: a model on the fake device, with activations in bf16."""
    model = build_model(config)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, device="cuda"))
        for name, x in module._buffers.items():
            module._buffers[name] = torch.empty(x.shape, dtype=x.dtype, device="cuda")
    model.compute_dtype = torch.bfloat16
    return model

def tokens(B, T):
    return torch.zeros(B, T, dtype=torch.int64, device="cuda")

def check_step(step, idx):
    """Forward and backward: every parameter that has a gradient has one of its own kind."""
    loss, means = step(idx, idx)
    assert (loss.dtype, loss.device.type) == (torch.float32, "cuda") and means.device == loss.device
    loss.backward()
    found = 0
    for p in step.parameters():
        if p.grad is not None:
            assert (p.grad.shape, p.grad.dtype, p.grad.device) == (p.shape, p.dtype, p.device)
            found += 1
    return found


# -----------------------------------------------------------------------------
# Eager

def training():
    """Every schedule, saved or recomputed, and every variant of the model."""
    variants = [
        dict(lrt="shared"),
        dict(lrt="layerwise", inject="kv", value_embeds="alternate"),
        dict(lrt="shared", first_memory="embedding"),
        dict(lrt="layerwise", **NANOCHAT_BACKBONE),
    ]
    for i, schedule in enumerate(SCHEDULES):
        for recompute in (False, True):
            with FakeTensorMode():
                model = on_cuda(GPTConfig(**SMALL, **variants[(i + recompute) % 4]))
                model.recompute = recompute
                found = check_step(TrainStep(model, schedule), tokens(2, 12))
                assert found == len(list(model.parameters())), schedule

class OperatorNames(TorchDispatchMode):
    """The names of all operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.add(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))

def operators_that_raise():
    """Those that torch refuses under use_deterministic_algorithms(), as it says there: {"cumsum", ..}."""
    doc = torch.use_deterministic_algorithms.__doc__
    doc = doc[doc.index("operations will throw a"):doc.index("In addition")]
    names = re.findall(r"`torch\.(?:nn\.functional\.|nn\.|Tensor\.)?(\w+)`", doc)
    return {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() for name in names}

def deterministic():
    """A step, forward and backward, calls nothing that has no deterministic algorithm."""
    raising = operators_that_raise()
    assert {"cumsum", "put_", "embedding_bag", "bincount"} <= raising
    called = set()
    for schedule in (Schedule(subsets=3), Schedule(kv_refresh=True), Schedule("chunked", chunk=7)):
        with FakeTensorMode(), OperatorNames() as operators:
            step = TrainStep(on_cuda(GPTConfig(**SMALL, lrt="shared")), schedule)
            check_step(step, tokens(2, 12))
        called |= operators.names
    assert {"flash_attention_backward", "embedding_dense_backward", "scatter_add_"} <= called, called
    for name in called:
        assert not any(name.startswith(start.rstrip("_")) for start in raising), name

def recurrent_training():
    """The Recurrent Transformer, with blocks that are captured."""
    recurrent.record = lambda work, device: work  # in the place of a CUDA graph
    with FakeTensorMode():
        model = on_cuda(RecurrentConfig(**SMALL | dict(sequence_len=70)))
        for _ in range(2):  # a kind of block is captured when it comes for the second time
            found = check_step(TrainStep(model, Schedule("plain")), tokens(2, 70))
        assert found == len(list(model.parameters()))
        assert any(isinstance(graph, recurrent.Graph) for graph in recurrent.graphs.values())

def checkpoints():
    """What a run on a GPU saves is read on a CPU, and another run goes on with it on a GPU."""
    optim.training_dtype = lambda device: torch.bfloat16
    flags = "--depth 1 --aspect-ratio 32 --head-dim 16 --max-seq-len 24 --total-batch-size 48 --no-compile " \
        "--num-iterations 1 --recipe nanochat --lrt shared"
    args = make_parser().parse_args(flags.split())
    plan = make_plan(args, 64, 1, torch.bfloat16)
    rng = torch.get_rng_state()

    def train_a_step(checkpoint=None):
        model, optimizers, step = train.setup_training(args, plan, torch.device("cuda", 0), torch.bfloat16)
        if checkpoint:
            load_weights(model, checkpoint)
            load_optimizers(optimizers, checkpoint, "")
        check_step(step, tokens(2, 24))
        for optimizer in optimizers:
            optimizer.step()
        return dict(model=model.state_dict(), optimizers=[optimizer.state_dict() for optimizer in optimizers])

    def kinds(state):
        """The names of all tensors, with their shapes, dtypes and devices: two dicts."""
        tensors = dict(state["model"])
        for n, optimizer in enumerate(state["optimizers"]):
            for i, values in optimizer["state"].items():
                tensors |= {(n, i, name): x for name, x in values.items()}
        shapes = {name: (x.shape, x.dtype) for name, x in tensors.items()}
        return shapes, {x.device.type for x in tensors.values()}

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "ckpt_0000001.pt")
        with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
            state = train_a_step()
            shapes, devices = kinds(state)
            assert len(shapes) > 60 and devices == {"cuda"}
            content = copy_out(state, {}, copies=[])
            assert kinds(content) == (shapes, {"cpu"})
            content |= dict(version=VERSION, commit="", save_id="", run_id="", shares=1, step=1, rows_seen=2,
                            seconds=0.0, torch_rng=rng, config=dataclasses.asdict(plan.config),
                            schedule=dataclasses.asdict(plan.schedule_at(0)), args=vars(args),
                            tokenizer_sha256="", shards_sha256=[])
            torch.save(content, path)
        checkpoint = load_checkpoint(path, verify=False)  # fakes have no numbers to compare
        assert kinds(checkpoint) == (shapes, {"cpu"})
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert kinds(train_a_step(checkpoint)) == (shapes, {"cuda"})

@torch.no_grad()
def inference():
    """Prefill, a sweep over subsets, decoding through the rolling cache, scores of CORE; loading weights."""
    for config in (GPTConfig(**SMALL, lrt="shared"), RecurrentConfig(**SMALL)):
        weights = build_model(config).state_dict()
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = on_cuda(config)
            load_weights(model, dict(model=weights))
            assert {x.device.type for x in model.state_dict().values()} == {"cuda"}

            def cache(**options):
                return KVCache(config, 2, 24, "cuda", torch.bfloat16, **options)  # noqa: B023

            kv = cache()
            idx = tokens(2, 20)
            # a sweep ends by a computed number, which a fake tensor does not have: from there, token by token
            hidden, memory, _ = prefill(model, idx, kv, max_sweeps=1)
            assert (hidden.shape, hidden.dtype, hidden.device.type) == ((2, 20, 32), torch.bfloat16, "cuda")
            if config.lrt != "none":
                for positions in (range(0, 20, 2), range(1, 20, 2)):
                    memories = memory.expand(2, len(positions), 32)
                    model(take(idx, positions), positions, kv, memories, config.source_layer + 1)
            rolling = cache(rolling=True)
            rolling.copy_from(kv, 20, 1)
            for t in range(20, 24):
                hidden, memory = model(idx[:, :1], range(t, t + 1), rolling, memory)
                logits = model.logits(hidden)
                assert (logits.shape, logits.dtype, logits.device.type) == ((2, 1, 64), torch.float32, "cuda")
            core.token_scores(model, hidden[:, 0], idx[:, 0])


@torch.no_grad()
def decoding():
    """
    A captured step of a decoder, and a compiled one: it asks the device for no number, as a fake one has none
    to give, its tensors stay in their places, and it is one graph.
    """
    sample.record = lambda work, device: (work(), work)[1]  # in the place of a CUDA graph
    nanochat = GPTConfig(**SMALL, **NANOCHAT_BACKBONE, lrt="layerwise")
    for config in (GPTConfig(**SMALL, lrt="shared"), nanochat, RecurrentConfig(**SMALL)):
        for compile in (False, True):
            torch._dynamo.reset()
            with FakeTensorMode():
                model = on_cuda(config)
                for module in model.modules():  # as load_model() does
                    if isinstance(module, (nn.Linear, nn.Embedding)):
                        module._parameters["weight"] = nn.Parameter(module.weight.to(torch.bfloat16))
                model.pack()
                kv = KVCache(config, 2, 24, "cuda", torch.bfloat16, rolling=True)
                kv.start = torch.zeros(2, dtype=torch.int64, device="cuda")
                hidden = torch.zeros(2, 1, 32, dtype=torch.bfloat16, device="cuda")
                memory = None if config.lrt == "none" else hidden.clone()
                draw = functools.partial(sample.sample_next_token, temperature=0.8, top_k=50, top_p=0.9)
                uniform = torch.zeros(9, 2, device="cuda")
                decoder = sample.Decoder(model, kv, hidden, memory, 4, uniform, draw)
                assert decoder.capture
                if compile:
                    decoder.work = torch.compile(decoder.forward_on_device, backend="aot_eager",
                                                 dynamic=False, fullgraph=True)
                static = decoder.tokens, decoder.memory, decoder.index, *kv.k, *kv.v
                for _ in range(4):
                    decoder.step()
                after = decoder.tokens, decoder.memory, decoder.index, *kv.k, *kv.v
                assert all(x is y for x, y in zip(static, after))


# -----------------------------------------------------------------------------
# Compiled

def trace(schedules=SCHEDULES[:1]):
    """One graph without a break, forward and backward."""
    for i, schedule in enumerate(schedules):
        torch._dynamo.reset()
        options = dict(lrt="shared", first_memory="embedding"), dict(lrt="layerwise", **NANOCHAT_BACKBONE)
        with FakeTensorMode():
            model = on_cuda(GPTConfig(**SMALL, **options[i % 2]))
            step = TrainStep(model, schedule)
            step = torch.compile(step, backend="aot_eager", dynamic=False, fullgraph=True)
            assert check_step(step, tokens(2, 12)) == len(list(model.parameters()))

def trace_all():
    """
    The same for every other schedule whose passes are few. Without the one that has a single loss: there
    AOTAutograd makes a constant on the device, which the fake one cannot hold.
    """
    trace([s for s in SCHEDULES[1:] if len(s.passes(12)) <= 4 and s.drafts < 2])

def recomputation():
    """
    With activation checkpointing the compiler computes things again, but not attention over many positions,
    which is dearer than a matrix product of this width.
    """
    calls = dict(forward=0, backward=0)

    def count(name):
        def compile(graph, inputs):
            for node in graph.graph.nodes:
                calls[name] += node.target == aten._flash_attention_forward.default
            return graph
        return compile

    backend = aot_autograd(fw_compiler=count("forward"), bw_compiler=count("backward"),
                           partition_fn=min_cut_rematerialization_partition)
    config = GPTConfig(sequence_len=1024, vocab_size=64, n_layer=2, n_head=1, n_kv_head=1, n_embd=64,
                       window_pattern="S", lrt="shared")
    budget = train.COMPILED_MEMORY_BUDGET
    with FakeTensorMode(), torch._functorch.config.patch(activation_memory_budget=budget):
        step = torch.compile(TrainStep(on_cuda(config), Schedule()), backend=backend, dynamic=False)
        check_step(step, tokens(1, 1024))
    assert calls["forward"] > 8
    assert calls["backward"] == 0, calls

def pretend_h100():
    """Let Inductor and triton take this machine for one with an H100, as far as generating code goes."""
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=85 * 10**9, multi_processor_count=132,
        warp_size=32, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, gcnArchName="", shared_memory_per_block_optin=232448,
        shared_memory_per_block=49152, shared_memory_per_multiprocessor=233472, L2_cache_size=50 * 2**20,
        is_integrated=0, is_multi_gpu_board=0)
    answers = dict(
        is_available=True, device_count=1, current_device=0, get_device_properties=properties,
        get_device_capability=(9, 0), get_device_name=properties.name, synchronize=None, init=None,
        _lazy_init=None, is_bf16_supported=True, get_arch_list=["sm_90"], is_initialized=False,
        _exchange_device=0, _maybe_exchange_device=0, set_device=None, set_rng_state=None,
        current_stream=SimpleNamespace(cuda_stream=0, device=torch.device("cuda", 0)),
        maybe_exchange_device=0, exchange_device=0, get_compute_capability=90, is_triton_capable=True,
        raise_if_triton_unavailable=None)

    def answer(value):
        return lambda *args, **kwargs: value

    from torch._dynamo.device_interface import CudaInterface
    for name, value in answers.items():
        for owner in (torch.cuda, torch.cuda.random):
            if hasattr(owner, name):
                setattr(owner, name, answer(value))
        for owner in (CudaInterface, CudaInterface.Worker):
            if hasattr(owner, name):
                setattr(owner, name, staticmethod(answer(value)))
    for owner in (torch.cuda, torch.cuda.random):
        owner.get_rng_state = lambda *args: torch.get_rng_state()
    torch._C._cuda_getCurrentRawStream = answer(0)
    torch.version.cuda = "13.0"
    FakeTensorMode.avoid_device_init = property(answer(True))

    import triton
    from torch.utils import _triton
    from triton.backends.compiler import GPUTarget
    for asked_before in (_triton.has_triton_package, _triton.has_triton):
        asked_before.cache_clear()
    shared = dict(max_shared_mem=232448, max_num_regs=65536, multiprocessor_count=132, warpSize=32,
                  sm_clock_rate=1980000, mem_clock_rate=2619000, mem_bus_width=5120)
    triton.runtime.driver.set_active(SimpleNamespace(
        utils=SimpleNamespace(get_device_properties=answer(shared)),
        get_current_target=answer(GPUTarget("cuda", 90, 32)), get_current_device=answer(0),
        get_current_stream=answer(0), get_active_torch_device=answer(torch.device("cuda", 0)),
        get_device_interface=answer(torch.cuda), get_benchmarker=answer(answer(1.0))))

def lowered(make_step, B, T):
    """
    Inductor's code for an H100 of the forward and backward of the compiled step that make_step() returns, on
    B rows of T tokens: two strings.
    """
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config
    from torch._inductor.graph import GraphLowering
    codes = []

    class Lowered(Exception):
        pass

    def keep_code(graph):
        code, _ = graph.codegen()
        codes.append(code.value)

        def call(args):
            raise Lowered

        module = types.ModuleType("lowered")
        module.__file__, module.key, module.call, module.benchmark_compiled_module = "", "", call, None
        return module

    GraphLowering.compile_to_module = GraphLowering._compile_to_module = keep_code
    # a CPU build cannot choose CUDA's backend of SDPA
    attention.dot_product_attention = lambda q, k, v, is_causal: \
        aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    inductor = dict(shape_padding=False, joint_graph_constant_folding=False, force_disable_caches=True,
                    compile_threads=1)  # the first two would compute
    functorch = dict(enable_autograd_cache=False, force_non_lazy_backward_lowering=True)
    with inductor_config.patch(inductor), functorch_config.patch(functorch), FakeTensorMode():
        step = make_step()
        idx = tokens(B, T)
        try:
            step(idx, idx)
        except Lowered:
            pass
    assert len(codes) == 2, f"{len(codes)} graphs"
    return codes

def dense(shape):
    """The strides of a contiguous tensor."""
    return tuple(torch.empty(shape, device="meta").stride())

def lower():
    """
    5 heads at 251 positions, which Inductor pads. The flash backward is ours, and its log-sum-exp is dense or
    a slice of a dense one; the cross-entropy never has the logits of a pass in float32.
    """
    pretend_h100()
    config = GPTConfig(sequence_len=502, vocab_size=1000, n_layer=1, n_head=5, n_kv_head=5, n_embd=40,
                       lrt="shared")

    def make_step():
        return torch.compile(TrainStep(on_cuda(config), Schedule()), dynamic=False, fullgraph=True)

    forward, backward = lowered(make_step, 2, config.sequence_len)
    assert "aten._flash_attention_backward" not in backward
    calls = re.findall(r"= (torch.ops.nanolrt.flash_attention_backward.default)\((.*)\)", backward)
    assert len(calls) == 4  # of two subsets, each over its own part and the other's

    # every buffer that a call is given is allocated dense
    allocated = dict(re.findall(r"(\w+) = empty_strided_cuda\((\(.*?\), \(.*?\)), torch.float32\)", backward))
    n_dense = 0
    for _, arguments in calls:
        for name in re.findall(r"\bbuf\d+\b", arguments):
            if name in allocated:
                shape, strides = eval(allocated[name])
                assert tuple(strides) == dense(shape), (name, shape, strides)
                n_dense += 1
    assert n_dense
    assert re.search(r"empty_strided_cuda\(\(1004, 1000\), .*, torch.bfloat16\)", forward)
    assert not re.search(r"empty_strided_cuda\(\(\d+, 1000\), .*, torch.float32\)", forward)

def machine_code(*flags):
    """
    The step of `train.py FLAGS` on eight GPUs: one graph forward and one backward, whose Triton kernels all
    become machine code for sm_90. Prints how many there are and how long it took.
    """
    pretend_h100()
    args = make_parser().parse_args(flags)
    plan = make_plan(args, 32768, 8, torch.bfloat16)
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=8)
    train.DDP = partial(train.DDP, init_sync=False)  # which would send numbers

    def make_step():
        _, _, step = train.setup_training(args, plan, torch.device("cuda", 0), torch.bfloat16)
        return step

    start = time.time()
    codes = lowered(make_step, plan.device_batch, plan.config.sequence_len)
    print(f"lowered in {time.time() - start:.0f} s: {[len(code) for code in codes]} characters", flush=True)
    start = time.time()
    n_kernels, n_binaries = compile_kernels("".join(codes))
    print(f"{n_kernels} kernels, {n_binaries} binaries for sm_90 in {time.time() - start:.0f} s")

def compile_kernels(code):
    """Compile the distinct Triton kernels of generated code for sm_90, in all block sizes that are tried."""
    from torch._inductor import config as inductor_config
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime import triton_helpers
    triton_helpers.set_driver_to_gpu = lambda: None
    inductor_config.use_static_cuda_launcher = False  # which would keep no more than the path of a binary
    pattern = r"^(triton_\w+) = async_compile\.triton\('\w+', '{3}(.*?)'{3}, device_str='cuda'\)"
    sources = set(re.findall(pattern, code, re.MULTILINE | re.DOTALL))
    n_binaries = 0
    for name, source in sources:
        kernel = getattr(PyCodeCache.load(source), name)
        kernel.precompile(warm_cache_only=True)
        assert kernel.compile_results, name
        for result in kernel.compile_results:
            assert result.kernel.asm["cubin"], name
            n_binaries += 1
    return len(sources), n_binaries

CASES = dict(training=training, deterministic=deterministic, recurrent_training=recurrent_training,
             checkpoints=checkpoints, inference=inference, decoding=decoding, trace=trace,
             trace_all=trace_all, recomputation=recomputation, lower=lower, machine_code=machine_code)

if __name__ == "__main__":
    torch.set_num_threads(1)
    CASES[sys.argv[1]](*sys.argv[2:])
    os._exit(0)  # autograd's thread of the device does not end
