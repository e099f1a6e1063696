"""Several processes as one: what all ranks do at once, which is nothing where there is one process.

Letters: B batch, b rows of it on this rank, D embedding, S side of a view. Rows are items, in rank order.
"""

import contextlib
import hashlib

import torch
import torch.distributed as dist
import torch.nn as nn


# ---- ranks and rows
def processes():
    """How many processes train together: 1, or what torchrun was told."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def say(line):
    """Print on rank 0, at once."""
    if rank() == 0:
        print(line, flush=True)


def local_rows(n):
    """This rank's slice of n rows: contiguous, sizes differ by at most one."""
    return slice(n * rank() // processes(), n * (rank() + 1) // processes())


def all_reduce_sum(tensor):
    """Sum over ranks, in place; the same on every rank."""
    if processes() > 1:
        dist.all_reduce(tensor)
    return tensor


class differentiable_sum_(torch.autograd.Function):
    """Sum over ranks; the gradient of a sum over ranks is the sum over ranks of the gradients."""

    @staticmethod
    def forward(ctx, x):
        return all_reduce_sum(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return all_reduce_sum(grad.clone(memory_format=torch.contiguous_format))


differentiable_sum = differentiable_sum_.apply  # all_reduce_sum of a copy, through which gradients flow


def all_gather_rows(tensor, equal=False):
    """Rows of all ranks in rank order; gradients flow back to the rank that holds the row.

    equal: every rank has as many rows, so none need ask. If each of G ranks computes the same loss of all rows, the
    gradient comes back G times too large; `average` divides by G again, so that they train as one would.
    """
    if processes() == 1:
        return tensor
    counts = [len(tensor)] * processes() if equal else all_gather_rows(torch.tensor([len(tensor)]), equal=True).tolist()
    before, after = (tensor.new_zeros(sum(c), *tensor.shape[1:]) for c in (counts[:rank()], counts[rank() + 1:]))
    return differentiable_sum(torch.cat([before, tensor, after]))


def rows_before(x):
    """How many rows the ranks before this one hold."""
    return int(all_gather_rows(torch.tensor([len(x)]), equal=True)[:rank()].sum())


def all_gather_objects(value):
    """What every rank gave, a list in rank order: anything that can be pickled."""
    values = [value] * processes()
    if processes() > 1:
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def first_rank_first():
    """The others enter when the first rank has left."""
    if rank() > 0:
        all_reduce_sum(torch.zeros(1))
    yield
    if rank() == 0:
        all_reduce_sum(torch.zeros(1))


def average(tensors):
    """Mean over ranks of those that are tensors, not None, in place and in one collective; nothing at world size 1."""
    tensors = [t for t in tensors if t is not None]
    if processes() > 1 and tensors:
        flat = all_reduce_sum(torch.cat([t.flatten() for t in tensors])) / processes()
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(part.view_as(t))


# ---- draws that all ranks agree on
def random_state(seed, *place, device="cpu"):
    """A generator that depends on the seed and the place (epoch, step, ...) alone; `device` for large draws."""
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


# ---- batch norm over the rows of all processes
class SyncBatchNorm(nn.SyncBatchNorm):
    """Batch norm over the rows of all ranks, any number on each: torch's on a GPU, which it needs; ours elsewhere."""

    process_group = None  # everyone

    def forward(self, x):
        if x.device.type == "cuda" or not self.training or processes() == 1:
            return super().forward(x)
        wide, over = x.to(torch.promote_types(x.dtype, torch.float32)), [0, *range(2, x.ndim)]
        count = all_reduce_sum(x.new_full((), x.numel() / x.shape[1], dtype=torch.float32))
        mean = differentiable_sum(wide.sum(over, keepdim=True)) / count  # (1, C, 1, ...)
        var = differentiable_sum((wide - mean).pow(2).sum(over, keepdim=True)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * count / (count - 1), self.momentum)
        scale, shift = (self.weight.view_as(mean), self.bias.view_as(mean)) if self.affine else (1, 0)
        return ((wide - mean) * ((var + self.eps).rsqrt() * scale) + shift).to(x.dtype)


def sync_batch_norm(module):
    """Under several ranks, turn every batch norm into a SyncBatchNorm, in place: nothing else about it changes."""
    for child in module.modules():
        if processes() > 1 and isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.__class__ = SyncBatchNorm
    return module


def make_keys(encode, view, bn, generator):
    """encode(view), keys (b, D) of the views (b, 3, H, W); bn "shuffle": in batches mixed across processes (MoCo's
    shuffled BN), so that a batch's statistics do not tell which key belongs to which query.
    """
    if bn == "sync" or processes() == 1:  # one process has nobody to mix with
        return encode(view)
    everyone = all_gather_rows(view, equal=True)  # (B, 3, H, W) of all processes
    order, mine = torch.randperm(len(everyone), generator=generator), local_rows(len(everyone))
    there, back = (ids[mine].to(view.device, non_blocking=True) for ids in (order, order.argsort()))
    return all_gather_rows(encode(everyone[there]), equal=True)[back]  # (B, D) of all, then (b, D)
