"""The claims of this project; the name of a test states its claim. Two minutes on two CPU cores.

First the two claims that SimSiam stands on: the stop-gradient, and the collapse without it. Then the method,
in the order of simsiam.py, and the scripts: a training step, data, a run, resuming it, evaluation, mistakes.
Every expected value is computed independently: from the equation written out, finite differences,
torchvision's own operations, a loop, or the paper's tables.
"""

import collections
import copy
import functools
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the CPU, on every machine; set it to 0 to try a GPU

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import eval as evaluation
import simsiam
import train
from simsiam import (
    D, SimSiam, build_backbone, build_predictor, build_projector, cross_entropy, effective_rank, knn_predict,
    negative_cosine, simsiam_loss, spread, unit,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------
# Helpers

HERE = Path(__file__).parent
torch.set_num_threads(1)  # the tensors are small: threads that wait for each other would cost minutes
ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
ENV |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
# A network and a schedule so small that a whole run takes a second. The dtype is always given, because
# the dtype of --amp auto depends on the machine.
TINY = "--amp off --width 2 --dim 16 --hidden 16 --batch-size 100 --epochs 2 --knn-every 0".split()
TINY += ["--view-scale", "0.5"]
FOLDER = "--amp off --arch convnet --width 2 --dim 16 --hidden 16 --image-size 16 --batch-size 4".split()
FOLDER += ["--epochs", "1", "--workers", "0"]
all_textures = functools.cache(train.textures)


def few_textures(count, seed):  # a tenth of them (500 and 200), shuffled
    order = torch.randperm(count // 10, generator=torch.Generator().manual_seed(seed))
    return tuple(x[order] for x in all_textures(count // 10, seed))


train.textures = few_textures


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Runs every test in an empty folder and with the same random seed."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    run = tmp_path_factory.mktemp("once") / "run"
    train.main([*TINY, "--epochs", "1", "--out", str(run)])
    return run


@pytest.fixture
def pretrained(trained_once):
    """A run's folder, `run`."""
    return str(shutil.copytree(trained_once, "run"))


def args_of(*argv):
    return train.get_args([str(word) for word in argv])[0]


def trainer_of(args):
    """A Trainer, and the test images."""
    images, test = train.load_data(args)
    args.mean, args.std = images.mean, images.std
    return train.Trainer(args, images), test


def trainer(*flags):
    return trainer_of(args_of(*TINY, *flags))[0]


def batches(t, count=1):
    """The first batches of a Trainer, with their indices."""
    args = t.args
    requests = train.schedule(len(t.images), args.batch_size, args.seed, range(count), args.pairs)
    return list(train.make_loader(t.images, requests, workers=0))


def views_of(t, batch, step, rank=0):
    """x1 and x2 of a step, as Trainer.update makes them."""
    torch.manual_seed(train.seed_of(t.args.seed, step, rank))
    views = train.two_views(batch, t.images.view_size, t.args)
    return [v2.functional.normalize(x, t.images.mean, t.images.std) for x in views]


def fails(argv, capsys, main=train.main):
    """Checks that a command exits with status 2 and one error line. Returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in argv])
    *warnings, line = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and line.startswith("error: ") and len(warnings) <= 1, line
    return line


def checkpoint_of(run):
    return torch.load(Path(run, "checkpoint.pt"), weights_only=True)


def rows(run):
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def kinds(module):
    return [type(m).__name__ for m in module]


def linears(module):
    return [(m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear)]


def cosine_loss(p, z):
    return -F.cosine_similarity(p, z).mean()


def entropy_loss(p, z):
    return F.cross_entropy(p, z.softmax(dim=1))  # torch's, with class probabilities as the target


def equation_4(p1, p2, z1, z2, distance=cosine_loss):
    return distance(p1, z2.detach()) / 2 + distance(p2, z1.detach()) / 2


def write_image(path, pixels):
    """pixels: uint8 (3, H, W), or a color that fills 40 x 36."""
    pixels = torch.as_tensor(pixels, dtype=torch.uint8)
    pixels = pixels.view(3, 1, 1).expand(3, 40, 36) if pixels.ndim == 1 else pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    v2.functional.to_pil_image(pixels).save(path)


def write_folder(root, per_class=6, classes=("cat", "dog"), parts=("train", "val")):
    """Images of random pixels and mixed sizes, half JPEG and half PNG."""
    for part, name, i in itertools.product(parts, classes, range(per_class)):
        pixels = torch.randint(256, (3, 40, 36 + i), dtype=torch.uint8)
        write_image(root / part / name / f"{i}.{'png' if i % 2 else 'jpg'}", pixels)
    return root


def assert_uniform(values, low, high):
    """Kolmogorov-Smirnov test at the level of 0.1 %."""
    n, values = len(values), values.double().sort().values
    assert low - 1e-3 < values[0] and values[-1] < high + 1e-3
    expected = (values - low) / (high - low)
    assert (torch.arange(1, n + 1) / n - expected).abs().max() < 1.95 / math.sqrt(n) + 1 / n


def assert_unrelated(a, b):
    """The correlation of n independent pairs has a std of 1 / sqrt(n); we allow four times that."""
    assert len(a) > 50 and a.double().std() > 0 < b.double().std()
    assert torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].abs() < 4 / math.sqrt(len(a))


# ------------------------------------------------------------------------------------------------
# The loss and its stop-gradient


@pytest.mark.parametrize("similarity", [negative_cosine, cross_entropy])
def test_the_stop_gradient_blocks_the_gradient_of_z_and_not_that_of_p(similarity):
    p1, p2, z1, z2 = leaves = [torch.randn(4, 8, requires_grad=True) for _ in range(4)]
    D(p1, z2, similarity=similarity).backward()
    assert z2.grad is None and p1.grad.abs().sum() > 0
    simsiam_loss(*leaves, similarity=similarity).backward()
    assert z1.grad is None and z2.grad is None and p2.grad.abs().sum() > 0
    simsiam_loss(*leaves, similarity=similarity, stop_gradient=False).backward()
    assert z1.grad.abs().sum() > 0 and z2.grad.abs().sum() > 0


def test_D_equals_equation_1_and_its_gradient_equals_finite_differences():
    p, z = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    total = 0.0
    for a, b in zip(p.tolist(), z.tolist()):
        dot = sum(i * j for i, j in zip(a, b))
        total -= dot / math.sqrt(sum(i * i for i in a)) / math.sqrt(sum(j * j for j in b))
    assert D(p, z).item() == pytest.approx(total / 5, abs=1e-6)
    assert torch.autograd.gradcheck(lambda p: D(p, z), p)
    assert torch.autograd.gradcheck(lambda p, z: D(p, z, stop_gradient=False), (p, z))


def test_each_prediction_is_compared_with_the_other_view():
    p1, p2, z1, z2 = torch.randn(4, 5, 8)
    assert simsiam_loss(p1, p2, z1, z2).item() == pytest.approx(equation_4(p1, p2, z1, z2).item())
    assert simsiam_loss(z2, z1, z1, z2).item() == pytest.approx(-1)  # perfect predictions of the other view
    assert simsiam_loss(z1, z2, z1, z2).item() > -0.9  # predictions of the same view
    assert simsiam_loss(p1, p2, z1, z2, symmetric=False).item() == pytest.approx(cosine_loss(p1, z2).item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_loss_is_computed_in_float32_or_better_also_under_autocast(dtype):
    """The cross-entropy is the one with softmax(z) as the target (Sec. 4.5)."""
    p, z = torch.randn(4, 8).to(dtype), torch.randn(4, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        cosine = simsiam_loss(p, p, z, z)
        entropy = simsiam_loss(p, p, z, z, similarity=cross_entropy)
    assert cosine.dtype == entropy.dtype == unit(p).dtype == torch.promote_types(dtype, torch.float32)
    assert cosine.item() == pytest.approx(cosine_loss(p.double(), z.double()).item(), abs=1e-6)
    assert entropy.item() == pytest.approx(entropy_loss(p.double(), z.double()).item(), abs=1e-5)
    assert D(0 * p, z).item() == 0 and D(p, 0 * z).item() == 0  # not nan


# ------------------------------------------------------------------------------------------------
# Collapse, in short trainings

SHORT = "--width 4 --dim 64 --hidden 64 --epochs 6 --batch-size 32 --base-lr 1.5 --amp off".split()
SHORT += "--view-scale 0.5 --mean .5 .5 .5 --std .25 .25 .25".split()


def short_run(*flags, seeds=(0, 1)):
    """Means over the seeds of loss and spread in the last of six epochs on 320 textures."""
    ends = []
    for seed in seeds:
        args = args_of(*SHORT, "--seed", seed, *flags)
        t = train.Trainer(args, train.Images(*all_textures(320, seed=0), train.PATTERNS, args))
        for batch, indices in batches(t, t.total_steps):
            if t.step % t.steps_per_epoch == 0:
                t.sums.zero_()
            t.update(batch, indices)
        ends.append(t.sums / t.steps_per_epoch)
    return torch.stack(ends).mean(dim=0).tolist()


@pytest.fixture(scope="session")
def healthy():
    return short_run()


def test_with_stop_gradient_the_spread_stays_and_without_it_the_spread_is_lost(healthy):
    """Fig. 2. With BN on z, some spread remains (see simsiam.spread); without that BN, almost none."""
    loss, spread_ = short_run("--no-stop-gradient")
    assert spread_ < 0.65 < 0.75 < healthy[1] and loss < healthy[0]
    assert short_run("--no-stop-gradient", "--bn", "hidden", seeds=[0])[1] < 0.1


def test_collapse_is_diagnosed_and_a_healthy_run_is_not():
    """Measured on textures and CIFAR-10: runs of the README's tables, seed 0."""
    diagnosis = lambda *run: train.diagnose([dict(loss=x, spread=y) for x, y in run])  # noqa: E731
    healthy = [(-0.44, 0.87), (-0.71, 0.88), (-0.88, 0.90), (-0.89, 0.91), (-0.91, 0.92), (-0.94, 0.94)]
    hidden_bn = [(-0.65, 0.62), (-0.75, 0.61), (-0.79, 0.69), (-0.87, 0.67), (-0.90, 0.72), (-0.94, 0.75)]
    uneven = [(loss, 0.95) for loss in (-0.02, -0.05, -0.08, -0.15, -0.2, -0.2, -0.25, -0.25)]
    for run in (healthy, hidden_bn, uneven):
        assert all(diagnosis(*run[: i + 1]) == "" for i in range(len(run)))
    no_stop_gradient, no_bn, no_h = [(-0.68, 0.66), (-0.88, 0.44)], [(-0.86, 0.46)], [(-0.95, 0.27)]
    for run in (no_stop_gradient, no_bn, no_h):
        assert diagnosis(*run).startswith("collapse ") and "stop-gradient" in diagnosis(*run)
    no_h_on_textures = [(-0.71, 0.74), (-0.87, 0.61), (-0.93, 0.61), (-0.97, 0.62)]
    assert diagnosis(*no_h_on_textures).startswith("partial collapse ")
    fixed = [(-0.11, 0.85), (-0.15, 0.75), (-0.20, 0.72), (-0.22, 0.73), *[(-0.22, 0.7)] * 4]  # Table 1b
    assert "which is not collapse" in diagnosis(*fixed) and diagnosis(*fixed[:3]) == ""


def test_a_run_warns_of_collapse_once_and_not_if_the_loss_is_the_cross_entropy(capsys):
    for flags, times in (["--out=a"], 1), (["--out=b", "--similarity=cross-entropy"], 0):
        t, test = trainer_of(args_of(*TINY, "--epochs", 20, *flags))
        for epoch in (2, 3, 4):
            t.sums.copy_(torch.tensor([-0.99, 0.05]) * t.steps_per_epoch)
            train.report(t, test, epoch, seconds=1.0)
        assert capsys.readouterr().out.count("warning: collapse") == times


# ------------------------------------------------------------------------------------------------
# The networks, as the paper describes them

LINEAR, BN, RELU = "Linear", "BatchNorm1d", "ReLU"


def test_the_default_heads_are_those_of_section_3():
    """Projector: 3 layers of 2048; h: 2048 -> 512 -> 2048. The BN on z has no scale and shift (Sec. 4.4)."""
    model = SimSiam(nn.Flatten(), 8)
    assert linears(model.projector) == [(8, 2048), (2048, 2048), (2048, 2048)]
    assert linears(model.predictor) == [(2048, 512), (512, 2048)]
    assert linears(SimSiam(nn.Flatten(), 8, dim=64).predictor) == [(64, 16), (16, 64)]  # d / 4 (App. B)
    assert all(w.requires_grad for w in model.parameters())
    assert [m.affine for m in model.modules() if kinds([m]) == [BN]] == [True, True, False, True]
    assert build_projector(8, 6, 4, layers=3, affine=True)[-1].affine


@pytest.mark.parametrize("bn, projector, predictor", [
    ("none", [LINEAR, RELU, LINEAR], [LINEAR, RELU, LINEAR]),
    ("hidden", [LINEAR, BN, RELU, LINEAR], [LINEAR, BN, RELU, LINEAR]),
    ("default", [LINEAR, BN, RELU, LINEAR, BN], [LINEAR, BN, RELU, LINEAR]),
    ("all", [LINEAR, BN, RELU, LINEAR, BN], [LINEAR, BN, RELU, LINEAR, BN]),
])  # fmt: skip
def test_BN_is_in_the_layers_that_table_3_names(bn, projector, predictor):
    """A Linear has a bias unless a BN follows, which would cancel it. There is no ReLU on an output."""
    model = SimSiam(nn.Flatten(), 8, dim=4, hidden=6, layers=2, predictor_hidden=3, bn=bn)
    for head, expected in ((model.projector, projector), (model.predictor, predictor)):
        assert kinds(head) == expected
        for layer, following in zip(head, [*expected[1:], None]):
            assert not isinstance(layer, nn.Linear) or (layer.bias is None) == (following == BN)
    with pytest.raises(ValueError, match="unknown bn 'al'"):
        SimSiam(nn.Flatten(), 8, bn="al")


def test_resnets_are_torchvisions_without_fc_and_blocks_start_as_their_shortcuts():
    x = torch.rand(2, 3, 64, 64)
    for arch, dim, last in (("resnet18", 512, "bn2"), ("resnet50", 2048, "bn3")):
        net, feature_dim = build_backbone(arch)
        theirs = torchvision.models.get_model(arch)
        missing, unexpected = theirs.load_state_dict(net.state_dict(), strict=False)
        assert feature_dim == dim and sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected
        ends = [w for name, w in net.state_dict().items() if re.search(rf"layer.*{last}.weight", name)]
        assert ends and not any(w.any() for w in ends)  # App. A: the last BN of each block starts at zero
        theirs.fc = nn.Identity()
        torch.testing.assert_close(net.eval()(x), theirs.eval()(x))


def test_the_CIFAR_stem_keeps_all_pixels():
    """App. D: a 3x3 convolution of stride 1, no max-pool. 32x32 pixels reach the first block as 32x32."""
    net, _ = build_backbone("resnet18", "cifar")
    sizes = []
    net.layer1.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[-2:]))
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 512)
    assert sizes == [(32, 32)] and isinstance(net.maxpool, nn.Identity)
    assert net.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)  # fan out
    for unknown in (("resnet18", "small"), ("resnet19", "cifar")):
        with pytest.raises(ValueError, match="unknown"):
            build_backbone(*unknown)


def test_our_own_networks_halve_the_image_three_times_and_average_the_pixels():
    stage = ["Conv2d", "BatchNorm2d", RELU]
    x = torch.rand(2, 3, 32, 32)
    for arch, layers in (("convnet", stage * 6), ("small-resnet", (stage + ["BasicBlock"]) * 3 + stage)):
        net, feature_dim = build_backbone(arch, width=3)
        assert kinds(net) == layers + ["AdaptiveAvgPool2d", "Flatten"]
        assert net[:-2](x).shape == (2, 24, 4, 4) and net(x[:1]).shape == (1, feature_dim) == (1, 24)
        torch.testing.assert_close(net.eval()(x), net[:-2](x).mean(dim=(2, 3)))
    assert [net[i].kernel_size for i in (0, 4, 8, 12)] == [(3, 3)] * 3 + [(1, 1)]
    for i, width in ((3, 3), (7, 6), (11, 12)):  # each residual block starts as its shortcut
        x = torch.rand(2, width, 5, 5)
        torch.testing.assert_close(net[i](x), x)
        assert net[i].bn1.weight.eq(1).all()


def test_each_view_is_encoded_with_its_own_BN_statistics():
    model = SimSiam(*build_backbone("convnet", width=2), dim=16, hidden=16)
    x1, x2 = torch.rand(4, 3, 32, 32), 3 * torch.rand(4, 3, 32, 32)
    p1, p2, z1, z2 = model(x1, x2)
    for x, z, p in ((x1, z1, p1), (x2, z2, p2)):
        torch.testing.assert_close(z, model.projector(model.backbone(x)))
        torch.testing.assert_close(p, model.predictor(z))
        torch.testing.assert_close(z.mean(0), torch.zeros(16), atol=1e-5, rtol=0)
    assert not torch.allclose(z1, model.projector(model.backbone(torch.cat([x1, x2])))[:4], atol=0.1)


def test_the_example_and_the_demonstration_in_simsiam_py_run(capsys):
    example = re.search(r"    import torch\n.*?(?=\n\n\w)", simsiam.__doc__, re.S)[0]
    exec(re.sub("^    ", "", example, flags=re.M), names := {})
    assert names["features"].shape == (8, 512)
    runpy.run_path(str(HERE / "simsiam.py"), run_name="__main__")
    out = capsys.readouterr().out
    losses, spreads = ([float(x) for x in re.findall(rf"{w}\s+(-?[\d.]+)", out)] for w in ("loss", "spread"))
    assert len(losses) == 10 and losses[0] == pytest.approx(0, abs=0.1) and losses[4] < -0.5
    assert spreads[4] > 0.9 and spreads[9] < 0.7 and losses[9] < losses[4]


# ------------------------------------------------------------------------------------------------
# Augmentation (App. A), against torchvision one operation at a time, and then as a whole


def test_crop_and_resize_equal_torchvisions():
    x = torch.rand(6, 3, 32, 40)
    boxes = [[0, 0, 32, 40], [3, 7, 9, 20], [10, 1, 16, 16], [0, 0, 1, 40], [5, 0, 27, 1], [31, 39, 1, 1]]
    top, left, h, w = torch.tensor(boxes).float().unbind(1)
    for size in (16, 32, 50):
        rows_, columns = simsiam.resize_matrix(top, h, 32, size), simsiam.resize_matrix(left, w, 40, size)
        for ours, image, box in zip(rows_.unsqueeze(1) @ x @ columns.mT.unsqueeze(1), x, boxes):
            theirs = v2.functional.resized_crop(image, *box, size=[size, size], antialias=True)
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_crops_have_the_distribution_of_RandomResizedCrop():
    n, (height, width) = 4000, (40, 50)
    mine = torch.stack(simsiam.random_crops(n, height, width, 0.2, torch.device("cpu")), dim=1)
    crop, image = v2.RandomResizedCrop(8, scale=(0.2, 1)), torch.empty(3, height, width)
    drawn = (crop.make_params([image]) for _ in range(n))
    theirs = torch.tensor([[box[key] for key in ("top", "left", "height", "width")] for box in drawn]).float()
    bottom, right = (mine[:, :2] + mine[:, 2:]).T
    assert mine.min() == 0 and bottom[bottom - mine[:, 0] < height].max() == height
    assert right[right - mine[:, 1] < width].max() == width
    areas_and_ratios = [torch.stack([b[:, 2] * b[:, 3], b[:, 3] / b[:, 2]], dim=1) for b in (mine, theirs)]
    for pair in (areas_and_ratios, (mine[:, :2], theirs[:, :2])):
        for a, b in zip(*(x.T.sort().values.contiguous() for x in pair)):
            grid = torch.cat([a, b]).unique()
            difference = torch.searchsorted(a, grid, right=True) - torch.searchsorted(b, grid, right=True)
            assert difference.abs().max() / n < 1.95 * math.sqrt(2 / n)  # Kolmogorov-Smirnov, at 0.1 %
    thin = simsiam.random_crops(50, 1, 900, 0.2, torch.device("cpu"))  # no attempt fits
    assert [x.unique().tolist() for x in thin] == [[0], [0], [1], [900]]


@pytest.mark.parametrize("name, theirs, factors", [
    ("brightness", v2.functional.adjust_brightness, (0.6, 1.0, 1.4)),
    ("contrast", v2.functional.adjust_contrast, (0.6, 1.0, 1.4)),
    ("saturation", v2.functional.adjust_saturation, (0.6, 1.0, 1.4)),
    ("hue", v2.functional.adjust_hue, (-0.1, 0.0, 0.1)),
    ("blur", lambda x, sigma: v2.functional.gaussian_blur(x, [13, 13], [sigma, sigma]), (0.1, 1.0, 2.0)),
])  # fmt: skip
def test_every_operation_equals_torchvisions_with_one_factor_per_image(name, theirs, factors):
    x = torch.rand(6, 3, 19, 17)
    x[0] = 0.5  # gray
    f = torch.tensor([*factors, *factors]).view(-1, 1, 1, 1)
    for ours, before, factor in zip(getattr(simsiam, name)(x.clone(), f), x, f.flatten().tolist()):
        tolerance = 2e-4 if name == "hue" else 1e-5
        torch.testing.assert_close(ours, theirs(before, factor), atol=tolerance, rtol=0)
    torch.testing.assert_close(simsiam.to_gray(x), v2.functional.rgb_to_grayscale(x))


def test_jitter_gray_and_blur_have_the_papers_probabilities_and_ranges(monkeypatch):
    """App. A: jitter 0.4, 0.4, 0.4, 0.1 with probability 0.8; gray 0.2; blur (here 0.5): sigma 0.1 to 2."""
    ranges = dict.fromkeys(["brightness", "contrast", "saturation"], (0.6, 1.4))
    ranges |= dict(hue=(-0.1, 0.1), blur=(0.1, 2))
    drawn, orders, out = collections.defaultdict(list), set(), []
    for name in ranges:

        def spy(x, f=None, sigma=None, name=name, operation=getattr(simsiam, name)):
            drawn[name].append((f if sigma is None else sigma).flatten())
            order.append(name)
            return operation(x, f if sigma is None else sigma)

        monkeypatch.setattr(simsiam, name, spy)
    for _ in range(200):
        order, x = [], torch.rand(40, 3, 7, 7)
        y = simsiam.recolor(x.clone(), blur_probability=0.5)
        out.append(torch.stack([(y == x).flatten(1).all(1), (y[:, :1] == y).flatten(1).all(1)]))
        orders.add(tuple(order))
    assert orders == {(*jitter, "blur") for jitter in itertools.permutations([*ranges][:4])}
    for name, (low, high) in ranges.items():
        values = torch.cat(drawn[name])
        assert len(values) / 8000 == pytest.approx(0.5 if name == "blur" else 0.8, abs=0.02)
        assert_uniform(values, low, high)
        assert_unrelated(values[1:], values[:-1])  # every image has its own
    unchanged, gray = torch.cat(out, dim=1).float().mean(dim=1).tolist()
    assert unchanged == pytest.approx(0.2 * 0.8 * 0.5, abs=0.015) and gray == pytest.approx(0.2, abs=0.02)


def test_the_two_views_are_cropped_and_flipped_independently():
    """In crops of a half-white image: the share of white, and whether white is on the right."""
    image = torch.full((2000, 3, 32, 32), 50, dtype=torch.uint8)
    image[:, :, :, 16:] = 200
    for min_scale in (0.9, 0.2):
        views = torch.stack(train.two_views(image, 32, types.SimpleNamespace(blur=0.0, min_scale=min_scale)))
        x = views[:, :, 0]
        middle = (x.amax(dim=(2, 3)) + x.amin(dim=(2, 3)))[..., None, None] / 2  # at any brightness
        white = (x > middle).float()
        share, right = white.mean(dim=(2, 3)), white[..., -1].mean(dim=2) > white[..., 0].mean(dim=2)
        assert ((share > 0) & (share < 0.15)).any() == (min_scale == 0.2)  # the smallest crop
    inside = (share > 0) & (share < 1)  # the edge is in the crop
    both = inside[0] & inside[1]
    assert_unrelated(share[0][both], share[1][both])
    assert_unrelated(right[0][both], right[1][both])
    assert 0.45 < right[inside].float().mean() < 0.55


def test_views_have_the_right_size_and_range_and_are_standardized():
    images, _ = train.load_data(args_of())
    x, _ = train.two_views(images.source[:64], 24, args_of("--blur", 0.5))
    assert x.shape == (64, 3, 24, 24) and x.min() >= 0 and x.max() < 1 + 1e-6
    images.mean, images.std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    standardized = train.normalize(x, images)
    torch.testing.assert_close(standardized, v2.functional.normalize(x, images.mean, images.std))
    assert standardized.is_contiguous(memory_format=torch.channels_last)


def test_blur_has_the_given_probability_and_by_default_one_half():
    noise = torch.randint(256, (400, 3, 20, 60), dtype=torch.uint8)  # images need not be square
    roughness = lambda x: x.diff(dim=3).square().mean().item()  # noqa: E731
    for batch in (noise.unsqueeze(1).expand(-1, 2, -1, -1, -1), noise):  # from files, in memory
        rough, smooth = (roughness(train.two_views(batch, 16, args_of("--blur", p))[0]) for p in (0, 1))
        assert smooth < rough / 2
    assert roughness(simsiam.augment(noise / 255, 16)) == pytest.approx((rough + smooth) / 2, rel=0.3)


# ------------------------------------------------------------------------------------------------
# The monitors


def test_spread_is_the_std_of_normalized_outputs():
    """Sec. 4.1, over the batch, averaged over the channels, in units of footnote 3's 1 / sqrt(d)."""
    z = torch.randn(50, 20) * torch.rand(50, 1) + torch.arange(20) / 10
    columns = [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in z.tolist()]
    deviations = (torch.tensor(column).std(correction=0).item() for column in zip(*columns))
    assert spread(z).item() == pytest.approx(sum(deviations) / 20 * math.sqrt(20), abs=1e-5)
    assert spread(torch.randn(4096, 512)).item() == pytest.approx(1, abs=0.01)  # footnote 3
    all_but_one = torch.ones(64, 16) * torch.tensor([-1.0] + [1.0] * 63)[:, None]  # collapse, with BN on z
    assert spread(all_but_one).item() == pytest.approx(2 * math.sqrt(63) / 64, abs=1e-5)
    assert spread(torch.ones(64, 512) * torch.rand(64, 1)).item() == pytest.approx(0, abs=1e-5)


def test_effective_rank_is_the_exponential_entropy_of_the_singular_values():
    # Three times +-e1 and once +-e2, centered: singular values sqrt(6) and sqrt(2).
    uneven = torch.tensor([[1.0, 0, 0]] * 3 + [[-1.0, 0, 0]] * 3 + [[0, 1.0, 0], [0, -1.0, 0]])
    a, b = (math.sqrt(s) / (math.sqrt(6) + math.sqrt(2)) for s in (6, 2))
    axes = torch.cat([torch.eye(8), -torch.eye(8)])
    off_center = torch.tensor([[1.0, 0.5, 0], [1.0, -0.5, 0]])
    for features, expected in (
        (uneven * torch.rand(8, 1), a**-a * b**-b), (axes, 8), (off_center, 1), (torch.ones(5, 3), 1)
    ):  # fmt: skip
        assert effective_rank(features).item() == pytest.approx(expected, abs=1e-3)
    z = torch.randn(512, 4) @ torch.randn(4, 64)  # 4 of 64 dimensions are in use: the spread does not show it
    assert spread(z) > 0.9 and effective_rank(z) < 5


def vote(queries, bank, labels, k=200, temperature=0.2):
    """InstDisc's weighted vote, one query and one neighbor at a time."""
    predicted = []
    for similarities in (F.normalize(queries.double()) @ F.normalize(bank.double()).T).tolist():
        votes = dict.fromkeys(labels.tolist(), 0.0)
        for s, y in sorted(zip(similarities, labels.tolist()), reverse=True)[:k]:
            votes[y] += math.exp(s / temperature)
        predicted.append(max(votes, key=votes.get))
    return predicted


def test_knn_is_the_brute_force_vote():
    bank, queries, labels = torch.randn(600, 16), torch.randn(200, 16), torch.randint(4, (600,))
    labels = torch.tensor([-5, 1000, 7, 0])[labels]  # any integers
    for k, temperature in ((7, 0.2), (7, 2.0), (1, 0.2), (50, 0.02), (600, 0.2)):
        expected = vote(queries, bank, labels, k, temperature)
        assert knn_predict(queries, bank, labels, k, temperature).tolist() == expected
    default = vote(queries, bank, labels)  # k = 200, T = 0.2: issue 10 of the authors' repository
    assert knn_predict(queries, bank, labels).tolist() == default
    assert knn_predict(queries, bank, labels, chunk_elements=700).tolist() == default
    for k, temperature in ((150, 0.2), (250, 0.2), (200, 0.1), (200, 0.25)):  # these vote differently
        assert vote(queries, bank, labels, k, temperature) != default
    assert knn_predict(bank[:3] * 2, bank[:3], labels[:3]).tolist() == vote(bank[:3], bank[:3], labels[:3])
    assert train.default_k(torch.arange(5000) % 10) == 200
    assert train.default_k(torch.tensor([0] * 300 + [7] * 4)) == 4  # the size of the smallest class


# ------------------------------------------------------------------------------------------------
# Recipes, and one training step

PAPER = {  # Sec. 3 and App. A; App. D
    "photos": dict(
        arch="resnet50", stem="imagenet", image_size=224, layers=3, hidden=2048, dim=2048,
        predictor_hidden=None, epochs=100, batch_size=512, base_lr=0.05, weight_decay=1e-4,
        warmup_epochs=0, min_scale=0.2, blur=0.5, view_scale=1,
        mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], knn_every=10,
    ),
    "cifar10": dict(
        arch="resnet18", stem="cifar", image_size=32, layers=2, hidden=2048, dim=2048, predictor_hidden=None,
        epochs=800, batch_size=512, base_lr=0.03, weight_decay=5e-4, warmup_epochs=0, min_scale=0.2, blur=0.0,
        mean=None, std=None, knn_every=10, view_scale=1,
    ),
}  # fmt: skip
PAPER["cifar100"] = PAPER["cifar10"]


@pytest.mark.parametrize("data", PAPER)
def test_recipes_equal_the_papers(data):
    args = vars(args_of(data))
    assert {name: args[name] for name in PAPER[data]} == PAPER[data]
    assert args_of(data, "--min-scale", 0.5).min_scale == 0.5  # a flag overrides the recipe
    assert args_of(data, "--recipe", "small").arch == "small-resnet"  # which is also that of .npz files
    assert [args_of(data, "--batch-size", n).warmup_epochs for n in (1023, 1024)] == [0, 10]  # Table 2


@pytest.mark.parametrize("flags, expected", [
    ("--layers 4 --hidden 24 --dim 20", dict(layers=4, hidden=24, dim=20)),
    ("--predictor-hidden 7", dict(predictor_hidden=7)),
    ("--predictor none", {}),
    ("--predictor fixed", {}),
    ("--bn none", dict(bn="none")),
    ("--affine", dict(affine=True)),
])  # fmt: skip
def test_the_network_is_built_from_the_flags(flags, expected):
    model = train.build_model(args_of(*TINY, *flags.split(), "--width", 3))
    expected = SimSiam(*build_backbone("convnet", width=3), **dict(dim=16, hidden=16, layers=2) | expected)
    if "none" in flags and "predictor" in flags:
        expected.predictor = nn.Identity()  # Table 1a
    assert str(model) == str(expected)
    assert all(w.requires_grad == ("fixed" not in flags) for w in model.predictor.parameters())  # Table 1b
    net = train.build_model(args_of(*TINY, "--arch", "resnet18", "--stem", "cifar")).backbone
    assert str(net) == str(build_backbone("resnet18", "cifar")[0])


def test_learning_rate_is_a_linear_warmup_and_then_a_cosine_decay():
    for warmup in (0, 10):
        lrs = [train.learning_rate(step, 100, 2.0, warmup) for step in range(100)]
        rest = [1 + math.cos(math.pi * step / (100 - warmup)) for step in range(100 - warmup)]
        assert lrs == pytest.approx([0.2 * (step + 1) for step in range(warmup)] + rest)
    assert lrs[55] == pytest.approx(1.0) and 0 < lrs[99] < 0.002  # halfway through the rest; the end


@pytest.mark.parametrize("flags, loss", [
    ("", equation_4),
    ("--warmup-epochs 1 --weight-decay 0.02 --base-lr 0.3", equation_4),
    ("--decay-predictor-lr --epochs 1 --bn none", equation_4),
    ("--no-stop-gradient", lambda p1, p2, z1, z2: cosine_loss(p1, z2) / 2 + cosine_loss(p2, z1) / 2),
    ("--asymmetric", lambda p1, p2, z1, z2: cosine_loss(p1, z2.detach())),
    ("--asymmetric --pairs 2 --no-stop-gradient", lambda p1, p2, z1, z2: cosine_loss(p1, z2)),
    ("--similarity cross-entropy", lambda *x: equation_4(*x, entropy_loss)),
    ("--predictor none", equation_4),
    ("--predictor fixed --blur 0.5 --min-scale 0.5 --image-size 24", equation_4),
    ("--view-scale 0.75", equation_4),
])  # fmt: skip
def test_three_updates_equal_SGD_written_out(flags, loss):
    """Sec. 3: momentum 0.9, weight decay on everything, lr * batch / 256, cosine for f, constant for h."""
    t, twin = trainer(*flags.split()), trainer(*flags.split())
    args = t.args
    steps, warmup = args.epochs * 5, args.warmup_epochs * 5
    peak = args.base_lr * 100 / 256
    velocity, total, total_spread = {}, 0.0, 0.0
    for step, (batch, indices) in enumerate(batches(t, 3)):
        assert len(batch) == 100 * args.pairs
        before = copy.deepcopy(t.model.state_dict())
        t.update(batch, indices)
        p1, p2, z1, z2 = twin.model(*views_of(twin, batch, step))
        value = loss(p1, p2, z1, z2)
        total += value.item()
        total_spread += 4 * F.normalize(z1).std(dim=0, correction=0).mean().item()  # d = 16
        lr = peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        if step < warmup:
            lr = peak * (step + 1) / warmup
        learns = {name: w for name, w in twin.model.named_parameters() if w.requires_grad}
        for (name, w), gradient in zip(learns.items(), torch.autograd.grad(value, learns.values())):
            constant = name.startswith("predictor") and not args.decay_predictor_lr
            velocity[name] = 0.9 * velocity.get(name, 0) + gradient + args.weight_decay * w.detach()
            w.data -= (peak if constant else lr) * velocity[name]
        assert t.sums.tolist() == pytest.approx([total, total_spread], abs=1e-4)
        after = copy.deepcopy(t.model.state_dict())
        for name, w in twin.model.named_parameters():  # to a thousandth of what a step changes
            assert (after[name] - w).norm() <= 1e-3 * (w - before[name]).norm() + 1e-6, name
        twin.model.load_state_dict(after)  # so that rounding does not add up


def test_alternate_takes_the_targets_of_k_steps_from_a_copy_made_before_them():
    """Sec. 5.2. The first of k steps is plain SimSiam; in the second, z comes from the older weights."""
    plain, t, old = trainer(), trainer("--alternate", "2"), trainer().model
    steps = batches(t, 3)
    for one in (plain, t):
        one.update(*steps[0])
    assert same(plain.model.state_dict(), t.model.state_dict())
    old(*views_of(t, steps[0][0], 0))  # its BN has seen the first step too
    views = views_of(t, steps[1][0], 1)
    (p1, p2, _, _), (_, _, z1, z2) = plain.model(*views), old(*views)
    loss_before = t.sums[0].item()
    t.update(*steps[1])
    assert t.sums[0].item() - loss_before == pytest.approx(equation_4(p1, p2, z1, z2).item(), abs=1e-5)
    before = copy.deepcopy(dict(t.model.named_parameters()))
    t.update(*steps[2])  # the first of the next two
    assert same(before, dict(t.targets.old.named_parameters()))


def test_eta_is_the_moving_average_of_an_images_projections():
    """Sec. 5.2: eta <- m eta + (1 - m) z; here over both views, from zero."""
    t, plain = trainer("--eta-momentum", "0.8"), trainer()
    batch, indices = batches(t)[0]
    for one in (t, plain):
        one.update(batch, indices)  # from zero, the first visit is plain SimSiam: D ignores lengths
    assert t.sums[0].item() == pytest.approx(plain.sums[0].item(), abs=1e-5)
    assert sorted(t.targets.eta.norm(dim=1).nonzero()[:, 0].tolist()) == sorted(indices.tolist())
    z1, z2 = torch.randn(2, 3, 16)
    t.targets.eta[:3] = old = torch.randn(3, 16)
    t1, t2 = t.targets(0, torch.arange(3), t.model, None, None, z1, z2)
    torch.testing.assert_close(t1, 0.8 * old + 0.2 * z1)
    torch.testing.assert_close(t2, 0.8 * old + 0.2 * z2)
    torch.testing.assert_close(t.targets.eta[:3], 0.8 * old + 0.1 * (z1 + z2))


@pytest.mark.parametrize("flags", [
    "", "--amp bf16", "--no-stop-gradient", "--predictor fixed --affine", "--bn none", "--alternate 2",
    "--asymmetric --pairs 2", "--blur 0.5 --similarity cross-entropy", "--eta-momentum 0.8 --predictor none",
])  # fmt: skip
def test_a_step_computes_everything_on_its_device(flags, monkeypatch):
    """Without a GPU: a tensor on the device `meta` has no numbers, and mixing it with the CPU is an error."""
    entered = []

    def no_autocast(*args, enabled):  # torch's does not know the device `meta`
        entered.append((*args, enabled))
        return torch.enable_grad()  # changes nothing

    monkeypatch.setattr(torch, "autocast", no_autocast)
    args = args_of(*TINY, *flags.split())
    images, test = train.load_data(args)
    args.mean, args.std, args.device = images.mean, images.std, "meta"
    t = train.Trainer(args, images)
    crops = torch.zeros(100, 2, 3, 16, 16, dtype=torch.uint8)  # from files
    for batch, indices in [*batches(t, 2), (crops, torch.arange(100))]:
        with torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True):
            t.update(batch, indices)
        assert entered.pop() == (("meta", torch.bfloat16, True) if "bf16" in flags else ("meta", None, False))
    features = train.extract_features(t.model.backbone, test, "meta")
    assert features.device.type == spread(features).device.type == t.sums.device.type == "meta"


# ------------------------------------------------------------------------------------------------
# Data


def load(root, *flags):
    return train.load_data(args_of(root, *FOLDER, *flags))


def reds(images):
    """The mean red of each image, by which images of one color are recognized."""
    return images.plain(torch.arange(len(images)))[:, 0].float().mean(dim=(1, 2)).round().int().tolist()


def fill(root, *places):
    """Two images of one color in each place: red 10 i and 10 i + 1 in the i-th."""
    for i, place in enumerate(places):
        write_image(root / place / "1.png", [10 * i, 50, 0])
        write_image(root / place / "2.png", [10 * i + 1, 50, 0])
    return root


def test_cifar_is_torchvisions_and_a_failed_download_says_where_to_put_the_file(monkeypatch, capsys):
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: open("no network"))
    line = fails(["cifar100", "--data-dir", "here"], capsys)
    assert "put cifar-100-python.tar.gz into --data-dir here" in line
    pixels = torch.randint(256, (30, 32, 32, 3), dtype=torch.uint8)

    def fake(root, train=True, download=False):
        part = slice(0, 20) if train else slice(20, 30)
        targets = [*range(30)][part]
        return types.SimpleNamespace(data=pixels[part].numpy(), targets=targets, classes=["a", "b"])

    monkeypatch.setattr(train.datasets, "CIFAR10", fake)
    images, test = train.load_data(args_of("cifar10"))
    assert torch.equal(torch.cat([images.source, test.source]).permute(0, 2, 3, 1), pixels)
    assert images.labels.tolist() + test.labels.tolist() == [*range(30)] and images.source.is_contiguous()


def test_holdout_is_the_same_for_every_seed_and_mean_and_std_come_from_the_training_pixels():
    (images, test), (_, other) = (train.load_data(args_of("--holdout", "--seed", seed)) for seed in (0, 1))
    whole, labels = train.textures(5000, seed=0)
    at = {x.numpy().tobytes(): y for x, y in zip(whole, labels.tolist())}
    assert len(test) == 50 and len(images) == 450 and torch.equal(test.source, other.source)
    assert {x.numpy().tobytes() for x in torch.cat([images.source, test.source])} == at.keys()
    pixels = images.source.double().div(255).transpose(0, 1).flatten(1)
    for part in (images, test):
        assert [at[x.numpy().tobytes()] for x in part.source] == part.labels.tolist()
        assert part.mean == pytest.approx(pixels.mean(dim=1).tolist(), abs=1e-5)
        assert part.std == pytest.approx(pixels.std(dim=1, correction=0).tolist(), abs=1e-5)


def test_a_npz_file_in_the_format_of_medmnist_is_a_data_set(capsys):
    made = {}
    for name, count in (("train", 40), ("test", 20)):
        made[f"{name}_images"] = torch.randint(256, (count, 28, 28), dtype=torch.uint8).numpy()
        made[f"{name}_labels"] = (np.arange(count) % 3)[:, None]
    np.savez("med.npz", **made)
    for part, name in zip(train.load_data(args_of("med.npz")), ("train", "test")):
        assert all(torch.equal(part.source[:, c], torch.tensor(made[f"{name}_images"])) for c in range(3))
        assert torch.equal(part.labels, torch.tensor(made[f"{name}_labels"])[:, 0])
    rgb = torch.randint(256, (9, 8, 8, 3), dtype=torch.uint8)
    np.savez("rgb.npz", train_images=rgb.numpy(), test_images=rgb.numpy())  # without labels: of no use
    images, test = train.load_data(args_of("rgb.npz"))
    assert torch.equal(images.source, rgb.permute(0, 3, 1, 2)) and images.labels is test is None
    np.savez("half.npz", **dict([*made.items()][:3]))  # test images without labels
    assert train.load_data(args_of("half.npz"))[1] is None
    np.savez("unlabeled.npz", **made | dict(train_labels=np.arange(40) - 1))
    assert "train_labels has the negative label -1" in fails(["unlabeled.npz"], capsys)
    np.savez("float.npz", train_images=np.zeros((4, 8, 8)))
    assert "train_images are torch.float64: convert them to uint8" in fails(["float.npz"], capsys)


SIZES = pytest.mark.parametrize("size", [16, 80], ids=["in memory", "on disk"])


@SIZES
def test_class_folders_are_labels_and_the_folder_beside_train_is_the_test_set(size):
    size = ["--image-size", size]
    root = fill(Path("photos"), "train/cat", "train/dog", "test/cat", "test/dog", "notes")
    images, test = load(root, *size)
    assert isinstance(images.source, torch.Tensor) == (size[1] == 16)
    assert reds(images) == [0, 1, 10, 11] and reds(test) == [20, 21, 30, 31]
    assert images.labels.tolist() == test.labels.tolist() == [0, 0, 1, 1]
    assert images.classes == test.classes == ["cat", "dog"]
    part = images.subset(torch.tensor([3, 0]))
    assert reds(part) == [11, 0] and part.labels.tolist() == [1, 0]
    fill(root, "val/cat", "val/dog")  # preferred to test/, which is for the end
    assert reds(load(root, *size)[1]) == [0, 1, 10, 11]


def test_a_folder_that_does_not_fit_is_reported_in_one_line(capsys):
    for name, place in (("kaggle", "test"), ("other", "val/eel"), ("fewer", "val/cat")):
        root = fill(Path(name), "train/cat", "train/dog", place)
        assert reds(load(root)[0]) == [0, 1, 10, 11] and load(root)[1] is None
        line = capsys.readouterr().out.splitlines()[-1]
        assert f"{root / place.split('/')[0]} is not used as the test set: " in line
    for name, places in (("loose", ["."]), ("mixed", [".", "album"]), ("deep", ["train", "val"])):
        images, test = load(fill(Path(name), *places))
        assert images.labels is test is None and len(images) == (4 if name == "mixed" else 2)
        assert "is outside a class folder, so all images are used without labels" in capsys.readouterr().out
    assert load(fill(Path("single"), "cat"))[0].labels is None  # one class: kNN would always be right


@SIZES
def test_unreadable_files_are_reported_with_the_reason_and_skipped(size, capsys):
    root = write_folder(Path("photos"), per_class=8)
    whole = (root / "train/cat/0.jpg").read_bytes()
    for name, content in (("half.jpg", whole[: len(whole) // 2]), ("text.png", b"text")):
        (root / "train/cat" / name).write_bytes(content)
    Image.new("F", (9, 9), 0.5).save(root / "train/cat/float.tiff")
    Image.new("L", (9, 9)).save(root / "train/cat/gif.png", format="GIF")  # readable all the same
    images, _ = load(root, "--image-size", size)
    (line,) = capsys.readouterr().err.splitlines()
    assert len(images) == 17 == len(images.labels) and images.labels.sum() == 8
    assert line.startswith("warning: skipped 3 of 20 files")
    for words in ("half.jpg (image file is truncated", "text.png (cannot identify", "float.tiff (floating"):
        assert words in line


def test_every_kind_of_image_becomes_upright_rgb_on_white():
    gray = Image.new("L", (6, 4), 100)
    for mode in ("L", "RGBA", "P", "LA", "RGB", "CMYK"):
        gray.convert(mode).save("gray.tiff")
        assert (train.decode("gray.tiff").float() - torch.full((3, 4, 6), 100)).abs().max() <= 3
    Image.new("RGB", (6, 4), (200, 100, 50)).save("color.png")
    assert train.decode("color.png")[:, 0, 0].tolist() == [200, 100, 50]
    exif = gray.getexif()
    exif[0x0112] = 6  # lies on its side
    gray.save("exif.jpg", exif=exif)
    assert train.decode("exif.jpg").shape == (3, 6, 4)
    for mode, alpha in (("RGBA", 0), ("LA", 0), ("P", 0), ("RGBA", 128)):
        Image.new("RGBA", (8, 8), (0, 0, 0, alpha)).convert(mode).save("clear.png")
        assert train.decode("clear.png").unique().tolist() == [255 - alpha]
    for dtype, bits in (("uint16", 8), ("uint16", 12), ("uint16", 16), ("int32", 20)):
        values = torch.linspace(0, 2**bits - 1, 256).round()  # the 8 highest bits in use are kept
        Image.fromarray(values.int().numpy().astype(dtype).reshape(16, 16)).save("deep.tiff")
        difference = train.decode("deep.tiff")[0].flatten() - values / 2 ** (bits - 8)
        assert difference.abs().max() <= 1


@SIZES
def test_images_without_augmentation_are_center_crops_as_on_imagenet(size):
    """The center square is resized to 256 / 224 of the size, then cropped to the size."""
    write_folder(Path("photos"), parts=["."])
    write_image(Path("photos/dog/thin.png"), torch.randint(256, (3, 2, 900), dtype=torch.uint8))
    images, _ = load("photos", "--image-size", size)
    for i, path in enumerate(sorted(Path("photos").glob("*/*"))):
        x = v2.functional.pil_to_tensor(Image.open(path).convert("RGB"))
        square = v2.functional.center_crop(x, [min(x.shape[1:])] * 2)
        side = round(size * 256 / 224) if min(x.shape[1:]) > size else size  # no border to cut off
        resized = v2.functional.resize(square, [side, side], antialias=True)
        assert torch.equal(images.plain(torch.tensor([i]))[0], v2.functional.center_crop(resized, [size]))


HUES = {0.0: [230, 30, 30], 0.25: [130, 230, 30], 0.5: [30, 230, 230], 0.75: [130, 30, 230]}


@SIZES
def test_both_views_show_the_image_of_their_index(size):
    for i, color in enumerate(HUES.values()):
        write_image(Path("photos", f"{i}.png"), color)
    t, _ = trainer_of(args_of("photos", *FOLDER, "--epochs", 20, "--image-size", size))
    for batch, indices in batches(t, 20):
        assert set(indices.tolist()) == {0, 1, 2, 3}
        for x in train.two_views(batch, size, t.args):
            red, green, blue = x.mean(dim=(2, 3)).double().unbind(1)
            hue = torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * math.pi)
            colored = x.mean(dim=(2, 3)).std(dim=1) > 0.01
            turn = (hue - torch.tensor([*HUES])[indices] + 0.5) % 1 - 0.5  # by the jitter, 0.1 at most
            assert x.shape == (4, 3, size, size) and turn[colored].abs().max() < 0.15


def test_the_two_crops_of_a_file_differ_and_every_epoch_has_new_ones():
    ramp = torch.linspace(0, 255, 64).repeat(64, 1)
    write_image(Path("photos/a.png"), torch.stack([ramp, ramp.T, 0 * ramp]).byte())
    photos, i = load("photos", "--min-scale", 0.3, "--image-size", 80)[0], torch.zeros(200, dtype=torch.long)
    crops = photos.raw(i, "0 0")
    assert torch.equal(crops, photos.raw(i, "0 0")) and not torch.equal(crops, photos.raw(i, "0 1"))
    red, green = crops[:, :, 0].float().mean(dim=2), crops[:, :, 1].float().mean(dim=3)  # (200, 2, 80)
    wide, high = (red[..., -1] - red[..., 0]) / 255, (green[..., -1] - green[..., 0]) / 255
    assert 0.4 < (wide < 0).float().mean() < 0.6 and (high > 0).all()  # flipped horizontally only
    for mine in ((wide < 0).float(), red.mean(dim=2), green.mean(dim=2)):
        assert_unrelated(mine[:, 0], mine[:, 1])
    assert 0.25 < (wide.abs() * high).min() < 0.4  # --min-scale


def test_an_epoch_is_a_permutation_and_its_incomplete_batch_is_dropped():
    requests = list(train.schedule(10, 4, 0, range(6)))
    for epoch in range(3):
        seen = torch.cat([indices for indices, _ in requests[2 * epoch : 2 * epoch + 2]]).tolist()
        assert len(set(seen)) == 8 and set(seen) <= {*range(10)}
    assert requests[0][0].tolist() != requests[2][0].tolist() and requests[0][1] != requests[2][1]
    resumed = list(train.schedule(10, 4, 0, range(3, 6)))
    assert [i.tolist() for i, _ in resumed] == [i.tolist() for i, _ in requests[3:]]
    assert next(train.schedule(10, 4, 0, range(1), pairs=2))[0].tolist() == requests[0][0].tolist() * 2


# ------------------------------------------------------------------------------------------------
# A run: its reports and its files


def test_training_writes_its_metrics_to_the_terminal_a_file_and_TensorBoard(capsys, monkeypatch):
    sent = []
    writer = types.SimpleNamespace(add_scalar=lambda *row: sent.append(row))
    fake = types.SimpleNamespace(SummaryWriter=lambda out, purge_step: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)  # progress is shown
    train.main([*TINY, "--knn-every", "2", "--epochs", "3", "--tensorboard"])
    one, two, three = rows("runs/textures")
    assert ("erank", two["erank"], 2) in sent
    assert list(one) == "epoch loss spread erank knn lr images_per_second".split()
    assert all(-1 <= row["loss"] <= 1 and 1 <= row["erank"] <= 16 for row in (one, two))
    assert one["knn"] is None and 0 <= two["knn"] <= 1 and 0 <= three["knn"] <= 1  # every two, and the last
    first, *others, last = capsys.readouterr().out.splitlines()
    assert "epoch 2: 5/5, 0:00:00 left " in others
    assert first == (
        "textures: 500 images in 10 classes, 200 test images; 15 steps of 100; lr 0.4 * 100 / 256 = 0.1562; "
        "1 x cpu, torch.float32; results in runs/textures"
    )
    assert last.endswith("next: python eval.py runs/textures")
    lr = [0.4 * 100 / 256 * (1 + math.cos(math.pi * step / 15)) / 2 for step in (4, 9, 14)]
    assert [row["lr"] for row in (one, two, three)] == pytest.approx(lr)  # the encoder's
    checkpoint = checkpoint_of("runs/textures")
    assert not {"out", "device", "workers", "resume"} & checkpoint["args"].keys()
    build_backbone("convnet", width=2)[0].load_state_dict(checkpoint["backbone"], strict=True)


def test_views_png_shows_eight_images_and_below_each_its_views(monkeypatch):
    drawn, two_views = [], train.two_views
    spy = lambda *args: drawn.append((args, two_views(*args))) or drawn[-1][1]  # noqa: E731
    monkeypatch.setattr(train, "two_views", spy)
    train.main([*TINY, "--epochs", "1", "--out", "run"])
    (images, size, _), (x1, x2) = drawn[0]
    picture = v2.functional.pil_to_tensor(Image.open("run/views.png")) / 255
    assert picture.shape == (3, 3 * 102 + 6, 8 * 102 + 6) and size == 16
    for row, column in itertools.product(range(3), range(8)):
        tile = picture[:, 102 * row + 6 :, 102 * column + 6 :][:, :96, :96]
        expected = F.interpolate((images / 255, x1, x2)[row][column][None], 96)[0]
        torch.testing.assert_close(tile, expected, atol=0.004, rtol=0)


def by_hand(backbone, images):
    """Features in eval mode of all images in memory, at once."""
    with torch.no_grad():
        return backbone.eval()(v2.functional.normalize(images.source / 255, images.mean, images.std))


def test_kNN_and_erank_use_the_backbones_features_of_all_test_images():
    t, test = trainer_of(args_of(*TINY))
    for batch, indices in batches(t, 5):
        t.update(batch, indices)
    before = copy.deepcopy(t.model.state_dict())
    t.images = t.images.subset(torch.arange(499))  # batches of 250 must not lose the last one
    erank, knn = train.monitor(t, test, knn=True)
    assert same(before, t.model.state_dict()) and t.model.backbone.training
    bank, queries = by_hand(t.model.backbone, t.images), by_hand(t.model.backbone, test)
    features = train.extract_features(t.model.backbone, t.images, "cpu")
    torch.testing.assert_close(features, bank, rtol=1e-4, atol=1e-5)
    voted = vote(queries, bank, t.images.labels, k=49)  # the smallest class has 49 images
    assert knn == pytest.approx(sum(a == b for a, b in zip(voted, test.labels.tolist())) / 200, abs=0.0051)
    s = torch.linalg.svdvals(F.normalize(queries) - F.normalize(queries).mean(dim=0))
    entropy = torch.distributions.Categorical(s / s.sum()).entropy()
    assert train.monitor(t, test, knn=False) == (pytest.approx(erank, rel=1e-4), None)
    assert erank == pytest.approx(entropy.exp().item(), rel=1e-3)
    in_order = test.subset(torch.cat([torch.zeros(300, dtype=torch.long), torch.arange(200)]))
    assert all(train.monitor(t, in_order, knn)[0] > 1.5 for knn in (True, False))  # not of the first 256
    assert train.monitor(t, None, knn=True)[1] is None


def test_periodic_checkpoints_and_the_best_one_are_kept(monkeypatch):
    train.main([*TINY, *"--epochs 5 --keep-every 2 --keep-best --knn-every 1 --holdout --out run".split()])
    names = [path.name for path in sorted(Path("run").glob("*.pt"))]
    assert names == ["checkpoint-0002.pt", "checkpoint-0004.pt", "checkpoint-best.pt", "checkpoint.pt"]
    assert torch.load("run/checkpoint-0002.pt", weights_only=True)["step"] == 8  # 450 images, steps of 100
    saved, t = [], types.SimpleNamespace(args=args_of("--keep-best", "--holdout"), history=[])
    monkeypatch.setattr(train, "save", lambda t, name="": name and saved.append(t.history[-1]["knn"]))
    for knn in (0.2, None, 0.5, 0.3, None, 0.35, 0.6):
        t.history.append(dict(knn=knn, epoch=len(t.history) + 1))
        train.save_checkpoints(t)
    assert saved == [0.2, 0.5, 0.6]


@pytest.mark.parametrize("what", ["sums", "weights"])
def test_a_run_with_infinite_values_stops_before_it_is_saved(what, capsys, monkeypatch):
    update = train.Trainer.update

    def poisoned(self, *args):
        update(self, *args)
        values = self.sums if what == "sums" else self.model.backbone[1].running_var
        if self.step == 7:
            values.fill_(math.inf)

    monkeypatch.setattr(train.Trainer, "update", poisoned)
    assert "not finite in epoch 2: use a lower --base-lr" in fails([*TINY, "--out", "run"], capsys)
    assert checkpoint_of("run")["step"] == 5 and len(rows("run")) == 1


def test_a_failed_write_keeps_the_last_checkpoint(pretrained, monkeypatch):
    t = trainer()
    t.args.out = pretrained
    before = Path("run/checkpoint.pt").read_bytes()
    for broken in ("torch.save", "os.fsync", "os.replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(broken, lambda *args: os.listdir("no space left on device"))
            train.save(t)
        assert Path("run/checkpoint.pt").read_bytes() == before


# ------------------------------------------------------------------------------------------------
# Resume, precision, processes


@pytest.mark.parametrize("flags", [
    "--alternate 3", "--eta-momentum 0.8", "--amp bf16", "--warmup-epochs 1 --knn-every 1", "--amp fp16",
])  # fmt: skip
def test_a_killed_run_resumes_bit_for_bit(monkeypatch, flags):
    flags = [*TINY, "--epochs", "3", *flags.split()]
    train.main([*flags, "--out", "whole"])
    update = train.Trainer.update

    def killed(self, *args):
        update(self, *args)
        assert self.step != 12  # in the third epoch

    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(train.Trainer, "update", killed)
        train.main([*flags, "--out", "parts"])
    assert checkpoint_of("parts")["step"] == 10
    train.main(["--resume", "parts"])  # the flags are in the checkpoint
    whole, parts = checkpoint_of("whole"), checkpoint_of("parts")
    assert same(whole["model"], parts["model"]) and same(whole["targets"], parts["targets"])
    assert whole["scaler"] == parts["scaler"] and bool(whole["scaler"]) == ("fp16" in flags)
    for a, b in zip(rows("whole"), rows("parts"), strict=True):
        assert a | dict(images_per_second=0) == b | dict(images_per_second=0)


def test_the_number_of_workers_does_not_change_the_result():
    write_folder(Path("photos"))
    for out, flags in (("0", "--workers 0"), ("2", "--workers 2"), ("other", "--workers 0 --seed 1")):
        train.main(["photos", *FOLDER, "--image-size", "80", *flags.split(), "--out", out])
    none, two, other = (checkpoint_of(run)["model"] for run in ("0", "2", "other"))
    assert same(none, two) and not same(none, other)


def test_a_resumed_run_keeps_its_flags_and_a_conflict_names_both_values(capsys):
    train.main(["textures", *TINY, *"--epochs 1 --resume run --asymmetric --weight-decay 0".split()])
    for flag, value, was in (("--dim", 32, 16), ("--epochs", 5, 1), ("--recipe", "small", None)):
        line = fails(["--resume", "run", flag, value], capsys)
        assert f"= {was}, not {value}" in line and "--init" in line
    args = args_of("--resume", "run", "--amp", "bf16", "--knn-every", 1, "--workers", 0)  # may change
    assert (args.amp, args.knn_every, args.workers) == ("bf16", 1, 0)
    assert args.epochs == 1 and args.asymmetric and args.weight_decay == 0 and args.out == "run"
    before = checkpoint_of("run")["model"]
    train.main(["--resume", "run"])  # it is finished, and nothing changes
    assert same(before, checkpoint_of("run")["model"])
    assert "add DATA to start one" in fails(["--resume", "typo"], capsys) and not Path("typo").exists()


def test_a_new_run_needs_a_new_folder_and_resume_an_existing_run(pretrained, capsys):
    for name in ("runs/textures", "runs/textures-2", "runs/cam-2", "late"):
        Path(name).mkdir(parents=True)
    assert args_of().out == "runs/textures-3" and args_of("elsewhere/cam").out == "runs/cam"
    assert args_of("cam", "--resume", "runs/cam").out == "runs/cam" and args_of("my cam").out == "runs/my-cam"
    assert "--resume run" in fails([*TINY, "--out", "run"], capsys)
    args = args_of(*TINY)
    args.out = "late"  # another run has started in the meantime
    with pytest.raises(FileExistsError):
        train.pretrain(args, None)


@SIZES
def test_a_folder_may_move_but_not_change_before_a_resume(size, capsys):
    photos = write_folder(Path("photos"), parts=["."])
    train.main(["photos", *FOLDER, "--image-size", str(size), "--out", "run"])
    assert capsys.readouterr().out.endswith("next: python eval.py run --holdout\n")  # it has no test images
    moved = photos.rename("moved")
    train.main(["moved", "--resume", "run"])
    (moved / "cat/0.jpg").rename(moved / "dog/9.jpg")  # as many images as before, in another order
    assert "moved has changed" in fails(["moved", "--resume", "run"], capsys)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_damaged_and_malicious_checkpoints_give_one_line_and_are_never_executed(pretrained, capsys):
    file = Path("run/checkpoint.pt")
    torch.save({"model": Evil()}, "evil.pt")
    half = file.read_bytes()[:5000]
    for content in (half, b"", b"text", pickle.dumps(Evil(), 2), Path("evil.pt").read_bytes()):
        file.write_bytes(content)
        for words, main in ((["--resume", "run"], train.main), (["run"], evaluation.main)):
            assert "run/checkpoint.pt cannot be read as a checkpoint" in fails(words, capsys, main)
    assert not Path("executed").exists()


def test_ctrl_c_and_out_of_memory_give_one_line_with_the_remedy(capsys, monkeypatch):
    def broken(self, *args):
        raise error

    monkeypatch.setattr(train.Trainer, "update", broken)
    error = KeyboardInterrupt()
    assert "interrupted: repeat the command with --resume one" in fails([*TINY, "--out", "one"], capsys)
    error = torch.OutOfMemoryError()
    assert "out of memory: use a smaller --batch-size" in fails([*TINY, "--out", "two"], capsys)


def test_amp_auto_is_bf16_where_the_hardware_supports_it(monkeypatch):
    for native, dtype in ((["amx_bf16"], torch.bfloat16), (["avx512_bf16"], torch.bfloat16), ([], None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(native, True), raising=False)
        assert train.amp_dtype("auto", torch.device("cpu")) == dtype
    for native, dtype in ((True, torch.bfloat16), (False, None)):  # emulation does not count
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
        assert train.amp_dtype("auto", torch.device("cuda")) == dtype


@pytest.mark.parametrize("amp, dtype", [("off", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_under_amp_the_network_computes_in_that_dtype_and_the_weights_stay_float32(amp, dtype):
    exact, t = trainer(), trainer("--amp", amp)
    seen = []
    t.model.projector[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    for one in (exact, t):
        one.update(*batches(one)[0])
    assert seen == [getattr(torch, dtype)] * 2 and all(w.dtype == torch.float32 for w in t.model.parameters())
    assert exact.sums.tolist() == pytest.approx(t.sums.tolist(), abs=0.02)
    for a, b in zip(exact.model.parameters(), t.model.parameters()):  # a scaler's factor is removed again
        assert (a - b).norm() < 0.05 * a.norm() + 1e-2
    features = train.extract_features(t.model.backbone, t.images, "cpu", t.amp)
    assert features.dtype == torch.float32


def test_on_several_gpus_BN_is_synchronized(monkeypatch):
    """On a CPU, with stand-ins for the GPU."""
    args = args_of(*TINY)
    images, _ = train.load_data(args)
    zeros, to = torch.zeros, nn.Module.to
    monkeypatch.setattr(train, "rank_and_world_size", lambda: (1, 2))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **kwargs: zeros(*shape, **kwargs))
    monkeypatch.setattr(nn.Module, "to", lambda self, device=None, **kwargs: to(self, "cpu", **kwargs))
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model: ("wrapped", model))
    for args.device in ("cuda", "cpu"):
        t = train.Trainer(args, images)
        assert t.parallel == ("wrapped", t.model)
        layers = [m for m in t.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert len(layers) == 9
        assert all(isinstance(m, nn.SyncBatchNorm) == (args.device == "cuda") for m in layers)


def test_each_process_uses_its_own_gpu_with_nccl_and_gloo(monkeypatch):
    for name, value in dict(WORLD_SIZE="8", LOCAL_RANK="1", TORCHELASTIC_RESTART_COUNT="3").items():
        monkeypatch.setenv(name, value)
    called = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", called.append)
    monkeypatch.setattr(train.dist, "rendezvous", lambda url: iter([("store", 5, 8)]))
    monkeypatch.setattr(train.dist, "PrefixStore", lambda prefix, store: (prefix, store))
    join = lambda *args, **options: called.append((args, options))  # noqa: E731
    monkeypatch.setattr(train.dist, "init_process_group", join)
    train.setup_distributed()
    assert called == [1, (("cpu:gloo,cuda:nccl",), dict(store=("3", "store"), rank=5, world_size=8))]


NOISE = ["noise.npz", *TINY, *"--arch convnet --epochs 10 --knn-every 10 --keep-every 1".split()]
KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import train

def update(self, *args, update=train.Trainer.update):
    if (self.step, self.rank, os.environ["TORCHELASTIC_RESTART_COUNT"]) == (5, 1, "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    update(self, *args)

train.setup_distributed()
train.pretrain(*train.get_args([*{NOISE}, "--resume", "whole"]))
train.setup_distributed = lambda: None  # it is done
train.Trainer.update = update
train.main([*{NOISE}, "--resume", "run"])
"""


@pytest.fixture(scope="session", autouse=True)
def torchrun(tmp_path_factory, request):
    """Two trainings in two processes; one process is killed in the second. Yields torchrun and its folder.

    It is started before the first test, because importing torch in all processes takes a while.
    """
    if not any("torchrun" in item.name for item in request.session.items):
        yield
        return
    folder = tmp_path_factory.mktemp("two")
    x, y = torch.randint(256, (101, 16, 16), dtype=torch.uint8).numpy(), np.arange(101) % 2
    np.savez(folder / "noise.npz", train_images=x[:100], train_labels=y[:100], test_images=x, test_labels=y)
    (folder / "killed.py").write_text(KILLED)
    words = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=1 killed.py".split()
    with open(folder / "out", "w") as out:
        process = subprocess.Popen([sys.executable, *words], cwd=folder, env=ENV, stdout=out, stderr=out)
    yield process, folder
    process.kill()


def test_two_processes_of_torchrun_average_gradients_and_share_one_evaluation(torchrun, monkeypatch):
    process, folder = torchrun
    monkeypatch.chdir(folder)
    assert process.wait(timeout=120) == 0, Path("out").read_text()
    # By hand: each half of the first batch, with its rank's seed, through the same initial weights.
    t, test = trainer_of(args_of(*NOISE))
    order, _ = next(train.schedule(100, 100, 0, range(1)))
    halves = [views_of(t, t.images.source[order[rank::2]], 0, rank) for rank in (0, 1)]
    loss = sum(equation_4(*t.model(*half)) / 2 for half in halves)
    names, parameters = zip(*t.model.named_parameters())
    first = torch.load("whole/checkpoint-0001.pt", weights_only=True)["model"]
    for name, w, gradient in zip(names, parameters, torch.autograd.grad(loss, parameters)):
        expected = w - 0.24 * 100 / 256 * (gradient + 5e-4 * w)  # the lr follows the total batch
        torch.testing.assert_close(first[name], expected, rtol=1e-3, atol=1e-5)
    assert rows("whole")[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    erank, knn = train.monitor(trainer_of(t.args)[0], test, knn=True)  # in one process, before training
    assert f"before training: erank {erank:.1f}  kNN {knn:.1%}" in Path("out").read_text()


def test_torchrun_restarts_after_kill_9_and_the_result_is_bit_identical(torchrun, monkeypatch):
    process, folder = torchrun
    monkeypatch.chdir(folder)
    assert process.wait(timeout=120) == 0 and "exitcode: -9" in Path("out").read_text()
    assert same(checkpoint_of("whole")["model"], checkpoint_of("run")["model"])
    assert [row["epoch"] for row in rows("run")] == [*range(1, 11)]


# ------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(capsys, *argv):
    """The output of eval.py, and the percentage in the line of its last task."""
    capsys.readouterr()
    evaluation.main([str(word) for word in argv])
    out = capsys.readouterr().out
    shares = re.findall(r"^\w+.*: top-1 ([\d.]+)% of \d+ test images$", out, re.M)
    return out, float(shares[-1]) if shares else None


def backbone_of(run):
    net, _ = build_backbone("convnet", width=2)
    net.load_state_dict(checkpoint_of(run)["backbone"])
    return net


def data_of(run):
    return train.load_data(evaluation.get_args([run])[0])


def test_kNN_votes_by_features_or_by_pixels_and_reports_the_worst_classes(
    pretrained, monkeypatch, capsys
):
    images, test = data_of("run")
    test = test.subset(torch.cat([(test.labels < 3).nonzero()[:, 0], torch.arange(20)]))  # unequal classes
    monkeypatch.setattr(evaluation, "load_data", lambda args: (images, test))
    for name, net, flags, k, temperature in (
        (pretrained, backbone_of(pretrained), [], 50, 0.2), ("pixels", nn.Flatten(), ["--k", 1], 1, 0.2),
        (pretrained, backbone_of(pretrained), ["--temperature", 0.05], 50, 0.05),
    ):  # fmt: skip
        voted = vote(by_hand(net, test), by_hand(net, images), images.labels, k, temperature)
        correct = (torch.tensor(voted) == test.labels).double()
        out, share = evaluate(capsys, name, "knn", "--data", "textures", *flags)
        assert f"knn (k={k}, temperature={temperature})" in out  # the k that was used
        assert share == pytest.approx(100 * correct.mean().item(), abs=0.01)
    classes = test.labels.unique()
    expected = {train.PATTERNS[c]: round(100 * correct[test.labels == c].mean().item(), 1) for c in classes}
    shown = {name: float(x) for name, x in re.findall(r"(\w+) ([\d.]+)%", out.split("worst classes: ")[1])}
    assert shown == expected and [*shown.values()] == sorted(expected.values())


def test_settings_come_from_the_run_and_flags_override_them(capsys):
    flags = "--epochs 1 --image-size 24 --mean .1 .2 .3 --std .4 .5 .6 --min-scale 0.3 --holdout --seed 5"
    train.main([*TINY, *flags.split(), "--out", "run"])
    args, _ = evaluation.get_args(["run"])
    assert (args.image_size, args.mean, args.std) == (24, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (args.data, args.arch, args.width, args.min_scale, args.seed) == ("textures", "convnet", 2, 0.3, 0)
    assert [len(part) for part in train.load_data(args)] == [450, 50]  # it tests on what was held out
    args, _ = evaluation.get_args(["run", "--no-holdout", "--data", "cifar10", "linear", "--augment"])
    assert not args.holdout and args.data == "cifar10" and args.min_scale == 0.08  # the authors'
    assert "does not fit --arch" in fails(["run", "--width", "3"], capsys, evaluation.main)


@pytest.mark.parametrize("task", ["knn", "linear", "linear --augment", "finetune"])
def test_protocols_train_on_the_training_set_and_classify_images_independently(task, monkeypatch, capsys):
    load_data, scores = train.load_data, []
    for part in (slice(0, 100), slice(100, 200), slice(0, 200), None):

        def load_part(args, part=part):
            images, test = load_data(args)
            for x in (images, test):
                x.source[:, :2] = 25 * x.labels.byte().view(-1, 1, 1, 1)  # the class can be seen
            test.source[100:] = 255 - test.source[100:]  # the two halves differ
            if part:
                return images, test.subset(torch.arange(200)[part])
            images.labels %= 5
            test.labels = 5 + test.labels % 5  # classes that have no training images
            return images, test

        monkeypatch.setattr(evaluation, "load_data", load_part)
        flags = ["--k", 5] if task == "knn" else ["--epochs", 10, "--batch-size", 50]
        flags += ["--data", "textures", "--image-size", 8]
        scores.append(evaluate(capsys, "pixels", *task.split(), *flags)[1])
    assert (scores[0] + scores[1]) / 2 == pytest.approx(scores[2], abs=0.01)
    assert scores[0] > 40 and scores[3] < 3  # chance is 10


@pytest.mark.parametrize("task", ["linear", "linear --augment", "finetune", "finetune --untrained"])
def test_probes_leave_the_backbone_unchanged_and_only_training_from_scratch_updates_BN_statistics(
    task, pretrained, monkeypatch, capsys
):
    backbones, load_backbone = [], evaluation.load_backbone
    spy = lambda args: backbones.append(load_backbone(args)) or backbones[-1]  # noqa: E731
    monkeypatch.setattr(evaluation, "load_backbone", spy)
    flags = ["--labels-per-class", 2, "--epochs", 20, "--save", "classifier.pt", "--seed", 1]
    out, share = evaluate(capsys, pretrained, *task.split(), *flags)
    torch.manual_seed(1)
    before = build_backbone("convnet", width=2)[0] if "untrained" in task else backbone_of(pretrained)
    for name, value in before.state_dict().items():
        statistic = "running" in name or "num_batches" in name
        changes = "untrained" in task or ("finetune" in task and not statistic)
        assert torch.equal(value, backbones[0].state_dict()[name]) != changes, name
    if "finetune" in task:
        images, test = data_of("run")
        bank = by_hand(before, images.subset(evaluation.few_labels(images, 2, seed=1)))
        head = torch.load("classifier.pt", weights_only=True)["head"]
        kept = torch.allclose(head["0.running_mean"], bank.mean(dim=0), atol=1e-6)
        assert kept == ("untrained" not in task)  # from scratch, the standardization follows the features
        curve = re.findall(r"^  epoch (\d+)/20: top-1 ([\d.]+)%", out, re.M)
        assert [int(epoch) for epoch, _ in curve] == [*range(2, 21, 2)] and float(curve[-1][1]) == share


@pytest.mark.parametrize("task, peaks, batch, epochs", [
    ("linear", [1.0], 256, 90),
    ("linear --augment --epochs 3", [30.0], 256, 3),
    ("finetune --epochs 3", [64 / 256, 0.1 * 64 / 256], 64, 3),
    ("finetune --base-lr 0.4 --batch-size 128 --epochs 4", [128 / 256, 0.4 * 128 / 256], 128, 4),
])  # fmt: skip
def test_protocols_are_sgd_with_cosine_decay(pretrained, monkeypatch, task, peaks, batch, epochs):
    """Fine-tuning trains the head alone first, as the probe does, and then everything, with clipping."""
    runs, cross_entropy_ = [], F.cross_entropy

    class Spy(torch.optim.SGD):
        def step(self):  # changes nothing
            (group,) = self.param_groups
            assert group["momentum"] == 0.9 and group["weight_decay"] == 0
            norm = torch.cat([w.grad.flatten() for w in group["params"]]).norm().item()
            runs.append((group["lr"], norm < 1.001))

    monkeypatch.setattr(torch.optim, "SGD", Spy)
    monkeypatch.setattr(F, "cross_entropy", lambda logits, target: 1000 * cross_entropy_(logits, target))
    evaluation.main([pretrained, *task.split()])
    steps = epochs * (500 // batch)
    lrs = [peak * (1 + math.cos(math.pi * step / steps)) / 2 for peak in peaks for step in range(steps)]
    assert [lr for lr, _ in runs] == pytest.approx(lrs)
    assert [clipped for _, clipped in runs] == [False] * steps + [True] * steps * (len(peaks) - 1)


def test_the_head_standardizes_features_by_the_training_sets_statistics():
    bank = 1e-4 * torch.randn(1000, 4) + 3  # an untrained network's features hardly vary
    bank[:, 3] = 1.0  # constant
    standardized = evaluation.new_head(bank, 3, seed=0)[0](bank)
    assert standardized[:, :3].std(dim=0).tolist() == pytest.approx([1] * 3, rel=0.01)
    assert standardized.mean(dim=0).abs().max() < 0.1 and standardized.isfinite().all()


def test_crops_for_supervised_training_are_standardized_flipped_and_new_in_every_epoch():
    args = args_of("--mean", 0.1, 0.2, 0.3, "--std", 0.5, 0.25, 2, "--image-size", 8, "--min-scale", 1)
    pixels = torch.randint(256, (300, 3, 8, 8), dtype=torch.uint8)
    images = train.Images(pixels, torch.arange(300) % 2, ["a", "b"], args)
    plain = v2.functional.normalize(pixels / 255, args.mean, args.std)
    (x,) = evaluation.cropped_batches(images, [(torch.arange(300), "0 0")], args)
    straight = sum(torch.allclose(a, b, atol=1e-5) for a, b in zip(x, plain))
    flipped = sum(torch.allclose(a, b.flip(2), atol=1e-5) for a, b in zip(x, plain))
    assert 0.3 < flipped / (straight + flipped) < 0.7 and straight > 10
    args = args_of(write_folder(Path("photos")), *FOLDER, "--image-size", 80, "--epochs", 3)
    photos, _ = train.load_data(args)
    steps, targets = evaluation.plan(photos, 4, args)
    assert len(steps) == 9 and len({seed for _, seed in steps}) == 3
    assert all(torch.equal(photos.labels[i], target) for (i, _), target in zip(steps, targets, strict=True))
    a, b = evaluation.cropped_batches(photos, [(torch.arange(4), seed) for seed in ("0 0", "0 1")], args)
    assert a.shape == (4, 3, 80, 80) and not torch.allclose(a, b)
    assert [len(i) for i, _ in evaluation.plan(photos, 40, args)[0]] == [40] * 3  # few images are repeated


def test_few_labels_are_n_per_class_and_depend_on_the_seed():
    images, _ = train.load_data(args_of())
    chosen = evaluation.few_labels(images, 3, seed=0)
    assert images.labels[chosen].bincount().tolist() == [3] * 10 and len(set(chosen.tolist())) == 30
    assert chosen.tolist() != evaluation.few_labels(images, 3, seed=1).tolist()


def test_neighbors_png_shows_the_nearest_training_images_in_green_or_red(pretrained, capsys):
    evaluate(capsys, pretrained, "knn")
    images, test = data_of("run")
    bank, queries = (by_hand(backbone_of(pretrained), part) for part in (images, test))
    picture = v2.functional.pil_to_tensor(Image.open("run/neighbors.png"))
    assert picture.shape == (3, 10 * 106 + 2, 9 * 106 + 2)
    for row, i in enumerate(torch.linspace(0, 199, 10).long()):
        nearest = F.cosine_similarity(queries[i][None], bank).topk(8).indices
        tiles = [picture[:, 106 * row + 2 :, 106 * column + 2 :][:, :104, :104] for column in range(9)]
        shown = torch.stack([tile[:, 4:-4:3, 4:-4:3] for tile in tiles])
        assert torch.equal(shown, torch.cat([test.source[i][None], images.source[nearest]]))
        green = torch.tensor([bool(tile[1, 0, 0] > tile[0, 0, 0]) for tile in tiles[1:]])
        assert torch.equal(green, images.labels[nearest] == test.labels[i])
    before = Path("run/neighbors.png").read_bytes()
    for flags in (["--untrained"], ["--labels-per-class", 1]):
        evaluate(capsys, pretrained, "knn", *flags)
        assert Path("run/neighbors.png").read_bytes() == before
    Path("run/neighbors.png").unlink()
    Path("run/neighbors.png").mkdir()  # cannot be written
    out, share = evaluate(capsys, pretrained, "knn")
    assert "neighbors.png cannot be written" in out and share > 0


def test_the_features_file_contains_frozen_or_fine_tuned_features_and_any_labels(pretrained, capsys):
    evaluation.main([pretrained, "knn", "--features", "frozen.pt"])
    evaluation.main([pretrained, *"finetune --epochs 2 --features tuned.pt --save classifier.pt".split()])
    tuned, _ = build_backbone("convnet", width=2)
    tuned.load_state_dict(torch.load("classifier.pt", weights_only=True)["backbone"])
    for file, net in (("frozen.pt", backbone_of(pretrained)), ("tuned.pt", tuned)):
        written = torch.load(file, weights_only=True)
        for name, part in zip(("train", "test"), data_of("run")):
            torch.testing.assert_close(written[name], by_hand(net, part), rtol=1e-4, atol=1e-5)
            assert torch.equal(written[f"{name}_labels"], part.labels)
    flags = ["--batch-size", "2", "--out", "unlabeled", "--holdout"]  # without labels, nothing is held out
    train.main([str(fill(Path("plain"), ".")), *FOLDER, *flags])
    assert capsys.readouterr().out.endswith("next: python eval.py unlabeled --features FILE\n")
    evaluation.main(["unlabeled", "--features", "plain.pt"])
    assert torch.load("plain.pt", weights_only=True)["train"].shape == (2, 16)
    assert "has no labeled test images" in fails(["unlabeled", "knn"], capsys, evaluation.main)


@pytest.mark.parametrize("task", ["linear", "linear --augment", "finetune"])
def test_a_saved_classifier_predicts_as_it_did_when_it_was_trained(task, pretrained, capsys):
    _, share = evaluate(capsys, "run", *task.split(), "--epochs", 2, "--save", "classifier.pt")
    _, test = data_of("run")
    files = [f"{i:03}.png" for i in range(200)]
    for file, x in zip(files, test.source):
        v2.functional.to_pil_image(x).save(file)
    Path("text.png").write_text("no image")
    evaluation.main(["classifier.pt", "predict", "text.png", *files])
    out, err = capsys.readouterr()
    lines = [line.split("\t") for line in out.splitlines()]  # a table, without the warning
    assert [line[0] for line in lines] == files and "text.png" in err
    assert sum(train.PATTERNS[label] == line[1] for label, line in zip(test.labels, lines)) / 2 == share
    saved = torch.load("classifier.pt", weights_only=True)
    net, _ = build_backbone("convnet", width=2)
    net.load_state_dict(saved["backbone"])
    x, head = by_hand(net, test), saved["head"]
    if "augment" not in task:
        x = (x - head["0.running_mean"]) / head["0.running_var"].add(1e-12).sqrt()
    expected = 100 * (x @ head["1.weight"].T + head["1.bias"]).softmax(dim=1).max(dim=1).values
    assert [float(line[2][:-1]) for line in lines] == pytest.approx(expected.tolist(), abs=0.11)


def test_a_classifier_keeps_its_architecture_and_the_names_of_all_classes(capsys):
    pixels, labels = np.zeros((40, 12, 12), np.uint8), np.arange(40) % 2 * 2  # there is no image of class 1
    pixels[labels == 2] = 250
    np.savez("bright.npz", train_images=pixels, train_labels=labels, test_images=pixels, test_labels=labels)
    flags = "--arch resnet18 --stem cifar --image-size 12 --dim 8 --hidden 8 --batch-size 20 --epochs 1"
    train.main(["bright.npz", *flags.split(), "--amp", "off", "--out", "run"])
    assert evaluate(capsys, "run", "linear", "--epochs", 20, "--save", "classifier.pt")[1] == 100
    Image.new("L", (12, 12), 250).save("bright.png")
    assert evaluate(capsys, "classifier.pt", "predict", "bright.png")[0].startswith("bright.png\t2\t")


def test_both_scripts_read_files_of_the_authors_and_of_torchvision(capsys):
    """The authors' have module.encoder.*, the projector as encoder.fc.0 to fc.7, and module.predictor.*."""
    net = torchvision.models.resnet18()
    expected = {name: x for name, x in net.state_dict().items() if not name.startswith("fc.")}
    theirs = {f"module.encoder.{name}": x for name, x in expected.items()}
    theirs |= {"module.encoder.fc.0.weight": torch.zeros(3, 3), "module.predictor.0.weight": torch.zeros(3)}
    torch.save(net.state_dict(), "torchvision.pt")
    torch.save(dict(epoch=100, arch="resnet18", state_dict=theirs, optimizer={}), "authors.pt")
    write_folder(Path("photos"))
    for file, arch in (("authors.pt", []), ("torchvision.pt", ["--arch", "resnet18"])):
        flags = ["--data", "photos", "--image-size", "64", "--workers", "0", *arch]
        args, _ = evaluation.get_args([file, "knn", *flags])
        assert args.arch == "resnet18" and args.std == [0.229, 0.224, 0.225]
        assert same(evaluation.load_backbone(args).state_dict(), expected)
        assert evaluate(capsys, file, "knn", *flags)[1] > 0
        assert f"{file} does not fit --arch" in fails([*TINY, "--init", file, "--out", "none"], capsys)
    flags = [*FOLDER, *"--arch resnet18 --base-lr 0 --init authors.pt --out run".split()]
    train.main(["photos", *flags])
    assert torch.equal(checkpoint_of("run")["backbone"]["conv1.weight"], expected["conv1.weight"])


# ------------------------------------------------------------------------------------------------
# User errors: one line, exit status 2, and no file is overwritten


@pytest.mark.parametrize("words, told", [
    ("--epochs 0", "argument --epochs: invalid int >= 1 value: '0'"),
    ("--batch-size 600", "found 500 training images, fewer than --batch-size 600: lower it"),
    ("--warmup-epochs 20", "must be below --epochs"),
    ("--keep-best --knn-every 1", "--keep-best needs --holdout"),
    ("--eta-momentum 0.8 --pairs 2", "without --alternate, --pairs"),
    ("--out used", "used exists: continue it with --resume used"),
    ("nowhere", "is not a folder, an .npz file or one of textures, cifar10, cifar100: check the path"),
    ("empty", "Couldn't find any class folder in"),
    ("broken", "no readable image was found"),
    ("--init nowhere.pt", "nowhere.pt cannot be read as a checkpoint (FileNotFoundError"),
    ("eval pixels", "pixels does not name its data set: add --data"),
    ("eval run --labels-per-class 51", "stripes has only 50 images"),
    ("eval run linear --save taken.pt", "taken.pt exists, or its folder does not"),
    ("eval run knn --save new.pt", "--save needs a network and a classifier"),
    ("eval run predict", "predict needs image files"),
    ("eval run predict a.png", "is not a classifier: create one with linear --save"),
])  # fmt: skip
def test_a_mistake_gives_one_line_that_names_it(words, told, pretrained, capsys):
    Path("used").mkdir()
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/1.png").write_text("no image")
    Path("taken.pt").write_text("mine")
    main = evaluation.main if words.startswith("eval ") else train.main
    assert told in fails(words.removeprefix("eval ").split(), capsys, main)
    assert Path("taken.pt").read_text() == "mine" and not [*Path("used").iterdir()]


def test_processes_must_share_a_batch_equally(monkeypatch, capsys):
    monkeypatch.setattr(train, "rank_and_world_size", lambda: (0, 3))
    assert "500: use a multiple of 3" in fails(["--batch-size", 500], capsys, train.get_args)
    assert "one process" in fails(["--batch-size", 300, "--eta-momentum", 0.8], capsys, train.get_args)


def test_a_batch_too_large_for_shared_memory_is_refused_before_workers_wait_for_it(capsys, monkeypatch):
    """Containers have 64 MB of /dev/shm by default."""
    root = str(write_folder(Path("photos"), per_class=20))
    flags = [root, *FOLDER, "--image-size", "96", "--batch-size", "20"]
    train.main([*flags, "--out", "run"])
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=4 * 2**20))
    needed = round(2 * 2 * (40 + 2 * 20) * 3 * 96 * 96 / 2**20)  # 2 workers, 2 batches each
    line = fails([*flags, "--workers", "2"], capsys)
    assert f"/dev/shm is too small for {needed} MB" in line and "--workers 0" in line
    assert "/dev/shm is too small" in fails(["run", "knn", "--workers", "2"], capsys, evaluation.main)
    images, _ = train.load_data(args_of(*flags))
    train.check_shared_memory(images, 10, workers=1)  # just fits
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        train.check_shared_memory(images, 10, workers=1)


def test_images_of_a_single_color_are_refused_and_a_constant_channel_is_allowed(capsys):
    for i in range(8):
        write_image(Path(f"gray/{i}.png"), [90, 90, 90])
        write_image(Path(f"green/{i}.png"), [0, 30 * i, 255])
    flags = [*FOLDER, "--recipe", "small"]
    assert "all images have one and the same color" in fails(["gray", *flags], capsys)
    images, _ = train.load_data(args_of("green", *flags))
    assert images.std[0] == images.std[2] == 1e-3 and images.std[1] > 0.1


def test_a_path_named_like_a_data_set_is_a_folder_and_large_images_on_a_CPU_are_warned_about(capsys):
    assert args_of("./textures").data == os.path.realpath("textures")
    assert "224 pixels are very slow on a CPU: consider --recipe small" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# README


def test_the_readme_uses_only_existing_flags():
    parsers = [train.build_parser("", own) for own in (train.add_training_flags, evaluation.add_flags)]
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (HERE / "README.md").read_text()))
    torchrun = ("--nproc", "--nnodes", "--standalone", "--max-restarts", "--rdzv", "--index-url")
    assert not {flag for flag in named - known if not flag.startswith(torchrun)}


def test_the_readmes_code_loads_a_backbone(pretrained):
    code = re.search("```python\n(import torch, simsiam.*?)```", (HERE / "README.md").read_text(), re.S)[1]
    names = dict(x=torch.rand(16, 3, 32, 32))
    exec(code.replace("runs/textures", "run"), names)
    assert names["features"].shape == (16, names["feature_dim"])
