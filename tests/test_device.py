"""No training step waits for its device, nor mixes two: every script's own loop on a stand-in for a GPU.

The stand-in is torch's meta device, whose tensors hold no numbers: whoever needs one raises. The rest is seen by
`watch`, through whose hands every operation goes: copies to the device that wait, CPU tensors where the device's are
due. What a step may do: queue work, and copy numbers drawn on the CPU to the device with non_blocking=True.
"""

import contextlib
import importlib
from argparse import Namespace

import pytest
import torch
import torch.distributed as dist
from conftest import SCRIPTS
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import networks
import plumbing
import ranks

DEVICE, PICTURES, CLUSTERS, STEPS = torch.device("meta"), 64, (12, 6, 3), 2


def on_device(*shape):
    return torch.zeros(shape, device=DEVICE)


class Waits(AssertionError):
    """The operation and why a GPU's queue would run empty, or why it would refuse."""


DEPENDS_ON_NUMBERS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


def holds_numbers(data):
    """Whether a list or a tuple holds Python numbers, however deep."""
    return isinstance(data, list | tuple) and any(isinstance(x, int | float) or holds_numbers(x) for x in data)


class WatchCalls(TorchFunctionMode):
    """Raises Waits where Python numbers become a tensor of the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, indices = kwargs or {}, ()
        to_device = torch.device(kwargs.get("device") or "cpu") == DEVICE
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].device == DEVICE:
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
        if (function is torch.Tensor.new_tensor and args[0].device == DEVICE and holds_numbers(args[1])
                or function in (torch.tensor, torch.as_tensor) and to_device and holds_numbers(args[0])
                or any(isinstance(i, list) for i in indices)
                or any(torch.is_tensor(i) for i in indices) and isinstance(args[-1], int | float)):
            raise Waits("Python numbers become a tensor of the device, which waits: make it on the CPU and copy it")
        return function(*args, **kwargs)


class WatchOperations(TorchDispatchMode):
    """Raises Waits at an operation that waits for the device, or that two devices take part in."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operation.name().removeprefix("aten::").split(".")[0]
        inputs = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        mine = [x for x in inputs if x.device == DEVICE]
        if name in ("_to_copy", "copy_"):
            if not mine and kwargs.get("device") == DEVICE or 0 < len(mine) < len(inputs):
                if not (kwargs.get("non_blocking") or args[2:] == (True,)):
                    raise Waits(f"{name}: a copy that waits; say non_blocking=True")
            if mine and DEVICE != kwargs.get("device", DEVICE):
                raise Waits(f"{name}: the CPU reads numbers of the device")
        elif mine and name in DEPENDS_ON_NUMBERS:
            raise Waits(f"{name}: a number, or a shape, that only the device knows")
        elif mine and name in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise Waits(f"{name}: by a mask, whose count only the device knows")
        elif mine and name in ("index_fill", "index_fill_") and torch.is_tensor(args[-1]):
            raise Waits(f"{name}: with a number that only the device knows, as in the gradient of torch.trace")
        elif mine and any(x.device != DEVICE and x.ndim for x in inputs):
            raise Waits(f"{name}: tensors of two devices")
        return operation(*args, **kwargs)


@contextlib.contextmanager
def watch():
    """Raises Waits at what holds up the device's queue, or mixes devices."""
    with WatchCalls(), WatchOperations():
        yield


class Finished(Exception):
    """The steps that were asked for are done."""


class Run:
    """A plumbing.Run that keeps nothing and watches the steps alone."""

    def __init__(self, args):
        pass

    def __getattr__(self, name):  # start, write, end_step, ...
        return lambda *args, **kwargs: None

    def resume(self, device, **parts):
        return 0, 0, None

    def timed(self, batches, epoch, steps):
        for number, batch in enumerate(batches):
            if number == STEPS:
                raise Finished
            with watch():
                yield batch


def tree(x, clusters, **how):
    """A Hierarchy of rows x with these numbers of clusters, without its values."""
    def ids(n):
        return torch.zeros(n, dtype=torch.int64, device=DEVICE)

    return common.Hierarchy([on_device(k, x.shape[1]) for k in clusters], [ids(len(x)) for _ in clusters],
                            [ids(k) for k in clusters[:-1]], [on_device(k) for k in clusters])


def train_on_stand_in(script, argv, monkeypatch):
    """Two steps of the script's own main() on the stand-in, the tree there from the first epoch."""
    pixels = torch.zeros(PICTURES, 3, 32, 32, dtype=torch.uint8, device=DEVICE)
    images = common.Images([f"{i}" for i in range(PICTURES)], pixels=pixels)
    random_state = ranks.random_state
    for module, name, value in [
            (plumbing, "set_up", lambda args: DEVICE), (plumbing, "Run", Run),
            (plumbing, "evaluation", lambda args, *_: (lambda *_: on_device(PICTURES, args.dim), lambda: None)),
            (networks, "knn_of_pixels", lambda *_: None), (common, "load_data", lambda *_: (images, None)),
            (common, "hierarchical_kmeans", tree),
            (common, "nearest_neighbours", lambda x, k: torch.arange(k).repeat(PICTURES, 1)),
            (ranks, "random_state", lambda *place, device=None: random_state(*place)),  # neither of these
            (torch, "autocast", lambda *_, **how: contextlib.nullcontext())]:  # knows the stand-in
        monkeypatch.setattr(module, name, value)
    method = importlib.import_module(script)
    with pytest.raises(Finished):
        method.main(method.parse_args(argv))


SETTINGS = {  # what a preset leaves off, so that every line of a step is run
    "hcsc": [["--multi-crop"], ["--release"]], "csml": [["--level-weights", "0", "0", "1", "1"]],
    "hirl_swav": [["--queue-epoch", "0", "--optimizer", "larc"]], "hirl_simclr": [["--optimizer", "lars"]],
    "hirl_dino": [["--arch", "vit-8-96-2", "--drop-path", "0.1", "--clip-grad", "3", "--centering", "mean"]],
}
CASES = [" ".join([script, *more]) for script in SCRIPTS for more in [[], *SETTINGS.get(script, [])]]


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_its_device(case, monkeypatch, tmp_path):
    """Every script's loop, hierarchy and all."""
    monkeypatch.chdir(tmp_path)
    argv = ["--data", "textures", "--batch-size", "8", "--warmup-epochs", "0", "--clusters", *map(str, CLUSTERS)]
    script, *more = case.split()
    train_on_stand_in(script, argv + more, monkeypatch)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_step_of_two_processes_waits(script, monkeypatch, tmp_path):
    """The first of two ranks; what goes between ranks is only queued, as NCCL does."""
    monkeypatch.chdir(tmp_path)
    exchanged = []
    for name, value in [("is_initialized", lambda: True), ("get_world_size", lambda: 2), ("get_rank", lambda: 0),
                        ("all_reduce", exchanged.append), ("all_gather", lambda parts, x: exchanged.append(x))]:
        monkeypatch.setattr(dist, name, value)
    method = importlib.import_module(script)
    shuffled = ["--bn", "shuffle"] if "bn" in vars(method.parse_args([])) else []
    train_on_stand_in(script, ["--data", "textures", "--batch-size", "8", "--warmup-epochs", "0", "--clusters",
                               *map(str, CLUSTERS), *shuffled], monkeypatch)
    assert len(exchanged) > STEPS


@pytest.mark.parametrize("cropped", [False, True], ids=["whole pictures", "crops of threads"])
def test_no_view_waits_for_its_device(cropped):
    """Every operation switched on; draws stay on the CPU."""
    augmentation = common.Augmentation(size=16, blur_p=0.5, solarize_p=0.5, shuffle_p=0.5)
    draws = common.draw_view(8, augmentation, torch.Generator().manual_seed(0))
    images = torch.zeros(8, 3, 16 if cropped else 20, 16 if cropped else 24, dtype=torch.uint8, device=DEVICE)
    if cropped:
        del draws["crop"]
    with watch():
        view = common.render_view(images, draws, augmentation)
    assert view.device == DEVICE and view.shape == (8, 3, 16, 16)


@pytest.mark.parametrize("inside", [False, True], ids=["from files", "in memory"])
def test_no_batch_waits_for_its_device(inside, tmp_path):
    """What the thread that makes the batches does: no step that is queued meanwhile is held up."""
    for i in range(8):
        Image.new("RGB", (40 + i, 40)).save(tmp_path / f"{i}.png")
    images = common.folder(tmp_path)
    assert images.pixels is None  # decoded on demand
    images.pixels = torch.zeros(8, 3, 40, 40, dtype=torch.uint8, device=DEVICE) if inside else None
    view = common.Augmentation(size=16)
    planned = [(view, common.draw_view(5, view, torch.Generator().manual_seed(0)))] * 2 + [(view, {})]
    with watch():
        views = common.make_views(images, torch.arange(3, 8), planned, DEVICE, workers=2)
    assert {x.device for x in views} == {DEVICE} and [len(x) for x in views] == [5, 5, 5]


WAITING = {
    "item": lambda x: x.sum().item(),
    "comparison": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "assignment by mask": lambda x: x.__setitem__(x > 0, on_device(3)),
    "list index": lambda x: x[[1, 0]],
    "assignment of a number": lambda x: x.__setitem__(on_device(2).long(), 1.0),
    "gradient of a trace": lambda x: x.requires_grad_().trace().backward(),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "tensor": lambda x: torch.tensor([[1.0, 2.0]], device=x.device),
    "CPU index": lambda x: x[torch.tensor([1, 0])],
    "blocking copy": lambda x: torch.zeros(4).to(x.device),
    "blocking copy in place": lambda x: x.copy_(torch.zeros(4, 4)),
    "two devices": lambda x: x @ torch.zeros(4, 4),
}


@pytest.mark.parametrize("name", WAITING)
def test_the_watch_sees_what_waits(name):
    with watch(), pytest.raises(Waits):
        WAITING[name](on_device(4, 4))


# ---- few and short queues
class CountCopies(TorchDispatchMode):
    """How many tensors go to the device."""

    def __init__(self):
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.copies += function is torch.ops.aten._to_copy.default and kwargs.get("device") == DEVICE
        return function(*args, **kwargs)


def test_the_draws_of_a_view_travel_in_one_piece():
    """One number an image each, whatever they stand for, and the crops' boxes: two copies, not one for each."""
    view = common.Augmentation(size=32, solarize_p=0.2)
    draws = common.draw_view(8, view, torch.Generator().manual_seed(0))
    assert len(draws) > 5
    with CountCopies() as counted:
        common.render_view(torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device=DEVICE), draws, view)
    assert counted.copies == 2


@pytest.mark.parametrize("compiled, ranks_there, graphs", [(True, "1", True), (True, "2", False), (False, "1", False)])
def test_compiled_networks_replay_graphs_on_one_gpu(compiled, ranks_there, graphs, monkeypatch):
    """Set before the first tensor is asked for, which fails here where there is no GPU; never under several ranks."""
    config = importlib.import_module("torch._inductor.config")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)  # put back afterwards
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "zeros", lambda *shape, **how: (_ for _ in ()).throw(RuntimeError("no GPU")))
    monkeypatch.setenv("WORLD_SIZE", ranks_there)
    with config.patch({"triton.cudagraphs": False}):
        with pytest.raises(common.Stop, match="no GPU"):
            plumbing.set_up(Namespace(device="cuda", compile=compiled, seed=0))
        assert config.triton.cudagraphs == graphs


@pytest.mark.parametrize("compiled", [True, False])
def test_graphs_are_told_where_a_step_begins(compiled, monkeypatch):
    """Before the batch is handed out: what the last step's graphs gave may be written over from there on."""
    told, run = [], Namespace(args=Namespace(compile=compiled))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: told.append(None))
    seen = [len(told) for _ in plumbing.Run.timed(run, range(3), epoch=0, steps=3)]
    assert seen == ([1, 2, 3] if compiled else [0, 0, 0])
