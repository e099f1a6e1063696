"""HIRL on DINO and on iBOT, and the ViT: golden numbers, loops, values by hand, laws, whole runs in plain words.

Golden numbers as in test_golden.py, of the released code of DINO, iBOT and HIRL; D1-D12 and I1-I9 are the differences
that the scripts' docstrings list. What holds for every script (files, resume, two processes, bad input) is in
test_scripts.py.
"""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from test_golden import fixture_tree, golden
from test_losses import EXACT, SINGLE
from test_scripts import STEPS, arguments, load, log, losses, pictures, run, two_ranks  # noqa: F401: a fixture
from torch.testing import assert_close

import common
import hirl_dino
import hirl_ibot
import hirl_swav

BOTH = pytest.mark.parametrize("script", (hirl_dino, hirl_ibot), ids=lambda script: script.__name__)
FLOAT32 = dict(rtol=1e-4, atol=1e-5)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- golden numbers: DINO


class Pooled(nn.Module):
    """The trunk of the golden DINO runs: 2x2 average pool, linear, tanh."""

    def __init__(self, width):
        super().__init__()
        self.lin = nn.Linear(12, width)

    def forward(self, x):
        return self.lin(F.adaptive_avg_pool2d(x, 2).flatten(1)).tanh()


def released_name(name):
    """Of a parameter of our Encoder, what the releases call it (torchvision's ViT: timm's names)."""
    for ours, theirs in (("projector.0.", "head.mlp.0."), ("projector.3.", "head.mlp.2."),
                         ("projector.6.", "head.mlp.4."), ("weight_", "head.last_layer.weight_")):
        if name.startswith(ours):
            return name.replace(ours, theirs)
    return re.sub("^backbone.(?!lin)", "", name) if "backbone.lin" in name else "backbone." + timm_name(name[9:])


def timm_name(name):
    """torchvision's name of a ViT's parameter -> timm's, by the key map of the README."""
    for ours, theirs in (("class_token", "cls_token"), ("encoder.pos_embedding", "pos_embed"),
                         ("conv_proj", "patch_embed.proj"), ("encoder.layers.encoder_layer_", "blocks."),
                         ("ln_1", "norm1"), ("ln_2", "norm2"), ("self_attention.in_proj_", "attn.qkv."),
                         ("self_attention.out_proj", "attn.proj"), ("mlp.0", "mlp.fc1"), ("mlp.3", "mlp.fc2"),
                         ("encoder.ln", "norm")):
        name = name.replace(ours, theirs)
    return name


def fill(encoder, g, prefix):
    """The golden parameters put into an Encoder; prototypes without golden lengths have length 1."""
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            value = g.get(prefix + released_name(name))
            p.copy_(torch.ones_like(p) if value is None else value)
    return encoder


def golden_model(script, g, prefix, backbone, width, dtype=torch.float64):
    """Student and teacher of a golden file."""
    hidden, dim = (len(g[f"{prefix}student.head.mlp.{i}.weight"]) for i in (0, 4))
    prototypes = len(g[f"{prefix}student.head.last_layer.weight_v"])
    encoder = script.Encoder(backbone, width, "mlp", hidden, dim, prototypes, False, 0)
    model = script.DINO(encoder).to(dtype)
    fill(model.student, g, prefix + "student.")
    fill(model.teacher, g, prefix + "teacher.")
    return model


@BOTH
def test_dino_loss_golden(script):
    """Loss with the centre of before, centre after, gradient, temperature of the epoch (D1, D9)."""
    g = golden("dino")
    temperatures = script.epoch_schedule(g["teacher_temp_start"], g["teacher_temp_end"], g["epochs"],
                                         g["teacher_temp_epochs"])
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, FLOAT32)):
        center = g["loss_center_start"].to(dtype)
        for t in range(3):
            student = g["loss_student"][t].to(dtype).requires_grad_()
            teacher = g["loss_teacher"][t].to(dtype).unflatten(0, (2, -1))
            temperature = temperatures[g["loss_epoch"][t]]
            loss = script.dino_loss(student.unflatten(0, (5, -1)), teacher, center, g["student_temp"], temperature)
            loss.backward()
            center = script.moved_center(center, teacher, g["center_momentum"])
            assert temperature == pytest.approx(g["loss_teacher_temp"][t].item())
            assert_close(loss.detach().double(), g["loss_value"][t], **tolerance)
            assert_close(center.double(), g["loss_center"][t], **tolerance)
            assert_close(student.grad.double(), g["loss_grad_student"][t], **tolerance)


def golden_steps(g):
    """(lr, weight decay, m, T_t) of every golden step, from the schedules under test."""
    n, steps = g["steps_per_epoch"], g["steps_per_epoch"] * g["step_epochs"]
    lr = hirl_dino.step_schedule(g["peak_lr"], g["final_lr"], steps, g["lr_warmup_epochs"] * n)
    decay = hirl_dino.step_schedule(g["weight_decay_start"], g["weight_decay_end"], steps)
    m = hirl_dino.step_schedule(g["ema_base"], 1.0, steps)
    temperature = hirl_dino.epoch_schedule(g["teacher_temp_start"], g["teacher_temp_end"], g["step_epochs"],
                                           g["step_teacher_temp_epochs"])
    return [(lr[t], decay[t], m[t], temperature[t // n]) for t in range(4)]


def take_step(g, model, optimizer, t, clip):
    """One golden DINO step but for the teacher; returns loss, logits, and gradients before clipping, by our names."""
    lr, decay, _, temperature = golden_steps(g)[t]
    dtype = model.center.dtype
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr, decay * group["decayed"]
    crops = [g[f"crop_{v}"][t].to(dtype) for v in range(5)]
    raws = hirl_dino.encode_crops(model.student.backbone, model.student.projector, crops)
    student = model.student.logits(raws)
    teacher = model.teacher.logits(model.teacher(torch.cat(crops[:2]))).unflatten(0, (2, -1))
    loss = hirl_dino.dino_loss(student, teacher, model.center, g["student_temp"], temperature)
    named = {name: p for name, p in model.student.named_parameters() if p.requires_grad}
    gradients = dict(zip(named, torch.autograd.grad(loss, named.values(), retain_graph=True)))
    frozen = t // g["steps_per_epoch"] < g["freeze_last_layer"]
    logits = model.student.logits(raws, frozen)
    optimizer.zero_grad()
    hirl_dino.dino_loss(logits, teacher, model.center, g["student_temp"], temperature).backward()
    assert (model.student.weight_v.grad is None) == frozen
    clip(model.student)
    optimizer.step()
    model.center.copy_(hirl_dino.moved_center(model.center, teacher, 0.9))
    return loss.detach(), student.detach(), teacher.detach(), gradients


def dino_steps(dtype, tolerance):
    g = golden("dino")
    model = golden_model(hirl_dino, g, "init.", Pooled(5), 5, dtype)
    optimizer = torch.optim.AdamW(hirl_dino.decay_groups(model))
    for t in range(4):
        assert golden_steps(g)[t] == pytest.approx([g[f"step_{name}"][t].item() for name in (
            "lr", "weight_decay", "ema_momentum", "teacher_temp")])
        loss, student, teacher, gradients = take_step(
            g, model, optimizer, t, clip=lambda student: hirl_dino.clip_each(student.parameters(), g["clip_grad"]))
        model.update_teacher(golden_steps(g)[t][2])
        found = {"step_loss": loss, "step_student_out": student.flatten(0, 1), "step_center": model.center,
                 "step_teacher_out": teacher.flatten(0, 1),
                 "step_last_weight": F.normalize(model.student.weight_v.detach(), dim=1)}
        for name, p in model.student.named_parameters():
            if p.requires_grad:
                found["grad." + released_name(name)] = gradients[name]
                found["after.student." + released_name(name)] = p.detach()
                if p.grad is not None:  # not in frozen epochs
                    found["grad_clipped." + released_name(name)] = p.grad
        for name, p in model.teacher.named_parameters():
            if not name.endswith("weight_g"):
                found["after.teacher." + released_name(name)] = p
        for name, value in found.items():
            assert_close(value.double(), g[name][t], **tolerance, msg=lambda m: f"{name}, step {t}: {m}")


def test_dino_steps_golden():
    """Four whole steps: logits, loss, gradients clipped one by one, frozen prototypes, AdamW, centre, teacher (D2-D5)."""
    dino_steps(torch.float64, EXACT)


def test_dino_steps_golden_in_single_precision():
    dino_steps(torch.float32, dict(rtol=1e-3, atol=2e-4))


def test_dino_steps_of_hirls_release_golden():
    """The same in HIRL's order: the teacher first, all gradients clipped together, frozen prototypes included (D2-D4)."""
    g = golden("dino")
    model = golden_model(hirl_dino, g, "init.", Pooled(5), 5)
    optimizer = torch.optim.AdamW(hirl_dino.decay_groups(model))
    for t in range(4):
        model.update_teacher(golden_steps(g)[t][2])
        norm = []

        def clip(student, t=t, norm=norm):
            norm.append(torch.stack([grad.norm() for grad in gradients_of(student, t).values()]).norm())
            for p in student.parameters():
                if p.grad is not None:
                    p.grad.mul_((g["clip_grad"] / (norm[0] + 1e-6)).clamp(max=1))

        def gradients_of(student, t):  # with the prototypes' gradient, which a frozen epoch drops only afterwards
            crops = [g[f"crop_{v}"][t].double() for v in range(5)]
            logits = student.logits(hirl_dino.encode_crops(student.backbone, student.projector, crops))
            teacher = model.teacher.logits(model.teacher(torch.cat(crops[:2]))).unflatten(0, (2, -1))
            loss = hirl_dino.dino_loss(logits, teacher, model.center, g["student_temp"], golden_steps(g)[t][3])
            named = {name: p for name, p in student.named_parameters() if p.requires_grad}
            return dict(zip(named, torch.autograd.grad(loss, named.values())))

        loss, *_ = take_step(g, model, optimizer, t, clip)
        assert_close(loss, g["hirl_loss"][t], **EXACT)
        assert_close(norm[0], g["hirl_grad_norm"][t], **EXACT)
        assert_close(model.center, g["hirl_center"][t], **EXACT)
    for who in ("student", "teacher"):
        for name, p in getattr(model, who).named_parameters():
            if not name.endswith("weight_g"):
                assert_close(p.detach(), g[f"hirl_after.{who}.{released_name(name)}"], **EXACT)


def test_free_prototypes_golden():
    """Lengths that are learnt: loss and the gradients of lengths and directions."""
    g = golden("dino")
    model = golden_model(hirl_dino, g, "init.", Pooled(5), 5)
    model.student.weight_g.data.copy_(g["free_weight_g"])
    model.student.weight_g.requires_grad_()
    crops = [g[f"crop_{v}"][0].double() for v in range(5)]
    student = model.student.logits(hirl_dino.encode_crops(model.student.backbone, model.student.projector, crops))
    teacher = model.teacher.logits(model.teacher(torch.cat(crops[:2]))).unflatten(0, (2, -1))
    loss = hirl_dino.dino_loss(student, teacher, g["loss_center_start"].double(), g["student_temp"],
                               g["teacher_temp_start"])
    loss.backward()
    assert_close(loss.item(), g["free_loss"], **EXACT)
    assert_close(model.student.weight_g.grad, g["free_grad_weight_g"], **EXACT)
    assert_close(model.student.weight_v.grad, g["free_grad_weight_v"], **EXACT)


@BOTH
def test_schedules_golden(script):
    g = golden("schedules")
    for name in ("dino", "dino_upstream", "ibot"):
        epochs, n = g[f"{name}_epochs"], g[f"{name}_steps_per_epoch"]
        peak = g[f"{name}_base_lr"] * g[f"{name}_batch_size"] / 256
        found = {"lr": script.step_schedule(peak, g[f"{name}_min_lr"], epochs * n, g[f"{name}_warmup_epochs"] * n),
                 "weight_decay": script.step_schedule(g[f"{name}_weight_decay_start"], g[f"{name}_weight_decay_end"],
                                                      epochs * n),
                 "ema_momentum": script.step_schedule(g[f"{name}_ema_base"], 1.0, epochs * n)}
        for key, schedule in found.items():
            assert len(schedule) == epochs * n
            assert_close([schedule[t] for t in g[f"{name}_step"]], g[f"{name}_{key}"].tolist(), rtol=1e-12, atol=1e-15)
        temperatures = script.epoch_schedule(g[f"{name}_teacher_temp_start"], g[f"{name}_teacher_temp_end"], epochs,
                                             g[f"{name}_teacher_temp_epochs"])
        assert_close([temperatures[e] for e in g[f"{name}_epoch"]], g[f"{name}_teacher_temp"].tolist())
    wait = g["ibot_late_start_epoch"]  # not a flag here: a patch loss that starts later
    late = [0.04] * wait + script.epoch_schedule(0.04, 0.07, g["ibot_late_epochs"] - wait,
                                                 g["ibot_late_teacher_temp_epochs"])
    assert_close([late[e] for e in g["ibot_late_epoch"]], g["ibot_late_patch_temp"].tolist())


# ---- golden numbers: iBOT and the ViT


def test_ibot_losses_golden():
    """Both terms, both centres, gradients, with and without local crops; a crop without mask adds 0 (I1, I2)."""
    g = golden("ibot")
    temperatures = [hirl_ibot.epoch_schedule(g[f"{kind}_temp_start"], g[f"{kind}_temp_end"], g["epochs"],
                                             g["teacher_temp_epochs"]) for kind in ("cls", "patch")]
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, FLOAT32)):
        center, patch_center = g["center_start"].to(dtype), g["center_patch_start"].to(dtype)
        for t in range(3):
            inputs = {name: g[f"student_{name}"][t].to(dtype).requires_grad_() for name in ("cls", "local", "patch")}
            teacher, patch_teacher = (g[f"teacher_{name}"][t].to(dtype).unflatten(0, (2, -1))
                                      for name in ("cls", "patch"))
            masks = g["masks"][t].flatten(2).bool()
            temperature, patch_temperature = (values[g["epoch"][t]] for values in temperatures)
            assert (temperature, patch_temperature) == pytest.approx((g["cls_temp"][t].item(),
                                                                      g["patch_temp"][t].item()))
            crops = torch.cat([inputs["cls"], inputs["local"]]).unflatten(0, (4, -1))
            loss_cls = hirl_ibot.dino_loss(crops, teacher, center, g["student_temp"], temperature)
            loss_patch = hirl_ibot.patch_loss(inputs["patch"].unflatten(0, (2, -1)), patch_teacher, masks, patch_center,
                                              g["student_temp"], patch_temperature)
            (loss_cls + loss_patch).backward()
            if t == 0:
                alone = g["student_cls"][0].to(dtype).requires_grad_()
                loss = hirl_ibot.dino_loss(alone.unflatten(0, (2, -1)), teacher, center, g["student_temp"], temperature)
                loss.backward()
                assert_close(loss.item(), g["nolocal_loss_cls"], **tolerance)
                assert_close(loss_patch.item(), g["nolocal_loss_patch"], **tolerance)
                assert_close(alone.grad.double(), g["nolocal_grad_student_cls"], **tolerance)
            center = hirl_ibot.moved_center(center, teacher, g["center_momentum"])
            patch_center = hirl_ibot.moved_center(patch_center, patch_teacher, g["center_momentum_patch"])
            found = {"loss_cls": loss_cls.detach(), "loss_patch": loss_patch.detach(), "center": center,
                     "center_patch": patch_center, "loss": (loss_cls + loss_patch).detach(),
                     **{f"grad_student_{name}": x.grad for name, x in inputs.items()}}
            for name, value in found.items():
                assert_close(value.double(), g[name][t], **tolerance, msg=lambda m: f"{name}, step {t}: {m}")


@pytest.mark.parametrize("kind", ("shared", "split"))
def test_heads_of_class_token_and_patches_golden(kind):
    """The projector and prototypes on every token; `split`: the same projector with prototypes of its own (I4)."""
    g = golden("ibot")
    tokens = g["head_tokens"].double().requires_grad_()
    prefix = f"head_{kind}_param."
    sizes = [len(g[prefix + f"mlp.{i}.weight"]) for i in (0, 4)]
    heads = [hirl_ibot.Encoder(nn.Identity(), 6, "mlp", *sizes, len(g[prefix + layer + ".weight_v"]), False, 0)
             for layer in ("last_layer", "last_layer" if kind == "shared" else "last_layer2")]
    heads[1].projector = heads[0].projector
    with torch.no_grad():
        for head, layer in zip(heads, ("last_layer", "last_layer" if kind == "shared" else "last_layer2")):
            head.double().weight_v.copy_(g[f"{prefix}{layer}.weight_v"])
        for ours, theirs in ((0, 0), (3, 2), (6, 4)):
            heads[0].projector[ours].weight.copy_(g[f"{prefix}mlp.{theirs}.weight"])
            heads[0].projector[ours].bias.copy_(g[f"{prefix}mlp.{theirs}.bias"])
    raws = heads[0].projector(tokens)
    cls, patch = heads[0].logits(raws[:, 0]), heads[kind == "split"].logits(raws[:, 1:])
    ((cls * g[f"head_{kind}_cotangent_cls"]).sum() + (patch * g[f"head_{kind}_cotangent_patch"]).sum()).backward()
    assert_close(cls.detach(), g[f"head_{kind}_cls"], **EXACT)
    assert_close(patch.detach(), g[f"head_{kind}_patch"], **EXACT)
    assert_close(tokens.grad, g["head_shared_grad_tokens" if kind == "shared" else "head_split_grad_tokens"], **EXACT)
    for ours, theirs in ((0, 0), (3, 2), (6, 4)):
        for name in ("weight", "bias"):
            assert_close(getattr(heads[0].projector[ours], name).grad, g[f"head_{kind}_grad.mlp.{theirs}.{name}"], **EXACT)
    assert_close(heads[0].weight_v.grad, g[f"head_{kind}_grad.last_layer.weight_v"], **EXACT)
    if kind == "split":
        assert_close(heads[1].weight_v.grad, g["head_split_grad.last_layer2.weight_v"], **EXACT)


def golden_vit(g, prefix, image_size, patch, heads):
    """A ViT with the golden parameters."""
    width, depth = len(g[prefix + "patch_embed.proj.bias"]), sum(".norm1.bias" in key for key in g if prefix in key)
    vit = common.ViT(image_size, patch, depth, heads, width, len(g[prefix + "blocks.0.mlp.fc1.bias"]))
    vit.heads = nn.Identity()
    vit.load_state_dict({name: g[prefix + timm_name(name)] for name in vit.state_dict()})
    return vit.double()


def test_vit_golden():
    """Tokens, masked tokens, a smaller picture, gradients, interpolated positions (D8)."""
    g = golden("vit")
    vit = golden_vit(g, "param.", 12, g["patch_size"], g["heads"])
    mask_token = g["param.masked_embed"].double().requires_grad_()
    x, masks = g["x"].double(), g["mask"].bool()
    assert_close(vit.tokens(x).detach(), g["tokens"], **EXACT)
    assert_close(vit(x).detach(), g["tokens"][:, 0], **EXACT)
    assert_close(vit.tokens(g["x_local"].double()).detach(), g["tokens_local"], **EXACT)
    tokens = vit.tokens(x, masks, mask_token)
    (tokens * g["cotangent"]).sum().backward()
    assert_close(tokens.detach(), g["tokens_masked"], **EXACT)
    assert_close(mask_token.grad, g["grad.masked_embed"], **EXACT)
    for name, p in vit.named_parameters():
        assert_close(p.grad, g["grad." + timm_name(name)], **EXACT)
    assert_close(vit.positions(2, 2)[0].detach(), g["pos_local"], **EXACT)
    assert_close(vit.positions(5, 5)[0].detach(), g["pos_larger"], **EXACT)
    single = vit.float().tokens(g["x"], masks, mask_token.float())
    assert_close(single.detach().double(), g["tokens_masked"], **FLOAT32)


def test_sincos_positions_golden():
    """MoCo v3's on a square; on a grid of 2 x 3 row by row, where the release numbers rows and columns crosswise (V6)."""
    g = golden("vit")
    assert_close(common.sincos_positions(3, 3, 8)[0], g["sincos_square"], **SINGLE)
    rows, columns = g["sincos_grid"].tolist()
    crosswise = common.sincos_positions(columns, rows, 8)[0]
    assert_close(crosswise, g["sincos_nonsquare"], **SINGLE)
    ours = common.sincos_positions(rows, columns, 8)[0, 1:].view(rows, columns, 8)
    for row in range(rows):
        for column in range(columns):
            for i, frequency in enumerate((1.0, 0.01)):
                expected = [f(place * frequency) for place in (row, column) for f in (math.sin, math.cos)]
                assert_close(ours[row, column, i::2].tolist(), expected, **SINGLE)


@pytest.mark.parametrize("row", range(8))
def test_block_masks_golden(row):
    """Mean share of masked patches, share of images without, largest share, as iBOT's generator draws them."""
    side, mixed, mean, error, without, largest, drawn = golden("ibot")["mask_stats"][row].tolist()
    n, side = (3000 if side < 10 else 1500), int(side)
    generator = torch.Generator().manual_seed(row)
    if mixed:
        masks = hirl_ibot.random_masks(n // 2, side, 0.5, (0.1, 0.5), generator).flatten(0, 1)
    else:
        masks = hirl_ibot.block_masks(torch.rand(n, 100, 4, generator=generator), torch.full((n,), 0.3), side)
    share = masks.double().mean(dim=(1, 2))
    assert masks.shape == (n, side, side)
    assert abs(share.mean() - mean) < 4 * max(error * (drawn / n) ** 0.5, 2e-4)
    assert abs((share == 0).double().mean() - without) < 4 * (0.25 / n + 0.25 / drawn) ** 0.5 * mixed + 1e-9
    assert share.max() <= (0.5 if mixed else 0.3) + 1e-9 and share.max() == pytest.approx(largest, abs=0.02)


# ---- golden numbers: where HIRL attaches


def level_heads(script, g, width):
    """The golden heads of all levels, and a function that compares their gradients."""
    renamed = {"0.weight": "layers.0.weight", "1.weight": "batch_norms.0.weight", "1.bias": "batch_norms.0.bias",
               "3.weight": "layers.1.weight", "3.bias": "layers.1.bias"}
    heads = nn.ModuleList(script.level_head(width).double() for _ in range(g["levels"]))
    with torch.no_grad():
        for level, head in enumerate(heads):
            for name, p in head.named_parameters():
                p.copy_(g[f"param.projections.{level}.{renamed[name]}"])

    def compare_gradients():
        for level, head in enumerate(heads):
            for name, p in head.named_parameters():
                assert_close(p.grad, g[f"grad.projections.{level}.{renamed[name]}"], **EXACT)

    return heads, compare_gradients


def path_terms(g, raw, heads):
    """(level embeddings (B, L, D), path loss) of golden drawn paths."""
    z = F.normalize(torch.stack([head(raw) for head in heads], dim=1), dim=2)
    tree = fixture_tree(g, [g["cluster2cluster_0"], g["cluster2cluster_1"]])
    return z, common.semantic_path_loss(z, tree, g["index"], g["neg_im2cluster"][:, :, 0])


def compare_hirl(g, model, raw, z, image, path):
    found = {"inst_emb": raw.detach(), "semantic_embs": z.detach().flatten(1), "semantic_loss": path.item(),
             "image_loss": image.item(), "loss_total": (image + path).item()}
    for name, value in found.items():
        assert_close(value, g[name], **EXACT, msg=lambda m: f"{name}: {m}")
    for name, p in model.student.named_parameters():
        if p.requires_grad:
            assert_close(p.grad, g["grad.model.student." + released_name(name)], **EXACT)


def test_hirl_dino_golden():
    """The clustered features are the teacher's, the heads read the student's raw projection of the first crop."""
    g = golden("hirl_dino")
    model = golden_model(hirl_dino, g, "param.model.", Pooled(5), 5)
    heads, compare_gradients = level_heads(hirl_dino, g, 5)
    feature = model.teacher(g["eval_x"].double())
    assert_close(feature, g["feature"], **EXACT)
    assert_close(F.normalize(feature, dim=1), g["feature_unit"], **EXACT)
    model.update_teacher(g["ema_momentum"])  # the release's place (D2)
    crops = [g[f"crop_{v}"].double() for v in range(4)]
    raws = hirl_dino.encode_crops(model.student.backbone, model.student.projector, crops)
    teacher = model.teacher.logits(model.teacher(torch.cat(crops[:2]))).unflatten(0, (2, -1))
    image = hirl_dino.dino_loss(model.student.logits(raws), teacher, model.center, g["student_temp"],
                                g["teacher_temp"])
    z, path = path_terms(g, raws[0], heads)
    (image + path).backward()
    compare_hirl(g, model, raws[0], z, image, path)
    compare_gradients()


def test_hirl_ibot_golden():
    """As above with a whole ViT: the heads read the class token of the masked first crop."""
    g = golden("hirl_ibot")
    vit = golden_vit(g, "param.model.student.backbone.", 12, g["patch_size"], g["heads"])
    model = golden_model(hirl_ibot, g, "param.model.", vit, 4)
    mask_token = g["param.model.student.backbone.masked_embed"].double().requires_grad_()
    heads, compare_gradients = level_heads(hirl_ibot, g, 5)
    feature = model.teacher(g["eval_x"].double())
    assert_close(feature, g["feature"], **EXACT)
    model.update_teacher(g["ema_momentum"])
    crops, masks = [g[f"crop_{v}"].double() for v in range(4)], g["masks"].bool()
    raws, patches = hirl_ibot.encode_crops(model.student, crops, masks.flatten(0, 1), mask_token)
    raws_t, patches_t = hirl_ibot.encode_crops(model.teacher, crops[:2])
    student, teacher = model.student, model.teacher
    image = hirl_ibot.dino_loss(student.logits(raws), teacher.logits(raws_t), model.center, g["student_temp"],
                                g["cls_temp"])
    image = image + hirl_ibot.patch_loss(student.logits(patches), teacher.logits(patches_t), masks.flatten(2),
                                         model.center, g["student_temp"], g["patch_temp"])
    z, path = path_terms(g, raws[0].double(), heads)
    (image + path).backward()
    compare_hirl(g, model, raws[0], z, image, path)
    compare_gradients()
    assert_close(mask_token.grad, g["grad.model.student.backbone.masked_embed"], **EXACT)
