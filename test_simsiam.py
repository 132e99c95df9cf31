"""What this project claims, one test a claim. Run: python -m pytest -q (under three minutes on two CPU cores).

In the order of the files: the loss, the networks, the monitors; then recipes, data, views, training; evaluation;
and last what a user can do wrong and what a machine can do to a long run.
Every expected value comes from somewhere else than the code: the equation written out, finite differences,
torchvision's own operations, a loop, or the paper's tables.
"""

import gzip
import itertools
import json
import math
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import eval as evaluation
import train
from simsiam import (
    D,
    SimSiam,
    build_backbone,
    build_predictor,
    build_projector,
    effective_rank,
    knn_predict,
    simsiam_loss,
    spread,
    unit,
)

# ------------------------------------------------------------------------------------------------
# Helpers

HERE = Path(__file__).parent
CPU = torch.device("cpu")
torch.set_num_threads(1)  # small tensors: on a busy machine, threads that wait for each other cost minutes
ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {
    "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"
}  # fmt: skip
# A network and a schedule so small that the whole command takes a second or two. The dtype is always said: what
# --amp auto would pick depends on the machine.
TINY = "--amp off --width 2 --dim 16 --hidden 16 --batch-size 500 --epochs 2 --knn-every 0".split()
SMALL = [*TINY, "--batch-size", "100"]  # for the fixture small_textures: five steps an epoch
FOLDER = (
    "--amp off --arch convnet --width 2 --dim 16 --hidden 16 --image-size 16 --batch-size 4 --epochs 1 --workers 0"
).split()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Every test has a folder and a seed of its own."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def small_textures(monkeypatch):
    """`textures` with a tenth of its images: 500 and 200."""
    whole = train.textures
    monkeypatch.setattr(train, "textures", lambda count, seed: whole(count // 10, seed))


@pytest.fixture
def pretrained(small_textures):
    train.main([*SMALL, "--epochs", "1", "--out", "run"])
    return "run/checkpoint.pt"


def trainer(*flags):
    args, _ = train.get_args([*SMALL, *flags])
    return train.Trainer(args, *train.load_data(args), CPU)


def args_of(*argv):
    return train.get_args([str(word) for word in argv])[0]


def command(*argv, ok=True, **kwargs):
    """A command line as a user types it, in a process of its own."""
    kwargs |= dict(capture_output=True, text=True, env=ENV, timeout=120)
    done = subprocess.run([sys.executable, *map(str, argv)], **kwargs)
    assert not ok or done.returncode == 0, done.stderr
    return done


def start(*argv, **kwargs):
    """The same in the background; for signals, which a shell's background job would be started without."""
    def heed_signals():
        for number in train.SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    kwargs |= dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, preexec_fn=heed_signals)
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


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def kinds(module):
    return [type(m).__name__ for m in module]


def linears(module):
    return [(m.in_features, m.out_features) for m in module if isinstance(m, nn.Linear)]


def cosine_loss(p, z):
    return -F.cosine_similarity(p, z).mean()


def write_image(path, pixels):
    """pixels: uint8 (3, H, W), or a colour that fills 40 x 36."""
    if not isinstance(pixels, torch.Tensor):
        pixels = torch.tensor(pixels, dtype=torch.uint8).view(3, 1, 1).expand(3, 40, 36)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(path)


def write_folder(root, per_class=6, classes=("cat", "dog"), parts=("train", "val")):
    for part, name, i in itertools.product(parts, classes, range(per_class)):
        pixels = torch.randint(256, (3, 40, 36), dtype=torch.uint8)
        write_image(root / part / name / f"{i}.{'png' if i % 2 else 'jpg'}", pixels)
    return root


def assert_uniform(values, low, high):
    """Kolmogorov and Smirnov, at 0.1 percent."""
    values = values.double().sort().values
    n = len(values)
    expected = ((values - low) / (high - low)).clamp(0, 1)
    assert (torch.arange(1, n + 1) / n - expected).abs().max() < 1.95 / math.sqrt(n) + 1 / n
    assert low - 1e-3 < values[0] and values[-1] < high + 1e-3


def assert_unrelated(a, b):
    """The correlation of independent samples is Gaussian with a deviation of 1 / sqrt(n): four of them."""
    assert len(a) > 50 and a.std() > 0 < b.std()
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
    assert D(p, z).item() == pytest.approx(total / 5, abs=1e-6)
    squares = (F.normalize(p) - F.normalize(z)).square().sum(dim=1).mean()  # MSE of unit vectors (Sec. 3)
    assert D(p, z).item() == pytest.approx(squares.item() / 2 - 1, abs=1e-6)


@pytest.mark.parametrize("z, value", [([6.0, 8.0], -1.0), ([-4.0, 3.0], 0.0), ([-0.3, -0.4], 1.0)])
def test_D_is_minus_one_for_the_same_direction_zero_for_a_right_angle_one_for_the_opposite(z, value):
    assert D(torch.tensor([[3.0, 4.0]]), torch.tensor([z])).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("similarity", ["cosine", "cross-entropy"])
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
    got = torch.autograd.grad(simsiam_loss(*model(x1, x2)), list(model.parameters()))
    p1, p2, z1, z2 = model(x1, x2)
    by_hand = (cosine_loss(p1, z2.detach()) + cosine_loss(p2, z1.detach())) / 2
    for a, b in zip(got, torch.autograd.grad(by_hand, list(model.parameters()))):
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


@pytest.mark.parametrize("row", [[3.0, 0.0, 0.0, 0.0], [0.0, -1.0], [3.0, 1e-3, 0.0, 0.0], [2.0, 2.0], [3.0], [-0.5]])
def test_the_gradient_is_exact_where_one_entry_is_all_of_the_length(row):
    """With one dimension the cosine is a sign, so its gradient is 0."""
    p = torch.tensor([row], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit, p)
    exact = torch.autograd.grad(cosine_loss(p, torch.ones_like(p)), p)[0].float()
    single = p.detach().float().requires_grad_()
    D(single, torch.ones_like(single)).backward()
    torch.testing.assert_close(single.grad, exact, rtol=1e-3, atol=1e-7)


def test_rows_of_zeros_give_a_finite_loss_and_gradient():
    for bad in ("p", "z", "both"):
        p, z = (torch.zeros(3, 8) if bad in (name, "both") else torch.ones(3, 8) for name in "pz")
        p.requires_grad_(), z.requires_grad_()
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
    assert simsiam_loss(p1, p2, z1, z2).item() == pytest.approx((D(p1, z2) + D(p2, z1)).item() / 2)
    assert simsiam_loss(z2, z1, z1, z2).item() == pytest.approx(-1)  # perfect predictions of the other view
    assert simsiam_loss(z1, z2, z1, z2).item() > -0.9  # predictions of the same view are worth nothing
    assert simsiam_loss(p1, p2, z1, z2, symmetric=False).item() == pytest.approx(D(p1, z2).item())


def test_cross_entropy_is_that_of_the_softmax_of_z():
    p, z = torch.randn(4, 8), torch.randn(4, 8)
    expected = F.cross_entropy(p, z.softmax(dim=1))  # torch's, with class probabilities as the target
    assert D(p, z, similarity="cross-entropy").item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_loss_is_float32_at_least_whatever_comes_in_autocast_included(dtype):
    p, z = torch.randn(4, 8).to(dtype), torch.randn(4, 8).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = simsiam_loss(p, p, z, z)
        entropy = simsiam_loss(p, p, z, z, similarity="cross-entropy")
    assert loss.dtype == entropy.dtype == unit(p).dtype == torch.promote_types(dtype, torch.float32)
    assert loss.item() == pytest.approx(cosine_loss(p.double(), z.double()).item(), abs=1e-6)
    expected = F.cross_entropy(p.double(), z.double().softmax(dim=1)).item()
    assert entropy.item() == pytest.approx(expected, abs=1e-5)


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
    """Projector: 3 layers of 2048, "BN applied to each fc layer, including its output fc", no ReLU on the output;
    h: 2048 -> 512 -> 2048, output without BN and ReLU. The output BN has no scale and shift (Sec. 4.4)."""
    model = SimSiam(nn.Flatten(), 8)
    assert linears(model.projector) == [(8, 2048), (2048, 2048), (2048, 2048)]
    assert linears(model.predictor) == [(2048, 512), (512, 2048)]
    assert kinds(model.projector) == [LINEAR, BN, RELU, LINEAR, BN, RELU, LINEAR, BN]
    assert kinds(model.predictor) == [LINEAR, BN, RELU, LINEAR]
    assert not model.projector[-1].affine and model.projector[1].affine and model.predictor[1].affine
    assert all(w.requires_grad for w in model.parameters())


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


def test_affine_is_about_the_BN_on_z_alone():
    """Sec. 4.4."""
    for affine in (True, False):
        model = SimSiam(nn.Flatten(), 8, dim=4, hidden=6, affine=affine)
        assert [m.affine for m in model.projector if kinds([m]) == [BN]] == [True, True, affine]


def test_linear_layers_start_as_pytorch_does():
    """App. A: weights from U(-sqrt k, sqrt k) with k = 1 / fan-in, in the projector and in h."""
    for weight in (build_projector(400, 300, 200, 2)[0].weight, build_predictor(400, 300)[0].weight):
        assert weight.abs().max() <= 1 / 20
        assert weight.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)


def test_resnets_are_torchvisions_without_fc_and_blocks_start_as_identities():
    for arch, dim in (("resnet18", 512), ("resnet50", 2048)):
        net, feature_dim = build_backbone(arch)
        plain = torchvision.models.get_model(arch)
        assert feature_dim == dim
        missing, unexpected = plain.load_state_dict(net.state_dict(), strict=False)
        assert sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected
        last = "bn2" if arch == "resnet18" else "bn3"
        zeros = [w.abs().max() == 0 for k, w in net.state_dict().items() if re.search(rf"layer.*{last}.weight", k)]
        assert zeros and all(zeros)


def test_the_CIFAR_stem_keeps_all_pixels():
    """App. D: a 3x3 convolution of stride 1, no max-pool. 32x32 pixels reach the first block as 32x32."""
    net, _ = build_backbone("resnet18", "cifar")
    sizes = []
    net.layer1.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[-2:]))
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 512)
    assert sizes == [(32, 32)] and isinstance(net.maxpool, nn.Identity)
    assert net.conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)  # as ResNet's others


def test_the_convnet_is_six_convolutions_and_a_mean_over_pixels():
    net, feature_dim = build_backbone("convnet", width=3)
    assert kinds(net) == ["Conv2d", "BatchNorm2d", RELU] * 6 + ["AdaptiveAvgPool2d", "Flatten"] and feature_dim == 24
    x = torch.rand(2, 3, 32, 32)
    assert net[:-2](x).shape == (2, 24, 4, 4) and net(x).shape == (2, 24) and net(x[:1]).shape == (1, 24)
    torch.testing.assert_close(net.eval()(x), net[:-2](x).mean(dim=(2, 3)))


def test_an_unknown_backbone_or_option_is_refused():
    for build, match in (
        (lambda: build_backbone("resnet19"), "unknown arch 'resnet19': choose from convnet"),
        (lambda: build_backbone("resnet18", "small"), "unknown stem"),
        (lambda: SimSiam(nn.Flatten(), 12, dim=8, hidden=8, predictor="None"), "unknown predictor"),
        (lambda: SimSiam(nn.Flatten(), 12, dim=8, hidden=8, bn="al"), "unknown bn"),
        (lambda: D(torch.ones(1, 2), torch.ones(1, 2), similarity="cross_entropy"), "unknown similarity"),
    ):
        with pytest.raises(ValueError, match=match):
            build()


def test_views_are_encoded_one_after_the_other_so_that_each_has_its_own_BN_statistics():
    model = SimSiam(*build_backbone("convnet", width=2), dim=16, hidden=16)
    x1, x2 = torch.rand(4, 3, 32, 32), 3 * torch.rand(4, 3, 32, 32)
    p1, p2, z1, z2 = model(x1, x2)
    for x, z, p in ((x1, z1, p1), (x2, z2, p2)):
        torch.testing.assert_close(z, model.projector(model.backbone(x)))
        torch.testing.assert_close(p, model.predictor(z))
    assert not torch.allclose(z1, model.projector(model.backbone(torch.cat([x1, x2])))[:4], atol=0.1)
    for z in (z1, z2):  # the output BN centres each view's batch by itself
        torch.testing.assert_close(z.mean(0), torch.zeros(16), atol=1e-5, rtol=0)


def test_any_module_is_a_backbone():
    """The README's example: a ViT of torchvision; a timm model is such a module too."""
    vit = torchvision.models.VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32)
    vit.heads = nn.Identity()
    model = SimSiam(vit, 16, dim=32, hidden=24, layers=2)  # odd widths: hidden is not dim
    before = vit.conv_proj.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    simsiam_loss(*model(*torch.rand(2, 4, 3, 32, 32))).backward()
    optimizer.step()
    assert not torch.equal(before, vit.conv_proj.weight)


def test_a_fixed_predictor_keeps_its_weights_and_no_predictor_is_the_identity():
    model = SimSiam(nn.Flatten(), 12, dim=8, hidden=8, predictor="fixed")
    assert linears(model.predictor) == [(8, 2), (2, 8)] and not any(w.requires_grad for w in model.predictor.parameters())
    p1, _, z1, _ = SimSiam(nn.Flatten(), 12, dim=8, hidden=8, predictor="none")(*torch.rand(2, 4, 3, 2, 2))
    assert torch.equal(p1, z1)


def test_the_demonstration_of_simsiam_py_runs():
    out = command(HERE / "simsiam.py").stdout
    losses, spreads = ([float(x) for x in re.findall(rf"{word}\s+(-?[\d.]+)", out)] for word in ("loss", "spread"))
    assert len(losses) == 10 and losses[0] == pytest.approx(0, abs=0.1) and losses[4] < -0.5
    assert spreads[4] > 0.9 and spreads[9] < 0.7 and losses[9] < -0.9


# ------------------------------------------------------------------------------------------------
# The monitors


def test_spread_is_the_std_of_normalized_outputs():
    """Sec. 4.1, over the batch, averaged over channels, beside footnote 3's 1 / sqrt(d)."""
    z = torch.randn(50, 20) * torch.rand(50, 1) + torch.arange(20) / 10
    columns = [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in z.tolist()]
    by_hand = sum(torch.tensor(column).std(correction=0).item() for column in zip(*columns)) / 20 * math.sqrt(20)
    assert spread(z).item() == pytest.approx(by_hand, abs=1e-5)
    assert spread(torch.randn(4096, 512)).item() == pytest.approx(1, abs=0.01)  # footnote 3
    assert spread(torch.ones(64, 512) * torch.rand(64, 1)).item() == pytest.approx(0, abs=1e-5)
    assert spread(torch.randn(1, 8)).item() == 0


def test_effective_rank_is_the_exponential_entropy_of_the_singular_values():
    # Three times +-e1 and once +-e2, centred: singular values sqrt(6) and sqrt(2).
    rows_ = torch.tensor([[1.0, 0, 0]] * 3 + [[-1.0, 0, 0]] * 3 + [[0, 1.0, 0], [0, -1.0, 0]])
    a, b = (math.sqrt(s) / (math.sqrt(6) + math.sqrt(2)) for s in (6, 2))
    assert effective_rank(rows_).item() == pytest.approx(a**-a * b**-b, abs=1e-4)
    assert effective_rank(rows_ * torch.rand(8, 1)).item() == pytest.approx(a**-a * b**-b, abs=1e-4)  # of unit rows
    axes = torch.cat([torch.eye(8), -torch.eye(8)])
    assert effective_rank(axes).item() == pytest.approx(8, abs=1e-3)
    assert effective_rank(axes[[0, 8]]).item() == pytest.approx(1, abs=1e-3)
    # Around the mean: (1, +-t, 0) / length differ along the second axis alone.
    assert effective_rank(torch.tensor([[1.0, 0.5, 0], [1.0, -0.5, 0]])).item() == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.ones(5, 3)).item() == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.rand(1, 3)).item() == pytest.approx(1, abs=1e-3)


def test_effective_rank_sees_the_dimensional_collapse_that_spread_does_not():
    z = torch.randn(512, 4) @ torch.randn(4, 64)  # 4 of 64 dimensions are in use
    assert spread(z) > 0.9 and effective_rank(z) < 5


def vote(queries, bank, labels, k, temperature):
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
    for k, temperature in ((7, 0.2), (7, 2.0), (1, 0.2), (50, 0.02)):
        expected = vote(queries, bank, labels, k, temperature)
        assert knn_predict(queries, bank, labels, k, temperature).tolist() == expected
    default = vote(queries, bank, labels, 200, 0.2)  # the authors', issue 10 of their repository
    for chunk in (1, 600, 700, 2**25):  # however memory is bounded
        assert knn_predict(queries, bank, labels, chunk_elements=chunk).tolist() == default
    assert knn_predict(queries, bank, labels).tolist() == default
    for k, temperature in ((150, 0.2), (250, 0.2), (200, 0.1), (200, 0.25)):  # others would show
        assert vote(queries, bank, labels, k, temperature) != default


def test_knn_takes_any_labels_and_a_k_larger_than_the_bank():
    bank = torch.eye(3)
    labels = torch.tensor([-5, 1000, 7])
    assert knn_predict(bank * 2, bank, labels).tolist() == [-5, 1000, 7]


# ------------------------------------------------------------------------------------------------
# Recipes, and flags on the way to where they act

PAPER = {  # App. A and Sec. 3; App. D
    "photos": dict(
        arch="resnet50", stem="imagenet", image_size=224, layers=3, hidden=2048, dim=2048, predictor_hidden=None,
        epochs=100, batch_size=512, base_lr=0.05, weight_decay=1e-4, warmup_epochs=0, crop_min=0.2, blur=0.5,
        mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
    ),
    "cifar10": dict(
        arch="resnet18", stem="cifar", image_size=32, layers=2, hidden=2048, dim=2048, predictor_hidden=None,
        epochs=800, batch_size=512, base_lr=0.03, weight_decay=5e-4, warmup_epochs=0, crop_min=0.2, blur=0.0,
        mean=None, std=None,
    ),
}  # fmt: skip
PAPER["cifar100"] = PAPER["cifar10"]
PAPER["textures"] = dict(layers=2, weight_decay=5e-4, crop_min=0.2, blur=0.0, stem="cifar")  # ours, after App. D
PAPER["fashion-mnist"] = PAPER["textures"] | dict(crop_min=0.4, image_size=28)
OFF = dict(  # the paper's method: Eq. 4, Table 1c, Table 3c
    no_stop_gradient=False, predictor="mlp", bn="default", affine=False, similarity="cosine", asymmetric=False,
    pairs=1, alternate=1, eta_momentum=0.0, decay_predictor_lr=False, seed=0, holdout=False,
)  # fmt: skip


@pytest.mark.parametrize("data", PAPER)
def test_recipes_are_the_papers_and_every_ablation_is_off(data):
    args = vars(args_of(data))
    expected = OFF | PAPER[data]
    assert {name: args[name] for name in expected} == expected
    assert args_of(data, "--predictor", "none", "--crop-min", "0.5").crop_min == 0.5  # a flag is over the recipe


def test_warmup_is_ten_epochs_from_batch_1024_on():
    """Table 2."""
    for batch, epochs in ((1023, 0), (1024, 10), (4096, 10)):
        assert args_of("cifar10", "--batch-size", batch).warmup_epochs == epochs
    assert args_of("cifar10", "--batch-size", 4096, "--warmup-epochs", 3).warmup_epochs == 3


@pytest.mark.parametrize("flags, projector, predictor", [
    ("", [(16, 16), (16, 16)], [(16, 4), (4, 16)]),
    ("--layers 4 --hidden 24 --dim 20", [(16, 24), (24, 24), (24, 24), (24, 20)], [(20, 5), (5, 20)]),
    ("--predictor-hidden 7", [(16, 16), (16, 16)], [(16, 7), (7, 16)]),
    ("--width 3", [(24, 16), (16, 16)], [(16, 4), (4, 16)]),
    ("--predictor none", [(16, 16), (16, 16)], []),
])  # fmt: skip
def test_flags_of_the_network_reach_it(small_textures, flags, projector, predictor):
    args = args_of(*SMALL, *flags.split())
    model = train.Trainer(args, *train.load_data(args), CPU).model
    assert linears(model.projector) == projector
    assert linears(h for h in [model.predictor] for h in h.children()) == predictor
    assert next(model.backbone.parameters()).shape == (args.width, 3, 3, 3)


def test_flags_of_the_ablations_reach_the_network(small_textures):
    for bn in ("none", "hidden", "default", "all"):
        model, expected = trainer("--bn", bn).model, SimSiam(nn.Flatten(), 8, dim=8, hidden=8, layers=2, bn=bn)
        assert kinds(model.projector) == kinds(expected.projector) and kinds(model.predictor) == kinds(expected.predictor)
    assert trainer("--affine").model.projector[-1].affine and not trainer().model.projector[-1].affine
    fixed = trainer("--predictor", "fixed").model
    assert not any(w.requires_grad for w in fixed.predictor.parameters())
    for stem, kernel in (("cifar", (3, 3)), ("imagenet", (7, 7))):
        args = args_of("--amp", "off", "--arch", "resnet18", "--stem", stem)
        assert train.Trainer(args, *train.load_data(args), CPU).model.backbone.conv1.kernel_size == kernel


def test_the_seed_is_that_of_the_weights_the_order_and_the_views(small_textures):
    a, b, again = trainer("--seed", "1"), trainer("--seed", "2"), trainer("--seed", "1")
    assert same(a.model.state_dict(), again.model.state_dict())
    assert not torch.equal(a.model.backbone[0].weight, b.model.backbone[0].weight)
    first = [next(iter(t.batches(range(1))))[1].tolist() for t in (a, b, again)]
    assert first[0] == first[2] != first[1]
    b.model.load_state_dict(a.model.state_dict())
    images = torch.arange(100)
    for t in (a, b):  # the same weights and images: only the views differ
        t.update(t.images.source[images], images)
    assert a.sums.tolist() != b.sums.tolist()


# ------------------------------------------------------------------------------------------------
# Data


def test_textures_are_made_from_the_seed_and_balanced():
    images, labels = train.textures(200, seed=3)
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images, train.textures(200, seed=3)[0])
    assert not torch.equal(images, train.textures(200, seed=4)[0])
    assert labels.bincount().tolist() == [20] * 10


def test_the_class_of_a_texture_is_its_pattern_and_shows_in_no_statistic_of_its_pixels():
    (bank, bank_labels), (images, labels) = train.textures(2000, seed=0), train.textures(500, seed=1)

    def accuracy(describe):
        predicted = knn_predict(describe(images / 255), describe(bank / 255), bank_labels, k=20)
        return (predicted == labels).float().mean().item()

    def colour(x):
        return x.mean(dim=(2, 3))

    def spectrum(x):  # blind to where a pattern lies, and to its colour
        gray = x.mean(dim=1) - x.mean(dim=(1, 2, 3)).view(-1, 1, 1)
        return torch.fft.rfft2(gray).abs().log1p().flatten(1)

    assert accuracy(lambda x: colour(x) - colour(bank / 255).mean(dim=0)) < 0.2  # chance is 0.1
    assert accuracy(lambda x: spectrum(x) - spectrum(bank / 255).mean(dim=0)) > 0.4


def test_train_and_test_textures_are_different_images():
    images, test = train.load_data(args_of("textures"))
    assert len(images) == 5000 and len(test) == 2000
    assert not {x.numpy().tobytes() for x in images.source} & {x.numpy().tobytes() for x in test.source}


def test_every_epoch_is_another_permutation_cut_over_the_ranks():
    """What DistributedSampler does only when set_epoch is called."""
    def epoch(number, rank=0, world=1):
        return torch.cat([i for _, i in train.schedule(103, 20, 0, range(5 * number, 5 * number + 5), rank, world)])

    first, second = epoch(0), epoch(1)
    assert len(first) == 100 == len(set(first.tolist())) == len(set(second.tolist()))
    assert first.tolist() != second.tolist() and set(first.tolist()) != set(second.tolist())
    halves = [epoch(0, rank, 2).tolist() for rank in (0, 1)]
    assert not set(halves[0]) & set(halves[1]) and sorted(sum(halves, [])) == sorted(first.tolist())


def test_the_schedule_goes_on_in_the_middle_of_an_epoch_and_repeats_an_image_for_every_pair():
    whole = [i.tolist() for _, i in train.schedule(50, 10, 7, range(12))]
    assert whole[8:] == [i.tolist() for _, i in train.schedule(50, 10, 7, range(8, 12))]
    assert [2 * i for i in whole] == [i.tolist() for _, i in train.schedule(50, 10, 7, range(12), pairs=2)]


def write_cifar(root, name):
    """A CIFAR of a few images, in its own format."""
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    folder, key = root / kind.base_folder, "labels" if name == "cifar10" else "fine_labels"
    folder.mkdir(parents=True)
    for file, _ in kind.train_list + kind.test_list:
        made = torch.randint(256, (12, 3072), dtype=torch.uint8)
        (folder / file).write_bytes(pickle.dumps({"data": made.numpy(), key: [i % 10 for i in range(12)]}))
        if file == kind.train_list[0][0]:
            first = made
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: [str(i) for i in range(100)]}))
    return first, made, len(kind.train_list)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_its_own_files(name, tmp_path, monkeypatch):
    first, last, files = write_cifar(tmp_path / "data", name)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *a: True)
    args = args_of(name)
    images, test = train.load_data(args)
    assert len(images) == 12 * files and len(test) == 12
    assert torch.equal(images.source[:12], first.view(12, 3, 32, 32))  # channels, rows, columns
    assert torch.equal(test.source, last.view(12, 3, 32, 32)) and test.labels.tolist() == [i % 10 for i in range(12)]
    pixels = images.source.double().div(255).transpose(0, 1).flatten(1)  # of the training images alone
    assert args.std == pytest.approx(pixels.std(dim=1, correction=0).tolist(), abs=1e-5)  # per pixel, not per image
    assert args.mean == pytest.approx(pixels.mean(dim=1).tolist(), abs=1e-5)


def test_mean_and_std_are_those_of_the_images_that_are_trained_on_or_the_flags(small_textures):
    for flags in ([], ["--holdout"]):
        args = args_of(*flags)
        images, _ = train.load_data(args)
        pixels = images.source.double().div(255).transpose(0, 1).flatten(1)
        assert args.mean == pytest.approx(pixels.mean(dim=1).tolist(), abs=1e-5)
        assert args.std == pytest.approx(pixels.std(dim=1, correction=0).tolist(), abs=1e-5)
    args = args_of(*"--mean 0.1 0.2 0.3 --std 0.4 0.5 0.6".split())
    train.load_data(args)
    assert (args.mean, args.std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def write_fashion_mnist(root):
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 40), ("t10k", 20)):
        pixels = torch.randint(256, (n, 28, 28), dtype=torch.uint8)
        images = struct.pack(">IIII", 2051, n, 28, 28) + pixels.numpy().tobytes()
        labels = struct.pack(">II", 2049, n) + bytes(i % 10 for i in range(n))
        for name, content in (("images-idx3", images), ("labels-idx1", labels)):
            (raw / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    return pixels


def test_fashion_mnist_is_read_from_its_own_files_and_becomes_rgb(tmp_path):
    last = write_fashion_mnist(tmp_path / "data")
    images, test = train.load_data(args_of("fashion-mnist"))
    assert images.source.shape == (40, 3, 28, 28) and len(test) == 20 and test.labels.tolist() == [*range(10)] * 2
    assert all(torch.equal(test.source[:, c], last) for c in range(3))


def test_without_network_one_line_says_where_the_archive_belongs(capsys, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    for name, archive in (
        ("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz"), ("fashion-mnist", ".gz files")
    ):  # fmt: skip
        line = fails([name, "--data-dir", "here"], capsys)
        assert archive in line and "--data-dir here" in line


def test_holdout_keeps_the_same_tenth_of_the_training_set_apart_whatever_the_seed(small_textures):
    splits = [train.load_data(args_of("--holdout", "--seed", seed)) for seed in (0, 1)]
    (images, test), (_, other) = splits
    whole, labels = train.textures(5000, seed=0)
    at = {x.numpy().tobytes(): y for x, y in zip(whole, labels.tolist())}
    assert len(test) == 50 and len(images) == 450
    assert {x.numpy().tobytes() for x in torch.cat([images.source, test.source])} == at.keys()
    for part in (images, test):  # labels follow their images
        assert [at[x.numpy().tobytes()] for x in part.source] == part.labels.tolist()
    assert torch.equal(test.source, other.source)


# ------------------------------------------------------------------------------------------------
# Folders


def load_folder(root, *flags):
    return train.load_data(args_of(root, *FOLDER, *flags))


def test_a_folder_with_classes_trains_and_one_without_is_not_asked_for_kNN(tmp_path, capsys):
    train.main([str(write_folder(tmp_path / "photos")), "--knn-every", "1", *FOLDER])
    assert rows("runs/photos")[0]["knn"] is not None
    train.main([str(write_folder(tmp_path / "plain", parts=["."])), *FOLDER])
    assert "no labels, so no kNN" in capsys.readouterr().out
    assert rows("runs/plain")[0]["knn"] is None


def test_the_folder_above_an_image_is_its_class_in_train_and_val_alike(tmp_path, capsys):
    reds = {"ant": 10, "cat": 60, "dog": 110, "eel": 160}
    for part, names in (("train", ("cat", "dog", "eel")), ("val", ("ant", "cat", "eel"))):
        for name, i in itertools.product(names, range(2)):
            write_image(tmp_path / "photos" / part / name / "deeper" / f"{i}.png", [reds[name], 0, 0])
    images, test = load_folder(tmp_path / "photos")
    assert images.labels.unique().tolist() == [1, 2, 3] and test.labels.unique().tolist() == [0, 1, 3]
    for part in (images, test, images.subset(torch.tensor([5, 0, 3]))):  # labels follow a subset
        plain = part["", torch.arange(len(part))]
        assert [[*reds.values()].index(x[0, 0, 0].item()) for x in plain] == part.labels.tolist()
    assert "ant, dog" in capsys.readouterr().err


def test_the_number_of_workers_changes_nothing(tmp_path):
    write_folder(tmp_path / "photos")
    for workers in "02":
        train.main([str(tmp_path / "photos"), *FOLDER, "--workers", workers, "--out", workers])
    assert same(weights("0/checkpoint.pt"), weights("2/checkpoint.pt"))


def test_evaluated_images_are_resized_and_centre_cropped_as_torchvision_does(tmp_path):
    """The bank, the test set and the picture alike: 256 / 224 of the side, then the centre (Sec. 4)."""
    images, test = load_folder(write_folder(tmp_path / "photos"), "--image-size", 28)
    for part in (images, test):
        for i, path in enumerate(part.source):
            with Image.open(path) as file:
                x = v2.functional.pil_to_tensor(file.convert("RGB"))
            expected = v2.functional.center_crop(v2.functional.resize(x, [32], antialias=True), [28])
            assert torch.equal(part["", torch.tensor([i])][0], expected)


HUES = {0.0: [230, 30, 30], 0.25: [130, 230, 30], 0.5: [30, 230, 230], 0.75: [130, 30, 230]}


def hue_of(x):
    """(N,) hues of the mean colours of x, (N, 3, H, W), from 0 to 1; nan for gray."""
    red, green, blue = x.mean(dim=(2, 3)).double().unbind(1)
    hue = torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * math.pi)
    return torch.where(x.mean(dim=(2, 3)).std(dim=1) < 0.01, torch.nan, hue % 1)


def test_both_views_of_a_file_show_its_own_image(tmp_path):
    """Through loader, crops, jitter and normalization: rows of x1 and x2 belong together."""
    for i, colour in enumerate(HUES.values()):
        write_image(tmp_path / "photos" / f"{i}.png", colour)
    args = args_of(tmp_path / "photos", *FOLDER, "--epochs", 20, "--mean", 0, 0, 0, "--std", 1, 1, 1)
    t = train.Trainer(args, *train.load_data(args), CPU)
    seen = 0
    for batch, indices in t.batches(range(20)):
        assert sorted(indices.tolist()) == [0, 1, 2, 3]
        for x in train.two_views(batch, args):
            assert x.shape == (4, 3, 16, 16)
            turn = hue_of(x) - torch.tensor([*HUES])[indices]  # the jitter turns it by a tenth at most
            coloured = ~turn.isnan()
            assert ((turn + 0.5) % 1 - 0.5)[coloured].abs().max() < 0.12
            seen += coloured.sum().item()
    assert seen > 100  # the others are gray


def test_the_two_crops_of_a_file_differ_and_every_epoch_has_new_ones(tmp_path):
    ramp = torch.linspace(0, 255, 64)
    write_image(tmp_path / "photos" / "a.png", torch.stack([ramp.repeat(64, 1), ramp.repeat(64, 1).T, ramp.repeat(64, 1) * 0]).byte())
    photos, i = load_folder(tmp_path / "photos", "--crop-min", 0.3)[0], torch.zeros(200, dtype=torch.long)
    crops = photos["0 0", i]
    assert crops.shape == (200, 2, 3, 16, 16) and torch.equal(crops, photos["0 0", i])
    assert not torch.equal(crops, photos["0 1", i]) and not torch.equal(crops, photos["1 0", i])
    red, green = crops[:, :, 0].float().mean(dim=2), crops[:, :, 1].float().mean(dim=3)  # (200, 2, 16)
    slope = (red[..., -1] - red[..., 0]) / 255, (green[..., -1] - green[..., 0]) / 255  # width and height of a crop
    flipped = (slope[0] < 0).float()
    assert 0.4 < flipped.mean() < 0.6 and (slope[1] > 0).all()  # sideways, never upside down
    assert_unrelated(flipped[:, 0], flipped[:, 1])
    assert_unrelated(red.mean(dim=2)[:, 0], red.mean(dim=2)[:, 1])
    assert_unrelated(green.mean(dim=2)[:, 0], green.mean(dim=2)[:, 1])
    area = (slope[0].abs() * slope[1] * (16 / 15) ** 2).flatten()
    assert 0.25 < area.min() < 0.4 and area.max() > 0.8  # --crop-min


def test_every_mode_of_image_becomes_upright_rgb(tmp_path):
    gray, colour = Image.new("L", (6, 4), 100), Image.new("RGB", (6, 4), (200, 100, 50))
    for name, image in {
        "L.png": gray, "RGBA.png": gray.convert("RGBA"), "P.png": gray.convert("P"), "CMYK.jpg": gray.convert("CMYK"),
        "LA.png": gray.convert("LA"), "1.png": gray.convert("1"), "RGB.jpg": gray.convert("RGB"),
    }.items():  # fmt: skip
        image.save(tmp_path / name)
        decoded = train.decode(str(tmp_path / name))
        assert decoded.shape == (3, 4, 6) and decoded.dtype == torch.uint8
        if name != "1.png":
            assert (decoded.float() - 100).abs().max() <= 3
    colour.save(tmp_path / "colour.png")
    assert train.decode(str(tmp_path / "colour.png"))[:, 0, 0].tolist() == [200, 100, 50]  # red first
    deep = torch.full((4, 6), 100 * 257, dtype=torch.int32).numpy().astype("uint16")
    Image.fromarray(deep).save(tmp_path / "16.png")
    assert (train.decode(str(tmp_path / "16.png")).float() - 100).abs().max() <= 1
    turned = Image.new("RGB", (6, 4))
    exif = turned.getexif()
    exif[0x0112] = 6  # lies on its side
    turned.save(tmp_path / "exif.jpg", exif=exif)
    assert train.decode(str(tmp_path / "exif.jpg")).shape == (3, 6, 4)


def test_broken_files_are_named_and_left_out_before_the_training(tmp_path, capsys):
    root = write_folder(tmp_path / "photos", per_class=8)
    (root / "train/cat/empty.jpg").write_bytes(b"")
    whole = (root / "train/cat/0.jpg").read_bytes()
    (root / "train/cat/half.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "train/dog/notes.png").write_text("not an image")
    images, _ = load_folder(root)
    told = capsys.readouterr().err
    assert len(images) == 16 == len(images.labels) and "3 files" in told
    assert all(name in told for name in ("empty.jpg", "half.jpg", "notes.png"))


def test_a_folder_is_searched_through_links(tmp_path):
    write_folder(tmp_path / "elsewhere", parts=["."])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "elsewhere")
    assert len(load_folder(tmp_path / "photos")[0]) == 12


@pytest.mark.parametrize("colour", [[128, 128, 128], None])
def test_identical_and_constant_images_do_not_crash(colour, tmp_path):
    for i in range(8):
        pixels = torch.arange(1200).view(3, 20, 20).to(torch.uint8) if colour is None else colour
        write_image(tmp_path / "photos" / f"{i}.png", pixels)
    train.main(["photos", *FOLDER])


# ------------------------------------------------------------------------------------------------
# Views (App. A), against torchvision one operation at a time, and then as a whole


def test_crop_and_resize_is_torchvisions():
    x = torch.rand(6, 3, 32, 40)
    boxes = torch.tensor([[0, 0, 32, 40], [3, 7, 9, 20], [10, 1, 16, 16], [0, 0, 1, 40], [5, 0, 27, 1], [31, 39, 1, 1]])
    top, left, h, w = boxes.float().unbind(1)
    for size in (16, 32, 50):
        ours = train.separable(train.resize_matrix(top, h, 32, size), x, train.resize_matrix(left, w, 40, size))
        for i, box in enumerate(boxes.tolist()):
            theirs = v2.functional.resized_crop(x[i], *box, size=[size, size], antialias=True)
            torch.testing.assert_close(ours[i], theirs, atol=1e-5, rtol=0)


def test_half_of_the_images_are_flipped_and_nothing_else_happens_to_them():
    x = torch.rand(400, 3, 8, 8)
    out = train.crop_and_flip(x, 8, crop_min=1.0)
    straight = [torch.allclose(a, b, atol=1e-6) for a, b in zip(out, x)]
    flipped = [torch.allclose(a, v2.functional.horizontal_flip(b), atol=1e-6) for a, b in zip(out, x)]
    whole = sum(straight) + sum(flipped)  # at scale 1 some aspect ratios still cut a little off
    assert whole > 20 and 0.3 < sum(flipped) / whole < 0.7


def test_crops_are_distributed_as_RandomResizedCrops():
    n, (height, width) = 4000, (40, 50)
    top, left, h, w = train.crop_boxes(n, height, width, 0.2)
    crop, image = v2.RandomResizedCrop(8, scale=(0.2, 1)), torch.empty(3, height, width)
    drawn = (crop.make_params([image]) for _ in range(n))
    theirs = torch.tensor([[box[key] for key in ("top", "left", "height", "width")] for box in drawn]).float()
    mine = torch.stack([top, left, h, w], dim=1)
    assert (mine >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    for statistic in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        a, b = statistic(mine).sort().values, statistic(theirs).sort().values
        grid = torch.cat([a, b]).unique()
        gap = (torch.searchsorted(a, grid, right=True) - torch.searchsorted(b, grid, right=True)).abs().max() / n
        assert gap < 1.95 * math.sqrt(2 / n)  # Kolmogorov and Smirnov, at 0.1 percent


@pytest.mark.parametrize("ours, theirs, factors", [
    (train.brightness, v2.functional.adjust_brightness, (0.6, 1.0, 1.4)),
    (train.contrast, v2.functional.adjust_contrast, (0.6, 1.0, 1.4)),
    (train.saturation, v2.functional.adjust_saturation, (0.6, 1.0, 1.4)),
    (train.hue, v2.functional.adjust_hue, (-0.1, 0.0, 0.1)),
    (lambda x, f: train.to_gray(x).expand(-1, 3, -1, -1), lambda x, f: v2.functional.rgb_to_grayscale(x, 3), (0, 0, 0)),
    (train.blur, lambda x, f: v2.functional.gaussian_blur(x, [13, 13], [f, f]), (0.1, 1.0, 2.0)),
], ids="brightness contrast saturation hue gray blur".split())  # fmt: skip
def test_every_operation_is_torchvisions_with_a_factor_for_each_image(ours, theirs, factors):
    x = torch.rand(6, 3, 19, 17)
    x[0] = 0.5  # gray
    f = torch.tensor([*factors, *factors]).view(-1, 1, 1, 1)
    out = ours(x.clone(), f)
    for i in range(6):
        torch.testing.assert_close(out[i], theirs(x[i], f[i].item()), atol=2e-4 if ours is train.hue else 1e-5, rtol=0)


def recolored(image, n=4000, blur=0.0):
    """Two views of n copies of an image (3, H, W) in [0, 1], whose crops were cut before: (2, n, 3, H, W)."""
    args = types.SimpleNamespace(blur=blur, mean=[0.0] * 3, std=[1.0] * 3, image_size=0, crop_min=0)
    crops = (image * 255).round().to(torch.uint8).expand(n, 2, -1, -1, -1)
    return torch.stack(train.two_views(crops, args))


def test_brightness_and_contrast_are_drawn_for_each_image_in_their_ranges():
    """App. A: 0.6 to 1.4 each, in 0.8 of the images. A gray image knows no other jitter."""
    image = torch.tensor([0.4, 0.6]).view(1, 1, 2).expand(3, 2, 2)
    dark, bright = recolored(image)[:, :, 0, 0].unbind(-1)  # (2, n)
    brightness, contrast = bright + dark, 5 * (bright - dark) / (bright + dark)
    jittered = (brightness - 1).abs() > 1e-4
    assert jittered.float().mean().item() == pytest.approx(0.8, abs=0.02)
    for mine in (brightness, contrast):
        assert_uniform(mine[jittered], 0.6, 1.4)
        for view in (0, 1):  # every image has its own
            assert_unrelated(mine[view][1:], mine[view][:-1])
        assert_unrelated(*mine)  # and so has every view
    assert_unrelated(brightness[jittered], contrast[jittered])
    assert_unrelated(*jittered.float())


def test_saturation_and_hue_are_drawn_for_each_image_in_their_ranges_and_gray_is_a_fifth():
    """App. A: saturation 0.6 to 1.4, hue -0.1 to 0.1, gray with probability 0.2."""
    image = torch.full((3, 2, 2), 0.4)
    image[:, 0, 0], image[:, 1] = 0.5, torch.tensor([0.5, 0.4, 0.4]).view(3, 1)  # one pixel bright, two are red
    x = recolored(image)
    chroma = x[..., 1, 0].amax(2) - x[..., 1, 0].amin(2)
    gray = chroma < 1e-4
    assert gray.float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert_unrelated(*gray.float())  # not both views or none
    # Brightness and contrast scale the difference of the two gray pixels, and chroma alike.
    saturation = chroma / (x[:, :, 0, 0, 0] - x[:, :, 0, 0, 1])
    turn = (hue_of(x[..., 1:, :].flatten(0, 1)).view(2, -1) + 0.5) % 1 - 0.5
    jittered = ~gray & ((x[:, :, 0, 0, 0] - 128 / 255).abs() > 1e-4)
    assert_uniform(saturation[jittered] * 25 / 26, 0.6 * 25 / 26, 1.4 * 25 / 26)
    red = x[..., 1, 0]
    turn = torch.where(red[:, :, 1] >= red[:, :, 2], 1, -1) * (red[:, :, 1] - red[:, :, 2]).abs() / chroma / 6  # as in HSV
    assert_uniform(turn[jittered], -0.1, 0.1)
    for mine in (saturation, turn):
        both = jittered[0] & jittered[1]
        assert_unrelated(mine[0][both], mine[1][both])
        assert_unrelated(mine[jittered][1:], mine[jittered][:-1])


def test_the_four_jitters_come_once_each_in_an_order_that_varies(monkeypatch):
    orders, order = set(), []
    for name in ("brightness", "contrast", "saturation", "hue"):
        operation = getattr(train, name)
        monkeypatch.setattr(train, name, lambda x, f, name=name, operation=operation: order.append(name) or operation(x, f))
    for _ in range(200):
        order.clear()
        recolored(torch.rand(3, 2, 2), n=2)
        assert len(order) == 4
        orders.add(tuple(order))
    assert orders == {*itertools.permutations(("brightness", "contrast", "saturation", "hue"))}


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


def cut(count=2000, **flags):
    """Of two views each of a half white image: white's share of the crop, and whether it is on the right."""
    image = torch.full((3, 32, 32), 50, dtype=torch.uint8)
    image[:, :, 16:] = 200
    args = types.SimpleNamespace(image_size=32, crop_min=0.2, blur=0.0, mean=[0.0] * 3, std=[1.0] * 3)
    vars(args).update(flags)
    views = torch.stack(train.two_views(image.expand(count, -1, -1, -1), args))[:, :, 0]
    middle = (views.amax(dim=(2, 3)) + views.amin(dim=(2, 3)))[..., None, None] / 2  # whatever its brightness is
    white = (views > middle).float()
    return white.mean(dim=(2, 3)), white[..., -1].mean(dim=2) > white[..., 0].mean(dim=2)


def test_the_two_views_are_cropped_and_flipped_independently():
    white, right = cut()
    inside = (white > 0) & (white < 1)  # the edge is in the crop
    both = inside[0] & inside[1]
    assert_unrelated(white[0][both], white[1][both])
    assert_unrelated(right[0][both].float(), right[1][both].float())
    assert 0.45 < right[inside].float().mean() < 0.55


def test_crop_min_is_the_least_area_of_a_view():
    white, _ = cut()
    assert ((white > 0) & (white < 0.15)).any()
    white, _ = cut(crop_min=0.9)
    assert white.min() > 0.4 and white.max() < 0.6


def test_views_are_standardized_channels_last_and_come_again_with_the_seed(small_textures):
    images, views = train.textures(640, seed=0)[0], []
    for mean, std in (([0.0] * 3, [1.0] * 3), ([0.1, 0.2, 0.3], [0.5, 0.25, 2.0])) * 2:
        args = types.SimpleNamespace(image_size=24, crop_min=0.2, blur=0.5, mean=mean, std=std)
        torch.manual_seed(1)
        views.append(train.two_views(images, args))
    for plain, scaled, again in zip(views[0], views[1], views[3]):
        assert plain.shape == (64, 3, 24, 24) and plain.min() >= 0 and plain.max() < 1 + 1e-6
        channels = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
        torch.testing.assert_close(scaled, v2.functional.normalize(plain, *channels))
        assert torch.equal(scaled, again) and scaled.is_contiguous(memory_format=torch.channels_last)


def test_images_of_another_size_are_evaluated_at_the_size_of_the_views():
    args = types.SimpleNamespace(image_size=12, device="cpu", workers=0, mean=[0.0] * 3, std=[1.0] * 3)
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    features = train.extract_features(nn.Flatten(), train.Images(images, None), args)
    expected = v2.functional.resize(images / 255, [12, 12], antialias=True).flatten(1)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------
# Training


def test_learning_rate_starts_at_the_peak_halves_in_the_middle_and_ends_above_zero():
    assert train.learning_rate(0, 100, 2.0, 0) == 2.0
    assert train.learning_rate(50, 100, 2.0, 0) == pytest.approx(1.0)
    assert 0 < train.learning_rate(99, 100, 2.0, 0) < 0.001
    warm = [train.learning_rate(step, 100, 2.0, 10) for step in range(100)]
    assert warm[0] == pytest.approx(0.2) and warm[9] == warm[10] == 2.0
    assert warm == sorted(warm[:10]) + sorted(warm[10:], reverse=True)


def entropy_loss(p, z):
    return F.cross_entropy(p, z.softmax(dim=1))


def equation_4(p1, p2, z1, z2, distance=cosine_loss):
    return distance(p1, z2.detach()) / 2 + distance(p2, z1.detach()) / 2


@pytest.mark.parametrize("flags, loss", [
    ("", equation_4),
    ("--warmup-epochs 1 --weight-decay 0.02 --base-lr 0.3", equation_4),
    ("--decay-predictor-lr --epochs 1 --bn none", equation_4),
    ("--no-stop-gradient", lambda p1, p2, z1, z2: cosine_loss(p1, z2) / 2 + cosine_loss(p2, z1) / 2),
    ("--asymmetric", lambda p1, p2, z1, z2: cosine_loss(p1, z2.detach())),
    ("--asymmetric --pairs 2", lambda p1, p2, z1, z2: cosine_loss(p1, z2.detach())),
    ("--similarity cross-entropy", lambda *x: equation_4(*x, entropy_loss)),
    ("--predictor none", equation_4),
    ("--predictor fixed", equation_4),
])  # fmt: skip
def test_three_updates_are_sgd_written_out(small_textures, flags, loss):
    """Sec. 3: momentum 0.9, weight decay on everything, lr by batch / 256, cosine for f and constant for h."""
    t, twin = trainer(*flags.split()), trainer(*flags.split())
    args, per_epoch = t.args, 500 // t.args.batch_size
    steps, warmup = args.epochs * per_epoch, args.warmup_epochs * per_epoch
    velocity, total = {}, 0.0
    for step, (batch, indices) in enumerate(t.batches(range(3))):
        assert len(batch) == 100 * args.pairs
        t.update(batch, indices)

        torch.manual_seed(train.seed_of(0, step, 0))
        value = loss(*twin.model(*train.two_views(batch, args)))
        total += value.item()
        peak = args.base_lr * 100 / 256
        cosine = peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        lr = peak * (step + 1) / warmup if step < warmup else cosine
        learns = {name: w for name, w in twin.model.named_parameters() if w.requires_grad}
        for (name, w), gradient in zip(learns.items(), torch.autograd.grad(value, learns.values())):
            constant = name.startswith("predictor") and not args.decay_predictor_lr
            velocity[name] = 0.9 * velocity.get(name, 0) + gradient + args.weight_decay * w.detach()
            w.data -= (peak if constant else lr) * velocity[name]
        assert t.sums[0].item() == pytest.approx(total, abs=1e-4)
        before = trainer(*flags.split()).model.state_dict() if step == 0 else after
        after = {name: value.clone() for name, value in t.model.state_dict().items()}
        for name, w in twin.model.named_parameters():  # to a thousandth of what a step moves
            moved = (w - before[name]).norm().item()
            assert (after[name] - w).norm().item() <= 1e-3 * moved + 1e-6, name
        twin.model.load_state_dict(after)  # so that rounding does not add up
    assert args.predictor == "none" or any(name.startswith("predictor") for name, _ in t.model.named_parameters())


def test_lr_is_scaled_by_the_total_batch_decays_and_is_constant_for_h(small_textures):
    for flags, constant in (([], True), (["--decay-predictor-lr"], False)):
        t = trainer("--base-lr", "0.4", *flags)
        for batch, indices in t.batches(range(t.steps)):
            t.update(batch, indices)
        encoder, predictor = (group["lr"] for group in t.optimizer.param_groups)
        assert encoder == pytest.approx(0.4 * 100 / 256 * (1 + math.cos(math.pi * 9 / 10)) / 2)
        assert predictor == (pytest.approx(0.4 * 100 / 256) if constant else encoder)


def test_loss_and_spread_of_an_epoch_are_the_means_over_its_steps_and_spread_is_that_of_z(small_textures, monkeypatch):
    losses, spreads = [], []

    class Recorded(SimSiam):
        def forward(self, x1, x2):
            p1, p2, z1, z2 = super().forward(x1, x2)
            losses.append(equation_4(p1, p2, z1, z2).item())
            spreads.append(F.normalize(z1).std(dim=0, correction=0).mean().item() * 4)  # d = 16
            return p1, p2, z1, z2

    monkeypatch.setattr(train, "SimSiam", Recorded)
    train.main([*SMALL, "--out", "run"])
    for i, row in enumerate(rows("run")):
        assert row["loss"] == pytest.approx(sum(losses[5 * i :][:5]) / 5, abs=1e-5)
        assert row["spread"] == pytest.approx(sum(spreads[5 * i :][:5]) / 5, abs=1e-5)


SHORT = "--width 4 --dim 64 --hidden 64 --epochs 6 --batch-size 50 --base-lr 1 --crop-min 0.2 --mean .5 .5 .5 --std .25 .25 .25"


def short_run(*flags, seeds=(0, 1, 2), amp="off"):
    """Means over the seeds of loss and spread, in the last of six epochs of 1,000 textures."""
    ends = []
    for seed in seeds:
        args = args_of(*SHORT.split(), "--seed", seed, "--amp", amp, *flags)
        t = train.Trainer(args, train.Images(*train.textures(1000, seed=0)), None, CPU)
        for batch, indices in t.batches(range(t.steps)):
            if t.step % t.per_epoch == 0:
                t.sums.zero_()
            t.update(batch, indices)
        ends.append(t.sums / t.per_epoch)
    return torch.stack(ends).mean(dim=0).tolist()


@pytest.fixture(scope="session")
def healthy():
    return short_run()


def test_with_stop_gradient_the_spread_stays_and_without_it_is_lost(healthy):
    """Fig. 2. BN on z gives each channel unit variance again, so all of it goes only without that BN."""
    loss, spread_ = short_run("--no-stop-gradient")
    assert healthy[1] > 0.7 and spread_ < 0.65 * healthy[1] and loss < healthy[0]
    assert short_run("--no-stop-gradient", "--bn", "hidden", seeds=[0])[1] < 0.1
    assert short_run("--bn", "hidden", seeds=[0])[1] > 0.5


def test_the_same_in_bf16():
    assert short_run(seeds=[0], amp="bf16")[1] > 0.7
    assert short_run("--no-stop-gradient", "--bn", "hidden", seeds=[0], amp="bf16")[1] < 0.1


def test_a_fixed_predictor_leaves_the_loss_high_without_collapse(healthy):
    """Table 1b, and footnote 4: this is no collapse, though it does not learn as it should."""
    loss, spread_ = short_run("--predictor", "fixed")
    assert loss > 0.7 * healthy[0] and spread_ > 0.65 * healthy[1]


@pytest.mark.parametrize("flags", [["--asymmetric"], ["--similarity", "cross-entropy"]])
def test_the_asymmetric_loss_and_the_cross_entropy_do_not_collapse(healthy, flags):
    """Sec. 4.5 and 4.6."""
    assert short_run(*flags)[1] > 0.65 * healthy[1]


def test_k_steps_of_alternation_meet_the_targets_of_the_weights_before_them(small_textures):
    """Sec. 5.2. The first of k steps is SimSiam's to the bit; in the second, z comes from the older weights."""
    plain, t = trainer(), trainer("--alternate", "2")
    batches = [*t.batches(range(3))]
    for one in (plain, t):
        old = {name: value.clone() for name, value in one.model.state_dict().items()}
        one.update(*batches[0])
    assert same(plain.model.state_dict(), t.model.state_dict())
    targets, current = trainer().model, trainer().model
    targets.load_state_dict(old), current.load_state_dict(t.model.state_dict())
    torch.manual_seed(train.seed_of(0, 1, 0))
    views = train.two_views(batches[1][0], t.args)
    (p1, p2, _, _), (_, _, z1, z2) = current.train()(*views), targets.train()(*views)
    first = t.sums[0].item()
    t.update(*batches[1])
    assert t.sums[0].item() - first == pytest.approx(equation_4(p1, p2, z1, z2).item(), abs=1e-5)
    before = {name: value.clone() for name, value in t.model.named_parameters()}
    t.update(*batches[2])  # the first of the next two
    assert same(before, dict(t.targets.model.named_parameters()))


def test_eta_is_the_moving_average_of_an_images_projections(small_textures):
    """Sec. 5.2: eta <- m eta + (1 - m) z; here over both views, from zero."""
    t, batches = trainer("--eta-momentum", "0.8", "--predictor", "none"), None
    z1, z2 = torch.randn(2, 3, 16)
    t.targets.eta[:3] = old = torch.randn(3, 16)
    t1, t2 = t.targets(0, torch.arange(3), t.model, None, None, z1, z2)
    torch.testing.assert_close(t1, 0.8 * old + 0.2 * z1)
    torch.testing.assert_close(t2, 0.8 * old + 0.2 * z2)
    torch.testing.assert_close(t.targets.eta[:3], 0.8 * old + 0.1 * (z1 + z2))
    t, plain = trainer("--eta-momentum", "0.8"), trainer()
    batches = [*t.batches(range(2))]
    t.update(*batches[0]), plain.update(*batches[0])  # from zero, the first visit is SimSiam's: D sees no scale
    assert t.sums[0].item() == pytest.approx(plain.sums[0].item(), abs=1e-5)
    seen = batches[0][1]
    assert (t.targets.eta[seen].norm(dim=1) > 0).all() and t.targets.eta.norm(dim=1).count_nonzero() == len(seen)


# ------------------------------------------------------------------------------------------------
# Reports, precision, resume, processes


def test_training_reports_what_it_measures(small_textures, capsys):
    train.main([*TINY, "--knn-every", "2", "--epochs", "3", "--batch-size", "100", "--export", "backbone.pt"])
    first, second, third = rows("runs/textures")
    assert list(first) == "epoch step loss spread rank knn lr images_per_second seconds".split()
    assert (first["epoch"], second["epoch"], second["step"]) == (1, 2, 10)
    assert all(-1 <= row["loss"] <= 1 and 1 <= row["rank"] <= 16 for row in (first, second))
    assert first["knn"] is None and 0 <= second["knn"] <= 1 and 0 <= third["knn"] <= 1  # every two, and the last
    out = capsys.readouterr().out
    assert "torch.float32" in out.splitlines()[0]
    assert len(out.splitlines()) == 6 and "\r" not in out and "\033" not in out  # in a pipe, plain lines
    with Image.open("runs/textures/views.png") as picture:
        assert picture.size[0] > 8 * 32
    checkpoint = torch.load("runs/textures/checkpoint.pt", weights_only=True)
    assert all(k.split(".")[0] in ("backbone", "projector", "predictor") for k in checkpoint["model"])
    net, _ = build_backbone("convnet", width=2)
    net.load_state_dict(torch.load("backbone.pt", weights_only=True), strict=True)


def test_checkpoints_come_as_often_as_asked_for_and_at_the_end(small_textures, monkeypatch):
    saved, save = [], train.Trainer.save
    monkeypatch.setattr(train.Trainer, "save", lambda self: saved.append(self.step) or save(self))
    train.main([*SMALL, "--epochs", "5", "--save-every", "2", "--out", "run"])
    assert saved == [0, 10, 20, 25]


def by_hand(model, images, args):
    """Features in eval mode of all images in memory, at once."""
    with torch.no_grad():
        x = v2.functional.normalize(images.source / 255, args.mean, args.std)
        return model.backbone.eval()(x)


def test_features_are_those_of_every_image_by_the_network_as_it_is(small_textures):
    """In eval mode, standardized, the last batch of 250 not dropped; and the network stays as it was."""
    t = trainer()
    t.update(*next(iter(t.batches(range(1)))))  # now the running statistics are not those of a new network
    for count in (260, 499, 1):
        part = t.images.subset(torch.randperm(500)[:count])
        before = {name: value.clone() for name, value in t.model.state_dict().items()}
        t.model.train()
        features = train.extract_features(t.model.backbone, part, t.args)
        assert t.model.backbone.training and same(before, t.model.state_dict())
        assert features.dtype == torch.float32 and not features.requires_grad
        torch.testing.assert_close(features, by_hand(t.model, part, t.args), rtol=1e-4, atol=1e-5)


def test_kNN_and_rank_are_those_of_all_test_images_against_the_training_set(small_textures):
    t = trainer()
    for batch, indices in t.batches(range(5)):
        t.update(batch, indices)
    erank, knn = t.monitor(knn=True)
    bank, queries = (by_hand(t.model, images, t.args) for images in (t.images, t.test))
    correct = sum(a == b for a, b in zip(vote(queries, bank, t.images.labels, 200, 0.2), t.test.labels.tolist()))
    assert knn == pytest.approx(correct / 200, abs=0.0051)  # a tie may fall the other way
    unit_ = F.normalize(queries)  # of no more than 256
    s = torch.linalg.svdvals(unit_ - unit_.mean(dim=0))
    assert erank == pytest.approx(torch.distributions.Categorical(s / s.sum()).entropy().exp().item(), rel=1e-3)
    assert t.monitor(knn=False) == (pytest.approx(erank, rel=1e-4), None)


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
    whole, parts = ([(row["loss"], row["spread"], row["rank"]) for row in rows(out)] for out in ("whole", "parts"))
    assert whole == parts and len(whole) == 2


def test_auto_takes_bf16_where_the_hardware_multiplies_it(monkeypatch):
    for native, dtype in ((dict(amx_bf16=True), torch.bfloat16), (dict(avx512_bf16=True), torch.bfloat16), ({}, None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: native)
        assert train.amp_dtype("auto", CPU) == dtype
    for native, dtype in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda native=native, **kwargs: native)
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
        one.update(*next(iter(one.batches(range(1)))))
    assert seen == [dtype] * 2 and all(w.dtype == torch.float32 for w in t.model.parameters())
    assert exact.sums.tolist() == pytest.approx(t.sums.tolist(), abs=0.02)
    assert (exact.sums.tolist() == t.sums.tolist()) == (amp == "off")


def test_fp16_steps_through_the_scaler(small_textures):
    """What float16 would lose is scaled up for the backward pass and down again; a step with infinities is skipped."""
    exact, t = trainer(), trainer()
    t.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for one in (exact, t):
        for batch, indices in one.batches(range(2)):
            one.update(batch, indices)
    assert t.scaler.get_scale() == 2048  # two good steps: told to update
    for a, b in zip(exact.model.parameters(), t.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    before = {name: value.clone() for name, value in t.model.named_parameters()}
    t.scaler = torch.amp.GradScaler("cpu", init_scale=1e38)  # the gradients overflow
    t.scaler._lazy_init_scale_growth_tracker(CPU)
    t.scaler._scale.mul_(1e3)
    t.update(*next(iter(t.batches(range(2, 3)))))
    assert same(before, dict(t.model.named_parameters())) and "scaler" in t.state_dict()


DDP = """
import os, sys, torch
sys.path.insert(0, {here!r})
import train
args = train.get_args({argv!r})[0]
train.setup_distributed("cpu")
images, test = (train.Images(*train.textures(n, seed=0)) for n in (500, 301))
t = train.Trainer(args, images, test, torch.device("cpu"))
for step, (batch, indices) in enumerate(t.batches(range(3))):
    t.update(batch, indices)
    if step == 0:
        first = [w.grad.clone() for w in t.model.parameters()]
before, knn = dict(t.model.backbone.named_buffers())["1.running_mean"].clone(), t.monitor(knn=True)
features = train.extract_features(t.model.backbone, test, args)
torch.save(dict(first=first, batch=batch, peak=t.peak, before=before, knn=knn, features=features,
                last=t.model.state_dict()), f"rank{{t.rank}}.pt")
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
    args = args_of(*flags)
    images, test = (train.Images(*train.textures(n, seed=0)) for n in (500, 301))
    t = train.Trainer(args, images, test, CPU)
    assert a["peak"] == b["peak"] == t.peak == pytest.approx(args.base_lr * 100 / 256)  # by the total batch
    # By hand: each half of the batch, with its rank's seed, through the same first weights.
    gradients = []
    for rank in (0, 1):
        model = train.Trainer(args, images, None, CPU).model
        _, indices = next(train.schedule(500, 100, 0, range(1), rank, 2))
        torch.manual_seed(train.seed_of(0, 0, rank))
        simsiam_loss(*model(*train.two_views(images.source[indices], args))).backward()
        gradients.append([w.grad for w in model.parameters()])
    for got, x, y in zip(a["first"], *gradients):
        torch.testing.assert_close(got, (x + y) / 2, rtol=1e-3, atol=1e-6)
    t.model.load_state_dict(a["last"])  # one process: the same features, in the same order, of 301 images
    expected = by_hand(t.model, test, args)
    for one in (a, b):
        torch.testing.assert_close(one["features"], expected, rtol=1e-4, atol=1e-5)
        assert one["knn"] == pytest.approx(t.monitor(knn=True), rel=1e-3)


def test_on_several_gpus_BN_is_over_the_whole_batch(small_textures, monkeypatch):
    """By stand-ins, for no GPU is needed: the CPU plays cuda's part."""
    args, wrapped = args_of(*SMALL), []
    images, test = train.load_data(args)
    zeros, to = torch.zeros, nn.Module.to
    monkeypatch.setattr(train, "process", lambda: (1, 2))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **kwargs: zeros(*shape, **kwargs))
    monkeypatch.setattr(nn.Module, "to", lambda self, device=None, **kwargs: to(self, "cpu", **kwargs))
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model, device_ids: wrapped.append(device_ids) or model)
    for device, ids, batchnorm in (("cuda:1", [torch.device("cuda:1")], nn.SyncBatchNorm), ("cpu", None, nn.BatchNorm1d)):
        model = train.Trainer(args, images, test, torch.device(device)).model
        assert wrapped.pop() == ids and not wrapped
        layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert len(layers) == 9 and isinstance(model.projector[1], batchnorm)
        assert {type(m) for m in layers} == {nn.SyncBatchNorm} or device == "cpu"


# ------------------------------------------------------------------------------------------------
# Advice: what the README's runs looked like, (loss, spread) by epochs of 78 steps


def told(*epochs):
    history = [dict(step=78 * (i + 1), loss=loss, spread=spread_) for i, (loss, spread_) in enumerate(epochs)]
    return train.advice(history)


def test_advice_names_collapse_and_not_a_healthy_run():
    """Measured: `textures`, ten epochs, seed 0 of each row of the README's table."""
    healthy = [(-0.44, 0.87), (-0.71, 0.88), (-0.88, 0.90), (-0.89, 0.91), (-0.91, 0.92), (-0.94, 0.94)]
    hidden_bn = [(-0.65, 0.62), (-0.75, 0.61), (-0.79, 0.69), (-0.87, 0.67), (-0.90, 0.72), (-0.94, 0.75)]
    for run in (healthy, hidden_bn):
        assert all(told(*run[: i + 1]) == "" for i in range(len(run)))
    for run in (
        [(-0.68, 0.66), (-0.88, 0.44)], [(-0.68, 0.64), (-0.83, 0.54)],  # without the stop-gradient: by epoch 2
        [(-0.91, 0.15)],  # and without BN on z
        [(-0.86, 0.38), (-0.86, 0.46), (-0.93, 0.23), (-0.99, 0.10)],  # no BN in the heads
    ):  # fmt: skip
        assert told(*run).startswith("collapse: ") and "stop-gradient" in told(*run)
    without_h = [(-0.71, 0.74), (-0.87, 0.61), (-0.93, 0.61), (-0.97, 0.62)]
    assert told(*without_h).startswith("partial collapse: ") and "predictor" in told(*without_h)


def test_advice_on_a_loss_that_stays_high_waits_for_steps_and_for_the_loss_to_stop_falling():
    """Footnote 4: a loss that stays high is no collapse."""
    fixed = [(-0.11, 0.85), (-0.15, 0.75), (-0.20, 0.72), (-0.22, 0.73), *[(-0.22, 0.7)] * 4]  # Table 1b
    assert "not learning" in told(*fixed) and "no collapse" in told(*fixed)
    assert told(*fixed[:3]) == ""
    falling = [(-0.05 * i, 0.95) for i in range(9)]
    assert all(told(*falling[: i + 1]) == "" for i in range(9))
    few = [dict(step=4 * i, loss=-0.02, spread=0.98) for i in range(1, 9)]  # epochs of four steps: too early to say
    assert train.advice(few) == "" and train.advice(few[:1]) == ""


def test_advice_is_given_once(small_textures, capsys):
    t = trainer("--epochs", "20", "--out", "run")
    Path("run").mkdir()
    for t.step in (10, 15, 20):
        t.sums.copy_(torch.tensor([-0.99, 0.05]) * t.per_epoch)
        t.report(rate=1.0)
    assert capsys.readouterr().err.count("warning: collapse") == 1


# ------------------------------------------------------------------------------------------------
# Evaluation


def correct(out, task):
    """The counts that eval.py printed for a task: (right, all)."""
    return tuple(map(int, re.search(rf"^{task} .*\((\d+) of (\d+)\)$", out, re.M).groups()))


def evaluate(capsys, *argv):
    capsys.readouterr()
    evaluation.main([str(word) for word in argv])
    return capsys.readouterr().out


def test_evaluation_prints_kNN_and_linear_and_draws_neighbors(pretrained, capsys):
    out = evaluate(capsys, pretrained, "--epochs", "5")
    assert "knn (k=200, T=0.2): top-1" in out and "linear (features computed once, standardized" in out
    picture = v2.functional.pil_to_tensor(Image.open("run/neighbors.png"))
    args, content = evaluation.get_args([pretrained])
    (images, test), net = train.load_data(args), evaluation.load_backbone(args, content)
    bank, queries = (train.extract_features(net, part, args) for part in (images, test))
    nearest = F.cosine_similarity(queries[:1], bank).topk(9).indices  # of the first test image, which is on the left
    for column, x in enumerate([test.source[0], *images.source[nearest]]):
        left = 2 + column * 34
        assert torch.equal(picture[:, 2:34, left : left + 32], x)


def test_kNN_counts_every_test_image_by_the_networks_own_features(pretrained, capsys):
    args, _ = evaluation.get_args([pretrained])
    images, test = train.load_data(args)
    model = SimSiam(*build_backbone("convnet", width=2), dim=16, hidden=16, layers=2)
    model.load_state_dict(weights(pretrained))
    bank, queries = (by_hand(model, part, args) for part in (images, test))
    for k, temperature in ((1, 0.2), (30, 0.05), (30, 50.0)):
        voted = vote(queries, bank, images.labels, k, temperature)
        right = sum(a == b for a, b in zip(voted, test.labels.tolist()))
        out = evaluate(capsys, pretrained, "knn", "--k", k, "--temperature", temperature)
        assert f"k={k}, T={temperature}" in out and correct(out, "knn") == (pytest.approx(right, abs=1), 200)


def test_size_mean_and_std_of_the_images_are_the_checkpoints(small_textures):
    flags = "--epochs 1 --out run --image-size 24 --mean .1 .2 .3 --std .4 .5 .6 --crop-min 0.3".split()
    train.main([*SMALL, *flags])
    args, _ = evaluation.get_args(["run/checkpoint.pt"])
    assert (args.image_size, args.mean, args.std) == (24, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (args.data, args.arch, args.width, args.crop_min) == ("textures", "convnet", 2, 0.3)
    assert evaluation.get_args(["run/checkpoint.pt", "linear", "--official"])[0].crop_min == 0.08  # the authors'


PROTOCOLS = ["knn", "linear", "linear --official", "finetune"]


@pytest.mark.parametrize("task", PROTOCOLS)
def test_what_is_learned_are_the_training_sets_images_and_labels(monkeypatch, capsys, task):
    """Training on the test set would show: its classes are others here, and must never be predicted."""
    whole = train.textures

    def textures(count, seed):
        images, labels = whole(count // 10, seed)
        return images, labels + 100 * seed  # the test set is made with seed 1

    monkeypatch.setattr(train, "textures", textures)
    out = evaluate(capsys, "random", *task.split(), "--data", "textures", "--width", 2, *["--epochs", 2][: 2 * (task != "knn")])
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


def spied_backbones(monkeypatch):
    nets, load = [], evaluation.load_backbone
    monkeypatch.setattr(evaluation, "load_backbone", lambda *args: nets.append(load(*args)) or nets[-1])
    return nets


def backbone_of(path):
    return {k.removeprefix("backbone."): v for k, v in weights(path).items() if k.startswith("backbone.")}


def test_a_probe_changes_no_tensor_of_the_backbone(pretrained, monkeypatch):
    nets = spied_backbones(monkeypatch)
    for protocol in ([], ["--official"]):
        evaluation.main([pretrained, "linear", "--epochs", "2", *protocol])
        assert same(backbone_of(pretrained), dict(nets[-1].state_dict())) and not nets[-1].training
        assert not any(w.requires_grad for w in nets[-1].parameters())


def test_a_backbone_left_in_training_mode_is_caught(pretrained, monkeypatch):
    load = evaluation.load_backbone
    monkeypatch.setattr(evaluation, "load_backbone", lambda *args: load(*args).train())
    with pytest.raises(AssertionError, match="changed the backbone"):
        evaluation.main([pretrained, "linear", "--official", "--epochs", "1"])


def test_fine_tuning_changes_all_weights_and_BN_statistics_only_from_scratch(pretrained, monkeypatch, capsys):
    nets, extract, asked = spied_backbones(monkeypatch), train.extract_features, []

    def extract_features(model, images, *args):
        out = extract(model, images, *args)
        if isinstance(model, nn.Sequential) and not isinstance(model[0], nn.Conv2d):  # backbone, head
            asked.append((out, images, model))
        return out

    monkeypatch.setattr(evaluation, "extract_features", extract_features)
    for name, keeps in ((pretrained, True), ("random", False)):
        out = evaluate(capsys, name, "finetune", "--data", "textures", "--labels-per-class", 2, "--epochs", 20, "--width", 2)
        assert "20 labelled images" in out and "finetune (all weights" in out
        torch.manual_seed(0)  # of "random"
        before = backbone_of(pretrained) if keeps else build_backbone("convnet", width=2)[0].state_dict()
        after = nets[-1].state_dict()
        for key in before:
            statistic = "running" in key or "num_batches" in key
            assert torch.equal(before[key], after[key]) == (statistic and keeps), key
        logits, test, model = asked.pop()  # the result is that of the tuned network
        assert model[0] is nets[-1] and len(test) == 200 and not asked
        right = (logits.argmax(dim=1) == test.labels).sum().item()  # labels 0 to 9 are their own positions
        assert correct(out, "finetune") == (right, 200)


@pytest.mark.parametrize("task, peak, batch, epochs", [
    ("linear", 1 * 256 / 256, 256, 90), ("linear --official", 30 * 256 / 256, 256, 90), ("finetune", 0.1 * 64 / 256, 64, 90),
    ("linear --base-lr 0.5 --batch-size 128 --epochs 4", 0.5 * 128 / 256, 128, 4),
    ("finetune --base-lr 0.4 --batch-size 128 --epochs 4", 0.4 * 128 / 256, 128, 4),
])  # fmt: skip
def test_the_lr_of_a_protocol_is_scaled_by_its_batch_and_falls_by_half_a_cosine(small_textures, monkeypatch, capsys, task, peak, batch, epochs):
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
    assert f"{epochs} epochs of {500 // batch} steps" in evaluate(capsys, "random", *task.split(), "--data", "textures", "--width", 1)
    steps = epochs * (500 // batch)
    assert len(runs[-1]) == steps and len(runs) == 1 + ("finetune" in task)  # there, the head alone comes first
    for step, lr in enumerate(runs[-1]):
        assert lr == pytest.approx(peak * (1 + math.cos(math.pi * step / steps)) / 2)


def test_the_crops_of_supervised_training_are_standardized_and_flipped():
    images = train.Images(torch.randint(256, (300, 3, 8, 8), dtype=torch.uint8), None)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    args = types.SimpleNamespace(workers=0, device="cpu", image_size=8, crop_min=1.0, mean=mean, std=std)
    (x,) = evaluation.crops(images, [("key", torch.arange(300))], args)
    plain = v2.functional.normalize(images.source / 255, mean, std)
    straight = [torch.allclose(a, b, atol=1e-5) for a, b in zip(x, plain)]
    flipped = [torch.allclose(a, b.flip(2), atol=1e-5) for a, b in zip(x, plain)]
    assert 0.3 < sum(flipped) / (sum(straight) + sum(flipped)) < 0.7 and sum(straight) > 10
    small = vars(args) | dict(crop_min=0.08)
    (x,) = evaluation.crops(images, [("key", torch.arange(300))], types.SimpleNamespace(**small))
    assert sum(torch.allclose(a, b, atol=1e-5) for a, b in zip(x, plain)) < 3


def test_few_labels_are_that_many_of_each_class_and_other_ones_with_another_seed():
    labels = torch.arange(5).repeat(20)
    chosen = evaluation.few_labels(labels, 3, seed=0)
    assert labels[chosen].bincount().tolist() == [3] * 5 and len(set(chosen.tolist())) == 15
    assert chosen.tolist() != evaluation.few_labels(labels, 3, seed=1).tolist()
    with pytest.raises(ValueError, match="class 0 has only 20"):
        evaluation.few_labels(labels, 21, seed=0)


def test_random_is_an_untrained_network_by_its_seed_and_pixels_are_no_network(small_textures, capsys):
    nets = []
    for seed in (1, 2, 1):
        args, content = evaluation.get_args(["random", "--data", "textures", "--width", "2", "--seed", str(seed)])
        nets.append(evaluation.load_backbone(args, content).state_dict())
    assert same(nets[0], nets[2]) and not torch.equal(nets[0]["0.weight"], nets[1]["0.weight"])
    args = evaluation.get_args(["pixels", "--data", "textures"])[0]
    images, test = train.load_data(args)
    bank, queries = (v2.functional.normalize(part.source / 255, args.mean, args.std).flatten(1) for part in (images, test))
    right = sum(a == b for a, b in zip(vote(queries, bank, images.labels, 5, 0.2), test.labels.tolist()))
    out = evaluate(capsys, "pixels", "knn", "--data", "textures", "--k", 5)
    assert "features of length 3072" in out and correct(out, "knn") == (pytest.approx(right, abs=1), 200)


def test_features_are_written_for_whatever_comes_next(pretrained):
    evaluation.main([pretrained, "knn", "--features", "features.pt"])
    written = torch.load("features.pt", weights_only=True)
    args, _ = evaluation.get_args([pretrained])
    model = SimSiam(*build_backbone("convnet", width=2), dim=16, hidden=16, layers=2)
    model.load_state_dict(weights(pretrained))
    for name, part in zip(("train", "test"), train.load_data(args)):
        torch.testing.assert_close(written[name]["features"], by_hand(model, part, args), rtol=1e-4, atol=1e-5)
        assert torch.equal(written[name]["labels"], part.labels)


def authors_file(arch="resnet18"):
    """A checkpoint as the authors' code writes it: module.encoder.*, the projector as encoder.fc.0 to fc.7."""
    backbone, dim = build_backbone(arch)
    model = SimSiam(backbone, dim, dim=32, hidden=dim)
    state = {}
    for name, value in model.state_dict().items():
        name = name.replace("backbone.", "encoder.").replace("projector.", "encoder.fc.")
        state["module." + name] = value
    state["module.encoder.fc.6.bias"] = torch.zeros(32)  # theirs has it, though BN follows
    return dict(epoch=100, arch=arch, state_dict=state, optimizer={}), backbone


def test_the_authors_files_are_read(tmp_path, capsys):
    content, backbone = authors_file()
    torch.save(content, "authors.pt")
    write_folder(tmp_path / "photos")
    out = evaluate(capsys, "authors.pt", "knn", *"--data photos --image-size 64 --workers 0 --export out.pt".split())
    assert "all 120 tensors of resnet18 loaded" in out
    assert same(torch.load("out.pt", weights_only=True), dict(backbone.state_dict()))
    assert "resnet18" in fails(["authors.pt", "knn", "--data", "photos", "--arch", "resnet50"], capsys, evaluation.main)


def test_an_exported_backbone_is_plain_torchvision(tmp_path):
    write_folder(tmp_path / "photos")
    flags = "--dim 16 --hidden 16 --image-size 32 --batch-size 4 --epochs 1 --workers 0 --export out.pt".split()
    train.main(["photos", "--arch", "resnet18", "--amp", "off", *flags])
    net, x = torchvision.models.resnet18(), torch.rand(2, 3, 32, 32)
    missing, unexpected = net.load_state_dict(torch.load("out.pt", weights_only=True), strict=False)
    assert sorted(missing) == ["fc.bias", "fc.weight"] and not unexpected
    program = torch.export.export(net.eval(), (x,))
    torch.testing.assert_close(program.module()(x), net(x))


def test_what_does_not_fit_is_refused_with_both_values(pretrained, capsys):
    for flags, words in (
        (["--arch", "resnet18"], "--arch resnet18, but the checkpoint has convnet"),
        (["--mean", "0.1", "0.2", "0.3"], "--mean [0.1, 0.2, 0.3], but the checkpoint has [0."),
        (["--width", "3"], "--width 3, but the checkpoint has 2"),
    ):
        assert words in fails([pretrained, *flags], capsys, evaluation.main)
    torch.save({"something": torch.zeros(3)}, "other.pt")
    assert "does not fit" in fails(["other.pt", "--data", "textures"], capsys, evaluation.main)
    net, _ = build_backbone("resnet18", "cifar")
    torch.save(net.state_dict(), "stem.pt")
    argv = ["stem.pt", "--data", "textures", "--arch", "resnet18", "--stem", "imagenet"]
    line = fails(argv, capsys, evaluation.main)
    assert "conv1" in line and "[64, 3, 3, 3]" in line and "[64, 3, 7, 7]" in line


# ------------------------------------------------------------------------------------------------
# What a user can do wrong

WRONG = [  # a number's range on one flag, and then a case for each flag
    *[("--epochs", value) for value in ("-1", "0", "1e9", "99999999999", "x", "")],
    *[("--base-lr", value) for value in ("-1", "nan", "inf", "x")],
    ("--batch-size", "1"), ("--batch-size", "6000"), ("--dim", "0"), ("--hidden", "0"), ("--width", "0"), ("--layers", "0"),
    ("--save-every", "0"), ("--weight-decay", "-1"), ("--crop-min", "2"), ("--blur", "2"), ("--eta-momentum", "1"),
    ("--seed", "-1"), ("--workers", "-1"), ("--knn-every", "-1"), ("--warmup-epochs", "20"), ("--image-size", "1"),
    ("--std", "0 0 0"), ("--mean", "0.5"), ("--mean", "0.5 0.5 0.5"), ("--std", "0.5 0.5 0.5"), ("--arch", "resnet19"),
    ("--stem", "cifar"), ("--stem", "other"), ("--predictor", "linear"), ("--bn", "some"), ("--similarity", "l2"),
    ("--amp", "fp16"), ("--amp", "yes"), ("--device", "tpu"), ("--unknown", ""), ("--epoch", "3"), ("--pairs", "0"),
    ("--out", "afile"), ("--out", "used"), ("--export", "afile"), ("--export", "no/such/folder"), ("--alternate", "0"),
    ("--alternate", "2 --eta-momentum 0.5"), ("--arch", "resnet18 --width 4"), ("--no-stop-gradient", "--alternate 2"),
    ("--eta-momentum", "0.8 --pairs 2"), ("nosuchfolder", ""), ("afile", ""), ("emptyfolder", ""), ("looseimages", ""),
    ("--benchmark", "0"), ("--benchmark", "3 --out x"),
]  # fmt: skip


@pytest.mark.parametrize("flag, value", WRONG)
def test_nonsense_gets_one_line_that_names_it_and_status_2(flag, value, capsys):
    Path("afile").write_text("mine")
    Path("used").mkdir()
    Path("used/file").write_text("mine")
    Path("emptyfolder").mkdir()
    for part in ("train", "val"):
        write_image(Path("looseimages", part, "1.png"), [9, 9, 9])
    words = [flag, *value.split()] if value or not flag.startswith("--") or flag == "--unknown" else [f"{flag}="]
    assert flag in fails(words, capsys)
    assert Path("afile").read_text() == Path("used/file").read_text() == "mine" and not Path("runs").exists()


@pytest.mark.parametrize("argv", [
    "", "nosuch.pt", "afolder", "random", "random probe --data textures", "random --data nosuch",
    "random --data textures --k 0", "random --data textures --temperature 0", "random --data plain",
    "random --data textures --labels-per-class 501", "random --data textures --arch vgg", "afile --data textures",
    "random --data textures --features no/such/place", "random --data textures --export afile",
    "random --data textures --mean 0.1 0.1 0.1", "pixels --data textures --arch resnet18",
    "random --data textures --export a --features a", "random --data textures --device tpu",
])  # fmt: skip
def test_eval_answers_nonsense_the_same_way(argv, capsys, tmp_path):
    Path("afile").write_text("mine")
    Path("afolder").mkdir()
    write_folder(tmp_path / "plain", parts=["."], per_class=1)
    fails(argv.split(), capsys, evaluation.main)
    assert Path("afile").read_text() == "mine"


def test_help_needs_no_data_and_names_every_recipe():
    for script in ("train.py", "eval.py"):
        assert "usage:" in command(HERE / script, "--help").stdout
    text = train.build_parser().format_help()
    assert "base_lr=0.03" in text and "not run by us" in text


def test_a_used_folder_is_not_written_to_and_the_next_free_one_is_taken(small_textures, capsys):
    flags = [*SMALL, "--epochs", "1"]
    train.main(flags)
    before = Path("runs/textures/checkpoint.pt").read_bytes()
    train.main(flags)
    assert Path("runs/textures-2/checkpoint.pt").exists()
    assert "--resume" in fails([*flags, "--out", "runs/textures"], capsys)
    assert Path("runs/textures/checkpoint.pt").read_bytes() == before


def test_a_resumed_run_keeps_its_recipe_and_says_both_values(small_textures, capsys):
    train.main([*SMALL, "--epochs", "1", "--out", "run"])
    for flag, value, was in (("--dim", "32", "16"), ("--epochs", "5", "1"), ("--batch-size", "50", "100"), ("--arch", "resnet18", "convnet")):
        line = fails(["--out", "run", "--resume", flag, value], capsys)
        assert was in line and value in line and flag.strip("-").replace("-", "_") in line
    train.main(["--out", "run", "--resume", "--save-every", "2"])  # allowed: it does not define the training


# ------------------------------------------------------------------------------------------------
# What a machine can do to a long run


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_damaged_and_hostile_checkpoints_are_refused_in_one_line_and_never_executed(pretrained, capsys):
    whole = Path(pretrained).read_bytes()
    bad = [whole[: len(whole) * i // 100] for i in range(100)] + [b"", b"a text file\n", pickle.dumps(Evil())]
    for content in bad:
        Path("run/checkpoint.pt").write_bytes(content)
        fails(["--resume", "--out", "run"], capsys)
        assert Path("run/checkpoint.pt").read_bytes() == content
    torch.save({"model": Evil(), "optimizer": {}, "step": 0, "args": {}}, "run/checkpoint.pt")
    fails(["--resume", "--out", "run"], capsys)
    fails(["run/checkpoint.pt", "--data", "textures"], capsys, evaluation.main)
    for content in ({"state_dict": {}}, [1, 2], {"model": {}, "optimizer": {}, "step": 0, "args": {"batch_size": 100}}):
        torch.save(content, "run/checkpoint.pt")
        fails(["--resume", "--out", "run"], capsys)
    Path("run/checkpoint.pt").write_bytes(whole)
    good = torch.load("run/checkpoint.pt", weights_only=True)
    wrong = [dict(args=good["args"] | {name: value}) for name, value in (("batch_size", "x"), ("dim", 1.5), ("data", 3))]
    for change in (*wrong, dict(history="abc"), dict(history=3), dict(step=10**9), dict(step="x"), dict(n=3)):
        torch.save(good | change, "run/checkpoint.pt")
        fails(["--resume", "--out", "run"], capsys)
    assert not Path("executed").exists()


def test_a_flipped_bit_is_refused_or_hit_nothing_that_counts(pretrained):
    whole = Path(pretrained).read_bytes()
    good = torch.load(pretrained, weights_only=True)["model"]
    refused = 0
    for i in range(100):
        damaged = bytearray(whole)
        damaged[len(whole) * i // 100 + i] ^= 1 << i % 8
        Path(pretrained).write_bytes(damaged)
        try:
            assert same(good, train.read_checkpoint(Path(pretrained))["model"])  # padding between the records
        except SystemExit as exit_:
            refused += exit_.code == 2
    assert refused > 30


@pytest.mark.parametrize("broken", ["replace", "fsync", "open"])
def test_a_failed_write_keeps_the_last_checkpoint(pretrained, capsys, monkeypatch, broken):
    before = Path(pretrained).read_bytes()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr("builtins.open" if broken == "open" else f"os.{broken}", fail)
        train.replace_file(Path(pretrained), {"new": 1})
    assert exit_.value.code == 1 and Path(pretrained).read_bytes() == before
    assert "No space left" in capsys.readouterr().err
    assert not list(Path("run").glob(".*.tmp"))


@pytest.mark.parametrize("what, when", [("sums", 7), ("buffers", 10)])  # 10: the end of the second epoch
def test_nan_stops_at_its_step_and_keeps_the_last_checkpoint(small_textures, capsys, monkeypatch, what, when):
    update = train.Trainer.update

    def poisoned(self, *args):
        update(self, *args)
        if self.step == when:
            (self.sums if what == "sums" else self.model.backbone[1].running_var).fill_(math.nan)

    monkeypatch.setattr(train.Trainer, "update", poisoned)
    line = fails([*SMALL, "--out", "run"], capsys, status=1)
    assert f"step {when}" in line and "lr" in line and "amp" in line
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 5


def test_a_run_that_began_later_and_ended_earlier_is_not_overwritten(small_textures, capsys):
    args, _ = train.get_args(SMALL)
    train.main(SMALL)
    before = Path("runs/textures/checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit) as exit_:
        train.train(args, None)
    assert exit_.value.code == 2 and "taken by another run" in capsys.readouterr().err
    assert Path("runs/textures/checkpoint.pt").read_bytes() == before


def test_a_closed_terminal_or_pipe_does_not_end_the_training(small_textures, monkeypatch):
    closed = types.SimpleNamespace(write=no_network, flush=no_network, isatty=lambda: True, closed=False)
    monkeypatch.setattr(sys, "stdout", closed)
    train.main([*SMALL, "--out", "run"])
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == 10


def test_a_folder_may_move_but_not_change_before_a_resume(tmp_path, capsys):
    photos = write_folder(tmp_path / "photos", parts=["."])
    train.main(["photos", *FOLDER, "--out", "run"])
    moved = photos.rename(tmp_path / "moved")
    train.main([str(moved), "--resume", "--out", "run"])
    (moved / "cat/0.jpg").rename(moved / "dog/9.jpg")  # as many as before, in another order
    assert "images of other names" in fails([str(moved), "--resume", "--out", "run"], capsys)
    (moved / "dog/9.jpg").unlink()
    assert "12 images, and now 11" in fails([str(moved), "--resume", "--out", "run"], capsys)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_says_where_and_exits_with_its_status(name):
    process = start(HERE / "train.py", *TINY, "--epochs", "1000", "--out", "run")
    wait_for(process, "epoch   1/")
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name) and not err
    assert f"{name} at step" in out and "--resume --out run" in out
    step = int(re.search(r"at step (\d+)", out)[1])
    assert torch.load("run/checkpoint.pt", weights_only=True)["step"] == step


def test_nohup_is_respected_and_a_signal_to_the_whole_group_reaches_no_worker(tmp_path):
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGTERM)}
    with train.noted_signals():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    for number, handler in before.items():
        signal.signal(number, handler)
    write_folder(tmp_path / "photos")
    process = start(HERE / "train.py", "photos", *FOLDER, "--workers", "1", "--epochs", "5000", "--knn-every", "0",
                    "--out", "run", start_new_session=True)  # fmt: skip
    wait_for(process, "epoch   1/")
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "SIGTERM at step" in out, err


def test_an_image_lost_during_the_training_ends_it_in_one_line(tmp_path):
    write_folder(tmp_path / "photos")
    process = start(HERE / "train.py", "photos", *FOLDER, "--workers", "1", "--epochs", "5000", "--out", "run")
    wait_for(process, "epoch   1/")
    (tmp_path / "photos/train/cat/1.png").unlink()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "photos/train/cat/1.png" in err.splitlines()[-1] and "Traceback" not in err


def test_rows_behind_the_last_checkpoint_go_at_a_resume(small_textures):
    train.main([*SMALL, "--out", "run"])
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"epoch": 2 garbage}\n[]\n{"epoch"')
    train.main(["--resume", "--out", "run"])
    assert [row["epoch"] for row in rows("run")] == [1, 2]


def test_kill_9_at_any_moment_loses_no_bit(tmp_path):
    write_folder(tmp_path / "photos", parts=["."])
    argv = [HERE / "train.py", "photos", *FOLDER, "--epochs", "60", "--out", "run"]
    train.main([*map(str, argv[1:-1]), "whole"])
    process = start(*argv)
    for word in ("epoch   9/", "epoch  30/"):
        wait_for(process, word)  # killed behind a report, that is while saving or soon after
        process.kill()
        process.wait()
        process = start(*argv, "--resume")
    assert "Traceback" not in process.communicate(timeout=60)[1] and process.returncode == 0
    assert same(weights("whole/checkpoint.pt"), weights("run/checkpoint.pt"))


def children(pid):
    out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(x) for x in out.split()]


def test_torchrun_trains_and_a_killed_rank_ends_all_and_resumes_by_itself():
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    process = start(*torchrun, HERE / "train.py", *TINY, "--epochs", "12", "--out", "run")
    wait_for(process, "epoch   2/")
    os.kill(children(process.pid)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert "epoch  12/12" in out and torch.load("run/checkpoint.pt", weights_only=True)["step"] == 120
    assert [row["epoch"] for row in rows("run")] == list(range(1, 13))


def test_readme_names_no_flag_that_the_scripts_do_not_have():
    known = train.build_parser().format_help() + evaluation.build_parser().format_help()
    known = set(re.findall(r"--[a-z][a-z-]+", known))
    torchrun = ("--nproc", "--nnodes", "--standalone", "--max-restarts", "--rdzv", "--index-url")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (HERE / "README.md").read_text()))
    assert not {flag for flag in named - known if not flag.startswith(torchrun)}
