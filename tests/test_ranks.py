"""Several gloo processes: what each rank must see, what a run under torchrun leaves, and how it ends.

    pytest tests/test_ranks.py
"""

import math
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import (
    IMAGES,
    ROOT,
    SCRIPTS,
    STEPS,
    Play,
    arguments,
    compare_runs,
    fork,
    free_port,
    load,
    log,
    losses,
    run,
    run_ranks,
    start_ranks,
)
from torch.testing import assert_close

import common
import hirl_simclr
import hirl_swav
import plumbing
import ranks

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port"]


@pytest.fixture(scope="module", params=SCRIPTS)
def pair(request, pictures, tmp_path_factory):
    """(script, folder of a run of two ranks that nothing disturbed, what rank 0 printed); a tree from the start on."""
    folder = tmp_path_factory.mktemp("pair")
    argv = arguments(request.param, pictures, folder / "run", epochs=2, warmup_epochs=0, base_lr=0.005)
    everyone = run_ranks(folder, request.param, argv)
    assert everyone[1].out == everyone[0].err == everyone[1].err == ""  # rank 0 alone speaks
    return request.param, folder / "run", everyone[0].out


def test_two_processes_reproduce_one(pair, pictures, tmp_path):
    """Half the batch each: the first epoch to 1e-5, the same clusters in use, all pictures in a tree."""
    script, folder, printed = pair
    run(tmp_path, script, arguments(script, pictures, "one", epochs=2, warmup_epochs=0, base_lr=0.005))
    one, two = log(tmp_path / "one"), log(folder)
    assert two[0]["knn"] == one[0]["knn"] and len(two) == len(one) == 3 and one[1].keys() == two[1].keys()
    for name, value in [*losses(one[1]).items(), ("feature_std", one[1]["feature_std"])]:
        assert_close(two[1][name], value, rtol=1e-5, atol=1e-5 if name == "simsiam" else 0)  # a cosine, near 0
    assert one[1].get("clusters_in_use") == two[1].get("clusters_in_use")
    for name, value in losses(one[2]).items():
        assert_close(two[2][name], value, rtol=0.05, atol=0.01 if name == "simsiam" else 0)  # rounding grows
    assert (folder / "tree.png").exists()
    assert len((folder / "clusters.csv").read_text().splitlines()) == IMAGES + 1


def test_resumed_ranks_end_where_the_others_did(pair, pictures, tmp_path):
    """SIGTERM to either rank at a random step of a random epoch: rows, weights and tree bit for bit.

    The ranks agree to stop a step later, or at the end of the epoch.
    """
    script, undisturbed, _ = pair
    argv = arguments(script, pictures, tmp_path / "run", epochs=2, warmup_epochs=0, base_lr=0.005)
    step = zlib.crc32(script.encode()) % (2 * STEPS) + 1
    run_ranks(tmp_path, script, argv, code=143, only=step % 2, stop_at=(step, signal.SIGTERM))
    state = load(tmp_path / "run/checkpoint.pt")
    assert state["epoch"] * STEPS + state["step"] == step + (step % STEPS != 0)
    run_ranks(tmp_path, script, ["--out", tmp_path / "run", "--resume"])
    compare_runs(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("script, size, bn", (("hirl_moco", 2, "shuffle"), ("hirl_moco", 3, "sync"),
                                              ("hcsc", 3, "shuffle"), ("csml", 2, "shuffle")))
def test_both_kinds_of_batch_norm_resume(script, size, bn, pictures, tmp_path):
    """Under shuffled batch norm each rank's statistics are of other rows: they agree wherever they are used."""
    for out, stops in (("whole", ()), ("parts", (3, 6))):  # of 5 steps an epoch
        argv, done = arguments(script, pictures, out, bn=bn, batch_size=18), 0
        for stop in stops:
            run_ranks(tmp_path, script, argv + ["--resume"] * (done > 0), code=143, size=size, only=1,
                      stop_at=(stop - done, signal.SIGTERM))
            done = stop
        run_ranks(tmp_path, script, argv + ["--resume"] * (done > 0), size=size)
    compare_runs(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_torchrun_and_all_ranks_are_told_to_stop(number, pictures, tmp_path):
    """What a cluster does: every process gets the signal, the ranks once more from torchrun. Nothing is lost."""
    argv = arguments("hirl_moco", pictures, tmp_path / "run", epochs=500, eval_every=500)
    started = subprocess.Popen([*TORCHRUN, free_port(), ROOT / "hirl_moco.py", *argv], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    while not (tmp_path / "run/checkpoint.pt").exists():
        assert started.poll() is None, started.communicate()
        time.sleep(0.05)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    for pid in [*children, started.pid, *children]:
        os.kill(int(pid), number)
    out, err = started.communicate(timeout=60)
    assert err.count("continue with --resume") == 1 and not [*(tmp_path / "run").glob("*.tmp")], err
    before = load(tmp_path / "run/checkpoint.pt")
    resumed = run_ranks(tmp_path, "hirl_moco", argv + ["--resume"], code=143, stop_at=(2, signal.SIGTERM))
    after = load(tmp_path / "run/checkpoint.pt")
    steps = [state["epoch"] * STEPS + state["step"] for state in (before, after)]
    assert steps[1] == steps[0] + 2 + ((steps[0] + 2) % STEPS != 0)  # agreed upon a step later
    assert all("stopped, the state is in" not in played.err for played in resumed[1:])  # said once


@pytest.mark.parametrize("script", SCRIPTS[:1])
def test_resume_with_another_number_of_processes_is_stated(script, pictures, tmp_path):
    argv = arguments(script, pictures, "run", epochs=2)
    run_ranks(tmp_path, script, argv, code=143, stop_at=(3, signal.SIGTERM))
    resumed = run(tmp_path, script, argv + ["--resume"])
    assert "processes (2 before)" in resumed.out and len(log(tmp_path / "run")) == 3


def test_a_rank_that_is_stopped_ends_the_others(pictures, tmp_path):
    """Once it has been silent for the timeout, here 5 seconds."""
    everyone = start_ranks(tmp_path, "hirl_moco", arguments("hirl_moco", pictures, "run", epochs=500), timeout=5)
    everyone[0].wait_for(tmp_path / "run/checkpoint.pt")
    os.kill(everyone[1].process.pid, signal.SIGSTOP)
    assert everyone[0].finish(timeout=30) == 1
    assert "another process" in everyone[0].err and "Traceback" not in everyone[0].err
    everyone[1].process.kill()
    everyone[1].finish()


def test_a_folder_that_is_taken_stops_every_rank(pictures, tmp_path):
    argv = arguments("hirl_moco", pictures, "run", epochs=500)
    first = Play(tmp_path, "hirl_moco", argv)
    first.wait_for(tmp_path / "run/checkpoint.pt")
    everyone = start_ranks(tmp_path, "hirl_moco", argv + ["--resume"])
    assert [played.finish() for played in everyone] == [2, 1]
    assert "in use" in everyone[0].err and "another process" in everyone[1].err
    first.process.terminate()
    assert first.finish() == 143


@pytest.mark.parametrize("words", ("NCCL error: unhandled system error", "[Rank 1] Watchdog caught a collective",
                                   "Connection closed by peer", "the process group was aborted"))
def test_a_lost_peer_in_other_words(words, monkeypatch):
    with pytest.raises(RuntimeError):
        plumbing.explanation(RuntimeError(words))  # one process has no peer
    monkeypatch.setattr(plumbing, "processes", lambda: 2)
    code, sentence = plumbing.explanation(RuntimeError(words + "\nframe #1"))
    assert code == 1 and "another process" in sentence and "frame" not in sentence


@pytest.mark.parametrize("environment", (dict(WORLD_SIZE="2"), dict(WORLD_SIZE="x"), dict(WORLD_SIZE="2", RANK="0")))
def test_half_a_torchrun(environment, pictures, tmp_path):
    played = run(tmp_path, "hirl_moco", arguments("hirl_moco", pictures, "run"), code=2, environment=environment)
    assert "WORLD_SIZE" in played.err and "torchrun" in played.err and played.err.count("\n") == 1, played.err


def test_a_rank_that_dies_ends_the_others(pictures, tmp_path):
    """Within seconds, with a sentence: no hang."""
    everyone = start_ranks(tmp_path, SCRIPTS[0], arguments(SCRIPTS[0], pictures, "run", epochs=1), only=1,
                        stop_at=(3, signal.SIGKILL))
    assert everyone[1].finish() == -signal.SIGKILL
    assert everyone[0].finish(timeout=30) == 1
    assert "another process" in everyone[0].err and "Traceback" not in everyone[0].err


def call_in_rank(function, rank, size, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.save(function(), f"{folder}/{rank}.pt")
    ranks.all_reduce_sum(torch.zeros(1))  # as plumbing.launch leaves
    os._exit(0)


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
    run_ranks(tmp_path, "hirl_swav", arguments("hirl_swav", pictures, "two", **how))
    run(tmp_path, "hirl_swav", arguments("hirl_swav", pictures, "still", **how) + ["--no-reassign"])
    one, two, still = (load(tmp_path / name / "checkpoint.pt")["keep"][1] for name in ("one", "two", "still"))
    for level in range(3):
        assert torch.equal(one[level], two[level])
    assert (one[0] != still[0]).double().mean() > 0.2
    assert log(tmp_path / "still")[-1]["clusters_in_use"] == [12, 4, 2]


def sinkhorn_of_my_rows():
    scores = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return hirl_swav.sinkhorn(scores[ranks.local_rows(7)], 0.3)


def test_sinkhorn_of_three_processes_is_that_of_one(tmp_path):
    """Two, two and three rows."""
    assert_close(torch.cat(in_ranks(sinkhorn_of_my_rows, tmp_path, size=3)), sinkhorn_of_my_rows())


def use_collectives():
    rank = ranks.rank()
    rows = torch.arange(10.0).view(5, 2)[:3 - rank] + 100 * rank  # 3, 2 and 1 rows
    single = nn.Linear(2, 1)
    for p in single.parameters():
        p.grad = torch.full_like(p, 1.0 + rank)
    ranks.average(p.grad for p in single.parameters())
    mine = ranks.local_rows(7)
    seen = []
    keys = ranks.make_keys(lambda x: seen.append(x) or 2 * x, torch.arange(4.0).view(2, 2) + 10 * rank, "shuffle",
                           torch.Generator().manual_seed(5))
    gather = ranks.all_gather_rows
    return dict(rows=gather(rows), none=gather(rows[:0]), only_first=gather(rows if rank == 0 else rows[:0]),
                sum=ranks.all_reduce_sum(rows[:1].clone()),
                grad=single.weight.grad, slice=[mine.start, mine.stop], keys=keys, seen=seen[0],
                objects=ranks.all_gather_objects(rank))


def test_collectives(tmp_path):
    each = in_ranks(use_collectives, tmp_path, size=3)
    everyone = torch.cat([torch.arange(10.0).view(5, 2)[:3 - rank] + 100 * rank for rank in range(3)])
    for rank, found in enumerate(each):
        assert found["objects"] == [0, 1, 2] and torch.equal(found["rows"], everyone) and found["none"].shape == (0, 2)
        assert torch.equal(found["only_first"], everyone[:3])
        assert torch.equal(found["sum"], torch.tensor([[300.0, 303.0]]))
        assert torch.equal(found["grad"], torch.full((1, 2), 2.0))  # the mean of 1, 2, 3
        assert torch.equal(found["keys"], 2 * (torch.arange(4.0).view(2, 2) + 10 * rank))  # shuffled and back
    seen = torch.cat([found["seen"] for found in each])  # by the encoders of ranks 0, 1, 2: each row once, mixed
    assert torch.equal(seen[seen[:, 0].argsort()], torch.cat([found["keys"] / 2 for found in each]))
    assert any((found["seen"] // 10 != rank).any() for rank, found in enumerate(each))
    assert [found["slice"] for found in each] == [[0, 2], [2, 4], [4, 7]]  # they cover 7 rows without overlap


def test_collectives_of_one_process_do_nothing():
    x = torch.arange(6.0).view(3, 2)
    assert ranks.all_gather_rows(x) is x and ranks.all_reduce_sum(x) is x
    assert (ranks.rank(), ranks.processes()) == (0, 1) and ranks.local_rows(7) == slice(0, 7)


def statistics_of_my_rows():
    """Plain batch norms that saw different rows; then they agree."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.BatchNorm1d(7, track_running_stats=False))
    network(torch.randn(6, 5, generator=torch.Generator().manual_seed(ranks.rank())))
    before = network[1].running_mean.clone()
    run = SimpleNamespace(folder=Path("no/such"))
    plumbing.Run.resume(run, "cpu", model=network)
    ranks.average(run.statistics)
    return dict(before=before, mean=network[1].running_mean, var=network[1].running_var)


def test_running_statistics_become_those_of_all_ranks(tmp_path):
    first, second = in_ranks(statistics_of_my_rows, tmp_path)
    assert not torch.equal(first["before"], second["before"])
    assert_close(first["mean"], (first["before"] + second["before"]) / 2)
    assert torch.equal(first["mean"], second["mean"]) and torch.equal(first["var"], second["var"])


def norm_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5),
                         nn.BatchNorm1d(5, momentum=0.3), nn.Linear(5, 5), nn.BatchNorm1d(5, affine=False)).double()


def train_norm_network():
    """Three steps of this rank's half of the batch: outputs, input gradients, averaged gradients, statistics."""
    network = ranks.sync_batch_norm(norm_network())
    x = torch.randn(3, 8, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = torch.randn(8, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mine, outputs, gradients = ranks.local_rows(8), [], []
    for step in range(3):
        network.zero_grad()
        own = x[step, mine].clone().requires_grad_()
        y = network(own)
        (y * weight[mine]).sum(1).mean().backward()
        ranks.average(p.grad for p in network.parameters())
        outputs.append(y.detach())
        gradients.append(own.grad / ranks.processes())
    network.eval()
    return dict(outputs=torch.stack(outputs), inputs=torch.stack(gradients), state=network.state_dict(),
                grads=[p.grad for p in network.parameters()], eval=network(x[0, mine]).detach())


def frozen_after_synchronising():
    network = ranks.sync_batch_norm(norm_network().requires_grad_(False).eval())
    assert any(isinstance(child, ranks.SyncBatchNorm) for child in network)
    return [p.requires_grad for p in network.parameters()] + [child.training for child in network]


def test_sync_batch_norm_keeps_a_frozen_network_frozen(tmp_path):
    """The key encoder's parameters must not come back to life, and into the optimizer, by the replacement."""
    assert not any(in_ranks(frozen_after_synchronising, tmp_path)[0])


def norm_of_unequal_rows():
    """Of 9 rows, rank 0 has 3: outputs, gradients of the sum over all, statistics."""
    norm = ranks.sync_batch_norm(nn.Sequential(nn.BatchNorm1d(5))).double()
    x, weight = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine = slice(9) if ranks.processes() == 1 else slice(3) if ranks.rank() == 0 else slice(3, 9)
    own = x[mine].clone().requires_grad_()
    y = norm(own)
    (y * weight[mine]).sum().backward()
    return dict(rows=torch.cat([y.detach(), own.grad], dim=1), state=norm.state_dict())


def test_sync_batch_norm_of_unequal_rows_equals_batch_norm_on_one(tmp_path):
    """iBOT's masked patches: as many as each rank's masks have."""
    one, everyone = norm_of_unequal_rows(), in_ranks(norm_of_unequal_rows, tmp_path)
    assert_close(torch.cat([rank["rows"] for rank in everyone]), one["rows"])
    for rank in everyone:
        assert_close(rank["state"], one["state"])


def test_sync_batch_norm_on_two_ranks_equals_batch_norm_on_one(tmp_path):
    one, (first, second) = train_norm_network(), in_ranks(train_norm_network, tmp_path)
    for name, dim in (("outputs", 1), ("inputs", 1), ("eval", 0)):
        assert_close(torch.cat([first[name], second[name]], dim), one[name])
    for rank in (first, second):
        assert_close(rank["grads"], one["grads"])
        assert_close(dict(rank["state"]), dict(one["state"]))  # running statistics and their counter too


def test_on_a_gpu_batch_norms_are_synchronised_by_torch(monkeypatch):
    monkeypatch.setattr(ranks, "processes", lambda: 2)
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda norm, x: (norm.process_group, norm.weight))
    norm = ranks.sync_batch_norm(nn.BatchNorm2d(3))
    assert norm(SimpleNamespace(device=torch.device("cuda"))) == (None, norm.weight)


def simclr_gradients():
    """NT-Xent of this rank's share of 12 images through a network with batch norm: loss and averaged gradients."""
    torch.manual_seed(0)
    network = ranks.sync_batch_norm(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 4))).double()
    x = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    views = x[:, ranks.local_rows(12)].flatten(0, 1)
    z1, z2 = F.normalize(network(views), dim=1).chunk(2)
    loss = hirl_simclr.nt_xent(*[ranks.all_gather_rows(z, equal=True) for z in (z1, z2)], 0.2)
    loss.backward()
    ranks.average(p.grad for p in network.parameters())
    return dict(loss=loss.detach(), grads=[p.grad for p in network.parameters()])


@pytest.mark.parametrize("size", (2, 3))
def test_negatives_of_all_processes_and_their_gradients(size, tmp_path):
    """The batch shared by two or three processes: the loss and the gradients of one."""
    one = simclr_gradients()
    for rank in in_ranks(simclr_gradients, tmp_path, size):
        assert_close(rank["loss"], one["loss"])
        assert_close(rank["grads"], one["grads"])


def gather_with_gradient():
    """Each rank weighs the gathered rows in its own way."""
    rank, size = ranks.rank(), ranks.processes()
    rows = (torch.arange(4.0).view(2, 2) + 10 * rank).requires_grad_()
    everyone = ranks.all_gather_rows(rows, equal=True)
    (everyone.T * torch.arange(1.0, 2 * size + 1) * 10**rank).sum().backward()  # a transposed gradient as well
    return dict(rows=everyone.detach(), grad=rows.grad)


def test_gathered_rows_send_their_gradients_home(tmp_path):
    for rank, found in enumerate(in_ranks(gather_with_gradient, tmp_path)):
        assert torch.equal(found["rows"], torch.tensor([[0.0, 1], [2, 3], [10, 11], [12, 13]]))
        weight = torch.tensor([1.0, 2]) + 2 * rank  # of its rows, from rank 0 once and from rank 1 ten times
        assert torch.equal(found["grad"], 11 * weight[:, None].expand(2, 2))
    x = torch.ones(2, 2, requires_grad=True)
    assert ranks.all_gather_rows(x, equal=True) is x  # one process: nothing happens


def neighbours_of_uneven_shares():
    """A rank's rows are 700, 0 and 1300 of 2000; some of them are doubles of others' rows."""
    x = F.normalize(torch.randn(2000, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    x[1500:1600] = x[:100]
    share = (slice(0, 700), slice(700, 700), slice(700, 2000))[ranks.rank()]
    refusal = ""
    try:
        common.nearest_neighbours(x[share].where(torch.tensor(ranks.rank() != 2), math.nan), 3)
    except ValueError as error:
        refusal = str(error)
    return dict(x=x, found=common.nearest_neighbours(x[share], 5), refusal=refusal)


def test_nearest_neighbours_over_ranks(tmp_path):
    everyone = in_ranks(neighbours_of_uneven_shares, tmp_path, size=3)
    assert [len(rank["found"]) for rank in everyone] == [700, 0, 1300]
    one = common.nearest_neighbours(everyone[0]["x"], 5)
    assert torch.equal(torch.cat([rank["found"] for rank in everyone]), one)
    assert (one[:100, 0] == torch.arange(1500, 1600)).all()
    assert all("1300 of 2000" in rank["refusal"] for rank in everyone)  # all learn of it, none waits for another
