"""eval_linear.py: measures against scikit-learn and brute force, loading, frozen backbone, bad input."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import eval_linear as ev

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
    metrics = pytest.importorskip("sklearn.metrics")
    assert ev.nmi(a, b) == pytest.approx(metrics.normalized_mutual_info_score(b, a), abs=1e-9)
    assert ev.ami(a, b) == pytest.approx(metrics.adjusted_mutual_info_score(b, a), abs=1e-9)
    assert ev.ari(a, b) == pytest.approx(metrics.adjusted_rand_score(b, a), abs=1e-12)


@pytest.mark.parametrize(("a", "b"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_measures_are_properties_of_partitions(a, b):
    """Other names and another order of the items change nothing; nmi, ami and ari are symmetric."""
    order = np.random.default_rng(5).permutation(len(a))
    renamed, shuffled = (101 - 3 * a)[order], b[order]
    for measure in (ev.nmi, ev.ami, ev.ari, ev.purity, ev.matching_accuracy):
        assert measure(renamed, shuffled) == pytest.approx(measure(a, b), abs=1e-9)
        assert measure(a, b) <= 1 + 1e-9
    for measure in (ev.nmi, ev.ami, ev.ari):
        assert measure(b, a) == pytest.approx(measure(a, b), abs=1e-9)
    assert ev.matching_accuracy(a, b) <= ev.purity(a, b) + 1e-12


def test_measures_by_hand():
    """Clusters {0,1,2}, {3,4,5} of the labels x x y, y y y."""
    clusters, labels = [0, 0, 0, 1, 1, 1], list("xxyyyy")
    assert ev.purity(clusters, labels) == pytest.approx(5 / 6)
    assert ev.matching_accuracy(clusters, labels) == pytest.approx(5 / 6)
    assert ev.purity(clusters, list("yxyyyy")) == pytest.approx(5 / 6)
    assert ev.matching_accuracy(clusters, list("yyyyyx")) == pytest.approx(4 / 6)  # both would want y
    # pairs: together in both 1 + 3 = 4, in clusters 6, in labels 1 + 6 = 7, of 15
    assert ev.ari(clusters, labels) == pytest.approx((4 - 6 * 7 / 15) / ((6 + 7) / 2 - 6 * 7 / 15))
    mutual = 2 / 6 * math.log(6 * 2 / (3 * 2)) + 1 / 6 * math.log(6 / (3 * 4)) + 3 / 6 * math.log(6 * 3 / (3 * 4))
    entropies = math.log(2) - (1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3))
    assert ev.nmi(clusters, labels) == pytest.approx(mutual / (entropies / 2))


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
        expected = pytest.approx(slow_expected_information(a, b), abs=1e-12)
        assert ev.expected_information(*sizes) == expected
        assert ev.expected_information(*sizes, block=1) == expected


def test_ami_of_many_points_takes_seconds_not_minutes():
    rng = np.random.default_rng(1)
    assert abs(ev.ami(rng.integers(0, 1000, 50_000), rng.integers(0, 100, 50_000))) < 0.01


def test_labelings_of_different_items_are_refused():
    for a, b in (([0, 1], [0]), ([], [])):
        with pytest.raises(ValueError, match="same items"):
            ev.nmi(a, b)


# ---- matching


def slow_best(gain):
    return max(sum(gain[r, c] for r, c in enumerate(columns))
               for columns in itertools.permutations(range(gain.shape[1]), len(gain)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 2), (3, 5), (4, 4), (5, 6)])
def test_best_matching_by_brute_force(shape):
    for seed in range(8):
        gain = np.random.default_rng(seed).integers(0, 6, shape)  # few values: many ties
        columns = ev.best_matching(gain)
        assert len(set(columns.tolist())) == len(gain)
        assert gain[np.arange(len(gain)), columns].sum() == slow_best(gain)


@pytest.mark.parametrize("shape", [(30, 30), (25, 60), (120, 120)])
def test_best_matching_equals_scipy(shape):
    optimize = pytest.importorskip("scipy.optimize")
    for gain in (np.random.default_rng(2).integers(0, 50, shape), np.random.default_rng(3).random(shape)):
        columns, expected = ev.best_matching(gain), optimize.linear_sum_assignment(gain, maximize=True)
        assert len(set(columns.tolist())) == len(gain)
        assert gain[np.arange(len(gain)), columns].sum() == pytest.approx(gain[expected].sum())


def test_more_rows_than_columns_are_refused():
    with pytest.raises(ValueError, match="transpose"):
        ev.best_matching(np.ones((3, 2)))


# ---- trees


def test_spearman_equals_scipy_with_ties():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(4)
    for high in (2, 4, 1000):
        x = rng.integers(0, high, 500)
        y = x + rng.integers(0, high, 500)
        assert ev.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
        assert ev.average_ranks(x) == pytest.approx(stats.rankdata(x))
    assert ev.spearman(np.zeros(5), np.arange(5)) is None


def test_tree_distance_by_hand():
    """Leaves a, b under one parent, c under another, one root: siblings 1 apart, cousins 2."""
    levels = np.array([[0, 1, 2, 0], [0, 0, 1, 0], [0, 0, 0, 0]])  # items a, b, c, a
    assert ev.tree_distance(levels, np.array([0, 0, 0, 1]), np.array([3, 1, 2, 2])).tolist() == [0, 1, 2, 2]
    assert ev.spearman([0, 1, 2, 2], [5, 6, 7, 7]) == pytest.approx(1)


def test_path_purity_is_the_mean_over_leaves():
    leaves = np.array([0, 0, 0, 0, 1, 1])
    labels = np.array([[0, 0, 0, 1, 1, 1], [0, 0, 1, 2, 2, 2]])  # paths 00 00 01 12 | 12 12
    assert ev.path_purity(leaves, labels) == pytest.approx((2 / 4 + 2 / 2) / 2)


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


def test_subset_keeps_pictures_and_labels_together():
    images = common.Images(list("abcd"), torch.tensor([[0], [1], [0], [2]]), [list("xyz")],
                           pixels=torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2))
    images.index_of[1] = 2  # b cannot be read, c stands in for it: picture and label
    part = ev.subset(images, torch.tensor([1, 3]))
    assert part.names == ["b", "d"] and part.labels.tolist() == [[0], [2]]
    assert part.pixels[:, 0, 0, 0].tolist() == [1, 3] and part.index_of.tolist() == [0, 1]
    assert ev.subset(images, torch.arange(4)) is images


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
            assert accuracy[epoch] == pytest.approx(expected, abs=0.01)
    assert ours[0] != ours[1]


def test_last_and_best():
    assert ev.last_and_best([3.0, 9.0, 9.0, 4.0]) == dict(last=4.0, best=9.0, best_epoch=2)
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


def network_and_state(arch="tiny", stem="3x3"):
    torch.manual_seed(1)
    other = common.backbone(arch, stem)[0].state_dict()
    torch.manual_seed(2)
    return common.backbone(arch, stem)[0], other


def load(network, state):
    found, others = ev.find_backbone(state, "file")
    return ev.fit_backbone(network, found, others, "file")


PREFIXES = ["", "module.", "encoder_q.", "module.encoder_q.", "backbone.", "encoder_q.backbone.",
            "module.backbone.", "encoder_q._orig_mod.backbone."]


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_weights_are_found_under_any_prefix(prefix, wrap):
    network, state = network_and_state()
    file = {f"{prefix.replace('encoder_q', 'encoder_k')}{name}": value + 9 for name, value in state.items()
            if "encoder_q" in prefix}  # the key encoder comes first, and is not taken
    file |= {prefix + name: value for name, value in state.items()}
    file |= {prefix + "fc.weight": torch.zeros(3, 4), "queue": torch.zeros(5, 2)}
    sentence = load(network, wrap(file))
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert "fc.weight" in sentence and "queue" in sentence and "missing: none" in sentence


def test_only_the_counters_of_old_files_may_be_missing():
    network, state = network_and_state()
    sentence = load(network, {name: v for name, v in state.items() if "num_batches" not in name})
    assert "bn1.num_batches_tracked" in sentence.split("missing")[1]
    assert torch.equal(network.state_dict()["layer4.0.conv2.weight"], state["layer4.0.conv2.weight"])
    with pytest.raises(common.UserError, match="bn1.running_mean is missing"):
        load(network, {name: v for name, v in state.items() if name != "bn1.running_mean"})


def test_what_does_not_fit_is_refused_and_nothing_is_loaded():
    network, state = network_and_state()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    other_stem = network_and_state(stem="7x7")[1]
    deeper = {**state, "layer1.1.conv1.weight": torch.zeros(16, 16, 3, 3)}
    for file, words in ((other_stem, "conv1.weight has shape"), (deeper, "layer1.1.conv1.weight is too many"),
                        ({**state, "bn1.weight": torch.full((16,), math.nan)}, "bn1.weight is not finite"),
                        ({**state, "bn1.weight": 3}, "bn1.weight has shape None"),
                        ({"weight": torch.zeros(2)}, "no weights of a ResNet"), ([1, 2], "no weights of a ResNet"),
                        ({"model": {"epoch": 3}}, "no weights of a ResNet")):
        with pytest.raises(common.UserError, match=words):
            load(network, file)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_resnet34_is_not_a_resnet18():
    """Every tensor of a resnet18 is in a resnet34, in its shape."""
    with pytest.raises(common.UserError, match="is too many"):
        load(common.backbone("resnet18", "7x7")[0], common.backbone("resnet34", "7x7")[0].state_dict())


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
    derived = dict(clusters=[6, 3], fingerprint=common.find_data(arguments["data"], "data")[0].fingerprint())
    (folder / "config.json").write_text(json.dumps(dict(arguments=arguments, derived=derived)))
    torch.manual_seed(0)
    torch.save(common.backbone("tiny", "3x3")[0].state_dict(), folder / "backbone.pt")
    return folder


def evaluate(monkeypatch, capsys, *argv):
    """(exit code, stdout, stderr) of the script, in this process."""
    monkeypatch.setattr(sys, "argv", ["eval_linear.py", *map(str, argv), "--device", "cpu", "--workers", "0"])
    code = 0
    try:
        common.launch(ev.main, ev.parse_args)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_every_protocol_on_a_run(run, monkeypatch, capsys, tmp_path):
    networks, loaded = [], ev.load_backbone

    def spy(args):
        networks.append(loaded(args))
        return networks[-1]

    monkeypatch.setattr(ev, "load_backbone", spy)
    names = [str(p.relative_to(run / "data" / "train")) for p in sorted((run / "data" / "train").rglob("*.png"))]
    (run / "clusters.csv").write_text("image,level0,level1\n" + "".join(
        f"{name},{i // 8},{i // 16}\n" for i, name in enumerate(names)))  # the true tree
    out = tmp_path / "eval.json"
    code, text, errors = evaluate(
        monkeypatch, capsys, "--run", run, "--protocol", "linear", "knn", "finetune", "cluster", "hierarchy",
        "--k", 5, "--epochs", 12, "--finetune-epochs", 6, "--batch-size", 16, "--clusters", 8, 2, "--out", out)
    assert (code, errors) == (0, "")
    network, weights = networks[0][0], torch.load(run / "backbone.pt")
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())  # as it was

    saved = json.loads(out.read_text())
    results = saved["results"]
    assert "upper bound" in saved["note"] and saved["note"] in text and saved["arguments"]["epochs"] == 12
    assert saved["pictures"] == dict(train=32, labelled=32, test=16)
    linear, = results["linear"]
    assert linear["level"] == 1 and linear["classes"] == 4 and len(linear["rates"]) == 6
    assert linear["last"] == max(r["last"] for r in linear["rates"]) > 80  # colours: an easy task
    assert 1 <= linear["best_epoch"] <= 12 and linear["best"] >= linear["last"]
    assert [row["classes"] for row in results["knn"]] == [2, 4] and results["knn"][0]["top1"] > 90
    assert results["finetune"][0]["last"] > 40
    assert [row["pictures"] for row in results["cluster"]] == [16, 16]
    assert len(results["hierarchy"]) == 2 * 2 * 2  # trees, cluster levels, label levels
    features, left = results["tree"]
    assert left == dict(tree="clusters.csv", path_purity=1.0, rank_correlation=1.0)
    assert features["tree"] == "features" and features["rank_correlation"] > 0.3
    perfect = [r for r in results["hierarchy"] if r["tree"] == "clusters.csv" and r["clusters"] == r["classes"]]
    assert len(perfect) == 2 and all(r["nmi"] == r["ami"] == r["ari"] == r["purity"] == 1 for r in perfect)
    assert (tmp_path / "eval_tree" / "tree.png").stat().st_size > 0
    assert sorted(p.name for p in run.iterdir()) == ["backbone.pt", "clusters.csv", "config.json", "data"]

    # Again, into the same file, with random crops and few labels: the first results are kept.
    code, text, _ = evaluate(
        monkeypatch, capsys, "--run", run, "--protocol", "linear", "--linear", "augment", "--labels", 0.25,
        "--level", 0, 1, "--epochs", 3, "--schedule", "step", "--out", out)
    again = json.loads(out.read_text())
    assert code == 0 and saved.pop("earlier") == [] and again["earlier"] == [saved]
    assert again["pictures"]["labelled"] == 8 and [row["level"] for row in again["results"]["linear"]] == [0, 1]


def test_pictures_decoded_on_demand_and_no_test_split(run, monkeypatch, capsys, tmp_path):
    """A folder of mixed sizes is not held in memory; every tenth picture of it becomes the test."""
    root = tmp_path / "mixed"
    write_pictures(root, 10, np.random.default_rng(3))
    Image.new("RGB", (40, 24), "white").save(root / "warm" / "dark" / "wide.png")
    assert common.find_data(str(root), "data")[0].pixels is None
    code, text, errors = evaluate(
        monkeypatch, capsys, "--backbone", run / "backbone.pt", "--arch", "tiny", "--data", root,
        "--image-size", 16, "--protocol", "linear", "knn", "cluster", "finetune", "--linear", "augment",
        "--epochs", 2, "--finetune-epochs", 1, "--out", tmp_path / "e.json")
    assert (code, errors) == (0, "") and "every tenth training picture" in text and "3x3 stem" in text
    assert "not the training pictures" not in text  # there is no run to compare with
    saved = json.loads((tmp_path / "e.json").read_text())
    assert saved["pictures"] == dict(train=36, labelled=36, test=5)
    assert saved["results"]["cluster"][0]["pictures"] == 41


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
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pt")
    (tmp_path / "mine.json").write_text('{"precious": 1}')
    return {
        "nothing to evaluate": ["--data", "textures"],
        "is no run folder": ["--run", flat],
        "let the run finish": ["--run", unfinished],
        "correct --backbone": ["--run", run, "--backbone", tmp_path / "nowhere.pt"],
        "not a readable checkpoint": ["--run", run, "--backbone", tmp_path / "text.pt"],
        "no weights of a ResNet": ["--run", run, "--backbone", tmp_path / "foreign.pt"],
        "correct --arch": ["--run", run, "--arch", "resnet18"],
        "is no torchvision model": ["--run", run, "--arch", "vgg11"],
        "carries no labels": ["--run", run, "--data", flat],
        "one class only": ["--run", run, "--data", one],
        "--k 33 is above the 32": ["--run", run, "--k", 33],
        "argument --k: 0 must be above 0": ["--run", run, "--k", 0],
        "--level 2 is not there": ["--run", run, "--level", 2],
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


# ---- the picture's choice of paths


def test_leaf_paths_of_few_and_of_many_clusters():
    """Few coarse clusters share the rows; many give the largest, the purest (if labelled) and random leaves."""
    generator = torch.Generator().manual_seed(0)
    assign = [torch.randint(300, (2000,), generator=generator)]
    parent = [torch.arange(300) % 100]
    assign.append(parent[0][assign[0]])
    assign[0][:40], assign[1][:40] = 7, 7  # the largest leaf
    labels = torch.randint(50, (2000, 1), generator=generator)
    labels[assign[0] == 11] = 3  # the purest
    sizes = torch.bincount(assign[0])
    sections = common.leaf_paths(assign, parent, 27, labels)
    assert [title.split()[1] for title, _ in sections] == ["largest", "purest", "leaves:"]
    (_, largest), (_, purest), (_, drawn) = sections
    assert {path[0] for path in largest} == set(sizes.argsort(descending=True, stable=True)[:9].tolist())
    assert 7 in {path[0] for path in largest} and 11 in {path[0] for path in purest}
    assert all(len(paths) == 9 for _, paths in sections) and {path[0] for path in drawn} != {p[0] for p in largest}
    assert all(path[1] == parent[0][path[0]] for _, paths in sections for path in paths)
    assert len(common.leaf_paths(assign, parent, 27)) == 2  # no labels
    (title, paths), = common.leaf_paths([assign[0], assign[1] % 5], [parent[0] % 5], 27)  # five coarse clusters
    assert title == "" and len(paths) == 27 and {path[1] for path in paths} == set(range(5))
    (_, paths), = common.leaf_paths([assign[0] % 3], [], 27)
    assert sorted(paths) == [[0], [1], [2]]
