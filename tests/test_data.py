"""Pictures from folders: modes, labels, batches decoded on demand; damaged files, odd folders, ranks, workers."""

import contextlib
import functools
import io
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision.transforms.functional as TF
from conftest import BATCH, IMAGES, MODES, make_pictures, save_in_mode
from PIL import Image
from test_ranks import in_ranks
from torch.testing import assert_close

import common
import networks
import ranks

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_pictures_of_two_seeds_differ(pictures):
    """The val split below is no copy of the training pictures."""
    train, val = common.load_data(str(pictures))
    assert not any((train.pixels == picture).flatten(1).all(1).any() for picture in val.pixels)


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_any_mode_are_decoded_to_rgb(mode, tmp_path):
    """Two halves, dark and light; what a mode can hold must come back, in (3, H, W) bytes."""
    pixels = np.zeros((6, 10, 3), np.uint8)
    pixels[:, 5:] = 255 if mode == "1" else (200, 60, 120)
    save_in_mode(pixels, mode, tmp_path / "x")
    found = TF.pil_to_tensor(common.decode(next(tmp_path.iterdir())))
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
    assert torch.equal(TF.pil_to_tensor(common.decode(tmp_path / "x.png")).long(), expected)


@pytest.mark.parametrize("kind, most", (("float32", 1), ("float32", 255), ("int32", 255), ("int32", 65535)))
def test_real_and_32_bit_pictures_keep_their_range(kind, most, tmp_path):
    values = (np.arange(256) * (most / 255)).astype(kind).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert abs(TF.pil_to_tensor(common.decode(tmp_path / "x.tif")).flatten(1) - torch.arange(256)).max() <= 1


@pytest.mark.parametrize("partner", (None, (torch.arange(40) * 7 + 3) % 40))
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
        assert len(views) == len(other_views) == (2 if partner is None else 4)
        for a, b in zip(views, other_views):
            assert (a - b).abs().mean() < 0.05  # bytes are rounded between crop and colour
    a, b = (networks.extract_features(nn.Flatten(), images, 16) for images in (inside, outside))
    assert_close(a, b, rtol=0, atol=1e-4)


def test_the_views_of_partners_follow_and_leave_the_own_as_they_are(pictures):
    """Whole pictures, no chance: the third view is the partner's picture. With chance: the first two do not change."""
    train, _ = common.load_data(str(pictures))
    still = common.Augmentation(size=16, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0, jitter_p=0, gray_p=0)
    view = common.Augmentation(size=16)
    alone = [views for _, _, views in common.batches(train, BATCH, [view] * 2, seed=0, epoch=1)]
    train.partner = (torch.arange(IMAGES) + 5) % IMAGES
    for _, index, (own, other) in common.batches(train, BATCH, [still], seed=0, epoch=1):
        assert_close(own, common.normalize_pixels(train.pixels[index].float() / 255))
        assert_close(other, common.normalize_pixels(train.pixels[(index + 5) % IMAGES].float() / 255))
    for (a, b), (_, _, views) in zip(alone, common.batches(train, BATCH, [view] * 2, seed=0, epoch=1), strict=True):
        assert torch.equal(a, views[0]) and torch.equal(b, views[1]) and not torch.equal(views[0], views[2])


def test_labels_are_read_coarse_to_fine(pictures):
    train, val = common.load_data(str(pictures))
    assert len(train) == IMAGES and len(val) == 30 and train.labels.shape == (IMAGES, 2)
    assert train.class_names[0] == ["across", "down, or so"] and len(train.class_names[1]) == 6
    for name, (coarse, fine) in zip(train.names, train.labels.tolist()):
        assert name.startswith(train.class_names[1][fine] + "/")
        assert train.class_names[1][fine].startswith(train.class_names[0][coarse] + "/")


def test_a_picture_that_costs_a_label_is_named(tmp_path, capsys):
    """One stray picture beside the folders leaves all without labels: not without a word."""
    for name in ("a/x/0.png", "a/x/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert common.load_data(str(tmp_path))[0].class_names == [["a", "b"]]
    assert "a depth of 1, for b/2.png" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(tmp_path / "stray.png")
    assert common.load_data(str(tmp_path))[0].labels is None
    assert "a depth of 0, for stray.png" in capsys.readouterr().err


# ---- what cannot be read


VIEW = common.Augmentation(size=8)


def plain_folder(root, n, damaged=(), size=8):
    """n pictures, the second one larger, so that they are decoded on demand; files of these numbers are damaged."""
    root.mkdir(parents=True)
    for i in range(n):
        Image.new("RGB", (size + (i == 1), size), (i % 256, 7 * i % 256, 90)).save(root / f"{i:03d}.png")
    for i in damaged:
        (root / f"{i:03d}.png").write_bytes(b"no picture")
    return root


def features_of(folder, epoch=False):
    """What a rank knows after one pass over the pictures, for features or as an epoch's batches: its table, stand-ins,
    what it said, and how it ended.
    """
    images, said = common.load_data(str(folder))[0], io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if epoch:
                rows = [len(index) for _, index, _ in common.batches(images, 16, [VIEW], seed=0, epoch=0)]
            else:
                rows = [len(networks.extract_features(nn.Flatten(), images, 8))]
        ended = sum(rows)
    except common.Stop as stop:
        ended = str(stop)
    return sorted(images.unreadable), images.index_of.tolist(), said.getvalue(), ended


@pytest.mark.parametrize("epoch", (False, True))
def test_ranks_know_all_unreadable_pictures_and_name_each_once(epoch, tmp_path):
    folder = plain_folder(tmp_path / "pictures", 240, damaged=(10, 200))
    one, two = in_ranks(functools.partial(features_of, folder, epoch), tmp_path)
    assert one[0] == two[0] == [10, 200] and one[1] == two[1] and one[1][10] == 11 and one[1][200] == 201
    assert [(one[2] + two[2]).count(f"neighbour: {i:03d}.png") for i in (10, 200)] == [1, 1]
    assert one[3] == two[3] == 120
    alone = features_of(folder, epoch)
    assert alone[:3] == one[:3]


def test_a_stand_in_brings_its_label(tmp_path):
    """To every reader of labels: the image of class a whose file is damaged shows, and counts as, one of class b."""
    for name in ("a", "b"):
        plain_folder(tmp_path / name, 3, damaged=[2] * (name == "a"))
    images, _ = common.load_data(str(tmp_path))
    images.picture(2)
    assert images.labels[:, 0].tolist() == [0, 0, 1, 1, 1, 1] and images.index_of[2] == 3


def test_no_held_out_picture_is_trained_on_as_a_stand_in(tmp_path):
    """Picture 9 is damaged and 10, the next, is held out: so is 9."""
    for i in range(21):
        Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "09.png").write_bytes(b"no picture")
    train, held_out = common.load_data(str(tmp_path), validation=True)
    assert not {*train.pixels[:, 0, 0, 0].tolist()} & {*held_out.pixels[:, 0, 0, 0].tolist()}


def test_held_out_pictures_do_not_vote():
    """20 classes of one picture each, every tenth held out: no other picture knows its class."""
    images = common.Images([*map(str, range(20))], torch.arange(20)[:, None], [[*map(str, range(20))]])
    assert common.knn_accuracy(images, None, lambda _: torch.eye(20), k=1) == [0.0]


@pytest.mark.parametrize("first", (6, 7))
def test_the_next_picture_that_can_be_read_stands_in_whichever_is_met_first(first, tmp_path):
    """Two in a row, and the last one, after which the first comes."""
    images, _ = common.load_data(str(plain_folder(tmp_path / "pictures", 300, damaged=(6, 7, 299))))
    for i in (first, 6, 7, 299):
        assert images.picture(i) == images.picture((i + 1) % 300)
    assert images.index_of.tolist() == [*range(6), 8, 8, *range(8, 299), 0] and sorted(images.unreadable) == [6, 7, 299]


def test_the_limit_of_unreadable_pictures_counts_those_of_all_ranks(tmp_path):
    """Two of 240 are allowed; one rank meets one, the other two: both stop, with all three names."""
    folder = plain_folder(tmp_path / "pictures", 240, damaged=(10, 150, 200))
    for _, _, _, ended in in_ranks(functools.partial(features_of, folder), tmp_path):
        assert "3 of 240 pictures cannot be read" in ended and f"in {folder}/, 010.png, 150.png, 200.png" in ended


def test_the_limit_of_unreadable_pictures_is_that_of_the_whole_set_in_its_parts_too(tmp_path):
    """Two of 240 are allowed, also where both are in a part of ten; a third there is not."""
    images, _ = common.load_data(str(plain_folder(tmp_path / "pictures", 240, damaged=(20, 22, 24))))
    part = images.part(torch.arange(17, 27)).part(torch.arange(1, 9))  # 18 to 25
    assert part.picture(2) == part.picture(3) and part.picture(4) == part.picture(5) and [*part.unreadable] == [2, 4]
    with pytest.raises(common.Stop, match="3 of 8 pictures cannot be read, more than 1 %"):
        part.picture(6)


@pytest.mark.parametrize("content", (b"BLP2" + bytes(60), b"\0\0\0\x1cftypavif" + bytes(40), b"", RuntimeError,
                                     b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"))
def test_whatever_a_damaged_file_raises_it_is_one_unreadable_picture(content, tmp_path, monkeypatch, capfd):
    folder = plain_folder(tmp_path / "pictures", 20)
    if content is RuntimeError:
        opened = Image.open
        monkeypatch.setattr(Image, "open", lambda path: 1 / 0 if "003" in str(path) else opened(path))
    else:
        (folder / "003.png").write_bytes(content)
    images, _ = common.load_data(str(folder))
    assert networks.extract_features(nn.Flatten(), images, 8).shape == (20, 192)
    assert list(images.unreadable) == [3] and images.picture(3) == images.picture(4)
    assert capfd.readouterr().err.count("neighbour: 003.png") == 1


# ---- folders


def test_each_real_folder_counts_once_however_links_loop(tmp_path):
    make_pictures(tmp_path / "data", 6, seed=0)
    names = [images.names for images in common.load_data(str(tmp_path / "data")) if images]
    (tmp_path / "data" / "zz").symlink_to(tmp_path / "data", target_is_directory=True)
    first = next(path for path in (tmp_path / "data").iterdir() if path.is_dir() and not path.is_symlink())
    (first / "zz").symlink_to(tmp_path, target_is_directory=True)
    assert [images.names for images in common.load_data(str(tmp_path / "data")) if images] == names


@pytest.mark.parametrize("size", (8, 140))
def test_a_link_to_nothing_is_an_unreadable_picture(size, tmp_path, capsys):
    folder = plain_folder(tmp_path / "pictures", 6, size=size)
    (folder / "zzz.png").symlink_to(tmp_path / "nothing.png")
    images, _ = common.load_data(str(folder))
    before = images.fingerprint()
    networks.extract_features(nn.Flatten(), images, 8)
    assert [*images.unreadable] == [6] and capsys.readouterr().err.count("zzz.png") == 1
    assert images.fingerprint() == before == common.load_data(str(folder))[0].fingerprint()


def test_a_pipe_is_no_picture(tmp_path):
    folder = plain_folder(tmp_path / "pictures", 6)
    os.mkfifo(folder / "!.png")
    code = f"import common; t = common.load_data({str(folder)!r})[0]; t.picture(0); print(t.unreadable[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert "no regular file" in done.stdout, done.stderr


def test_folders_of_runs_are_never_data(tmp_path):
    folder = plain_folder(tmp_path / "pictures", 6)
    run = folder / "runs" / "hirl_moco-pictures-0"
    run.mkdir(parents=True)
    for name in ("config.json", "log.jsonl"):
        (run / name).write_text("{}")
    (folder / "eval_tree").mkdir()
    (folder / "eval_tree" / "clusters.csv").write_text("image,level0\n")
    for left in (run, folder / "eval_tree"):
        Image.new("RGB", (300, 200)).save(left / "tree.png")
    train, _ = common.load_data(str(folder))
    assert len(train) == 6 and train.labels is None


def test_a_set_as_folders_is_the_same_set(tmp_path, monkeypatch):
    """bench/cifar_folders.py: the first pictures of each class, in their order, under the names of their classes."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "bench")
    import cifar_folders

    pixels = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([[0, 1], [1, 2], [0, 0]]).repeat(4, 1)
    names = [["fish", "trees"], ["ray", "shark", "oak"]]
    images = common.Images(list(map(str, range(12))), labels, names, pixels=pixels)
    assert cifar_folders.write_folders(images, tmp_path / "all") == 12
    assert cifar_folders.write_folders(images, tmp_path / "few", 2) == 6
    (_, whole), (_, few) = ((where, common.load_data(str(tmp_path / where))[0]) for where in ("all", "few"))
    assert whole.class_names == [["fish", "trees"], ["fish/ray", "fish/shark", "trees/oak"]]
    assert torch.equal(whole.pixels, pixels[[2, 5, 8, 11, 0, 3, 6, 9, 1, 4, 7, 10]])
    assert torch.equal(few.pixels, pixels[[2, 5, 0, 3, 1, 4]]) and few.labels.tolist() == whole.labels[::2].tolist()


def test_names_with_newlines_fit_into_one_line(tmp_path):
    for name in ("a\nb", "c"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x\ty.png")
    train, _ = common.load_data(str(tmp_path))
    assert train.names == ["a\ufffdb/x\ufffdy.png", "c/x\ufffdy.png"] and train.class_names == [["a\ufffdb", "c"]]
    assert train.labels.tolist() == [[0], [1]]


@pytest.mark.parametrize("large", (False, True))
def test_the_fingerprint_follows_content_and_order_of_both_splits(large, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for i in range(3):
            pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3) + 40 * i
            Image.fromarray(np.tile(pixels, (20, 20, 1)) if large else pixels).save(tmp_path / split / f"{i}.png")

    def fingerprint():
        return common.load_data(f"{tmp_path}/")[0].fingerprint()

    first = fingerprint()
    assert first == fingerprint() and len(first) == 12
    seen = {first}
    for split in ("train", "val"):
        a, b, c = (tmp_path / split / f"{i}.png" for i in range(3))
        time.sleep(0.02)
        Image.open(a).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(a)  # the same sum of pixels
        seen.add(fingerprint())
        b.rename(tmp_path / "x"), c.rename(b), (tmp_path / "x").rename(c)
        seen.add(fingerprint())
        c.unlink()
        seen.add(fingerprint())
    assert len(seen) == 7


def test_a_copy_of_large_pictures_has_the_same_fingerprint(tmp_path):
    folder = plain_folder(tmp_path / "pictures", 6, size=140)
    first = common.load_data(str(folder))[0]
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)  # without their times
    assert first.pixels is None and common.load_data(f"{tmp_path}/copy")[0].fingerprint() == first.fingerprint()


def test_the_fingerprint_of_large_pictures_sees_bytes_and_sizes(tmp_path):
    """Same length, other bytes, in a file that is neither first nor last; a byte behind those that are read."""
    for i in range(5):
        Image.new("RGB", (400, 400), (i, 0, 0)).save(tmp_path / f"{i}.bmp")
    first = common.load_data(str(tmp_path))[0].fingerprint()
    content = bytearray((tmp_path / "2.bmp").read_bytes())
    content[1000] ^= 255
    (tmp_path / "2.bmp").write_bytes(content)
    second = common.load_data(str(tmp_path))[0].fingerprint()
    with open(tmp_path / "3.bmp", "ab") as f:
        f.write(b"x")
    assert len({first, second, common.load_data(str(tmp_path))[0].fingerprint()}) == 3


def test_hidden_folders_are_no_classes(tmp_path):
    for place in ("train/a", "train/b", "train/.trash/c", "val/a", "val/b", "val/a/.ipynb_checkpoints"):
        plain_folder(tmp_path / ".data" / place, 2)  # that the whole is hidden does not matter
    train, test = common.load_data(str(tmp_path / ".data"))
    assert (train.class_names, len(train), len(test)) == ([["a", "b"]], 4, 4)


def test_other_classes_are_named(tmp_path):
    for place in ("train/a/x", "train/b/y", "val/a/x", "val/b/z"):
        plain_folder(tmp_path / place, 2)
    with pytest.raises(common.Stop, match="val has other classes than the training pictures .b/z."):
        common.load_data(str(tmp_path))
    shutil.rmtree(tmp_path / "val/b")
    (tmp_path / "val/a/x/000.png").rename(tmp_path / "val/a/000.png")
    with pytest.raises(common.Stop, match="fewer levels"):
        common.load_data(str(tmp_path))


# ---- more ranks than pictures; one that downloads


def accuracy(folder):
    train, test = common.load_data(str(folder))
    return common.knn_accuracy(train, test, lambda images: networks.extract_features(nn.Flatten(), images, 16), k=3)


@pytest.mark.parametrize("split", (True, False))
def test_fewer_test_pictures_than_ranks(split, pictures, tmp_path):
    """25 training pictures on 3 ranks, and 2 test pictures, or none but every tenth: as on one."""
    make_pictures(tmp_path / "data" / "train", 25, seed=0)
    if split:
        make_pictures(tmp_path / "data" / "val", 25, seed=1)
        for path in sorted((tmp_path / "data" / "val").rglob("*.png"))[2:]:
            path.unlink()
    expected = accuracy(tmp_path / "data")
    assert in_ranks(functools.partial(accuracy, tmp_path / "data"), tmp_path, size=3) == [expected] * 3


def download(folder):
    """Load a fake CIFAR-10 that takes half a second to fetch, and say who fetched it."""
    from torchvision import datasets

    class Slow:
        data, targets, classes = np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 0, 1], ["a", "b"]

        def __init__(self, root, train, download):
            if not (folder / f"{train}").exists():
                time.sleep(0.5)
                with open(folder / "fetched", "a") as f:
                    f.write(f"{ranks.rank()}")
                (folder / f"{train}").touch()

    datasets.CIFAR10 = Slow  # in a process of its own
    return len(common.load_data("cifar10", str(folder))[0])


def test_one_rank_downloads_while_the_others_wait(tmp_path):
    assert in_ranks(functools.partial(download, tmp_path), tmp_path) == [4, 4]
    assert (tmp_path / "fetched").read_text() == "00"  # both splits


def test_stl10_as_torchvision_reads_it(tmp_path, monkeypatch):
    """Its files hold columns first, and most of its training pictures carry no label."""
    from torchvision import datasets

    (tmp_path / "stl10_binary").mkdir()
    for name, count in (("train", 12), ("test", 10), ("unlabeled", 20)):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        pixels.tofile(tmp_path / f"stl10_binary/{name}_X.bin")
        (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(tmp_path / f"stl10_binary/{name}_y.bin")
    (tmp_path / "stl10_binary/class_names.txt").write_text("\n".join("abcdefghij") + "\n")
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    train, test = common.load_data("stl10", str(tmp_path))
    assert (len(train), len(test), len(train.fingerprint())) == (32, 10, 12)
    assert train.labels[:, 0].tolist() == [*range(10), 0, 1, *[-1] * 20] and train.class_names == [[*"abcdefghij"]]
    assert torch.equal(test.pixels[0], torch.from_numpy(np.random.default_rng(0).integers(
        0, 256, (10, 3, 96, 96), dtype=np.uint8)[0]).transpose(1, 2))
    found = common.knn_accuracy(train, test, lambda images: images.pixels.flatten(1).float(), k=1)
    assert found == [100]  # the first ten of each file are the same; those without a label do not vote
    train, test = common.load_data("stl10", str(tmp_path), validation=True)
    assert test.labels[:, 0].tolist() == [0, 0] and len(train) == 30  # those that can be right or wrong


# ---- threads


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder of 24 pictures of many sizes, one of them damaged."""
    folder, generator = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    for i in range(24):
        pixels = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((150 + 9 * i, 200 - 3 * i)).save(folder / f"{i:02d}.jpg")
    (folder / "05.jpg").write_bytes(b"no picture")
    return folder


def one_epoch(images, workers, start=0, size=16):
    view = common.Augmentation(size=size, blur_p=0.5)
    return [*common.batches(images, 4, [view] * 2, seed=0, epoch=0, start=start, workers=workers)]


@pytest.mark.parametrize("partner", (None, (torch.arange(24) * 7 + 3) % 24))
def test_no_number_of_threads_and_no_start_changes_a_batch(partner, large, capsys):
    """From any step on the same bits, whoever decodes; one line a damaged picture."""
    epochs = []
    for workers, start in ((0, 0), (1, 0), (4, 0), (4, 3)):
        images, _ = common.load_data(str(large))
        images.partner = partner
        epochs.append(one_epoch(images, workers, start))
        x = networks.extract_features(nn.Flatten(), images, 16, workers=workers, batch_size=7)
        assert images.unreadable.keys() == {5} and images.index_of[5] == 6
        assert torch.equal(x, networks.extract_features(nn.Flatten(), images, 16)) and torch.equal(x[5], x[6])
        assert capsys.readouterr().err.count("using its neighbour: 05.jpg") == 1
    first = epochs[0]
    assert [step for step, _, _ in first] == [*range(6)] and not any(5 in index for _, index, _ in first)
    for epoch, start in zip(epochs, (0, 0, 0, 3)):
        for (step, index, views), (_, expected, others) in zip(epoch, first[start:], strict=True):
            assert step >= start and torch.equal(index, expected) and len(views) == (2 if partner is None else 4)
            assert all(map(torch.equal, views, others))


def test_large_pictures_are_cropped_before_they_are_resized(large):
    """Bytes as torchvision's, two steps of rounding apart: no pixel beside the box counts."""
    images, view = common.load_data(str(large))[0], common.Augmentation(size=16, flip=0, jitter_p=0, gray_p=0)
    ids, draws = torch.arange(6, 24), common.draw_view(18, view, torch.Generator().manual_seed(0))
    (got,) = common.make_views(images, ids, [(view, draws)], "cpu", 2)
    for x, i, u in zip(got, ids.tolist(), draws["crop"], strict=True):
        picture = TF.pil_to_tensor(images.picture(i)).float()
        box = common.crop_boxes(u[None], *picture.shape[1:], view)[0].tolist()
        want = TF.resized_crop(picture, *box, [16, 16], antialias=True)
        assert ((x * 0.25 + 0.5) * 255 - want).abs().max() < 2


def test_the_next_is_made_while_one_is_used(request):
    """One ahead, not more; in order; by as many threads as there shall be, each of which computes on one core."""
    made, seen, deadline = [], set(), time.monotonic() + 20
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)

    def make(i):
        made.append(i)
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return i

    before = threading.active_count()
    for i in common.ahead(make, range(5)):
        while len(made) < min(i + 2, 5) and time.monotonic() < deadline:  # the next one comes by itself
            time.sleep(0.001)
        time.sleep(0.01)
        assert made == [*range(min(i + 2, 5))]
    assert len(seen) == 1 and threading.get_ident() not in {thread for thread, _ in seen}
    assert [*common.ahead(make, range(50), threads=4)] == [*range(50)] and 2 <= len(seen) <= 5
    assert {n for _, n in seen} == {1} and torch.get_num_threads() == 2
    assert threading.active_count() == before


def test_threads_end_with_the_batches_that_are_left_half_way(large):
    images, before = common.load_data(str(large))[0], threading.active_count()
    batches = common.batches(images, 4, [common.Augmentation(size=16)], seed=0, epoch=0, workers=4)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_what_a_thread_raises_reaches_the_loop(large, monkeypatch):
    """Deep down, in the middle of an epoch: the same exception, and no thread stays."""
    images, decoded, before = common.load_data(str(large))[0], common.decode, threading.active_count()
    opened = []
    monkeypatch.setattr(common, "decode", lambda path: opened.append(path) or decoded(path))
    monkeypatch.setattr(common, "render_view", lambda *_: 1 / 0 if len(opened) > 12 else None)
    with pytest.raises(ZeroDivisionError):
        one_epoch(images, workers=4)
    assert 12 < len(opened) < 24 and threading.active_count() == before


def test_data_that_is_deleted_is_one_sentence(tmp_path):
    folder = plain_folder(tmp_path / "pictures", 12)
    images, _ = common.load_data(str(folder))
    for path in folder.iterdir():
        path.unlink()
    for workers in (0, 1):
        with pytest.raises(common.Stop, match="^. of 12 pictures cannot be read.*no regular file.*: mend or remove"):
            one_epoch(images, workers)


def test_features_hold_no_more_than_themselves():
    """A ViT's feature is the first of its tokens: a view of them would keep every batch's tokens until the last.

    A network that replays a graph, as --compile on a GPU makes one, writes all batches' results to one place.
    """
    place = torch.zeros(4, 50, 6)

    class Tokens(nn.Module):
        def forward(self, x):
            return place[:len(x)].copy_(x.flatten(1)[:, None, :6].expand(-1, 50, -1))[:, 0]

    images = common.Images([*"abcdefgh"], pixels=torch.arange(8 * 48, dtype=torch.uint8).view(8, 3, 4, 4))
    x = networks.extract_features(Tokens(), images, 4, batch_size=4)
    assert torch.equal(x, networks.extract_features(nn.Flatten(), images, 4)[:, :6])


@pytest.mark.parametrize("larger", [None, 63, 64, 129])
def test_small_pictures_are_read_in_blocks(larger, tmp_path):
    """130 are two blocks and two more; one of another size, wherever it is, and none is kept in memory."""
    for i in range(130):
        Image.new("RGB", (8 + (i == larger), 6), (i, 2 * i % 256, 90)).save(tmp_path / f"{i:03d}.png")
    images = common.folder(tmp_path)
    if larger is not None:
        assert images.pixels is None
        return
    assert images.pixels.shape == (130, 3, 6, 8)
    assert all(torch.equal(images.pixels[i], TF.pil_to_tensor(common.decode(p))) for i, p in enumerate(images.paths))
