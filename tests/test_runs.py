"""Whole scripts, one process: what a run leaves, how it is stopped and resumed, faults of data, disk and user.

    pytest tests/test_runs.py
"""

import csv
import json
import os
import pickle
import re
import signal
import time
import zlib

import numpy as np
import pytest
import torch
import torchvision
from conftest import (
    BATCH,
    EPOCHS,
    IMAGES,
    MODES,
    ROOT,
    SCRIPTS,
    STEPS,
    TIMINGS,
    Play,
    arguments,
    compare_runs,
    load,
    log,
    losses,
    make_pictures,
    painted,
    refused,
    run,
    save_in_mode,
    truncate,
)
from PIL import Image

import common

QUEUED = [name for name in SCRIPTS if "--queue-size" in (ROOT / f"{name}.py").read_text()]


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
        used = "neighbours_same_label" if script == "csml" else "clusters_in_use"
        assert {"lr", "feature_std", used, "unreadable", "knn", *TIMINGS} <= row.keys()
        assert losses(row) and all(np.isfinite(value) and (value > 0 or name == "simsiam")  # minus a cosine
                                   for name, value in losses(row).items())
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
    script, folder, _ = whole
    network, width = common.backbone("vit-4-32-2" if script == "hirl_ibot" else "tiny", "3x3", 16)
    network.load_state_dict(load(folder / "backbone.pt"))
    assert network.eval()(torch.zeros(2, 3, 16, 16)).shape == (2, width)


@pytest.mark.parametrize("script", SCRIPTS)
def test_plain_base_method_and_a_torchvision_backbone(script, pictures, tmp_path):
    """--clusters 0 runs without a tree; ResNet-18's or a ViT's weights load strictly into torchvision's but for fc."""
    vit = script == "hirl_ibot"
    argv = arguments(script, pictures, "run", plain=True, epochs=1, arch="vit-8-64-1" if vit else "resnet18",
                     stem="7x7", eval_every=5)
    run(tmp_path, script, argv)
    assert not (tmp_path / "run/tree.png").exists() and not (tmp_path / "run/clusters.csv").exists()
    assert "path" not in log(tmp_path / "run")[-1] and log(tmp_path / "run")[-1]["knn"]  # the last epoch always
    network = torchvision.models.VisionTransformer(16, 8, 1, 1, 64, 256) if vit else torchvision.models.resnet18()
    missing, unexpected = network.load_state_dict(load(tmp_path / "run/backbone.pt"), strict=False)
    head = "heads.head" if vit else "fc"
    assert sorted(missing) == [f"{head}.bias", f"{head}.weight"] and not unexpected


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_preset(script, tmp_path):
    text = run(tmp_path, script, ["--help"]).out
    assert all(word in text for word in ("--clusters", "textures", "imagenet", "--epochs", "python " + script))


# ---- stopped and resumed

LARS = dict(optimizer="lars", lr_warmup=0.25, base_lr=10)


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
            assert "cannot write" in full.err and full.err.count("\n") == 1
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


# ---- faults: one sentence, the right exit code, nothing written

FAULTS = {  # name: (arguments after the usual ones, words the sentence must hold)
    "missing folder": ("--data no/such", "no/such does not exist"),
    "empty folder": ("--data {tmp}/empty", "no pictures"),
    "file for a folder": ("--data {tmp}/file.png", "is a file"),
    "clusters above images": ("--clusters 97 4", "97 96 pictures"),
    "clusters not falling": ("--clusters 4 12", "4 12 fall"),
    "clusters equal": ("--clusters 4 4", "fall"),
    "clusters negative": ("--clusters -3", "-3 least"),
    "batch above images": ("--batch-size 97", "--batch-size 97 96"),
    "batch of one": ("--batch-size 1", "--batch-size 2"),
    "one cluster": ("--clusters 5 1", "5 1 least 2"),
    "seed": (f"--seed {2**64}", "--seed"),
    "meta": ("--device meta", "--device meta cpu"),
    "giant": ("--dim 1000000000", "too large"),
    "beyond giant": (f"--dim {10**20}", "--dim at most"),
    "weight decay": ("--weight-decay 1e308", "--weight-decay at most"),
    "long name": ("--out {tmp}/" + 300 * "x", "xxx"),
    "segmentation": ("--arch fcn_resnet50", "--arch fcn_resnet50"),
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
    assert load(tmp_path / "run/checkpoint.pt")["keep"].shape == (4, 3)


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
