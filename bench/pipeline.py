"""What the data pipeline and the hierarchy cost a training step: ratios, measured side by side.

    python bench/pipeline.py                        # textures, the default network: half a minute on two idle cores
    python bench/pipeline.py --data cifar100 --arch resnet18 --stem 3x3 --batch-size 128

Alternates, in one process, stretches of some steps each: a step of MoCo on a fixed batch; the same step fed by the real
pipeline (draws, crops, colours), which makes a batch ahead where a core is free; and the pipeline alone, also as PIL
transforms in the data-set object, the usual way. Then the epoch: with / without clustering and path loss, from the
measured step, feature pass and k-means. Ratios are medians over the rounds.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from losses import cpu_name
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import hirl_moco
import networks
import plumbing


def clock(function, device):
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def stretch(batches, step, steps, device):
    """Seconds per step; the first is not counted: it waits for the pipeline, which then works ahead."""
    source = iter(batches())
    clock(lambda: step(next(source)), device)
    return clock(lambda: [step(next(source)) for _ in range(steps)], device)[0] / steps


def alternate(kinds, rounds, steps, device):
    """{name: seconds per step in each round} of {name: (() -> iterable of batches, step)}; a round warms up."""
    seconds = {name: [] for name in kinds}
    for turn in range(rounds + 1):
        for name, (batches, step) in kinds.items():
            seconds[name].append(stretch(batches, step, steps, device))
        last = ", ".join(f"{1000 * times[-1]:.1f}" for times in seconds.values())
        print(f"round {turn} of {rounds}: {last} ms", file=sys.stderr, flush=True)
    return {name: times[1:] for name, times in seconds.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="textures")
    p.add_argument("--data-root", default="data")
    p.add_argument("--arch", default="tiny")
    p.add_argument("--stem", default="3x3s2")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--steps", type=int, default=15, help="of each kind, in each round")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    device = plumbing.set_up(argparse.Namespace(device=args.device, seed=0))  # as a run does
    train, _ = common.load_data(args.data, args.data_root, device)
    preset = hirl_moco.PRESETS["textures" if args.data == "textures" else "cifar"]
    view = hirl_moco.AUGMENTATIONS["textures" if args.data == "textures" else "cifar"]
    clusters = [k for k in preset["clusters"] if k < len(train) / 4] or [len(train) // 16]
    model = hirl_moco.MoCo(hirl_moco.Encoder(args.arch, args.stem, "mlp-bn", 128), 128, preset["queue_size"])
    model.heads = nn.ModuleList(hirl_moco.level_head(128) for _ in clusters)
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, momentum=0.9)

    def step(views, hierarchy=None, index=None):
        raw_q = model.encoder_q(views[0])
        with torch.no_grad():
            model.update_key_encoder(0.99)
            k = F.normalize(model.encoder_k(views[1]), dim=1)
        loss = hirl_moco.info_nce(F.normalize(raw_q, dim=1), k, model.queue, 0.2)
        if hierarchy:
            z = F.normalize(torch.stack([head(raw_q) for head in model.heads], dim=1), dim=2)
            leaves = torch.randint(clusters[0], (len(raw_q), preset["negative_paths"]), device=device)
            loss = loss + common.semantic_path_loss(z, hierarchy, index, leaves)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.enqueue(k)

    def stream():
        return itertools.chain.from_iterable(
            common.batches(train, args.batch_size, [view] * 2, seed=0, epoch=epoch, device=device)
            for epoch in itertools.count())

    pil = transforms.Compose([
        transforms.RandomResizedCrop(32, view.scale), transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(*view.jitter)], view.jitter_p),
        transforms.RandomGrayscale(view.gray_p), transforms.ToTensor(), transforms.Normalize(0.5, 0.25)])
    pictures = [train.picture(i) for i in range(args.batch_size)]
    fixed = next(stream())
    for _ in range(2):  # the second as in every epoch but the first
        features_s, x = clock(lambda: F.normalize(networks.extract_features(model.encoder_k, train, 32, device=device),
                                                  dim=1), device)
        kmeans_s, hierarchy = clock(lambda: common.hierarchical_kmeans(x, clusters, temperature=0.2), device)
    seconds = alternate({
        "step, fixed batch": (lambda: itertools.repeat(fixed), lambda batch: step(batch[2])),
        "step, real pipeline": (stream, lambda batch: step(batch[2])),
        "step with path loss, real pipeline": (stream, lambda batch: step(batch[2], hierarchy, batch[1])),
        "pipeline alone": (stream, lambda batch: None),
        "PIL transforms, one process": (lambda: itertools.repeat(pictures * 2), lambda batch: [*map(pil, batch)]),
    }, args.rounds, args.steps, device)
    took = {name: statistics.median(times) for name, times in seconds.items()}

    def ratio(name, base):
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[base]))

    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    print(f"{time.strftime('%Y-%m-%d')}  torch {torch.__version__}  {torch.get_num_threads()} threads  {name}")
    print(f"{Path(args.data).name}, {len(train)} pictures, {args.arch} {args.stem}, batch {args.batch_size}, "
          f"clusters {clusters}")
    for name, t in took.items():
        print(f"{name:36} {1000 * t:8.1f} ms   {2 * args.batch_size / t:9.0f} views/s")
    print("step on the pipeline / on a fixed batch        "
          f"{ratio('step, real pipeline', 'step, fixed batch'):.3f}   (at most 1.1)")
    print(f"pipeline / PIL transforms                      "
          f"{ratio('PIL transforms, one process', 'pipeline alone'):.1f} x faster")
    steps = len(train) // args.batch_size
    plain, full = steps * took["step, real pipeline"], steps * took["step with path loss, real pipeline"]
    print(f"epoch: {plain:.1f} s of steps; with hierarchy {full:.1f} s of steps + {features_s:.1f} s features + "
          f"{kmeans_s:.1f} s k-means")
    print("epoch with / without hierarchy                 "
          f"{(full + features_s + kmeans_s) / plain:.3f}   (at most 1.35)")


if __name__ == "__main__":
    main()
