"""Views against torchvision, one picture and one operation at a time; the embedded data set's promises."""

import pytest
import torch
from torch.testing import assert_close
from torchvision.transforms import functional as TF

import common
from common import Augmentation, crop_boxes, draw_view, normalize_pixels, render_view
from textures import TEXTURE_NAMES, textures

close = dict(rtol=1e-5, atol=1e-5)  # float32 pixels in [0, 1]
N = 6


def rand_images(n=N, height=20, width=28, seed=0):
    images = torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))
    images[0, :, :4] = images[0, :1, :4]  # gray pixels, where hue is undefined
    images[1, 1] = images[1, 0]  # ties between channels
    return images


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def slow_crop_box(u, height, width, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)):
    """One sample, try by try, as the definition reads."""
    for area, aspect, row, column in u.tolist():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** aspect
        h, w = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
        if 0 < h <= height and 0 < w <= width:
            return [int(row * (height - h + 1)), int(column * (width - w + 1)), h, w]
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize("height, width", [(32, 32), (40, 23), (12, 90), (90, 12)])
def test_crop_boxes_equal_the_definition(height, width):
    u = torch.rand(300, 10, 4, generator=generator()).double()
    boxes = crop_boxes(u, height, width, Augmentation())
    assert boxes.tolist() == [slow_crop_box(row, height, width) for row in u]
    row, column, h, w = boxes.unbind(1)
    assert (row >= 0).all() and (column >= 0).all() and (h > 0).all() and (w > 0).all()
    assert (row + h <= height).all() and (column + w <= width).all()


def test_crop_boxes_keep_area_and_aspect_and_fall_back_to_the_centre():
    u = torch.rand(2000, 10, 4, generator=generator())
    row, column, h, w = crop_boxes(u, 200, 200, Augmentation(scale=(0.2, 0.6))).double().unbind(1)
    share = h * w / 200**2
    assert 0.195 < share.min() < 0.21 and 0.59 < share.max() < 0.605
    assert abs(share.mean() - 0.4) < 0.01  # uniform in area
    assert 0.74 < (w / h).min() and (w / h).max() < 1.35
    assert abs((w / h).log().mean()) < 0.01  # as often wide as tall
    assert row.min() == 0 and (row + h).max() == 200
    # No box of 90 to 100 % of a 4:1 picture has an aspect near 1: the central 4:3 box.
    boxes = crop_boxes(u[:3], 30, 120, Augmentation(scale=(0.9, 1.0)))
    assert boxes.tolist() == [[0, 40, 30, 40]] * 3


EVERYTHING = Augmentation(
    size=24, scale=(0.3, 1.0), gray_p=0.3, blur_p=0.5, solarize_p=0.3, shuffle_p=0.3
)


def slow_view(image, draw, augmentation):
    """One sample through torchvision's functions, in the order the draws name."""
    x = image.float() / 255
    x = x[draw["shuffle"]]
    box = crop_boxes(draw["crop"][None], *x.shape[1:], augmentation)[0]
    x = TF.resized_crop(x, *box.tolist(), [augmentation.size] * 2, antialias=True)
    if draw["flip"]:
        x = TF.hflip(x)
    names = ["brightness", "contrast", "saturation", "hue"]
    for name in [names[i] for i in draw["order"]]:
        x = getattr(TF, "adjust_" + name)(x, draw[name].item())
    if draw["gray"]:
        x = TF.rgb_to_grayscale(x, 3)
    if draw["blur"] > 0:
        x = TF.gaussian_blur(x, [13, 13], [draw["blur"].item()] * 2)  # to three deviations of 2 pixels
    if draw["solarize"] < 1:
        x = TF.solarize(x, draw["solarize"].item())
    return (x - 0.5) / 0.25


def test_render_view_equals_torchvision_sample_by_sample():
    images = (rand_images(40, 30, 26) * 255).byte()
    draws = draw_view(40, EVERYTHING, generator(3))
    assert {"crop", "flip", "hue", "order", "gray", "blur", "solarize", "shuffle"} <= set(draws)
    got = render_view(images, draws, EVERYTHING)
    samples = [{key: value[i] for key, value in draws.items()} for i in range(40)]
    want = [slow_view(x, draw, EVERYTHING) for x, draw in zip(images, samples, strict=True)]
    # Solarize and hue are steep at isolated values: a handful of pixels may land on the other side.
    far = (got - torch.stack(want)).abs() > 1e-4
    assert far.float().mean() < 1e-4
    assert got.dtype == torch.float32 and got.shape == (40, 3, 24, 24)


def test_views_do_not_depend_on_the_rest_of_the_batch():
    images = (rand_images(32, 24, 24) * 255).byte()
    draws = draw_view(32, EVERYTHING, generator(1))
    whole = render_view(images, draws, EVERYTHING)
    order = torch.randperm(32, generator=generator(2))
    permuted = render_view(images[order], {k: v[order] for k, v in draws.items()}, EVERYTHING)
    assert_close(permuted, whole[order], **close)
    ranks = [
        render_view(images[s], {k: v[s] for k, v in draws.items()}, EVERYTHING)
        for s in (slice(0, 11), slice(11, 32))
    ]
    assert_close(torch.cat(ranks), whole, **close)


def test_draws_repeat_with_the_seed_and_differ_without():
    first, again, other = (draw_view(16, EVERYTHING, generator(s)) for s in (5, 5, 6))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert all(len(v) == 16 and v.device.type == "cpu" for v in first.values())
    assert not torch.equal(first["crop"], other["crop"])


def test_draws_have_the_probabilities_asked_for():
    draws = draw_view(20000, EVERYTHING, generator())

    def share(mask):
        return mask.float().mean().item()

    assert abs(share(draws["flip"]) - 0.5) < 0.02
    assert abs(share(draws["gray"]) - 0.3) < 0.02
    assert abs(share(draws["blur"] > 0) - 0.5) < 0.02
    assert abs(share(draws["solarize"] < 1) - 0.3) < 0.02
    assert abs(share(draws["hue"] != 0) - 0.8) < 0.02
    assert abs(share((draws["shuffle"] != torch.arange(3)).any(1)) - 0.3 * 5 / 6) < 0.02
    for name in ("brightness", "contrast", "saturation"):
        assert 0.6 <= draws[name].min() < 0.61 and 1.39 < draws[name].max() <= 1.4
    assert draws["hue"].abs().max() <= 0.1


def test_nothing_switched_on_is_a_plain_resize():
    images = (rand_images(4, 24, 24) * 255).byte()
    plain = Augmentation(24, (1.0, 1.0), (1.0, 1.0), flip=0, jitter_p=0, gray_p=0)
    draws = draw_view(4, plain, generator())
    assert set(draws) == {"crop"}
    assert_close(
        render_view(images, draws, plain), normalize_pixels(images.float() / 255), **close
    )


def test_without_crops_the_centre_is_taken():
    """What is cropped already stays; else the largest square, at 96 px or more its middle 7/8."""
    images = (rand_images(4, 24, 24) * 255).byte()
    draws = {"flip": torch.ones(4, dtype=torch.bool)}  # what is left of draw_view where a thread has cropped
    assert_close(
        render_view(images, draws, EVERYTHING), normalize_pixels(images.flip(3).float() / 255), **close
    )
    for size, box in ((24, [0, 4, 120, 120]), (96, [7, 11, 105, 105])):
        images = (rand_images(2, 120, 128) * 255).byte()
        want = TF.resized_crop(images.float() / 255, *box, [size] * 2, antialias=True)
        assert_close(render_view(images, {}, Augmentation(size)), normalize_pixels(want), **close)


def test_a_blur_reaches_no_farther_than_the_view():
    images = rand_images(n=2).mul(255).byte()
    for size in (1, 2, 5):
        view = common.Augmentation(size=size, blur_p=1.0)
        assert render_view(images, common.draw_view(2, view, torch.Generator()), view).isfinite().all()


def test_blur_that_is_drawn_for_no_sample_changes_nothing():
    images = (rand_images(4, 24, 24) * 255).byte()
    view = EVERYTHING._replace(blur_p=1e-9)
    draws = draw_view(4, view, generator())
    without = {key: value for key, value in draws.items() if key != "blur"}
    assert torch.equal(render_view(images, draws, view), render_view(images, without, view))


# ---- each operation equals torchvision's


def test_colour_operations_equal_torchvision():
    images, factors = rand_images(), [0.0, 0.4, 0.9, 1.0, 1.4, 2.0]
    for name, values in (("brightness", factors), ("contrast", factors), ("saturation", factors),
                         ("hue", [-0.5, -0.13, 0.0, 0.05, 0.3, 0.5])):
        want = torch.stack([getattr(TF, f"adjust_{name}")(image, value) for image, value in zip(images, values)])
        assert_close(common.JITTER[name](images, torch.tensor(values)), want, **close)


def test_solarize_equals_torchvision():
    images = (rand_images(N, 24, 24) * 255).byte()
    view = Augmentation(24, (1.0, 1.0), (1.0, 1.0))
    values = [0.0, 0.25, 0.5, 0.75, 1.0]
    want = torch.stack([*(TF.solarize(x / 255, v) for x, v in zip(images, values)), images[5] / 255])
    values = torch.tensor([*values, 2.0])  # 2: not at all
    assert_close(render_view(images, {"solarize": values}, view), normalize_pixels(want), **close)


def test_gaussian_blur_equals_torchvision():
    images, sigma = rand_images(), [0.1, 0.5, 1.0, 1.5, 2.0, 5.0]
    for taps in (3, 7):
        want = torch.stack([TF.gaussian_blur(x, [taps, taps], [s, s]) for x, s in zip(images, sigma)])
        assert_close(common.gaussian_blur(images, torch.tensor(sigma), taps), want, **close)


def test_resized_crop_equals_torchvision():
    images = rand_images()
    boxes = [[0, 0, 20, 28], [3, 5, 7, 13], [19, 27, 1, 1], [0, 9, 20, 3], [6, 0, 13, 28], [2, 2, 16, 16]]
    for size in (5, 16, 33):  # smaller and larger than the boxes
        want = torch.stack([TF.resized_crop(x, *box, [size, size], antialias=True) for x, box in zip(images, boxes)])
        assert_close(common.resized_crop(images, torch.tensor(boxes), size), want, **close)


# ---- textures


def test_textures_are_balanced_nested_and_repeatable():
    images, labels = textures(4, seed=0)
    assert images.shape == (108, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.shape == (108, 3) and labels.dtype == torch.int64
    for level, classes in enumerate((3, 9, 27)):
        assert labels[:, level].bincount().tolist() == [108 // classes] * classes
        assert len(TEXTURE_NAMES[level]) == classes
    assert torch.equal(labels[:, 0], labels[:, 1] // 3) and torch.equal(
        labels[:, 1], labels[:, 2] // 3
    )
    again, _ = textures(4, seed=0)
    assert torch.equal(images, again)
    other, _ = textures(4, seed=1)
    assert (images != other).flatten(1).any(1).all()  # every picture differs
    assert (images.float().flatten(1).std(1) > 8).all()  # nothing flat
