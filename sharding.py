"""
Training a model that does not fit into one GPU together with its gradients (--shard). Weights, gradients and
optimizer state are cut up over the ranks by torch's FSDP2 (fully_shard; ZeRO stage 3, arXiv 1910.02054): of
every parameter a rank holds some rows. A layer is put together when it runs, and taken apart behind it.

    a unit of its own        every layer, and every embedding: put together for each pass that runs it
    put together all along   what the passes share or read directly: the head, Rk and Rv, the scalars

AdamW works element by element, so it updates the rows of a rank. Muon needs whole matrices: each has an
owner, which gets all of its rows, updates it, and sends them back; owners share the work as in optim.py.

On disk a checkpoint is that of a run without --shard, and either can go on with the other's. Evaluation and
sampling need no gradients, and their passes differ from rank to rank: they run on a whole copy of the model.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from optim import Sharded, owners
from recurrent import build_model

# -----------------------------------------------------------------------------
# The model

def shard(train_step, device):
    """
    Shard a TrainStep and its model, in place, over all ranks. A layer is sent in the dtype of the
    activations, to which it would be cast anyway: otherwise a copy for every pass would be kept for the
    backward. Gradients add up in float32.
    """
    model = train_step.model
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=model.wte.weight.dtype,
                                  cast_forward_inputs=False)
    for block in model.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    for embedding in (model.wte, *model.value_embeds.values()):
        fully_shard(embedding, mesh=mesh)
    fully_shard(train_step, mesh=mesh)

def rows_of(whole, rank, world_size):
    """The rows of a parameter, or of its optimizer state, that a rank holds: a view."""
    size = -(-whole.size(0) // world_size)
    return whole[rank * size:(rank + 1) * size]

def distributed(local, p):
    """The DTensor of which every rank has the rows `local`, as it has those of the parameter p."""
    return DTensor.from_local(local, p.device_mesh, p.placements, run_check=False,
                              shape=p.shape, stride=p.stride())

def is_sharded(model):
    return any(isinstance(p, DTensor) for p in model.parameters())

def whole_state_dict(model):
    """
    The state_dict of a model, as if it were not sharded: rank 0 gets it, its tensors on the CPU, the others
    get an empty one. All ranks have to call it. One tensor at a time is whole on all devices.
    """
    if not is_sharded(model):
        return model.state_dict()
    state = {}
    for name, p in model.state_dict().items():
        whole = p.full_tensor()
        if dist.get_rank() == 0:
            state[name] = whole.cpu()
    return state

def load_whole_state_dict(model, state):
    """Load the state_dict of a model that was not sharded. Raises what load_state_dict() does."""
    if is_sharded(model):
        parameters = dict(model.named_parameters())
        rank, world_size = dist.get_rank(), dist.get_world_size()
        shards = {}
        for name, whole in state.items():
            shards[name] = whole
            p = parameters.get(name)
            if p is not None and p.shape == whole.shape:
                shards[name] = distributed(rows_of(whole, rank, world_size).to(p.device), p)
        state = shards
    model.load_state_dict(state)

@torch.no_grad()
def whole_model(model):
    """
    The model itself, or a whole copy of a sharded one, for inference: its matrices are in the dtype of the
    activations, to which they would be cast anyway. All ranks have to call it.
    """
    if not is_sharded(model):
        return model
    device = model.lm_head.weight.device
    with torch.device("meta"):
        copy = build_model(model.config)
    copy.compute_dtype = model.compute_dtype
    for name, module in model.named_modules():
        there = copy.get_submodule(name)
        for key, p in module.named_parameters(recurse=False):
            is_matrix = isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
            dtype = model.compute_dtype if is_matrix else p.dtype
            there.register_parameter(key, torch.nn.Parameter(p.full_tensor().to(dtype), requires_grad=False))
        for key, x in module.named_buffers(recurse=False):
            there.register_buffer(key, x, persistent=False)
    return copy.to(device)

def clip_gradients(model, largest_norm):
    """Scale the gradients down to a norm. Returns the norm that they had, a scalar tensor, of all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# -----------------------------------------------------------------------------
# The optimizers

class OnRows:
    """An optimizer that works element by element, on the rows that this rank has of every parameter."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.params = []  # as the model has them
        self.rows = []  # as the optimizer has them: the same memory
        for group in optimizer.param_groups:
            rows = [p.detach().to_local() for p in group["params"]]
            self.params += group["params"]
            self.rows += rows
            group["params"] = rows
        # who keeps the whole state of which parameter, for checkpoints
        self.owner = owners([p.numel() for p in self.params], dist.get_world_size())

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none=True):
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self):
        for p, rows in zip(self.params, self.rows):
            rows.grad = None if p.grad is None else p.grad.to_local()
        self.optimizer.step()
        for rows in self.rows:
            rows.grad = None

    def state_dict(self):
        """
        This rank's share, as of Sharded: the whole states of the parameters that it keeps, on the CPU. All
        ranks have to call it. One tensor at a time is whole on all devices.
        """
        state_dict = self.optimizer.state_dict()
        share = {}
        for i, tensors in state_dict["state"].items():
            whole = {}
            for name, x in tensors.items():
                if x.dim() > 0:  # AdamW's number of steps has none
                    x = distributed(x, self.params[i]).full_tensor()
                if self.owner[i] == dist.get_rank():
                    whole[name] = x.cpu()
            if whole:
                share[i] = whole
        return state_dict | {"state": share}

    def load_state_dict(self, state_dict):
        """Load this rank's rows of a whole state_dict. Raises ValueError if it does not fit."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        state = {}
        for i, tensors in state_dict["state"].items():
            state[i] = {}
            for name, x in tensors.items():
                if x.dim() > 0 and x.shape != self.params[i].shape:
                    raise ValueError(f"the shape of {name} is {tuple(x.shape)}")
                state[i][name] = rows_of(x, rank, world_size).clone() if x.dim() > 0 else x
        self.optimizer.load_state_dict(state_dict | {"state": state})

class OnMatrices(Sharded):
    """
    An optimizer that works on whole matrices, each updated by its owner, which alone has its state. That is
    Sharded, but of weights and gradients a rank has rows. The optimizer works on stand-ins, which are empty
    but for the time of a step.
    """

    def __init__(self, optimizer, work):
        super().__init__(optimizer, work)
        self.stand_ins = []
        for group in optimizer.param_groups:
            stand_ins = [torch.empty(0, dtype=p.dtype, device=p.device) for p in group["params"]]
            self.stand_ins += stand_ins
            group["params"] = stand_ins

    def zero_grad(self, set_to_none=True):
        for p in self.params:
            p.grad = None

    def split_rows(self, i):
        """The shapes of the rows of parameter i that every rank has."""
        p = self.params[i]
        like = torch.empty(p.shape, device="meta")
        return [rows_of(like, rank, self.world_size).shape for rank in range(self.world_size)]

    @torch.no_grad()
    def step(self):
        """Send the rows to their owners, update there, send them back: two messages between any two ranks."""
        active = [i for i, p in enumerate(self.params) if p.grad is not None]
        owned = [[i for i in active if self.owner[i] == rank] for rank in range(self.world_size)]
        mine = owned[self.rank]
        shapes = {i: self.split_rows(i) for i in active}

        # the rows of weights and gradients to the owners
        send = []
        for of_rank in owned:
            tensors = [(self.params[i].to_local(), self.params[i].grad.to_local()) for i in of_rank]
            send.append([x for pair in tensors for x in pair])
        expected = [[shapes[i][rank] for i in mine for _ in range(2)] for rank in range(self.world_size)]
        received = exchange(send, expected, self.params[0])
        for n, i in enumerate(mine):
            stand_in = self.stand_ins[i]
            stand_in.data = torch.cat([tensors[2 * n] for tensors in received])
            stand_in.grad = torch.cat([tensors[2 * n + 1] for tensors in received])
        del send, received

        self.optimizer.step()

        # the rows of the new weights back
        send = []
        for rank in range(self.world_size):
            send.append([rows_of(self.stand_ins[i], rank, self.world_size) for i in mine])
        expected = [[shapes[i][self.rank] for i in of_rank] for of_rank in owned]
        for of_rank, tensors in zip(owned, exchange(send, expected, self.params[0])):
            for i, rows in zip(of_rank, tensors):
                self.params[i].to_local().copy_(rows)
        for i in mine:
            self.stand_ins[i].grad = None
            self.stand_ins[i].data = self.stand_ins[i].new_empty(0)

def exchange(send, expected, like):
    """
    Send to every rank the tensors of send[rank], and receive from every rank tensors of the shapes
    expected[rank]: a list of lists. like: a tensor of their dtype and device.
    """
    send_sizes = [sum(x.numel() for x in tensors) for tensors in send]
    flat = torch.cat([like.to_local().new_empty(0), *[x.flatten() for tensors in send for x in tensors]])
    sizes = [[shape.numel() for shape in shapes] for shapes in expected]
    receive_sizes = [sum(of_rank) for of_rank in sizes]
    received = flat.new_empty(sum(receive_sizes))
    dist.all_to_all_single(received, flat, receive_sizes, send_sizes)
    tensors = []
    for part, of_rank, shapes in zip(received.split(receive_sizes), sizes, expected):
        tensors.append([x.view(shape) for x, shape in zip(part.split(of_rank), shapes)])
    return tensors

def share(adamw, muon):
    """The two optimizers of a sharded model, made of those that make_optimizers() has."""
    return OnRows(adamw), OnMatrices(muon, work=lambda p: p.numel() * min(p.shape))
