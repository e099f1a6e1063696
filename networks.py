"""What images pass through: torchvision's networks by name, its ViT with tokens; and the features of all images.

A script's own projectors and heads stand in the script. Letters: B batch, F backbone feature, V views, H W picture
height and width, h w the same in patches, S patches.
"""

import re
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from common import Augmentation, Stop, ahead, knn_accuracy, make_views
from ranks import local_rows


# ---- backbone: torchvision's, by name
class TinyResNet(torchvision.models.ResNet):
    """A quarter-width ResNet of one block per stage, with torchvision's key names, for two CPU cores."""

    def __init__(self, widths=(16, 32, 64, 128)):
        block = torchvision.models.resnet.BasicBlock
        super().__init__(block, [1, 1, 1, 1])
        self.inplanes = widths[0]
        self.conv1, self.bn1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False), nn.BatchNorm2d(widths[0])
        for stage, width in enumerate(widths):
            setattr(self, f"layer{stage + 1}", self._make_layer(block, width, 1, stride=1 if stage == 0 else 2))
        self.fc = nn.Linear(widths[-1], 1)


class ViT(torchvision.models.VisionTransformer):
    """torchvision's VisionTransformer, key for key: (B, 3, H, W) of any size -> (B, F), the class token.

    Its parameters in timm: conv_proj -> patch_embed.proj, class_token -> cls_token, encoder.pos_embedding -> pos_embed,
    encoder.layers.encoder_layer_ -> blocks., ln_1 ln_2 -> norm1 norm2, self_attention.in_proj_ -> attn.qkv.,
    self_attention.out_proj -> attn.proj, mlp.0 mlp.3 -> mlp.fc1 mlp.fc2, encoder.ln -> norm.
    """

    def forward(self, x, **how):
        return self.tokens(x, **how)[:, 0]

    def tokens(self, x, masks=None, mask_token=None, branches=None):
        """(B, 3, H, W) -> (B, 1+S, F) after the last norm: the class token, then the S patches row by row.

        masks (B, h, w) bool: patches that show mask_token (1, F) in place of their pixels and keep their position
        (iBOT); branches (2 * depth, B): factors of each block's two residual branches, see `drop_path`.
        """
        h, w = (length // self.patch_size for length in x.shape[2:])
        x = self.conv_proj(x)  # (B, F, h, w)
        if masks is not None:
            x = torch.where(masks[:, None], mask_token[:, :, None, None].to(x.dtype), x)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        x = x + self.positions(h, w)  # (B, 1+S, F)
        if branches is None:
            return self.encoder.ln(self.encoder.layers(x))
        for block, (attention, mlp) in zip(self.encoder.layers, branches[..., None, None].unflatten(0, (-1, 2))):
            y = block.ln_1(x)
            x = x + attention * block.self_attention(y, y, y, need_weights=False)[0]
            x = x + mlp * block.mlp(block.ln_2(x))
        return self.encoder.ln(x)

    def positions(self, h, w):
        """(1, 1+hw, F); for another grid than its own, the patches' positions are interpolated, as in DINO."""
        positions, side = self.encoder.pos_embedding, self.image_size // self.patch_size
        if (h, w) == (side, side):
            return positions
        grid = positions[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # (1, F, side, side)
        grid = F.interpolate(grid, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")
        # as released: the 0.1 guards the rounding, and also shifts every position by up to a tenth of a patch
        return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def drop_path(backbone, rate, views, batch_size, generator):
    """Stochastic depth (1603.09382): factors (2 * depth, V, b) for `ViT.tokens`, None for rate 0 and for ResNets.

    0 where an image's view skips the branch, else 1 / (1 - chance of it); the chance rises from 0 in the first block
    to `rate` in the last. Drawn for the whole batch; these are the b images of this process.
    """
    if not (rate and isinstance(backbone, ViT)):
        return None
    chance = torch.linspace(0, rate, len(backbone.encoder.layers)).repeat_interleave(2)[:, None, None]
    kept = torch.rand(len(chance), views, batch_size, generator=generator) >= chance
    kept = (kept / (1 - chance).clamp(min=1e-6))[..., local_rows(batch_size)]
    return kept.to(backbone.class_token.device, non_blocking=True)


STEMS = {"3x3": 1, "3x3s2": 2, "7x7": None}  # stride of a 3x3 first convolution without max-pool; torchvision's own


SMALLEST = {"3x3": 5, "3x3s2": 9, "7x7": 17}  # view for which the last stage sees more than one pixel


def check_views(args, device):
    """Stop where a view of a run is smaller than a ViT's patch, or than a ResNet takes with --amp on the CPU.

    There oneDNN leaves part of the gradient of a strided bfloat16 convolution over one pixel unwritten.
    """
    small, known, half = args.image_size, vars(args), args.amp and device.type == "cpu"
    if known.get("local_crops"):
        small = min(small, args.local_size)
    if known.get("multi_crop"):  # hcsc.py
        small = round(small * 3 / 7)
    if patch := re.match(r"vit-(\d+)-|vit_.*_(\d+)$", args.arch):
        least = int(patch[1] or patch[2])
    else:
        least = SMALLEST[args.stem] if half else 1
    if small < least:
        how = " with --amp on the CPU" if half and not patch else ""
        raise Stop(f"a view of {small} px is too small for --arch {args.arch}{how}, which needs {least}: give a larger "
                   "--image-size or, with small crops, --local-size")


def backbone(arch, stem, image_size=224):
    """(network (B, 3, H, W) -> (B, F), F): a torchvision model by name with its classifier taken off.

    ResNets: stem "7x7" is torchvision's own, for large pictures; "3x3" is a stride-1 convolution without max-pool,
    the usual change for pictures of 32 px; "3x3s2" the same at stride 2, a quarter of the work. "tiny" is a small one.
    ViTs: vit_b_16 etc., or vit-<patch>-<width>-<depth>, as vit-8-96-4, with heads of 64 channels, or of 32 where 64
    does not divide the width; without stem, and with positions for image_size. Key names stay.
    """
    network = None
    try:
        if arch.startswith("vit-"):
            patch, width, depth = map(int, arch.split("-")[1:])
            heads = 0 if width % 32 or depth < 1 else width // (32 if width % 64 else 64)  # 0: refused
            network = ViT(image_size, patch, max(1, depth), heads, width, 4 * width)
        elif arch.startswith("vit_"):
            network = torchvision.models.get_model(arch, weights=None, image_size=image_size)
            network.__class__ = ViT
        elif arch in torchvision.models.list_models(module=torchvision.models):  # others may fetch weights
            network = torchvision.models.get_model(arch, weights=None)
        elif arch == "tiny":
            network = TinyResNet()
        if isinstance(network, ViT):
            network.heads = nn.Identity()
            return network, network.hidden_dim
        channels, width = network.conv1.out_channels, network.fc.in_features
    except (ValueError, AttributeError, AssertionError, ZeroDivisionError) as error:
        raise Stop(f"--arch {arch} is no network for {image_size} px: try tiny, resnet18, resnet50 or another of "
                   "torchvision from `conv1` to `fc`, vit_b_16, or vit-<patch>-<width>-<depth> with a patch that "
                   "divides the picture's side and a width that 32 divides") from error
    if STEMS[stem]:
        network.conv1 = nn.Conv2d(3, channels, 3, stride=STEMS[stem], padding=1, bias=False)
        network.maxpool = nn.Identity()
    network.fc = nn.Identity()
    return network, width


# ---- features
@torch.no_grad()
def extract_features(network, images, size, *, device="cpu", workers=0, batch_size=None, amp=False):
    """The network's (n, F) float32 output for the central crop of every picture, this rank's n rows of N.

    In evaluation mode (and back), nothing augmented, in order; batches of 512, on CUDA of 2048, of large ones fewer.
    FloatingPointError: not finite.
    """
    training = network.training
    network.eval()
    own = torch.arange(len(images))[local_rows(len(images))]
    rows = own if len(own) else torch.zeros(1, dtype=torch.long)  # without a picture look at one, for the width
    largest = 2048 if torch.device(device).type == "cuda" else 512  # fewer launches; the CPU's caches hold no more
    features, planned, most = [], [(Augmentation(size=size), {})], batch_size or max(1, min(largest, 2**23 // size**2))
    for (view,) in ahead(lambda ids: make_views(images, ids, planned, device, workers), rows.split(most)):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
            features.append(network(view).to(torch.float32, copy=True))  # keeps no ViT's tokens, no graph's output
    network.train(training)
    images.agree()
    features = torch.cat(features)[:len(own)]
    if not features.isfinite().all():
        raise FloatingPointError("features are not finite")
    return features


def knn_of_pixels(train, test, size, device):
    """kNN accuracy of the pictures themselves; None where that would take minutes, or on a GPU several GiB."""
    if train.pixels is None or len(train) * size**2 > (2e7 if torch.device(device).type == "cpu" else 2e8):
        return None
    return knn_accuracy(train, test, partial(extract_features, nn.Flatten(), size=size, device=device))
