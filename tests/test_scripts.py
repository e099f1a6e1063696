"""Whole scripts on tiny data: what a run leaves, how it is stopped and resumed, two processes, bad input.

Scripts run as separate processes in an empty folder. Importing torch takes longer than most of these runs, so a
fork server imports it once and each run is a fork of it that executes the script as `__main__`; the runs of the
fixture `whole` and of the test with torchrun start from nothing, as a user's do.

    pytest tests
"""

import csv
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.testing import assert_close

import common
import csml
import hirl_moco
import hirl_simclr
import hirl_swav

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py") if p.stem.startswith("hirl_") or p.stem in ("hcsc", "csml"))
QUEUED = [name for name in SCRIPTS if "--queue-size" in (ROOT / f"{name}.py").read_text()]

IMAGES, BATCH, STEPS, EPOCHS = 96, 16, 6, 3  # 6 steps an epoch; the hierarchy joins after the first epoch
TINY = (f"--arch tiny --image-size 16 --epochs {EPOCHS} --batch-size {BATCH} --warmup-epochs 1 --device cpu "
        "--workers 0 --base-lr 0.02")
OWN = {  # small numbers for the arguments that a script has for itself
    "hirl_moco": "--clusters 12 4 2 --queue-size 32 --negative-paths 20",
    "hcsc": "--clusters 12 4 2 --queue-size 32",
    "hirl_simclr": "--clusters 12 4 2 --negative-paths 20 --temperature 1",  # low ones magnify rounding
    "csml": "--clusters 12 4 2 --queue-size 32 --neighbours 4 --refresh-every 2 --base-lr 0.005",
    "hirl_swav": "--clusters 12 4 2 --queue-size 32 --queue-epoch 0 --negative-paths 20 --prototypes 24 "
                 "--freeze-prototypes 3 --local-crops 2 --local-size 8 --lr-warmup 0.2 --epsilon 0.05",
}
PLAIN = {"csml": "--neighbours 0 --clusters 0"}  # how a script is told to leave out its hierarchy; else --clusters 0
TIMINGS = ("images_per_s", "data_wait", "peak_memory_gib")  # what may differ between equal runs

os.environ["OMP_NUM_THREADS"] = "1"  # inherited by every process: the same sums, and no fight for the cores
torch.set_num_threads(1)  # and the oracles here sum as the scripts do
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["torch", "torchvision", "numpy", "pytest", "tqdm", "PIL.Image", "torch.distributed"])


def arguments(script, data, out, **other):
    """A tiny run's command line; other: epochs="1" replaces --epochs, plain=True leaves the hierarchy out."""
    line = f"--data {data} --out {out} {TINY} {OWN.get(script, '--clusters 12 4 2')}".split()
    if other.pop("plain", False):
        line += PLAIN.get(script, "--clusters 0").split()
    for name, value in other.items():
        line += ["--" + name.replace("_", "-"), *str(value).split()]
    return line  # of a flag given twice the later one counts


def play(script, argv, folder, label, environment, stop_at, file_limit):
    """In the child: run the script as `__main__`. stop_at: (step, signal) that it sends to itself."""
    os.environ.update(environment)
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{label}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if file_limit:  # the disk is full from this file size on
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    if stop_at:
        steps, ask = iter(range(1, 10**6)), common.Run.stop_if_asked

        def stop_if_asked(run, save):
            if next(steps) == stop_at[0]:
                os.kill(os.getpid(), stop_at[1])
            ask(run, save)

        common.Run.stop_if_asked = stop_if_asked
    sys.argv, path = [f"{script}.py", *map(str, argv)], str(ROOT / f"{script}.py")
    sys.path.insert(0, str(ROOT))
    runpy.run_path(path, run_name="__main__")
    sys.stdout.flush()


class Play:
    """A script that is running: `finish()` gives its exit code and sets `out` and `err`, the text it printed."""

    def __init__(self, folder, script, argv, *, environment=None, stop_at=None, file_limit=None):
        self.label = Path(folder) / f".{time.monotonic_ns()}"
        what = script, argv, folder, self.label, environment or {}, stop_at, file_limit
        self.process = fork.Process(target=play, args=what)
        self.process.start()

    def finish(self, timeout=120):
        self.process.join(timeout)
        hung = self.process.is_alive()
        if hung:
            self.process.kill()
            self.process.join()
        for name in ("out", "err"):
            path = Path(f"{self.label}.{name}")
            setattr(self, name, path.read_text() if path.exists() else "")
            path.unlink(missing_ok=True)
        assert not hung, f"did not end: {self.out}\n{self.err}"
        return self.process.exitcode


def run(folder, script, argv, code=0, **how):
    """Play to the end and demand an exit code."""
    played = Play(folder, script, argv, **how)
    assert played.finish() == code, played.out + played.err
    return played


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def two_ranks(folder, script, argv, code=0, **how):
    """The same command in two gloo processes, as torchrun would start them."""
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    ranks = [Play(folder, script, argv, environment=dict(shared, RANK=str(r), LOCAL_RANK=str(r)), **how)
             for r in (0, 1)]
    codes = [played.finish() for played in ranks]
    assert codes == [code, code], "\n".join(played.out + played.err for played in ranks)
    return ranks


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def losses(row):
    """The entries of a log row that are losses: everything named in it but what is known not to be one."""
    other = {"epoch", "knn", "knn_pixels", "feature_std", "lr", "clusters_in_use", "prototypes_in_use", "unreadable",
             "neighbours_same_label", *TIMINGS}
    return {name: value for name, value in row.items() if name not in other}


def same(a, b):
    """Equal bit for bit, through dicts, lists and tensors."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def load(path):
    return torch.load(path, weights_only=True)


# ---- data


def painted(generator, kind, size=16):
    """A random picture (size, size, 3) uint8: stripes of a width and direction that name its class."""
    axis = np.arange(size) + generator.integers(size)
    stripes = (axis // (1 + kind % 3) % 2).astype(bool)
    mask = np.broadcast_to(stripes if kind < 3 else stripes[:, None], (size, size))
    ink, paper = generator.integers(0, 256, (2, 3))
    return np.where(mask[..., None], ink, paper).astype(np.uint8)


def make_pictures(root, images, seed):
    """Nested folders: 2 superclasses of 3 classes each; one name holds a comma."""
    generator = np.random.default_rng(seed)
    for i in range(images):
        kind = i % 6
        folder = root / ("across", "down, or so")[kind // 3] / f"{('across', 'down')[kind // 3]}{kind % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(painted(generator, kind)).save(folder / f"{i:03d}.png")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    make_pictures(root / "train", IMAGES, seed=0)
    make_pictures(root / "val", 30, seed=1)
    return root


def test_pictures_of_two_seeds_differ(pictures):
    """The val split below is no copy of the training pictures."""
    train, val = common.load_data(str(pictures))
    assert not any((train.pixels == picture).flatten(1).all(1).any() for picture in val.pixels)


@pytest.fixture
def copied(tmp_path):
    """The training pictures in a folder that a test may spoil, and their paths."""
    make_pictures(tmp_path / "copy", IMAGES, seed=0)
    return tmp_path / "copy", sorted((tmp_path / "copy").rglob("*.png"))


def truncate(path):
    path.write_bytes(path.read_bytes()[:60])


@pytest.fixture(scope="session", params=SCRIPTS)
def whole(request, pictures, tmp_path_factory):
    """(script, folder of a run that nothing disturbed, what it printed), started as a user does."""
    folder = tmp_path_factory.mktemp("whole")
    argv = arguments(request.param, pictures, folder / "run")
    done = subprocess.run([sys.executable, ROOT / f"{request.param}.py", *argv], cwd=folder, capture_output=True,
                          text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return request.param, folder / "run", done.stdout


# ---- a run and what it leaves


def test_a_run_leaves_its_files(whole):
    script, folder, printed = whole
    assert sorted(p.name for p in folder.iterdir()) == [
        "backbone.pt", "checkpoint.pt", "clusters.csv", "config.json", "log.jsonl", "tree.png"]
    config = json.loads((folder / "config.json").read_text())
    assert config["arguments"]["batch_size"] == BATCH and config["derived"]["steps_per_epoch"] == STEPS
    assert config["derived"]["pictures"] == IMAGES and config["versions"]["torch"] == torch.__version__
    assert f"{script}.py --data" in config["command"]
    for name, value in config["derived"].items():  # every derived value is said at the start
        assert f"  {name:20} {value}" in printed


def test_the_log_has_a_row_an_epoch(whole):
    script, folder, printed = whole
    rows = log(folder)
    assert [row["epoch"] for row in rows] == list(range(EPOCHS + 1))  # 0: before training
    assert len(rows[0]["knn"]) == len(rows[0]["knn_pixels"]) == 2  # superclass and class
    for row in rows[1:]:
        assert {"lr", "feature_std", "clusters_in_use", "unreadable", "knn", *TIMINGS} <= row.keys()
        assert losses(row) and all(np.isfinite(value) and value > 0 for value in losses(row).values())
        assert 0 <= row["data_wait"] <= 1 and row["unreadable"] == 0 and row["images_per_s"] > 0
        assert all(0 <= value <= 100 for value in row["knn"])
    if script.startswith("hirl"):
        assert ["path" in row for row in rows[1:]] == [False, True, True]  # after the warm-up
        assert rows[1]["clusters_in_use"] is None
        moved = script == "hirl_swav"  # its images change clusters within the epoch, and may leave one empty
        assert all(0 < used <= k and (used == k or moved) for used, k in zip(rows[2]["clusters_in_use"], (12, 4, 2)))
    assert rows[1]["lr"] > rows[2]["lr"] > rows[3]["lr"] > 0


def test_the_last_lines_say_what_was_reached_and_what_is_next(whole):
    _, folder, printed = whole
    assert printed.splitlines()[-1].split() == ["next", "python", "eval_linear.py", "--run", str(folder)]
    trained = next(line for line in printed.splitlines() if line.startswith("trained network"))
    assert [float(x) for x in trained.split()[2:]] == [round(v, 1) for v in log(folder)[-1]["knn"]]


def test_clusters_csv_names_every_picture_and_follows_one_tree(whole, pictures):
    _, folder, _ = whole
    with open(folder / "clusters.csv", newline="") as f:
        header, *rows = csv.reader(f)
    assert header == ["image", "level0", "level1", "level2"]
    assert [row[0] for row in rows] == sorted(
        str(p.relative_to(pictures / "train")) for p in (pictures / "train").rglob("*.png"))
    for lower, upper, clusters in ((1, 2, 12), (2, 3, 4)):
        assert len({row[lower] for row in rows}) == clusters == len({(row[lower], row[upper]) for row in rows})
    picture = Image.open(folder / "tree.png")
    picture.load()
    assert picture.mode == "RGB" and picture.width > 400 and np.asarray(picture).std() > 10


def test_the_backbone_loads_strictly(whole):
    _, folder, _ = whole
    network, width = common.backbone("tiny", "3x3")
    network.load_state_dict(load(folder / "backbone.pt"))
    assert network.eval()(torch.zeros(2, 3, 16, 16)).shape == (2, width)


@pytest.mark.parametrize("script", SCRIPTS)
def test_plain_base_method_and_a_torchvision_backbone(script, pictures, tmp_path):
    """--clusters 0 runs without a tree; ResNet-18's weights load strictly into torchvision's but for fc."""
    argv = arguments(script, pictures, "run", plain=True, epochs=1, arch="resnet18", stem="7x7", eval_every=5)
    run(tmp_path, script, argv)
    assert not (tmp_path / "run/tree.png").exists() and not (tmp_path / "run/clusters.csv").exists()
    assert "path" not in log(tmp_path / "run")[-1] and log(tmp_path / "run")[-1]["knn"]  # the last epoch always
    network = torchvision.models.resnet18()
    missing, unexpected = network.load_state_dict(load(tmp_path / "run/backbone.pt"), strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_preset(script, tmp_path):
    text = run(tmp_path, script, ["--help"]).out
    assert all(word in text for word in ("--clusters", "textures", "imagenet", "--epochs", "python " + script))


def test_the_loop_reads_as_the_papers_say(tmp_path, pictures):
    """hirl_moco's first two epochs once more, in the plainest words: one network call a line, no helper.

    Order matters and no unit test of a loss sees it: the queue of before the step, the key encoder moved before
    it encodes, the tree from its features in evaluation mode, the schedule, one step on the sum.
    """
    argv = arguments("hirl_moco", pictures, tmp_path / "run", epochs=2, base_lr=0.02, projector="mlp")
    run(tmp_path, "hirl_moco", argv)
    args = hirl_moco.parse_args(argv)
    train, _ = common.load_data(args.data)
    torch.manual_seed(0)
    model = hirl_moco.MoCo(hirl_moco.Encoder("tiny", args.stem, args.projector, 128), 128, 32)
    model.heads = nn.ModuleList(hirl_moco.level_head(128) for _ in range(3))
    model.to(memory_format=torch.channels_last)
    trained = [*model.encoder_q.parameters(), *model.heads.parameters()]
    speed = [torch.zeros_like(p) for p in trained]
    augmentation = hirl_moco.AUGMENTATIONS["cifar"]._replace(size=16)
    for epoch in (0, 1):
        sums = {"moco": 0.0, "path": 0.0}
        if epoch == 1:
            x = F.normalize(common.extract_features(model.encoder_k, train, 16), dim=1)
            tree = common.hierarchical_kmeans(x, [12, 4, 2], temperature=0.2, seed=1)
        for step, index, (a, b) in common.batches(train, 16, [augmentation] * 2, seed=0, epoch=epoch):
            lr = 0.02 * 16 / 256 * 0.5 * (1 + np.cos(np.pi * (6 * epoch + step) / 12))
            raw = model.encoder_q(a)
            for p_k, p_q in zip(model.encoder_k.parameters(), model.encoder_q.parameters()):
                p_k.data = args.ema_momentum * p_k.data + (1 - args.ema_momentum) * p_q.data
            key = F.normalize(model.encoder_k(b), dim=1)
            terms = {"moco": hirl_moco.info_nce(F.normalize(raw, dim=1), key, model.queue, 0.2)}
            if epoch == 1:
                z = torch.stack([F.normalize(head(raw), dim=1) for head in model.heads], 1)
                draw = common.random_state(0, epoch, step, "negative paths")
                leaves = torch.randint(12, (16, 20), generator=draw)
                terms["path"] = common.semantic_path_loss(z, tree, index, leaves)
            gradients = torch.autograd.grad(sum(terms.values()), trained, allow_unused=True)
            for p, v, g in zip(trained, speed, gradients):
                if g is not None:  # SGD with momentum and weight decay
                    v.mul_(0.9).add_(g + args.weight_decay * p.data)
                    p.data -= lr * v
            model.queue = torch.cat([model.queue[16:], key.detach()])  # the oldest half leaves
            for name, value in terms.items():
                sums[name] += value.item() / STEPS
        row = log(tmp_path / "run")[epoch + 1]
        for name in losses(row):
            assert_close(row[name], sums[name], rtol=1e-4, atol=0)


LARS = dict(optimizer="lars", lr_warmup=0.25, base_lr=10)


def test_simclr_loop_reads_as_described(tmp_path, pictures):
    """hirl_simclr's first two epochs in the plainest words: LARS, a learning rate that warms up, view 0's path."""
    argv = arguments("hirl_simclr", pictures, tmp_path / "run", epochs=2, temperature=0.3, weight_decay=0.1,
                     **LARS)
    run(tmp_path, "hirl_simclr", argv)
    args = hirl_simclr.parse_args(argv)
    train, _ = common.load_data(args.data)
    torch.manual_seed(0)
    encoder = hirl_simclr.Encoder("tiny", args.stem, args.projector, 128).to(memory_format=torch.channels_last)
    heads = nn.ModuleList(hirl_simclr.level_head(128) for _ in range(3))
    optimizer = hirl_simclr.LARS([*encoder.parameters(), *heads.parameters()], 0.0, weight_decay=0.1)
    augmentation = hirl_simclr.AUGMENTATIONS["cifar"]._replace(size=16)
    for epoch in (0, 1):
        sums = {"simclr": 0.0, "path": 0.0}
        if epoch == 1:
            x = F.normalize(common.extract_features(encoder, train, 16), dim=1)
            tree = common.hierarchical_kmeans(x, [12, 4, 2], temperature=args.temperature, seed=1)
        for step, index, (a, b) in common.batches(train, 16, [augmentation] * 2, seed=0, epoch=epoch):
            past = 6 * epoch + step  # of 12 steps, the first 3 warm up
            rate = past / 3 if past < 3 else 0.5 * (1 + np.cos(np.pi * (past - 3) / 9))
            optimizer.param_groups[0]["lr"] = 10 * 16 / 256 * rate
            raw = encoder(torch.cat([a, b]))
            z = F.normalize(raw, dim=1)
            terms = {"simclr": hirl_simclr.nt_xent(z[:16], z[16:], args.temperature)}
            if epoch == 1:
                level = torch.stack([F.normalize(head(raw[:16]), dim=1) for head in heads], 1)
                draw = common.random_state(0, epoch, step, "negative paths")
                leaves = torch.randint(12, (16, 20), generator=draw)
                terms["path"] = common.semantic_path_loss(level, tree, index, leaves)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            for name, value in terms.items():
                sums[name] += value.item() / STEPS
        row = log(tmp_path / "run")[epoch + 1]
        for name in losses(row):
            assert_close(row[name], sums[name], rtol=3e-3, atol=0)  # rounding, magnified step by step
    for name, weight in load(tmp_path / "run/backbone.pt").items():
        assert_close(weight, encoder.backbone.state_dict()[name], rtol=1e-3, atol=1e-5)


def test_the_loop_of_csml_reads_as_the_paper_says(tmp_path, pictures):
    """csml's first three epochs once more in plain words: which view is whose, two layers, a table every second epoch.

    Neighbours of the key trunk's features; queries of the image, the neighbour, the image with a box of the neighbour
    in it; the warm-up's weights; the image's key alone in a queue for each layer.
    """
    argv = arguments("csml", pictures, tmp_path / "run", level_weights="0 0 0.5 1", neighbour_weight=0.4, base_lr=0.02)
    run(tmp_path, "csml", argv)
    args = csml.parse_args(argv)
    train, _ = common.load_data(args.data)
    torch.manual_seed(0)
    model = csml.MoCo(csml.StageEncoder(csml.Encoder("tiny", "3x3", "mlp-bn", 128), [3, 4], "mlp-bn", 128), 256, 32)
    model.to(memory_format=torch.channels_last)
    queue = {3: F.normalize(model.queue[:, :128], dim=1), 4: F.normalize(model.queue[:, 128:], dim=1)}
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), 1.0, momentum=0.9, weight_decay=args.weight_decay)
    augmentation = csml.AUGMENTATIONS["cifar"]._replace(size=16)
    for epoch in range(EPOCHS):
        sums = {}
        if epoch in (0, 2):
            x = F.normalize(common.extract_features(model.encoder_k.backbone, train, 16), dim=1)
            table = (x @ x.T).fill_diagonal_(-2).topk(4).indices  # (N, 4)
            kind = train.labels[:, None]
            same = (100 * (kind == train.labels[table]).double().mean(dim=(0, 1))).tolist()

        def neighbour(epoch, step, index):
            draw = torch.randint(4, (16,), generator=common.random_state(0, epoch, step, "neighbour"))
            return table[index, draw]

        train.partner = neighbour
        for step, _, (q, k, n, k_n) in common.batches(train, 16, [augmentation] * 2, seed=0, epoch=epoch):
            m, lam = csml.cutmix(q, n, common.random_state(0, epoch, step, "cutmix"))
            raw = model.encoder_q(torch.cat([q, n, m]))  # (48, 2, 128)
            for p_k, p_q in zip(model.encoder_k.parameters(), model.encoder_q.parameters()):
                p_k.data = args.ema_momentum * p_k.data + (1 - args.ema_momentum) * p_q.data
            raw_k = model.encoder_k(torch.cat([k, k_n]))
            a, b = (1, 0) if epoch == 0 else (0.6, 0.4)
            terms = {}
            for place, (layer, weight) in enumerate(((3, 0.5), (4, 1))):
                q, n, m = F.normalize(raw[:, place], dim=1).split(16)
                k, k_n = F.normalize(raw_k[:, place], dim=1).detach().split(16)

                def nce(query, key):
                    return weight / 3 * csml.info_nce(query, key, queue[layer], 0.2)

                name = "_layer3" if layer == 3 else ""
                terms["image" + name] = a * nce(q, k) + b * nce(q, k_n)
                terms["neighbour" + name] = b * nce(n, k) + a * nce(n, k_n)
                terms["mix" + name] = lam * nce(m, k) + (1 - lam) * nce(m, k_n)
                queue[layer] = torch.cat([queue[layer][16:], k])  # the oldest half leaves
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * 16 / 256 * 0.5 * (1 + np.cos(np.pi * (6 * epoch + step) / 18))
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item() / STEPS
        row = log(tmp_path / "run")[epoch + 1]
        assert losses(row).keys() == sums.keys()
        for name, value in sums.items():
            assert_close(row[name], value, rtol=1e-3, atol=0)
        if epoch in (0, 2):
            assert_close(row["neighbours_same_label"], same, rtol=0, atol=1.0 if epoch else 0.01)
        else:
            assert "neighbours_same_label" not in row


def test_csml_without_neighbours_is_moco_bit_for_bit(pictures, tmp_path):
    """--neighbours 0: the losses, the backbone and the queue of hirl_moco.py --clusters 0 with equal settings."""
    own = dict(queue_size=32, clusters=0, base_lr=0.02)
    run(tmp_path, "csml", arguments("csml", pictures, "csml", neighbours=0, **own))
    run(tmp_path, "hirl_moco", arguments("hirl_moco", pictures, "moco", **own))
    ours, moco = log(tmp_path / "csml"), log(tmp_path / "moco")
    assert len(ours) == len(moco) == EPOCHS + 1 and all(row["moco"] > 0 for row in moco[1:])
    for a, b in zip(ours, moco):
        assert {k: v for k, v in a.items() if k not in TIMINGS} == {k: v for k, v in b.items() if k not in TIMINGS}
    assert same(load(tmp_path / "csml/backbone.pt"), load(tmp_path / "moco/backbone.pt"))
    assert same(*(load(tmp_path / name / "checkpoint.pt")["model"]["queue"] for name in ("csml", "moco")))


def test_csml_resumes_with_the_table_it_had(pictures, tmp_path):
    """Until the next search the checkpoint's neighbours stay, here others than a search would find."""
    argv = arguments("csml", pictures, tmp_path / "run", refresh_every=3)
    run(tmp_path, "csml", argv, code=143, stop_at=(2, signal.SIGTERM))  # in the epoch that began with a search
    path = tmp_path / "run/checkpoint.pt"
    state = load(path)
    table = state["model"]["neighbours"]
    assert table.shape == (IMAGES, 4) and not (table == torch.arange(IMAGES)[:, None]).any()
    assert all(len(set(row)) == 4 for row in table.tolist()) and 0 <= table.min() and table.max() < IMAGES
    state["model"]["neighbours"] = other = (table + 1) % IMAGES
    torch.save(state, path)
    run(tmp_path, "csml", argv + ["--resume"])
    assert torch.equal(load(path)["model"]["neighbours"], other)


def test_the_swav_loop_reads_as_the_papers_say(tmp_path, pictures):
    """hirl_swav's first two epochs once more, in the plainest words, as above for hirl_moco.

    Prototypes renormalised before the scores and frozen for three steps, the queue of before the step and only when
    it is full, the schedule with its warm-up, the batch moved in the tree by its second crop before the path loss.
    """
    argv = arguments("hirl_swav", pictures, tmp_path / "run", epochs=2, base_lr=0.3, final_lr=0.02)
    run(tmp_path, "hirl_swav", argv)
    args = hirl_swav.parse_args(argv)
    train, _ = common.load_data(args.data)
    torch.manual_seed(0)
    model = hirl_swav.SwAV(hirl_swav.Encoder("tiny", args.stem, args.projector, 128), 128, 24, 32)
    model.heads = nn.ModuleList(hirl_swav.level_head(128) for _ in range(3))
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.9, weight_decay=args.weight_decay)
    view = hirl_swav.AUGMENTATIONS["cifar"]._replace(size=16)
    small = view._replace(size=8, scale=hirl_swav.LOCAL_SCALE["cifar"])
    past = []  # z of both global crops, a step each
    for epoch in (0, 1):
        sums = {"swav": 0.0, "path": 0.0}
        if epoch == 1:
            x = F.normalize(common.extract_features(model.encoder, train, 16), dim=1)
            tree = common.hierarchical_kmeans(x, [12, 4, 2], temperature=0.1, seed=1)
        for step, index, crops in common.batches(train, 16, [view, view, small, small], seed=0, epoch=epoch):
            done = (6 * epoch + step) / 12
            rate = done / 0.2 * 0.3 if done < 0.2 else 0.02 + 0.14 * (1 + np.cos(np.pi * (done - 0.2) / 0.8))
            optimizer.param_groups[0]["lr"] = rate * 16 / 256
            trunk = model.encoder.backbone
            raw = model.encoder.projector(torch.cat([trunk(torch.cat(crops[:2])), trunk(torch.cat(crops[2:]))]))
            z = F.normalize(raw, dim=1).split(16)
            model.swav_prototypes.data = F.normalize(model.swav_prototypes.data, dim=1)
            c, assigned = model.swav_prototypes, []
            for crop in (0, 1):
                before = [zs[crop] for zs in past[-2:]] if len(past) >= 2 else []
                assigned.append(hirl_swav.sinkhorn(torch.cat([z[crop], *before]).detach() @ c.detach().T,
                                                   args.epsilon)[:16])
            pairs = [(i, v) for i in (0, 1) for v in range(4) if v != i]
            terms = {"swav": sum(F.cross_entropy(z[v] @ c.T / 0.1, assigned[i]) for i, v in pairs) / 6}
            if epoch == 1:
                leaf = (z[1] @ tree.prototypes[0].T).argmax(1)
                for level, node in enumerate((leaf, tree.parent[0][leaf], tree.parent[1][tree.parent[0][leaf]])):
                    tree.assign[level][index] = node
                heads = torch.stack([F.normalize(head(raw[:16]), dim=1) for head in model.heads], 1)
                leaves = torch.randint(12, (16, 20), generator=common.random_state(0, epoch, step, "negative paths"))
                terms["path"] = common.semantic_path_loss(heads, tree, index, leaves)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            if 6 * epoch + step < 3:
                model.swav_prototypes.grad = None
            optimizer.step()
            past.append([z[0].detach(), z[1].detach()])
            for name, value in terms.items():
                sums[name] += value.item() / STEPS
        row = log(tmp_path / "run")[epoch + 1]
        assert row["lr"] == pytest.approx(rate * 16 / 256)
        for name in losses(row):
            assert_close(row[name], sums[name], rtol=3e-3, atol=0)  # rounding, magnified step by step
    state = load(tmp_path / "run/checkpoint.pt")
    assert same(state["hierarchy"][1], tree.assign)  # the table as it was moved
    assert_close(state["model"]["queue"], torch.stack([torch.cat([past[-1][i], past[-2][i]]) for i in (0, 1)]),
                 rtol=0, atol=0.01)  # of entries of about 0.09: Sinkhorn magnifies rounding by 1 / epsilon


# ---- stopped and resumed


def compare_runs(folder, other):
    """Two run folders hold the same run, bit for bit, timings aside."""
    assert same(load(folder / "backbone.pt"), load(other / "backbone.pt"))
    assert same(load(folder / "checkpoint.pt"), load(other / "checkpoint.pt"))
    rows = [[{k: v for k, v in row.items() if k not in TIMINGS} for row in log(f)] for f in (folder, other)]
    assert rows[0] == rows[1]
    if (folder / "clusters.csv").exists():
        assert (folder / "clusters.csv").read_text() == (other / "clusters.csv").read_text()


def test_stopped_at_any_step_and_resumed_is_the_same_run(whole, pictures, tmp_path):
    """SIGTERM at step 2 of the warm-up, at the last step of an epoch and under the hierarchy, Ctrl-C at the end.

    One run is stopped four times and resumed four times; between the third and the fourth the disk is full.
    """
    script, undisturbed, _ = whole
    folder, argv = tmp_path / "run", arguments(script, pictures, tmp_path / "run")
    done = 0
    for stop, number in ((2, signal.SIGTERM), (STEPS, signal.SIGTERM), (STEPS + 4, signal.SIGTERM),
                         (3 * STEPS, signal.SIGINT)):
        again = ["--resume"] if done else []
        stopped = run(tmp_path, script, argv + again, code=128 + number, stop_at=(stop - done, number))
        assert "continue with --resume" in stopped.err and stopped.err.count("\n") == 1
        state = load(folder / "checkpoint.pt")
        assert state["epoch"] * STEPS + state["step"] == stop
        done = stop
        if stop == STEPS + 4:
            before = (folder / "checkpoint.pt").read_bytes()
            full = run(tmp_path, script, argv + ["--resume"], code=1, file_limit=100_000)
            assert "cannot save" in full.err and full.err.count("\n") == 1
            assert (folder / "checkpoint.pt").read_bytes() == before and not [*folder.glob("*.tmp")]
    run(tmp_path, script, ["--out", folder, "--resume"])  # nothing but the folder needs to be said
    compare_runs(folder, undisturbed)
    run(tmp_path, script, argv + ["--resume"])  # a finished run may be resumed too
    compare_runs(folder, undisturbed)


def test_lars_stopped_and_resumed_is_the_same_run(pictures, tmp_path):
    """Its momentum is in the checkpoint, and the learning rate goes on warming up where it was."""
    for out, stops in (("whole", ()), ("parts", (2, STEPS + 1))):
        argv, done = arguments("hirl_simclr", pictures, tmp_path / out, epochs=2, **LARS), 0
        for stop in stops:
            again = ["--resume"] if done else []
            run(tmp_path, "hirl_simclr", argv + again, code=143, stop_at=(stop - done, signal.SIGTERM))
            done = stop
        run(tmp_path, "hirl_simclr", argv + (["--resume"] if done else []))
    compare_runs(tmp_path / "parts", tmp_path / "whole")


def test_signals_from_outside_and_kill_9(whole, pictures, tmp_path):
    """Ctrl-C whenever it comes: 130. Then the hardest stop, as soon as an epoch is saved: still the same run."""
    script, undisturbed, _ = whole
    folder, argv = tmp_path / "run", arguments(script, pictures, tmp_path / "run")

    def wait_for(path, played):
        while not path.exists():
            assert played.process.is_alive(), played.finish()
            time.sleep(0.01)

    first = Play(tmp_path, script, argv)
    wait_for(folder / "log.jsonl", first)
    os.kill(first.process.pid, signal.SIGINT)
    assert first.finish() == 130 and (folder / "checkpoint.pt").exists()
    (folder / "checkpoint.pt").unlink()  # as if it had been killed before the first one
    second = Play(tmp_path, script, argv + ["--resume"])
    wait_for(folder / "checkpoint.pt", second)
    second.process.kill()
    assert second.finish() == -signal.SIGKILL
    run(tmp_path, script, argv + ["--resume"])
    compare_runs(folder, undisturbed)


@pytest.mark.parametrize("limit", (2000, 100_000))
def test_full_disk_before_the_first_checkpoint(limit, pictures, tmp_path):
    """One sentence, and nothing half-written remains."""
    script = SCRIPTS[0]
    full = run(tmp_path, script, arguments(script, pictures, "run"), code=1, file_limit=limit)
    assert "cannot" in full.err and full.err.count("\n") == 1, full.err
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "log.jsonl"]


# ---- two processes


def test_torchrun_reproduces_one_process(whole, pictures, tmp_path):
    """Two gloo processes with half the batch each: first epoch's losses to 1e-5, and the same neighbours after."""
    script, undisturbed, _ = whole
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", free_port()]
    argv = arguments(script, pictures, tmp_path / "run")
    done = subprocess.run([*torchrun, ROOT / f"{script}.py", *argv], cwd=tmp_path, capture_output=True, text=True,
                          timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = log(undisturbed), log(tmp_path / "run")
    assert two[0]["knn"] == one[0]["knn"] and len(two) == len(one)
    for name, value in losses(one[1]).items():
        assert_close(two[1][name], value, rtol=1e-5, atol=0)
    for one_row, two_row in zip(one[1:], two[1:]):
        for name, value in losses(one_row).items():
            assert_close(two_row[name], value, rtol=0.05, atol=0)  # rounding grows from step to step
        assert_close(two_row["knn"], one_row["knn"], rtol=0, atol=15.0)
    assert (tmp_path / "run/tree.png").exists()
    assert len((tmp_path / "run/clusters.csv").read_text().splitlines()) == IMAGES + 1
    assert done.stdout.count("epoch 1 ") == 1  # rank 0 alone speaks


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_reproduce_the_hierarchy_losses(script, pictures, tmp_path):
    """The same with the hierarchy from the first epoch on: k-means, parents and drawn paths agree as well."""
    run(tmp_path, script, arguments(script, pictures, "one", epochs=1, warmup_epochs=0))
    two_ranks(tmp_path, script, arguments(script, pictures, "two", epochs=1, warmup_epochs=0))
    one, two = log(tmp_path / "one")[-1], log(tmp_path / "two")[-1]
    assert losses(one).keys() == losses(two).keys() and one["clusters_in_use"] == two["clusters_in_use"]
    for name, value in losses(one).items():
        assert_close(two[name], value, rtol=1e-5, atol=0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_with_another_number_of_processes_is_stated(script, pictures, tmp_path):
    argv = arguments(script, pictures, "run", epochs=2)
    two_ranks(tmp_path, script, argv, code=143, stop_at=(3, signal.SIGTERM))
    resumed = run(tmp_path, script, argv + ["--resume"])
    assert "processes (2 before)" in resumed.out and len(log(tmp_path / "run")) == 3


def test_a_rank_that_dies_ends_the_others(pictures, tmp_path):
    """Within seconds, with a sentence: no hang."""
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    argv = arguments(SCRIPTS[0], pictures, "run", epochs=1)
    ranks = [Play(tmp_path, SCRIPTS[0], argv, environment=dict(shared, RANK=str(r), LOCAL_RANK=str(r)),
                  stop_at=(3, signal.SIGKILL) if r == 1 else None) for r in (0, 1)]
    assert ranks[1].finish() == -signal.SIGKILL
    assert ranks[0].finish(timeout=30) == 1
    assert "another process" in ranks[0].err and "Traceback" not in ranks[0].err


def test_shuffled_batch_norm_trains_in_two_processes(pictures, tmp_path):
    two_ranks(tmp_path, "hirl_moco", arguments("hirl_moco", pictures, "run", epochs=1, bn="shuffle"))
    assert losses(log(tmp_path / "run")[-1])["moco"] > 0


def call_in_rank(function, rank, size, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.save(function(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def in_ranks(function, folder, size=2):
    """[function() of every rank]: the ranks are gloo processes."""
    processes = [fork.Process(target=call_in_rank, args=(function, r, size, folder)) for r in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [load(f"{folder}/{r}.pt") for r in range(size)]


def test_two_processes_move_the_same_images_in_the_tree(pictures, tmp_path):
    """hirl_swav's re-assignment: rank 0's table holds what both ranks saw, and it is no longer that of k-means."""
    how = dict(epochs=1, warmup_epochs=0, optimizer="larc")
    run(tmp_path, "hirl_swav", arguments("hirl_swav", pictures, "one", **how))
    two_ranks(tmp_path, "hirl_swav", arguments("hirl_swav", pictures, "two", **how))
    run(tmp_path, "hirl_swav", arguments("hirl_swav", pictures, "still", **how) + ["--no-reassign"])
    one, two, still = (load(tmp_path / name / "checkpoint.pt")["hierarchy"][1] for name in ("one", "two", "still"))
    for level in range(3):
        assert torch.equal(one[level], two[level])
    assert (one[0] != still[0]).double().mean() > 0.2
    assert log(tmp_path / "still")[-1]["clusters_in_use"] == [12, 4, 2]


def sinkhorn_of_my_rows():
    scores = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return hirl_swav.sinkhorn(scores[common.local_rows(7)], 0.3)


def test_sinkhorn_of_three_processes_is_that_of_one(tmp_path):
    """Two, two and three rows."""
    assert_close(torch.cat(in_ranks(sinkhorn_of_my_rows, tmp_path, size=3)), sinkhorn_of_my_rows())


def use_collectives():
    rank, size = common.world()
    rows = torch.arange(10.0).view(5, 2)[:3 - rank] + 100 * rank  # 3, 2 and 1 rows
    single = nn.Linear(2, 1)
    for p in single.parameters():
        p.grad = torch.full_like(p, 1.0 + rank)
    common.average_gradients(single.parameters())
    mine = common.local_rows(7)
    keys = hirl_moco.shuffled_batch_norm(lambda x: 2 * x, torch.arange(4.0).view(2, 2) + 10 * rank,
                                         torch.Generator().manual_seed(5))
    gather = common.all_gather_rows
    return dict(rows=gather(rows), none=gather(rows[:0]), only_first=gather(rows if rank == 0 else rows[:0]),
                sum=common.all_reduce_sum(rows[:1].clone()), largest=common.max_over_ranks(10 - rank),
                grad=single.weight.grad, slice=[mine.start, mine.stop], keys=keys)


def test_collectives(tmp_path):
    ranks = in_ranks(use_collectives, tmp_path, size=3)
    everyone = torch.cat([torch.arange(10.0).view(5, 2)[:3 - rank] + 100 * rank for rank in range(3)])
    for rank, found in enumerate(ranks):
        assert torch.equal(found["rows"], everyone) and found["none"].shape == (0, 2)
        assert torch.equal(found["only_first"], everyone[:3])
        assert torch.equal(found["sum"], torch.tensor([[300.0, 303.0]])) and found["largest"] == 10
        assert torch.equal(found["grad"], torch.full((1, 2), 2.0))  # the mean of 1, 2, 3
        assert torch.equal(found["keys"], 2 * (torch.arange(4.0).view(2, 2) + 10 * rank))  # shuffled and back
    assert [found["slice"] for found in ranks] == [[0, 2], [2, 4], [4, 7]]  # they cover 7 rows without overlap


def test_collectives_of_one_process_do_nothing():
    x = torch.arange(6.0).view(3, 2)
    assert common.all_gather_rows(x) is x and common.all_reduce_sum(x) is x and common.max_over_ranks(4) == 4
    assert common.world() == (0, 1) and common.local_rows(7) == slice(0, 7)
    common.barrier()


def norm_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5),
                         nn.BatchNorm1d(5, momentum=0.3)).double()


def train_norm_network():
    """Three steps of this rank's half of the batch: outputs, input gradients, averaged gradients, statistics."""
    network = common.sync_batch_norm(norm_network())
    x = torch.randn(3, 8, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = torch.randn(8, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mine, outputs, gradients = common.local_rows(8), [], []
    for step in range(3):
        network.zero_grad()
        own = x[step, mine].clone().requires_grad_()
        y = network(own)
        (y * weight[mine]).sum(1).mean().backward()
        common.average_gradients(network.parameters())
        outputs.append(y.detach())
        gradients.append(own.grad / common.world()[1])
    network.eval()
    return dict(outputs=torch.stack(outputs), inputs=torch.stack(gradients), state=network.state_dict(),
                grads=[p.grad for p in network.parameters()], eval=network(x[0, mine]).detach())


def frozen_after_synchronising():
    network = common.sync_batch_norm(norm_network().requires_grad_(False).eval())
    assert any(isinstance(child, common.SyncBatchNorm) for child in network)
    return [p.requires_grad for p in network.parameters()] + [child.training for child in network]


def test_sync_batch_norm_keeps_a_frozen_network_frozen(tmp_path):
    """The key encoder's parameters must not come back to life, and into the optimizer, by the replacement."""
    assert not any(in_ranks(frozen_after_synchronising, tmp_path)[0])


def test_sync_batch_norm_on_two_ranks_equals_batch_norm_on_one(tmp_path):
    one, (first, second) = train_norm_network(), in_ranks(train_norm_network, tmp_path)
    for name, dim in (("outputs", 1), ("inputs", 1), ("eval", 0)):
        assert_close(torch.cat([first[name], second[name]], dim), one[name])
    for rank in (first, second):
        assert_close(rank["grads"], one["grads"])
        assert_close(dict(rank["state"]), dict(one["state"]))  # running statistics and their counter too


# ---- one method's own


def test_plain_runs_of_the_moco_scripts_are_one_run(pictures, tmp_path):
    """Without its hierarchy every script on MoCo's blocks is MoCo v2: the same losses, to the last bit."""
    rows = {}
    for script in ("hcsc", "hirl_moco"):
        run(tmp_path, script, arguments(script, pictures, script, plain=True, epochs=2))
        rows[script] = [{name: value for name, value in row.items() if name not in TIMINGS}
                        for row in log(tmp_path / script)]
    assert len(rows) > 1
    for script, its in rows.items():
        assert its == rows["hirl_moco"], script


@pytest.mark.parametrize("switch", ("--release --multi-crop --local-selection", "--multi-crop --no-instance-selection",
                                    "--release --no-prototype-selection"))
def test_hcsc_switches(switch, pictures, tmp_path):
    """The terms that a switch brings or takes away, and what it leaves out."""
    argv = [*arguments("hcsc", pictures, "run", epochs=2), *switch.split()]
    run(tmp_path, "hcsc", argv)
    before, after = log(tmp_path / "run")[1:]
    assert "moco" in before and "moco" not in after and {"instance", "prototype"} <= after.keys()
    assert ("instance_local" in after) == ("prototype_local" in after) == ("--multi-crop" in switch)
    dropped = [after.get(f"dropped_{level}") for level in range(3)]
    assert dropped == [None] * 3 if "no-instance" in switch else dropped[0] < dropped[1] < dropped[2] < 1
    dropped = [after.get(f"dropped_prototypes_{level}") for level in range(2)]
    assert dropped == [0, 0] if "no-prototype" in switch else 0 < dropped[0] < dropped[1] < 1
def simclr_gradients():
    """NT-Xent of this rank's share of 12 images through a network with batch norm: loss and averaged gradients."""
    torch.manual_seed(0)
    network = common.sync_batch_norm(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 4))).double()
    x = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    views = x[:, common.local_rows(12)].flatten(0, 1)
    z1, z2 = F.normalize(network(views), dim=1).chunk(2)
    loss = hirl_simclr.nt_xent(*map(common.all_gather_rows_with_grad, (z1, z2)), 0.2)
    loss.backward()
    common.average_gradients(network.parameters())
    return dict(loss=loss.detach(), grads=[p.grad for p in network.parameters()])


@pytest.mark.parametrize("size", (2, 3))
def test_negatives_of_all_processes_and_their_gradients(size, tmp_path):
    """The batch shared by two or three processes: the loss and the gradients of one."""
    one = simclr_gradients()
    for rank in in_ranks(simclr_gradients, tmp_path, size):
        assert_close(rank["loss"], one["loss"])
        assert_close(rank["grads"], one["grads"])


def gather_with_gradient():
    """Each rank weighs the gathered rows in its own way; then the ranks hold different numbers of rows."""
    rank, size = common.world()
    rows = (torch.arange(4.0).view(2, 2) + 10 * rank).requires_grad_()
    everyone = common.all_gather_rows_with_grad(rows)
    (everyone.T * torch.arange(1.0, 2 * size + 1) * 10**rank).sum().backward()  # a transposed gradient as well
    unequal = torch.ones(1 + rank, 2, requires_grad=True)
    try:
        common.all_gather_rows_with_grad(unequal).sum().backward()
        refused = False
    except RuntimeError:
        refused = True
    return dict(rows=everyone.detach(), grad=rows.grad, refused=refused)


def test_gathered_rows_send_their_gradients_home(tmp_path):
    for rank, found in enumerate(in_ranks(gather_with_gradient, tmp_path)):
        assert torch.equal(found["rows"], torch.tensor([[0.0, 1], [2, 3], [10, 11], [12, 13]]))
        weight = torch.tensor([1.0, 2]) + 2 * rank  # of its rows, from rank 0 once and from rank 1 ten times
        assert torch.equal(found["grad"], 11 * weight[:, None].expand(2, 2))
    x = torch.ones(2, 2, requires_grad=True)
    assert common.all_gather_rows_with_grad(x) is x  # one process: nothing happens


# ---- faults: one sentence, the right exit code, nothing written

FAULTS = {  # name: (arguments after the usual ones, words the sentence must hold)
    "missing folder": ("--data no/such", "no/such does not exist"),
    "empty folder": ("--data {tmp}/empty", "no pictures"),
    "file for a folder": ("--data {tmp}/file.png", "is a file"),
    "clusters above images": ("--clusters 97 4", "97 96 pictures"),
    "clusters not falling": ("--clusters 4 12", "4 12 fall"),
    "clusters equal": ("--clusters 4 4", "fall"),
    "clusters negative": ("--clusters -3", "-3 positive"),
    "batch above images": ("--batch-size 97", "--batch-size 97 96"),
    "batch of one": ("--batch-size 1", "--batch-size 2"),
    "no GPU": ("--device cuda", "--device cuda cpu"),
    "no such device": ("--device abacus", "--device abacus cpu"),
    "unknown architecture": ("--arch resnet19", "--arch resnet19"),
    "architecture without fc": ("--arch vgg11", "--arch vgg11"),
    "unknown flag": ("--batchsize 16", "--batchsize"),
    "abbreviated flag": ("--epoch 16", "--epoch"),
    "no number": ("--epochs many", "--epochs many"),
    "zero epochs": ("--epochs 0", "--epochs 0"),
    "learning rate not finite": ("--base-lr nan", "--base-lr nan"),
    "nothing to resume": ("--resume", "no run"),
    "folder below a file": ("--out {tmp}/file.png/run", "--out"),
    "run folder is a file": ("--out {tmp}/file.png", "exists"),
}


def refused(folder, script, argv, words, code=2):
    """The script ends with `code`, one line on stderr that holds the words, and writes nothing."""
    before = sorted(folder.rglob("*"))
    played = run(folder, script, argv, code=code)
    assert played.err.count("\n") == 1 and played.err.startswith(f"{script}.py: "), played.err
    for word in words.split():
        assert word in played.err, f"'{word}' is not in: {played.err}"
    assert sorted(folder.rglob("*")) == before, "something was written"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_command_line(script, fault, pictures, tmp_path):
    extra, words = FAULTS[fault]
    if fault == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.png").write_bytes(b"x")
    refused(tmp_path, script, arguments(script, pictures, "run") + extra.format(tmp=tmp_path).split(), words)


@pytest.mark.parametrize("script", QUEUED)
def test_queue_above_images(script, pictures, tmp_path):
    refused(tmp_path, script, arguments(script, pictures, "run", queue_size=97), "--queue-size 97 96")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folder_without_permission(copied, tmp_path):
    root, paths = copied
    paths[0].parent.chmod(0)
    try:
        refused(tmp_path, SCRIPTS[0], arguments(SCRIPTS[0], root, "run"), f"{paths[0].parent.name} permission")
    finally:
        paths[0].parent.chmod(0o755)


@pytest.mark.parametrize("extra, words", (
    ("--neighbours 96", "--neighbours 96 95 other pictures"), ("--neighbours -1", "--neighbours -1"),
    ("--refresh-every 0", "--refresh-every"), ("--neighbour-weight 1.5", "--neighbour-weight 1.5 most"),
    ("--level-weights 0 0 1 0", "--level-weights last"), ("--level-weights 1 1", "--level-weights 4")))
def test_faults_of_csml(extra, words, pictures, tmp_path):
    refused(tmp_path, "csml", arguments("csml", pictures, "run") + extra.split(), words)


def test_a_preset_takes_fewer_neighbours_where_there_are_fewer_pictures(tmp_path):
    make_pictures(tmp_path / "few", 4, seed=0)
    argv = "--data few --out run --clusters 0 --device cpu --epochs 1 --arch tiny --image-size 16 --preset textures"
    played = run(tmp_path, "csml", argv.split())
    assert "--neighbours reduced from the preset's 5 to 3, the other pictures there are" in played.out
    assert load(tmp_path / "run/checkpoint.pt")["model"]["neighbours"].shape == (4, 3)


def test_an_existing_run_is_never_overwritten(whole, pictures):
    script, folder, _ = whole
    refused(folder.parent, script, arguments(script, pictures, folder), "exists --resume --out")


def test_resume_with_other_arguments_is_refused(whole, pictures):
    script, folder, _ = whole
    for name, value in (("base_lr", 0.07), ("clusters", "10 4 2"), ("seed", 1)):
        flag = "--" + name.replace("_", "-")
        argv = arguments(script, pictures, folder, **{name: value}) + ["--resume"]
        refused(folder.parent, script, argv, f"{flag} --out")


def test_resume_by_another_script_is_refused(whole):
    script, folder, _ = whole
    for other in SCRIPTS:
        if other != script:
            refused(folder.parent, other, ["--out", folder, "--resume"], f"{script} --out")


@pytest.mark.parametrize("content", ("", "[]", '{"arguments": 1}', '{"derived": {}}'))
def test_resume_from_a_broken_config(content, pictures, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    refused(tmp_path, SCRIPTS[0], arguments(SCRIPTS[0], pictures, "run") + ["--resume"], "config.json --out")


def stopped_run(script, data, tmp_path):
    """A run that was stopped in its second step."""
    run(tmp_path, script, arguments(script, data, tmp_path / "run"), code=143, stop_at=(2, signal.SIGTERM))
    return tmp_path / "run" / "checkpoint.pt"


class Bomb:
    """Unpickling this creates the file `executed`."""

    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_from_what_is_no_checkpoint(script, copied, tmp_path):
    """Truncated, empty, malicious, foreign: one sentence, and nothing in the file is ever executed."""
    root, _ = copied
    path = stopped_run(script, root, tmp_path)
    good = path.read_bytes()
    again = arguments(script, root, tmp_path / "run") + ["--resume"]
    for bad in (good[:len(good) // 2], b"", pickle.dumps(Bomb()), pickle.dumps({"model": 1})):
        path.write_bytes(bad)
        refused(tmp_path, script, again, "checkpoint.pt")
        assert not (tmp_path / "executed").exists()
    torch.save({"model": Bomb()}, path)
    refused(tmp_path, script, again, "checkpoint.pt")
    assert not (tmp_path / "executed").exists()
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, path)  # a good file of somebody else
    refused(tmp_path, script, again, "checkpoint.pt")
    path.write_bytes(good)
    state = load(path)
    state["model"].popitem()
    torch.save(state, path)  # a checkpoint of another network
    refused(tmp_path, script, again, "checkpoint.pt")


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_on_other_data_is_refused(script, copied, tmp_path):
    root, paths = copied
    stopped_run(script, root, tmp_path)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(paths[5])  # same name, another picture
    again = arguments(script, root, tmp_path / "run") + ["--resume"]
    refused(tmp_path, script, again, "other data --out")
    paths[5].unlink()
    refused(tmp_path, script, again, "other data --out")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("batch_size", (BATCH, IMAGES))
def test_a_loss_that_is_not_finite_stops_the_run(script, batch_size, pictures, tmp_path):
    """Also where an epoch is one step, whose loss is finite but whose update is not: no bad checkpoint is left."""
    argv = arguments(script, pictures, tmp_path / "run", base_lr=1e30, batch_size=batch_size)
    played = run(tmp_path, script, argv, code=1)
    assert re.search("at step|after the last step", played.err) and played.err.count("\n") == 1, played.err
    assert any(word in played.err for word in ("= nan", "= inf"))
    checkpoint = tmp_path / "run/checkpoint.pt"
    if checkpoint.exists():
        assert all(value.isfinite().all() for value in load(checkpoint)["model"].values())


# ---- folders as people have them


def save_in_mode(pixels, mode, path):
    """Write an RGB array under another mode; path without ending."""
    picture = Image.fromarray(pixels)
    if mode == "CMYK":
        picture.convert("CMYK").save(path.with_suffix(".jpeg"))
    elif mode == "I;16":
        gray = np.asarray(picture.convert("L")).astype(np.uint16) * 257
        Image.fromarray(gray).save(path.with_suffix(".png"))
    elif mode == "P":
        picture.convert("P", palette=Image.Palette.ADAPTIVE).save(path.with_suffix(".png"))
    else:
        picture.convert(mode).save(path.with_suffix(".png"))


MODES = ("L", "LA", "RGB", "RGBA", "P", "CMYK", "I;16", "1")


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_any_mode_are_decoded_to_rgb(mode, tmp_path):
    """Two halves, dark and light; what a mode can hold must come back, in (3, H, W) bytes."""
    pixels = np.zeros((6, 10, 3), np.uint8)
    pixels[:, 5:] = 255 if mode == "1" else (200, 60, 120)
    save_in_mode(pixels, mode, tmp_path / "x")
    found = common.decode(next(tmp_path.iterdir()))
    assert found.shape == (3, 6, 10) and found.dtype == torch.uint8
    gray = np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    expected = gray if mode in ("L", "LA", "I;16") else pixels
    error = found.permute(1, 2, 0).numpy().astype(int) - expected
    assert abs(error).max() <= (40 if mode == "CMYK" else 0)  # JPEG loses a little


def test_16_bits_are_scaled_not_clipped(tmp_path):
    """0, 257, 514, ... 65535 are the 16-bit names of 0, 1, 2, ... 255."""
    values = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "x.png")
    expected = torch.arange(256).view(16, 16).expand(3, 16, 16)
    assert torch.equal(common.decode(tmp_path / "x.png").long(), expected)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_flat_folder_of_mixed_sizes_and_modes(script, tmp_path):
    """No labels, no one size, eight modes, one file truncated: named once, and the tree is drawn."""
    generator = np.random.default_rng(0)
    (tmp_path / "flat").mkdir()
    for i in range(48):
        pixels = painted(generator, i % 6, size=17 + i % 5)[:, : 14 + i % 7]
        save_in_mode(np.ascontiguousarray(pixels), MODES[i % 8], tmp_path / "flat" / f"{i:02d}")
    (tmp_path / "flat" / "notes.txt").write_text("no picture")
    truncate(tmp_path / "flat" / "10.png")
    (tmp_path / "flat" / "12.png").rename(tmp_path / "flat" / '12 "so, so".png')
    argv = arguments(script, "flat", "run", epochs=1, warmup_epochs=0, clusters="6 2", workers=1, batch_size=8)
    played = run(tmp_path, script, argv)
    assert played.err.count("\n") == 1 and "10.png" in played.err and "neighbour" in played.err, played.err
    assert (tmp_path / "run/tree.png").exists() and "no labels" in played.out
    with open(tmp_path / "run/clusters.csv", newline="") as f:
        names = [row[0] for row in csv.reader(f)]
    assert len(names) == 49 and names[13] == '12 "so, so".png'
    assert [row["knn"] for row in log(tmp_path / "run")] == [None] * 2
    assert log(tmp_path / "run")[-1]["unreadable"] == 1


@pytest.mark.parametrize("partner", (None, lambda epoch, step, index: (index * 7 + step + epoch) % 40))
def test_decoded_on_demand_equals_in_memory(partner, tmp_path):
    """The worker's crops and the device's: the same boxes, so about the same views, and the same order."""
    make_pictures(tmp_path / "same", 40, seed=3)
    inside, _ = common.load_data(str(tmp_path / "same"))
    outside = common.Images(inside.names, inside.labels, inside.class_names,
                            paths=[tmp_path / "same" / name for name in inside.names])
    inside.partner = outside.partner = partner
    view = common.Augmentation(size=16, scale=(0.5, 1.0))
    pairs = zip(common.batches(inside, 8, [view] * 2, seed=0, epoch=1, start=2),
                common.batches(outside, 8, [view] * 2, seed=0, epoch=1, start=2), strict=True)
    for (step, index, views), (other_step, other_index, other_views) in pairs:
        assert step == other_step >= 2 and torch.equal(index, other_index)
        assert len(views) == len(other_views) == (4 if partner else 2)
        for a, b in zip(views, other_views):
            assert (a - b).abs().mean() < 0.05  # bytes are rounded between crop and colour
    a, b = (common.extract_features(nn.Flatten(), images, 16) for images in (inside, outside))
    assert_close(a, b, rtol=0, atol=1e-4)


def test_the_views_of_partners_follow_and_leave_the_own_as_they_are(pictures):
    """Whole pictures, no chance: the third view is the partner's picture. With chance: the first two do not change."""
    train, _ = common.load_data(str(pictures))
    still = common.Augmentation(size=16, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0, jitter_p=0, gray_p=0)
    view = common.Augmentation(size=16)
    alone = [views for _, _, views in common.batches(train, BATCH, [view] * 2, seed=0, epoch=1)]
    train.partner = lambda epoch, step, index: (index + 1 + step) % IMAGES
    for step, index, (own, other) in common.batches(train, BATCH, [still], seed=0, epoch=1):
        assert_close(own, common.normalize_pixels(train.pixels[index].float() / 255))
        assert_close(other, common.normalize_pixels(train.pixels[(index + 1 + step) % IMAGES].float() / 255))
    for (a, b), (_, _, views) in zip(alone, common.batches(train, BATCH, [view] * 2, seed=0, epoch=1), strict=True):
        assert torch.equal(a, views[0]) and torch.equal(b, views[1]) and not torch.equal(views[0], views[2])


def neighbours_of_uneven_shares():
    """A rank's rows are 700, 0 and 1300 of 2000; some of them are doubles of others' rows."""
    x = F.normalize(torch.randn(2000, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    x[1500:1600] = x[:100]
    share = (slice(0, 700), slice(700, 700), slice(700, 2000))[common.world()[0]]
    refusal = ""
    try:
        common.nearest_neighbours(x[share].where(torch.tensor(common.world()[0] != 2), math.nan), 3)
    except ValueError as error:
        refusal = str(error)
    return dict(x=x, found=common.nearest_neighbours(x[share], 5), refusal=refusal)


def test_nearest_neighbours_over_ranks(tmp_path):
    ranks = in_ranks(neighbours_of_uneven_shares, tmp_path, size=3)
    assert [len(rank["found"]) for rank in ranks] == [700, 0, 1300]
    one = common.nearest_neighbours(ranks[0]["x"], 5)
    assert torch.equal(torch.cat([rank["found"] for rank in ranks]), one)
    assert (one[:100, 0] == torch.arange(1500, 1600)).all()
    assert all("1300 of 2000" in rank["refusal"] for rank in ranks)  # all learn of it, none waits for another


def test_one_unreadable_picture_is_replaced_by_its_neighbour(copied, tmp_path):
    """Named once, its index replaced as well as its pixels, counted in the log."""
    root, paths = copied
    truncate(paths[7])
    script = SCRIPTS[0]
    played = run(tmp_path, script, arguments(script, root, "run", epochs=1))
    assert played.err.count(paths[7].name) == 1 and played.err.count("\n") == 1
    assert log(tmp_path / "run")[-1]["unreadable"] == 1
    train, _ = common.load_data(str(root))
    assert train.index_of.tolist() == [*range(7), 8, *range(8, IMAGES)]
    assert torch.equal(train.pixels[7], train.pixels[8])
    seen = torch.cat([index for _, index, _ in common.batches(train, 16, [common.Augmentation(size=16)], seed=0,
                                                              epoch=0)])
    assert 7 not in seen and (seen == 8).sum() == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_many_unreadable_pictures_stop_the_run(script, copied, tmp_path):
    root, paths = copied
    for path in paths[3:6]:
        truncate(path)
    played = run(tmp_path, script, arguments(script, root, "run"), code=2)
    assert "Traceback" not in played.err and "1 %" in played.err.splitlines()[-1]
    assert paths[3].name in played.err.splitlines()[-1] and not (tmp_path / "run").exists()


def test_nothing_but_unreadable_pictures(tmp_path):
    (tmp_path / "bad").mkdir()
    for i in range(3):
        (tmp_path / "bad" / f"{i}.png").write_bytes(b"not a picture")
    refused(tmp_path, SCRIPTS[0], arguments(SCRIPTS[0], "bad", "run"), "no picture can be read")


def test_a_picture_that_claims_to_be_huge(copied, tmp_path):
    """A decompression bomb is one more unreadable picture."""
    root, paths = copied
    data = paths[0].read_bytes()
    header = b"IHDR" + (40_000).to_bytes(4, "big") * 2 + data[24:29]
    paths[0].write_bytes(data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:])
    played = run(tmp_path, SCRIPTS[0], arguments(SCRIPTS[0], root, "run", epochs=1))
    assert played.err.count("\n") == 1 and paths[0].name in played.err


def test_a_file_name_that_is_no_utf8(tmp_path):
    """Linux allows any bytes in a name; a run must not stumble over them at its very end."""
    make_pictures(tmp_path / "odd", 40, seed=4)
    path = next((tmp_path / "odd").rglob("*.png"))
    try:
        os.rename(os.fsencode(path), os.fsencode(path.parent) + b"/\xff\xfe.png")
    except OSError:
        pytest.skip("not on this file system")
    run(tmp_path, SCRIPTS[0], arguments(SCRIPTS[0], "odd", "run", epochs=1, clusters="4 2"))
    assert b"\xff\xfe.png" in (tmp_path / "run/clusters.csv").read_bytes()


def test_labels_are_read_coarse_to_fine(pictures):
    train, val = common.load_data(str(pictures))
    assert len(train) == IMAGES and len(val) == 30 and train.labels.shape == (IMAGES, 2)
    assert train.class_names[0] == ["across", "down, or so"] and len(train.class_names[1]) == 6
    for name, (coarse, fine) in zip(train.names, train.labels.tolist()):
        assert name.startswith(train.class_names[1][fine] + "/")
        assert train.class_names[1][fine].startswith(train.class_names[0][coarse] + "/")
