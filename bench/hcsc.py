"""HCSC's selection and both losses against loops over images with Python sets; and as a share of a training step.

    python bench/hcsc.py                   # on the CPU, at the released scale
    python bench/hcsc.py --device cuda

The loops are how one writes HCSC down first: the chances of all queue entries and prototypes as matrix products,
then image by image the set of negatives that stay, and a contrast against those. All are given the same draws and
timed in alternation in one process, forward and backward, selection and draws included. The loops and "all anew" take
memberships anew, "hcsc.py" keeps them from step to step, as a run does. The training step is MoCo's with ResNet-18
(3x3 stem, 32 px), as hcsc.py runs it before its first tree.
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from losses import cpu_name

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import hcsc


def looping_losses(q, k, queue, tree, index, draws, temperature):
    """HCSC's two terms as a sum, one image after the other; draws: uniform, as `vectorised_losses` gets them."""
    total = 0.0
    levels = len(tree.prototypes)
    for level in range(levels):
        prototypes, phi = tree.prototypes[level], tree.concentration[level]
        own = tree.assign[level][index].tolist()
        member = torch.softmax(queue @ prototypes.T / phi, dim=1)  # (Q, K_l)
        if level + 1 < levels:
            above = torch.softmax(prototypes @ tree.prototypes[level + 1].T / tree.concentration[level + 1], dim=1)
        instance, prototype = [], []
        for n, cluster in enumerate(own):
            dropped = set((draws[0][level][n] >= 1 - member[:, cluster]).nonzero()[:, 0].tolist())
            kept = sorted(set(range(len(queue))) - dropped)
            positive = (q[n] @ k[n])[None] / temperature
            logits = torch.cat([positive, queue[kept] @ q[n] / temperature])
            instance.append(F.cross_entropy(logits[None], logits.new_zeros(1, dtype=torch.long)))
            dropped = {cluster}
            if level + 1 < levels:
                chance = 1 - above[:, int(tree.parent[level][cluster])]
                dropped |= set((draws[1][level][n] >= chance).nonzero()[:, 0].tolist())
            kept = [cluster, *sorted(set(range(len(prototypes))) - dropped)]
            logits = prototypes[kept] @ q[n] / phi[kept]
            prototype.append(F.cross_entropy(logits[None], logits.new_zeros(1, dtype=torch.long)))
        total = total + (torch.stack(instance).mean() + torch.stack(prototype).mean()) / levels
    return total


def vectorised_losses(q, k, queue, tree, index, draws, temperature, kept=(None, None)):
    """The same by the functions of common.py and hcsc.py; kept: lists for memberships, a batch of which changes."""
    changed = torch.arange(len(q), device=q.device) % len(queue)
    chances = hcsc.select(queue, tree, index, temperature, kept=kept, changed=changed)
    masks = [[u < chance for u, chance in zip(*pair)] for pair in zip(draws, chances)]
    return sum(hcsc.hcsc_terms([q], k, queue, tree, index, masks[0], [masks[1]], temperature).values())


def problem(args, generator):
    """q, k, queue, a random tree, image numbers at the size asked for."""
    def unit(*shape):
        return F.normalize(torch.randn(*shape, generator=generator), dim=1).to(args.device)

    parent = [torch.randint(b, (a,), generator=generator) for a, b in zip(args.clusters, args.clusters[1:])]
    assign = [torch.randint(args.clusters[0], (10_000,), generator=generator)]
    for up in parent:
        assign.append(up[assign[-1]])
    tree = common.Hierarchy([unit(k, args.dim) for k in args.clusters], [a.to(args.device) for a in assign],
                            [p.to(args.device) for p in parent],
                            [torch.full((k,), 0.2, device=args.device) for k in args.clusters])
    index = torch.randint(10_000, (args.batch,), generator=generator).to(args.device)
    q, k, queue = (unit(rows, args.dim) for rows in (args.batch, args.batch, args.queue))
    return q.requires_grad_(), k, queue, tree, index


def timed(call, device):
    """(result, seconds) of a call."""
    start = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def training_step(args):
    """A function that does one step of plain MoCo on a fixed batch."""
    model = hcsc.MoCo(hcsc.Encoder("resnet18", "3x3", "mlp-bn", args.dim), args.dim, args.queue)
    model.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.01, momentum=0.9)
    views = [common.normalize_pixels(torch.rand(args.batch, 3, 32, 32)).to(args.device) for _ in range(2)]

    def step():
        q = F.normalize(model.encoder_q(views[0]), dim=1)
        with torch.no_grad():
            model.update_key_encoder(0.99)
            k = F.normalize(model.encoder_k(views[1]), dim=1)
        loss = hcsc.info_nce(q, k, model.queue, 0.2)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        model.enqueue(k)

    return step


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batch", type=int, default=256)
    p.add_argument("--dim", type=int, default=128)
    p.add_argument("--queue", type=int, default=16384)
    p.add_argument("--clusters", type=int, nargs="+", default=[3000, 2000, 1000])
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}  torch {torch.__version__}  {torch.get_num_threads()} threads  "
          f"{torch.cuda.get_device_name() if args.device == 'cuda' else cpu_name()}")
    print(f"B {args.batch}, D {args.dim}, Q {args.queue}, K {args.clusters}; forward and backward, "
          f"median of {args.rounds} alternating rounds")
    generator = torch.Generator().manual_seed(0)
    inputs = problem(args, generator)
    losses = {"loops with sets": looping_losses, "all anew": vectorised_losses,
              "hcsc.py": functools.partial(vectorised_losses, kept=([], []))}
    seconds, last = {name: [] for name in [*losses, "training step"]}, {}
    torch.backends.cudnn.benchmark = True  # as in a run
    step = training_step(args)
    for turn in range(args.rounds + 1):  # the first round warms up
        gen = torch.Generator(args.device).manual_seed(turn)

        def draw():
            return [[torch.rand(args.batch, n, generator=gen, device=args.device) for n in sizes]
                    for sizes in ([args.queue] * len(args.clusters), args.clusters)]

        draws, took_draws = timed(draw, args.device)
        for name, loss in losses.items():
            inputs[0].grad = None

            def both():
                value = loss(*inputs, draws, 0.2)
                value.backward()
                return value.item()

            value, took = timed(both, args.device)
            last[name] = value, inputs[0].grad.clone()
            seconds[name].append(took + took_draws)
        seconds["training step"].append(timed(step, args.device)[1])
    took = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, value in took.items():
        print(f"{name:16} {1000 * value:9.1f} ms")
    (slow, slow_gradient), _, (fast, fast_gradient) = last.values()
    print(f"ratio            {took['loops with sets'] / took['hcsc.py']:9.1f} x faster, "
          f"{took['loops with sets'] / took['all anew']:.1f} x with all anew; "
          f"{100 * took['hcsc.py'] / took['training step']:.1f} % of a training step; values differ by "
          f"{abs(slow - fast):.1e}, gradients by {(slow_gradient - fast_gradient).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
