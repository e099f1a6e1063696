"""HIRL on DINO and on iBOT, and the ViT: golden numbers, loops, values by hand, laws, whole runs in plain words.

Golden numbers as in test_golden.py, of the released code of DINO, iBOT and HIRL; D1-D12 and I1-I9 are the differences
that the scripts' docstrings list. What holds for every script (files, resume, two processes, bad input) is in
test_runs.py and test_ranks.py.
"""

import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from test_golden import fixture_tree, golden
from test_methods import STEPS, path_term, run, saved
from test_ranks import in_ranks
from torch.testing import assert_close

import common
import hirl_dino
import hirl_ibot
import hirl_mocov3
import hirl_swav
import networks
import ranks
from test_losses import EXACT, SINGLE

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
    """torchvision's name of a ViT's parameter -> timm's, by the key map of networks.ViT."""
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
    """Whole steps: logits, loss, gradients clipped one by one, frozen prototypes, AdamW, centre, teacher (D2-D5)."""
    dino_steps(torch.float64, EXACT)


def test_dino_steps_golden_in_single_precision():
    dino_steps(torch.float32, dict(rtol=1e-3, atol=2e-4))


def test_dino_steps_of_hirls_release_golden():
    """The same in HIRL's order: the teacher first, all gradients clipped together, frozen ones included (D2-D4)."""
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
    assert_close(tokens.grad, g[f"head_{kind}_grad_tokens"], **EXACT)
    for ours, theirs in ((0, 0), (3, 2), (6, 4)):
        for name, p in heads[0].projector[ours].named_parameters():
            assert_close(p.grad, g[f"head_{kind}_grad.mlp.{theirs}.{name}"], **EXACT)
    assert_close(heads[0].weight_v.grad, g[f"head_{kind}_grad.last_layer.weight_v"], **EXACT)
    if kind == "split":
        assert_close(heads[1].weight_v.grad, g["head_split_grad.last_layer2.weight_v"], **EXACT)


def golden_vit(g, prefix, image_size, patch, heads):
    """A ViT with the golden parameters."""
    width, depth = len(g[prefix + "patch_embed.proj.bias"]), sum(".norm1.bias" in key for key in g if prefix in key)
    vit = networks.ViT(image_size, patch, depth, heads, width, len(g[prefix + "blocks.0.mlp.fc1.bias"]))
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
    """MoCo v3's on a square; on a grid of 2 x 3 row by row, where the release goes crosswise (V6)."""
    g = golden("vit")
    assert_close(hirl_mocov3.sincos_positions(3, 3, 8)[0], g["sincos_square"], **SINGLE)
    rows, columns = g["sincos_grid"].tolist()
    crosswise = hirl_mocov3.sincos_positions(columns, rows, 8)[0]
    assert_close(crosswise, g["sincos_nonsquare"], **SINGLE)
    ours = hirl_mocov3.sincos_positions(rows, columns, 8)[0, 1:].view(rows, columns, 8)
    for row in range(rows):
        for column in range(columns):
            for i, frequency in enumerate((1.0, 0.01)):
                expected = [f(place * frequency) for place in (row, column) for f in (math.sin, math.cos)]
                assert_close(ours[row, column, i::2].tolist(), expected, **SINGLE)


@pytest.mark.parametrize("row", range(8))
def test_block_masks_golden(row):
    """Mean share of masked patches, share of images without, largest share, as iBOT's generator draws them."""
    side, mixed, mean, error, without, largest, drawn = golden("ibot")["mask_stats"][row].tolist()
    n, side = (1200 if side < 10 else 600), int(side)
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


# ---- loops, values by hand, laws


def slow_cross_entropy(teacher, center, teacher_temperature, student, student_temperature):
    """H(softmax((t - c) / T_t), softmax(s / T_s)) of one row, in plain numbers."""
    targets = [math.exp((t - c) / teacher_temperature) for t, c in zip(teacher.tolist(), center.tolist())]
    student = [s / student_temperature for s in student.tolist()]
    log_sum = math.log(sum(math.exp(s) for s in student))
    return -sum(t / sum(targets) * (s - log_sum) for t, s in zip(targets, student))


def slow_dino_loss(student, teacher, center, student_temperature, teacher_temperature):
    pairs = [(i, v) for i in range(2) for v in range(len(student)) if v != i]
    total = 0.0
    for i, v in pairs:
        for n in range(student.shape[1]):
            total += slow_cross_entropy(teacher[i, n], center, teacher_temperature, student[v, n], student_temperature)
    return total / student.shape[1] / len(pairs)


def test_patches_that_are_not_read_give_zeros():
    """`read` names patches in the order of the masks; the others' projections are 0, class tokens stay as they are."""
    torch.manual_seed(0)
    encoder = hirl_ibot.Encoder(*networks.backbone("vit-4-32-1", "7x7", 8), "mlp", 24, 16, 20, False, 0.1)
    crops, masks = [random(3, 3, 8, 8, seed=i).float() for i in range(3)], torch.rand(2, 3, 4) < 0.4
    raws, patches = hirl_ibot.encode_crops(encoder, crops)
    some, read = hirl_ibot.encode_crops(encoder, crops, read=masks.flatten().nonzero()[:, 0])
    assert_close(some, raws)
    assert_close(read, patches * masks[..., None])


def slow_patch_loss(student, teacher, masks, center, student_temperature, teacher_temperature):
    total, crops, images = 0.0, *masks.shape[:2]
    for i in range(crops):
        for n in range(images):
            masked = [s for s in range(masks.shape[2]) if masks[i, n, s]]
            total += sum(slow_cross_entropy(teacher[i, n, s], center, teacher_temperature, student[i, n, s],
                                            student_temperature) for s in masked) / max(1, len(masked))
    return total / crops / images


def logits(*front, seed=0):
    """Random logits (*front, 7) and, from the same seed, a centre (7,)."""
    return random(*front, 7, seed=seed), random(7, seed=seed + 50) / 2


@BOTH
def test_dino_loss_equals_the_loops(script):  # DINO Eq. 3
    for crops in (2, 5):
        (student, center), (teacher, _) = logits(crops, 3), logits(2, 3, seed=1)
        assert_close(script.dino_loss(student, teacher, center, 0.3, 0.2).item(),
                     slow_dino_loss(student, teacher, center, 0.3, 0.2), **EXACT)


def test_patch_loss_equals_the_loops():  # iBOT Eq. 2
    (student, center), (teacher, _) = logits(2, 3, 5), logits(2, 3, 5, seed=1)
    masks = random(2, 3, 5, seed=2) > 0.3
    masks[1, 2] = False
    assert_close(hirl_ibot.patch_loss(student, teacher, masks, center, 0.3, 0.2).item(),
                 slow_patch_loss(student, teacher, masks, center, 0.3, 0.2), **EXACT)


@BOTH
def test_dino_loss_by_hand(script):
    """Two outputs, two crops. Targets (3/4, 1/4) of crop 0, (1/2, 1/2) of crop 1; the student's crop 0 says (1/2, 1/2),
    crop 1 (1/4, 3/4). Crop 1 predicts crop 0: 3/4 ln 4 + 1/4 ln 4/3; crop 0 predicts crop 1: ln 2."""
    log3 = math.log(3)
    center = torch.tensor([1.0, 1.0], dtype=torch.float64)
    teacher = torch.tensor([[[1 + log3 / 2, 1.0]], [[5.0, 5.0]]], dtype=torch.float64)
    student = torch.tensor([[[2.0, 2.0]], [[0.0, log3 / 4]]], dtype=torch.float64)
    expected = (0.75 * math.log(4) + 0.25 * math.log(4 / 3) + math.log(2)) / 2
    assert_close(script.dino_loss(student, teacher, center, 0.25, 0.5).item(), expected, **EXACT)


def test_patch_loss_by_hand():
    """One crop masks one of two patches, ln 4 of four equal outputs; the other none: 0, and it counts in the mean."""
    student, teacher = torch.zeros(2, 1, 2, 4), torch.randn(2, 1, 2, 4, generator=torch.Generator().manual_seed(0))
    masks = torch.tensor([[[True, False]], [[False, False]]])
    assert_close(hirl_ibot.patch_loss(student, teacher, masks, torch.zeros(4), 0.1, 0.1).item(), math.log(4) / 2)
    assert_close(hirl_ibot.patch_loss(student, teacher, masks | True, torch.zeros(4), 0.1, 0.1).item(), math.log(4))


@BOTH
def test_dino_loss_laws(script):
    """The order of images, a constant in all logits and a common shift of teacher and centre change nothing; nobody
    predicts the own crop; the gradient reaches the student alone; indifferent students score ln P."""
    (student, center), (teacher, _) = logits(4, 3), logits(2, 3, seed=1)
    for x in (student, teacher, center):
        x.requires_grad_()
    loss = script.dino_loss(student, teacher, center, 0.3, 0.2)
    loss.backward()
    assert student.grad.abs().min() > 0 and teacher.grad is None and center.grad is None
    order = torch.tensor([2, 0, 1])
    shift = random(7, seed=9)
    for other in ((student[:, order], teacher[:, order], center), (student + 3, teacher - 2, center),
                  (student, teacher + shift, center + shift)):
        assert_close(script.dino_loss(*other, 0.3, 0.2), loss, **EXACT)
    assert_close(script.dino_loss(student * 0, teacher, center, 0.3, 0.2).item(), math.log(7), **EXACT)
    other = teacher.detach().clone()
    other[0] = other[0].flip(1)
    changed = torch.autograd.grad(script.dino_loss(student, other, center, 0.3, 0.2), student)[0]
    assert torch.equal(changed[0], student.grad[0])  # crop 0 does not see its own target
    assert all(not torch.equal(changed[v], student.grad[v]) for v in (1, 2, 3))
    assert torch.autograd.gradcheck(lambda s: script.dino_loss(s, teacher.detach(), center.detach(), 0.3, 0.2),
                                    student.detach().requires_grad_())


def test_patch_loss_laws():
    """What is not masked plays no part, on either side; the gradient reaches the student's masked patches alone."""
    (student, center), (teacher, _) = logits(2, 3, 5), logits(2, 3, 5, seed=1)
    masks = random(2, 3, 5, seed=2) > 0
    student.requires_grad_()
    loss = hirl_ibot.patch_loss(student, teacher.requires_grad_(), masks, center, 0.3, 0.2)
    loss.backward()
    assert teacher.grad is None and torch.equal(student.grad.abs().sum(-1) > 0, masks)
    changed = torch.where(masks[..., None], student, random(2, 3, 5, 7, seed=5))
    assert_close(hirl_ibot.patch_loss(changed, teacher, masks, center, 0.3, 0.2), loss, **EXACT)
    assert hirl_ibot.patch_loss(student, teacher, masks & False, center, 0.3, 0.2) == 0


@BOTH
def test_centres(script):
    """moved_center: rows of any rank count alike. balancing_center: SwAV's Sinkhorn as a centre; none without rows."""
    teacher, center = logits(2, 3, 5)
    mean = sum(teacher.view(-1, 7)) / 30
    assert_close(script.moved_center(center, teacher, 0.8), 0.8 * center + 0.2 * mean, **EXACT)
    assert_close(script.moved_center(center, teacher, 0.0), mean, **EXACT)
    balanced = F.softmax((teacher - script.balancing_center(teacher, 0.3, 3)) / 0.3, dim=-1).view(-1, 7)
    rows = F.log_softmax(teacher.view(-1, 7) / 0.3, dim=1) * 0.3  # ours starts by scaling rows, SwAV's by columns
    assert_close(balanced, hirl_swav.sinkhorn(rows, 0.3, 3), **EXACT)
    balanced = F.softmax((teacher - script.balancing_center(teacher, 0.3, 300)) / 0.3, dim=-1).view(-1, 7)
    assert_close(balanced.sum(dim=0), torch.full((7,), 30 / 7, dtype=torch.float64), rtol=1e-6, atol=0)
    assert script.balancing_center(teacher[:0], 0.3).tolist() == [0.0] * 7


@BOTH
def test_gradients_are_clipped_one_by_one(script):
    short, long, none = (torch.ones(2, requires_grad=True) for _ in range(3))
    short.grad, long.grad = torch.tensor([0.3, 0.4]), torch.tensor([3.0, 4.0])
    script.clip_each([short, long, none], 1.0)
    assert_close([short.grad.tolist(), long.grad.tolist()], [[0.3, 0.4], [0.6, 0.8]], rtol=1e-6, atol=0)
    assert none.grad is None
    script.clip_each([long], 0.0)
    assert_close(long.grad.tolist(), [0.6, 0.8], rtol=1e-6, atol=0)


@BOTH
def test_use_of_outputs_by_hand(script):
    """Four targets on two of four outputs: each certain, their mean ln 2; uniform ones: both ln 4."""
    model, certain = SimpleNamespace(chosen=torch.full((4,), -2**40)), torch.eye(4)[[1, 1, 3, 3]].view(2, 2, 4)
    found = script.DINO.in_use(model, certain, now=7, steps=2)
    assert_close([v.item() for v in found.values()], [0.0, math.log(2), 2.0])
    assert model.chosen.tolist() == [-2**40, 7, -2**40, 7]
    found = script.DINO.in_use(model, torch.full((3, 4), 0.25), now=8, steps=2)
    assert_close([v.item() for v in found.values()], [math.log(4), math.log(4), 3.0])
    assert script.DINO.in_use(model, certain[:1], now=9, steps=2)["prototypes_in_use"] == 2


@BOTH
def test_parameter_groups_and_copy(script):
    """Matrices and tokens decay, vectors not; the teacher starts as an exact copy and never trains (D5-D7)."""
    model = script.DINO(script.Encoder(*networks.backbone("vit-4-32-1", "7x7", 16), "mlp-bn", 8, 6, 5, False, 0.02))
    model.heads = nn.ModuleList([script.level_head(6)])
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in script.decay_groups(model))
    assert [group["decayed"] for group in script.decay_groups(model)] == [True, False]
    assert all(re.search(r"bias$|ln_|encoder\.ln|projector\.[14]|heads\.0\.1", name) for name in kept)
    assert {"student.backbone.class_token", "student.backbone.encoder.pos_embedding", "student.weight_v",
            "heads.0.0.weight", "heads.0.3.weight"} <= decayed and "heads.0.1.weight" in kept
    assert not any(name.startswith("teacher") or name.endswith("weight_g") for name in decayed | kept)
    for p_t, p_s in zip(model.teacher.parameters(), model.student.parameters()):
        assert torch.equal(p_t, p_s)
    for name, p in model.student.named_parameters():
        if "weight_" not in name and "conv" not in name and p.ndim > 1:
            assert 0.01 < p.std() < 0.03 and p.abs().max() < 0.11, name


# ---- the ViT


def test_vit_is_torchvisions():
    """The own picture size: torchvision's forward; the exported names load strictly but for the heads."""
    torch.manual_seed(0)
    vit, width = networks.backbone("vit-8-96-3", "3x3", 32)
    theirs = torchvision.models.VisionTransformer(32, 8, 3, 3, 96, 384)
    missing, unexpected = theirs.load_state_dict(vit.state_dict(), strict=False)
    assert missing == ["heads.head.weight", "heads.head.bias"] and not unexpected and width == 96
    theirs.heads = nn.Identity()
    x = torch.randn(2, 3, 32, 32)
    assert_close(vit(x), theirs(x))
    with torch.device("meta"):
        large, width = networks.backbone("vit_b_16", "7x7")
        expected = torchvision.models.vit_b_16().state_dict()
    shapes = {name: p.shape for name, p in large.state_dict().items()}
    assert shapes == {name: p.shape for name, p in expected.items() if not name.startswith("heads")} and width == 768


@pytest.mark.parametrize("arch", (
    "vit-5-96-4", "vit-8-96", "vit-8-x-4", "vit-8-16-4", "vit-8-48-4", "vit-8-50-4", "vit_q_16", "vit-0-32-1"))
def test_no_such_vit(arch):
    with pytest.raises(common.Stop, match="is no network"):
        networks.backbone(arch, "3x3", 32)


def test_masked_patches_are_not_seen():
    """Their pixels change nothing, those of others do; without a mask the vector is not there."""
    torch.manual_seed(0)
    vit, _ = networks.backbone("vit-4-32-2", "7x7", 16)
    x, masks = torch.randn(2, 3, 16, 16), torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, 1, 2] = True
    other = x.clone()
    other[0, :, 4:8, 8:12] = 7.0
    token = torch.randn(1, 32)
    assert torch.equal(vit.tokens(x, masks, token), vit.tokens(other, masks, token))
    assert not torch.equal(vit.tokens(x, masks, token)[0], vit.tokens(x)[0])
    assert_close(vit.tokens(x, masks, token)[1], vit.tokens(x)[1])
    assert not torch.equal(vit.tokens(x), vit.tokens(other))


def test_drop_path():
    """Factors: no block of rate 0 is skipped, means stay 1, the last block's share is the rate; a skipped one does
    nothing; a process gets its rows of the whole batch's draws; ResNets and rate 0 get none."""
    torch.manual_seed(0)
    vit, _ = networks.backbone("vit-4-32-3", "7x7", 16)
    factors = networks.drop_path(vit, 0.4, 2, 4000, torch.Generator().manual_seed(0))
    assert factors.shape == (6, 2, 4000)
    assert (factors[:2] == 1).all()
    for block, rate in enumerate((0.0, 0.2, 0.4)):
        rows = factors[2 * block:2 * block + 2]
        assert_close((rows == 0).double().mean().item(), rate, rtol=0, atol=0.02)
        assert_close(rows.double().mean().item(), 1.0, rtol=0, atol=0.02)
    x = torch.randn(2, 3, 16, 16)
    assert_close(vit.tokens(x, branches=torch.ones(6, 2)), vit.tokens(x))
    skipped = torch.ones(6, 2)
    skipped[2:, 0] = 0
    first = networks.backbone("vit-4-32-1", "7x7", 16)[0]
    first.load_state_dict({name: p for name, p in vit.state_dict().items() if not re.search("layer_[12]", name)})
    assert_close(vit.tokens(x, branches=skipped)[0], first.tokens(x)[0])
    assert networks.drop_path(vit, 0.0, 2, 4, None) is None
    assert networks.drop_path(networks.backbone("tiny", "3x3")[0], 0.1, 2, 4, None) is None


# ---- masks


@pytest.mark.parametrize("side", (2, 4, 7))
def test_block_masks_are_blocks_below_the_ratio(side):
    """Same draws, same masks; a first block alone is a rectangle whose sides are below the grid's."""
    draws = torch.rand(200, 100, 4, generator=torch.Generator().manual_seed(side))
    ratio = torch.linspace(0, 0.6, 200)
    masks = hirl_ibot.block_masks(draws, ratio, side)
    assert torch.equal(masks, hirl_ibot.block_masks(draws, ratio, side))
    count = masks.sum(dim=(1, 2))
    assert (count <= ratio * side**2).all() and (count[ratio * side**2 < 1] == 0).all() and count.max() > 0
    first = hirl_ibot.block_masks(draws[:, :1], ratio, side)
    assert first.sum(dim=(1, 2)).max() > 0 and not (first & ~masks).any()
    for mask in first:
        rows, columns = mask.any(dim=1), mask.any(dim=0)
        assert torch.equal(mask, rows[:, None] & columns) and max(rows.sum(), columns.sum()) < side


def test_ten_tries_in_vain_end_a_mask():
    """Tries that only repeat the same single patch: the first counts, ten more end it, what comes later is not read."""
    draws = torch.tensor([0.0, 0.5, 0.0, 0.0]).expand(1, 30, 4).clone()
    draws[0, 11:] = torch.tensor([0.0, 0.5, 0.9, 0.9])
    assert hirl_ibot.block_masks(draws, torch.tensor([0.5]), 4).sum() == 1
    draws[0, 10:] = torch.tensor([0.0, 0.5, 0.9, 0.9])
    assert hirl_ibot.block_masks(draws, torch.tensor([0.5]), 4).sum() == 2


def my_masks():
    return hirl_ibot.random_masks(6, 4, 0.5, (0.1, 0.5), ranks.random_state(0, 1, 2, "masks"))


def my_centres():
    teacher, center = logits(2, 6)
    mine = teacher[:, ranks.local_rows(6)]
    model = SimpleNamespace(chosen=torch.full((7,), -2**40))
    use = hirl_dino.DINO.in_use(model, mine.softmax(dim=-1), 5, 3)
    return dict(moved=hirl_dino.moved_center(center, mine, 0.9), balanced=hirl_dino.balancing_center(mine, 0.3),
                chosen=model.chosen, of_mean=use["entropy_of_mean"])


def test_two_processes_mask_as_one(tmp_path):
    """From (seed, epoch, step) for the whole batch: each process has its rows."""
    assert torch.equal(torch.cat(in_ranks(my_masks, tmp_path), dim=1), my_masks())


def test_centres_of_three_processes_are_those_of_one(tmp_path):
    whole = my_centres()
    for found in in_ranks(my_centres, tmp_path, size=3):
        for name, value in whole.items():
            assert_close(found[name], value, **EXACT)


# ---- whole runs in the plainest words


WORDS = ("--arch vit-4-32-2 --hidden 24 --dim 16 --prototypes 20 --local-crops 2 --local-size 8 --drop-path 0.3 "
         "--freeze-last-layer 1 --negative-paths 20 --clip-grad 0.05 --lr-warmup 0.2 --temperature-warmup 1 "
         "--weight-decay 3 --final-weight-decay 5 --base-lr 0.05 --ema-momentum 0.7 --init-std 0.1 "
         "--optimizer adamw").split()


def slow_drop_path(vit, x, factors, masks=None, token=None):
    """The class token and the patches, block by block; factors (4, rows)."""
    x = vit.conv_proj(x)
    if masks is not None:
        x = torch.where(masks[:, None], token.view(1, -1, 1, 1), x)
    x = torch.cat([vit.class_token.expand(len(x), 1, -1), x.flatten(2).mT], dim=1) + vit.positions(*x.shape[2:])
    for i, block in enumerate(vit.encoder.layers):
        y = block.ln_1(x)
        x = x + factors[2 * i].view(-1, 1, 1) * block.self_attention(y, y, y)[0]
        x = x + factors[2 * i + 1].view(-1, 1, 1) * block.mlp(block.ln_2(x))
    return vit.encoder.ln(x)


@BOTH
@pytest.mark.parametrize("centering", ("mean", "sinkhorn"))
def test_the_loop_reads_as_the_papers_say(script, centering, tmp_path, pictures):
    """Two epochs once more: teacher on whole global crops, old centres, one clip a tensor, frozen prototypes in the
    first epoch, decay of matrices alone, the teacher after the step, tree of the teacher's features."""
    ibot = script is hirl_ibot
    args, rows = run(script, tmp_path / "run", pictures, *WORDS, "--centering", centering, epochs=2)
    train, _ = common.load_data(args.data)
    torch.manual_seed(0)
    encoder = script.Encoder(*networks.backbone("vit-4-32-2", "7x7", 16), "mlp", 24, 16, 20, False, 0.1)
    model = script.DINO(encoder)
    token = torch.zeros(1, 32, requires_grad=True)
    heads = nn.ModuleList(script.level_head(16) for _ in range(3))
    student, teacher = model.student, model.teacher
    trained = [p for p in [*student.parameters(), *([token] if ibot else []), *heads.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": [p]} for p in trained])
    center, patch_center = torch.zeros(20), torch.zeros(20)
    view = script.AUGMENTATIONS["cifar"]._replace(size=16)
    small = view._replace(size=8, **script.LOCAL["cifar"])
    views = [view, view._replace(solarize_p=0.2), small, small]
    for epoch in (0, 1):
        sums, t_t = {}, (0.04, 0.07)[epoch]
        if epoch == 1:
            x = F.normalize(networks.extract_features(teacher, train, 16), dim=1)
            tree = common.hierarchical_kmeans(x, [12, 4, 2], temperature=0.1, seed=1)
        for step, index, crops in common.batches(train, 16, views, seed=0, epoch=epoch):
            t, place = 6 * epoch + step, (0, epoch, step)
            peak = 0.05 * 16 / 256
            lr = (0, peak)[t] if t < 2 else 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * (t - 2) / 10)) / 2
            half = (1 + math.cos(math.pi * t / 12)) / 2
            u = torch.rand(4, 4, 16, generator=ranks.random_state(*place, "drop path"))
            rate = torch.tensor([0, 0, 0.3, 0.3]).view(4, 1, 1)
            factors = (u >= rate) / (1 - rate)
            masks = (hirl_ibot.random_masks(16, 4, 0.5, (0.1, 0.5), ranks.random_state(*place, "masks")) if ibot
                     else torch.zeros(2, 16, 4, 4, dtype=torch.bool))
            with torch.no_grad():
                raw_t = [teacher.projector(teacher.backbone.tokens(crops[i])) for i in (0, 1)]
                logit_t = [teacher.logits(raw) for raw in raw_t]  # (16, 17, 20) each
                c, c_patch = center, patch_center
                if centering == "sinkhorn":
                    c = script.balancing_center(torch.stack(logit_t)[:, :, 0], t_t)
                    c_patch = script.balancing_center(torch.stack(logit_t)[:, :, 1:][masks.flatten(2)], t_t)
            raws = [student.projector(slow_drop_path(student.backbone, crops[v], factors[:, v],
                                                     *((masks[v], token) if v < 2 else ()))) for v in range(4)]
            scores = [F.linear(F.normalize(raw, dim=-1), F.normalize(student.weight_v, dim=1).detach() if epoch == 0
                               else F.normalize(student.weight_v, dim=1)) for raw in raws]
            pairs = [(i, v) for i in (0, 1) for v in range(4) if v != i]
            terms = {"dino": sum(F.cross_entropy(scores[v][:, 0] / 0.1, F.softmax((logit_t[i][:, 0] - c) / t_t, dim=1))
                                 for i, v in pairs) / 6}
            if ibot:
                terms["patch"] = sum(
                    F.cross_entropy(scores[i][n, 1:][masks[i, n].flatten()] / 0.1,
                                    F.softmax((logit_t[i][n, 1:][masks[i, n].flatten()] - c_patch) / t_t, dim=1))
                    for i in (0, 1) for n in range(16) if masks[i, n].any()) / 32
            if epoch == 1:
                terms["path"] = path_term(place, index, [head(raws[0][:, 0]) for head in heads], tree)
            center = 0.9 * center + 0.1 * torch.stack(logit_t)[:, :, 0].mean(dim=(0, 1))
            read = masks.flatten(2)[..., None] if centering == "sinkhorn" else 1  # balancing reads masked ones alone
            patch_center = 0.9 * patch_center + 0.1 * (torch.stack(logit_t)[:, :, 1:] * read).mean(dim=(0, 1, 2))
            found = torch.autograd.grad(sum(terms.values()), trained, allow_unused=True)
            for group, gradient in zip(optimizer.param_groups, found):
                p = group["params"][0]
                p.grad = gradient if gradient is None else gradient * min(1, 0.05 / (gradient.norm().item() + 1e-6))
                group["lr"], group["weight_decay"] = lr, (5 + (3 - 5) * half if p.ndim > 1 else 0)
            optimizer.step()
            m = 1 + (0.7 - 1) * half
            for p_t, p_s in zip(teacher.parameters(), student.parameters()):
                p_t.data = m * p_t.data + (1 - m) * p_s.data
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item() / STEPS
        assert rows[epoch + 1]["lr"] == pytest.approx(lr)
        for name, value in sums.items():
            assert_close(rows[epoch + 1][name], value, rtol=1e-3, atol=0, msg=lambda m: f"{name}, epoch {epoch}: {m}")
    state = saved(tmp_path / "run")["model"]
    assert_close(state["center"], center, rtol=0, atol=1e-3)
    if ibot:
        assert_close(state["patch_center"], patch_center, rtol=0, atol=1e-3)
        assert_close(state["mask_token"], token.detach(), rtol=0, atol=1e-3)
    exported = saved(tmp_path / "run", "backbone.pt")
    assert exported.keys() == torchvision.models.VisionTransformer(16, 4, 2, 1, 32, 128, num_classes=1).state_dict(
        ).keys() - {"heads.head.weight", "heads.head.bias"}
    for name, p in teacher.backbone.named_parameters():
        assert_close(exported[name], p.detach(), rtol=0, atol=2e-3)


def test_ibot_needs_patches_and_crops_no_smaller(tmp_path, pictures):  # noqa: F811
    for script, switches, words in ((hirl_ibot, "--arch tiny", "no patches to mask"),
                                    (hirl_ibot, "--arch vit-16-32-1 --image-size 16", "no patches to mask"),  # only one
                                    (hirl_ibot, "--arch vit-8-32-1 --local-crops 2 --local-size 4", "needs 8"),
                                    (hirl_dino, "--arch vit-8-32-1 --local-crops 2 --local-size 4", "needs 8")):
        with pytest.raises(common.Stop, match=words):
            run(script, tmp_path / "run", pictures, *switches.split())
        assert not (tmp_path / "run").exists()
