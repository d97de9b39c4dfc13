"""
The optimizers' groups and rates, and how they change over a run (design.md, section 8); Muon against torch's;
and the same bits in one process and several. nanochat's own trajectory is in test_model.py.
"""

import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import ROOT, assert_refused, cli
from torch._subclasses.fake_tensor import FakeTensorMode

import optim
import train
from checkpointing import copy_out, load_checkpoint, load_optimizers
from common import training_dtype
from flags import make_parser
from model import GPT, GPTConfig
from optim import (
    Muon,
    Sharded,
    learning_rate_scale,
    make_optimizers,
    set_learning_rates,
    weight_decay_scale,
)
from plan import make_plan
from recipes import NANOCHAT_OPTIMIZER, OptimizerConfig
from recurrent import build_model, config_from_dict

STEPS = 1000
ALL_VARIANTS = NANOCHAT_OPTIMIZER.muon_options


def layerwise_gpt(n_layer):
    """A width of 48 makes sqrt(768 / width) = 4."""
    return GPT(GPTConfig(sequence_len=8, vocab_size=32, n_layer=n_layer, n_head=2, n_kv_head=2, n_embd=48,
                         lrt="layerwise"))

def group_of(optimizers, parameter):
    """The parameter group of one parameter, which is in exactly one."""
    found = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            found += [group for p in group["params"] if p is parameter]
    group, = found
    return group

@pytest.mark.parametrize("role, lr, betas", [
    ("embedding", 4 * 0.3, (0.8, 0.95)),
    ("value embeddings", 4 * 0.3, (0.8, 0.95)),
    ("head", 4 * 0.004, (0.8, 0.95)),
    ("gates", 0.02, (0.8, 0.95)),
    ("residual scalars", 0.005, (0.8, 0.95)),
    ("x0 scalars", 0.5, (0.96, 0.95)),
    ("memory scalars", 0.5, (0.8, 0.95)),
    ("matrices", 0.02, None),
    ("memory projections", 0.02, None),
])
def test_rates_of_every_parameter(role, lr, betas):
    """At depth 24, a batch four times 2^19 tokens, and where the multiplier of the rates is 1."""
    model = layerwise_gpt(n_layer=24)
    optimizers = make_optimizers(model, OptimizerConfig(), batch_scale=2.0, decay_scale=0.25)
    set_learning_rates(optimizers, 0, STEPS, OptimizerConfig(warmup_steps=0))
    parameters = model.parameter_groups()[role]
    assert parameters
    for parameter in parameters:
        group = group_of(optimizers, parameter)
        assert group["lr"] == pytest.approx(2 * lr)
        if betas is None:
            assert group["weight_decay"] == pytest.approx(0.2 * 0.25)
            assert not any(group[variant] for variant in ALL_VARIANTS)  # as torch.optim.Muon by default
        else:
            assert group["betas"] == betas
            assert group["weight_decay"] == 0 and group["eps"] == 1e-10

@pytest.mark.parametrize("total_batch, rates", [(2**19, 1), (2**21, 2), (2**12, 1)])
def test_scales_of_the_batch(total_batch, rates):
    assert learning_rate_scale(total_batch) == rates
    # by depth: less for deeper models, not more for shallow ones
    for n_layer, expected in ((24, 0.25), (12, 1), (2, 1)):
        assert weight_decay_scale(OptimizerConfig(), n_layer, total_batch, growth=9) == expected
    # by horizon: rate * decay * tokens / batch stays
    for growth in (0.1, 1, 9):
        decay = weight_decay_scale(NANOCHAT_OPTIMIZER, 24, total_batch, growth)
        assert rates * decay * growth / total_batch == pytest.approx(1 / 2**19)

@pytest.mark.parametrize("step, multiplier, momentum, decay", [
    (0, 1 / 41, 0.85, 0.2),  # the first of 40 steps of warm-up
    (19, 20 / 41, 0.85 + 0.1 * 19 / 300, 0.2 * 0.981),
    (40, 1, 0.85 + 0.1 * 40 / 300, 0.2 * 0.96),
    (300, 1, 0.95, 0.2 * 0.7),
    (500, 1, 0.95, 0.2 * 0.5),  # warm-down begins
    (750, 0.5, 0.95, 0.2 * 0.25),
    (999, 1 / 500, 0.95, 0.2 * 0.001),
])
def test_a_run_of_1000_steps(step, multiplier, momentum, decay):
    config = OptimizerConfig()
    adamw, muon = optimizers = make_optimizers(layerwise_gpt(n_layer=2), config)
    assert set_learning_rates(optimizers, step, STEPS, config) == pytest.approx(multiplier)
    for group in adamw.param_groups:
        assert group["lr"] == pytest.approx(multiplier * group["initial_lr"])
        assert group["weight_decay"] == 0
    for group in muon.param_groups:
        assert group["lr"] == pytest.approx(multiplier * 0.02)
        assert group["momentum"] == pytest.approx(momentum)
        assert group["weight_decay"] == pytest.approx(decay)

@pytest.mark.parametrize("options, step, multiplier", [
    (dict(warmup_steps=0), 0, 1),
    (dict(warmdown_ratio=0), 999, 1),
    (dict(final_lr_frac=0.1), 900, 0.2 + 0.8 * 0.1),
    (dict(warmup_steps=999, warmdown_ratio=1), 499, 0.5 * 0.501),  # both at once multiply
])
def test_other_warm_ups_and_warm_downs(options, step, multiplier):
    assert set_learning_rates([], step, STEPS, OptimizerConfig(**options)) == pytest.approx(multiplier)

def test_nanochats_run_of_1000_steps():
    """Warm-up over 40 steps; momentum from 0.85 to 0.97, and from step 400 on to where it falls to 0.90."""
    config = NANOCHAT_OPTIMIZER
    adamw, muon = optimizers = make_optimizers(layerwise_gpt(n_layer=2), config)
    for step in range(STEPS):
        multiplier = min((step + 1) / 40, 1)
        momentum = 0.85 + 0.12 * min(step / 400, 1)
        progress = (step - 350) / 650  # of the warm-down
        if progress > 0:
            multiplier = 1 - 0.95 * progress
        if step >= 400:
            momentum = 0.97 * (1 - progress) + 0.90 * progress
        assert set_learning_rates(optimizers, step, STEPS, config) == pytest.approx(multiplier)
        for group in adamw.param_groups:
            assert group["lr"] == pytest.approx(multiplier * group["initial_lr"])
            assert group["weight_decay"] == group["initial_weight_decay"]  # only Muon's falls
        for group in muon.param_groups:
            assert group["momentum"] == pytest.approx(momentum)
            assert group["weight_decay"] == pytest.approx(0.14 * (1 + math.cos(math.pi * step / 1000)))

@pytest.mark.parametrize("flags, memory_init, memory_lr", [
    ([], 0.1, 0.02),
    (["--memory-init", "1", "--memory-lr", "0.005"], 1.0, 0.005),
])
def test_the_memory_can_start_and_train_otherwise(flags, memory_init, memory_lr):
    args = make_parser().parse_args(["--depth", "2", "--lrt", "layerwise", *flags])
    plan = make_plan(args, 32, 1, torch.float32)
    model, optimizers, _ = train.setup_training(args, plan, torch.device("cpu"), torch.float32)
    groups = model.parameter_groups()
    assert model.mem_lambdas.tolist() == pytest.approx([memory_init, memory_init])
    n_parameters = sum(len(group["params"]) for group in optimizers[1].param_groups)
    assert n_parameters == len(groups["matrices"]) + len(groups["memory projections"])
    for role, lr in (("memory projections", memory_lr), ("matrices", 0.02)):
        assert {group_of(optimizers, p)["initial_lr"] for p in groups[role]} == {lr}

def test_bad_memory_flags(data):
    assert_refused(cli("train.py", "--data", data, "--memory-init", "nan"), "memory_init", "nan")
    assert_refused(cli("train.py", "--data", data, "--memory-lr", "-1"), "--memory-lr", "-1")


# -----------------------------------------------------------------------------
# Muon

SHAPES = [(48, 48), (96, 32), (32, 96), (48, 48), (96, 32)]

def random_parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]

def set_gradients(parameters, seed):
    """The same ones for parameters of the same shapes; most of the last one's are next to zero."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    parameters[-1].grad[4:] *= 1e-6

def random_steps(optimizers, parameters, first, last):
    """The steps first .. last - 1 on random gradients, with rates that change."""
    for step in range(first, last):
        set_gradients(parameters, step)
        set_learning_rates(optimizers, step, 20, OptimizerConfig(warmup_steps=2))
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

def with_initial_rates(optimizer):
    for group in optimizer.param_groups:
        group["initial_lr"], group["initial_weight_decay"] = group["lr"], group["weight_decay"]
    return optimizer

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_muon_is_torchs(dtype, tolerance, monkeypatch):
    """In bf16, and in float32, by a torch.optim.Muon whose cast to bf16 is none."""
    if dtype == torch.float32:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    monkeypatch.setattr(optim, "product_dtype", lambda p: dtype)
    ours, torchs, start = random_parameters(), random_parameters(), random_parameters()
    random_steps([with_initial_rates(Muon(ours, 0.02, weight_decay=0.2))], ours, 0, 6)
    random_steps([with_initial_rates(torch.optim.Muon(torchs, 0.02, weight_decay=0.2))], torchs, 0, 6)
    for p, q, before in zip(ours, torchs, start, strict=True):
        assert (p - q).norm() < tolerance * (q - before).norm()

def test_a_parameter_without_a_gradient_stays():
    a, b = random_parameters()[:2]
    before = b.clone()
    optimizer = Muon([a, b], weight_decay=0.2)
    a.grad = torch.randn_like(a)
    optimizer.step()
    assert torch.equal(b, before)
    assert list(optimizer.state_dict()["state"]) == [0]

def test_the_fast_dtype(monkeypatch):
    """bf16 where the CPU has it and its kernels may be used, float32 elsewhere; other dtypes stay."""
    p = torch.zeros(2, 2)
    for amx, avx512_bf16, kernels, dtype in [
        (False, True, "AVX512", torch.bfloat16),
        (True, False, "AVX512", torch.bfloat16),
        (False, False, "AVX512", torch.float32),
        (True, True, "AVX2", torch.float32),  # by ATEN_CPU_CAPABILITY
    ]:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda answer=amx: answer)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=avx512_bf16: answer)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda answer=kernels: answer)
        assert optim.product_dtype(p) == training_dtype("cpu") == dtype
        assert training_dtype("cpu", None) == training_dtype("cpu", "float32") == torch.float32
        assert training_dtype("cpu", "bfloat16") == torch.bfloat16
        assert optim.product_dtype(p.double()) == torch.float64

@pytest.mark.parametrize("name", ["v0_layerwise", "v0_recurrent"])
def test_states_of_torchs_muon_are_gone_on_with(name, monkeypatch):
    """Checkpoints from before; the next steps are those of torch's Muon."""
    monkeypatch.setattr(optim, "product_dtype", lambda p: torch.bfloat16)
    path, = (ROOT / f"tests/checkpoints/{name}").glob("*.pt")

    def go_on(with_torchs):
        checkpoint = load_checkpoint(path)  # anew: an optimizer that it is loaded into works on its tensors
        model = build_model(config_from_dict(checkpoint["config"]))
        adamw, muon = make_optimizers(model, OptimizerConfig())
        if with_torchs:
            muon = torch.optim.Muon(muon.param_groups)
        load_optimizers((adamw, muon), checkpoint, path)
        assert muon.state_dict()["state"].keys() == checkpoint["optimizers"][1]["state"].keys()
        model.load_state_dict(checkpoint["model"])
        random_steps((adamw, muon), list(model.parameters()), 10, 13)
        return list(model.parameters())

    for p, q in zip(go_on(False), go_on(True), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-4)


# -----------------------------------------------------------------------------
# Several processes

def train_in_rank(rank, world_size, folder):
    """
    Three steps with the optimizers of train.py, with all of Muon's variants, and its products in two dtypes;
    then two more from the state that one process had by then. Each time the parameters go to disk, and the
    state that the rank would save. In one process there is no group.
    """
    torch.set_num_threads(1)
    sharded = world_size > 1
    if sharded:
        optim.BUCKET = 2000  # several messages a rank
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{world_size}",
                                rank=rank, world_size=world_size)
    torch.manual_seed(0)
    model = layerwise_gpt(n_layer=3)
    parameters = list(model.parameters())

    def new_optimizers():
        adamw, muon = make_optimizers(model, OptimizerConfig())
        for group in muon.param_groups:
            group.update(ALL_VARIANTS)
        return adamw, muon

    def train_and_save(optimizers, first, last, name):
        random_steps(optimizers, parameters, first, last)
        states = [optimizer.state_dict() for optimizer in optimizers]
        torch.save([p.detach() for p in parameters], folder / f"{name}_{world_size}_{rank}_parameters.pt")
        torch.save(states, folder / f"{name}_{world_size}_{rank}_states.pt")

    for dtype in ("bfloat16", "float32"):
        optim.product_dtype = lambda p, dtype=dtype: getattr(torch, dtype)
        optimizers = new_optimizers()
        train_and_save(optimizers, 0, 3, f"{dtype}_new")
        if sharded:
            for optimizer in optimizers:
                held = optimizer.optimizer.state_dict()["state"]
                assert held.keys() == {i for i, owner in enumerate(optimizer.owner) if owner == rank}
                assert set(optimizer.owner) == set(range(world_size))

        optimizers = new_optimizers()
        for optimizer, state in zip(optimizers, torch.load(folder / f"{dtype}_new_1_0_states.pt")):
            optimizer.load_state_dict(state)
            if sharded:
                assert len(optimizer.optimizer.state) == optimizer.owner.count(rank)
        train_and_save(optimizers, 3, 5, f"{dtype}_loaded")
    if sharded:
        dist.destroy_process_group()

def assert_same_bits(a, b):
    """Of nested dicts and lists of tensors and numbers."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same_bits(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    else:
        assert a == b

def test_1_2_and_4_processes_update_alike(tmp_path, monkeypatch):
    """Parameters on every rank, and the state that is saved, bit for bit; states go on anywhere."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    multiprocessing.set_forkserver_preload([__name__])
    for world_size in (1, 2, 4):
        mp.start_processes(train_in_rank, (world_size, tmp_path), world_size, start_method="forkserver")
    for name in ("bfloat16_new", "bfloat16_loaded", "float32_new", "float32_loaded"):
        states = torch.load(tmp_path / f"{name}_1_0_states.pt")
        parameters = torch.load(tmp_path / f"{name}_1_0_parameters.pt")
        for state in states:
            assert len(state["state"]) == sum(len(group["params"]) for group in state["param_groups"])
        for world_size in (2, 4):
            whole, *shares = [torch.load(tmp_path / f"{name}_{world_size}_{rank}_states.pt")
                              for rank in range(world_size)]
            for share in shares:
                for state, part in zip(whole, share, strict=True):
                    assert not state["state"].keys() & part["state"].keys()
                    state["state"] |= part["state"]
            assert_same_bits(whole, states)
            for rank in range(world_size):
                theirs = torch.load(tmp_path / f"{name}_{world_size}_{rank}_parameters.pt")
                assert_same_bits(theirs, parameters)

@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()

def test_few_messages(group_of_one, monkeypatch):
    """A step sends two a rank, whatever the number of parameters."""
    sent = []
    monkeypatch.setattr(dist, "broadcast", lambda x, source: sent.append(x.numel()))
    model = layerwise_gpt(n_layer=6)
    parameters = list(model.parameters())
    optimizers = make_optimizers(model, OptimizerConfig())
    set_gradients(parameters, 0)
    for optimizer in optimizers:
        optimizer.step()
    assert len(sent) == 2
    assert sum(sent) == sum(p.numel() for p in parameters)

@pytest.mark.parametrize("work, world_size", [
    ([4, 4, 4, 4], 2),
    ([9, 1, 1, 1, 3, 3], 2),
    ([5] * 7, 4),
    ([1], 3),
])
def test_even_shares(work, world_size):
    owner = optim.owners(work, world_size)
    loads = [0] * world_size
    for rank, amount in zip(owner, work, strict=True):
        loads[rank] += amount
    assert max(loads) - min(loads) <= max(work)
    assert sum(loads) == sum(work)
    if world_size == 2:
        assert loads[0] == loads[1]

def test_resumed_on_gpus(group_of_one, monkeypatch):
    """
    On fake CUDA tensors: a checkpoint's state gets to the GPU, AdamW's step as well (pytorch issue 124133);
    the fused step takes it, and saving it moves nothing that is in use.
    """
    monkeypatch.setattr(optim, "training_dtype", lambda device: torch.bfloat16)
    cpu = random_parameters()
    saved = []
    for optimizer in (torch.optim.AdamW(cpu, fused=True), torch.optim.Muon(cpu)):
        set_gradients(cpu, 0)
        optimizer.step()
        saved.append(optimizer.state_dict())

    with FakeTensorMode(allow_non_fake_inputs=True):
        parameters = [torch.nn.Parameter(torch.empty(shape, device="cuda")) for shape in SHAPES]
        optimizers = [
            Sharded(torch.optim.AdamW(parameters, fused=True), work=torch.numel),
            Sharded(Muon(parameters, **ALL_VARIANTS), work=torch.numel),
        ]
        # no message is sent: fakes can be neither copied nor pickled
        monkeypatch.setattr(optim, "broadcast", lambda tensors, source: None)
        for optimizer, state in zip(optimizers, saved, strict=True):
            optimizer.load_state_dict(state)
            for p in parameters:
                p.grad = torch.empty_like(p)
            optimizer.step()
            again = copy_out(optimizer.state_dict(), {}, copies=[])["state"]
            assert again.keys() == state["state"].keys()
            for tensors in again.values():
                assert {x.device.type for x in tensors.values()} == {"cpu"}
            for tensors in optimizer.optimizer.state.values():
                assert {x.device.type for x in tensors.values()} == {"cuda"}
