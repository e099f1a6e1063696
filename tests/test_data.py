"""Pictures from folders: modes, labels, batches decoded on demand."""

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import BATCH, IMAGES, MODES, make_pictures, save_in_mode
from PIL import Image
from torch.testing import assert_close

import common


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
    a, b = (common.extract_features(nn.Flatten(), images, 16) for images in (inside, outside))
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
