"""What this project claims, one test a claim. Run: python -m pytest -q (three minutes on two CPU cores).

In the order of the files: the loss, the networks, the views, the monitors; then recipes, data, training;
evaluation; and last what a user can do wrong and what a machine can do to a long run. Every expected value
comes from elsewhere than the code: the equation written out, finite differences, torchvision's own
operations, a loop, or the paper's tables.
"""

import contextlib
import functools
import io
import itertools
import json
import math
import os
import pickle
import re
import runpy
import signal
import socket
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the CPU, on every machine; set it to 0 to try a GPU

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
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
CPU = torch.device("cpu")
torch.set_num_threads(1)  # small tensors: on a busy machine, threads that wait for each other cost minutes
ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
ENV |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
# A network and a schedule so small that the whole command takes a second or two. The dtype is always said:
# what --amp auto would pick depends on the machine.
TINY = "--amp off --width 2 --dim 16 --hidden 16 --batch-size 500 --epochs 2 --knn-every 0".split()
SMALL = [*TINY, "--batch-size", "100"]  # for the fixture small_textures: five steps an epoch
FOLDER = "--amp off --arch convnet --width 2 --dim 16 --hidden 16 --image-size 16 --batch-size 4".split()
FOLDER += ["--epochs", "1", "--workers", "0"]


make_textures = train.textures


@pytest.fixture(autouse=True, scope="session")
def _textures_are_made_once():
    """Most tests want some; to make them anew each time would cost half a minute in all."""
    made = functools.cache(make_textures)
    train.textures = lambda *args, **kwargs: tuple(x.clone() for x in made(*args, **kwargs))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Every test has a folder and a seed of its own."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def small_textures(monkeypatch):
    """`textures` with a tenth of its images, 500 and 200, in an order in which no two sets have the
    same labels."""
    whole = train.textures

    def shuffled(count, seed):
        order = torch.randperm(count // 10, generator=torch.Generator().manual_seed(seed))
        return tuple(x[order] for x in whole(count // 10, seed))

    monkeypatch.setattr(train, "textures", shuffled)


@pytest.fixture
def pretrained(small_textures):
    train.main([*SMALL, "--epochs", "1", "--out", "run"])
    return "run/checkpoint.pt"


def args_of(*argv):
    return train.get_args([str(word) for word in argv])[0]


def trainer_of(args):
    """A Trainer, and the test images beside it."""
    images, test = train.load_data(args)
    args.mean, args.std = images.mean, images.std
    return train.Trainer(args, images, CPU), test


def trainer(*flags):
    return trainer_of(args_of(*SMALL, *flags))[0]


def views_of(t, batch, step, rank=0):
    """x1 and x2 of a step, as Trainer.update makes them."""
    torch.manual_seed(train.seed_of(t.args.seed, step, rank))
    size = round(t.args.image_size * t.args.view_scale)
    views = train.two_views(batch, size, t.args.crop_min, t.args.blur)
    return [v2.functional.normalize(x, t.args.mean, t.args.std) for x in views]


def first(t, count=1):
    """The first `count` batches of a Trainer."""
    return list(itertools.islice(t.batches(), count))


def command(*argv, ok=True, **kwargs):
    """A command line as a user types it, in a process of its own."""
    kwargs = dict(capture_output=True, text=True, env=ENV, timeout=120) | kwargs
    done = subprocess.run([sys.executable, *map(str, argv)], **kwargs)
    assert not ok or done.returncode == 0, done.stderr
    return done


def heed_signals():
    # a shell's background job is started with SIGINT ignored, and we respect that
    for number in train.SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def start(*argv, **kwargs):
    """The same in the background."""
    kwargs |= dict(
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, preexec_fn=heed_signals
    )
    return subprocess.Popen([sys.executable, *map(str, argv)], **kwargs)


def wait_for(process, word):
    for line in process.stdout:
        if word in line:
            return
    raise AssertionError(process.stderr.read())


def fails(argv, capsys, main=train.main, status=2):
    """The one line that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in argv])
    *before, line = capsys.readouterr().err.splitlines()
    assert exit_.value.code == status and line.startswith("error: "), line
    assert all(other.startswith("warning: ") for other in before), before
    return line


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def rows(out):
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def copy_of(state):
    return {name: value.clone() for name, value in state.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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
    """pixels: uint8 (3, H, W), or a colour that fills 40 x 36."""
    if not isinstance(pixels, torch.Tensor):
        pixels = torch.tensor(pixels, dtype=torch.uint8).view(3, 1, 1).expand(3, 40, 36)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(path)


def write_folder(root, per_class=6, classes=("cat", "dog"), parts=("train", "val"), mixed=True):
    """Images of mixed sizes, which are decoded when asked for, or of one, which are kept in memory."""
    for part, name, i in itertools.product(parts, classes, range(per_class)):
        pixels = torch.randint(256, (3, 40, 36 + (i if mixed else 0)), dtype=torch.uint8)
        write_image(root / part / name / f"{i}.{'png' if i % 2 else 'jpg'}", pixels)
    return root


def tiles_of(path, rows, columns):
    """(rows, columns, 3, 32, 32) uint8: the images of a picture, each pixel of which is shown 3 x 3 times."""
    picture = v2.functional.pil_to_tensor(Image.open(path))
    assert picture.shape == (3, rows * 124 + 8, columns * 108 + 8)
    tiles = [
        [picture[:, 24 + 124 * i :, 8 + 108 * j :][:, :96, :96] for j in range(columns)]
        for i in range(rows)
    ]
    tiles = torch.stack([torch.stack(row) for row in tiles]).unflatten(3, (32, 3)).unflatten(5, (32, 3))
    assert (tiles == tiles[..., :1, :, :1]).all()
    return tiles[..., 0, :, 0]


def assert_uniform(values, low, high):
    """Kolmogorov and Smirnov, at 0.1 percent."""
    values = values.double().sort().values
    n = len(values)
    expected = ((values - low) / (high - low)).clamp(0, 1)
    assert (torch.arange(1, n + 1) / n - expected).abs().max() < 1.95 / math.sqrt(n) + 1 / n
    assert low - 1e-3 < values[0] and values[-1] < high + 1e-3


def assert_unrelated(a, b):
    """The correlation of independent samples is Gaussian with a deviation of 1 / sqrt(n): four of them."""
    assert len(a) > 50 and a.double().std() > 0 < b.double().std()
    assert torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].abs() < 4 / math.sqrt(len(a))


def no_network(*args, **kwargs):
    raise OSError("no network")


# ------------------------------------------------------------------------------------------------
# The loss


def test_D_is_equation_1_written_out():
    p, z = torch.randn(5, 7), torch.randn(5, 7)
    total = 0.0
    for a, b in zip(p.tolist(), z.tolist()):
        dot = sum(i * j for i, j in zip(a, b))
        total -= dot / math.sqrt(sum(i * i for i in a)) / math.sqrt(sum(j * j for j in b))
    squares = (F.normalize(p) - F.normalize(z)).square().sum(dim=1).mean()  # MSE of unit vectors (Sec. 3)
    assert (
        D(p, z).item()
        == pytest.approx(total / 5, abs=1e-6)
        == pytest.approx(squares.item() / 2 - 1, abs=1e-6)
    )
    assert D(p, 3 * p).item() == pytest.approx(-1) and D(p, -p).item() == pytest.approx(1)


@pytest.mark.parametrize("similarity", [negative_cosine, cross_entropy])
def test_stop_gradient_z_gets_none_and_p_gets_some(similarity):
    p1, p2, z1, z2 = leaves = [torch.randn(4, 8, requires_grad=True) for _ in range(4)]
    D(p1, z2, similarity=similarity).backward()
    assert z2.grad is None and p1.grad.abs().sum() > 0
    simsiam_loss(*leaves, similarity=similarity).backward()
    assert z1.grad is None and z2.grad is None and p2.grad.abs().sum() > 0
    simsiam_loss(*leaves, similarity=similarity, stop_gradient=False).backward()
    assert z1.grad.abs().sum() > 0 and z2.grad.abs().sum() > 0


def test_the_encoder_learns_from_its_side_as_a_predictor_only():
    """Eq. 4: every target is a constant, so the gradient is the same with the targets cut off beforehand."""
    model = SimSiam(*build_backbone("convnet", width=2), dim=16, hidden=16).double()
    x1, x2 = torch.rand(2, 6, 3, 32, 32, dtype=torch.float64)
    losses = simsiam_loss(*model(x1, x2)), equation_4(*model(x1, x2))
    for a, b in zip(*(torch.autograd.grad(loss, list(model.parameters())) for loss in losses)):
        torch.testing.assert_close(a, b)


def test_the_gradient_is_the_derivative_by_hand_and_by_finite_differences():
    p, z = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, 5, dtype=torch.float64)
    D(p, z).backward()
    # d(-cos)/dp = (cos * p/|p| - z/|z|) / |p|, and the mean over N = 3.
    u, v = F.normalize(p.detach()), F.normalize(z)
    by_hand = ((u * v).sum(1, keepdim=True) * u - v) / p.detach().norm(dim=1, keepdim=True) / 3
    torch.testing.assert_close(p.grad, by_hand)
    assert torch.autograd.gradcheck(lambda p: D(p, z), p)
    assert torch.autograd.gradcheck(lambda z: D(p.detach(), z, stop_gradient=False), z.requires_grad_())


@pytest.mark.parametrize("row", [[3.0, 0, 0, 0], [0, -1.0], [3.0, 1e-3, 0, 0], [2.0, 2.0], [3.0], [-0.5]])
def test_the_gradient_is_exact_where_one_entry_is_all_of_the_length(row):
    """With one dimension the cosine is a sign, so its gradient is 0."""
    p = torch.tensor([row], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit, p)
    exact = torch.autograd.grad(cosine_loss(p, torch.ones_like(p)), p)[0].float()
    single = p.detach().float().requires_grad_()
    D(single, torch.ones_like(single)).backward()
    torch.testing.assert_close(single.grad, exact, rtol=1e-3, atol=1e-7)


def test_rows_of_zeros_give_a_finite_loss_and_gradient():
    for bad in ("p", "z", "pz"):
        p, z = (torch.full((3, 8), float(name not in bad), requires_grad=True) for name in "pz")
        loss = D(p, z, stop_gradient=False)
        loss.backward()
        assert loss.item() == 0 and p.grad.isfinite().all() and z.grad.isfinite().all()


def test_without_h_the_symmetric_loss_has_half_the_gradient_of_D_z1_z2():
    """Sec. 4.2: without a predictor, stop-gradient only scales the gradient of a loss that collapses."""
    z1, z2 = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True).unbind()
    half = torch.autograd.grad(simsiam_loss(z1, z2, z1, z2), (z1, z2))
    whole = torch.autograd.grad(D(z1, z2, stop_gradient=False), (z1, z2))
    for a, b in zip(half, whole):
        torch.testing.assert_close(a, b / 2)


def test_each_prediction_meets_the_other_view():
    p1, p2, z1, z2 = torch.randn(4, 5, 8)
    assert simsiam_loss(p1, p2, z1, z2).item() == pytest.approx(equation_4(p1, p2, z1, z2).item())
    assert simsiam_loss(z2, z1, z1, z2).item() == pytest.approx(-1)  # perfect predictions of the other view
    assert simsiam_loss(z1, z2, z1, z2).item() > -0.9  # predictions of the same view are worth nothing
    assert simsiam_loss(p1, p2, z1, z2, symmetric=False).item() == pytest.approx(cosine_loss(p1, z2).item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_loss_is_float32_at_least_whatever_comes_in_autocast_included(dtype):
    """And the cross-entropy is that of the softmax of z (Sec. 4.5)."""
    p, z = torch.randn(4, 8).to(dtype), torch.randn(4, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        cosine = simsiam_loss(p, p, z, z)
        entropy = simsiam_loss(p, p, z, z, similarity=cross_entropy)
    assert cosine.dtype == entropy.dtype == unit(p).dtype == torch.promote_types(dtype, torch.float32)
    assert cosine.item() == pytest.approx(cosine_loss(p.double(), z.double()).item(), abs=1e-6)
    assert entropy.item() == pytest.approx(entropy_loss(p.double(), z.double()).item(), abs=1e-5)


@pytest.mark.parametrize("dtype, scale", [
    (torch.float32, 1e-30), (torch.float32, 1e30), (torch.float16, 1e4), (torch.bfloat16, 1e30),
])  # fmt: skip
def test_loss_and_monitors_do_not_depend_on_scale_or_strides(dtype, scale):
    for n, d in ((1, 1), (1, 8), (7, 64)):
        p, z = ((torch.randn(n, d).double() * scale).to(dtype) for _ in range(2))
        reference = -F.cosine_similarity(p.double() / scale, z.double() / scale, eps=0).mean().item()
        for stride in (lambda x: x, lambda x: x.T.contiguous().T, lambda x: torch.stack([x, x], 2)[:, :, 0]):
            assert D(stride(p), stride(z)).item() == pytest.approx(reference, abs=1e-5)
        assert -1e-6 <= spread(z) <= 1 + 1e-6
        assert 1 - 1e-4 <= effective_rank(z) <= max(1, min(n - 1, d)) + 1e-3
        assert torch.equal(knn_predict(z, z[:1], torch.tensor([7])), torch.full((n,), 7))


# ------------------------------------------------------------------------------------------------
# The networks, sentence by sentence

LINEAR, BN, RELU = "Linear", "BatchNorm1d", "ReLU"


def test_by_default_the_heads_are_those_of_section_3():
    """Projector: 3 layers of 2048, "BN applied to each fc layer, including its output fc", no ReLU on
    the output; h: 2048 -> 512 -> 2048, output without BN and ReLU. The output BN has no scale and
    shift (Sec. 4.4)."""
    model = SimSiam(nn.Flatten(), 8)
    assert linears(model.projector) == [(8, 2048), (2048, 2048), (2048, 2048)]
    assert linears(model.predictor) == [(2048, 512), (512, 2048)]
    assert kinds(model.projector) == [LINEAR, BN, RELU, LINEAR, BN, RELU, LINEAR, BN]
    assert kinds(model.predictor) == [LINEAR, BN, RELU, LINEAR] and model.predictor[1].affine
    assert all(w.requires_grad for w in model.parameters())
    for affine in (True, False):
        projector = build_projector(8, 6, 4, layers=3, affine=affine)
        assert [m.affine for m in projector if kinds([m]) == [BN]] == [True, True, affine]
    assert not model.projector[-1].affine


@pytest.mark.parametrize("bn, projector, predictor", [
    ("none", [LINEAR, RELU, LINEAR], [LINEAR, RELU, LINEAR]),
    ("hidden", [LINEAR, BN, RELU, LINEAR], [LINEAR, BN, RELU, LINEAR]),
    ("default", [LINEAR, BN, RELU, LINEAR, BN], [LINEAR, BN, RELU, LINEAR]),
    ("all", [LINEAR, BN, RELU, LINEAR, BN], [LINEAR, BN, RELU, LINEAR, BN]),
])  # fmt: skip
def test_table_3_says_where_BN_is(bn, projector, predictor):
    """And a Linear has a bias where no BN follows, which would subtract it again."""
    model = SimSiam(nn.Flatten(), 8, dim=4, hidden=6, layers=2, predictor_hidden=3, bn=bn)
    for head, expected in ((model.projector, projector), (model.predictor, predictor)):
        assert kinds(head) == expected
        for layer, following in zip(head, [*expected[1:], None]):
            assert not isinstance(layer, nn.Linear) or (layer.bias is None) == (following == BN)


def test_linear_layers_start_as_pytorch_does():
    """App. A: weights from U(-sqrt k, sqrt k) with k = 1 / fan-in, in the projector and in h."""
    for weight in (build_projector(400, 300, 200, 2)[0].weight, build_predictor(400, 300)[0].weight):
        assert weight.abs().max() <= 1 / 20
        assert weight.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)


def test_resnets_are_torchvisions_without_fc_and_blocks_start_as_identities():
    for arch, dim, last in (("resnet18", 512, "bn2"), ("resnet50", 2048, "bn3")):
        net, feature_dim = build_backbone(arch)
        theirs = torchvision.models.get_model(arch)
        missing, unexpected = theirs.load_state_dict(net.state_dict(), strict=False)
        assert feature_dim == dim and sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected
        zeros = [
            w.abs().max() == 0
            for k, w in net.state_dict().items()
            if re.search(rf"layer.*{last}.weight", k)
        ]
        assert zeros and all(zeros)


def test_the_CIFAR_stem_keeps_all_pixels():
    """App. D: a 3x3 convolution of stride 1, no max-pool. 32x32 pixels reach the first block as 32x32."""
    net, _ = build_backbone("resnet18", "cifar")
    sizes = []
    net.layer1.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[-2:]))
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 512)
    assert sizes == [(32, 32)] and isinstance(net.maxpool, nn.Identity)
    # as ResNet's others
    assert net.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)


def test_the_convnet_is_six_convolutions_and_a_mean_over_pixels():
    net, feature_dim = build_backbone("convnet", width=3)
    stage = ["Conv2d", "BatchNorm2d", RELU]
    assert kinds(net) == stage * 6 + ["AdaptiveAvgPool2d", "Flatten"] and feature_dim == 24
    x = torch.rand(2, 3, 32, 32)
    assert net[:-2](x).shape == (2, 24, 4, 4) and net(x).shape == (2, 24) and net(x[:1]).shape == (1, 24)
    torch.testing.assert_close(net.eval()(x), net[:-2](x).mean(dim=(2, 3)))


def test_the_small_resnet_is_three_halvings_a_residual_block_after_each_and_a_mean_over_pixels():
    net, feature_dim = build_backbone("small-resnet", width=3)
    stage = ["Conv2d", "BatchNorm2d", RELU, "BasicBlock"]
    assert kinds(net) == stage * 3 + ["Conv2d", "BatchNorm2d", RELU, "AdaptiveAvgPool2d", "Flatten"]
    assert [net[i].kernel_size for i in (0, 4, 8, 12)] == [(3, 3)] * 3 + [(1, 1)]
    x = torch.rand(2, 3, 32, 32)
    assert net[:-2](x).shape == (2, 24, 4, 4) and net(x).shape == (2, feature_dim) == (2, 24)
    torch.testing.assert_close(net.eval()(x), net[:-2](x).mean(dim=(2, 3)))
    for i, width in ((3, 3), (7, 6), (11, 12)):  # each block begins as its shortcut alone
        x = torch.rand(2, width, 5, 5)
        torch.testing.assert_close(net[i](x), x)
        assert net[i].bn1.weight.eq(1).all() and not net[i].bn2.weight.any()


@pytest.mark.parametrize("build, match", [
    (lambda: build_backbone("resnet19"), "unknown arch 'resnet19': choose from convnet"),
    (lambda: build_backbone("resnet18", "small"), "unknown stem"),
    (lambda: SimSiam(nn.Flatten(), 12, dim=8, hidden=8, bn="al"), "unknown bn"),
], ids="arch stem bn".split())  # fmt: skip
def test_an_unknown_option_is_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()


def test_views_are_encoded_one_after_the_other_so_that_each_has_its_own_BN_statistics():
    model = SimSiam(*build_backbone("convnet", width=2), dim=16, hidden=16)
    x1, x2 = torch.rand(4, 3, 32, 32), 3 * torch.rand(4, 3, 32, 32)
    p1, p2, z1, z2 = model(x1, x2)
    for x, z, p in ((x1, z1, p1), (x2, z2, p2)):
        torch.testing.assert_close(z, model.projector(model.backbone(x)))
        torch.testing.assert_close(p, model.predictor(z))
        torch.testing.assert_close(z.mean(0), torch.zeros(16), atol=1e-5, rtol=0)  # BN centres each by itself
    assert not torch.allclose(z1, model.projector(model.backbone(torch.cat([x1, x2])))[:4], atol=0.1)


def test_any_module_is_a_backbone():
    """The README's example: a ViT of torchvision; a timm model is such a module too."""
    vit = torchvision.models.VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32)
    vit.heads = nn.Identity()
    model = SimSiam(vit, 16, dim=32, hidden=24, layers=2)  # odd widths: hidden is not dim
    before = vit.conv_proj.weight.clone()
    simsiam_loss(*model(*torch.rand(2, 4, 3, 32, 32))).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(before, vit.conv_proj.weight)


def test_the_example_and_the_demonstration_of_simsiam_py_run(capsys):
    example = re.search(r"    import torch\n.*?(?=\n\"\"\")", simsiam.__doc__ + '"""', re.S)[0]
    exec(re.sub("^    ", "", example, flags=re.M), names := {})
    assert names["features"].shape == (16, 512)
    runpy.run_path(str(HERE / "simsiam.py"), run_name="__main__")
    out = capsys.readouterr().out
    losses, spreads = (
        [float(x) for x in re.findall(rf"{word}\s+(-?[\d.]+)", out)] for word in ("loss", "spread")
    )
    assert len(losses) == 10 and losses[0] == pytest.approx(0, abs=0.1) and losses[4] < -0.5
    assert spreads[4] > 0.9 and spreads[9] < 0.7 and losses[9] < losses[4]


# ------------------------------------------------------------------------------------------------
# Views (App. A), against torchvision one operation at a time, and then as a whole


def test_crop_and_resize_is_torchvisions():
    x = torch.rand(6, 3, 32, 40)
    boxes = torch.tensor(
        [[0, 0, 32, 40], [3, 7, 9, 20], [10, 1, 16, 16], [0, 0, 1, 40], [5, 0, 27, 1], [31, 39, 1, 1]]
    )
    top, left, h, w = boxes.float().unbind(1)
    for size in (16, 32, 50):
        matrices = simsiam.resize_matrix(top, h, 32, size), simsiam.resize_matrix(left, w, 40, size)
        ours = simsiam.crop_and_resize(x, *matrices)
        for i, box in enumerate(boxes.tolist()):
            theirs = v2.functional.resized_crop(x[i], *box, size=[size, size], antialias=True)
            torch.testing.assert_close(ours[i], theirs, atol=1e-5, rtol=0)


def test_crops_are_distributed_as_RandomResizedCrops():
    n, (height, width) = 4000, (40, 50)
    top, left, h, w = simsiam.crop_boxes(n, height, width, 0.2)
    crop, image = v2.RandomResizedCrop(8, scale=(0.2, 1)), torch.empty(3, height, width)
    drawn = (crop.make_params([image]) for _ in range(n))
    theirs = torch.tensor([[box[key] for key in ("top", "left", "height", "width")] for box in drawn]).float()
    mine = torch.stack([top, left, h, w], dim=1)
    assert (mine >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    for statistic in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        a, b = statistic(mine).sort().values, statistic(theirs).sort().values
        grid = torch.cat([a, b]).unique()
        difference = torch.searchsorted(a, grid, right=True) - torch.searchsorted(b, grid, right=True)
        gap = difference.abs().max() / n
        assert gap < 1.95 * math.sqrt(2 / n)  # Kolmogorov and Smirnov, at 0.1 percent


@pytest.mark.parametrize("ours, theirs, factors", [
    (simsiam.brightness, v2.functional.adjust_brightness, (0.6, 1.0, 1.4)),
    (simsiam.contrast, v2.functional.adjust_contrast, (0.6, 1.0, 1.4)),
    (simsiam.saturation, v2.functional.adjust_saturation, (0.6, 1.0, 1.4)),
    (simsiam.hue, v2.functional.adjust_hue, (-0.1, 0.0, 0.1)),
    (
        lambda x, f: simsiam.to_gray(x).expand(-1, 3, -1, -1),
        lambda x, f: v2.functional.rgb_to_grayscale(x, 3),
        (0,) * 3,
    ),
    (simsiam.blur, lambda x, f: v2.functional.gaussian_blur(x, [13, 13], [f, f]), (0.1, 1.0, 2.0)),
], ids="brightness contrast saturation hue gray blur".split())  # fmt: skip
def test_every_operation_is_torchvisions_with_a_factor_for_each_image(ours, theirs, factors):
    x = torch.rand(6, 3, 19, 17)
    x[0] = 0.5  # gray
    f = torch.tensor([*factors, *factors]).view(-1, 1, 1, 1)
    out = ours(x.clone(), f)
    for i in range(6):
        tolerance = 2e-4 if ours is simsiam.hue else 1e-5
        torch.testing.assert_close(out[i], theirs(x[i], f[i].item()), atol=tolerance, rtol=0)


def recolored(image, n=4000, blurred=0.0):
    """Two views of n copies of an image (3, H, W) in [0, 1], whose crops were cut before: (2, n, 3, H, W)."""
    crops = (image * 255).round().to(torch.uint8).expand(n, 2, -1, -1, -1)
    return torch.stack(train.two_views(crops, size=0, crop_min=0, blurred=blurred))


def test_brightness_and_contrast_are_drawn_for_each_image_in_their_ranges():
    """App. A: 0.6 to 1.4 each, in 0.8 of the images. A gray image knows no other jitter."""
    image = torch.tensor([0.4, 0.6]).view(1, 1, 2).expand(3, 2, 2)
    dark, bright = recolored(image)[:, :, 0, 0].unbind(-1)  # (2, n)
    brightness, contrast = bright + dark, 5 * (bright - dark) / (bright + dark)
    jittered = (brightness - 1).abs() > 1e-4
    assert jittered.float().mean().item() == pytest.approx(0.8, abs=0.02)
    for mine in (brightness, contrast):
        assert_uniform(mine[jittered], 0.6, 1.4)
        assert_unrelated(*mine)  # every view has its own
        for view in (0, 1):  # and so has every image
            assert_unrelated(mine[view][1:], mine[view][:-1])
    assert_unrelated(brightness[jittered], contrast[jittered])
    assert_unrelated(*jittered)


def test_saturation_and_hue_are_drawn_for_each_image_in_their_ranges_and_gray_is_a_fifth():
    """App. A: saturation 0.6 to 1.4, hue -0.1 to 0.1, gray with probability 0.2."""
    image = torch.full((3, 2, 2), 0.4)
    # one pixel bright, two are red
    image[:, 0, 0], image[:, 1] = 0.5, torch.tensor([0.5, 0.4, 0.4]).view(3, 1)
    x = recolored(image)
    bright, plain, red = x[:, :, 0, 0, 0], x[:, :, 0, 0, 1], x[..., 1, 0]
    chroma = red.amax(dim=2) - red.amin(dim=2)
    gray = chroma < 1e-4
    assert gray.float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert_unrelated(*gray)  # not both views or none
    saturation = chroma / (bright - plain)  # brightness and contrast scale both alike
    turn = (red[:, :, 1] - red[:, :, 2]) / chroma / 6  # of a full circle, as in HSV
    jittered = ~gray & ((bright - 128 / 255).abs() > 1e-4)
    both = jittered[0] & jittered[1]
    for mine, low, high in ((saturation, 0.6, 1.4), (turn, -0.1, 0.1)):
        assert_uniform(mine[jittered], low, high)
        assert_unrelated(mine[0][both], mine[1][both])
        assert_unrelated(mine[jittered][1:], mine[jittered][:-1])


def test_the_four_jitters_come_once_each_in_an_order_that_varies(monkeypatch):
    names, orders, order = ("brightness", "contrast", "saturation", "hue"), set(), []
    for name in names:
        operation = getattr(simsiam, name)
        spy = lambda x, f, name=name, operation=operation: order.append(name) or operation(x, f)  # noqa: E731
        monkeypatch.setattr(simsiam, name, spy)
    for _ in range(200):
        order.clear()
        recolored(torch.rand(3, 2, 2), n=2)
        orders.add(tuple(order))
    assert orders == {*itertools.permutations(names)}


def test_blur_comes_as_often_and_as_wide_as_it_should():
    """App. A: sigma 0.1 to 2.0. The second moment of a blurred point is sigma squared."""
    point = torch.zeros(3, 17, 17)
    point[:, 8, 8] = 1
    for share in (0.0, 0.5, 1.0):
        x = recolored(point, 1000, share)[:, :, 0]
        x = x - x.amin(dim=(2, 3), keepdim=True)
        axis = torch.arange(17) - 8.0
        variance = (x.sum(dim=2) * axis.square()).sum(dim=2) / x.sum(dim=(2, 3))
        wide = variance > 0.25  # sigma above 0.5, where a pixel is fine enough to see it
        assert wide.float().mean().item() == pytest.approx(share * 1.5 / 1.9, abs=0.04)
        if share:
            assert_uniform(variance[wide].sqrt(), 0.5, 2.0)
            assert_unrelated(*variance)


def cut(count=2000, crop_min=0.2):
    """Of two views each of a half white image: white's share of the crop, and whether it is on the right."""
    image = torch.full((3, 32, 32), 50, dtype=torch.uint8)
    image[:, :, 16:] = 200
    views = torch.stack(train.two_views(image.expand(count, -1, -1, -1), 32, crop_min, 0.0))[:, :, 0]
    # whatever its brightness is
    middle = (views.amax(dim=(2, 3)) + views.amin(dim=(2, 3)))[..., None, None] / 2
    white = (views > middle).float()
    return white.mean(dim=(2, 3)), white[..., -1].mean(dim=2) > white[..., 0].mean(dim=2)


def test_the_two_views_are_cropped_and_flipped_independently():
    white, right = cut()
    inside = (white > 0) & (white < 1)  # the edge is in the crop
    both = inside[0] & inside[1]
    assert_unrelated(white[0][both], white[1][both])
    assert_unrelated(right[0][both], right[1][both])
    assert 0.45 < right[inside].float().mean() < 0.55
    x = torch.rand(400, 3, 8, 8)  # and to a flipped image nothing else happens
    out = simsiam.crop_and_flip(x, 8, crop_min=1.0)
    unchanged = [
        torch.allclose(a, b, atol=1e-6) or torch.allclose(a, b.flip(2), atol=1e-6)
        for a, b in zip(out, x)
    ]
    assert sum(unchanged) > 20  # at scale 1 some aspect ratios still cut a little off


def test_crop_min_is_the_least_area_of_a_view():
    white, _ = cut()
    assert ((white > 0) & (white < 0.15)).any()
    white, _ = cut(crop_min=0.9)
    assert white.min() > 0.4 and white.max() < 0.6


def test_views_are_in_range_of_their_size_and_come_again_with_the_seed(monkeypatch):
    images, views = train.textures(64, seed=0)[0], []
    for _ in range(2):
        torch.manual_seed(1)
        views.append(torch.stack(train.two_views(images, 24, 0.2, 0.5)))
    assert torch.equal(*views) and views[0].shape == (2, 64, 3, 24, 24)
    assert views[0].min() >= 0 and views[0].max() < 1 + 1e-6
    x, mean, std = views[0][0], [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    standardized = train.normalize(x, mean, std)
    torch.testing.assert_close(standardized, v2.functional.normalize(x, mean, std))
    assert standardized.is_contiguous(memory_format=torch.channels_last)
    wide = simsiam.crop_and_flip(torch.linspace(0, 1, 60).expand(200, 3, 20, 60), 16, 0.2)  # not square
    assert (
        wide.shape == (200, 3, 16, 16)
        and wide.isfinite().all()
        and wide.min() >= 0
        and wide.max() < 1 + 1e-6
    )
    blurred, least, boxes = [], [], simsiam.crop_boxes
    monkeypatch.setattr(simsiam, "blur", lambda x, sigma: blurred.append(len(x)) or x)
    monkeypatch.setattr(
        simsiam,
        "crop_boxes",
        lambda n, h, w, crop_min: least.append(crop_min) or boxes(n, h, w, crop_min),
    )
    for share in (0.0, 1.0):
        train.two_views(images, 24, 0.3, share)
    assert blurred == [128]  # images in memory too
    simsiam.augment(images / 255, 24)
    assert 10 < blurred.pop() < 54 and least == [0.3, 0.3, 0.2]  # the authors' half, App. A's least area


# ------------------------------------------------------------------------------------------------
# The monitors


def test_spread_is_the_std_of_normalized_outputs():
    """Sec. 4.1, over the batch, averaged over channels, beside footnote 3's 1 / sqrt(d)."""
    z = torch.randn(50, 20) * torch.rand(50, 1) + torch.arange(20) / 10
    columns = [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in z.tolist()]
    deviations = (torch.tensor(column).std(correction=0).item() for column in zip(*columns))
    by_hand = sum(deviations) / 20 * math.sqrt(20)
    assert spread(z).item() == pytest.approx(by_hand, abs=1e-5)
    assert spread(torch.randn(4096, 512)).item() == pytest.approx(1, abs=0.01)  # footnote 3
    assert spread(torch.ones(64, 512) * torch.rand(64, 1)).item() == pytest.approx(0, abs=1e-5)
    assert spread(torch.randn(1, 8)).item() == 0


def test_BN_on_z_leaves_a_collapsed_batch_the_spread_of_all_against_one():
    """Their mean is zero, so they can't all point one way: the sum of z / |z| is never longer than N - 2.

    Scale the longest z to 1: it is minus the sum of the others, so their lengths w <= 1 add up to 1 or more,
    and the sum of all z / |z| is that of (1 - w) z / |z| over the others, no longer than N - 1 - 1.
    """
    for n in (8, 64, 512):
        z = F.batch_norm(torch.eye(n)[:, :1] * torch.randn(1, 16).sign(), None, None, training=True)
        assert spread(z).item() == pytest.approx(2 * math.sqrt(n - 1) / n, abs=1e-3)
    x = torch.randn(8, 4, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.1)
    for _ in range(500):  # whatever else there is, nothing is nearer
        z = F.batch_norm(x, None, None, training=True)
        length = F.normalize(z).sum(dim=0).norm()
        optimizer.zero_grad()
        (-length).backward()
        optimizer.step()
    assert 6 - 1e-2 < length.item() < 6 + 1e-4


def test_effective_rank_is_the_exponential_entropy_of_the_singular_values():
    # Three times +-e1 and once +-e2, centred: singular values sqrt(6) and sqrt(2).
    uneven = torch.tensor([[1.0, 0, 0]] * 3 + [[-1.0, 0, 0]] * 3 + [[0, 1.0, 0], [0, -1.0, 0]])
    a, b = (math.sqrt(s) / (math.sqrt(6) + math.sqrt(2)) for s in (6, 2))
    axes = torch.cat([torch.eye(8), -torch.eye(8)])
    for features, expected in (
        (uneven, a**-a * b**-b), (uneven * torch.rand(8, 1), a**-a * b**-b),  # of unit rows
        (axes, 8), (axes[[0, 8]], 1), (torch.tensor([[1.0, 0.5, 0], [1.0, -0.5, 0]]), 1),  # around the mean
        (torch.ones(5, 3), 1), (torch.rand(1, 3), 1),
    ):  # fmt: skip
        assert effective_rank(features).item() == pytest.approx(expected, abs=1e-3)
    z = torch.randn(512, 4) @ torch.randn(4, 64)  # 4 of 64 dimensions are in use: spread does not see it
    assert spread(z) > 0.9 and effective_rank(z) < 5
    z[3, 1] = math.inf
    assert effective_rank(z).isnan()


def vote(queries, bank, labels, k=200, temperature=0.2):
    """InstDisc's weighted vote, one query and one neighbour at a time."""
    predicted = []
    for similarities in (F.normalize(queries.double()) @ F.normalize(bank.double()).T).tolist():
        votes = dict.fromkeys(labels.tolist(), 0.0)
        for s, y in sorted(zip(similarities, labels.tolist()), reverse=True)[:k]:
            votes[y] += math.exp(s / temperature)
        predicted.append(max(votes, key=votes.get))
    return predicted


def test_knn_is_the_brute_force_vote():
    bank, queries, labels = torch.randn(600, 16), torch.randn(200, 16), torch.randint(4, (600,))
    labels = torch.tensor([-5, 1000, 7, 0])[labels]  # any labels
    for k, temperature in ((7, 0.2), (7, 2.0), (1, 0.2), (50, 0.02), (600, 0.2)):
        expected = vote(queries, bank, labels, k, temperature)
        assert knn_predict(queries, bank, labels, k, temperature).tolist() == expected
    default = vote(queries, bank, labels)  # k = 200, T = 0.2: the authors', issue 10 of their repository
    for chunk in (1, 600, 700, 2**25):  # however memory is bounded
        assert knn_predict(queries, bank, labels, chunk_elements=chunk).tolist() == default
    assert knn_predict(queries, bank, labels).tolist() == default
    for k, temperature in ((150, 0.2), (250, 0.2), (200, 0.1), (200, 0.25)):  # others would show
        assert vote(queries, bank, labels, k, temperature) != default
    assert knn_predict(bank[:3] * 2, bank[:3], labels[:3]).tolist() == vote(bank[:3], bank[:3], labels[:3])


# ------------------------------------------------------------------------------------------------
# Recipes, and flags on the way to where they act

PAPER = {  # Sec. 3 and App. A; App. D
    "photos": dict(
        arch="resnet50", stem="imagenet", image_size=224, layers=3, hidden=2048, dim=2048,
        predictor_hidden=None, epochs=100, batch_size=512, base_lr=0.05, weight_decay=1e-4,
        warmup_epochs=0, crop_min=0.2, blur=0.5, view_scale=1,
        mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], knn_every=10,
    ),
    "cifar10": dict(
        arch="resnet18", stem="cifar", image_size=32, layers=2, hidden=2048, dim=2048, predictor_hidden=None,
        epochs=800, batch_size=512, base_lr=0.03, weight_decay=5e-4, warmup_epochs=0, crop_min=0.2, blur=0.0,
        mean=None, std=None, knn_every=10, view_scale=1,
    ),
}  # fmt: skip
PAPER["cifar100"] = PAPER["cifar10"]
PAPER["textures"] = dict(  # ours, after App. D: those of the README's results
    arch="convnet", width=16, image_size=32, layers=2, hidden=512, dim=512, epochs=20, batch_size=64,
    base_lr=0.4, weight_decay=5e-4, crop_min=0.2, blur=0.0, mean=None, std=None, knn_every=5,
    view_scale=1,
)  # fmt: skip
PAPER["fashion-mnist"] = PAPER["textures"] | dict(crop_min=0.4, image_size=28, epochs=30, knn_every=10)
PAPER["photos --recipe small"] = PAPER["textures"] | dict(
    arch="small-resnet", width=32, view_scale=0.75, epochs=50, base_lr=0.24, knn_every=10
)
OFF = dict(  # the paper's method: Eq. 4, Table 1c, Table 3c
    no_stop_gradient=False, predictor="mlp", bn="default", affine=False, similarity="cosine",
    asymmetric=False, pairs=1, alternate=1, eta_momentum=0.0, decay_predictor_lr=False, seed=0,
    holdout=False, amp="auto",
)  # fmt: skip


@pytest.mark.parametrize("data", PAPER)
def test_recipes_are_the_papers_and_every_ablation_is_off(data):
    args = vars(args_of(*data.split()))
    expected = OFF | PAPER[data]
    assert {name: args[name] for name in expected} == expected
    assert args_of(*data.split(), "--crop-min", "0.5").crop_min == 0.5  # a flag is over the recipe


def test_warmup_is_ten_epochs_from_batch_1024_on():
    """Table 2."""
    for batch, epochs in ((1023, 0), (1024, 10), (4096, 10)):
        assert args_of("cifar10", "--batch-size", batch).warmup_epochs == epochs
    assert args_of("cifar10", "--batch-size", 4096, "--warmup-epochs", 3).warmup_epochs == 3


@pytest.mark.parametrize("flags, projector, predictor", [
    ("", [(16, 16), (16, 16)], [(16, 4), (4, 16)]),
    ("--layers 4 --hidden 24 --dim 20", [(16, 24), (24, 24), (24, 24), (24, 20)], [(20, 5), (5, 20)]),
    ("--predictor-hidden 7 --width 3", [(24, 16), (16, 16)], [(16, 7), (7, 16)]),
    ("--predictor none", [(16, 16), (16, 16)], []),
    ("--predictor fixed", [(16, 16), (16, 16)], [(16, 4), (4, 16)]),
    *[
        (f"--bn {bn}", [(16, 16), (16, 16)], [(16, 4), (4, 16)])
        for bn in ("none", "hidden", "default", "all")
    ],
    ("--affine", [(16, 16), (16, 16)], [(16, 4), (4, 16)]),
])  # fmt: skip
def test_flags_of_the_network_reach_it(small_textures, flags, projector, predictor):
    args = args_of(*SMALL, *flags.split())
    model = trainer_of(args)[0].model
    assert linears(model.projector) == projector and linears(model.predictor) == predictor
    assert next(model.backbone.parameters()).shape == (args.width, 3, 3, 3)
    expected = SimSiam(nn.Flatten(), 8, dim=8, hidden=8, layers=args.layers, bn=args.bn, affine=args.affine)
    assert kinds(model.projector) == kinds(expected.projector)
    assert not predictor or kinds(model.predictor) == kinds(expected.predictor)
    scaled = [[m.affine for m in one.projector if kinds([m]) == [BN]] for one in (model, expected)]
    assert scaled[0] == scaled[1]
    assert all(w.requires_grad == (args.predictor != "fixed") for w in model.predictor.parameters())
    if args.predictor == "none":  # Table 1a: h is the identity
        p1, p2, z1, z2 = model(*torch.rand(2, 4, 3, 32, 32))
        assert torch.equal(p1, z1) and torch.equal(p2, z2)


def test_arch_and_stem_reach_the_network():
    for arch, stem, kernel, width in (
        ("resnet18", "cifar", 3, 512),
        ("resnet18", "imagenet", 7, 512),
        ("resnet50", "cifar", 3, 2048),
    ):
        args = args_of("cifar10", "--arch", arch, "--stem", stem, "--dim", 8, "--hidden", 8)
        model = train.build_model(args)
        assert (
            model.backbone.conv1.kernel_size == (kernel, kernel)
            and linears(model.projector)[0] == (width, 8)
        )


def test_width_is_of_our_own_networks_and_stem_of_a_ResNet(capsys):
    for arch in ("convnet", "small-resnet"):
        backbone = train.build_model(args_of(*SMALL, "--arch", arch, "--width", 3)).backbone
        assert backbone[0].out_channels == 3
        line = fails([*SMALL, "--arch", arch, "--stem", "cifar"], capsys)
        assert f"--stem changes nothing with --arch {arch}" in line
    line = fails(["textures", "--arch", "resnet18", "--width", 3], capsys)
    assert "--width changes nothing with --arch resnet18" in line


def test_the_seed_is_that_of_the_weights_the_order_and_the_views(small_textures):
    a, b, again = trainer("--seed", "1"), trainer("--seed", "2"), trainer("--seed", "1")
    assert same(a.model.state_dict(), again.model.state_dict())
    assert not torch.equal(a.model.backbone[0].weight, b.model.backbone[0].weight)
    order = [first(t)[0][1].tolist() for t in (a, b, again)]
    assert order[0] == order[2] != order[1]
    b.model.load_state_dict(a.model.state_dict())
    for t in (a, b):  # the same weights and images: only the views differ
        t.update(t.images.source[:100], torch.arange(100))
    assert a.sums.tolist() != b.sums.tolist()


def test_a_recipe_can_be_taken_for_other_data(tmp_path, capsys):
    root = write_folder(tmp_path / "photos")
    assert [args_of(root, "--recipe", name).arch for name in ("cifar10", "imagenet", "small")] == [
        "resnet18", "resnet50", "small-resnet"
    ]  # fmt: skip
    args = args_of(root, "--recipe", "small", "--epochs", 3)  # a flag counts more
    assert (args.epochs, args.base_lr) == (3, train.RECIPES["small"]["base_lr"])
    train.main([str(root), *FOLDER, "--recipe", "cifar10", "--out", "run"])
    saved = torch.load("run/checkpoint.pt", weights_only=True)["args"]
    assert (saved["recipe"], saved["weight_decay"], saved["layers"]) == ("cifar10", 5e-4, 2)
    assert len(saved["mean"]) == 3  # measured
    assert args_of("--resume", "--out", "run").weight_decay == 5e-4
    assert "--recipe small" in fails(["small"], capsys)
    assert evaluation.get_args(["random", "--data", str(root), "--recipe", "cifar10"])[0].stem == "cifar"


@pytest.mark.parametrize("flag, meant", [
    ("--lr", "--base-lr"), ("--batch", "--batch-size"), ("--epoch", "--epochs"), ("--wd", None)
])  # fmt: skip
def test_a_near_miss_is_answered_with_the_right_name(flag, meant, capsys):
    for main, words in ((train.main, []), (evaluation.main, ["random"])):
        line = fails([*words, flag, "1"], capsys, main)
        assert (f"do you mean {meant}?" in line) if meant else ("do you mean" not in line)
    if not torch.cuda.is_available():
        assert "no cuda device was found: choose cpu" in fails(["--device", "cuda"], capsys)


def test_an_empty_channel_is_no_division_by_zero(tmp_path):
    for i in range(8):
        write_image(tmp_path / "photos" / f"{i}.png", [30 * i, 200 - 10 * i, 0])
    train.main([str(tmp_path / "photos"), *FOLDER, "--recipe", "small", "--out", "run"])
    assert torch.load("run/checkpoint.pt", weights_only=True)["args"]["std"][2] == 1e-3
    train.main(["--resume", "--out", "run"])


def test_mean_and_std_of_files_are_those_of_their_centres(tmp_path, from_files):
    images, test = load_folder(write_folder(tmp_path / "photos"), "--recipe", "small")
    pixels = images[None, torch.arange(len(images))][0].double().div(255).transpose(0, 1).flatten(1)
    for part in (images, test):
        assert part.mean == pytest.approx(pixels.mean(dim=1).tolist(), abs=1e-5)
        assert part.std == pytest.approx(pixels.std(dim=1, correction=0).tolist(), abs=1e-5)


# ------------------------------------------------------------------------------------------------
# Data


def test_textures_are_made_from_the_seed_balanced_and_others_for_the_test():
    images, labels = make_textures(200, seed=3)
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images, make_textures(200, seed=3)[0])
    assert labels.bincount().tolist() == [20] * 10
    whole, test = train.load_data(args_of("textures"))
    assert len(whole) == 5000 and len(test) == 2000
    assert not {x.numpy().tobytes() for x in whole.source} & {x.numpy().tobytes() for x in test.source}


def test_the_class_of_a_texture_is_its_pattern_and_shows_not_in_its_colours():
    (bank, bank_labels), (images, labels) = train.textures(2000, seed=0), train.textures(500, seed=1)

    def accuracy(describe):
        mean = describe(bank / 255).mean(dim=0)
        predicted = knn_predict(describe(images / 255) - mean, describe(bank / 255) - mean, bank_labels, k=20)
        return (predicted == labels).float().mean().item()

    def spectrum(x):  # blind to where a pattern lies, and to its colour
        gray = x.mean(dim=1) - x.mean(dim=(1, 2, 3)).view(-1, 1, 1)
        return torch.fft.rfft2(gray).abs().log1p().flatten(1)

    assert accuracy(lambda x: x.mean(dim=(2, 3))) < 0.2  # chance is 0.1
    assert accuracy(lambda x: x.std(dim=(2, 3))) < 0.25
    assert accuracy(spectrum) > 0.4


def test_every_epoch_is_another_permutation_cut_over_the_ranks():
    """What DistributedSampler does only when set_epoch is called."""
    def epoch(number, rank=0, world=1):
        steps = train.schedule(103, 20, 0, range(5 * number, 5 * number + 5), rank, world)
        return torch.cat([i for _, i in steps])

    one, two = epoch(0).tolist(), epoch(1).tolist()
    assert len(one) == 100 == len(set(one)) == len(set(two))
    assert one != two and set(one) != set(two)
    halves = [epoch(0, rank, 2).tolist() for rank in (0, 1)]
    assert not set(halves[0]) & set(halves[1]) and sorted(sum(halves, [])) == sorted(one)
    # of a file's crops
    keys = [[key for key, _ in train.schedule(50, 10, seed, range(10))] for seed in (0, 1)]
    assert all(len(set(k[:5])) == len(set(k[5:])) == 1 for k in keys) and len({*keys[0], *keys[1]}) == 4
    # it goes on in the middle of an epoch
    whole = [i.tolist() for _, i in train.schedule(50, 10, 7, range(12))]
    assert whole[8:] == [i.tolist() for _, i in train.schedule(50, 10, 7, range(8, 12))]
    assert [2 * i for i in whole] == [i.tolist() for _, i in train.schedule(50, 10, 7, range(12), pairs=2)]


def write_cifar(root, name):
    """A CIFAR of a few images, in its own format: its first and last file's pixels, and how many
    files train."""
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    folder, key = root / kind.base_folder, "labels" if name == "cifar10" else "fine_labels"
    folder.mkdir(parents=True)
    made = []
    for file, _ in kind.train_list + kind.test_list:
        made.append(torch.randint(256, (12, 3072), dtype=torch.uint8))
        content = {"data": made[-1].numpy(), key: [i % 10 for i in range(12)]}
        (folder / file).write_bytes(pickle.dumps(content))
    classes = {kind.meta["key"]: [str(i) for i in range(100)]}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(classes))
    return made[0], made[-1], len(kind.train_list)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_its_own_files(name, tmp_path, monkeypatch):
    start_, end, files = write_cifar(tmp_path / "data", name)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *a: True)
    images, test = train.load_data(args_of(name))
    assert len(images) == 12 * files and len(test) == 12
    assert torch.equal(images.source[:12], start_.view(12, 3, 32, 32))  # channels, rows, columns
    assert (
        torch.equal(test.source, end.view(12, 3, 32, 32))
        and test.labels.tolist() == [i % 10 for i in range(12)]
    )


def test_mean_and_std_are_those_of_the_pixels_that_are_trained_on_or_the_flags(small_textures):
    for flags in ([], ["--holdout"]):
        images, test = train.load_data(args_of(*flags))
        pixels = images.source.double().div(255).transpose(0, 1).flatten(1)
        for part in (images, test):
            assert part.mean == pytest.approx(pixels.mean(dim=1).tolist(), abs=1e-5)
            # not per image
            assert part.std == pytest.approx(pixels.std(dim=1, correction=0).tolist(), abs=1e-5)
    for part in train.load_data(args_of(*"--mean 0.1 0.9 1 --std 0.4 0.5 0.6".split())):
        assert (part.mean, part.std) == ([0.1, 0.9, 1.0], [0.4, 0.5, 0.6])
    train.main([*SMALL, "--epochs", "1", "--out", "run"])
    saved = torch.load("run/checkpoint.pt", weights_only=True)["args"]
    images, _ = train.load_data(args_of())
    assert (saved["mean"], saved["std"]) == (images.mean, images.std)


def test_fashion_mnist_is_read_from_its_own_files_in_data_dir_and_becomes_rgb(tmp_path):
    raw = tmp_path / "elsewhere" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 40), ("t10k", 20)):
        pixels = torch.randint(256, (n, 28, 28), dtype=torch.uint8)
        images = struct.pack(">IIII", 2051, n, 28, 28) + pixels.numpy().tobytes()
        labels = struct.pack(">II", 2049, n) + bytes(i % 10 for i in range(n))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    images, test = train.load_data(args_of("fashion-mnist", "--data-dir", "elsewhere"))
    assert (
        images.source.shape == (40, 3, 28, 28)
        and len(test) == 20
        and test.labels.tolist() == [*range(10)] * 2
    )
    assert all(torch.equal(test.source[:, c], pixels) for c in range(3))


def test_without_network_one_line_says_where_the_archive_belongs(capsys, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    for name, archive in (
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("fashion-mnist", "FashionMNIST/raw"),
    ):
        line = fails([name, "--data-dir", "here"], capsys)
        assert archive in line and "--data-dir here" in line


def test_holdout_keeps_the_same_tenth_of_the_training_set_apart_whatever_the_seed(small_textures):
    (images, test), (_, other) = (train.load_data(args_of("--holdout", "--seed", seed)) for seed in (0, 1))
    whole, labels = train.textures(5000, seed=0)
    at = {x.numpy().tobytes(): y for x, y in zip(whole, labels.tolist())}
    assert len(test) == 50 and len(images) == 450
    assert {x.numpy().tobytes() for x in torch.cat([images.source, test.source])} == at.keys()
    for part in (images, test):  # labels follow their images
        assert [at[x.numpy().tobytes()] for x in part.source] == part.labels.tolist()
    assert torch.equal(test.source, other.source)


def test_what_was_held_out_is_tested_on_again_and_what_was_not_is_warned_of(pretrained, capsys):
    train.main([*SMALL, "--epochs", "1", "--holdout", "--out", "held"])
    assert "next: python eval.py held --holdout\n" in capsys.readouterr().out
    np.savez("seen.npz", train_images=np.zeros((50, 8, 8), np.uint8), train_labels=np.arange(50) % 2)
    train.main(["seen.npz", *FOLDER, "--out", "all"])
    for words, warnings in (
        ("held", 0), ("run", 1), ("run --untrained", 0), ("all", 1), ("all --data ./seen.npz", 1),
    ):  # fmt: skip
        evaluation.main([*words.split(), "knn", "--holdout"])
        assert capsys.readouterr().err.count("trained without --holdout") == warnings, words


def arrays_of(n=40, side=28, **more):
    """As in a file of MedMNIST: gray, and labels in a column."""
    made = {}
    for name, count in (("train", n), ("val", 12), ("test", 20)):
        made[f"{name}_images"] = torch.randint(256, (count, side, side), dtype=torch.uint8).numpy()
        made[f"{name}_labels"] = (torch.arange(count) % 3).unsqueeze(1).numpy()
    return made | more


def test_a_npz_file_in_the_form_of_medmnist_is_a_data_set(capsys):
    made = arrays_of()
    np.savez("med.npz", **made)
    for flags, name in (([], "test"), (["--holdout"], "val")):  # the test images choose nothing
        images, test = train.load_data(args_of("med.npz", *flags))
        for part, key in ((images, "train"), (test, name)):
            assert all(torch.equal(part.source[:, c], torch.tensor(made[f"{key}_images"])) for c in range(3))
            assert torch.equal(part.labels, torch.tensor(made[f"{key}_labels"])[:, 0])
    # the recipe `small`
    assert args_of("med.npz").arch == "small-resnet" and args_of("med.npz").image_size == 32
    train.main(["med.npz", *FOLDER, "--knn-every", "1"])
    evaluation.main(["runs/med.npz", "knn", "--k", "3"])
    assert "knn (k=3, T=0.2)" in capsys.readouterr().out
    rgb = torch.randint(256, (9, 8, 8, 3), dtype=torch.uint8)
    np.savez("rgb.npz", train_images=rgb.numpy())
    images, test = train.load_data(args_of("rgb.npz"))
    assert torch.equal(images.source, rgb.permute(0, 3, 1, 2)) and images.labels is test is None
    np.savez("untested.npz", **{name: array for name, array in made.items() if name != "test_labels"})
    train.main(["untested.npz", *FOLDER, "--knn-every", "1"])
    evaluation.main(["runs/untested.npz"])  # a picture of neighbours
    assert "no test images with labels" in capsys.readouterr().out
    np.savez("half.npz", **{name: array for name, array in made.items() if name != "train_labels"})
    train.main(["half.npz", *FOLDER, "--knn-every", "1"])
    assert rows("runs/half.npz")[0]["knn"] is None
    np.savez("many.npz", **arrays_of(train_labels=np.zeros((40, 14))))
    assert train.load_data(args_of("many.npz"))[0].labels is None
    assert "several labels for each image: not used" in capsys.readouterr().err
    np.savez("odd.npz", **arrays_of(train_labels=np.arange(40, dtype=">i4"), train_lables=np.zeros(1)))
    assert train.load_data(args_of("odd.npz"))[0].labels.tolist() == [*range(40)]
    assert "not used: train_lables" in capsys.readouterr().err
    for wrong, word in (
        (dict(train_labels=np.zeros(39)), "40 whole numbers"),
        (dict(train_images=np.zeros((40, 8, 8))), "float64"),
        (dict(train_images=np.zeros((4, 8, 8, 8), np.uint8)), "(4, 8, 8, 8)"),
        (dict(train_labels=np.array(3)), "()"),
        (dict(train_labels=np.arange(40) / 2), "whole numbers"),
        (dict(train_labels=np.array(["a"] * 40)), "train_labels"),
        (dict(train_labels=np.full(40, np.nan)), "whole numbers"),
        (dict(train_images=np.zeros((40, 0, 8), np.uint8)), "(40, "),
        (dict(test_images=np.zeros((0, 8, 8), np.uint8)), "test_images"),
    ):
        np.savez("wrong.npz", **arrays_of(**wrong))
        assert word in fails(["wrong.npz"], capsys)
    np.savez("none.npz", other=np.zeros(1))
    assert "train_images" in fails(["none.npz"], capsys)
    Path("none.npz").write_bytes(b"no archive")
    assert "can't be read as .npz" in fails(["none.npz"], capsys)
    np.savez("pickled.npz", train_images=np.array([print], dtype=object))
    assert "can't be read as .npz" in fails(["pickled.npz"], capsys)


def test_a_program_can_bring_its_own_tensors(capsys):
    mine = dict(train_images=torch.randint(256, (40, 3, 20, 20), dtype=torch.uint8))
    train.main([*FOLDER, "--epochs", "2", "--out", "whole"], mine)
    train.main([*FOLDER, "--epochs", "2", "--recipe", "small", "--out", "half"], mine)
    assert same(weights("whole/checkpoint.pt"), weights("half/checkpoint.pt"))
    train.main(["--resume", "--out", "whole"], mine)
    assert "already finished" in capsys.readouterr().out
    assert "--data FILE.npz" in fails(["whole"], capsys, evaluation.main)
    line = fails(["--resume", "--out", "whole"], capsys)
    assert "train.main(['--resume', '--out', 'whole'], arrays)" in line
    with pytest.raises(SystemExit):
        train.main([*FOLDER], mine["train_images"])
    line = "error: arrays are a dict, such as dict(train_images=x), and not Tensor\n"
    assert capsys.readouterr().err == line
    flipped = dict(train_images=mine["train_images"].flip(3))  # as many, but others
    with pytest.raises(SystemExit):
        train.main(["--resume", "--out", "whole"], flipped)
    assert "not the same 40 that the run began with" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# Folders


@pytest.fixture
def from_files(monkeypatch):
    """As of pictures of many sizes: they are decoded when asked for, and cropped by the loader."""
    monkeypatch.setattr(train, "IN_MEMORY", 0)


def load_folder(root, *flags):
    return train.load_data(args_of(root, *FOLDER, *flags))


def test_a_folder_with_classes_trains_and_one_without_is_not_asked_for_kNN(tmp_path, capsys):
    train.main([str(write_folder(tmp_path / "photos")), "--knn-every", "1", *FOLDER])
    assert rows("runs/photos")[0]["knn"] is not None
    train.main([str(write_folder(tmp_path / "plain", parts=["."])), *FOLDER])
    assert "no labelled test images, so no kNN" in capsys.readouterr().out
    assert rows("runs/plain")[0]["knn"] is None


def test_the_folder_above_an_image_is_its_class_in_train_and_val_alike(tmp_path, capsys):
    reds = {"ant": 10, "cat": 60, "dog": 110, "eel": 160}
    for part, names in (("train", ("cat", "dog", "eel")), ("val", ("ant", "cat", "eel"))):
        for name, i in itertools.product(names, range(2)):
            write_image(tmp_path / "photos" / part / name / "deeper" / f"{i}.png", [reds[name], 0, 0])
    images, test = load_folder(tmp_path / "photos")
    assert images.labels.unique().tolist() == [1, 2, 3] and test.labels.unique().tolist() == [0, 1, 3]
    for part in (images, test, images.subset(torch.tensor([5, 0, 3]))):  # labels follow a subset
        plain, indices = part[None, torch.arange(len(part))]
        assert [[*reds.values()].index(x[0, 0, 0].item()) for x in plain] == part.labels.tolist()
        assert indices.tolist() == [*range(len(part))]
    assert "ant, dog" in capsys.readouterr().err


def fill(root, *places):
    for i, place in enumerate(places):
        write_image(root / place / "1.png", [10 * i, 0, 0])
        write_image(root / place / "2.png", [10 * i + 1, 0, 0])
    return root


def reds(images):
    return sorted(images[None, torch.arange(len(images))][0][:, 0, 0, 0].tolist())


@pytest.mark.parametrize("partner", ["val", "valid", "validation", "test", "testing", "Test"])
def test_the_images_beside_train_are_tested_on_and_never_trained_on(partner, tmp_path, capsys):
    root = fill(tmp_path / "photos", "train/cat", "train/dog", f"{partner}/cat", f"{partner}/dog", "notes")
    images, test = load_folder(root)
    assert (
        reds(images) == [0, 1, 10, 11]
        and reds(test) == [20, 21, 30, 31]
        and images.classes == ["cat", "dog"]
    )
    assert f"train, tests on {partner}/; 2 classes: cat, dog" in capsys.readouterr().out
    fill(tmp_path / "photos", "val/cat")  # the test images of a data set with both stay for the end
    capsys.readouterr()
    assert len(load_folder(root)[1]) == (4 if partner == "val" else 2)
    beside, unused = re.search("beside (.*), not used: (.*)", capsys.readouterr().out).groups()
    assert beside == f"{root}/train"
    assert {*unused.split(", ")} == {f"{root}/{name}" for name in ("notes", partner) if name != "val"}
    (root / "train").rename(root / "Training")
    assert reds(load_folder(root)[0]) == [0, 1, 10, 11]
    (root / "Training").rename(root / "other")
    assert "no" in (line := fails([root, *FOLDER], capsys)) and line.endswith("train to train on")


def test_a_folder_that_cannot_be_read_is_warned_of(tmp_path, capsys, monkeypatch):
    root = fill(tmp_path / "photos", "cat", "dog")
    scandir = os.scandir

    def locked(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert len(load_folder(root)[0]) == 2
    assert f"warning: {root}/dog can't be read (Permission denied)" in capsys.readouterr().err


def test_classes_without_a_split_are_labels_for_holdout(tmp_path, capsys):
    for root, prefix in ((tmp_path / "whole", ""), (tmp_path / "part", "train/")):
        write_folder(root / prefix, per_class=20, parts=["."])
        images, test = load_folder(root)
        assert test is None and images.labels.tolist() == [0] * 20 + [1] * 20
        images, test = load_folder(root, "--holdout")
        assert len(images) == 36 and len(test) == 4 == len(test.labels) == len(test.files)
        for part in (images, test):
            assert [Path(file).parent.name for file in part.files] == [part.classes[i] for i in part.labels]
        out = capsys.readouterr().out
        assert "has nothing to test on; 2 classes: cat, dog" in out
        assert "tests on a tenth of it; 2 classes: cat, dog" in out
    root = fill(tmp_path / "loose", "train", "val")  # an unlabelled train/
    assert reds(load_folder(root)[0]) == [0, 1] and load_folder(root)[1] is None
    root = fill(tmp_path / "mixed", ".", "album")
    assert load_folder(root)[0].labels is None
    assert "mixed/1.png is in no class folder" in capsys.readouterr().out
    root = fill(tmp_path / "half", "train/cat", "val")
    assert "val/1.png is in no class folder" in fails([root, *FOLDER], capsys)


def test_pictures_of_one_size_are_decoded_once_and_train_as_an_array_does(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "photos", mixed=False)
    images, test = load_folder(root)
    assert images.in_memory and test.in_memory
    for part in (images, test):
        assert torch.equal(part.source, torch.stack([train.decode(file) for file in part.files]))
    monkeypatch.setattr(train, "decode", None)  # no more
    arrays = dict(train_images=images.source, train_labels=images.labels)
    train.main([*FOLDER, *"--recipe imagenet --out array".split()], arrays)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    train.main([str(root), *FOLDER, "--out", "folder"])
    assert same(weights("array/checkpoint.pt"), weights("folder/checkpoint.pt"))
    (root / "train/cat/broken.png").write_bytes(b"no image")
    assert torch.equal(load_folder(root)[0].source, images.source)
    write_image(root / "train/dog/other.png", torch.zeros(3, 40, 37, dtype=torch.uint8))
    images, test = load_folder(root)
    assert not images.in_memory and images.source == images.files and len(images) == 13 and test.in_memory
    monkeypatch.setattr(train, "IN_MEMORY", 12 * 3 * 40 * 36 - 1)  # a byte too few
    assert not load_folder(root)[1].in_memory
    monkeypatch.undo()
    write_image(tmp_path / "large" / "1.png", torch.zeros(3, 128, 129, dtype=torch.uint8))
    assert not load_folder(tmp_path / "large")[0].in_memory  # of large ones, workers cut crops faster


def test_the_ranks_share_the_decoding(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "photos", mixed=False, parts=["."])
    whole, files = train.find_images(root)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(train, "rank_and_world", lambda rank=rank: (rank, 2))
        read = [train.try_reading(file, 10**6) for file in files[rank::2]]
        parts.append(train.join_images(read, torch.ones(12, dtype=torch.bool)))
        assert torch.equal(parts[-1][rank::2], whole[rank::2])
    assert torch.equal(parts[0] + parts[1], whole)


def test_what_is_transparent_shows_white_without_a_warning(tmp_path, recwarn):
    drawing = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    drawing.paste((200, 0, 0, 255), (4, 0, 8, 8))
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    for mode in ("RGBA", "LA", "P"):
        drawing.convert(mode).save(f"{mode}.png")
        left, right = train.decode(f"{mode}.png")[:, 4, [1, 6]].unbind(1)
        assert left.tolist() == [255] * 3 and right.float().mean() < 100
        # what is kept
        assert torch.equal(train.try_reading(f"{mode}.png", 8 * 8 * 3), train.decode(f"{mode}.png"))
    half.save("half.png")
    assert train.decode("half.png").unique().tolist() == [127]
    palette = Image.new("P", (8, 8))
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.paste(1, (4, 0, 8, 8))
    palette.save("bytes.png", transparency=b"\x00\xff")  # one alpha an entry
    assert train.decode("bytes.png")[:, 4, [1, 6]].T.tolist() == [[255] * 3, [200, 0, 0]]
    assert not recwarn.list


def test_other_files_are_counted_once_by_their_endings(tmp_path, capsys):
    root = write_folder(tmp_path / "photos", parts=["."])
    for name in ("a.gif", "b.gif", "c.avif", "README", ".hidden.gif"):
        (root / "cat" / name).write_bytes(b"")
    load_folder(root)
    assert "photos: 4 files ignored: .gif README .avif" in capsys.readouterr().out


def test_the_number_of_workers_changes_nothing(tmp_path, from_files):
    write_folder(tmp_path / "photos")
    for workers in "02":
        train.main([str(tmp_path / "photos"), *FOLDER, "--workers", workers, "--out", workers])
    assert same(weights("0/checkpoint.pt"), weights("2/checkpoint.pt"))


def test_evaluated_images_are_the_centre_as_on_imagenet(tmp_path, from_files):
    """The bank, the test set and the picture alike: the square, 256 / 224 of the side, the centre."""
    write_folder(tmp_path / "photos")
    write_image(tmp_path / "photos/val/cat/thin.png", torch.randint(256, (3, 2, 900), dtype=torch.uint8))
    images, test = load_folder(tmp_path / "photos", "--image-size", 28)
    for part in (images, test):
        for i, path in enumerate(part.source):
            with Image.open(path) as file:
                x = v2.functional.pil_to_tensor(file.convert("RGB"))
            square = v2.functional.center_crop(x, [min(x.shape[1:])] * 2)
            side = 32 if min(x.shape[1:]) > 28 else 28  # what is smaller has no border to lose
            resized = v2.functional.resize(square, [side, side], antialias=True)
            expected = v2.functional.center_crop(resized, [28])
            assert torch.equal(part[None, torch.tensor([i])][0][0], expected)


HUES = {0.0: [230, 30, 30], 0.25: [130, 230, 30], 0.5: [30, 230, 230], 0.75: [130, 30, 230]}


def hue_of(x):
    """(N,) hues of the mean colours of x, (N, 3, H, W), from 0 to 1; nan for gray."""
    red, green, blue = x.mean(dim=(2, 3)).double().unbind(1)
    hue = torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * math.pi)
    return torch.where(x.mean(dim=(2, 3)).std(dim=1) < 0.01, torch.nan, hue % 1)


def test_both_views_show_their_own_image(tmp_path):
    """Of files, through loader, crops and jitter, and in memory: rows of x1 and x2 belong together."""
    for i, colour in enumerate(HUES.values()):
        write_image(tmp_path / "photos" / f"{i}.png", colour)
    t, _ = trainer_of(args_of(tmp_path / "photos", *FOLDER, "--epochs", 20))
    colours = torch.tensor([*HUES.values()], dtype=torch.uint8).repeat(50, 1)
    in_memory = colours[..., None, None].expand(-1, -1, 20, 20)
    for batch, indices in [*t.batches(), (in_memory, torch.arange(4).repeat(50))]:
        assert set(indices.tolist()) == {0, 1, 2, 3}
        for x in train.two_views(batch, 16, 0.2, 0.5):
            assert x.shape == (len(indices), 3, 16, 16)
            turn = hue_of(x) - torch.tensor([*HUES])[indices]  # the jitter turns it by a tenth at most
            coloured = ~turn.isnan()
            assert coloured.any() and ((turn + 0.5) % 1 - 0.5)[coloured].abs().max() < 0.15


def test_views_can_be_smaller_than_what_is_tested_from_files_and_in_memory(tmp_path):
    """Features and fine-tuning have the whole size; views their share of it."""
    write_folder(tmp_path / "photos")
    for photos in (str(tmp_path / "photos"), "textures"):
        args = args_of(photos, *FOLDER, "--image-size", 24, "--view-scale", 0.5)
        t, test = trainer_of(args)
        views = train.two_views(first(t)[0][0], t.images.view_size, 0.2, 0)
        assert [x.shape[2:] for x in views] == [(12, 12)] * 2
        sizes = []
        t.model.backbone.register_forward_pre_hook(lambda module, x: sizes.append(tuple(x[0].shape[2:])))
        t.update(*first(t)[0])
        train.extract_features(t.model.backbone, test, CPU)
        assert sizes[:2] == [(12, 12)] * 2 and set(sizes[2:]) == {(24, 24)}
    train.main([photos, *FOLDER, "--epochs", "1", "--view-scale", "0.5", "--out", "run"])
    picture = v2.functional.pil_to_tensor(Image.open("run/views.png"))
    for top, size in ((24, 16), (148, 8), (272, 8)):  # image, view 1, view 2: in tiles of 96 pixels
        tile = picture[:, top : top + 96, 8:104].unflatten(2, (size, -1)).unflatten(1, (size, -1))
        assert (tile == tile[:, :, :1, :, :1]).all()
    assert evaluation.load_data(evaluation.get_args(["run"])[0])[0].view_size == 16


def test_the_two_crops_of_a_file_differ_and_every_epoch_has_new_ones(tmp_path, from_files):
    ramp = torch.linspace(0, 255, 64).repeat(64, 1)
    write_image(tmp_path / "photos" / "a.png", torch.stack([ramp, ramp.T, 0 * ramp]).byte())
    photos, i = load_folder(tmp_path / "photos", "--crop-min", 0.3)[0], torch.zeros(200, dtype=torch.long)
    crops = photos["0 0", i][0]
    assert crops.shape == (200, 2, 3, 16, 16) and torch.equal(crops, photos["0 0", i][0])
    assert not torch.equal(crops, photos["0 1", i][0]) and not torch.equal(crops, photos["1 0", i][0])
    red, green = crops[:, :, 0].float().mean(dim=2), crops[:, :, 1].float().mean(dim=3)  # (200, 2, 16)
    wide, high = (red[..., -1] - red[..., 0]) / 255, (green[..., -1] - green[..., 0]) / 255
    assert 0.4 < (wide < 0).float().mean() < 0.6 and (high > 0).all()  # flipped sideways, never upside down
    ratio = wide.abs() / high
    assert 0.7 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.4  # 3/4 to 4/3
    for mine in ((wide < 0).float(), red.mean(dim=2), green.mean(dim=2)):
        assert_unrelated(mine[:, 0], mine[:, 1])
    area = (wide.abs() * high * (16 / 15) ** 2).flatten()
    assert 0.25 < area.min() < 0.4 and area.max() > 0.8  # --crop-min


def test_every_mode_of_image_becomes_upright_rgb(tmp_path):
    gray = Image.new("L", (6, 4), 100)
    for mode in ("L", "RGBA", "P", "LA", "1", "RGB", "CMYK"):
        path = f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        gray.convert(mode).save(path)
        decoded = train.decode(path)
        assert decoded.shape == (3, 4, 6) and decoded.dtype == torch.uint8
        assert mode == "1" or (decoded.float() - 100).abs().max() <= 3
    Image.new("RGB", (6, 4), (200, 100, 50)).save("colour.png")
    assert train.decode("colour.png")[:, 0, 0].tolist() == [200, 100, 50]  # red first
    Image.fromarray(torch.full((4, 6), 100 * 257, dtype=torch.int32).numpy().astype("uint16")).save("16.png")
    assert (train.decode("16.png").float() - 100).abs().max() <= 1
    exif = Image.new("RGB", (6, 4)).getexif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (6, 4)).save("exif.jpg", exif=exif)
    assert train.decode("exif.jpg").shape == (3, 6, 4)


def test_broken_files_are_named_and_left_out_and_no_other_decoder_sees_one(tmp_path, capsys, from_files):
    root = write_folder(tmp_path / "photos", per_class=8)
    whole = (root / "train/cat/0.jpg").read_bytes()
    for name, content in (
        ("empty.jpg", b""), ("half.jpg", whole[: len(whole) // 2]), ("notes.png", b"not an image"),
        ("script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    ):  # fmt: skip
        (root / "train/cat" / name).write_bytes(content)
    Image.new("L", (9, 9)).save(root / "train/cat/gif.png", format="GIF")
    os.mkfifo(root / "train/cat/pipe.png")  # would never end
    write_image(root / "train/cat/.thumbs/1.png", [9, 9, 9])
    Image.new("F", (9, 9), 0.5).save(root / "train/cat/float.tiff")  # of no known range: it would turn black
    (root / "train/cat/._0.jpg").write_bytes(b"hidden, as macOS leaves them")
    images, _ = load_folder(root)
    told = capsys.readouterr().err
    assert len(images) == 16 == len(images.labels) and "7 files" in told
    # five of them
    assert all(name in told for name in ("empty.jpg", "float.tiff", "gif.png", "half.jpg", "notes.png"))
    assert images.source == sorted(images.source)
    for path in (root / "val").glob("*/*"):
        path.write_bytes(b"no image")
    assert "no readable image below" in fails([root, *FOLDER], capsys)


def test_a_folder_is_searched_through_links_but_not_in_a_runs_own_pictures(tmp_path, from_files):
    write_folder(tmp_path / "elsewhere", parts=["."])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "loop").symlink_to(tmp_path / "photos")
    train.main(["photos", *FOLDER, "--out", "photos/run"])  # writes views.png below the data
    write_image(tmp_path / "photos" / "loose.png", [9, 9, 9])
    (tmp_path / "photos/loose.png").rename(tmp_path / "photos/CAPITALS.PNG")
    images, test = load_folder("photos")
    assert len(images) == 13 and test is None and images.labels is None
    assert args_of("photos", *FOLDER).data == os.path.realpath("photos")  # to be found again from elsewhere
    write_image(tmp_path / "photos/run/deeper/view.png", [9, 9, 9])
    assert len(load_folder("photos")[0]) == 13
    (tmp_path / "photos/run/checkpoint.pt").rename("photos/checkpoint.pt")
    assert len(load_folder("photos")[0]) == 15  # DATA itself is no run's folder
    loader = train.make_loader(images, [], 2)
    assert loader.num_workers == 2 and loader.worker_init_fn is train.leave_group
    assert train.make_loader(train.load_data(args_of())[0], [], 2).num_workers == 0  # in memory


# ------------------------------------------------------------------------------------------------
# Training


def test_learning_rate_starts_at_the_peak_halves_in_the_middle_and_ends_above_zero():
    assert train.learning_rate(0, 100, 2.0, 0) == 2.0
    assert train.learning_rate(50, 100, 2.0, 0) == pytest.approx(1.0)
    assert 0 < train.learning_rate(99, 100, 2.0, 0) < 0.001
    warm = [train.learning_rate(step, 100, 2.0, 10) for step in range(100)]
    assert warm[0] == pytest.approx(0.2) and warm[9] == warm[10] == 2.0
    assert warm == sorted(warm[:10]) + sorted(warm[10:], reverse=True)


@pytest.mark.parametrize("flags, loss", [
    ("", equation_4),
    ("--warmup-epochs 1 --weight-decay 0.02 --base-lr 0.3", equation_4),
    ("--decay-predictor-lr --epochs 1 --bn none", equation_4),
    ("--no-stop-gradient", lambda p1, p2, z1, z2: cosine_loss(p1, z2) / 2 + cosine_loss(p2, z1) / 2),
    ("--asymmetric", lambda p1, p2, z1, z2: cosine_loss(p1, z2.detach())),
    ("--asymmetric --pairs 2 --no-stop-gradient", lambda p1, p2, z1, z2: cosine_loss(p1, z2)),
    ("--asymmetric --similarity cross-entropy", lambda p1, p2, z1, z2: entropy_loss(p1, z2.detach())),
    ("--similarity cross-entropy", lambda *x: equation_4(*x, entropy_loss)),
    ("--predictor none", equation_4),
    ("--predictor fixed --blur 0.5 --crop-min 0.5 --image-size 24", equation_4),
    ("--view-scale 0.5", equation_4),
])  # fmt: skip
def test_three_updates_are_sgd_written_out(small_textures, flags, loss):
    """Sec. 3: momentum 0.9, weight decay on everything, lr by batch / 256, cosine for f and constant
    for h."""
    t, twin = trainer(*flags.split()), trainer(*flags.split())
    args = t.args
    steps, warmup = args.epochs * 5, args.warmup_epochs * 5
    peak = args.base_lr * 100 / 256
    velocity, total = {}, 0.0
    for step, (batch, indices) in enumerate(first(t, 3)):
        assert len(batch) == 100 * args.pairs
        before = copy_of(t.model.state_dict())
        t.update(batch, indices)

        value = loss(*twin.model(*views_of(twin, batch, step)))
        total += value.item()
        lr = peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        if step < warmup:
            lr = peak * (step + 1) / warmup
        learns = {name: w for name, w in twin.model.named_parameters() if w.requires_grad}
        for (name, w), gradient in zip(learns.items(), torch.autograd.grad(value, learns.values())):
            constant = name.startswith("predictor") and not args.decay_predictor_lr
            velocity[name] = 0.9 * velocity.get(name, 0) + gradient + args.weight_decay * w.detach()
            w.data -= (peak if constant else lr) * velocity[name]
        assert t.sums[0].item() == pytest.approx(total, abs=1e-4)
        after = copy_of(t.model.state_dict())
        for name, w in twin.model.named_parameters():  # to a thousandth of what a step moves
            assert (after[name] - w).norm() <= 1e-3 * (w - before[name]).norm() + 1e-6, name
        twin.model.load_state_dict(after)  # so that rounding does not add up


def test_loss_and_spread_of_an_epoch_are_the_means_over_its_steps_and_spread_is_that_of_z(
    small_textures, monkeypatch
):
    losses, spreads = [], []

    class Recorded(SimSiam):
        def forward(self, x1, x2):
            p1, p2, z1, z2 = super().forward(x1, x2)
            if self.training:
                losses.append(equation_4(p1, p2, z1, z2).item())
                spreads.append(F.normalize(z1).std(dim=0, correction=0).mean().item() * 4)  # d = 16
            return p1, p2, z1, z2

    monkeypatch.setattr(train, "SimSiam", Recorded)
    train.main([*SMALL, "--out", "run"])
    for i, row in enumerate(rows("run")):
        assert row["loss"] == pytest.approx(sum(losses[5 * i :][:5]) / 5, abs=1e-5)
        assert row["spread"] == pytest.approx(sum(spreads[5 * i :][:5]) / 5, abs=1e-5)


SHORT = (
    "--width 4 --dim 64 --hidden 64 --epochs 6 --batch-size 50 --base-lr 1 "
    "--mean .5 .5 .5 --std .25 .25 .25"
)


def short_run(*flags, seeds=(0, 1), amp="off"):
    """Means over the seeds of loss and spread, in the last of six epochs of 1,000 textures."""
    ends = []
    for seed in seeds:
        args = args_of(*SHORT.split(), "--seed", seed, "--amp", amp, *flags)
        images = train.Images(*train.textures(1000, seed=0), size=32, mean=args.mean, std=args.std)
        t = train.Trainer(args, images, CPU)
        for batch, indices in t.batches():
            if t.step % t.per_epoch == 0:
                t.sums.zero_()
            t.update(batch, indices)
        ends.append(t.sums / t.per_epoch)
    return torch.stack(ends).mean(dim=0).tolist()


@pytest.fixture(scope="session")
def healthy():
    return short_run()


def test_with_stop_gradient_the_spread_stays_and_without_it_is_lost(healthy):
    """Fig. 2. With the BN on z that of all against one stays (see spread), without that BN none."""
    loss, spread_ = short_run("--no-stop-gradient")
    assert healthy[1] > 0.7 and spread_ < 0.65 * healthy[1] and loss < healthy[0]
    assert short_run("--bn", "hidden", seeds=[0])[1] > 0.5
    for amp in ("off", "bf16"):
        assert short_run("--no-stop-gradient", "--bn", "hidden", seeds=[0], amp=amp)[1] < 0.1


def test_a_fixed_predictor_leaves_the_loss_high_without_collapse(healthy):
    """Table 1b, and footnote 4: this is no collapse, though it does not learn as it should."""
    loss, spread_ = short_run("--predictor", "fixed")
    assert loss > 0.7 * healthy[0] and spread_ > 0.65 * healthy[1]


@pytest.mark.parametrize("flags", [["--asymmetric"], ["--similarity", "cross-entropy"]])
def test_the_asymmetric_loss_and_the_cross_entropy_do_not_collapse(healthy, flags):
    """Sec. 4.5 and 4.6."""
    assert short_run(*flags, seeds=[0])[1] > 0.65 * healthy[1]


def test_k_steps_of_alternation_meet_the_targets_of_the_weights_before_them(small_textures):
    """Sec. 5.2. The first of k steps is SimSiam's to the bit; in the second, z comes from the older
    weights."""
    plain, t = trainer(), trainer("--alternate", "2")
    batches = first(t, 3)
    old, current = trainer().model.train(), trainer().model.train()
    for one in (plain, t):
        one.update(*batches[0])
    assert same(plain.model.state_dict(), t.model.state_dict())
    current.load_state_dict(t.model.state_dict())
    old(*views_of(t, batches[0][0], 0))  # its BN has seen the first step too
    views = views_of(t, batches[1][0], 1)
    (p1, p2, _, _), (_, _, z1, z2) = current(*views), old(*views)
    loss_before = t.sums[0].item()
    t.update(*batches[1])
    assert t.sums[0].item() - loss_before == pytest.approx(equation_4(p1, p2, z1, z2).item(), abs=1e-5)
    before = copy_of(dict(t.model.named_parameters()))
    t.update(*batches[2])  # the first of the next two
    assert same(before, dict(t.targets.model.named_parameters()))


def test_eta_is_the_moving_average_of_an_images_projections(small_textures):
    """Sec. 5.2: eta <- m eta + (1 - m) z; here over both views, from zero."""
    t, plain = trainer("--eta-momentum", "0.8"), trainer()
    z1, z2 = torch.randn(2, 3, 16)
    t.targets.eta[:3] = old = torch.randn(3, 16)
    t1, t2 = t.targets(0, torch.arange(3), t.model, None, None, z1, z2)
    torch.testing.assert_close(t1, 0.8 * old + 0.2 * z1)
    torch.testing.assert_close(t2, 0.8 * old + 0.2 * z2)
    torch.testing.assert_close(t.targets.eta[:3], 0.8 * old + 0.1 * (z1 + z2))
    t.targets.eta.zero_()
    batch, indices = first(t)[0]
    for one in (t, plain):
        one.update(batch, indices)  # from zero, the first visit is SimSiam's: D sees no scale
    assert t.sums[0].item() == pytest.approx(plain.sums[0].item(), abs=1e-5)
    assert sorted(t.targets.eta.norm(dim=1).nonzero()[:, 0].tolist()) == sorted(indices.tolist())


def test_a_step_that_does_not_fit_into_memory_is_not_begun(small_textures, capsys, monkeypatch):
    """What the backward pass needs, counted by hand: the images, the outputs of all convolutions,
    Linears and BNs."""
    outputs = []
    for flags in (
        "--view-scale 0.5",
        "--batch-size 100",
        "--batch-size 400",
        "--batch-size 100 --image-size 64",
    ):
        t = trainer(*flags.split())
        outputs.append(0)
        for module in t.model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.modules.batchnorm._BatchNorm):
                module.register_forward_hook(lambda m, x, y: outputs.append(outputs.pop() + 4 * y.numel()))
        size = round(t.args.image_size * t.args.view_scale)
        views = torch.randn(2, t.args.batch_size, 3, size, size)
        t.model(*views)
        expected = 1.2 * (outputs[-1] + 4 * views.numel())  # a fifth for gradients on their way
        assert train.memory_of_a_step(t) == pytest.approx(expected, rel=0.05), flags
    monkeypatch.setattr(train, "free_memory", lambda device: expected / 4)
    line = fails([*SMALL, "--image-size", 64, "--out", "run"], capsys)
    batch = re.search("--batch-size ([0-9]+)", line)[1]
    assert "--recipe small" in line and not Path("run").exists()
    t = trainer("--image-size", 64, "--batch-size", batch)
    assert train.check_memory(t) == train.memory_of_a_step(t)
    with pytest.raises(SystemExit):
        train.check_memory(trainer("--image-size", 64, "--batch-size", 2 * int(batch)))


def test_a_long_epoch_is_heard_of_in_a_log(capsys, monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    progress = train.Progress()
    for step in range(1, 1001):  # each takes a second, but the first twenty
        now[0] += 1 if step > 1 else 20
        progress("epoch 1: step", 500 + step, 1500)  # resumed after 500
        if line := capsys.readouterr().out:
            said.append((step, line))
    assert [step for step, _ in said] == [2, 182, 362, 542, 722, 902]
    assert said[0][1] == "epoch 1: step 502 of 1500, about 0:25:00 in all\n"
    assert all(len(line.splitlines()) == 1 for _, line in said)


def test_all_ranks_hold_the_same_kNN_for_on_gpus_votes_round_either_way(small_textures, monkeypatch):
    t, test = trainer_of(args_of(*SMALL))
    own, over_ranks = train.monitor(t, test, knn=True)[1], train.over_ranks
    # has one right that this one lacks
    another = lambda x, op: torch.maximum(over_ranks(x, op), torch.tensor(199))
    monkeypatch.setattr(train, "over_ranks", another)
    assert own < 0.9 and train.monitor(t, test, knn=True)[1] == 199 / 200


def test_copies_of_the_checkpoint_stay(small_textures, capsys):
    train.main([*SMALL, *"--epochs 5 --keep-every 2 --out run".split()])
    assert [path.name for path in sorted(Path("run").glob("*.pt"))] == [
        "checkpoint-0002.pt", "checkpoint-0004.pt", "checkpoint.pt"
    ]  # fmt: skip
    assert torch.load("run/checkpoint-0002.pt", weights_only=True)["step"] == 10
    evaluation.main(["run/checkpoint-0002.pt", "knn"])
    assert "knn (k=200" in capsys.readouterr().out


def test_the_best_by_kNN_is_kept_but_not_by_the_test_images(small_textures, capsys, monkeypatch):
    flags = "--epochs 4 --keep-best --knn-every 1 --out run".split()
    assert "--holdout" in fails([*SMALL, *flags], capsys)
    write_folder(Path("plain"), per_class=20, parts=["."])
    write_image(Path("plain/loose.png"), [1, 2, 3])
    line = fails(["plain", *FOLDER, *flags, "--holdout", "--out", "plain-run"], capsys)
    assert "has no labels for it" in line
    train.main([*SMALL, *flags, "--holdout"])
    knn = [row["knn"] for row in rows("run")]
    best = torch.load("run/checkpoint-best.pt", weights_only=True)
    assert len(best["history"]) == knn.index(max(knn)) + 1
    # before the checkpoint: a run killed between the two repeats this one
    copies, keep = [], train.keep_copies
    monkeypatch.setattr(train, "save", lambda t, name="checkpoint.pt": copies.append((name, t.step)))
    train.main([*SMALL, "--keep-every", "2", "--out", "order"])
    assert copies == [
        ("checkpoint.pt", 0),
        ("checkpoint.pt", 5),
        ("checkpoint-0002.pt", 10),
        ("checkpoint.pt", 10),
    ]
    args = args_of(*SMALL, *flags, "--holdout", "--out", "other")
    saved, t = [], types.SimpleNamespace(args=args, history=[])
    monkeypatch.setattr(train, "save", lambda t, name: saved.append(t.history[-1]["knn"]))
    for knn in (0.2, None, 0.4, 0.4, None, 0.3, 0.5):
        t.history.append(dict(knn=knn))
        keep(t, len(t.history))
    assert saved == [0.2, 0.4, 0.5]


def test_a_run_can_begin_with_the_weights_of_another(pretrained, capsys):
    train.main([*SMALL, "--base-lr", "0", "--init", pretrained, "--seed", "3", "--out", "next"])
    names = dict(SimSiam(*build_backbone("convnet", width=2), 16, 16, 2).named_parameters())
    one, two = weights(pretrained), weights("next/checkpoint.pt")
    assert all(torch.equal(one[name], two[name]) for name in names)  # at lr 0 nothing but BN's buffers moves
    assert rows("next")[0]["epoch"] == 1
    Path(pretrained).unlink()
    train.main(["--resume", "--out", "next"])  # needs it no more
    assert "does not fit" in fails([*SMALL, "--dim", 32, "--init", "next/checkpoint.pt"], capsys)
    assert "is not there" in fails([*SMALL, "--init", "nowhere.pt"], capsys)
    content = torch.load("next/checkpoint.pt", weights_only=True)
    content["model"]["backbone.0.weight"][0] = math.nan
    torch.save(content, "next/checkpoint.pt")
    assert "nan or infinity" in fails([*SMALL, "--init", "next"], capsys)
    assert "nan or infinity" in fails(["--resume", "--out", "next"], capsys)
    assert not Path("runs").exists()


# ------------------------------------------------------------------------------------------------
# Advice, and other reports


def told(*epochs):
    """For (loss, spread) of epochs of 78 steps, as in the README's runs."""
    history = [dict(step=78 * (i + 1), loss=loss, spread=spread_) for i, (loss, spread_) in enumerate(epochs)]
    return train.advice(history)


def test_advice_names_collapse_and_not_a_healthy_run():
    """Measured: `textures`, ten epochs, seed 0 of each row of the README's table."""
    healthy_ = [(-0.44, 0.87), (-0.71, 0.88), (-0.88, 0.90), (-0.89, 0.91), (-0.91, 0.92), (-0.94, 0.94)]
    hidden_bn = [(-0.65, 0.62), (-0.75, 0.61), (-0.79, 0.69), (-0.87, 0.67), (-0.90, 0.72), (-0.94, 0.75)]
    for run in (healthy_, hidden_bn):
        assert all(told(*run[: i + 1]) == "" for i in range(len(run)))
    for run in (
        # without the stop-gradient: by epoch 2
        [(-0.68, 0.66), (-0.88, 0.44)], [(-0.68, 0.64), (-0.83, 0.54)],
        [(-0.91, 0.15)], [(-0.86, 0.46), (-0.93, 0.23)],  # and without BN on z; no BN in the heads
    ):  # fmt: skip
        assert told(*run).startswith("collapse: ") and "stop-gradient" in told(*run)
    on_photographs = told((-0.95, 0.27))  # without h
    assert on_photographs.startswith("collapse: ") and "predictor" in on_photographs
    without_h = [(-0.71, 0.74), (-0.87, 0.61), (-0.93, 0.61), (-0.97, 0.62)]
    assert told(*without_h).startswith("partial collapse: ") and "predictor" in told(*without_h)


def test_advice_on_a_loss_that_stays_high_waits_for_steps_and_for_the_loss_to_stop_falling():
    """Footnote 4: a loss that stays high is no collapse."""
    fixed = [(-0.11, 0.85), (-0.15, 0.75), (-0.20, 0.72), (-0.22, 0.73), *[(-0.22, 0.7)] * 4]  # Table 1b
    assert "not learning" in told(*fixed) and "no collapse" in told(*fixed)
    assert told(*fixed[:3]) == ""
    falling = [(-0.05 * i, 0.95) for i in range(9)]
    uneven = [(loss, 0.95) for loss in (-0.02, -0.05, -0.08, -0.15, -0.2, -0.2, -0.25, -0.25)]
    assert all(told(*run[: i + 1]) == "" for run in (falling, uneven) for i in range(len(run)))
    few = [dict(step=4 * i, loss=-0.02, spread=0.98) for i in range(1, 9)]  # epochs of four steps: too early
    assert train.advice(few) == "" == train.advice(few[:1]) == train.advice([])
    long = [dict(step=800 * (i + 1), loss=loss, spread=0.95) for i, loss in enumerate((-0.2, -0.45))]
    assert train.advice(long) == "" == train.advice(long[:1])  # of epochs of 800 steps, two tell as much


def test_advice_is_given_once_and_not_on_the_cross_entropy(small_textures, capsys):
    for flags, times in (["--out=a"], 1), (["--out=b", "--similarity=cross-entropy"], 0):
        t, test = trainer_of(args_of(*SMALL, "--epochs", 20, *flags))
        Path(t.args.out).mkdir()
        for t.step in (10, 15, 20):
            t.sums.copy_(torch.tensor([-0.99, 0.05]) * t.per_epoch)
            train.report(t, test, rate=1.0)
        assert capsys.readouterr().err.count("warning: collapse") == times


def test_training_reports_what_it_measures(small_textures, capsys):
    train.main([*TINY, "--knn-every", "2", "--epochs", "3", "--batch-size", "100"])
    one, two, three = rows("runs/textures")
    assert list(one) == "epoch step loss spread rank knn lr images_per_second seconds".split()
    assert (one["epoch"], two["epoch"], two["step"]) == (1, 2, 10)
    assert all(-1 <= row["loss"] <= 1 and 1 <= row["rank"] <= 16 for row in (one, two))
    assert one["knn"] is None and 0 <= two["knn"] <= 1 and 0 <= three["knn"] <= 1  # every two, and the last
    out = capsys.readouterr().out
    assert "torch.float32" in out.splitlines()[0]
    assert len(out.splitlines()) == 7 and out.endswith("next: python eval.py runs/textures\n")
    assert "\r" not in out and "\033" not in out  # in a pipe, plain lines
    lr = [0.4 * 100 / 256 * (1 + math.cos(math.pi * step / 15)) / 2 for step in (4, 9, 14)]  # the encoder's
    assert [row["lr"] for row in (one, two, three)] == pytest.approx(lr)
    checkpoint = torch.load("runs/textures/checkpoint.pt", weights_only=True)
    # of the machine, not of the run
    assert not {"out", "device", "workers", "resume"} & checkpoint["args"].keys()
    assert all(k.split(".")[0] in ("backbone", "projector", "predictor") for k in checkpoint["model"])
    build_backbone("convnet", width=2)[0].load_state_dict(checkpoint["backbone"], strict=True)


def test_speed_and_time_left_are_those_of_the_clock(small_textures, capsys, monkeypatch):
    now, update = [0.0], train.Trainer.update

    def timed(self, *args):
        update(self, *args)
        now[0] += 1.0 if self.step <= 5 else 2.0  # seconds a step

    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train.Trainer, "update", timed)
    train.main([*SMALL, "--epochs", "4", "--out", "run"])
    assert [row["images_per_second"] for row in rows("run")] == pytest.approx([100, 50, 50, 50])
    assert [row["seconds"] for row in rows("run")] == pytest.approx([5, 15, 25, 35])
    assert re.findall(r"0:00:(\d+) left", capsys.readouterr().out) == ["15", "15", "08", "00"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):  # stopped in the middle of an epoch
        stop_at_7 = lambda self, *args: (  # noqa: E731
            timed(self, *args) or self.step == 7 and os.kill(os.getpid(), signal.SIGTERM)
        )
        patch.setattr(train.Trainer, "update", stop_at_7)
        train.main([*SMALL, "--batch-size", "150", "--epochs", "4", "--out", "parts"])
    train.main(["--resume", "--out", "parts"])
    assert rows("parts")[2]["images_per_second"] == pytest.approx(75)  # 150 images in two seconds
    # what is left of 500 waits for another epoch
    assert [row["step"] for row in rows("parts")] == [3, 6, 9, 12]
    t = trainer("--epochs", "4", "--out", "other")
    t.images.source[0] += 1  # another CPU may round a pixel of these images another way
    assert t.images.fingerprint() == t.fingerprint
    t.load_state_dict(torch.load("run/checkpoint.pt", weights_only=True))
    assert t.seconds == 35 and len(t.history) == 4


def test_loss_of_an_epoch_is_the_mean_over_processes(small_textures, monkeypatch):
    t, test = trainer_of(args_of(*SMALL, "--out", "run"))
    Path("run").mkdir()
    monkeypatch.setattr(train, "over_ranks", lambda x: 2 * x + 5)  # as if another one had 5 more
    monkeypatch.setattr(train, "monitor", lambda *args: (1.0, None))
    t.world, t.step = 2, 5
    t.sums.copy_(torch.tensor([5.0, 5.0]))
    train.report(t, test, rate=1.0)
    assert rows("run")[0]["loss"] == pytest.approx((1 + 2) / 2) and t.sums.tolist() == [0, 0]


def test_the_picture_shows_eight_images_and_their_views_as_the_network_sees_them(small_textures, monkeypatch):
    two, views, asked = train.two_views, [], []
    monkeypatch.setattr(
        train,
        "two_views",
        lambda *args: asked.append(args[1:]) or views.append(two(*args)) or views[-1],
    )
    train.main([*SMALL, "--epochs", "1", "--out", "run", "--blur", "1"])
    tiles = tiles_of("run/views.png", 3, 8) / 255
    assert asked[0] == (32, 0.2, 1.0)
    t = trainer()
    indices = next(train.schedule(500, 100, 0, range(1)))[1]
    for column in range(8):
        shown = (t.images.source[indices[column]] / 255, views[0][0][column], views[0][1][column])
        for row, x in enumerate(shown):
            torch.testing.assert_close(tiles[row, column], x, atol=0.004, rtol=0)


def test_checkpoints_come_as_often_as_asked_for_and_at_the_end(small_textures, monkeypatch):
    saved, save = [], train.save
    monkeypatch.setattr(train, "save", lambda t: saved.append(t.step) or save(t))
    train.main([*SMALL, "--epochs", "5", "--save-every", "2", "--out", "run"])
    assert saved == [0, 10, 20, 25]


def by_hand(backbone, images):
    """Features in eval mode of all images in memory, at once."""
    with torch.no_grad():
        return backbone.eval()(v2.functional.normalize(images.source / 255, images.mean, images.std))


def test_features_are_those_of_every_image_by_the_network_as_it_is(small_textures):
    """In eval mode, standardized, the last batch of 250 not dropped; and the network stays as it was."""
    t = trainer()
    t.update(*first(t)[0])  # now the running statistics are not those of a new network
    for count in (260, 499, 1):
        part = t.images.subset(torch.randperm(500)[:count])
        before = copy_of(t.model.state_dict())
        t.model.train()
        features = train.extract_features(t.model.backbone, part, CPU)
        assert t.model.backbone.training and same(before, t.model.state_dict())
        assert features.dtype == torch.float32 and not features.requires_grad
        torch.testing.assert_close(features, by_hand(t.model.backbone, part), rtol=1e-4, atol=1e-5)
    assert train.extract_features(t.model.backbone, part, CPU, torch.bfloat16).dtype == torch.float32
    pixels = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    small = train.Images(pixels, None, 12, mean=[0.0] * 3, std=[1.0] * 3)
    # the views' size: 12 * 256 / 224 is 14, and the middle of it 12
    resized = v2.functional.resize(small.source, [14, 14], antialias=True)
    expected = v2.functional.center_crop(resized, [12, 12]) / 255
    features = train.extract_features(nn.Flatten(), small, CPU)
    torch.testing.assert_close(features, expected.flatten(1), atol=1e-5, rtol=0)


def test_kNN_and_rank_are_those_of_all_test_images_against_the_training_set(small_textures):
    t, test = trainer_of(args_of(*SMALL))
    for batch, indices in first(t, 5):
        t.update(batch, indices)
    erank, knn = train.monitor(t, test, knn=True)
    bank, queries = by_hand(t.model.backbone, t.images), by_hand(t.model.backbone, test)
    correct = sum(a == b for a, b in zip(vote(queries, bank, t.images.labels), test.labels.tolist()))
    assert knn == pytest.approx(correct / 200, abs=0.0051)  # a tie may fall the other way
    s = torch.linalg.svdvals(F.normalize(queries) - F.normalize(queries).mean(dim=0))
    entropy = torch.distributions.Categorical(s / s.sum()).entropy()
    assert erank == pytest.approx(entropy.exp().item(), rel=1e-3)
    assert train.monitor(t, test, knn=False) == (pytest.approx(erank, rel=1e-4), None)
    sorted_ = train.Images(torch.cat([test.source[:1].expand(300, -1, -1, -1), test.source]), None, 32)
    sorted_.mean, sorted_.std = test.mean, test.std
    # of images from all classes, one of which comes first
    assert train.monitor(t, sorted_, knn=False)[0] > 1.5


# ------------------------------------------------------------------------------------------------
# Resume, precision, processes


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(small_textures):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.main([*SMALL, "--out", out, "--seed", str(seed)])
    assert same(weights("a/checkpoint.pt"), weights("b/checkpoint.pt"))
    assert not same(weights("a/checkpoint.pt"), weights("c/checkpoint.pt"))


@pytest.mark.parametrize("flags", [
    "", "--alternate 3", "--eta-momentum 0.8", "--amp bf16", "--warmup-epochs 1 --save-every 2",
])  # fmt: skip
def test_a_stop_in_the_middle_changes_no_bit(small_textures, monkeypatch, flags):
    flags = [*SMALL, *flags.split()]
    train.main([*flags, "--out", "whole"])
    update = train.Trainer.update

    def interrupted(self, *args):
        update(self, *args)
        if self.step == 7:  # the second step of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Trainer, "update", interrupted)
    with pytest.raises(SystemExit) as exit_:
        train.main([*flags, "--out", "parts"])
    assert exit_.value.code == 128 + signal.SIGTERM
    assert torch.load("parts/checkpoint.pt", weights_only=True)["step"] == 7
    monkeypatch.setattr(train.Trainer, "update", update)
    train.main(["--resume", "--out", "parts"])  # the flags are remembered
    assert same(weights("whole/checkpoint.pt"), weights("parts/checkpoint.pt"))
    whole, parts = (
        [(row["loss"], row["spread"], row["rank"]) for row in rows(out)]
        for out in ("whole", "parts")
    )
    assert whole == parts and len(whole) == 2


def test_auto_takes_bf16_where_the_hardware_multiplies_it(monkeypatch):
    for native, dtype in (
        (dict(amx_bf16=True), torch.bfloat16),
        (dict(avx512_bf16=True), torch.bfloat16),
        ({}, None),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: native, raising=False)
        assert train.amp_dtype("auto", CPU) == dtype
    for native, dtype in ((True, torch.bfloat16), (False, None)):  # emulation does not count
        answer = lambda including_emulation=True, native=native: native or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
        assert train.amp_dtype("auto", torch.device("cuda")) == dtype
    for device in (CPU, torch.device("cuda")):
        dtypes = [train.amp_dtype(amp, device) for amp in ("off", "bf16", "fp16")]
        assert dtypes == [None, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("amp, dtype", [("off", torch.float32), ("bf16", torch.bfloat16)])
def test_under_amp_the_network_computes_in_that_dtype_and_the_step_is_float32s_to_its_precision(
    small_textures, amp, dtype
):
    exact, t = trainer(), trainer("--amp", amp)
    seen = []
    t.model.projector[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    for one in (exact, t):
        one.update(*first(one)[0])
    assert seen == [dtype] * 2 and all(w.dtype == torch.float32 for w in t.model.parameters())
    assert exact.sums.tolist() == pytest.approx(t.sums.tolist(), abs=0.02)
    assert (exact.sums.tolist() == t.sums.tolist()) == (amp == "off")


def test_fp16_steps_through_the_scaler(small_textures, monkeypatch):
    """What float16 would lose is scaled up for the backward pass and down again; a step with
    infinities is skipped."""
    exact, t = trainer(), trainer()
    t.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for one in (exact, t):
        for batch, indices in first(one, 2):
            one.update(batch, indices)
    assert t.scaler.get_scale() == 2048  # two good steps: told to update
    for a, b in zip(exact.model.parameters(), t.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    before = copy_of(dict(t.model.named_parameters()))
    t.scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    t.scaler.scale(torch.zeros(()))
    t.scaler._scale.mul_(1e3)  # infinite: so are the gradients
    t.update(*first(t)[0])
    assert same(before, dict(t.model.named_parameters())) and "scaler" in t.state_dict()
    t.scaler, exact.scaler = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (1024.0, 2.0))
    t.update(*first(t)[0])
    exact.load_state_dict(t.state_dict())
    assert exact.scaler.get_scale() == 1024
    asked, scaler = [], torch.amp.GradScaler
    spy = lambda device, enabled: asked.append(enabled) or scaler(device, enabled=False)  # noqa: E731
    monkeypatch.setattr(torch.amp, "GradScaler", spy)
    for t.args.amp in ("off", "bf16", "fp16"):
        train.Trainer(t.args, t.images, CPU)
    assert asked == [False, False, True]


DDP = """
import sys, torch
sys.path.insert(0, {here!r})
import train

def work():  # in a function, as in train.main: gloo's threads must end before Python itself does
    args = train.get_args({argv!r})[0]
    images, test = (
        train.Images(*train.textures(n, seed=0), size=32, mean=args.mean, std=args.std)
        for n in (500, 301)
    )
    t = train.Trainer(args, images, torch.device("cpu"))
    for step, (batch, indices) in zip(range(3), t.batches()):
        t.update(batch, indices)
        if step == 0:
            gradients = [w.grad.clone() for w in t.model.parameters()]
    before = t.model.backbone[1].running_mean.clone()
    state = t.state_dict()
    knn = train.monitor(t, test, knn=True)
    features = train.extract_features(t.model.backbone, test, torch.device("cpu"))
    torch.save(dict(gradients=gradients, batch=batch, peak=t.peak, before=before, knn=knn, features=features,
                    mine=t.sums, sums=state["sums"], last=t.model.state_dict()), f"rank{{t.rank}}.pt")

train.setup_distributed()
work()
torch.distributed.destroy_process_group()
"""


def test_two_processes_are_one_training():
    """They take the mean of their gradients, keep the same weights, and share one evaluation."""
    flags = [*SMALL, *"--mean .5 .5 .5 --std .25 .25 .25".split()]
    Path("ddp.py").write_text(DDP.format(here=str(HERE), argv=flags))
    done = command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "ddp.py")
    assert "terminate" not in done.stderr
    a, b = (torch.load(f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    agreed = [name for name in a["last"] if name.startswith("backbone") or "running" not in name]
    assert all(torch.equal(a["last"][name], b["last"][name]) for name in agreed)
    assert not torch.equal(a["before"], b["before"])  # before kNN, all take the BN statistics of one
    assert len(a["batch"]) == 50 and not torch.equal(a["batch"], b["batch"])
    assert torch.equal(a["sums"], (a["mine"] + b["mine"]) / 2)
    args = args_of(*flags)
    images, test = (
        train.Images(*train.textures(n, seed=0), size=32, mean=args.mean, std=args.std)
        for n in (500, 301)
    )
    t = train.Trainer(args, images, CPU)
    assert a["peak"] == b["peak"] == pytest.approx(args.base_lr * 100 / 256)  # by the total batch
    # By hand: each half of the batch, with its rank's seed, through the same first weights.
    gradients = []
    for rank in (0, 1):
        model = train.Trainer(args, images, CPU).model
        _, indices = next(train.schedule(500, 100, 0, range(1), rank, 2))
        equation_4(*model(*views_of(t, images.source[indices], 0, rank))).backward()
        gradients.append([w.grad for w in model.parameters()])
    for got, x, y in zip(a["gradients"], *gradients):
        torch.testing.assert_close(got, (x + y) / 2, rtol=1e-3, atol=1e-6)
    t.model.load_state_dict(a["last"])  # one process: the same features, in the same order, of 301 images
    expected = by_hand(t.model.backbone, test)
    for one in (a, b):
        torch.testing.assert_close(one["features"], expected, rtol=1e-4, atol=1e-5)
        assert one["knn"] == pytest.approx(train.monitor(t, test, knn=True), rel=1e-3)


def test_on_several_gpus_BN_is_over_the_whole_batch(small_textures, monkeypatch):
    """By stand-ins, for no GPU is needed: the CPU plays cuda's part."""
    args, wrapped = args_of(*SMALL), []
    images, _ = train.load_data(args)
    zeros, to = torch.zeros, nn.Module.to
    monkeypatch.setattr(train, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **kwargs: zeros(*shape, **kwargs))
    monkeypatch.setattr(nn.Module, "to", lambda self, device=None, **kwargs: to(self, "cpu", **kwargs))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    ddp = lambda model, device_ids: wrapped.append(device_ids) or model  # noqa: E731
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", ddp)
    for device, ids in (("cuda", [1]), ("cpu", None)):
        model = train.Trainer(args, images, torch.device(device)).model
        assert wrapped.pop() == ids and not wrapped
        layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert len(layers) == 9 and all(isinstance(m, nn.SyncBatchNorm) == (device == "cuda") for m in layers)


class Transfers(TorchDispatchMode):
    """Notes what goes from the CPU to the device `meta`: shape, and whether without waiting."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types_, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        copied = function is torch.ops.aten._to_copy.default
        if copied and args[0].device == CPU and out.device.type == "meta":
            self.seen.append((tuple(out.shape), bool(kwargs.get("non_blocking"))))
        return out


# has shapes and no numbers: what a CPU's tensor meets it raises, and so does reading one
META = torch.device("meta")
VARIANTS = [
    "",
    "--amp bf16",
    "--no-stop-gradient",
    "--predictor none",
    "--predictor fixed --affine",
    "--bn none",
    "--alternate 2",
    "--asymmetric --pairs 2",
    "--blur 0.5 --similarity cross-entropy",
    "--eta-momentum 0.8 --predictor none",
]


@pytest.mark.parametrize("flags", VARIANTS)
def test_a_step_leaves_nothing_on_the_cpu_and_waits_for_nothing(flags, small_textures, monkeypatch):
    entered = []  # torch's own has no "meta"
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda *args, enabled: entered.append((*args, enabled)) or contextlib.nullcontext(),
    )
    args = args_of(*SMALL, *flags.split())
    images, test = train.load_data(args)
    args.mean, args.std = images.mean, images.std
    crops = torch.zeros(args.batch_size * args.pairs, 2, 3, 32, 32, dtype=torch.uint8)  # of files
    t = train.Trainer(args, images, META)
    for part in (images, test):
        part.move_to(META)
    for batch, indices in first(t, 2):
        with Transfers() as transfers:
            t.update(batch, indices)
        # Crops, colours, and mean and std of each view; every number of them is small.
        assert len(transfers.seen) == 4 and all(math.prod(shape) <= 5000 for shape, _ in transfers.seen)
        assert all(non_blocking for _, non_blocking in transfers.seen)
        assert entered.pop() == (("meta", torch.bfloat16, True) if "bf16" in flags else ("meta", None, False))
    with Transfers() as transfers:
        t.update(crops, indices)
    assert (tuple(crops.shape), True) in transfers.seen and all(free for _, free in transfers.seen)
    features = train.extract_features(t.model.backbone, test, META)
    assert features.device.type == "meta" and spread(features).device.type == "meta"
    monkeypatch.setattr(torch.Tensor, "unique", lambda x, return_inverse: (x[:10], x))  # asks for numbers
    labels = torch.zeros(200, dtype=torch.long, device="meta")
    assert knn_predict(features, features, labels).device.type == "meta"


@pytest.mark.parametrize("device, expected", [("cuda", ["pinned", True]), ("mps", [False]), ("cpu", [True])])
def test_a_copy_to_a_gpu_is_from_pinned_memory_and_only_apples_is_waited_for(device, expected):
    seen = []
    x = types.SimpleNamespace(device=CPU, to=lambda device, non_blocking: seen.append(non_blocking))
    x.pin_memory = lambda: seen.append("pinned") or x
    simsiam.to_device(x, torch.device(device))
    assert seen == expected


def test_a_gpu_is_waited_for_every_50_steps_and_at_the_end_of_an_epoch(small_textures, monkeypatch):
    checked, told = [], []
    monkeypatch.setattr(train, "check_finite", lambda t: checked.append(t.step))
    monkeypatch.setattr(train, "Progress", lambda: lambda *args: told.append(args))
    train.main([*SMALL, "--batch-size", "8", "--out", "run"])
    assert checked == [50, 62, 100, 124]  # 62 steps an epoch
    steps = [words for words in told if "step" in words[0]]
    assert steps == [(f"epoch {epoch}: step", step, 62) for epoch in (1, 2) for step in range(1, 62)]


def test_images_in_memory_live_on_the_device_where_they_fit(small_textures, monkeypatch):
    images, _ = train.load_data(args_of())
    images.move_to(CPU)
    whole = images.source
    monkeypatch.setattr(train, "free_memory", lambda device: 2 * whole.nbytes + 7)
    images.move_to(META, need=7)
    assert images.source is whole  # no room
    monkeypatch.setattr(train, "free_memory", lambda device: 2 * whole.nbytes + 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert train.make_loader(images, [], 0).pin_memory  # images that move with every step
    images.move_to(META, need=7)
    assert images.source.device == META and images["0 0", torch.arange(4)][0].device == META
    images.source = types.SimpleNamespace(is_cuda=True)
    assert not train.make_loader(images, [], 0).pin_memory  # they are there


def test_each_process_has_its_machines_own_gpu_and_gloo_beside_nccl(monkeypatch, capsys):
    """And joins with patience that ends. By stand-ins."""
    for name, value in dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1").items():
        monkeypatch.setenv(name, value)
    chosen, joined = [], {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(train.dist, "rendezvous", lambda url: iter([(None, 5, 8)]))
    monkeypatch.setattr(train.dist, "PrefixStore", lambda prefix, store: store)
    init = lambda backend, **options: joined.update(options, backend=backend)  # noqa: E731
    monkeypatch.setattr(train.dist, "init_process_group", init)
    train.setup_distributed()
    assert (
        chosen == [1]
        and joined["backend"] == "cpu:gloo,cuda:nccl"
        and (joined["rank"], joined["world_size"]) == (5, 8)
    )
    assert 60 <= joined["timeout"].total_seconds() <= 3600
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SystemExit):
        train.setup_distributed()
    assert "no GPU 2" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(train, "setup_distributed", lambda: None)
    assert "--batch-size 500" in fails(TINY, capsys)  # three processes can't share it


def test_processes_that_do_not_see_the_same_checkpoint_all_stop(small_textures, tmp_path):
    """Two hosts whose OUT is not shared: neither waits for the other for ever."""
    train.main([*SMALL, "--epochs", "1", "--out", "one/run"])
    content = torch.load("one/run/checkpoint.pt", weights_only=True)
    torch.save(content | dict(step=0), "one/run/checkpoint.pt")
    (tmp_path / "two").mkdir()
    network = ENV | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    argv = [HERE / "train.py", *SMALL, "--epochs", "1", "--out", "run", "--resume"]
    hosts = [
        subprocess.Popen(
            [sys.executable, *map(str, argv)],
            cwd=tmp_path / name,
            stderr=subprocess.PIPE,
            text=True,
            env=network | {"RANK": str(rank)},
        )
        for rank, name in enumerate(("one", "two"))
    ]
    for host in hosts:
        _, err = host.communicate(timeout=60)
        assert (
            host.returncode == 1
            and "not all processes see run/checkpoint.pt" in err
            and "Traceback" not in err
        )
    assert not (tmp_path / "two" / "run").exists()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# ------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(capsys, *argv):
    capsys.readouterr()
    evaluation.main([str(word) for word in argv])
    return capsys.readouterr().out


def correct(out, task):
    """The counts that eval.py printed for a task: (right, all)."""
    share, right, whole = re.search(rf"^{task} .*top-1 ([\d.]+)% \((\d+) of (\d+)\)$", out, re.M).groups()
    assert float(share) == pytest.approx(100 * int(right) / int(whole), abs=0.006)
    return int(right), int(whole)


def backbone_of(path):
    net, _ = build_backbone("convnet", width=2)
    net.load_state_dict({k.removeprefix("backbone."): v for k, v in weights(path).items() if "backbone" in k})
    return net


def data_of(path):
    return train.load_data(evaluation.get_args([path])[0])


def test_evaluation_prints_kNN_and_linear_and_draws_neighbors(pretrained, capsys):
    out = evaluate(capsys, pretrained, "--epochs", "5")
    assert "knn (k=200, T=0.2): top-1" in out and "linear (features computed once, standardized" in out
    tiles = tiles_of("run/neighbors.png", 10, 10)
    images, test = data_of(pretrained)
    bank, queries = (by_hand(backbone_of(pretrained), part) for part in (images, test))
    picture = v2.functional.pil_to_tensor(Image.open("run/neighbors.png"))
    place = {x.numpy().tobytes(): j for j, x in enumerate(images.source)}
    # a test image on the left, a gap, its nearest
    for row, i in enumerate(torch.linspace(0, 199, 10).long()):
        assert torch.equal(tiles[row, 0], test.source[i]) and (tiles[row, 1] == 255).all()
        nearest = torch.tensor([place[x.numpy().tobytes()] for x in tiles[row, 2:]])
        cosine = F.cosine_similarity(queries[i][None], bank)
        torch.testing.assert_close(cosine[nearest], cosine.topk(8).values, rtol=0, atol=1e-5)
        # green over the right class, else red
        frames = picture[:, 22 + 124 * row, 56 + 108 * torch.arange(2, 10)]
        assert torch.equal(frames[1] > frames[0], images.labels[nearest] == test.labels[i])
    whole = Path("run/neighbors.png").read_bytes()
    evaluate(capsys, pretrained, "linear", "--epochs", "5", "--labels-per-class", 1)
    # ten images are no data set to look for neighbours in, and another data set is not the run's
    assert Path("run/neighbors.png").read_bytes() == whole
    np.savez("other.npz", train_images=np.zeros((40, 8, 8), np.uint8))
    evaluate(capsys, pretrained, "--data", "other.npz")
    assert Path("run/neighbors.png").read_bytes() == whole
    Path("random").mkdir()  # as a folder, not to be taken for a run
    assert "top-1" in evaluate(capsys, "random", "knn", "--data", "textures", "--width", 2)


def test_kNN_counts_every_test_image_by_the_networks_own_features_or_its_pixels(pretrained, capsys):
    images, test = data_of(pretrained)
    for name, net in ((pretrained, backbone_of(pretrained)), ("pixels", nn.Flatten())):
        bank, queries = (by_hand(net, part) for part in (images, test))
        for k, temperature in ((1, 0.2), (30, 0.05), (30, 50.0)):
            voted = vote(queries, bank, images.labels, k, temperature)
            right = sum(a == b for a, b in zip(voted, test.labels.tolist()))
            out = evaluate(capsys, name, "knn", "--data", "textures", "--k", k, "--temperature", temperature)
            assert (
                f"k={k}, T={temperature}" in out
                and correct(out, "knn") == (pytest.approx(right, abs=1), 200)
            )


def test_size_mean_and_std_are_the_checkpoints_and_crops_and_lr_the_flags(small_textures, monkeypatch):
    flags = "--epochs 1 --out run --image-size 24 --mean .1 .2 .3 --std .4 .5 .6 --crop-min 0.3".split()
    train.main([*SMALL, *flags])
    args, _ = evaluation.get_args(["run/checkpoint.pt"])
    assert (args.image_size, args.mean, args.std) == (24, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (args.data, args.arch, args.width, args.crop_min) == ("textures", "convnet", 2, 0.3)
    # the authors'
    assert evaluation.get_args(["run/checkpoint.pt", "linear", "--official"])[0].crop_min == 0.08
    asked, crops, fitted, fit = [], evaluation.crops, [], evaluation.fit
    monkeypatch.setattr(evaluation, "crops", lambda *args: asked.append(args[2]) or crops(*args))
    monkeypatch.setattr(
        evaluation,
        "fit",
        lambda *args, **options: fitted.append((args[0], args[4])) or fit(*args, **options),
    )
    for task in (
        "linear",
        "linear --official --crop-min 0.5",
        "finetune --crop-min 0.5",
        "linear --base-lr 0",
    ):
        evaluation.main(["run/checkpoint.pt", *task.split(), "--epochs", "1"])
    assert asked == [0.5, 0.5] and fitted[-1][1] == 0  # what is given counts, 0 too
    standardized, raw = fitted[0][0], fitted[1][0]
    # --official: as the authors' code
    assert kinds(standardized) == [BN, LINEAR] and kinds(raw) == ["Identity", LINEAR]
    bank = 1e-4 * torch.randn(1000, 4)  # an untrained network's features are small
    deviations = evaluation.new_classifier(bank, 3, 0)[0](bank).std(dim=0).tolist()
    assert deviations == pytest.approx([1] * 4, rel=0.01)
    flags = ["--holdout", "--seed", "5", "--data-dir", "elsewhere"]
    train.main([*SMALL, "--epochs", "1", "--out", "held", *flags])  # the run's seed and split, and not ours
    args, _ = evaluation.get_args(["held/checkpoint.pt"])
    assert not args.holdout and args.seed == 0 and args.data_dir == "elsewhere"
    assert evaluation.get_args(["held/checkpoint.pt", "--data", "cifar10"])[0].data == "cifar10"
    args, _ = evaluation.get_args(["held/checkpoint.pt", "--holdout", "--seed", "3"])
    assert args.holdout and args.seed == 3


PROTOCOLS = ["knn", "linear", "linear --official", "finetune"]


@pytest.mark.parametrize("task", PROTOCOLS)
def test_what_is_learned_are_the_training_sets_images_and_labels(monkeypatch, capsys, task):
    """Training on the test set would show: its classes are others here, and must never be predicted."""
    whole = train.textures

    def textures(count, seed):
        images, labels = whole(count // 10, seed)
        return images, labels + 100 * seed  # the test set is made with seed 1

    monkeypatch.setattr(train, "textures", textures)
    epochs = [] if task == "knn" else ["--epochs", 2]
    out = evaluate(capsys, "random", *task.split(), "--data", "textures", "--width", 2, *epochs)
    assert correct(out, task.split()[0]) == (0, 200)


@pytest.mark.parametrize("task", PROTOCOLS)
def test_every_protocol_finds_what_is_plain_to_see(monkeypatch, capsys, task):
    """Three colours, of any numbers as labels, are told apart without a mistake."""
    def colours(count, seed):
        labels = torch.arange(count // 40) % 3
        images = torch.eye(3)[labels].view(-1, 3, 1, 1) * 150 + 50 + 20 * torch.rand(len(labels), 3, 16, 16)
        return images.byte(), torch.tensor([3, -1, 27])[labels]

    monkeypatch.setattr(train, "textures", colours)
    flags = [] if task == "knn" else ["--epochs", 8, "--batch-size", 25]
    # --official does not standardize: an untrained network's features would be too small for its lr.
    network = ["pixels"] if "--official" in task else ["random", "--width", 4]
    out = evaluate(capsys, *network, *task.split(), "--data", "textures", "--image-size", 16, *flags)
    assert correct(out, task.split()[0]) == (50, 50)


@pytest.mark.parametrize("task", PROTOCOLS)
def test_every_test_image_is_judged_alone(small_textures, monkeypatch, capsys, task):
    """No statistic of the test set is used: two halves are judged apart as they are together."""
    load, counts = train.load_data, []
    for part in (slice(0, 100), slice(100, 200), slice(0, 200)):
        def load_part(args, part=part):
            images, test = load(args)
            test.source[100:] = 255 - test.source[100:] // 2  # the halves are unlike each other
            return images, test.subset(torch.arange(200)[part])

        monkeypatch.setattr(evaluation, "load_data", load_part)
        flags = ["--k", 5] if task == "knn" else ["--epochs", 2]
        out = evaluate(capsys, "random", *task.split(), "--data", "textures", "--width", 4, *flags)
        counts.append(correct(out, task.split()[0])[0])
    assert counts[0] + counts[1] == counts[2] > 0


def spied_backbones(monkeypatch, change=lambda net: net):
    nets, load = [], evaluation.load_backbone
    monkeypatch.setattr(
        evaluation, "load_backbone", lambda *args: nets.append(change(load(*args))) or nets[-1]
    )
    return nets


def test_a_probe_changes_no_tensor_of_the_backbone_and_says_so_if_it_would(pretrained, monkeypatch):
    nets = spied_backbones(monkeypatch)
    for protocol in ([], ["--official"]):
        evaluation.main([pretrained, "linear", "--epochs", "2", *protocol])
        assert same(backbone_of(pretrained).state_dict(), nets[-1].state_dict()) and not nets[-1].training
        assert not any(w.requires_grad for w in nets[-1].parameters())
    spied_backbones(monkeypatch, nn.Module.train)
    with pytest.raises(AssertionError, match="changed the backbone"):
        evaluation.main([pretrained, "linear", "--official", "--epochs", "1"])


def test_fine_tuning_changes_all_weights_and_BN_statistics_only_from_scratch(pretrained, monkeypatch, capsys):
    nets, tune, asked = spied_backbones(monkeypatch), evaluation.finetune, []

    def finetune(*args):
        head, how = tune(*args)
        test = data_of(pretrained)[1]
        with torch.no_grad():
            asked.append((head.eval()(by_hand(args[0].eval(), test)), test, args[0]))
        return head, how

    monkeypatch.setattr(evaluation, "finetune", finetune)
    flags = ["finetune", "--data", "textures", "--labels-per-class", 2, "--epochs", 20, "--width", 2]
    for name, keeps in ((pretrained, True), ("random", False)):
        out = evaluate(capsys, name, *flags)
        assert "20 training images" in out and "finetune (all weights" in out
        torch.manual_seed(0)  # of "random"
        before = (backbone_of(pretrained) if keeps else build_backbone("convnet", width=2)[0]).state_dict()
        after = nets[-1].state_dict()
        for key in before:
            statistic = "running" in key or "num_batches" in key
            assert torch.equal(before[key], after[key]) == (statistic and keeps), key
        logits, test, backbone = asked.pop()  # the result is that of the tuned network
        right = (logits.argmax(dim=1) == test.labels).sum().item()  # labels 0 to 9 are their own positions
        assert backbone is nets[-1] and correct(out, "finetune") == (right, 200) and not asked


@pytest.mark.parametrize("task, peak, batch, epochs", [
    ("linear", 1.0, 256, 90),
    ("linear --official", 30.0, 256, 90),
    ("finetune --epochs 9", 0.1 * 64 / 256, 64, 9),
    ("linear --base-lr 0.5 --batch-size 128 --epochs 4", 0.5 * 128 / 256, 128, 4),
    ("finetune --base-lr 0.4 --batch-size 128 --epochs 4", 0.4 * 128 / 256, 128, 4),
])  # fmt: skip
def test_the_lr_of_a_protocol_is_scaled_by_its_batch_and_falls_by_half_a_cosine(
    small_textures, monkeypatch, capsys, task, peak, batch, epochs
):
    runs = []

    class Spy(torch.optim.SGD):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            runs.append([])

        def step(self):  # nothing is learned: it is quicker
            group = self.param_groups[0]
            assert group["momentum"] == 0.9 and group["weight_decay"] == 0
            runs[-1].append(group["lr"])

    monkeypatch.setattr(torch.optim, "SGD", Spy)
    monkeypatch.setattr(F, "cross_entropy", lambda logits, labels: logits.sum() * 0)
    out = evaluate(capsys, "random", *task.split(), "--data", "textures", "--width", 1)
    steps = epochs * (500 // batch)
    assert f"{epochs} epochs of {500 // batch} steps" in out
    assert len(runs[-1]) == steps and len(runs) == 1 + ("finetune" in task)
    # the head alone comes first, as in the probe
    assert len(runs) == 1 or runs[0][0] == pytest.approx(batch / 256)
    for step, lr in enumerate(runs[-1]):
        assert lr == pytest.approx(peak * (1 + math.cos(math.pi * step / steps)) / 2)


def test_the_crops_of_supervised_training_are_standardized_and_flipped(tmp_path):
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    images = train.Images(torch.randint(256, (300, 3, 8, 8), dtype=torch.uint8), None, 8, mean=mean, std=std)
    plain = v2.functional.normalize(images.source / 255, mean, std)
    steps = [("key", torch.arange(300))]
    (x,) = evaluation.crops(images, steps, 1.0, "cpu", 0)
    straight = sum(torch.allclose(a, b, atol=1e-5) for a, b in zip(x, plain))
    flipped = sum(torch.allclose(a, b.flip(2), atol=1e-5) for a, b in zip(x, plain))
    assert 0.3 < flipped / (straight + flipped) < 0.7 and straight > 10
    (x,) = evaluation.crops(images, steps, 0.08, "cpu", 0)
    assert sum(torch.allclose(a, b, atol=1e-5) for a, b in zip(x, plain)) < 3
    photos = load_folder(write_folder(tmp_path / "photos"))[0]  # of files too, and new ones every epoch
    a, b = evaluation.crops(photos, [("0 0", torch.arange(5)), ("0 1", torch.arange(5))], 0.2, "cpu", 0)
    assert a.shape == (5, 3, 16, 16) and not torch.allclose(a, b)
    plan = evaluation.plan(10, 4, epochs=3, seed=1)
    assert len(plan) == 6 and len({key for key, _ in plan}) == 3 and None not in dict(plan)


def test_a_protocol_is_sgd_on_its_own_gradients_clipped_in_fine_tuning_and_drawn_by_its_seed(
    small_textures, monkeypatch, capsys
):
    runs, seeds, cross, schedule, few = [], [], F.cross_entropy, evaluation.schedule, evaluation.few_labels

    class Spy(torch.optim.SGD):  # moves nothing, so that every step of a whole epoch has the same gradient
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            runs.append([])

        def step(self):
            gradients = [w.grad.flatten() for group in self.param_groups for w in group["params"]]
            runs[-1].append(torch.cat(gradients).clone())

    monkeypatch.setattr(torch.optim, "SGD", Spy)
    monkeypatch.setattr(F, "cross_entropy", lambda logits, target: 1000 * cross(logits, target))
    monkeypatch.setattr(
        evaluation,
        "schedule",
        lambda n, batch, seed, steps: seeds.append(seed) or schedule(n, batch, seed, steps),
    )
    monkeypatch.setattr(
        evaluation,
        "few_labels",
        lambda part, n, seed: seeds.append(seed) or few(part, n, seed),
    )
    flags = ["--data", "textures", "--width", 2, "--epochs", 3, "--batch-size", 500, "--seed", 7]
    evaluate(capsys, "random", "linear", *flags, "--labels-per-class", 50)
    for gradient in runs[0]:
        torch.testing.assert_close(gradient, runs[0][0], rtol=1e-3, atol=1e-3)
    evaluate(capsys, "random", "finetune", *flags)
    assert runs[1][0].norm() > 10 and all(gradient.norm() < 1.001 for gradient in runs[2])
    assert set(seeds) == {7} and len(seeds) == 3
    heads = [evaluation.new_classifier(torch.rand(9, 4), 3, seed)[1].weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_few_labels_are_that_many_of_each_class_and_other_ones_with_another_seed(capsys):
    labels = torch.arange(5).repeat(20)
    pixels = torch.zeros(100, 3, 8, 8, dtype=torch.uint8)
    part = train.Images(pixels, labels, 8, classes="ant bee cat dog eel".split())
    chosen = evaluation.few_labels(part, 3, seed=0)
    assert labels[chosen].bincount().tolist() == [3] * 5 and len(set(chosen.tolist())) == 15
    assert chosen.tolist() != evaluation.few_labels(part, 3, seed=1).tolist()
    with pytest.raises(SystemExit):
        evaluation.few_labels(part, 21, seed=0)
    assert "class ant has only 20 images" in capsys.readouterr().err


def test_random_is_an_untrained_network_by_its_seed(small_textures):
    nets = []
    for seed in (1, 2, 1):
        argv = ["random", "--data", "textures", "--width", "2", "--seed", str(seed)]
        args, content = evaluation.get_args(argv)
        nets.append(evaluation.load_backbone(args, content).state_dict())
    assert same(nets[0], nets[2]) and not torch.equal(nets[0]["0.weight"], nets[1]["0.weight"])


def test_features_are_written_for_whatever_comes_next_and_over_no_file(pretrained, capsys):
    evaluation.main([pretrained, "knn", "--features", "features.pt"])
    written = torch.load("features.pt", weights_only=True)
    for name, part in zip(("train", "test"), data_of(pretrained)):
        expected = by_hand(backbone_of(pretrained), part)
        torch.testing.assert_close(written[name]["features"], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(written[name]["labels"], part.labels) and written[name]["files"] == []
    assert written["classes"] == train.PATTERNS
    line = fails([pretrained, "knn", "--features", "features.pt"], capsys, evaluation.main)
    assert "exists already" in line
    with pytest.raises(SystemExit):  # it came up in the meantime
        evaluation.write_new("features.pt", {})
    Path("run/metrics.jsonl").unlink()  # the folder of something else: no picture
    Path("run/neighbors.png").unlink()
    evaluation.main([pretrained, "knn"])
    assert not Path("run/neighbors.png").exists()


def test_the_authors_files_are_read(tmp_path, capsys):
    """Theirs has module.encoder.*, the projector as encoder.fc.0 to fc.7, module.predictor.*."""
    backbone, dim = build_backbone("resnet18")
    state = {}
    for name, value in SimSiam(backbone, dim, dim=32, hidden=dim).state_dict().items():
        state["module." + name.replace("backbone.", "encoder.").replace("projector.", "encoder.fc.")] = value
    state["module.encoder.fc.6.bias"] = torch.zeros(32)  # theirs has it, though BN follows
    torch.save(dict(epoch=100, arch="resnet18", state_dict=state, optimizer={}), "authors.pt")
    write_folder(tmp_path / "photos")
    flags = ["--data", "photos", "--image-size", "64", "--workers", "0"]
    assert "all 120 tensors of resnet18 loaded" in evaluate(capsys, "authors.pt", "knn", *flags)
    args, content = evaluation.get_args(["authors.pt", "knn", *flags])
    assert same(evaluation.load_backbone(args, content).state_dict(), backbone.state_dict())
    assert "resnet18" in fails(["authors.pt", "knn", *flags, "--arch", "resnet50"], capsys, evaluation.main)


def test_the_backbone_in_a_checkpoint_is_plain_torchvision(tmp_path):
    write_folder(tmp_path / "photos")
    flags = "--dim 16 --hidden 16 --image-size 32 --batch-size 4 --epochs 1 --workers 0 --out run".split()
    train.main(["photos", "--arch", "resnet18", "--amp", "off", *flags])
    net, x = torchvision.models.resnet18(), torch.rand(2, 3, 32, 32)
    content = torch.load("run/checkpoint.pt", weights_only=True)
    missing, unexpected = net.load_state_dict(content["backbone"], strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected
    assert all(
        torch.equal(value, content["model"]["backbone." + name])
        for name, value in content["backbone"].items()
    )
    program = torch.export.export(net.eval(), (x,))
    torch.testing.assert_close(program.module()(x), net(x))


def test_what_does_not_fit_is_refused_with_both_values(pretrained, capsys):
    for flags, words in (
        (["--arch", "resnet18"], "--arch resnet18, but the checkpoint has convnet"),
        (
            ["--mean", "0.1", "0.2", "0.3", "--std", "1", "1", "1"],
            "--mean [0.1, 0.2, 0.3], but the checkpoint has [0.",
        ),
        (["--width", "3"], "--width 3, but the checkpoint has 2"),
    ):
        assert words in fails([pretrained, *flags], capsys, evaluation.main)
    torch.save({"something": torch.zeros(3)}, "other.pt")
    assert "does not fit" in fails(["other.pt", "--data", "textures"], capsys, evaluation.main)
    content = torch.load(pretrained, weights_only=True)
    for name, value in (("arch", "vgg"), ("mean", [0.5, 0.5, 0.5, "--features", "x"]), ("width", 1.5)):
        torch.save(content | dict(args=content["args"] | {name: value}), "damaged.pt")
        assert "is damaged" in fails(["damaged.pt"], capsys, evaluation.main)
    torch.save(build_backbone("resnet18", "cifar")[0].state_dict(), "stem.pt")
    argv = ["stem.pt", "--data", "textures", "--arch", "resnet18", "--stem", "imagenet"]
    line = fails(argv, capsys, evaluation.main)
    assert "conv1" in line and "[64, 3, 3, 3]" in line and "[64, 3, 7, 7]" in line


def test_a_runs_folder_is_its_checkpoint_and_its_network_untrained_the_baseline(pretrained, capsys):
    runs = [
        evaluate(capsys, *words, "--epochs", 3)
        for words in (["run"], [pretrained], ["run", "--untrained"])
    ]
    assert (
        correct(runs[0], "knn") == correct(runs[1], "knn")
        and correct(runs[0], "linear") == correct(runs[1], "linear")
    )
    images = data_of(pretrained)[0]
    mean_and_std = [str(x) for x in ("--mean", *images.mean, "--std", *images.std)]
    other = evaluate(capsys, "random", "--data", "textures", "--width", 2, "--epochs", 3, *mean_and_std)
    assert (
        correct(runs[2], "knn") == correct(other, "knn")
        and correct(runs[2], "linear") == correct(other, "linear")
    )


def test_every_class_has_its_accuracy_and_every_task_a_line_of_json(pretrained, capsys, monkeypatch):
    spy, given = evaluation.print_top1, []
    monkeypatch.setattr(evaluation, "print_top1", lambda *args: given.append(args[3]) or spy(*args))
    for words in (["--epochs", "3"], ["knn", "--labels-per-class", "5"]):
        evaluation.main(["run", *words, "--json", "results.jsonl"])
    out = capsys.readouterr().out
    assert "knn (k=200, " in out and "knn (k=50, " in out  # what was used
    lines = [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]
    tasks = [(line["task"], line["labels_per_class"]) for line in lines]
    assert tasks == [("knn", None), ("linear", None), ("knn", 5)]
    labels = data_of(pretrained)[1].labels
    for line, predicted in zip(lines, given):
        assert line["top1"] == pytest.approx((predicted == labels).float().mean().item())
        for label, name in enumerate(train.PATTERNS):
            right = (predicted == labels)[labels == label].float().mean().item()
            assert line["by_class"][name] == pytest.approx(right)
            assert f"{name} {right:.1%}" in out
    Path("notes.txt").write_text("mine")
    assert "no file of JSON lines" in fails(["run", "--json", "notes.txt"], capsys, evaluation.main)
    assert Path("notes.txt").read_text() == "mine"


@pytest.mark.parametrize("task", ["linear", "linear --official", "finetune"])
def test_a_saved_classifier_names_pictures_as_it_did_the_test_images(task, pretrained, capsys):
    out = evaluate(capsys, "run", *task.split(), "--epochs", 2, "--save", "classifier.pt")
    _, test = data_of(pretrained)
    files = [f"{i:03}.png" for i in range(200)]
    for file, x in zip(files, test.source):
        v2.functional.to_pil_image(x).save(file)
    evaluation.main(["classifier.pt", "predict", *files])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[0] for line in lines] == files and all(0 < float(line[2][:-1]) <= 100 for line in lines)
    right = sum(train.PATTERNS[label] == line[1] for label, line in zip(test.labels, lines))
    assert (right, 200) == correct(out, task.split()[0])
    again = evaluate(capsys, "run", *task.split(), "--epochs", 2)  # and writing it changes nothing
    assert correct(again, task.split()[0]) == correct(out, task.split()[0])


def test_the_probability_of_a_class_is_the_softmax_of_the_head(pretrained, capsys):
    evaluation.main(
        ["run", "finetune", "--epochs", "1", "--labels-per-class", "3", "--save", "classifier.pt"]
    )
    saved = torch.load("classifier.pt", weights_only=True)
    assert saved["classes"] == train.PATTERNS and saved["args"]["mean"] == data_of(pretrained)[0].mean
    backbone, _ = build_backbone("convnet", width=2)
    backbone.load_state_dict(saved["model"])
    _, test = data_of(pretrained)
    x = by_hand(backbone.eval(), test)[:3]
    head = saved["head"]
    x = (x - head["0.running_mean"]) / head["0.running_var"].add(1e-12).sqrt()
    p, label = (x @ head["1.weight"].T + head["1.bias"]).softmax(dim=1).max(dim=1)
    Path("pictures").mkdir()
    for i in range(3):
        v2.functional.to_pil_image(test.source[i]).save(f"pictures/{i}.png")
    capsys.readouterr()
    evaluation.main(["classifier.pt", "predict", "pictures"])  # a folder: all below it
    for i, line in enumerate(capsys.readouterr().out.splitlines()[1:]):
        path, name, percent = line.split("\t")
        assert path == f"pictures/{i}.png" and name == train.PATTERNS[label[i]]
        assert float(percent[:-1]) == pytest.approx(100 * p[i].item(), abs=0.11)
    assert "holds no classifier" in fails([pretrained, "predict", "pictures"], capsys, evaluation.main)
    line = fails(["classifier.pt", "predict", "none.png"], capsys, evaluation.main)
    assert "no picture can be read" in line
    os.mkfifo("pipe.png")  # would never end
    evaluation.main(["classifier.pt", "predict", "none.png", "pictures/0.png", "pipe.png"])
    told = capsys.readouterr()
    assert told.out.splitlines()[1].startswith("pictures/0.png\t") and told.err.count("can't be read") == 2
    for part, broken in (
        ("head", dict(head, **{"1.weight": torch.zeros(10, 15)})),
        ("head", dict(head, **{"1.bias": torch.full([10], math.nan)})),
        ("classes", ["cat"]),
        ("head", {}),
        ("args", {name: saved["args"][name] for name in ("arch", "width", "data", "mean")}),
    ):
        torch.save(saved | {part: broken}, "broken.pt")
        assert "holds no classifier" in fails(["broken.pt", "predict", "pictures"], capsys, evaluation.main)


def test_features_and_neighbours_need_no_labels(tmp_path, capsys):
    root = write_folder(tmp_path / "photos", parts=["."])
    write_image(root / "loose.png", torch.randint(256, (3, 40, 36), dtype=torch.uint8))
    train.main([str(root), *FOLDER, "--out", "run"])
    evaluation.main(["run", "--features", "features.pt"])
    written = torch.load("features.pt", weights_only=True)
    names = [f"{i}.{'png' if i % 2 else 'jpg'}" for i in range(6)]
    assert [Path(file).name for file in written["train"]["files"]] == names * 2 + ["loose.png"]
    assert len(written["train"]["features"]) == 13 and written["train"]["labels"] is None
    picture = v2.functional.pil_to_tensor(Image.open("run/neighbors.png"))  # 16 pixels, each 6 x 6
    row = picture[:, 24:120, 8:]
    # of training images alone, none is its own neighbour
    assert not torch.equal(row[..., :96], row[..., 216:312])
    capsys.readouterr()
    evaluation.main(["run", "neighbors", str(root / "dog/3.png")])
    path, *nearest = capsys.readouterr().out.splitlines()[-7:-1]
    assert path == str(root / "dog/3.png") and nearest[0].split() == ["1.000", str(root / "dog/3.png")]
    x = F.normalize(written["train"]["features"])
    best = (x @ x[9]).topk(5).indices
    assert [line.split()[1] for line in nearest] == [written["train"]["files"][i] for i in best]
    assert "has no labels" in fails(["run", "knn"], capsys, evaluation.main)
    assert "has no labels" in fails(["run", "--labels-per-class", "3"], capsys, evaluation.main)
    evaluation.main(
        ["pixels", "neighbors", str(root / "dog/3.png"), "--data", str(root), "--recipe", "small"]
    )
    assert "1.000" in capsys.readouterr().out  # with the mean and std of the training images


def test_fine_tuned_features_are_those_of_the_tuned_network(pretrained):
    flags = ["finetune", "--epochs", "2", "--labels-per-class", "3"]
    evaluation.main(["run", *flags, "--features", "features.pt", "--save", "classifier.pt"])
    written = torch.load("features.pt", weights_only=True)
    backbone, _ = build_backbone("convnet", width=2)
    backbone.load_state_dict(torch.load("classifier.pt", weights_only=True)["model"])
    images, test = data_of(pretrained)
    images = images.subset(evaluation.few_labels(images, 3, seed=0))
    for name, part in (("train", images), ("test", test)):
        expected = by_hand(backbone.eval(), part)
        torch.testing.assert_close(written[name]["features"], expected, rtol=1e-4, atol=1e-5)


def test_features_that_are_no_numbers_get_no_accuracy(pretrained, capsys):
    content = torch.load(pretrained, weights_only=True)
    content["model"]["backbone.0.weight"][0] = math.nan
    torch.save(content, "broken.pt")
    assert "not finite" in fails(["broken.pt"], capsys, evaluation.main, status=1)


def test_where_results_go_is_checked_before_the_work(pretrained, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", None)
    Path("taken.pt").write_text("mine")
    Path("locked").mkdir()  # to the superuser none is
    os.mkfifo("pipe")
    monkeypatch.setattr(
        evaluation.os,
        "access",
        lambda path, mode: Path(path).is_dir() and Path(path).name != "locked",
    )
    for words in (
        "linear --save taken.pt", "linear --features taken.pt", "linear --save run/neighbors.png",
        "linear --save one.pt --features ./one.pt", "linear --save one.pt --json one.pt",
        "linear --json run/metrics.jsonl", "linear --save run/checkpoint-best.pt",
        "linear --save locked/one.pt", "linear --save no/where.pt", "linear --save run",
        "linear --json no/where", "knn --save one.pt", "--save one.pt", "predict", "linear a.png",
        "predict a.png --untrained", "neighbors", "knn --json /dev/null", "knn --json pipe",
    ):  # fmt: skip
        fails(["run", *words.split()], capsys, evaluation.main)
    assert Path("taken.pt").read_text() == "mine"


def test_names_that_the_terminal_cannot_show_cost_no_result(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "photos", classes=("caf\udce9", "\u732b"))
    train.main([str(root), *FOLDER, "--out", "run"])
    for encoding in ("utf-8", "cp1252"):
        terminal = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(sys, "stdout", terminal)
        evaluation.main(["run", "finetune", "--epochs", "1", "--workers", "0", "--save", f"{encoding}.pt"])
        terminal.flush()
        out = terminal.buffer.getvalue()
        assert b"caf\\udce9" in out and b"top-1" in out


def test_ctrl_c_ends_an_evaluation_in_one_line(pretrained, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "extract_features", interrupted)
    assert "stopped by Ctrl-C" in fails(["run", "knn"], capsys, evaluation.main, status=130)


# ------------------------------------------------------------------------------------------------
# What a user can do wrong

WRONG = [  # a number's range on one flag, and then a case for each flag
    *[f"--epochs={value}" for value in ("-1", "0", "1e9", "99999999999", "x", "")],
    *[f"--base-lr={value}" for value in ("-1", "nan", "inf", "x")],
    "--batch-size 1", "--batch-size 6000", "--dim 0", "--hidden 0", "--width 0", "--layers 0",
    "--save-every 0", "--weight-decay -1", "--crop-min 2", "--blur 2", "--eta-momentum 1", "--seed -1",
    "--workers -1", "--knn-every -1", "--warmup-epochs 20 --epochs 20", "--image-size 1", "--std 0 0 0",
    "--mean 0.5", "--mean 0.5 0.5 0.5", "--std 0.5 0.5 0.5", "--arch resnet19", "--stem cifar",
    "--stem other", "--predictor linear", "--bn some", "--similarity l2", "--amp fp16", "--amp yes",
    "--device tpu", "--unknown", "--epoch 3", "--pairs 0", "--alternate 0", "--out afile", "--out used",
    "--out used --resume", "--out=", "--alternate 2 --eta-momentum 0.5",
    "--no-stop-gradient --alternate 2", "--eta-momentum 0.8 --pairs 2", "--width 4 --arch resnet18",
    "--predictor-hidden 7 --predictor none", "--decay-predictor-lr --predictor fixed",
    "--hidden 9 --layers 1", "--affine --bn hidden", "nosuchfolder", "afile", "emptyfolder",
    "--no-stop-gradient --eta-momentum 0.5", "--eta-momentum 0.8 --similarity cross-entropy",
    "--image-size 24 --view-scale 0.25",
]  # fmt: skip


@pytest.mark.parametrize("words", WRONG)
def test_nonsense_gets_one_line_that_names_it_and_status_2(words, capsys):
    Path("afile").write_text("mine")
    Path("used").mkdir()
    Path("used/views.png").write_text("mine")
    Path("emptyfolder").mkdir()
    assert re.split("[ =]", words)[0] in fails(words.split(), capsys)
    assert (
        Path("afile").read_text() == Path("used/views.png").read_text() == "mine"
        and not Path("runs").exists()
    )


@pytest.mark.parametrize("words", [
    "", "nosuch.pt", "afolder", "random", "random probe --data textures", "random --data nosuch",
    "random knn --data plain", "random --data textures --k 0", "random --data textures --temperature 0",
    "random --data textures --arch vgg", "random --data textures --labels-per-class 501",
    "afile --data textures", "random --data textures --device tpu",
    "random --data textures --features no/such/place", "random --data textures --features afile",
    "random --data textures --mean 0.1 0.1 0.1", "pixels --data textures --arch resnet18",
    "random knn --data textures --epochs 3", "random linear --data textures --k 3",
    "random finetune --data textures --official",
])  # fmt: skip
def test_eval_answers_nonsense_the_same_way(words, capsys, tmp_path):
    Path("afile").write_text("mine")
    Path("afolder").mkdir()
    write_folder(tmp_path / "plain", parts=["."], per_class=1)
    fails(words.split(), capsys, evaluation.main)
    assert Path("afile").read_text() == "mine"


def test_some_mistakes_are_told_in_these_words(capsys, monkeypatch):
    for name in ("train/cat/1.png", "train/2.png"):
        write_image(Path("looseimages", name), [9, 9, 9])
    assert "train/2.png is in no class folder" in fails(["looseimages"], capsys)
    assert "DATA, --out or --init is empty" in fails(["", *TINY], capsys)
    Path("link").symlink_to("nowhere")
    assert "no folder" in fails([*TINY, "--out", "link"], capsys)
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    assert "pip install tensorboard" in fails([*TINY, "--tensorboard"], capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train, "setup_distributed", lambda: None)
    assert "one process" in fails(["--eta-momentum", "0.8", *TINY], capsys)
    assert "without torchrun" in fails(["random", "--data", "textures"], capsys, evaluation.main)


def test_help_needs_no_data_and_names_every_recipe():
    assert "usage:" in command(HERE / "eval.py", "--help").stdout  # which imports train.py
    text = train.build_parser().format_help()
    assert "base_lr=0.03" in text and "not run by us" in text


def test_a_used_folder_is_not_written_to_and_the_next_free_one_is_taken(small_textures, capsys):
    flags = [*SMALL, "--epochs", "1"]
    train.main(flags)
    before = Path("runs/textures/checkpoint.pt").read_bytes()
    args, _ = train.get_args([*flags, "--out", "other"])
    args.out = "runs/textures"  # as if it had been free a moment ago
    with pytest.raises(SystemExit) as exit_:
        train.pretrain(args, None)
    assert exit_.value.code == 2 and "taken by another run" in capsys.readouterr().err
    assert "--resume" in fails([*flags, "--out", "runs/textures"], capsys)
    Path("runs/textures-3").mkdir()
    train.main(flags)
    assert args_of().out == "runs/textures-4"
    assert Path("runs/textures-2/checkpoint.pt").exists()
    assert Path("runs/textures/checkpoint.pt").read_bytes() == before


def test_a_resumed_run_keeps_its_recipe_and_says_both_values(small_textures, capsys):
    Path("run").mkdir()
    Path("run/metrics.jsonl").touch()  # killed as it began
    flags = ["--epochs", "1", "--out", "run", "--resume", "--asymmetric", "--weight-decay", "0"]
    train.main([*SMALL, *flags])  # where there is nothing to resume, it begins, and says so
    out = capsys.readouterr().out
    assert "nothing to resume" in out and "untrained" in out and Path("run/views.png").exists()
    write_folder(Path("photos"), per_class=1)
    for flag, value, was in (
        ("--dim", "32", "16"),
        ("--epochs", "5", "1"),
        ("--batch-size", "50", "100"),
        ("--seed", "1", "0"),
        ("cifar10", "", "textures"),
        ("photos", "", "textures"),
    ):
        line = fails(["--out", "run", "--resume", *f"{flag} {value}".split()], capsys)
        assert was in line and (value or flag) in line
    may = dict(amp="bf16", knn_every=1, save_every=2, workers=0, data_dir="x")  # does not define the training
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in may.items()]
    args = args_of("--resume", "--out", "run", *flags)
    assert {name: getattr(args, name) for name in may} == may and args.epochs == 1 and args.asymmetric
    assert args.weight_decay == args_of("--resume", "--out", "run").knn_every == 0
    capsys.readouterr()
    train.main(["--resume", "--out", "run"])
    out = capsys.readouterr().out
    assert "untrained" not in out and "already finished" in out
    content = torch.load("run/checkpoint.pt", weights_only=True)
    torch.save(content | dict(data=[499, content["data"][1]]), "run/checkpoint.pt")
    assert "500 images, not the same 499" in fails(["--resume", "--out", "run"], capsys)
    Path("run/checkpoint.pt").unlink()
    # metrics of a run whose checkpoint is gone are not overwritten
    line = fails(["--resume", "--out", "run"], capsys)
    assert "in use" in line and len(rows("run")) == 1
    Path("run/checkpoint.pt").symlink_to("/nowhere/checkpoint.pt")
    assert "not there" in fails(["--resume", "--out", "run"], capsys)


def test_resume_takes_the_latest_run_of_those_images(small_textures):
    for out in ("runs/textures", "runs/textures-2"):
        train.main([*SMALL, "--epochs", "1", "--out", out])
    os.utime("runs/textures/checkpoint.pt", (0, 0))
    assert args_of("--resume").out == args_of("textures", "--resume").out == "runs/textures-2"
    os.utime("runs/textures-2/checkpoint.pt", (-9, -9))
    assert args_of("--resume").out == "runs/textures"
    assert args_of("cifar10", "--resume").out == "runs/cifar10"  # begins
    Path("text").mkdir()
    assert args_of("text", "--resume").out == "runs/text"


# ------------------------------------------------------------------------------------------------
# What a machine can do to a long run


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_damaged_and_hostile_checkpoints_are_refused_in_one_line_and_never_executed(pretrained, capsys):
    whole = Path(pretrained).read_bytes()
    cut_off = [whole[: len(whole) * i // 100] for i in range(0, 100, 3)]
    bad = cut_off + [b"a text file\n", pickle.dumps(Evil(), 2)]
    for content in bad:
        Path(pretrained).write_bytes(content)
        assert "is damaged" in fails(["--resume", "--out", "run"], capsys)
        assert Path(pretrained).read_bytes() == content
    torch.save({"model": Evil(), "optimizer": {}, "step": 0, "args": {}}, pretrained)
    fails(["--resume", "--out", "run"], capsys)
    fails([pretrained, "--data", "textures"], capsys, evaluation.main)
    with zipfile.ZipFile(pretrained, "w") as bomb:
        bomb.writestr("archive/version", "3")
        bomb.writestr("archive/data/0", bytes(10**6), zipfile.ZIP_DEFLATED)
    # not unpacked at all
    assert "ValueError" in fails([pretrained, "--data", "textures"], capsys, evaluation.main)
    for i in range(0, 100, 7):  # a flipped bit is refused, or hit nothing that counts
        damaged = bytearray(whole)
        damaged[len(whole) * i // 100 + i] ^= 1 << i % 8
        Path(pretrained).write_bytes(damaged)
        try:
            read = train.read_checkpoint(Path(pretrained))["model"]
        except SystemExit:
            continue
        Path(pretrained).write_bytes(whole)
        assert same(read, weights(pretrained))  # padding between the records
    assert not Path("executed").exists()


NONSENSE = [
    *[
        dict(args={name: value})
        for name, value in dict(
            dim=-1, base_lr=-5.0, save_every=0, pairs=0, mean="abc", bn="foo", amp="foo",
            batch_size="x", layers=1.5, arch="vgg",
        ).items()
    ],
    dict(history="abc"), dict(history=[{}]),
    dict(step=10**9), dict(step=2.5), dict(step=-1), dict(step="x"),
    dict(data=[3, 3]), dict(sums="x"), dict(model={}), dict(args=3), dict(optimizer=3), dict(step=2**70),
    dict(args=dict(mean=[0.5, 0.5, 0.5, "--help"])),
    dict(args=dict(std=[[0.5]] * 3)),
    dict(args=dict(data="a\0b")),
    dict(history=[dict(loss=0.0, spread=torch.zeros(2), step=1)]),
    dict(history=[dict(loss="0", spread=0, step=1)]),
]  # fmt: skip


@pytest.mark.parametrize("change", NONSENSE, ids=str)
def test_a_checkpoint_of_the_right_form_but_with_nonsense_in_it_is_refused_in_one_line(
    pretrained, capsys, change
):
    content = torch.load(pretrained, weights_only=True)
    if isinstance(change.get("args"), dict):
        change = dict(args=content["args"] | change["args"])
    torch.save(content | change, pretrained)
    fails(["--resume", "--out", "run"], capsys)


def test_of_a_saved_optimizer_only_the_momentum_counts(pretrained, capsys):
    content = torch.load(pretrained, weights_only=True)
    content["step"] = 3  # as if there were something left to do
    for group in content["optimizer"]["param_groups"]:
        group.update(lr=1e6, momentum=5.0, weight_decay=-1.0)
    torch.save(content, pretrained)
    train.main(["--resume", "--out", "run"])
    groups = torch.load(pretrained, weights_only=True)["optimizer"]["param_groups"]
    assert all(
        group["momentum"] == 0.9 and group["weight_decay"] == 5e-4 and group["lr"] < 1
        for group in groups
    )
    content["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(3)
    torch.save(content, pretrained)
    assert "does not fit" in fails(["--resume", "--out", "run"], capsys)


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync", "builtins.open"])
def test_a_failed_write_keeps_the_last_checkpoint(pretrained, capsys, monkeypatch, broken):
    before = Path(pretrained).read_bytes()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(broken, fail)
        with train.whole_file(Path(pretrained)) as file:
            torch.save({"new": 1}, file)
    assert exit_.value.code == 1 and Path(pretrained).read_bytes() == before
    assert "No space left" in capsys.readouterr().err and not list(Path("run").glob(".*.tmp"))
    with pytest.raises(SystemExit), train.whole_file(Path("new.pt")):
        assert not list(Path(".").glob("[!.]*.tmp"))  # what is half written looks like no file of a run
        raise RuntimeError("unexpected pos 64 vs 0")  # torch.save's word for a full disk
    assert "cannot write new.pt" in capsys.readouterr().err and not Path("new.pt").exists()


def test_two_runs_that_write_the_same_file_at_once_leave_a_whole_one(small_textures, monkeypatch):
    with train.whole_file(Path("file")) as first:
        first.write(b"fir")
        with monkeypatch.context() as patch:  # another process
            patch.setattr(train.os, "getpid", lambda: 1)
            with train.whole_file(Path("file")) as second:
                second.write(b"second")
        assert Path("file").read_bytes() == b"second"
        first.write(b"st")
    assert Path("file").read_bytes() == b"first" and os.listdir() == ["file"]
    Path("run").mkdir()
    Path("run/.checkpoint.pt.123.tmp").write_text("half")  # of a process that was killed
    Path("run/.mine.tmp").write_text("mine")
    train.main([*SMALL, "--epochs", "1", "--out", "run"])
    assert [path.name for path in Path("run").glob(".*")] == [".mine.tmp"]


def test_faults_of_the_machine_are_told_in_one_line_and_those_of_the_program_with_a_traceback(capsys):
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()):
        with pytest.raises(SystemExit), train.one_line_errors():
            raise error
        assert "take a smaller --batch-size" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="shapes"), train.one_line_errors():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_links_in_OUT_are_replaced_and_not_written_through(small_textures):
    Path("run").mkdir()
    Path("mine").write_text("mine")
    for name in ("checkpoint.pt", "metrics.jsonl", "views.png"):
        Path("run", f".{name}.{os.getpid()}.tmp").symlink_to(Path("mine").absolute())
    train.main([*SMALL, "--epochs", "1", "--out", "run"])
    for name in ("checkpoint.pt", "metrics.jsonl"):
        Path("run", name).rename(name)
        Path("run", name).symlink_to(Path(name).absolute())
    before = Path("checkpoint.pt").read_bytes()
    train.main(["--resume", "--out", "run"])
    assert Path("mine").read_text() == "mine" and Path("checkpoint.pt").read_bytes() == before
    assert len(rows("run")) == 1 and not Path("run/metrics.jsonl").is_symlink()


@pytest.mark.parametrize("what, when, seen", [("sums", 7, 10), ("buffers", 10, 10), ("signal", 7, 7)])
def test_nan_and_infinity_stop_by_the_end_of_the_epoch_and_keep_the_last_checkpoint(
    small_textures, capsys, monkeypatch, what, when, seen
):
    update = train.Trainer.update
    heed_signals()

    def poisoned(self, *args):
        update(self, *args)
        if self.step == when:
            (self.model.backbone[1].running_var if what == "buffers" else self.sums).fill_(math.inf)
        if self.step == when and what == "signal":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Trainer, "update", poisoned)
    line = fails([*SMALL, "--out", "run"], capsys, status=1)
    assert f"step {seen}" in line and "lr" in line and "amp" in line
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 5


def test_neither_a_closed_terminal_nor_a_clock_that_stands_still_ends_the_training(
    small_textures, monkeypatch
):
    closed = types.SimpleNamespace(write=no_network, flush=no_network, isatty=lambda: True, closed=False)
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(train.time, "monotonic", lambda: 3.0)
    train.main([*SMALL, "--out", "run"])
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 10


def test_a_folder_may_move_but_not_change_before_a_resume(tmp_path, capsys):
    photos = write_folder(tmp_path / "photos", parts=["."])
    train.main(["photos", *FOLDER, "--out", "run"])
    train.main(["--resume", "--out", "run"])  # it remembers where they are
    moved = photos.rename(tmp_path / "moved")
    train.main([str(moved), "--resume", "--out", "run"])
    (moved / "cat/0.jpg").rename(moved / "dog/9.jpg")  # as many as before, in another order
    line = fails([str(moved), "--resume", "--out", "run"], capsys)
    assert "12 images, not the same 12 that the run began with" in line
    (moved / "dog/9.jpg").unlink()
    line = fails([str(moved), "--resume", "--out", "run"], capsys)
    assert "11 images, not the same 12 that the run began with" in line


def test_a_signal_saves_says_where_and_exits_with_its_status(name="SIGINT"):  # SIGTERM: see below
    process = start(HERE / "train.py", *TINY, "--epochs", "1000", "--out", "run")
    wait_for(process, "epoch   1/")
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name) and not err
    assert f"{name} at step" in out and "--resume --out run" in out
    step = int(re.search(r"at step (\d+)", out)[1])
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == step


def children(pid):
    out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(x) for x in out.split()]


def test_a_signal_to_the_whole_group_saves_and_reaches_no_worker(tmp_path):
    write_folder(tmp_path / "photos")
    argv = ["photos", *FOLDER, "--workers", "1", "--epochs", "5000", "--knn-every", "0", "--out", "run"]
    process = start(HERE / "train.py", *argv, start_new_session=True)
    wait_for(process, "epoch   1/")
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "SIGTERM at step" in out, err
    step = int(re.search(r"at step (\d+)", out)[1])
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == step


def test_nohup_is_respected_and_a_second_signal_kills(monkeypatch):
    assert train.SIGNALS == [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.getsignal(number) for number in train.SIGNALS}
    for launched, second in ((False, signal.SIG_DFL), (True, signal.SIG_IGN)):  # torchrun kills by itself
        monkeypatch.setattr(train.dist, "is_initialized", lambda launched=launched: launched)
        heed_signals()
        with train.noted_signals() as noted:
            os.kill(os.getpid(), signal.SIGTERM)
            handlers = {signal.getsignal(number) for number in train.SIGNALS}
            assert noted == [signal.SIGTERM] and handlers == {second}
        assert {signal.getsignal(number) for number in train.SIGNALS} == {signal.SIG_DFL}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with train.noted_signals():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_worker_that_dies_of_the_signal_costs_no_step_and_another_process_may_have_noted_it(
    small_textures, monkeypatch
):
    batches, over_ranks, child = train.Trainer.batches, train.over_ranks, signal.getsignal(signal.SIGCHLD)

    def cut_off(self):
        for step, batch in enumerate(batches(self)):
            if step == 7:
                # torch's would raise within an update
                assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")
            yield batch

    def another(x, op=train.dist.ReduceOp.SUM):  # has noted SIGTERM from the start
        asked = op == train.dist.ReduceOp.MAX and x.ndim == 0
        return torch.tensor(int(signal.SIGTERM)) if asked else over_ranks(x)

    heed_signals()
    for name, stand_in, step in (("a", None, 7), ("b", another, 1)):
        if stand_in is None:
            monkeypatch.setattr(train.Trainer, "batches", cut_off)
        else:
            monkeypatch.setattr(train.Trainer, "batches", batches)
        args, _ = train.get_args([*SMALL, "--out", name])
        monkeypatch.setattr(train, "over_ranks", stand_in or over_ranks)
        with pytest.raises(SystemExit) as exit_:
            train.pretrain(args, None)
        monkeypatch.setattr(train, "over_ranks", over_ranks)
        assert exit_.value.code == 128 + signal.SIGTERM
        assert torch.load(f"{name}/checkpoint.pt", weights_only=True)["step"] == step
    assert signal.getsignal(signal.SIGCHLD) == child


def test_an_image_lost_during_the_training_ends_it_in_one_line(tmp_path):
    write_folder(tmp_path / "photos")
    argv = ["photos", *FOLDER, "--workers", "1", "--epochs", "5000", "--out", "run"]
    process = start(HERE / "train.py", *argv)
    wait_for(process, "epoch   1/")
    (tmp_path / "photos/train/cat/1.png").unlink()
    out, err = process.communicate(timeout=60)
    assert (
        process.returncode == 1
        and "photos/train/cat/1.png" in err.splitlines()[-1]
        and "Traceback" not in err
    )


def test_kill_9_at_any_moment_loses_no_bit_and_rows_behind_the_last_checkpoint_go(tmp_path):
    write_folder(tmp_path / "photos", parts=["."])
    argv = [HERE / "train.py", "photos", *FOLDER, "--epochs", "40", "--out", "run"]
    train.main([*map(str, argv[1:-1]), "whole"])
    process = start(*argv)
    for word in ("epoch   9/", "epoch  20/"):
        wait_for(process, word)  # killed behind a report, that is while saving or soon after
        process.kill()
        process.wait()
        with open("run/metrics.jsonl", "a") as file:
            file.write('{"epoch": 2 garbage}\n[]\n{"epoch"')
        process = start(*argv, "--resume")
    assert "Traceback" not in process.communicate(timeout=60)[1] and process.returncode == 0
    assert same(weights("whole/checkpoint.pt"), weights("run/checkpoint.pt"))
    assert [row["loss"] for row in rows("whole")] == [row["loss"] for row in rows("run")]


def test_torchrun_trains_and_a_killed_rank_ends_all_and_resumes_by_itself():
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    process = start(*torchrun, HERE / "train.py", *TINY, "--epochs", "6", "--out", "run", "--resume")
    wait_for(process, "epoch   2/")
    os.kill(children(process.pid)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert "epoch   6/6" in out and torch.load("run/checkpoint.pt", weights_only=True)["step"] == 60
    assert [row["epoch"] for row in rows("run")] == [1, 2, 3, 4, 5, 6]


def test_readme_names_no_flag_that_the_scripts_do_not_have():
    known = train.build_parser().format_help() + evaluation.build_parser().format_help()
    known = set(re.findall(r"--[a-z][a-z-]+", known))
    torchrun = ("--nproc", "--nnodes", "--standalone", "--max-restarts", "--rdzv", "--index-url")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (HERE / "README.md").read_text()))
    assert not {flag for flag in named - known if not flag.startswith(torchrun)}


def test_readme_loads_a_backbone_as_written(pretrained):
    text = (HERE / "README.md").read_text()
    code = re.search("```python\n(import torch, simsiam.*?)```", text, re.DOTALL)[1]
    names = {}
    exec(code.replace("runs/textures", "run"), names)
    assert names["features"].shape == (16, names["feature_dim"])
