"""K-means and hierarchy: against loops, at their edges, under every type and sharding."""
import math
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.testing import assert_close

import common
from common import (
    all_gather_rows,
    cluster_sums,
    concentration,
    greedy_seeds,
    hierarchical_kmeans,
    hierarchy_from_centroids,
    kmeans,
    near_centroids,
    nearest_listed,
    semantic_path_loss,
)

ROOT = Path(__file__).parent.parent


def unit(n, d, seed=0):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def objective(x, centroids, assign):
    return (x.double() - centroids[assign].double()).square().sum(1).mean().item()


def slow_distances(x, c):
    """(N, K) squared distances, float64."""
    return np.array([[sum((xi - ci) ** 2) for ci in c] for xi in x])


def slow_lloyd(x, c, iterations):
    """Lloyd in explicit loops: assign to the nearest (lowest id on ties), then average; None if a cluster empties."""
    x, c = np.asarray(x, np.float64), np.asarray(c, np.float64)
    for _ in range(iterations):
        label = slow_distances(x, c).argmin(1)
        for j in range(len(c)):
            if not (label == j).any():
                return None
            c[j] = sum(x[i] for i in range(len(x)) if label[i] == j) / sum(label == j)
    return c, slow_distances(x, c).argmin(1)


def test_kmeans_equals_slow_lloyd_on_200_cases():
    rng, compared = np.random.default_rng(0), 0
    for _ in range(200):
        n, d, k, iterations = rng.integers(5, 40), rng.integers(2, 6), rng.integers(1, 6), rng.integers(0, 6)
        x = rng.normal(size=(n, d)).astype(np.float32)
        init = x[rng.permutation(n)[:k]]
        slow = slow_lloyd(x, init, iterations)
        if slow is None or len(set(slow[1])) < k:
            continue  # an emptied cluster is another test's business
        centroids, assign = kmeans(torch.from_numpy(x), k, iterations=int(iterations),
                                          init=torch.from_numpy(init))
        np.testing.assert_allclose(centroids.numpy(), slow[0], atol=1e-5)
        np.testing.assert_array_equal(assign.numpy(), slow[1])
        compared += 1
    assert compared > 150


def test_kmeans_by_hand():
    x = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 4.0]])
    centroids, assign = kmeans(x, 2, init=x[[0, 2]])
    assert centroids.tolist() == [[0, 1], [10, 2]] and assign.tolist() == [0, 0, 1, 1]
    centroids, assign = kmeans(x, 2, iterations=0, init=x[[3, 0]])  # no update: the start, and who is nearest
    assert centroids.tolist() == [[10, 4], [0, 0]] and assign.tolist() == [1, 1, 0, 0]


def test_concentration_of_equal_items_is_above_zero():
    """Half of the clusters hold one picture many times, distance 0: phi stays positive, its mean the temperature."""
    distance = torch.tensor([0.0] * 5 + [3.0] * 5)
    phi = concentration(distance, torch.full((10,), 4), 0.2)
    assert phi.min() > 0.001 and phi[0] < phi[5] / 100
    assert_close(phi.mean().item(), 0.2)
    nothing = concentration(torch.zeros(3), torch.tensor([2, 1, 0]), 0.2)
    assert_close(nothing, torch.full((3,), 0.2))


def test_kmeans_equals_slow_lloyd_with_blocks_of_ids():
    """k >= 256 takes the maximum over strips first, k not a multiple of anything."""
    x = unit(700, 5)
    for k in (256, 301, 517):
        centroids, assign = kmeans(x, k, iterations=3, init=x[:k])
        label = torch.cdist(x.double(), centroids.double()).argmin(1)
        assert torch.equal(assign, label)
        c = x[:k].double()
        for _ in range(3):
            label = torch.cdist(x.double(), c).argmin(1)
            c = torch.stack([x.double()[label == j].mean(0) for j in range(k)])
        torch.testing.assert_close(centroids.double(), c, atol=1e-5, rtol=0)


def test_k_of_one_and_k_of_n():
    x = unit(50, 3)
    centroids, assign = kmeans(x, 1)
    torch.testing.assert_close(centroids[0], x.mean(0))
    assert assign.eq(0).all()
    for init in (None, x, x[:1].expand(50, 3)):
        centroids, assign = kmeans(x, 50, init=init)
        assert assign.bincount(minlength=50).eq(1).all()
        torch.testing.assert_close(centroids[assign], x)


def test_objective_never_rises():
    x = unit(2500, 6)
    for k, seed, exact in ((7, 0, True), (300, 1, True), (1000, 2, True), (1000, 3, False)):
        init = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:k]]
        runs = [objective(x, *kmeans(x, k, iterations=i, init=init, exact=exact)) for i in (0, 1, 2, 3, 5, 9, 20)]
        assert all(b <= a + 1e-7 for a, b in zip(runs, runs[1:])), runs


def test_candidate_lists_reach_the_exact_objective():
    x = F.normalize(unit(300, 8, 1).repeat(20, 1) + 0.4 * torch.randn(6000, 8, generator=torch.manual_seed(0)), dim=1)
    lists, exact = (objective(x, *kmeans(x, 1000, init=x[:1000], exact=e)) for e in (False, True))
    assert lists < 1.003 * exact


@pytest.mark.parametrize(("given", "passes", "searches"), ((False, 6, 2), (True, 7, 3)))
def test_a_given_start_gets_more_passes_and_a_second_full_search(given, passes, searches):
    """From K = 1000 on, 5 iterations: steps 0 to 5, all centroids at 0 and 5; with a start to 6, at 0, 1 and 6."""
    x = torch.randn(4000, 8, generator=torch.manual_seed(0))
    with (mock.patch.object(common, "near_centroids", wraps=common.near_centroids) as search,
          mock.patch.object(common, "cluster_sums", wraps=common.cluster_sums) as average,
          mock.patch.object(common, "greedy_seeds", lambda x, weight, k, generator: x[:k])):
        kmeans(x, 1000, iterations=5, init=x[:1000] if given else None)
    assert (average.call_count, search.call_count) == (passes, searches)


def test_weights_decide_between_drawn_rows():
    """Four groups around the mean, two of 60 rows of weight 1, two of 40 rows of weight 3: the seed goes to these."""
    groups = torch.eye(2).repeat(2, 1) * torch.tensor([1.0, 1, -1, -1])[:, None]  # light, heavy, light, heavy
    size = torch.tensor([60, 40, 60, 40])
    x = groups.repeat_interleave(size, 0) + 0.01 * unit(200, 2)
    weight = torch.tensor([1.0, 3, 1, 3]).repeat_interleave(size)
    seeds = torch.cat([greedy_seeds(x, weight, 1, torch.Generator().manual_seed(seed)) for seed in range(30)])
    assert seeds[:, 1].abs().gt(0.5).sum() >= 20


def test_seeding_beats_random_rows():
    noise = 0.05 * torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    x = F.normalize(unit(100, 16, 1).repeat(20, 1) + noise, dim=1)
    seeded, drawn = objective(x, *kmeans(x, 100)), objective(x, *kmeans(x, 100, init=x[torch.randperm(2000)[:100]]))
    assert seeded < 0.8 * drawn


def test_seeds_of_weighted_rows():
    """Far outliers take the first clusters; not those without weight."""
    x = torch.cat([unit(80, 4), 5 * unit(20, 4, 1)])
    ones, zeros = torch.ones(100), torch.cat([torch.ones(80), torch.zeros(20)])
    seeds = [greedy_seeds(x, weight, 8, torch.Generator().manual_seed(0)) for weight in (ones, zeros)]
    assert seeds[0].norm(dim=1).gt(2).sum() >= 4 and seeds[1].norm(dim=1).lt(2).all()
    assert torch.equal(kmeans(x, 8, iterations=0)[0], seeds[0])


def test_empty_clusters_are_refilled():
    x = unit(400, 4)
    for far in (x[:1].expand(60, 4), torch.cat([x[:20], 100 + unit(40, 4)])):  # all the same; most out of reach
        for iterations in (0, 1, 20):
            centroids, assign = kmeans(x, 60, iterations=iterations, init=far)
            assert assign.bincount(minlength=60).gt(0).all()
            assert torch.equal(assign, torch.cdist(x.double(), centroids.double()).argmin(1))
    assert kmeans(x.half(), 60, init=x[:1].expand(60, 4))[1].bincount(minlength=60).gt(0).all()


def test_close_rows_do_not_lose_their_cluster_to_rounding():
    """Rows 1e-4 apart, far from the origin: scores cannot tell them apart, true differences can."""
    x = torch.tensor([[1.0, 1.0]]) + 1e-4 * torch.arange(40)[:, None]
    assert kmeans(x, 40)[1].bincount(minlength=40).eq(1).all()


def test_fewer_distinct_rows_than_clusters():
    x = unit(6, 5).repeat(30, 1)
    for init in (None, x[:9]):
        with pytest.warns(UserWarning, match="only 6 distinct rows .to six digits. for 9 clusters"):
            centroids, assign = kmeans(x, 9, init=init)
        assert assign.bincount(minlength=9).gt(0).sum() == 6 and centroids.isfinite().all()
        torch.testing.assert_close(centroids[assign], x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kmeans(x, 6)[1].bincount(minlength=6).eq(30).all()  # exactly as many: silent


def test_ties_go_to_the_lowest_id():
    x = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert kmeans(x, 2, iterations=0, init=x[[0, 2]])[1].tolist() == [0, 0, 1]
    x = unit(300, 3)
    for copies in (2, 6):
        hierarchy = hierarchy_from_centroids(x, [x.repeat(copies, 1)], 0.2)
        assert torch.equal(hierarchy.assign[0], torch.arange(300))


def test_equal_seeds_give_equal_bits():
    x = unit(3000, 16)
    for k in (20, 300, 1000):
        (c1, a1), (c2, a2), (c3, _) = kmeans(x, k), kmeans(x, k), kmeans(x, k, seed=1)
        assert torch.equal(c1, c2) and torch.equal(a1, a2) and not torch.equal(c1, c3)


def test_dtypes_and_widths():
    for d in (2, 2048):
        x = unit(120, d)
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            centroids, assign = kmeans(x.to(dtype), 9)
            same, same_assign = kmeans(x.to(dtype).float(), 9)
            assert centroids.dtype == torch.float32 and assign.dtype == torch.int64
            assert torch.equal(centroids, same) and torch.equal(assign, same_assign)


def test_collapsed_features():
    """Mean cosine 0.9999: the clusters lie in what differs."""
    base = unit(600, 16)
    x = F.normalize(torch.ones(16) / 4 + 0.01 * base, dim=1)
    centroids, assign = kmeans(x, 30, exact=True, init=x[:30])
    double, _ = slow_lloyd(x, x[:30], 20)
    best = slow_distances(x.double().numpy(), double).min(1).mean()
    assert objective(x, centroids, assign) < 1.001 * best


def test_half_precision_scores():
    """What CUDA runs: float16 lists hold the nearest centroid, also of collapsed, equal and very uneven rows."""
    x = unit(1500, 16)
    far = x.clone()
    far[0] *= 1e6
    collapsed = F.normalize(torch.ones(16) / 4 + 0.01 * x, dim=1)
    for rows in (x, collapsed, 1e-12 * x, far):
        for k in (30, 517, 1000):
            listed = near_centroids(rows, rows[-k:], 4, half=True)
            if rows is far:
                assert torch.equal(listed, near_centroids(rows, rows[-k:], 4))
                continue
            nearest = torch.cdist(rows.double(), rows[-k:].double()).argmin(1)
            assert (listed == nearest[:, None]).any(1).all()
    for rows in (torch.zeros(1200, 3), torch.full((1200, 3), 1e-22)):
        assert near_centroids(rows, rows[:1000], 4, half=True).max() < 1000


def test_the_label_so_far_stays_in_the_race():
    """Centroids 1e-4 apart: float16 cannot tell them apart, so the one candidate is often a neighbour."""
    x = torch.tensor([[1.0, 1.0], [-1.0, 1.0]]).repeat(1, 20).view(-1, 2) + 1e-4 * torch.arange(40)[:, None]
    label = torch.arange(40)
    near = near_centroids(x, x, half=True)
    assert not torch.equal(near[:, 0], label)
    assert torch.equal(nearest_listed(x, x, torch.cat([near, label[:, None]], 1))[0], label)


def test_objective_never_rises_with_half_precision_scores():
    x = unit(2000, 6)
    for k, top in ((40, 4), (1000, 4), (300, 1)):
        centroids, label, values = x[:k].clone(), torch.zeros(2000, dtype=torch.long), []
        for _ in range(8):
            listed = torch.cat([near_centroids(x, centroids, top, half=True), label[:, None]], 1)
            label = nearest_listed(x, centroids, listed)[0]
            sums, counts = cluster_sums(x, label, k)
            values.append(objective(x, centroids, label))
            centroids = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids)
        assert all(b <= a + 1e-7 for a, b in zip(values, values[1:])), values


def test_memory_maps_are_read_in_blocks_with_equal_results(tmp_path):
    path = tmp_path / "rows.npy"
    x = unit(70000, 512).half()  # two blocks of at most 2^25 numbers
    np.save(path, x.numpy())
    mapped = np.load(path, mmap_mode="r")
    for rows, columns, k, iterations in ((70000, 512, 9, 1), (3000, 16, 1000, 3)):  # the third pass is among candidates
        for init in (None, x[:k, :columns].float()):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                streamed = kmeans(mapped[:rows, :columns], k, iterations=iterations, init=init)
            held = kmeans(x[:rows, :columns].float(), k, iterations=iterations, init=init)
            assert torch.equal(streamed[0], held[0]) and torch.equal(streamed[1], held[1])
    for ours, theirs in zip(hierarchical_kmeans(mapped[:3000], [60, 9], temperature=0.2),
                            hierarchical_kmeans(x[:3000].float(), [60, 9], temperature=0.2)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_a_memory_map_is_never_copied_whole(tmp_path):
    """123 MB of float16 rows would be 246 MB as float32: the peak of a fresh process, beyond what it held before."""
    code = """if True:
        import numpy as np, re, sys, torch, warnings
        sys.path.insert(0, sys.argv[1])
        from common import kmeans
        def mib(name):
            return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
        x = np.lib.format.open_memmap(sys.argv[2], "w+", np.float16, (120_000, 512))
        x[:3000] = np.random.default_rng(0).standard_normal((3000, 512), np.float32)
        x.flush()
        del x
        x = np.load(sys.argv[2], mmap_mode="r")
        kmeans(x[:3000], 2, iterations=1)
        open("/proc/self/clear_refs", "w").write("5")
        before = mib("VmRSS")
        kmeans(x, 2, iterations=1, init=x[:2])
        print(mib("VmHWM") - before)
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("reads Linux's account of a process's memory")
    out = subprocess.run([sys.executable, "-c", code, str(ROOT), str(tmp_path / "x.npy")], check=True, text=True,
                         capture_output=True)
    assert float(out.stdout) < 123 + 190, out.stdout  # the map itself and a block


def test_a_prototype_at_the_origin_has_similarity_0():
    """Rows and their opposites: the one top cluster has its centroid at the origin. Loss and gradient stay finite."""
    tree = hierarchical_kmeans(torch.cat([unit(20, 4), -unit(20, 4)]), [10, 1], temperature=0.2)
    tree = tree._replace(prototypes=[tree.prototypes[0], torch.zeros(1, 4)])
    z = unit(6, 8).view(6, 2, 4).requires_grad_()
    for index in (torch.arange(6), torch.arange(6) + 20):
        loss = semantic_path_loss(F.normalize(z, dim=2), tree, index, torch.arange(10).expand(6, 10))
        gradient = torch.autograd.grad(loss, z)[0]
        assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().sum() > 0
    raw = torch.zeros(2, 4)
    assert hierarchy_from_centroids(unit(9, 4), [raw], 0.2).prototypes[0].eq(0).all()


def test_bad_input_is_one_sentence():
    x = unit(10, 3)
    nan, inf = x.clone(), x.clone()
    nan[[3, 4], 1], inf[5] = math.nan, math.inf
    for bad, k, words in ((x, 0, "0 clusters of 10"), (x, 11, "11 clusters of 10"), (x[:0], 1, "1 clusters of 0"),
                          (nan, 2, "2 of 10 rows hold NaN"), (inf, 2, "1 of 10 rows"), (x[0], 1, "shape")):
        with pytest.raises(ValueError, match=words):
            kmeans(bad, k)
    for bad, k, words in ((1e20 * x, 2, "10 of 10 rows hold NaN, infinity or too large"), (x[:, :0], 2, "shape")):
        with pytest.raises(ValueError, match=words):
            kmeans(bad, k)
    for init in (x[:3], x[:2, :2], nan[3:5], x[:2].tolist() + [[0, 0, 0]]):
        with pytest.raises(ValueError, match="init"):
            kmeans(x, 2, init=init)
    with pytest.raises(ValueError, match="20 clusters of 5"):
        hierarchical_kmeans(x, [5, 20], temperature=0.2)


def slow_concentration(distance, label, k, temperature):
    """PCL's phi in loops, float64."""
    phi = []
    for c in range(k):
        own = [float(d) for d, y in zip(distance, label) if y == c]
        phi.append(sum(own) / len(own) / math.log(len(own) + 10) if len(own) > 1 else None)
    most = max([p for p in phi if p is not None], default=0)
    phi = np.array([most if p is None else p for p in phi])
    phi = np.clip(phi, np.percentile(phi, 10), np.percentile(phi, 90))
    return temperature * phi / phi.mean()


def test_hierarchical_kmeans():
    x = unit(400, 7)
    tree = hierarchical_kmeans(x, [50, 12, 5], temperature=0.3)
    items = x
    for level, k in enumerate((50, 12, 5)):
        assert tree.prototypes[level].shape == (k, 7) and tree.assign[level].shape == (400,)
        torch.testing.assert_close(tree.prototypes[level].norm(dim=1), torch.ones(k))
        if level:
            assert torch.equal(tree.assign[level], tree.parent[level - 1][tree.assign[level - 1]])
        weight = tree.assign[level - 1].bincount().sqrt() if level else torch.ones(400)
        raw, label = kmeans(items, k, init=greedy_seeds(items, weight, k, torch.Generator().manual_seed(0)))
        distance = [math.dist(a, raw[b]) for a, b in zip(items, label)]
        phi = slow_concentration(distance, label, k, 0.3)
        np.testing.assert_allclose(tree.concentration[level], phi, rtol=1e-5)
        items = tree.prototypes[level]


def test_concentration_of_singletons_is_the_temperature():
    tree = hierarchical_kmeans(unit(8, 3), [8, 2], temperature=0.3)
    assert torch.equal(tree.concentration[0], torch.full((8,), 0.3))


def rank_main(rank, sizes, meeting, path):
    """One rank: its share of the rows, results of all ranks gathered and saved by rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=len(sizes))
    x, dup = unit(sum(sizes), 6).split(sizes)[rank], unit(5, 6).repeat(sum(sizes), 1)[: sum(sizes)].split(sizes)[rank]
    out = {}
    for k in (9, 300, 1000):
        centroids, assign = kmeans(x, k)
        out[k] = centroids, all_gather_rows(assign)
        copies = all_gather_rows(centroids[None])
        assert (copies == copies[:1]).all()  # ranks are bit-identical
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out["duplicates"] = all_gather_rows(kmeans(dup, 7)[1])
    out["refilled"] = all_gather_rows(kmeans(x, 40, init=unit(1, 6).expand(40, 6))[1])
    tree = hierarchical_kmeans(x, [60, 9], temperature=0.2)
    out["tree"] = tree.assign + tree.parent + tree.concentration
    try:
        kmeans(x if rank else x * math.nan, 2)
    except ValueError as error:
        out["error"] = str(error)
    if rank == 0:
        torch.save(out, path)
    dist.destroy_process_group()


def test_ranks_reproduce_one_process(tmp_path):
    for sizes in ([700, 500], [650, 0, 550]):
        mp.spawn(rank_main, (sizes, tmp_path / f"meeting{len(sizes)}", tmp_path / "out.pt"), nprocs=len(sizes))
        out = torch.load(tmp_path / "out.pt")
        x = unit(1200, 6)
        for k in (9, 300, 1000):
            centroids, assign = kmeans(x, k)
            torch.testing.assert_close(out[k][0], centroids, atol=2e-6, rtol=0)
            assert torch.equal(out[k][1], assign)
        assert out["duplicates"].bincount(minlength=7).gt(0).sum() == 5
        assert torch.equal(out["refilled"], kmeans(x, 40, init=unit(1, 6).expand(40, 6))[1])
        tree = hierarchical_kmeans(x, [60, 9], temperature=0.2)
        for a, b in zip(out["tree"], tree.assign + tree.parent + tree.concentration):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        assert f"{sizes[0]} of 1200 rows hold NaN" in out["error"]
