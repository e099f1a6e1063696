"""SimSiam and MoCo v3, alone and with HIRL: golden numbers, loops one can read, values by hand, two processes.

As in test_losses.py: a `slow_` function is the oracle beside its test, golden numbers are the authors' released code
run in double precision (tests/golden/*.npz), and the code under test is always imported. What every script must do
(files, resume, faults, two processes) is in test_runs.py and test_ranks.py.

    pytest tests/test_bases1.py
"""

import copy
import inspect
import math
import re
import socket
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from test_methods import STEPS, path_term, run, saved
from torch.testing import assert_close

import common
import hirl_mocov3
import hirl_simsiam
import networks

HERE = Path(__file__).resolve().parent
EXACT = dict(rtol=1e-9, atol=1e-9)  # float64 against golden numbers and loops
RELEASED_SINGLE = dict(rtol=3e-6, atol=0)  # values that the release accumulates in float32
V, B, D = 3, 5, 7  # views, batch, embedding: all different, so that no transpose goes unnoticed


def golden(name):
    """The arrays of one golden file, float64 or int64; a bare number becomes a Python float or int."""
    arrays = np.load(HERE / "golden" / f"{name}.npz")
    tensors = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return {key: t.item() if t.ndim == 0 else t.double() if t.is_floating_point() else t for key, t in tensors.items()}


def random(*shape, seed=0):
    """Normal numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape, seed=0):
    """Random unit rows."""
    return F.normalize(random(*shape, seed=seed), dim=-1)


def on_circle(*degrees):
    """Unit vectors of the plane at these angles: a dot product is the cosine of the difference."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def lifted(function):
    """The function compiled from its source alone, as if pasted into an empty file."""
    namespace = {"torch": torch, "F": F, "math": math}
    exec(inspect.getsource(function), namespace)
    return namespace[function.__name__]


def gradient(loss, x):
    """d loss(x) / d x."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x), x)[0]


# ---- SimSiam's loss


def slow_simsiam_loss(p, z):
    """SimSiam Eq. 1-4 in loops over ordered pairs of views and over images."""
    pairs = []
    for i in range(len(p)):
        for j in range(len(p)):
            if i == j:
                continue
            for a, b in zip(p[i].tolist(), z[j].tolist()):
                dot = sum(x * y for x, y in zip(a, b))
                pairs.append(-dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b)))
    return sum(pairs) / len(pairs)


def check_simsiam_loss(simsiam_loss):
    for views in (2, V):
        p, z = random(views, B, D, seed=1), random(views, B, D, seed=2)
        assert_close(simsiam_loss(p, z).item(), slow_simsiam_loss(p, z), **EXACT)


def test_simsiam_loss_equals_the_loop():
    check_simsiam_loss(hirl_simsiam.simsiam_loss)
    check_simsiam_loss(lifted(hirl_simsiam.simsiam_loss))


def test_simsiam_loss_by_hand():
    """p of view 0 is 60 degrees off z of view 1, p of view 1 lies on z of view 0: -(1/2 + 1)/2, of any length."""
    p, z = on_circle(0, 90)[:, None] * 3, on_circle(90, 60)[:, None] * 0.2  # (2, 1, 2)
    assert_close(hirl_simsiam.simsiam_loss(p, z).item(), -0.75, **EXACT)
    assert_close(hirl_simsiam.simsiam_loss(p, p.flip(0)).item(), -1.0, **EXACT)  # the collapse scores best
    assert_close(hirl_simsiam.simsiam_loss(p, -p.flip(0)).item(), 1.0, **EXACT)


def test_simsiam_loss_gradient():
    """No gradient to z, the exact one to p, which stands upright on p: length is free."""
    p, z = random(V, B, D, seed=1).requires_grad_(), random(V, B, D, seed=2).requires_grad_()
    loss = hirl_simsiam.simsiam_loss(p, z)
    assert torch.autograd.grad(loss, z, allow_unused=True, retain_graph=True) == (None,)
    grad, = torch.autograd.grad(loss, p)
    assert_close((grad * p).sum(2).detach(), torch.zeros(V, B, dtype=torch.float64), **EXACT)
    assert torch.autograd.gradcheck(lambda x: hirl_simsiam.simsiam_loss(x, z), p)


def test_simsiam_loss_keeps_the_dtype_and_forgets_the_order():
    p, z, order = random(V, B, D, seed=1), random(V, B, D, seed=2), torch.tensor([3, 0, 4, 2, 1])
    loss = hirl_simsiam.simsiam_loss(p, z)
    assert_close(hirl_simsiam.simsiam_loss(p[:, order], z[:, order]), loss, **EXACT)
    assert_close(hirl_simsiam.simsiam_loss(p[[2, 0, 1]], z[[2, 0, 1]]), loss, **EXACT)
    assert hirl_simsiam.simsiam_loss(p.float(), z.float()).dtype == torch.float32


def test_simsiam_loss_golden():
    g = golden("simsiam")
    for case in ("only", "views"):
        p, z = g[f"{case}_p"], g[f"{case}_z"]
        assert_close(hirl_simsiam.simsiam_loss(p, z).item(), g[f"{case}_loss"], **EXACT)
        assert_close(gradient(lambda x, z=z: hirl_simsiam.simsiam_loss(x, z), p), g[f"{case}_grad_p"], **EXACT)


# ---- SimSiam: whole steps


def simsiam_names(model):
    """{name in the model: name in the golden files} of every parameter and running statistic."""
    names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    return {name: name.replace("encoder.backbone.0", "encoder.trunk").replace("encoder.projector", "encoder.fc")
            for name in names}


def simsiam_of(g, prefix):
    """The golden network: a trunk of one linear layer and ReLU, the script's projector and predictor."""
    hidden, pixels = g[f"{prefix}encoder.trunk.weight"].shape
    dim, bottleneck = g[f"{prefix}predictor.3.weight"].shape
    projector = hirl_simsiam.mlp(hidden, hidden, hidden, dim, last_norm=True)
    encoder = hirl_simsiam.Encoder(nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU()), projector)
    model = hirl_simsiam.SimSiam(encoder, dim, bottleneck).double()
    return fill(model, simsiam_names(model), g, prefix)


def fill(model, names, g, prefix):
    """The model with the golden file's numbers; running statistics may be missing there."""
    state = model.state_dict()
    for name, theirs in names.items():
        if prefix + theirs in g or "running" not in name:
            state[name].copy_(g[prefix + theirs])
    return model


def without_bias(value, theirs, g, passes):
    """A golden running mean after some passes, less the share of the frozen bias that SimSiam has before this norm."""
    if not theirs.endswith("fc.7.running_mean"):
        return value
    return value - g["init.encoder.fc.6.bias"] * (1 - 0.9**passes)


def simsiam_step(model, views):
    """(p, z), each (V, B, D), as the script computes them."""
    z = torch.stack([model.encoder(view) for view in views])
    return torch.stack([model.predictor(one) for one in z]), z


def test_simsiam_golden_steps():
    """Three steps of the official SimSiam: projections, predictions, loss, gradients, SGD and running statistics."""
    g = golden("simsiam")
    model = simsiam_of(g, "init.")
    names = simsiam_names(model)
    optimizer = torch.optim.SGD([dict(params=model.encoder.parameters()), dict(params=model.predictor.parameters())],
                                1.0, momentum=g["momentum"], weight_decay=g["weight_decay"])
    for t in range(len(g["x1"])):
        p, z = simsiam_step(model, (g["x1"][t], g["x2"][t]))
        loss = hirl_simsiam.simsiam_loss(p, z)
        for found, name in zip((*p, *z, loss, loss), ("p1", "p2", "z1", "z2", "loss", "loss_hirl")):
            assert_close(found.detach(), g[name][t], **EXACT)
        optimizer.zero_grad()
        loss.backward()
        for name, p in model.named_parameters():
            assert_close(p.grad, g["grad." + names[name]][t], **EXACT, msg=lambda m: f"{name}, step {t}: {m}")
        for group, lr in zip(optimizer.param_groups, ("lr", "lr_predictor")):
            group["lr"] = g[lr][t].item()
        optimizer.step()
        for name, theirs in names.items():
            want = without_bias(g["after." + theirs][t], theirs, g, passes=2 * (t + 1))
            assert_close(model.state_dict()[name], want, **EXACT, msg=lambda m: f"{name}, step {t}: {m}")


def test_simsiam_golden_running_statistics_of_hirl():
    """HIRL's release encodes each view twice, for the loss and for its target: only running statistics can tell."""
    g = golden("simsiam")
    model = simsiam_of(g, "init.")
    names = simsiam_names(model)
    with torch.no_grad():
        for view in (g["x1"][0], g["x2"][0]):
            model.predictor(model.encoder(view))
            model.encoder(view)
    compared = [name for name, theirs in names.items() if "after_hirl." + theirs in g]
    assert len(compared) == 8
    for name in compared:
        want = without_bias(g["after_hirl." + names[name]], names[name], g, passes=4)
        assert_close(model.state_dict()[name], want, **EXACT)


# ---- MoCo v3's loss


def slow_contrast(q, k, temperature):
    """MoCo v3 Eq. 1 in loops: cross entropy of the own key among the batch's, times 2 T."""
    terms = []
    for n in range(len(q)):
        logits = [sum(a * b for a, b in zip(q[n].tolist(), key)) / temperature for key in k.tolist()]
        terms.append(math.log(sum(math.exp(x) for x in logits)) - logits[n])
    return 2 * temperature * sum(terms) / len(terms)


def check_contrast(contrast):
    q, k = unit(B, D, seed=1), unit(B, D, seed=2)
    for temperature in (0.2, 1.0):
        assert_close(contrast(q, k, temperature).item(), slow_contrast(q, k, temperature), **EXACT)


def test_contrast_equals_the_loop():
    check_contrast(hirl_mocov3.contrast)
    check_contrast(lifted(hirl_mocov3.contrast))


def test_contrast_by_hand():
    """Two images, keys at 0 and 90 degrees. Queries on their keys; queries in between, which tell nothing apart."""
    k = on_circle(0, 90)
    assert_close(hirl_mocov3.contrast(k, k, 0.5).item(), 2 * 0.5 * math.log(1 + math.exp(-1 / 0.5)), **EXACT)
    assert_close(hirl_mocov3.contrast(on_circle(45, 45), k, 0.2).item(), 2 * 0.2 * math.log(2), **EXACT)
    assert_close(hirl_mocov3.contrast(k.flip(0), k, 0.5).item(), 2 * 0.5 * math.log(1 + math.exp(1 / 0.5)), **EXACT)


def test_contrast_gradient():
    q, k = unit(B, D, seed=1).requires_grad_(), unit(B, D, seed=2).requires_grad_()
    loss = hirl_mocov3.contrast(q, k, 0.2)
    assert torch.autograd.grad(loss, k, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.gradcheck(lambda x: hirl_mocov3.contrast(x, k, 0.2), q)


def test_contrast_keeps_the_dtype_and_forgets_the_order():
    q, k, order = unit(B, D, seed=1), unit(B, D, seed=2), torch.tensor([3, 0, 4, 2, 1])
    assert_close(hirl_mocov3.contrast(q[order], k[order], 0.2), hirl_mocov3.contrast(q, k, 0.2), **EXACT)
    assert hirl_mocov3.contrast(q.float(), k.float(), 0.2).dtype == torch.float32


def test_contrast_golden():
    g = golden("mocov3")
    q, k = F.normalize(g["only_q"], dim=1), F.normalize(g["only_k"], dim=1)
    assert_close(hirl_mocov3.contrast(q, k, g["temperature"]).item(), g["only_loss"], **EXACT)
    found = gradient(lambda x: hirl_mocov3.contrast(F.normalize(x, dim=1), k, g["temperature"]), g["only_q"])
    assert_close(found, g["only_grad_q"], **EXACT)
    tau = g["temperature"]
    for i in (0, 1):  # HIRL's crops before it weighs them: plain cross entropies
        term = hirl_mocov3.contrast(g["local_q"][i], g["local_k"][i], tau)
        assert_close(term / (2 * tau), g["local_ce_global"][i], **EXACT)
        for v, view in enumerate(g["local_views"]):
            term = hirl_mocov3.contrast(view, g["local_k"][i], tau)
            assert_close(term / (2 * tau), g["local_ce"][i, v], **EXACT)


def ranks_process(rank, port, folder):
    """One of two processes: its own queries and keys, the loss and the gradient of its own mean."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    g = golden("mocov3")
    q, k = g["ranks_q"][rank].requires_grad_(), F.normalize(g["ranks_k"][rank], dim=1)
    loss = hirl_mocov3.contrast(F.normalize(q, dim=1), k, g["temperature"])
    loss.backward()
    torch.save((loss.detach(), q.grad / 2), folder / f"{rank}.pt")  # of the mean over both
    torch.distributed.destroy_process_group()


def test_contrast_of_two_processes_golden(tmp_path):
    """Each process against the keys of both; their mean and its gradient are those of one process with all."""
    g = golden("mocov3")
    torch.multiprocessing.spawn(ranks_process, (free_port(), tmp_path), nprocs=2)
    for rank in (0, 1):
        loss, grad = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert_close(loss, g["ranks_loss"][rank], **EXACT)
        assert_close(grad, g["ranks_grad_q"][rank], **EXACT)
    whole = hirl_mocov3.contrast(F.normalize(g["ranks_q"].flatten(0, 1), dim=1),
                                 F.normalize(g["ranks_k"].flatten(0, 1), dim=1), g["temperature"])
    assert_close(whole, g["ranks_loss"].mean(), **EXACT)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ---- MoCo v3: whole steps, schedules, LARS


def mocov3_names(model, query="base_encoder", key="momentum_encoder"):
    """{name in the model: name in the golden files} of every parameter and running statistic."""
    renamed = {"encoder_q": query, "encoder_k": key, "backbone.0": "patch", "backbone.1": "trunk", "projector": "head"}
    names = {}
    for name in model.state_dict():
        if not name.endswith("num_batches_tracked"):
            names[name] = re.sub("|".join(renamed), lambda m: renamed[m[0]], name)
    return names


def mocov3_of(g, prefix, **called):
    """The golden network: a trunk of a frozen linear layer, another one and tanh; the script's heads and predictor."""
    query = called.get("query", "base_encoder")
    patch, pixels = g[f"{prefix}{query}.patch.weight"].shape
    features, dim = len(g[f"{prefix}{query}.trunk.weight"]), len(g[f"{prefix}predictor.3.weight"])
    hidden = len(g[f"{prefix}predictor.0.weight"])
    trunk = nn.Sequential(nn.Linear(pixels, patch), nn.Linear(patch, features), nn.Tanh())
    trunk[0].requires_grad_(False)
    encoder = hirl_mocov3.Encoder(trunk, hirl_mocov3.mlp(features, hidden, hidden, dim, last_norm=True))
    model = hirl_mocov3.MoCoV3(encoder, hirl_mocov3.mlp(dim, hidden, dim, last_norm=True)).double()
    return fill(model, mocov3_names(model, **called), g, prefix)


def test_mocov3_golden_steps():
    """Four steps of the official MoCo v3: queries, keys, loss, gradients, AdamW, key encoder, running statistics."""
    g = golden("mocov3")
    model, tau = mocov3_of(g, "init."), g["temperature"]
    names = mocov3_names(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=g["weight_decay"])
    for t in range(len(g["x1"])):
        done, warmup = g["epoch"][t].item() / g["epochs"], g["warmup_epochs"] / g["epochs"]
        lr = g["base_lr"] * g["batch_size"] / 256 * hirl_mocov3.warmup_cosine(done, warmup)
        ema_momentum = 1 - (1 - g["ema_base"]) * hirl_mocov3.warmup_cosine(done, 0)
        assert_close([lr, ema_momentum], [g["lr"][t].item(), g["ema_momentum"][t].item()], **EXACT)
        q = [model.predictor(model.encoder_q(g[x][t])) for x in ("x1", "x2")]
        model.update_key_encoder(ema_momentum)
        with torch.no_grad():
            k = [model.encoder_k(g[x][t]) for x in ("x1", "x2")]
        for found, name in zip((*q, *k), ("q1", "q2", "k1", "k2")):
            assert_close(found.detach(), g[name][t], **EXACT)
        q, k = [F.normalize(x, dim=1) for x in q], [F.normalize(x, dim=1) for x in k]
        halves = hirl_mocov3.contrast(q[0], k[1], tau), hirl_mocov3.contrast(q[1], k[0], tau)
        assert_close(torch.stack(halves).detach(), g["loss_halves"][t], **EXACT)
        assert_close(torch.stack([q[0] @ k[1].T, q[1] @ k[0].T]).detach() / tau, g["logits"][t], **EXACT)
        assert_close(sum(halves).detach(), g["loss"][t], **EXACT)
        assert_close(sum(halves).item(), g["loss_hirl"][t].item(), **RELEASED_SINGLE)
        optimizer.zero_grad()
        sum(halves).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert_close(p.grad, g["grad." + names[name]][t], **EXACT, msg=lambda m: f"{name}, step {t}: {m}")
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        for name, theirs in names.items():
            assert_close(model.state_dict()[name], g["after." + theirs][t], **EXACT,
                         msg=lambda m: f"{name}, step {t}: {m}")


def test_mocov3_schedules_golden():
    g = golden("schedules")
    warmup = g["mocov3_warmup_epochs"] / g["mocov3_epochs"]
    for epoch, lr, m in zip(*(g["mocov3_" + name].tolist() for name in ("epoch", "lr", "ema_momentum"))):
        done = epoch / g["mocov3_epochs"]
        peak = g["mocov3_base_lr"] * g["mocov3_batch_size"] / 256
        assert_close(peak * hirl_mocov3.warmup_cosine(done, warmup), lr, rtol=1e-9, atol=1e-15)
        assert_close(1 - (1 - g["mocov3_ema_base"]) * hirl_mocov3.warmup_cosine(done, 0), m, **EXACT)


def test_mocov3_schedule_by_hand():
    found = [hirl_mocov3.warmup_cosine(done, 0.2) for done in (0, 0.05, 0.2, 0.6, 1)]
    assert_close(found, [0.0, 0.25, 1.0, 0.5, 0.0], **EXACT)
    assert hirl_mocov3.warmup_cosine(0, 0) == 1


def test_simsiam_schedule_golden():
    """The script's own line, at whole epochs: the releases floor the epoch, this project goes on per step."""
    g = golden("schedules")
    source = Path(hirl_simsiam.__file__).read_text()
    lr_of, = re.findall(r"^ +plumbing.set_lr\(optimizer, (0.5 \* peak_lr .*)\)$", source, re.MULTILINE)
    for epoch, lr in zip(g["simsiam_epoch"].tolist(), g["simsiam_lr"].tolist()):
        names = dict(math=math, peak_lr=g["simsiam_base_lr"] * g["simsiam_batch_size"] / 256,
                     done=math.floor(epoch) / g["simsiam_epochs"])
        assert_close(eval(lr_of, names), lr, **EXACT)
    assert set(g["simsiam_lr_predictor"].tolist()) == {names["peak_lr"]}


def test_mocov3_lars_golden():
    """Three steps of MoCo v3's LARS on a matrix, a vector and a matrix of zeros; the vector's gradient is once zero."""
    g = golden("mocov3")
    tensors = [nn.Parameter(g[f"lars_init_{i}"].clone()) for i in range(3)]
    optimizer = hirl_mocov3.LARS(tensors, g["lars_lr"], momentum=g["lars_momentum"], trust=g["lars_trust"],
                                 weight_decay=g["lars_weight_decay"])
    for t in range(3):
        for i, w in enumerate(tensors):
            w.grad = g[f"lars_grads_{i}"][t].clone()
        optimizer.step()
        for i, w in enumerate(tensors):
            assert_close(w.detach(), g[f"lars_after_{i}"][t], **EXACT)


def test_lars_leaves_what_has_no_gradient():
    w = nn.Parameter(random(2, 3))
    optimizer, before = hirl_mocov3.LARS([w], 1.0, weight_decay=0.1), w.detach().clone()
    optimizer.step()
    assert torch.equal(w, before)


# ---- HIRL on either


def tree_of(g):
    """The golden file's tree; its concentrations play no part in HIRL."""
    prototypes = [g[f"centroids_{level}"] for level in range(g["levels"])]
    return common.Hierarchy(prototypes, [g[f"im2cluster_{level}"] for level in range(g["levels"])],
                            [g[f"cluster2cluster_{level}"] for level in range(g["levels"] - 1)],
                            [torch.ones(len(c)) for c in prototypes])


def golden_heads(g, head):
    """The golden level heads in the script's own, and {parameter: its name in the golden file}."""
    heads = nn.ModuleList(head(g["inst_emb"].shape[1]) for _ in range(g["levels"])).double()
    names = {}
    for name, _ in heads.named_parameters():
        level, place, kind = name.split(".")
        part = "batch_norms" if isinstance(heads[int(level)][int(place)], nn.BatchNorm1d) else "layers"
        names[name] = f"projections.{level}.{part}.{int(place) // 3}.{kind}"
    return fill(heads, names, g, "param."), names


def check_hirl(g, model, names, clustered, head, terms, tolerance):
    """What is clustered, what the heads read, both losses and the gradient of their sum."""
    heads, head_names = golden_heads(g, head)
    with torch.no_grad():
        feature = clustered.eval()(g["eval_x"])
    clustered.train()
    assert_close(feature, g["feature"], **EXACT)
    assert_close(F.normalize(feature, dim=1), g["feature_unit"], **EXACT)
    image_loss, raw = terms(g["crop_0"], g["crop_1"])
    z = F.normalize(torch.stack([head(raw) for head in heads], dim=1), dim=2)  # (B, L, D)
    path = common.semantic_path_loss(z, tree_of(g), g["index"], g["neg_im2cluster"][:, :, 0])
    assert_close(raw.detach(), g["inst_emb"], **EXACT)
    assert_close(z.detach().flatten(1), g["semantic_embs"], **EXACT)
    assert_close(path.item(), g["semantic_loss"], **EXACT)
    assert_close([image_loss.item(), (image_loss + path).item()], [g["image_loss"], g["loss_total"]], **tolerance)
    (image_loss + path).backward()
    compared = {"grad.model." + names[name]: p for name, p in model.named_parameters() if p.requires_grad}
    compared |= {"grad." + head_names[name]: p for name, p in heads.named_parameters()}
    assert sorted(compared) == sorted(key for key in g if key.startswith("grad."))
    for theirs, p in compared.items():
        assert_close(p.grad, g[theirs], **EXACT, msg=lambda m: f"{theirs}: {m}")


def test_hirl_simsiam_golden():
    """HIRL's release on SimSiam. Its frozen bias moves what is clustered only through the running mean."""
    g = golden("hirl_simsiam")
    model = simsiam_of(g, "param.model.")
    model.encoder.projector[7].running_mean -= g["param.model.encoder.fc.6.bias"]

    def terms(*views):
        p, z = simsiam_step(model, views)
        return hirl_simsiam.simsiam_loss(p, z), z[0]

    check_hirl(g, model, simsiam_names(model), model.encoder, hirl_simsiam.level_head, terms, EXACT)


def test_hirl_mocov3_golden():
    """HIRL's release on MoCo v3: heads of five layers; the momentum encoder is what is clustered."""
    g = golden("hirl_mocov3")
    called = dict(query="encoder_q", key="encoder_k")
    model = mocov3_of(g, "param.model.", **called)

    def terms(*views):
        raw = [model.encoder_q(view) for view in views]
        q = [F.normalize(model.predictor(x), dim=1) for x in raw]
        model.update_key_encoder(g["ema_momentum"])
        k = [F.normalize(model.encoder_k(view), dim=1) for view in views]
        losses = [hirl_mocov3.contrast(q[i], k[1 - i], g["temperature"]) for i in (0, 1)]
        return sum(losses), raw[0]

    check_hirl(g, model, mocov3_names(model, **called), model.encoder_k,
               lambda dim: hirl_mocov3.level_head(dim, g["head_layers"]), terms, RELEASED_SINGLE)


# ---- the networks


def test_level_heads_of_two_layers_are_the_siblings():
    ours, theirs = hirl_mocov3.level_head(D, 2), hirl_simsiam.level_head(D)
    assert [str(layer) for layer in ours] == [str(layer) for layer in theirs]


def test_mlp_is_as_described():
    kinds = [type(layer).__name__ for layer in hirl_mocov3.mlp(3, 4, 5, 6, last_norm=True)]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    last = hirl_mocov3.mlp(3, 6, last_norm=True)
    assert not last[-1].affine and last[0].bias is None and last(torch.randn(4, 3)).shape == (4, 6)
    assert [type(layer).__name__ for layer in hirl_mocov3.mlp(3, 6, last_norm=False)] == ["Linear"]


# ---- whole loops, in the plainest words: the first two epochs of a run once more, one network call a line


def path_of_two_epochs(train, clustered, epoch):
    """The tree of the second epoch, from features in evaluation mode; None in the first, the warm-up."""
    if epoch == 0:
        return None
    x = F.normalize(networks.extract_features(clustered, train, 16), dim=1)
    return common.hierarchical_kmeans(x, [12, 4, 2], temperature=0.2, seed=1)


def test_the_loop_of_hirl_simsiam_reads_as_described(tmp_path, pictures):
    """Each view its own pass, heads on z of view 0, a predictor whose learning rate stays, blocks that start at 0."""
    flags = ("--dim 20 --projector-layers 3 --projector-width 24 --predictor-width 10 --predictor-lr 3 --zero-init "
             "--path-weight 0.5").split()
    args, rows = run(hirl_simsiam, tmp_path / "run", pictures, *flags, epochs=2, base_lr=0.02)
    train, _ = common.load_data(args.data)
    torch.manual_seed(0)
    backbone, width = networks.backbone("tiny", args.stem)
    encoder = hirl_simsiam.Encoder(backbone, hirl_simsiam.mlp(width, 24, 24, 20, last_norm=True))
    predictor = hirl_simsiam.SimSiam(encoder, 20, 10).predictor
    for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
        stage[0].bn2.weight.data.zero_()
    heads = nn.ModuleList(hirl_simsiam.level_head(20) for _ in range(3))
    encoder.to(memory_format=torch.channels_last)
    trained = [(p, 1) for p in (*encoder.parameters(), *heads.parameters())] + [(p, 3) for p in predictor.parameters()]
    speed = [torch.zeros_like(p) for p, _ in trained]
    augmentation = hirl_simsiam.AUGMENTATIONS["cifar"]._replace(size=16)
    for epoch in (0, 1):
        sums, tree = {}, path_of_two_epochs(train, encoder, epoch)
        for step, index, (a, b) in common.batches(train, 16, [augmentation] * 2, seed=0, epoch=epoch):
            peak = 0.02 * 16 / 256
            lr = peak * 0.5 * (1 + math.cos(math.pi * (6 * epoch + step) / 12))
            z1, z2 = encoder(a), encoder(b)
            cosines = F.cosine_similarity(predictor(z1), z2.detach()), F.cosine_similarity(predictor(z2), z1.detach())
            terms = {"simsiam": -sum(cosine.mean() for cosine in cosines) / 2}
            if tree:
                terms["path"] = 0.5 * path_term((0, epoch, step), index, [head(z1) for head in heads], tree)
            found = torch.autograd.grad(sum(terms.values()), [p for p, _ in trained], allow_unused=True)
            for (p, factor), v, g in zip(trained, speed, found):
                if g is not None:  # SGD with momentum and weight decay
                    v.mul_(0.9).add_(g + args.weight_decay * p.data)
                    p.data -= v * (lr if factor == 1 else 3 * peak)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item() / STEPS
        for name, value in sums.items():
            assert_close(rows[epoch + 1][name], value, rtol=1e-4, atol=1e-6)
    for name, weight in saved(tmp_path / "run", "backbone.pt").items():
        assert_close(weight, backbone.state_dict()[name], rtol=1e-3, atol=1e-5)


def test_the_loop_of_hirl_mocov3_reads_as_described(tmp_path, pictures):
    """Both views as query and key, the key encoder moved in between, two schedules, AdamW, heads of three layers."""
    widths = ("--dim 20 --projector-layers 3 --head-width 24 --head-layers 3 --optimizer adamw --weight-decay 0.1 "
              "--lr-warmup 0.25 --ema-momentum 0.8 --temperature 0.3").split()
    args, rows = run(hirl_mocov3, tmp_path / "run", pictures, *widths, epochs=2, base_lr=0.02)
    train, _ = common.load_data(args.data)
    torch.manual_seed(0)
    backbone, width = networks.backbone("tiny", args.stem)
    encoder_q = hirl_mocov3.Encoder(backbone, hirl_mocov3.mlp(width, 24, 24, 20, last_norm=True))
    predictor = hirl_mocov3.mlp(20, 24, 20, last_norm=True)
    heads = nn.ModuleList(hirl_mocov3.level_head(20, 3) for _ in range(3))
    encoder_q.to(memory_format=torch.channels_last)
    encoder_k = copy.deepcopy(encoder_q).requires_grad_(False)
    optimizer = torch.optim.AdamW([*encoder_q.parameters(), *predictor.parameters(), *heads.parameters()],
                                  weight_decay=0.1)
    first = hirl_mocov3.AUGMENTATIONS["cifar"]._replace(size=16)
    for epoch in (0, 1):
        sums, tree = {}, path_of_two_epochs(train, encoder_k, epoch)
        for step, index, (a, b) in common.batches(train, 16, [first, first._replace(solarize_p=0.2)], seed=0,
                                                  epoch=epoch):
            past = 6 * epoch + step  # of 12 steps, the first 3 warm up
            rate = past / 3 if past < 3 else 0.5 * (1 + math.cos(math.pi * (past - 3) / 9))
            optimizer.param_groups[0]["lr"] = 0.02 * 16 / 256 * rate
            m = 1 - 0.2 * 0.5 * (1 + math.cos(math.pi * past / 12))
            raw1, raw2 = encoder_q(a), encoder_q(b)
            q1, q2 = F.normalize(predictor(raw1), dim=1), F.normalize(predictor(raw2), dim=1)
            for p_k, p_q in zip(encoder_k.parameters(), encoder_q.parameters()):
                p_k.data = m * p_k.data + (1 - m) * p_q.data
            k1, k2 = F.normalize(encoder_k(a), dim=1), F.normalize(encoder_k(b), dim=1)
            own = torch.arange(16)
            terms = {"mocov3": 0.6 * (F.cross_entropy(q1 @ k2.T / 0.3, own) + F.cross_entropy(q2 @ k1.T / 0.3, own))}
            if tree:
                terms["path"] = path_term((0, epoch, step), index, [head(raw1) for head in heads], tree)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item() / STEPS
        for name, value in sums.items():
            assert_close(rows[epoch + 1][name], value, rtol=1e-3, atol=0)
    for name, weight in saved(tmp_path / "run", "backbone.pt").items():
        difference = (weight - backbone.state_dict()[name]).double().abs().mean()
        assert difference < 2e-3, name  # the mean: where a gradient is 0, AdamW turns its rounding into a step


def test_mocov3_on_a_vit(tmp_path, pictures):
    """Positions and patch projection stay as they start, unless told otherwise; torchvision's class loads all."""
    vit = "--arch vit-4-32-2 --optimizer adamw --projector-layers 3 --head-width 24 --dim 20".split()
    for switches in ([], ["--no-freeze-patches"]):
        folder = tmp_path / f"run{len(switches)}"
        run(hirl_mocov3, folder, pictures, *vit, *switches, epochs=1)
        torch.manual_seed(0)
        start, _ = networks.backbone("vit-4-32-2", "3x3", 16)
        hirl_mocov3.prepare_vit(start, 16, True)
        weights = saved(folder, "backbone.pt")
        assert torch.equal(weights["encoder.pos_embedding"], hirl_mocov3.sincos_positions(4, 4, 32))
        assert torch.equal(weights["conv_proj.weight"], start.conv_proj.weight) != bool(switches)
        assert not torch.equal(weights["class_token"], start.class_token)
        network = torchvision.models.VisionTransformer(16, 4, 2, 1, 32, 128)
        missing, unexpected = network.load_state_dict(weights, strict=False)
        assert sorted(missing) == ["heads.head.bias", "heads.head.weight"] and not unexpected


def test_mocov3_vit_starts_as_described():
    torch.manual_seed(0)
    vit, _ = networks.backbone("vit-4-32-2", "3x3", 16)
    hirl_mocov3.prepare_vit(vit, 16, True)
    block = vit.encoder.layers[0]
    limits = {block.self_attention.in_proj_weight: (32, 32), block.self_attention.out_proj.weight: (32, 32),
              block.mlp[0].weight: (32, 128), block.mlp[3].weight: (128, 32), vit.conv_proj.weight: (3 * 4 * 4, 32)}
    for weight, (fan_in, fan_out) in limits.items():  # uniform up to the limit
        limit = math.sqrt(6 / (fan_in + fan_out))
        assert 0.97 * limit < weight.abs().max() <= limit
        assert_close(weight.std().item(), limit / math.sqrt(3), rtol=0.05, atol=0)
    for name, p in vit.named_parameters():
        assert not name.endswith("bias") or not p.any()
        assert p.requires_grad == (name not in ("encoder.pos_embedding", "conv_proj.weight", "conv_proj.bias"))
    assert 0 < vit.class_token.abs().max() < 1e-5
