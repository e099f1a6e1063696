"""common.nearest_neighbours against faiss's IndexFlatIP: time and memory, in alternation in one process.

    python bench/neighbours.py                       # 50,000 x 512, the 5 nearest: under two minutes on two cores
    python bench/neighbours.py --data feats.npy      # real features instead of a mixture
    python bench/neighbours.py --device cuda         # alone, where faiss has no GPU index

Both search every row among all rows; faiss returns the row itself too, so it is asked for one more. time: median of the
rounds. ratio: median over rounds of time / faiss's time in the same round. agree: share of the ids that are the same.
extra memory: rise of the process's high-water mark (Linux VmHWM, reset before the call), on CUDA of the allocator's.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from losses import cpu_name, high_water

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import nearest_neighbours


def mixture(n, d, parts=500, seed=0):
    """Unit rows in overlapping clumps, shuffled."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(parts, d, generator=g)
    return F.normalize(centre[torch.randint(parts, (n,), generator=g)] + torch.randn(n, d, generator=g), dim=1)


def faiss_search(x, k):
    import faiss

    index, x = faiss.IndexFlatIP(x.shape[1]), x.cpu().numpy()
    index.add(x)
    ids = torch.from_numpy(index.search(x, k + 1)[1])  # (N, k+1), a row itself nearly always among them
    other = ids != torch.arange(len(ids))[:, None]
    return ids.gather(1, other.sort(dim=1, descending=True, stable=True).indices)[:, :k]


def measured(search, x, k):
    """Seconds, MiB beyond what was there, ids."""
    cuda = x.is_cuda
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    before = torch.cuda.memory_allocated() / 2**20 if cuda else high_water()
    start = time.perf_counter()
    ids = search(x, k)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, (torch.cuda.max_memory_allocated() / 2**20 if cuda else high_water()) - before, ids.cpu()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, default=50_000)
    p.add_argument("--dim", type=int, default=512)
    p.add_argument("--neighbours", type=int, default=5)
    p.add_argument("--data", help=".npy (N, D) float32, normalised here")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    searches = {"ours": nearest_neighbours}
    try:
        import faiss
        faiss.omp_set_num_threads(args.threads)
        searches["faiss IndexFlatIP"] = faiss_search
    except ImportError:
        pass
    x = F.normalize(torch.from_numpy(np.load(args.data)), dim=1) if args.data else mixture(args.rows, args.dim)
    x = x.to(args.device)
    print(f"torch {torch.__version__}, {args.threads} threads, "
          f"{torch.cuda.get_device_name() if x.is_cuda else cpu_name()}")
    print(f"{len(x)} x {x.shape[1]}, the {args.neighbours} nearest, median of {args.rounds} alternating rounds")
    found = {name: [] for name in searches}
    for search in searches.values():
        search(x[:2000], args.neighbours)  # warm up
    for i in range(args.rounds):
        for name in list(searches)[:: 1 if i % 2 else -1]:
            found[name].append(measured(searches[name], x, args.neighbours))
    print(f"{'':20}{'time s':>10}{'ratio':>10}{'agree':>10}{'extra MiB':>12}")
    base = found[list(searches)[-1]]
    for name, rounds in found.items():
        ratio = statistics.median(r[0] / b[0] for r, b in zip(rounds, base))
        agree = (rounds[0][2] == base[0][2]).double().mean().item()
        print(f"{name:20}{statistics.median(r[0] for r in rounds):10.2f}{ratio:10.3f}{agree:10.5f}"
              f"{statistics.median(r[1] for r in rounds):12.0f}")


if __name__ == "__main__":
    main()
