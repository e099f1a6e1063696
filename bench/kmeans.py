"""K-means against faiss-cpu and whatever else is installed: time, objective, memory, in alternation in one process.

    python bench/kmeans.py                              # figures 1, 2, 3 and 5 on the CPU, about ten minutes
    python bench/kmeans.py --data cifar100/train        # features of a folder's pictures instead of the mixture
    python bench/kmeans.py --figures 2 --data feats.npy # features of your own
    python bench/kmeans.py --device cuda --figures 4    # 1.28M x 128, 30000-10000-1000

Figures: 1 exact mode, shared start; 2 default mode, K >= 1000, shared start and own seeding; 3 the released recipe
(three levels; faiss niter 20, nredo 5); 4 one GPU, ours alone; 5 extra memory, repeatability.
time: median of the rounds. ratio: median over rounds of time / faiss's time in the same round. objective: mean
squared distance to the nearest returned centroid, one evaluator in float64 for all. memory: rise of the process's
high-water mark (Linux VmHWM, reset before the call) in a fresh process with the data loaded and the library warm; on
CUDA, max_memory_allocated beyond the data. Shared start: same random rows as first centroids.
"""
import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from losses import cpu_name
from torchvision.transforms.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import hierarchical_kmeans, kmeans, load_data, near_centroids, normalize_pixels
from networks import extract_features

ITERATIONS = 20


# ---- contestants: (x (N, D) numpy or CUDA tensor, k, seed, init or None) -> centroids (k, D)

def ours(x, k, seed, init, exact=False):
    start = None if init is None else torch.as_tensor(init)
    return kmeans(torch.as_tensor(x), k, iterations=ITERATIONS, seed=seed, init=start, exact=exact)[0]


def ours_exact(x, k, seed, init):
    return ours(x, k, seed, init, exact=True)


def faiss_kmeans(x, k, seed, init, nredo=1):
    import faiss

    run = faiss.Kmeans(x.shape[1], k, niter=ITERATIONS, nredo=nredo, seed=seed + 1,
                       max_points_per_centroid=10**9, min_points_per_centroid=1)
    run.train(x, init_centroids=init)
    run.assign(x)  # ours returns the assignment too
    return run.centroids


def sklearn_kmeans(x, k, seed, init):
    from sklearn.cluster import KMeans

    start = "random" if init is None else init
    return KMeans(k, init=start, n_init=1, max_iter=ITERATIONS, tol=0, random_state=seed).fit(x).cluster_centers_


def fastkmeans(x, k, seed, init):
    from fastkmeans import FastKMeans

    run = FastKMeans(x.shape[1], k, niter=ITERATIONS, seed=seed, max_points_per_centroid=None)
    run.train(x)
    run.predict(x)
    return run.centroids


CONTESTANTS = {f.__name__: f for f in (faiss_kmeans, ours_exact, ours, sklearn_kmeans, fastkmeans)}
NEEDS = {"faiss_kmeans": "faiss", "sklearn_kmeans": "sklearn", "fastkmeans": "fastkmeans"}


def installed(name):
    """Whether a contestant can run here."""
    return importlib.util.find_spec(NEEDS.get(name, "torch")) is not None


# ---- data and measures

def mixture(n, d, k, seed=1234):
    """Overlapping Gaussians of uneven weight on the unit sphere, k / 3 of them."""
    g = torch.Generator().manual_seed(seed)
    parts = max(4, k // 3)
    centre, weight = torch.randn(parts, d, generator=g), torch.rand(parts, generator=g).square() + 0.05
    which = torch.multinomial(weight, n, True, generator=g)
    return F.normalize(centre[which] + torch.randn(n, d, generator=g), dim=1).numpy()


@functools.cache
def patch_responses(folder):
    """(N, 1024) responses of a folder's pictures to 256 of their own whitened patches, rectified, pooled 2x2."""
    images, g = load_data(folder)[0], torch.Generator().manual_seed(0)
    size = min(images.picture(0).size)
    which, corner = torch.randint(len(images), (10000,), generator=g), torch.randint(size - 5, (10000, 2), generator=g)
    patches = torch.stack([normalize_pixels(pil_to_tensor(images.picture(i))[None, :, a:a + 6, b:b + 6] / 255)[0]
                           for i, (a, b) in zip(which.tolist(), corner.tolist())]).flatten(1)
    patches -= patches.mean(1, keepdim=True)
    filters = torch.linalg.solve(patches.T.cov() + 0.1 * torch.eye(108), patches[:256].T).T  # whitens both sides
    filters = F.normalize(filters - filters.mean(1, keepdim=True), dim=1).view(-1, 3, 6, 6)

    class Responses(torch.nn.Module):
        def forward(self, x):
            return F.adaptive_avg_pool2d((F.conv2d(x, filters, stride=2).abs() - 0.5).relu(), 2).flatten(1)

    return extract_features(Responses(), images, size)


def picture_features(folder, n, d):
    """(n, d) unit rows: n of the pictures at random, patch responses reduced to d <= 1024 principal components."""
    x = patch_responses(folder)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:n]].double()
    x = x - x.mean(0)
    return F.normalize((x @ torch.linalg.eigh(x.T @ x).eigenvectors[:, -d:]).float(), dim=1).numpy()


def objective(x, centroids):
    """Mean squared distance to the nearest centroid, distances in float64."""
    x, c = torch.as_tensor(x), torch.as_tensor(centroids).to(torch.as_tensor(x).device)
    near = near_centroids(x, c)[:, 0]
    parts = zip(x.split(8192), near.split(8192))
    return sum((rows.double() - c[nearest].double()).square().sum().item() for rows, nearest in parts) / len(x)


def tree_objective(x, labels):
    """Mean squared distance of the images to the mean of their group at each level: comparable between trees."""
    x, out = torch.as_tensor(x).double(), []
    for label in labels:
        sums = torch.zeros(int(label.max()) + 1, x.shape[1], dtype=torch.double).index_add_(0, label, x)
        mean = sums / label.bincount().clamp(min=1)[:, None]
        out.append((x - mean[label]).square().sum(1).mean().item())
    return out


def clock(call, device):
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, out


def alternate(calls, rounds, device):
    """{name: call(seed)} -> {name: ([seconds], [results])}; the order turns round every time."""
    out = {name: ([], []) for name in calls}
    for seed in range(rounds):
        for name in list(calls)[:: 1 if seed % 2 else -1]:
            seconds, result = clock(lambda: calls[name](seed), device)
            out[name][0].append(seconds)
            out[name][1].append(result)
    return out


def peak_memory(name, x, k, init, device):
    """MiB beyond the data (see the top)."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        CONTESTANTS[name](x, k, 0, init)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/x.npy", x)
        if init is not None:
            np.save(f"{folder}/init.npy", init)
        command = [sys.executable, __file__, "--child", name, folder, str(k), "--threads", str(torch.get_num_threads())]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def child(name, folder, k):
    """In a fresh process: load, warm up on a small problem, reset the mark, run, print the rise in MiB."""
    def mark(field):
        return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) / 1024

    x, start = np.load(f"{folder}/x.npy"), Path(f"{folder}/init.npy")
    init = np.load(start) if start.exists() else None
    CONTESTANTS[name](x[:500].copy(), 10, 0, None)
    Path("/proc/self/clear_refs").write_text("5")
    before = mark("VmRSS")
    CONTESTANTS[name](x, k, 0, init)
    print(mark("VmHWM") - before)


# ---- figures

NAN = float("nan")


HEADINGS = "problem", "contestant", "time s", "x faiss", "objective", "x faiss", "extra MiB"


def add(problem, contestant, seconds, ratio=NAN, value=NAN, value_ratio=NAN, memory=NAN, note=""):
    """Print a line of the table."""
    print(f"{problem:44}{contestant:18}{seconds:9.3f}{ratio:9.3f}{value:12.6f}{value_ratio:10.5f}{memory:11.1f}", note,
          sep="  ", flush=True)


def compare(title, x, k, names, rounds, shared, device):
    """One problem, all contestants that run here."""
    def start(seed):
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:k]
        return torch.as_tensor(x)[rows].cpu().numpy() if shared else None

    names = [name for name in names if installed(name)]
    calls = {name: lambda seed, f=CONTESTANTS[name]: f(x, k, seed, start(seed)) for name in names}
    for name in names:  # warm up
        CONTESTANTS[name](x[:2000], min(k, 100), 0, None)
    out = alternate(calls, rounds, device)
    value = {name: [objective(x, c) for c in out[name][1]] for name in names}
    for name in names:
        ratio = value_ratio = NAN
        if "faiss_kmeans" in names:
            ratio = statistics.median(a / b for a, b in zip(out[name][0], out["faiss_kmeans"][0]))
            value_ratio = statistics.median(a / b for a, b in zip(value[name], value["faiss_kmeans"]))
        again = ""
        if name.startswith("ours"):
            again = f"repeatable: {torch.equal(out[name][1][0], calls[name](0))}"
        memory = peak_memory(name, x, k, start(0), device)
        add(title, name, statistics.median(out[name][0]), ratio, statistics.median(value[name]), value_ratio, memory,
            again)


def faiss_tree(x, clusters, seed):
    """The released recipe: faiss niter 20, nredo 5, each level on the normalised centroids below -> labels."""
    import faiss

    items, labels = x, []
    for k in clusters:
        c = faiss_kmeans(items, k, seed, None, nredo=5)
        index = faiss.IndexFlatL2(x.shape[1])
        index.add(c)
        label = torch.from_numpy(index.search(items, 1)[1][:, 0])
        labels.append(label if not labels else label[labels[-1]])
        items = np.ascontiguousarray(F.normalize(torch.from_numpy(c), dim=1).numpy())
    return labels


def recipes(x, rounds):
    rows = torch.as_tensor(x)
    for clusters in ((1000, 100, 10), (3000, 2000, 1000)):
        calls = {"faiss_kmeans": lambda seed: faiss_tree(x, clusters, seed),
                 "ours": lambda seed: hierarchical_kmeans(rows, clusters, temperature=0.2, seed=seed).assign}
        out = alternate(calls, rounds, "cpu")
        value = {name: np.median([tree_objective(x, labels) for labels in out[name][1]], 0) for name in calls}
        for name in calls:
            ratio = statistics.median(a / b for a, b in zip(out[name][0], out["faiss_kmeans"][0]))
            for level in range(len(clusters)):
                add(f"3 tree {'-'.join(map(str, clusters))} level {level}", name, statistics.median(out[name][0]),
                    ratio, value[name][level], value[name][level] / value["faiss_kmeans"][level])


def gpu(n, d, clusters, rounds):
    """Of a mixture's rows: one exact pass by CUDA events, level 0, the whole tree."""
    x, k = torch.from_numpy(mixture(n, d, 3000)).cuda(), clusters[0]
    c = x[torch.randperm(n, generator=torch.Generator().manual_seed(0))[:k].cuda()].clone()
    for title, half in (("half-precision scores", True), ("float32 scores", False)):
        times = []
        for _ in range(rounds + 1):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            near_centroids(x, c, half=half)
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        add(f"4 exact pass, {title}", "ours", statistics.median(times[1:]))
    compare(f"4 {n}x{d} K={k} own start", x, k, ["ours"], rounds, False, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = [clock(lambda: hierarchical_kmeans(x, clusters, temperature=0.2), "cuda")[0] for _ in range(rounds + 1)]
    add(f"4 tree {'-'.join(map(str, clusters))}", "ours", statistics.median(times[1:]),
        memory=(torch.cuda.max_memory_allocated() - before) / 2**20)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--figures", type=int, nargs="+", default=None, help="which of 1 2 3 4 (memory, 5, is in 1 and 2)")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--sizes", help="NxDxK,NxDxK instead of the listed problems of figures 1 and 2; 4: NxDxK0-K1-K2")
    p.add_argument("--data", help="instead of the mixture: a folder of pictures, or .npy (N, D) float32, whole")
    p.add_argument("--rounds", type=int, default=3, help="runs of each contestant, seeds 0, 1, ...")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--only", nargs="+", choices=CONTESTANTS, help="only these contestants")
    p.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return p.parse_args(argv)


def versions():
    for name in ("torch", "numpy", "faiss-cpu", "scikit-learn", "fastkmeans"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield f"{name} {importlib.metadata.version(name)}"


def main(args):
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    if installed("faiss_kmeans"):
        import faiss

        faiss.omp_set_num_threads(args.threads)
    if args.child:
        return child(args.child[0], args.child[1], int(args.child[2]))
    print(f"{datetime.date.today()}  {cpu_name()}, {args.threads} threads  {', '.join(versions())}  "
          f"rounds {args.rounds}")
    if args.device != "cpu":
        print(torch.cuda.get_device_name())
    print("{:44}{:18}{:>9}{:>9}{:>12}{:>10}{:>11}".format(*HEADINGS))
    figures = args.figures or ([4] if args.device != "cpu" else [1, 2, 3])

    def features(n, d, k):
        if args.data is None:
            return mixture(n, d, k)
        return np.load(args.data) if args.data.endswith(".npy") else picture_features(args.data, n, d)

    def problems(default):
        for size in (args.sizes or default).split(","):
            n, d, k = (int(v) for v in size.lower().split("x"))
            x = features(n, d, k)
            yield x, k, f"{x.shape[0]}x{x.shape[1]} K={k}"

    def pick(*names):
        return [name for name in names if not args.only or name in args.only]

    rivals = "sklearn_kmeans", "fastkmeans"
    if 1 in figures:
        for x, k, title in problems("50000x128x1000,50000x128x300,50000x128x100,20000x512x300"):
            compare("1 " + title, x, k, pick("faiss_kmeans", "ours_exact", *rivals), args.rounds, True, args.device)
    if 2 in figures:
        for x, k, title in problems("50000x128x1000,50000x128x3000"):
            for shared in (True, False):
                compare(f"2 {title} {'shared' if shared else 'own'} start", x, k, pick("faiss_kmeans", "ours"),
                        args.rounds, shared, args.device)
    if 3 in figures:
        recipes(features(50000, 128, 1000), args.rounds)
    if 4 in figures:
        n, d, clusters = (args.sizes or "1281167x128x30000-10000-1000").split("x")
        gpu(int(n), int(d), [int(k) for k in clusters.split("-")], args.rounds)


if __name__ == "__main__":
    main(parse_args())
