"""Several gloo processes: what each rank must see, what a run under torchrun leaves, and how it ends.

    pytest tests/test_ranks.py
"""

import math
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import (
    IMAGES,
    ROOT,
    SCRIPTS,
    arguments,
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
        assert_close(two[1][name], value, rtol=1e-5, atol=1e-5 if name == "simsiam" else 0)  # a cosine, near 0
    for one_row, two_row in zip(one[1:], two[1:]):
        for name, value in losses(one_row).items():  # rounding grows from step to step
            assert_close(two_row[name], value, rtol=0.05, atol=0.01 if name == "simsiam" else 0)
        assert_close(two_row["knn"], one_row["knn"], rtol=0, atol=15.0)
    assert (tmp_path / "run/tree.png").exists()
    assert len((tmp_path / "run/clusters.csv").read_text().splitlines()) == IMAGES + 1
    assert done.stdout.count("epoch 1 ") == 1  # rank 0 alone speaks


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_reproduce_the_hierarchy_losses(script, pictures, tmp_path):
    """The same with the hierarchy from the first epoch on: k-means, parents and drawn paths agree as well."""
    run(tmp_path, script, arguments(script, pictures, "one", epochs=1, warmup_epochs=0))
    run_ranks(tmp_path, script, arguments(script, pictures, "two", epochs=1, warmup_epochs=0))
    one, two = log(tmp_path / "one")[-1], log(tmp_path / "two")[-1]
    assert losses(one).keys() == losses(two).keys() and one["clusters_in_use"] == two["clusters_in_use"]
    for name, value in losses(one).items():
        assert_close(two[name], value, rtol=1e-5, atol=1e-5 if name == "simsiam" else 0)  # a cosine, near 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_with_another_number_of_processes_is_stated(script, pictures, tmp_path):
    argv = arguments(script, pictures, "run", epochs=2)
    run_ranks(tmp_path, script, argv, code=143, stop_at=(3, signal.SIGTERM))
    resumed = run(tmp_path, script, argv + ["--resume"])
    assert "processes (2 before)" in resumed.out and len(log(tmp_path / "run")) == 3


def test_a_rank_that_dies_ends_the_others(pictures, tmp_path):
    """Within seconds, with a sentence: no hang."""
    ranks = start_ranks(tmp_path, SCRIPTS[0], arguments(SCRIPTS[0], pictures, "run", epochs=1), only=1,
                        stop_at=(3, signal.SIGKILL))
    assert ranks[1].finish() == -signal.SIGKILL
    assert ranks[0].finish(timeout=30) == 1
    assert "another process" in ranks[0].err and "Traceback" not in ranks[0].err


def test_shuffled_batch_norm_trains_in_two_processes(pictures, tmp_path):
    run_ranks(tmp_path, "hirl_moco", arguments("hirl_moco", pictures, "run", epochs=1, bn="shuffle"))
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
    run_ranks(tmp_path, "hirl_swav", arguments("hirl_swav", pictures, "two", **how))
    run(tmp_path, "hirl_swav", arguments("hirl_swav", pictures, "still", **how) + ["--no-reassign"])
    one, two, still = (load(tmp_path / name / "checkpoint.pt")["keep"][1] for name in ("one", "two", "still"))
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
    rank = common.rank()
    rows = torch.arange(10.0).view(5, 2)[:3 - rank] + 100 * rank  # 3, 2 and 1 rows
    single = nn.Linear(2, 1)
    for p in single.parameters():
        p.grad = torch.full_like(p, 1.0 + rank)
    plumbing.average_gradients(single.parameters())
    mine = common.local_rows(7)
    keys = plumbing.keys(lambda x: 2 * x, torch.arange(4.0).view(2, 2) + 10 * rank, "shuffle",
                          torch.Generator().manual_seed(5))
    gather = common.all_gather_rows
    return dict(rows=gather(rows), none=gather(rows[:0]), only_first=gather(rows if rank == 0 else rows[:0]),
                sum=common.all_reduce_sum(rows[:1].clone()),
                grad=single.weight.grad, slice=[mine.start, mine.stop], keys=keys)


def test_collectives(tmp_path):
    ranks = in_ranks(use_collectives, tmp_path, size=3)
    everyone = torch.cat([torch.arange(10.0).view(5, 2)[:3 - rank] + 100 * rank for rank in range(3)])
    for rank, found in enumerate(ranks):
        assert torch.equal(found["rows"], everyone) and found["none"].shape == (0, 2)
        assert torch.equal(found["only_first"], everyone[:3])
        assert torch.equal(found["sum"], torch.tensor([[300.0, 303.0]]))
        assert torch.equal(found["grad"], torch.full((1, 2), 2.0))  # the mean of 1, 2, 3
        assert torch.equal(found["keys"], 2 * (torch.arange(4.0).view(2, 2) + 10 * rank))  # shuffled and back
    assert [found["slice"] for found in ranks] == [[0, 2], [2, 4], [4, 7]]  # they cover 7 rows without overlap


def test_collectives_of_one_process_do_nothing():
    x = torch.arange(6.0).view(3, 2)
    assert common.all_gather_rows(x) is x and common.all_reduce_sum(x) is x
    assert (common.rank(), common.processes()) == (0, 1) and common.local_rows(7) == slice(0, 7)


def norm_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5),
                         nn.BatchNorm1d(5, momentum=0.3), nn.Linear(5, 5), nn.BatchNorm1d(5, affine=False)).double()


def train_norm_network():
    """Three steps of this rank's half of the batch: outputs, input gradients, averaged gradients, statistics."""
    network = plumbing.sync_batch_norm(norm_network())
    x = torch.randn(3, 8, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = torch.randn(8, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mine, outputs, gradients = common.local_rows(8), [], []
    for step in range(3):
        network.zero_grad()
        own = x[step, mine].clone().requires_grad_()
        y = network(own)
        (y * weight[mine]).sum(1).mean().backward()
        plumbing.average_gradients(network.parameters())
        outputs.append(y.detach())
        gradients.append(own.grad / common.processes())
    network.eval()
    return dict(outputs=torch.stack(outputs), inputs=torch.stack(gradients), state=network.state_dict(),
                grads=[p.grad for p in network.parameters()], eval=network(x[0, mine]).detach())


def frozen_after_synchronising():
    network = plumbing.sync_batch_norm(norm_network().requires_grad_(False).eval())
    assert any(isinstance(child, plumbing.SyncBatchNorm) for child in network)
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


def simclr_gradients():
    """NT-Xent of this rank's share of 12 images through a network with batch norm: loss and averaged gradients."""
    torch.manual_seed(0)
    network = plumbing.sync_batch_norm(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 4))).double()
    x = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    views = x[:, common.local_rows(12)].flatten(0, 1)
    z1, z2 = F.normalize(network(views), dim=1).chunk(2)
    loss = hirl_simclr.nt_xent(*map(common.all_gather_rows_with_grad, (z1, z2)), 0.2)
    loss.backward()
    plumbing.average_gradients(network.parameters())
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
    rank, size = common.rank(), common.processes()
    rows = (torch.arange(4.0).view(2, 2) + 10 * rank).requires_grad_()
    everyone = common.all_gather_rows_with_grad(rows)
    (everyone.T * torch.arange(1.0, 2 * size + 1) * 10**rank).sum().backward()  # a transposed gradient as well
    return dict(rows=everyone.detach(), grad=rows.grad)


def test_gathered_rows_send_their_gradients_home(tmp_path):
    for rank, found in enumerate(in_ranks(gather_with_gradient, tmp_path)):
        assert torch.equal(found["rows"], torch.tensor([[0.0, 1], [2, 3], [10, 11], [12, 13]]))
        weight = torch.tensor([1.0, 2]) + 2 * rank  # of its rows, from rank 0 once and from rank 1 ten times
        assert torch.equal(found["grad"], 11 * weight[:, None].expand(2, 2))
    x = torch.ones(2, 2, requires_grad=True)
    assert common.all_gather_rows_with_grad(x) is x  # one process: nothing happens


def neighbours_of_uneven_shares():
    """A rank's rows are 700, 0 and 1300 of 2000; some of them are doubles of others' rows."""
    x = F.normalize(torch.randn(2000, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    x[1500:1600] = x[:100]
    share = (slice(0, 700), slice(700, 700), slice(700, 2000))[common.rank()]
    refusal = ""
    try:
        common.nearest_neighbours(x[share].where(torch.tensor(common.rank() != 2), math.nan), 3)
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
