"""eval_linear.py: measures against scikit-learn and brute force, loading, frozen backbone, bad input."""

import itertools
import json
import math
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from torch.testing import assert_close

import common
import eval_linear as ev
import networks
import plumbing

ROOT = Path(ev.__file__).parent
GOLDEN = ROOT / "tests" / "golden"


# ---- labelings compared


def labelings():
    """name -> two labelings; A, B and n pairwise different where they are random."""
    rng = np.random.default_rng(0)
    yield "random", rng.integers(0, 60, 1000), rng.integers(0, 7, 1000)
    yield "few large", rng.integers(0, 2, 500), rng.integers(0, 3, 500)
    a = rng.integers(0, 20, 700)
    yield "related", a, np.where(rng.random(700) < 0.7, a // 3, rng.integers(0, 7, 700))
    yield "skewed", np.minimum(rng.geometric(0.2, 400), 12), rng.integers(0, 5, 400) ** 2
    yield "equal", a, a
    yield "renamed", a, (7 * a + 3) % 23
    yield "one cluster", np.zeros(30, int), rng.integers(0, 4, 30)
    yield "one class", rng.integers(0, 4, 30), np.zeros(30, int)
    yield "both one", np.zeros(9, int), np.ones(9, int)
    yield "all singletons", np.arange(40), rng.integers(0, 4, 40)
    yield "both singletons", np.arange(40), np.arange(40)[::-1]
    yield "one and singletons", np.zeros(12, int), np.arange(12)
    yield "n = 1", np.array([3]), np.array([5])
    for i, (a, b) in enumerate(itertools.product([[0, 0], [0, 1]], repeat=2)):
        yield f"n = 2, {i}", np.array(a), np.array(b)
    for seed in range(20):  # small ones, where a term of the expectation is visible
        rng = np.random.default_rng(seed)
        n = int(rng.integers(3, 12))
        yield f"small {seed}", rng.integers(0, 4, n), rng.integers(-2, 3, n)


CASES = list(labelings())


@pytest.mark.parametrize(("a", "b"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_measures_equal_scikit_learn(a, b):
    metrics, found = pytest.importorskip("sklearn.metrics"), ev.agreement(a, b)
    assert found["nmi"] == pytest.approx(metrics.normalized_mutual_info_score(b, a), abs=1e-9)
    assert found["ami"] == pytest.approx(metrics.adjusted_mutual_info_score(b, a), abs=1e-9)
    assert found["ari"] == pytest.approx(metrics.adjusted_rand_score(b, a), abs=1e-12)


@pytest.mark.parametrize(("a", "b"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_measures_are_properties_of_partitions(a, b):
    """Other names and another order of the items change nothing; nmi, ami and ari are symmetric."""
    order, found = np.random.default_rng(5).permutation(len(a)), ev.agreement(a, b)
    assert list(found) == ["nmi", "ami", "ari", "purity"] and max(found.values()) <= 1 + 1e-9
    assert ev.agreement((101 - 3 * a)[order], b[order]) == pytest.approx(found, abs=1e-9)
    for name in ("nmi", "ami", "ari"):
        assert ev.agreement(b, a)[name] == pytest.approx(found[name], abs=1e-9)


def test_measures_by_hand():
    """Clusters {0,1,2}, {3,4,5} of the labels x x y, y y y."""
    clusters, labels = [0, 0, 0, 1, 1, 1], list("xxyyyy")
    found = ev.agreement(clusters, labels)
    assert found["purity"] == ev.agreement(clusters, list("yxyyyy"))["purity"] == pytest.approx(5 / 6)
    # pairs: together in both 1 + 3 = 4, in clusters 6, in labels 1 + 6 = 7, of 15
    assert found["ari"] == pytest.approx((4 - 6 * 7 / 15) / ((6 + 7) / 2 - 6 * 7 / 15))
    mutual = 2 / 6 * math.log(6 * 2 / (3 * 2)) + 1 / 6 * math.log(6 / (3 * 4)) + 3 / 6 * math.log(6 * 3 / (3 * 4))
    entropies = math.log(2) - (1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3))
    assert found["nmi"] == pytest.approx(mutual / (entropies / 2))
    assert set(ev.agreement([0, 1, 1], [5, 2, 2]).values()) == {1.0}


def slow_expected_information(a, b):
    """The mean over every order of b's labels of the mutual information."""
    total, n = 0.0, len(a)
    for order in itertools.permutations(b):
        for x, y in set(zip(a, order)):
            both = sum(1 for pair in zip(a, order) if pair == (x, y))
            total += both / n * math.log(n * both / (a.count(x) * b.count(y)))
    return total / math.factorial(n)


def test_expected_information_is_the_mean_over_permutations():
    for a, b in (([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 1]), ([0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 2, 2, 3]),
                 ([0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1])):  # 5 and 4 of 6 have 3 in common at least
        sizes = [np.array([v.count(x) for x in sorted(set(v))]) for v in (a, b)]
        assert ev.expected_information(*sizes) == pytest.approx(slow_expected_information(a, b), abs=1e-12)


def test_ami_of_many_points_takes_seconds_not_minutes():
    rng = np.random.default_rng(1)
    assert abs(ev.agreement(rng.integers(0, 1000, 50_000), rng.integers(0, 100, 50_000))["ami"]) < 0.01


def test_labelings_of_different_items_are_refused():
    for a, b in (([0, 1], [0]), ([], [])):
        with pytest.raises(ValueError, match="same items"):
            ev.agreement(a, b)


# ---- trees


def test_spearman_equals_scipy_with_ties():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(4)
    for high in (2, 4, 1000):
        x = rng.integers(0, high, 500)
        y = x + rng.integers(0, high, 500)
        assert ev.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert ev.spearman(np.zeros(5), np.arange(5)) is None


def test_tree_distance_by_hand():
    """Leaves a, b under one parent, c under another, one root: siblings 1 apart, cousins 2."""
    levels = np.array([[0, 1, 2, 0], [0, 0, 1, 0], [0, 0, 0, 0]])  # items a, b, c, a
    assert ev.tree_distance(levels, np.array([0, 0, 0, 1]), np.array([3, 1, 2, 2])).tolist() == [0, 1, 2, 2]
    assert ev.spearman([0, 1, 2, 2], [5, 6, 7, 7]) == pytest.approx(1)


def test_random_pairs_are_of_two_pictures():
    i, j = ev.random_pairs(3, 3000, torch.Generator().manual_seed(0))
    found, counts = np.unique(np.stack([i, j]), axis=1, return_counts=True)
    assert found.T.tolist() == [[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]] and counts.min() > 400


# ---- labels


def test_stratified_takes_the_share_of_every_class():
    labels = torch.tensor([0] * 50 + [1] * 7 + [2] * 3 + [5] * 200)[torch.randperm(260)]
    before = set()
    for fraction in (0.01, 0.1, 0.5, 1.0):
        rows = ev.stratified(labels, fraction, seed=3)
        assert rows.tolist() == sorted(set(rows.tolist()))
        for c in (0, 1, 2, 5):
            wanted = max(1, round(fraction * int((labels == c).sum())))
            assert int((labels[rows] == c).sum()) == wanted
        assert before <= set(rows.tolist())  # one per cent is a part of ten
        before = set(rows.tolist())
    assert before == set(range(260))
    assert torch.equal(ev.stratified(labels, 0.1, 3), ev.stratified(labels, 0.1, 3))
    assert not torch.equal(ev.stratified(labels, 0.1, 3), ev.stratified(labels, 0.1, 4))


def test_a_part_keeps_pictures_and_labels_together():
    images = common.Images(list("abcd"), torch.tensor([[0], [1], [0], [2]]), [list("xyz")],
                           pixels=torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2))
    images.replace({1: "torn"})  # b cannot be read, c stands in for it: picture and label
    part = images.part(torch.tensor([1, 3]))
    assert part.names == ["b", "d"] and part.labels.tolist() == [[0], [2]]
    assert part.pixels[:, 0, 0, 0].tolist() == [2, 3] and part.index_of.tolist() == [0, 1]
    assert part.unreadable == {0: "torn"}  # is counted
    assert images.part(torch.arange(4)) is images


# ---- the linear probe and kNN


def test_softmax_regression_is_torchs_sgd():
    """All rates at once equal one torch.optim.SGD run a rate, epoch by epoch."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 5, generator=g, dtype=torch.float64), torch.randint(0, 3, (30,), generator=g)
    x = torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], 1)
    test_x, test_y = x + torch.randn(30, 6, generator=g, dtype=torch.float64), y
    settings = dict(epochs=4, schedule="step", weight_decay=0.05)

    def batches(epoch):
        return zip(x.split(10), y.split(10))

    ours = ev.softmax_regression(batches, 3, test_x, test_y, 3, [0.02, 1.3], **settings)
    for rate, accuracy in zip([0.02, 1.3], ours):
        weight = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([weight], rate, momentum=0.9, weight_decay=0.05)
        for epoch in range(4):
            for step, (rows, target) in enumerate(batches(epoch)):
                done = (epoch + step / 3) / 4
                optimizer.param_groups[0]["lr"] = rate * (1 if done < 0.6 else 0.1 if done < 0.8 else 0.01)
                optimizer.zero_grad()
                F.cross_entropy(rows @ weight, target).backward()
                optimizer.step()
            expected = 100 * ((test_x @ weight).argmax(1) == test_y).double().mean().item()
            assert accuracy[epoch + 1] == pytest.approx(expected, abs=0.01)
    assert ours[0] != ours[1]


def test_last_and_best():
    assert ev.last_and_best({3: 3.0, 6: 9.0, 9: 9.0, 10: 4.0}) == dict(last=4.0, best=9.0, best_epoch=6)
    assert [round(ev.decay(d, "cosine"), 3) for d in (0, 0.5, 1)] == [1, 0.5, 0]
    assert [round(ev.decay(d, "step"), 3) for d in (0, 0.59, 0.6, 0.79, 0.8, 1)] == [1, 1, 0.1, 0.1, 0.01, 0.01]


def test_knn_equals_the_released_rule():
    golden = np.load(GOLDEN / "knn_eval.npz")
    x, y, test_x, test_y = (torch.from_numpy(golden[name]) for name in
                            ("train_features", "train_labels", "test_features", "test_labels"))
    settings = dict(classes=int(golden["num_classes"]), temperature=float(golden["T"]))
    votes = common.knn_classify(x.double(), y, test_x.double(), k=int(golden["k"]), **settings)
    assert torch.allclose(votes, torch.from_numpy(golden["votes"]))
    top1, top5 = ev.vote_accuracy(votes, test_y)
    assert (top1, top5) == pytest.approx((float(golden["top1"]), float(golden["top5"])), abs=0.01)
    for k, expected in zip(golden["other_k"], golden["other_k_top1"]):
        votes = common.knn_classify(x.double(), y, test_x.double(), k=int(k), **settings)
        assert ev.vote_accuracy(votes, test_y)[0] == pytest.approx(float(expected), abs=0.01)


def test_a_label_without_votes_is_wrong():
    votes = torch.tensor([[3.0, 1.0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 2.0, 1.0], [0.0] * 7])
    assert ev.vote_accuracy(votes, torch.tensor([2, 6, 0])) == (0, pytest.approx(33.33))
    assert ev.vote_accuracy(votes[:, :5], torch.tensor([0, 0, 0])) == (pytest.approx(33.33), None)


# ---- weights


ARCHITECTURES = dict(tiny=("tiny", "3x3", 32), vit=("vit-8-32-2", "7x7", 16))


def network_and_state(arch="tiny", stem="3x3", image_size=32):
    torch.manual_seed(1)
    other = networks.backbone(arch, stem, image_size)[0].state_dict()
    torch.manual_seed(2)
    return networks.backbone(arch, stem, image_size)[0], dict(other)


def load(network, state):
    return ev.fit_backbone(network, *ev.find_backbone(state, "file"), "file")


PREFIXES = ["", "module.", "encoder_q.", "module.encoder_q.", "backbone.", "encoder_q.backbone.",
            "module.backbone.", "encoder_q._orig_mod.backbone.", "teacher.backbone."]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s},
                                  lambda s: {"student": {}, "teacher": s}])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_weights_are_found_under_any_prefix(prefix, wrap, arch):
    """Another network in the file comes first, and is not taken: a key encoder, a student."""
    network, state = network_and_state(*ARCHITECTURES[arch])
    other = prefix.replace("encoder_q", "encoder_k").replace("teacher", "student")
    file = {other + name: value + 9 for name, value in state.items() if other != prefix}
    file |= {prefix + name: value for name, value in state.items()}
    file |= {prefix + "fc.weight": torch.zeros(3, 4), prefix + "heads.head.bias": torch.zeros(3),
             "queue": torch.zeros(5, 2)}
    left_out = load(network, wrap(file))
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert {".".join((prefix + "fc.weight").split(".")[:2]), "queue"} <= {*left_out}


def test_only_the_counters_of_old_files_may_be_missing():
    network, state = network_and_state()
    assert load(network, {name: v for name, v in state.items() if "num_batches" not in name}) == []
    assert torch.equal(network.state_dict()["layer4.0.conv2.weight"], state["layer4.0.conv2.weight"])
    with pytest.raises(common.Stop, match="Missing.*bn1.running_mean"):
        load(network, {name: v for name, v in state.items() if name != "bn1.running_mean"})


def test_what_does_not_fit_is_refused():
    network, state = network_and_state()
    deeper = {**state, "layer1.1.conv1.weight": torch.zeros(16, 16, 3, 3)}
    for file, words in ((network_and_state(stem="7x7")[1], "size mismatch for conv1.weight"),
                        (deeper, "Unexpected.*layer1.1.conv1.weight"),
                        ({**state, "bn1.weight": torch.full((16,), math.nan)}, "NaN or infinity .bn1.weight"),
                        ({**state, "bn1.weight": torch.full((16,), 1e39, dtype=torch.float64)}, "NaN or infinity"),
                        ({**state, "bn1.weight": 3}, "Missing.*bn1.weight"),
                        ({"weight": torch.zeros(2)}, "no weights of a ResNet"), ([1, 2], "no weights of a ResNet"),
                        ({"model": {"epoch": 3}}, "no weights of a ResNet"),
                        (network_and_state(*ARCHITECTURES["vit"])[1], "Missing")):
        with pytest.raises(common.Stop, match=words) as stop:
            load(network_and_state()[0], file)
        assert "\n" not in str(stop.value)


def test_a_resnet34_is_not_a_resnet18():
    """Every tensor of a resnet18 is in a resnet34, in its shape."""
    with pytest.raises(common.Stop, match="Unexpected"):
        load(networks.backbone("resnet18", "7x7")[0], networks.backbone("resnet34", "7x7")[0].state_dict())


def test_a_vit_for_other_pictures_is_refused():
    with pytest.raises(common.Stop, match="pos_embedding.*correct --arch, --stem, --image-size"):
        load(networks.backbone("vit-8-32-2", "7x7", 24)[0], network_and_state(*ARCHITECTURES["vit"])[1])


def test_one_changed_byte_is_noticed():
    network, _ = network_and_state()
    network.eval()
    frozen = {name: value.clone() for name, value in network.state_dict().items()}
    ev.assert_unchanged(network, frozen)
    network.bn1.running_var[0] = -network.bn1.running_var[0] * 0  # 0.0 or -0.0
    frozen["bn1.running_var"][0] = 0.0
    with pytest.raises(AssertionError, match="bn1.running_var"):
        ev.assert_unchanged(network, frozen)
    frozen["bn1.running_var"][0] = -0.0
    ev.assert_unchanged(network, frozen)
    with pytest.raises(AssertionError, match="training"):
        ev.assert_unchanged(network.train(), frozen)


# ---- the whole script on a few pictures


def write_pictures(root, n, rng):
    for coarse, red in (("warm", 230), ("cold", 20)):
        for fine, green in (("dark", 40), ("light", 200)):
            (root / coarse / fine).mkdir(parents=True)
            for i in range(n):
                pixels = np.clip([red, green, 90] + rng.normal(0, 12, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / coarse / fine / f"{i}.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder on 48 pictures of 4 classes in 2 groups, told apart by colour."""
    folder, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    write_pictures(folder / "data" / "train", 8, rng)
    write_pictures(folder / "data" / "val", 4, rng)
    arguments = dict(data=str(folder / "data"), data_root="data", arch="tiny", stem="3x3", image_size=16)
    derived = dict(clusters=[6, 3], fingerprint=common.load_data(arguments["data"])[0].fingerprint())
    (folder / "config.json").write_text(json.dumps(dict(arguments=arguments, derived=derived)))
    torch.manual_seed(0)
    torch.save(networks.backbone("tiny", "3x3")[0].state_dict(), folder / "backbone.pt")
    return folder


def evaluate(monkeypatch, capsys, *argv):
    """(exit code, stdout, stderr) of the script, in this process."""
    monkeypatch.setattr(sys, "argv", ["eval_linear.py", *map(str, argv), "--device", "cpu", "--workers", "0"])
    code = 0
    try:
        plumbing.launch(ev.main, ev.parse_args)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_every_protocol_on_a_run(run, monkeypatch, capsys, tmp_path):
    networks, loaded = [], ev.load_backbone
    monkeypatch.setattr(ev, "load_backbone", lambda args: networks.append(loaded(args)) or networks[-1])
    names = [str(p.relative_to(run / "data" / "train")) for p in sorted((run / "data" / "train").rglob("*.png"))]
    (run / "clusters.csv").write_text("image,level0,level1\n" + "".join(
        f"{name},{i // 8},{i // 16}\n" for i, name in enumerate(names)))  # the true tree
    out = tmp_path / "eval.json"
    code, text, errors = evaluate(
        monkeypatch, capsys, "--run", run, "--protocol", "linear", "knn", "finetune", "cluster", "hierarchy",
        "--k", 5, "--epochs", 12, "--finetune-epochs", 6, "--batch-size", 16, "--clusters", 8, 2, "--out", out)
    assert (code, errors) == (0, "")
    network, weights = networks[0], torch.load(run / "backbone.pt")
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())  # as it was

    saved = json.loads(out.read_text())
    results = saved["results"]
    assert "upper bound" in saved["note"] and saved["note"] in text and saved["arguments"]["epochs"] == 12
    assert saved["pictures"] == dict(train=32, labelled=32, test=16)
    linear, = results["linear"]
    assert linear["depth"] == 1 and linear["classes"] == 4 and len(linear["rates"]) == 6
    assert [r["lr"] for r in linear["rates"]] == [round(lr / 16, 6) for lr in (0.01, 0.03, 0.1, 0.3, 1, 3)]  # 16 / 256
    assert linear["last"] == max(r["last"] for r in linear["rates"]) > 80  # colours: an easy task
    assert 1 <= linear["best_epoch"] <= 12 and linear["best"] >= linear["last"]
    assert [row["classes"] for row in results["knn"]] == [2, 4] and results["knn"][0]["top1"] > 90
    assert results["finetune"][0]["last"] > 40
    assert [row["pictures"] for row in results["cluster"]] == [16, 16]
    assert [(r["level"], r["clusters"], r["depth"], r["classes"]) for r in results["hierarchy"][:4]] == [
        (0, 8, 0, 2), (0, 8, 1, 4), (1, 2, 0, 2), (1, 2, 1, 4)]  # clusters finest first, labels coarsest first
    assert len(results["hierarchy"]) == 2 * 2 * 2  # trees, levels, depths
    assert "tree  level  clusters  depth  classes" in text
    features, left = results["tree"]
    assert left == dict(tree="clusters.csv", rank_correlation=pytest.approx(1.0))
    assert features["tree"] == "features" and features["rank_correlation"] > 0.3
    perfect = [r for r in results["hierarchy"] if r["tree"] == "clusters.csv" and r["clusters"] == r["classes"]]
    assert len(perfect) == 2 and all(r["nmi"] == r["ami"] == r["ari"] == r["purity"] == 1 for r in perfect)
    tree = tmp_path / "eval_tree" / "clusters.csv"
    before = tree.read_bytes()
    assert sorted(p.name for p in run.iterdir()) == ["backbone.pt", "clusters.csv", "config.json", "data"]

    # Again, into the same file, with random crops and few labels: the first results are kept.
    code, text, _ = evaluate(
        monkeypatch, capsys, "--run", run, "--protocol", "linear", "--linear", "augment", "--labels", 0.05,
        "--depth", 0, 1, "--epochs", 3, "--schedule", "step", "--out", out)
    again = json.loads(out.read_text())
    assert code == 0 and saved.pop("earlier") == [] and again["earlier"] == [saved]
    assert again["pictures"]["labelled"] == 4 and [row["depth"] for row in again["results"]["linear"]] == [0, 1]

    # And into another file, beside it, with another tree: that of the first stays.
    code, _, _ = evaluate(monkeypatch, capsys, "--run", run, "--protocol", "hierarchy", "--clusters", 2, "--out",
                          tmp_path / "b.json")
    assert code == 0 and tree.read_bytes() == before != (tmp_path / "b_tree" / "clusters.csv").read_bytes()


def test_as_many_neighbours_as_there_are_pictures(run, monkeypatch, capsys, tmp_path):
    """Unless --k says how many: then it is refused where there are fewer (below)."""
    write_pictures(tmp_path / "few", 3, np.random.default_rng(3))
    code, _, errors = evaluate(
        monkeypatch, capsys, "--backbone", run / "backbone.pt", "--arch", "tiny", "--stem", "3x3", "--image-size", 16,
        "--data", tmp_path / "few", "--protocol", "knn", "--out", tmp_path / "e.json")
    saved = json.loads((tmp_path / "e.json").read_text())
    pictures = saved["pictures"]["train"]
    assert (code, errors) == (0, "") and pictures < 20
    assert [row["k"] for row in saved["results"]["knn"]] == [pictures, pictures]


def test_pictures_decoded_on_demand_and_no_test_split(run, monkeypatch, capsys, tmp_path):
    """A folder of mixed sizes is not held in memory; every tenth picture of it becomes the test."""
    root = tmp_path / "mixed"
    write_pictures(root, 10, np.random.default_rng(3))
    Image.new("RGB", (40, 24), "white").save(root / "warm" / "dark" / "wide.png")
    assert common.load_data(str(root))[0].pixels is None
    code, text, errors = evaluate(
        monkeypatch, capsys, "--backbone", run / "backbone.pt", "--arch", "tiny", "--data", root,
        "--stem", "3x3", "--image-size", 16, "--protocol", "linear", "knn", "cluster", "finetune",
        "--linear", "augment", "--epochs", 2, "--finetune-epochs", 1, "--out", tmp_path / "e.json")
    assert (code, errors) == (0, "") and "every tenth training picture" in text
    assert "not the training pictures" not in text  # there is no run to compare with
    saved = json.loads((tmp_path / "e.json").read_text())
    assert saved["pictures"] == dict(train=36, labelled=36, test=5)
    assert saved["results"]["cluster"][0]["pictures"] == 5


def files(folder):
    return sorted(str(p) for p in folder.rglob("*"))


def bad_inputs(run, tmp_path):
    """words of the sentence -> the command line that deserves it."""
    one, flat = tmp_path / "one", tmp_path / "flat"
    for folder in (one / "only", flat):
        folder.mkdir(parents=True)
        for i in range(30):
            Image.new("RGB", (16, 16), (8 * i, 0, 0)).save(folder / f"{i}.png")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_text((run / "config.json").read_text())
    (tmp_path / "text.pt").write_text("no weights")
    few = tmp_path / "few"
    write_pictures(few / "train", 1, np.random.default_rng(0))
    write_pictures(few / "val", 1, np.random.default_rng(1))
    for picture in list((few / "val").rglob("*.png"))[:2]:
        picture.unlink()
    for name, value in dict(nan=math.nan, huge=1e38).items():  # a run that diverged; weights that overflow
        weights = torch.load(run / "backbone.pt")
        torch.save({key: x.fill_(value) if key == "layer4.0.conv2.weight" else x for key, x in weights.items()},
                   tmp_path / f"{name}.pt")
    config = json.loads((run / "config.json").read_text())
    for name, value in dict(stem="9x9", image_size="large", data=7).items():
        (tmp_path / name).mkdir()
        config["arguments"][name], before = value, config["arguments"][name]
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        config["arguments"][name] = before
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pt")
    (tmp_path / "mine.json").write_text('{"precious": 1}')
    return {
        "nothing to evaluate": ["--data", "textures"],
        "is no run folder": ["--run", flat],
        "let the run finish": ["--run", unfinished],
        "correct --backbone": ["--run", run, "--backbone", tmp_path / "nowhere.pt"],
        "text.pt is not readable": ["--run", run, "--backbone", tmp_path / "text.pt"],
        "no weights of a ResNet": ["--run", run, "--backbone", tmp_path / "foreign.pt"],
        "correct --arch": ["--run", run, "--arch", "resnet18"],
        "is no network": ["--run", run, "--arch", "vgg11"],
        "carries no labels": ["--run", run, "--data", flat],
        "one class only": ["--run", run, "--data", one],
        "--k 33 is above the 32": ["--run", run, "--k", 33],
        "argument --k: 0 must be above 0": ["--run", run, "--k", 0],
        "--depth 2 is not there": ["--run", run, "--depth", 2],
        "4 classes: leave it out": ["--run", run, "--data", few, "--protocol", "cluster"],
        "give --stem 3x3 or 3x3s2": ["--backbone", run / "backbone.pt", "--arch", "tiny", "--data", run / "data"],
        "holds NaN or infinity (layer4.0.conv2.weight": ["--run", run, "--backbone", tmp_path / "nan.pt"],
        "not finite, or too large": ["--run", run, "--backbone", tmp_path / "huge.pt", "--protocol", "finetune"],
        "argument --pairs: 100000000000000 must be": ["--run", run, "--protocol", "hierarchy", "--pairs", 10**14],
        "argument --lr: 1e+308 must be": ["--run", run, "--lr", 1e308],
        "argument --lr-head: 1e+300 must": ["--run", run, "--lr-head", 1e300],
        "argument --image-size": ["--run", run, "--image-size", 10**12],
        "argument --seed: 18446744073709551616 must": ["--run", run, "--seed", 2**64],
        "of a training run ('9x9')": ["--run", tmp_path / "stem"],
        "invalid int value: 'large'": ["--run", tmp_path / "image_size"],
        "--data 7 does not exist": ["--run", tmp_path / "data", "--untrained"],
        "--clusters 33 2 must fall": ["--run", run, "--protocol", "hierarchy", "--clusters", 33, 2],
        "--clusters 2 8 must fall": ["--run", run, "--protocol", "hierarchy", "--clusters", 2, 8],
        "argument --labels": ["--run", run, "--labels", 1.5],
        "exclude each other": ["--run", run, "--untrained", "--backbone", run / "backbone.pt"],
        "is no result of this script": ["--run", run, "--out", tmp_path / "mine.json"],
        "cannot be written": ["--run", run, "--out", tmp_path / "no" / "folder.json"],
    }


def test_bad_input_is_one_sentence_and_writes_nothing(run, monkeypatch, capsys, tmp_path):
    cases = bad_inputs(run, tmp_path)
    before = files(run) + files(tmp_path)
    for words, argv in cases.items():
        code, _, errors = evaluate(monkeypatch, capsys, *argv)
        assert code == 2 and words in errors, (argv, errors)
        assert errors.count("\n") == 1 and errors.startswith("eval_linear.py: "), errors
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, errors = evaluate(monkeypatch, capsys, "--run", run)
    assert code == 2 and "one process" in errors
    assert files(run) + files(tmp_path) == before


def test_what_diverges_here_is_no_training_run(run, monkeypatch, capsys, tmp_path):
    """Sentences of this script, not of one with steps, checkpoints and --resume."""
    monkeypatch.setattr(F, "normalize", lambda x, dim: 1 / 0)  # knn must not get so far
    weights = torch.load(run / "backbone.pt")
    weights["layer4.0.bn2.weight"].fill_(1e30)  # features are finite, their squares are not
    torch.save(weights, tmp_path / "large.pt")
    for argv, words in ((("--backbone", tmp_path / "large.pt", "--protocol", "knn"), "not finite, or too large"),
                        (("--lr", 1e6, "--weight-decay", 1e6, "--protocol", "linear"), "the linear probe diverged"),
                        (("--lr-trunk", 1e6, "--lr-head", 1e6, "--weight-decay", 1e6, "--protocol", "finetune"),
                         "fine-tuning diverged"),
                        (("--lr-head", 1e8, "--finetune-epochs", 2, "--protocol", "finetune"), "fine-tuning diverged")):
        code, _, errors = evaluate(monkeypatch, capsys, "--run", run, *argv, "--out", tmp_path / "e.json")
        assert code in (1, 2) and words in errors and errors.count("\n") == 1, errors
        assert not {"--resume", "--base-lr", "checkpoint"} & {*errors.split()} and not (tmp_path / "e.json").exists()


def test_a_full_disk_and_an_interrupt_are_one_sentence(run, monkeypatch, capsys, tmp_path):
    def full(number):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        code, text, errors = evaluate(patched, capsys, "--run", run, "--protocol", "knn", "--k", 3,
                                      "--out", tmp_path / "e.json")
    assert code == 1 and "No space left" in errors and errors.count("\n") == 1 and "top1" in text
    assert files(tmp_path) == []
    monkeypatch.setitem(ev.PROTOCOLS, "knn", lambda task: (_ for _ in ()).throw(KeyboardInterrupt))
    code, _, errors = evaluate(monkeypatch, capsys, "--run", run, "--protocol", "knn", "--out", tmp_path / "e.json")
    assert code == 130 and errors.count("\n") == 1 and "step" not in errors and "--resume" not in errors


def test_a_protocol_that_fails_leaves_the_results_of_the_others(run, monkeypatch, capsys, tmp_path):
    code, text, errors = evaluate(monkeypatch, capsys, "--run", run, "--protocol", "knn", "finetune", "--k", 3,
                                  "--lr-head", 1e8, "--finetune-epochs", 2, "--out", tmp_path / "e.json")
    assert code == 1 and "fine-tuning diverged" in errors and "top1" in text
    written = json.loads((tmp_path / "e.json").read_text())
    assert written["results"].keys() == written["seconds"].keys() == {"knn"}


def test_a_pipe_is_no_result_and_an_empty_word_no_world(run, monkeypatch, capsys, tmp_path):
    os.mkfifo(tmp_path / "e.json")
    code, _, errors = evaluate(monkeypatch, capsys, "--run", run, "--out", tmp_path / "e.json")
    assert code == 2 and "cannot be written" in errors
    monkeypatch.setenv("WORLD_SIZE", "")
    argv = "--run", run, "--protocol", "knn", "--k", 3, "--out", tmp_path / "f.json"
    assert evaluate(monkeypatch, capsys, *argv)[0] == 0


def test_pixels_as_imagenets_networks_expect_them(run):
    """Fed what a backbone here is fed, the network behind --pixels imagenet sees (x - mean) / std."""
    args = ev.parse_args(["--run", str(run), "--pixels", "imagenet"])
    network, plain = ev.load_backbone(args), ev.load_backbone(ev.parse_args(["--run", str(run)]))
    x = torch.rand(4, 3, 16, 16)
    want = plain(TF.normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert_close(network(common.normalize_pixels(x)), want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain(common.normalize_pixels(x)), want, rtol=1e-2)


def test_votes_are_finite_at_any_temperature(run, monkeypatch, capsys, tmp_path):
    tops = []
    for temperature in (0.07, 1e-3, 1e-300, 1e3):
        code, _, errors = evaluate(monkeypatch, capsys, "--run", run, "--protocol", "knn", "--k", 3, "--temperature",
                                   temperature, "--out", tmp_path / "e.json")
        assert (code, errors) == (0, "")
        tops.append(json.loads((tmp_path / "e.json").read_text())["results"]["knn"][1]["top1"])
    assert min(tops) > 80
    sim = torch.tensor([[0.9, 0.8, 0.8], [1.0, 0.1, 0.0]])
    for dtype in (torch.float32, torch.float64):
        for temperature in (1e-30, 1e-3, 0.01):
            votes = common.knn_votes(sim.to(dtype), torch.tensor([[0, 1, 1], [2, 1, 1]]), 3, temperature)
            assert votes.isfinite().all() and votes.argmax(dim=1).tolist() == [0, 2]
    votes = common.knn_votes(sim.double(), torch.tensor([[0, 1, 1], [2, 1, 1]]), 3, 0.07)
    assert votes[0].tolist() == pytest.approx([math.exp(sim[0, 0] / 0.07), 2 * math.exp(sim[0, 1] / 0.07), 0])


def test_names_of_any_bytes(run, monkeypatch, capsys, tmp_path):
    """Latin-1 file names, classes with a newline or a comma: clusters.csv is read as the run wrote it."""
    here = tmp_path / "run"
    here.mkdir()
    for split in ("train", "val"):
        write_pictures(here / "data" / split, 3, np.random.default_rng(0))
        (here / "data" / split / "warm").rename(here / "data" / split / "wa\nrm, red")
        for dark in (here / "data" / split).rglob("dark"):
            (dark / "0.png").rename(os.fsdecode(os.fsencode(dark) + b"/caf\xe9.png"))
    config = json.loads((run / "config.json").read_text())
    train = common.load_data(str(here / "data"))[0]
    config["arguments"]["data"], config["derived"] = str(here / "data"), dict(fingerprint=train.fingerprint())
    (here / "config.json").write_text(json.dumps(config))
    (here / "backbone.pt").write_bytes((run / "backbone.pt").read_bytes())
    with torch.no_grad():
        tree = common.hierarchical_kmeans(F.normalize(train.pixels.flatten(1).float(), dim=1), [4, 2], temperature=1.0)
        plumbing.write_tree(here, train, F.normalize(train.pixels.flatten(1).float(), dim=1), tree)
    code, text, errors = evaluate(monkeypatch, capsys, "--run", here, "--protocol", "hierarchy")
    assert (code, errors) == (0, "")
    trees = json.loads((here / "eval.json").read_text())["results"]["tree"]
    assert [row["tree"] for row in trees] == ["features", "clusters.csv"] and text.count("clusters.csv") >= 5
    assert (here / "eval_tree" / "tree.png").stat().st_size > 0
    (here / "clusters.csv").write_text("image,level0\nx.png,3\n")
    code, _, errors = evaluate(monkeypatch, capsys, "--run", here, "--protocol", "hierarchy", "--out", here / "b.json")
    assert code == 2 and "does not hold the tree of the run" in errors


@pytest.mark.parametrize("rows", ("a,1,0\nb,1\n", "a\nb\n", "a,1,0\n", "a,1,0\nb,1,0\nc,0,0\n"))
def test_a_torn_tree_is_refused(rows, tmp_path):
    """Rows of other lengths, no levels, fewer rows or more than the two pictures."""
    (tmp_path / "clusters.csv").write_text("image,level0,level1\n" + rows)
    with pytest.raises(common.Stop, match="does not hold the tree"):
        ev.tree_of_run(tmp_path / "clusters.csv", 2)
    (tmp_path / "clusters.csv").write_text("image,level0,level1\na,1,0\nb,2,0\n")
    assert ev.tree_of_run(tmp_path / "clusters.csv", 2).tolist() == [[1, 2], [0, 0]]


@pytest.mark.parametrize("order", (["linear", "knn"], ["knn", "linear"]))
def test_a_damaged_test_picture_counts_as_its_neighbour_in_any_order(order, tmp_path, monkeypatch, capsys):
    """Large ones: only the features tell that it is damaged. It is named once, of whatever parts it is."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 6), ("val", 2)):
        for c, colour in enumerate(((230, 20, 20), (20, 20, 230))):
            (tmp_path / "data" / split / f"c{c}").mkdir(parents=True)
            for i in range(n):
                pixels = (np.array(colour) + rng.integers(-20, 20, (130 + i, 130, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / f"c{c}" / f"{i}.png")
    (tmp_path / "data/val/c0/1.png").write_bytes(b"no picture")  # c1/0.png stands in
    (tmp_path / "data/train/c0/2.png").write_bytes(b"no picture")
    argv = "--untrained --arch tiny --stem 3x3 --image-size 16 --k 3 --protocol".split() + order
    code, _, errors = evaluate(monkeypatch, capsys, *argv, "--data", tmp_path / "data", "--out", tmp_path / "e.json")
    results = json.loads((tmp_path / "e.json").read_text())["results"]
    assert code == 0 and results["linear"][0]["last"] == results["knn"][0]["top1"] == 100, results
    assert errors.count("using its neighbour") == 2, errors
    assert errors.count("neighbour: c0/1.png") == errors.count("neighbour: c0/2.png") == 1, errors


def test_the_first_picture_is_held_out_even_if_it_is_damaged(tmp_path):
    """Eight pictures without a test split: every tenth is one."""
    for i in range(8):
        (tmp_path / f"c{i // 4}").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (200 * (i // 4), i, 90)).save(tmp_path / f"c{i // 4}" / f"{i}.png")
    (tmp_path / "c0" / "0.png").write_bytes(b"no picture")
    train, test = common.load_data(str(tmp_path))
    assert test is None and [*train.unreadable] == [0]
    assert common.knn_accuracy(train, test, lambda images: images.pixels.flatten(1).float()) == [100.0]


def test_finetuning_needs_two_pictures_a_step(run, monkeypatch, capsys, tmp_path):
    code, _, errors = evaluate(monkeypatch, capsys, "--run", run, "--protocol", "finetune", "--batch-size", 1,
                               "--out", tmp_path / "e.json")
    assert code == 2 and "two pictures per step" in errors and errors.count("\n") == 1


def test_a_damaged_file_is_refused(run, monkeypatch, capsys, tmp_path):
    """One bit of a weight, which torch.load would not notice; half of the file."""
    whole = bytearray((run / "backbone.pt").read_bytes())
    middle = len(whole) // 2
    for name, content in dict(half=whole[:middle], bit=whole[:middle] + bytes([whole[middle] ^ 64]) +
                              whole[middle + 1:]).items():
        (tmp_path / name).write_bytes(content)
        code, _, errors = evaluate(monkeypatch, capsys, "--run", run, "--backbone", tmp_path / name)
        assert code == 2 and "is not readable" in errors and errors.count("\n") == 1, errors
    assert len(torch.load(tmp_path / "bit")) == len(torch.load(run / "backbone.pt"))


def test_results_of_two_at_once_are_both_kept(tmp_path):
    """Forty processes finish at the same moment."""
    out = tmp_path / "eval.json"
    with ProcessPoolExecutor(8, multiprocessing.get_context("fork")) as pool:
        list(pool.map(ev.add_result, [out] * 40, [dict(number=i) for i in range(40)]))
    saved = json.loads(out.read_text())
    assert sorted(row["number"] for row in [saved, *saved["earlier"]]) == list(range(40))
    assert [p.name for p in tmp_path.iterdir()] == ["eval.json"]


def test_a_tree_drawn_by_two_at_once(tmp_path):
    """They would share a temporary file; the turn of a process that was killed holds up nobody for ever."""
    with ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as pool:
        list(pool.map(write_in_turn, [tmp_path / "tree.png"] * 40))
    assert [p.name for p in tmp_path.iterdir()] == ["tree.png"] and (tmp_path / "tree.png").stat().st_size == 10**5
    turn = tmp_path / "tree.png.turn"
    turn.touch()
    with pytest.MonkeyPatch.context() as patched:
        clock = itertools.count(step=3)
        patched.setattr(ev.time, "monotonic", lambda: next(clock))
        write_in_turn(tmp_path / "tree.png")
    assert not turn.exists() and next(clock) >= 12


def write_in_turn(path):
    ev.in_turn(path, lambda: plumbing.write_atomically(path, bytes(10**5)))


def test_a_vit(run, monkeypatch, capsys, tmp_path):
    """Any backbone that networks.backbone knows, strictly, and not for pictures of another size."""
    torch.save({"teacher.backbone." + name: x for name, x in
                networks.backbone("vit-8-32-2", "7x7", 16)[0].state_dict().items()}, tmp_path / "vit.pt")
    argv = ["--backbone", tmp_path / "vit.pt", "--arch", "vit-8-32-2", "--data", run / "data", "--k", 3]
    code, text, errors = evaluate(monkeypatch, capsys, *argv, "--image-size", 16, "--epochs", 2, "--out",
                                  tmp_path / "e.json")
    assert (code, errors) == (0, "") and "32 features" in text and "teacher.backbone" in text
    code, _, errors = evaluate(monkeypatch, capsys, *argv, "--image-size", 24, "--out", tmp_path / "e.json")
    assert code == 2 and "encoder.pos_embedding" in errors and errors.count("\n") == 1


def test_the_command_ends_with_exit_code_2(run, tmp_path):
    """The same through the shell's door."""
    cases = bad_inputs(run, tmp_path)
    before = files(run) + files(tmp_path)
    started = {words: subprocess.Popen([sys.executable, ROOT / "eval_linear.py", *map(str, cases[words])],
                                       text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
               for words in ("let the run finish", "--k 33 is above the 32")}
    for words, process in started.items():
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2 and words in errors and errors.count("\n") == 1, errors
    assert files(run) + files(tmp_path) == before

