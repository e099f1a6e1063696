"""HIRL's path loss against the formulation that gathers every prototype of every path, forward and backward.

    python bench/losses.py                 # on the CPU, at the released scale
    python bench/losses.py --device cuda

Both are timed in alternation in one process; the peak memory beyond the inputs is read in a process of its own
each (CPU: resident set, high-water mark; CUDA: the allocator's).
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import common


def gathering_path_loss(z, hierarchy, index, negative_leaves, eps=1e-6):
    """The same loss from (B, 1+M, L, D) gathered prototypes, as the formula reads."""
    leaf = hierarchy.assign[0][index, None]
    path = [torch.cat([leaf, negative_leaves], dim=1)]
    for up in hierarchy.parent:
        path.append(up[path[-1]])
    prototypes = torch.stack([p[node] for p, node in zip(hierarchy.prototypes, path)], dim=2)  # (B, 1+M, L, D)
    score = ((1 + (z[:, None] * prototypes).sum(dim=3)) / 2).prod(dim=2)  # (B, 1+M)
    kept = (negative_leaves != leaf).to(z.dtype)
    negative = (-torch.log(1 - score[:, 1:] + eps) * kept).sum(dim=1) / (kept.sum(dim=1) + eps)
    return (-torch.log(score[:, 0] + eps) + negative).mean() / 2


def problem(args):
    """z, a random tree, image numbers and drawn leaves at the size asked for."""
    g = torch.Generator().manual_seed(0)
    prototypes = [F.normalize(torch.randn(k, args.dim, generator=g), dim=1) for k in args.clusters]
    parent = [torch.randint(b, (a,), generator=g) for a, b in zip(args.clusters, args.clusters[1:])]
    assign = [torch.randint(args.clusters[0], (10_000,), generator=g)]
    for up in parent:
        assign.append(up[assign[-1]])
    tree = [[level.to(args.device) for level in part] for part in (prototypes, assign, parent, [])]
    z = F.normalize(torch.randn(args.batch, len(args.clusters), args.dim, generator=g), dim=2).to(args.device)
    index = torch.randint(10_000, (args.batch,), generator=g).to(args.device)
    leaves = torch.randint(args.clusters[0], (args.batch, args.paths), generator=g).to(args.device)
    return z.requires_grad_(), common.Hierarchy(*tree), index, leaves


def step(loss, inputs):
    """Forward and backward: the loss's value, its gradient, seconds."""
    inputs[0].grad = None
    start = time.perf_counter()
    value = loss(*inputs)
    value.backward()
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return value.item(), inputs[0].grad.clone(), time.perf_counter() - start


LOSSES = {"gathering": gathering_path_loss, "common.py": common.semantic_path_loss}


def cpu_name():
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.machine()


def high_water():
    """MiB: the largest resident set so far (getrusage would count the parent process's, from before exec)."""
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def peak_memory(name, args):
    """MiB beyond the inputs that one step of this loss takes, measured in this (fresh) process."""
    step(LOSSES[name], problem(argparse.Namespace(**{**vars(args), "batch": 2, "paths": 2})))  # libraries loaded
    inputs = problem(args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(LOSSES[name], inputs)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = high_water()
    step(LOSSES[name], inputs)
    return high_water() - before


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batch", type=int, default=256)
    p.add_argument("--dim", type=int, default=128)
    p.add_argument("--clusters", type=int, nargs="+", default=[30000, 10000, 1000])
    p.add_argument("--paths", type=int, default=1000)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--device", default="cpu")
    p.add_argument("--peak-of", choices=LOSSES, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.peak_of:
        return print(peak_memory(args.peak_of, args))
    print(f"{time.strftime('%Y-%m-%d')}  torch {torch.__version__}  {torch.get_num_threads()} threads  "
          f"{torch.cuda.get_device_name() if args.device == 'cuda' else cpu_name()}")
    print(f"B {args.batch}, D {args.dim}, K {args.clusters}, M {args.paths}; forward and backward, "
          f"median of {args.rounds} alternating rounds")
    inputs = problem(args)
    seconds, last = {name: [] for name in LOSSES}, {}
    for _ in range(args.rounds + 1):  # the first round warms up
        for name, loss in LOSSES.items():
            *last[name], took = step(loss, inputs)
            seconds[name].append(took)
    took = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    peak = {name: float(subprocess.run([sys.executable, *sys.argv, "--peak-of", name], check=True, text=True,
                                       capture_output=True).stdout) for name in LOSSES}
    for name in LOSSES:
        print(f"{name:12} {1000 * took[name]:9.1f} ms   peak {peak[name]:8.0f} MiB")
    ours, theirs = last["common.py"], last["gathering"]
    memory = peak["common.py"] / peak["gathering"] if peak["gathering"] > 1 else float("nan")
    print(f"ratio        {took['gathering'] / took['common.py']:9.1f} x faster, "
          f"{memory:.3f} of the memory; values differ by "
          f"{abs(ours[0] - theirs[0]):.1e}, gradients by {(ours[1] - theirs[1]).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
