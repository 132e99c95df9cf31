"""SimSiam in one file: loss, networks, augmentation and monitors. It needs only torch and torchvision.

"Exploring Simple Siamese Representation Learning", Xinlei Chen and Kaiming He, CVPR 2021
(arXiv 2011.10566; sections, equations and tables below are those of the arXiv version).

The idea. Take two random views of one image, for example two crops with different colors. An encoder f
maps both to vectors. A small predictor h has to predict one of the vectors from the other. To do this well,
f must encode the content of the image, which both views have in common, and so it learns features without
labels. There is a shortcut: if f maps every image to the same vector, the prediction is perfect and the
features are useless. The stop-gradient prevents this: the vector to be predicted is treated as a constant
(Fig. 2). The predictor is necessary too (Table 1a). Negative pairs (views of two different images), a
momentum encoder (a moving average of f that computes the targets) and large batches are not.

Algorithm 1 of the paper:

    for x in loader:
        x1, x2 = augment(x), augment(x)          two views of every image
        z1, z2 = f(x1), f(x2)                    projections, (N, d)
        p1, p2 = h(z1), h(z2)                    predictions, (N, d)
        L = D(p1, z2) / 2 + D(p2, z1) / 2        D: negative cosine similarity, z held constant
        L.backward(); update f and h

Symbols:  x1, x2  two views, (N, 3, H, W)    f  encoder: backbone, then projector
          z1, z2  projections f(x), (N, d)   h  predictor
          p1, p2  predictions h(z), (N, d)   d  output dimension, 2048
After training, keep only the backbone. Projector and predictor are discarded.

Usage. This example runs as it is, on random images:

    import torch
    from simsiam import SimSiam, augment, build_backbone, simsiam_loss

    loader = torch.rand(2, 8, 3, 32, 32)                             # two batches of images in [0, 1]
    backbone, feature_dim = build_backbone("resnet18", stem="cifar")
    model = SimSiam(backbone, feature_dim, layers=2)                 # App. D
    lr = 0.03 * 8 / 256                                              # App. D, for a batch of 8
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    for x in loader:
        x1 = augment(x, size=32, blur_probability=0)                 # no blur on CIFAR-10 (App. D)
        x2 = augment(x, size=32, blur_probability=0)
        # With real images, standardize both views here: (x1 - mean) / std.
        loss = simsiam_loss(*model(x1, x2))                          # p1, p2, z1, z2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    features = model.backbone.eval()(x)       # (8, 512); standardize x; then model.train() again

In long runs, use cosine decay for the encoder's lr, and keep the predictor's constant (Table 1c). On
several GPUs, convert the model with SyncBatchNorm (Sec. 3). See Trainer and build_optimizer in train.py.

Differences from the authors' code and from the paper (skip these on a first reading):
  - The stop-gradient is inside D, as in Eq. 3, not in forward(), so copying the loss is enough.
  - The projector's hidden width is an argument, 2048 by default as in the paper. In the authors' code it is
    the length of the backbone's features, which would be 512 for a ResNet-18.
  - The cosine is computed in float32 or better, also under autocast.
  - The projector's last Linear has no bias. In the authors' code, the bias is frozen; the BN cancels it.
  - The BN on z has no learned scale and shift, as in Sec. 4.4 and the authors' code but not in Sec. 3.
Accuracies below are ImageNet linear top-1 after 100 epochs, from the paper. The full method has 67.7 % if
the predictor's learning rate decays (Fig. 2, Table 1), 68.1 % if it does not (Tables 1c to 3), and 68.2 %
if the BN on z also has no scale and shift (Sec. 4.4).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock

Similarity = Callable[[Tensor, Tensor], Tensor]  # from p and z, both (N, d), to a scalar to be minimized
RESNETS = models.list_models(models, include=["resnet*", "resnext*", "wide_resnet*"])
ARCHS = ["convnet", "small-resnet", *RESNETS]

# ------------------------------------------------------------------------------------------------
# The loss


def unit(x: Tensor) -> Tensor:
    """Scales the rows of x, (..., d), to length 1, in float32 or better: bfloat16 is too coarse near 1."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Eq. 1: the negative cosine of p and z, both (N, d), averaged over N. A scalar in [-1, 1]."""
    # The minus turns a similarity into a loss. Its minimum is -1, so a negative loss is normal. For unit
    # vectors, -cos(p, z) = |p - z|^2 / 2 - 1: a squared error, up to scale and shift.
    return -(unit(p) * unit(z)).sum(dim=-1).mean()


def cross_entropy(p: Tensor, z: Tensor) -> Tensor:
    """Sec. 4.5: cross-entropy, with softmax(z) as the target distribution over d classes. A scalar >= 0.

    It works too (63.2 %), so it is not the cosine that prevents collapse.
    """
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return -(z.softmax(dim=-1) * p.log_softmax(dim=-1)).sum(dim=-1).mean()


def D(p: Tensor, z: Tensor, stop_gradient: bool = True, similarity: Similarity = negative_cosine) -> Tensor:
    """Loss, a scalar, of predictions p for targets z, (N, d) each; z is constant by default (Eq. 3)."""
    # The detach below is the core of the paper. z is the target and is treated as a constant, so the
    # encoder gets its gradient through p only. Without the detach, the gradient also pulls z towards p, and
    # the quickest way to a low loss is to map every image to the same vector. The loss soon reaches -1, and
    # the features are worthless. ImageNet top-1 is 67.7 % with the detach and 0.1 % without it (Fig. 2).
    #
    # The predictor is needed as well. Without it, both terms of the symmetrized loss are D(z1, z2) with one
    # side held constant. Together they have exactly half the gradient of D(z1, z2) without any detach,
    # so training collapses as well. The asymmetric loss also fails without h (Sec. 4.2, Table 1a).
    #
    # Why does it work? Sec. 5 offers a hypothesis: as in k-means or EM, two sets of variables are
    # optimized alternately, the weights and one target vector per image. The detach holds the targets fixed
    # while the weights are updated. The paper leaves open why this does not collapse (Sec. 5.3).
    if stop_gradient:
        z = z.detach()
    return similarity(p, z)


def simsiam_loss(
    p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, symmetric: bool = True,
    stop_gradient: bool = True, similarity: Similarity = negative_cosine,
) -> Tensor:  # fmt: skip
    """The symmetrized loss of Eq. 4: a scalar. All of p1, p2, z1, z2 are (N, d).

    Note the crossing: the prediction from view 1 is compared with the projection of view 2. D(p1, z1) would
    compare a view with itself; h could learn the identity, and the loss would fall although f learns
    nothing.
    """
    # Each view serves once as source and once as target. One direction alone also works: 64.8 instead
    # of 68.1 %, from half as many predictions per image (Sec. 4.6).
    if not symmetric:
        return D(p1, z2, stop_gradient, similarity)
    return D(p1, z2, stop_gradient, similarity) / 2 + D(p2, z1, stop_gradient, similarity) / 2


# ------------------------------------------------------------------------------------------------
# The encoder f = backbone + projector, and the predictor h. `bn` selects a row of Table 3 (see SimSiam).


def convnet(width: int) -> nn.Sequential:
    """A plain network of six layers for 32x32 images: (N, 3, H, W) to (N, 8 * width).

    Not from the paper. It lets the whole method run on a laptop in about two minutes.
    """
    layers: list[nn.Module] = []
    channels = 3
    for factor, stride in [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1)]:
        layers += conv_bn_relu(channels, factor * width, kernel_size=3, stride=stride)
        channels = factor * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(1))


def small_resnet(width: int) -> nn.Sequential:
    """A small ResNet for 32x32 photographs on a laptop: (N, 3, H, W) to (N, 8 * width).

    Not from the paper either. Three stages, each a convolution with stride 2 and a residual block, then a
    1x1 convolution.
    """
    layers: list[nn.Module] = []
    for channels, out in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
        block = BasicBlock(out, out)
        nn.init.zeros_(block.bn2.weight)  # zero_init_residual, see build_backbone
        layers += [*conv_bn_relu(channels, out, kernel_size=3, stride=2), block]
    layers += conv_bn_relu(4 * width, 8 * width, kernel_size=1, stride=1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(1))


def conv_bn_relu(channels: int, out: int, kernel_size: int, stride: int) -> list[nn.Module]:
    """Three layers that map (N, channels, H, W) to (N, out, H / stride, W / stride)."""
    conv = nn.Conv2d(channels, out, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return [conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]


def build_backbone(arch: str, stem: str = "imagenet", width: int = 16) -> tuple[nn.Module, int]:
    """A backbone without its classifier, and the length of its feature vector.

    arch: "convnet", "small-resnet" (both with the given width), or any ResNet in torchvision.
    stem: first layers of a ResNet: "imagenet" for about 224 pixels, "cifar" for about 32.
    With the stem "imagenet", the state_dict of a ResNet fits torchvision's model, except for the missing
    `fc`. Raises ValueError for an unknown arch or stem.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}: choose from {', '.join(ARCHS)}")
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"unknown stem {stem!r}: choose imagenet or cifar")
    if arch == "convnet":
        return convnet(width), 8 * width
    if arch == "small-resnet":
        return small_resnet(width), 8 * width

    # zero_init_residual: the last BN of each block starts at 0, so that a block starts as its shortcut
    # (App. A). The authors call it important for stability (issue 28 of their repository).
    net = models.get_model(arch, weights=None, zero_init_residual=True)
    if stem == "cifar":
        # The ImageNet stem reduces 32x32 pixels to 8x8 before the first block; the CIFAR stem keeps them.
        # (App. D says only "the CIFAR variant of ResNet-18".) Some implementations use padding=2, which
        # enlarges the maps to 34x34; the mistake is easy to miss, because the state_dict still loads.
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    feature_dim = net.fc.in_features
    net.fc = nn.Identity()
    return net, feature_dim


def linear_bn_relu(
    fan_in: int, fan_out: int, bn: bool, affine: bool = True, relu: bool = True
) -> list[nn.Module]:
    """One layer of an MLP head, (N, fan_in) to (N, fan_out): Linear, optional BN, optional ReLU."""
    # BN would cancel a bias. The Linears keep PyTorch's default initialization; with a fixed standard
    # deviation of 0.01, as is common elsewhere, training may not converge (App. A).
    layer: list[nn.Module] = [nn.Linear(fan_in, fan_out, bias=not bn)]
    if bn:
        layer.append(nn.BatchNorm1d(fan_out, affine=affine))
    if relu:
        layer.append(nn.ReLU(inplace=True))
    return layer


def build_projector(
    feature_dim: int, hidden: int, dim: int, layers: int, bn: str = "default", affine: bool = False
) -> nn.Sequential:
    """The projection MLP of Sec. 3 with `layers` layers: (N, feature_dim) to (N, dim)."""
    mlp: list[nn.Module] = []
    fan_in = feature_dim
    for _ in range(layers - 1):
        # BN in the hidden layers raises the accuracy from 34.6 % (no BN at all) to 67.4 % (Table 3a, b).
        mlp += linear_bn_relu(fan_in, hidden, bn=bn != "none")  # (N, hidden)
        fan_in = hidden
    # BN on the output too gives 68.1 % (Table 3c), and 68.2 % without learned scale and shift (Sec. 4.4).
    # No ReLU, because z may point in any direction.
    mlp += linear_bn_relu(fan_in, dim, bn=bn in ("default", "all"), affine=affine, relu=False)  # (N, d)
    return nn.Sequential(*mlp)


def build_predictor(dim: int, hidden: int, bn: str = "default") -> nn.Sequential:
    """The prediction MLP h of Sec. 3: (N, dim) to (N, dim) through a bottleneck."""
    # Sec. 5.1: ideally the target would be the mean of z over all augmentations, but a step samples only
    # one of them; h may learn that mean. A constant learning rate works best, perhaps because h should
    # adapt to the latest representations (Sec. 4.2, Table 1c).
    return nn.Sequential(
        # A bottleneck: with a hidden layer as wide as the output, training can be less stable (App. B).
        *linear_bn_relu(dim, hidden, bn=bn != "none"),  # (N, hidden)
        # No BN and no ReLU here. With BN on this output, training is unstable but does not collapse: the
        # loss oscillates (Table 3d).
        *linear_bn_relu(hidden, dim, bn=bn == "all", relu=False),  # (N, d)
    )


class SimSiam(nn.Module):
    """Encoder f = projector(backbone(x)) and predictor h, for two views at a time (Sec. 3).

    backbone: any module that maps images to (N, feature_dim), from build_backbone, timm or elsewhere.
    dim: d, the number of entries of z and p; 2048 gives 68.1 %, 1024 67.5, 512 67.2, 256 65.3 (App. B).
    hidden: width of the projector's hidden layers.
    layers: 3 on ImageNet (Sec. 3), 2 on CIFAR-10 (App. D).
    predictor_hidden: width of the bottleneck of h, by default dim // 4 (App. B).
    bn: layers of the heads that have BN: "none", "hidden", "default" (all but the output of h) or "all".
    affine: learned scale and shift in the BN on z (Sec. 4.4).
    Raises ValueError for an unknown bn.
    """

    def __init__(
        self, backbone: nn.Module, feature_dim: int, dim: int = 2048, hidden: int = 2048, layers: int = 3,
        predictor_hidden: int | None = None, bn: str = "default", affine: bool = False,
    ):  # fmt: skip
        super().__init__()
        if bn not in ("none", "hidden", "default", "all"):
            raise ValueError(f"unknown bn {bn!r}: choose none, hidden, default or all")
        self.backbone = backbone
        self.projector = build_projector(feature_dim, hidden, dim, layers, bn, affine)
        self.predictor = build_predictor(dim, predictor_hidden or max(1, dim // 4), bn)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Maps views x1 and x2, (N, 3, H, W), to p1, p2, z1, z2, (N, d). BN needs N > 1 in training."""
        # Two calls, not one on torch.cat([x1, x2]): BN normalizes each call by its own mean and variance,
        # so the results differ. The authors' code makes two calls as well. Both are inside this one forward
        # because DDP needs exactly one wrapped call per backward.
        z1 = self.projector(self.backbone(x1))  # (N, d)
        z2 = self.projector(self.backbone(x2))  # (N, d)
        # z1 and z2 are not detached here; D does that.
        return self.predictor(z1), self.predictor(z2), z1, z2


# ------------------------------------------------------------------------------------------------
# Augmentation (App. A) of a batch on its device. Parameters are drawn per image, except the order of the
# color jitter. x is float, (N, 3, H, W), in [0, 1]. If sizes differ, crop in the loader, then recolor.


def augment(x: Tensor, size: int, min_scale: float = 0.2, blur_probability: float = 0.5) -> Tensor:
    """One random view of each image, (N, 3, size, size) in [0, 1]. Call it twice for two views.

    x: (N, 3, H, W), float32 in [0, 1], not standardized, because it clamps. Call it outside of autocast.
    size: side in pixels, 7 or more if there is blur.
    min_scale: area of the smallest crop, as a fraction of the image area.
    blur_probability: 0.5 is from the authors' code, not from the paper; use 0 for CIFAR-10 (App. D).
    """
    return recolor(crop_and_flip(x, size, min_scale), blur_probability)


def recolor(x: Tensor, blur_probability: float = 0.5) -> Tensor:
    """Applies color jitter, gray and blur to random subsets of x, (N, 3, H, W), in place. Returns x."""

    def some(probability: float) -> Tensor:
        """Indices of the images that the next operation applies to."""
        return (torch.rand(len(x), device=x.device) < probability).nonzero()[:, 0]

    def uniform(n: int, low: float, high: float) -> Tensor:
        """n random numbers, (n, 1, 1, 1): one per image, the same for all its pixels."""
        return torch.empty(n, 1, 1, 1, device=x.device).uniform_(low, high)

    # ColorJitter(0.4, 0.4, 0.4, 0.1) with probability 0.8. Its four operations are applied in a random
    # order, which is the same for the whole batch.
    chosen = some(0.8)
    jittered = x[chosen]
    jitter = [(brightness, 0.6, 1.4), (contrast, 0.6, 1.4), (saturation, 0.6, 1.4), (hue, -0.1, 0.1)]
    for i in torch.randperm(4).tolist():
        operation, low, high = jitter[i]
        jittered = operation(jittered, uniform(len(chosen), low, high))
    x[chosen] = jittered

    chosen = some(0.2)
    x[chosen] = to_gray(x[chosen]).expand(-1, 3, -1, -1)

    chosen = some(blur_probability)
    x[chosen] = blur(x[chosen], sigma=uniform(len(chosen), 0.1, 2.0))
    return x


def crop_and_flip(x: Tensor, size: int, min_scale: float) -> Tensor:
    """RandomResizedCrop to (N, 3, size, size), then a horizontal flip with probability 1/2."""
    n, channels, height, width = x.shape
    top, left, crop_height, crop_width = random_crops(n, height, width, min_scale, x.device)
    rows = resize_matrix(top, crop_height, height, size)  # (N, size, H)
    columns = resize_matrix(left, crop_width, width, size)  # (N, size, W)
    flipped = torch.rand(n, device=x.device) < 0.5
    columns = torch.where(flipped.view(-1, 1, 1), columns.flip(1), columns)
    # rows @ image @ columns.T per image and channel; image @ columns.T is one product for all channels.
    x = (x.reshape(n, -1, width) @ columns.mT).view(n, channels, height, size)
    return rows.unsqueeze(1) @ x


def random_crops(
    n: int, height: int, width: int, min_scale: float, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """top, left, height and width of n crops, each (n,), with the distribution of RandomResizedCrop.

    Only the fallback differs: if none of ten attempts fits, the crop is the whole image.
    """
    area = height * width * torch.empty(n, 10, device=device).uniform_(min_scale, 1)
    ratio = torch.empty(n, 10, device=device).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    w = (area * ratio).sqrt().round()
    h = (area / ratio).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)  # the first attempt that fits
    w = torch.where(fits.any(dim=1), w.gather(1, first)[:, 0], width)
    h = torch.where(fits.any(dim=1), h.gather(1, first)[:, 0], height)
    top = (torch.rand(n, device=device) * (height - h + 1)).floor()
    left = (torch.rand(n, device=device) * (width - w + 1)).floor()
    return top, left, h, w


def resize_matrix(start: Tensor, length: Tensor, size_in: int, size_out: int) -> Tensor:
    """Matrices (N, size_out, size_in) that crop and resize one axis; start and length: (N,), in pixels."""
    # Resizing is linear and separable: one matrix for the rows, one for the columns. A whole batch of
    # different crops then takes two batched matrix products, and a flip only reverses the columns.
    start = start.view(-1, 1, 1)
    length = length.view(-1, 1, 1)
    scale = length / size_out
    center = start + (torch.arange(size_out, device=start.device).view(1, -1, 1) + 0.5) * scale
    pixel = torch.arange(size_in, device=start.device) + 0.5
    # A triangle filter around the center. When shrinking, it is `scale` times wider, for antialiasing.
    weight = (1 - (pixel - center).abs() / scale.clamp_min(1)).clamp_min(0)
    weight = weight * ((pixel > start) & (pixel < start + length))  # nothing from outside the crop
    return weight / weight.sum(dim=-1, keepdim=True)


def to_gray(x: Tensor) -> Tensor:
    """Maps (N, 3, H, W) to (N, 1, H, W), the ITU-R 601 luma, as in torchvision."""
    return 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


# The four operations of ColorJitter, each as in torchvision; factor: (N, 1, 1, 1), one per image.


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(to_gray(x).mean(dim=(1, 2, 3), keepdim=True), x, factor).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(to_gray(x), x, factor).clamp_(0, 1)


def hue(x: Tensor, factor: Tensor) -> Tensor:
    """Rotates the hue by the fraction `factor` of a circle, as a conversion to HSV and back would.

    The formulas are not needed to understand the method; a test compares them with torchvision.
    """
    red, green, blue = x.unbind(dim=1)  # (N, H, W)
    value = x.amax(dim=1)
    chroma = value - x.amin(dim=1)
    divisor = chroma.clamp_min(1e-6)  # no 0 / 0 in gray pixels: their chroma of 0 removes the hue below
    sector = torch.where(
        value == red,
        (green - blue).div_(divisor),
        torch.where(value == green, (blue - red).div_(divisor).add_(2), (red - green).div_(divisor).add_(4)),
    )
    turn = sector.div_(6).add_(factor.view(-1, 1, 1) + 1).unsqueeze(1)  # (N, 1, H, W), positive
    # Around the circle, a channel is at its maximum for a third, at its minimum for a third, and linear in
    # between. The offsets place the peaks of red, green and blue a third of a circle apart. `below` is the
    # distance of a channel from the maximum, as a fraction of the chroma.
    offset = (5 - 2 * torch.arange(3, device=x.device).view(1, 3, 1, 1)) / 6  # 5/6, 3/6, 1/6
    below = (turn + offset).frac_().mul_(6).sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
    return torch.addcmul(value.unsqueeze(1), below, chroma.unsqueeze(1), value=-1)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur; sigma: (N, 1, 1, 1), one per image, up to 2 pixels. H and W must exceed 6."""
    n, channels, height, width = x.shape
    if n == 0:
        return x  # a convolution needs at least one group
    radius = 6  # pixels: three times the largest sigma
    taps = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-taps.square() / (2 * sigma.view(n, 1).square()))
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    # One group per image and channel, so that every image has its own kernel.
    x = F.pad(x.reshape(1, -1, height, width), [radius] * 4, mode="reflect")
    x = F.conv2d(x, kernel[:, None, :, None], groups=n * channels)
    return F.conv2d(x, kernel[:, None, None, :], groups=n * channels).view(n, channels, height, width)


# ------------------------------------------------------------------------------------------------
# Monitors. The loss does not show whether features are learned: a collapsed network has the lowest
# loss of all.


@torch.no_grad()
def spread(z: Tensor) -> Tensor:
    """Standard deviation of z / |z| over the batch, mean over d entries, times sqrt(d). z is (N, d).

    A scalar: 1 if as spread out as random directions, 0 if all are equal, which is collapse (Sec. 4.1). With
    BN on z, collapse leaves a spread of about 2 sqrt(N - 1) / N: 0.25 for 64 images and 0.09 for 512.
    """
    # A vector of d independent Gaussian entries has a length of about sqrt(d). Divided by it, each entry
    # has a standard deviation of 1 / sqrt(d) (footnote 3), so the spread is 1. With BN, the z of a batch
    # sum to zero, so they cannot all point the same way. At most, all but one of them do, and runs without
    # the stop-gradient end close to that.
    return unit(z).std(dim=0, correction=0).mean() * z.shape[1] ** 0.5


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """Effective number of dimensions that normalized features (N, D) use: a scalar from 1 to min(N - 1, D).

    The exponential of the entropy of the normalized singular values of the centered features (Roy and
    Vetterli, 2007). It reveals dimensional collapse (arXiv 2110.09348; for SimSiam 2209.15007), in which
    many dimensions are unused although the spread looks healthy. Raises LinAlgError if a feature is nan.
    """
    x = unit(features)  # (N, D)
    s = torch.linalg.svdvals(x - x.mean(dim=0))  # (min(N, D),)
    share = s / s.sum().clamp_min(torch.finfo(s.dtype).tiny)
    return torch.special.entr(share).sum().exp()  # entr(x) = -x ln x, and 0 at 0


@torch.no_grad()
def knn_predict(
    features: Tensor, bank: Tensor, bank_labels: Tensor, k: int = 200, temperature: float = 0.2,
    chunk_elements: int = 2**25,
) -> Tensor:  # fmt: skip
    """Predicts labels (N,) for features (N, D) by a vote of their k nearest neighbors in the bank (M, D).

    A neighbor votes for its label with weight exp(cosine / temperature), as in InstDisc (Wu et al., 2018).
    The paper gives neither k nor the temperature; 200 and 0.2 are from issue 10 of the authors' repository.
    Use the backbone's features, not z, and the whole training set as the bank. bank_labels: (M,), integers.
    """
    # Labels may be any set of integers: vote on positions in `classes`, then translate back.
    classes, positions = bank_labels.unique(return_inverse=True)  # (C,), (M,)
    bank = unit(bank)  # (M, D)
    k = min(k, len(bank))
    predictions = []
    # In chunks, because all similarities at once would need 256 GB for ImageNet. 2**25 float32 are 128 MiB.
    for query in unit(features).split(max(1, chunk_elements // len(bank))):
        similarity, index = (query @ bank.T).topk(k, dim=1)  # (B, k), (B, k)
        # Subtracting the maximum scales all votes of a query by the same factor and avoids overflow.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()  # (B, k)
        votes = weight.new_zeros(len(query), len(classes))  # (B, C)
        votes.scatter_add_(1, positions[index], weight)
        predictions.append(classes[votes.argmax(dim=1)])  # (B,)
    return torch.cat(predictions)


# ------------------------------------------------------------------------------------------------
# Demonstration, `python simsiam.py`: random images with noise, with the stop-gradient and without it.

if __name__ == "__main__":
    for stop_gradient in (True, False):
        torch.manual_seed(0)
        backbone, feature_dim = build_backbone("convnet", width=8)
        model = SimSiam(backbone, feature_dim, dim=64, hidden=64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        images = torch.randn(512, 3, 16, 16)
        print(f"\n{'with' if stop_gradient else 'WITHOUT'} the stop-gradient")
        for step in range(101):
            batch = images[torch.randperm(512)[:64]]
            x1 = batch + torch.randn_like(batch) / 2
            x2 = batch + torch.randn_like(batch) / 2
            p1, p2, z1, z2 = model(x1, x2)
            loss = simsiam_loss(p1, p2, z1, z2, stop_gradient=stop_gradient)
            if step % 25 == 0:
                erank = effective_rank(z1)
                print(f"step {step:3d}  loss {loss:6.3f}  spread {spread(z1):.3f}  erank {erank:4.1f}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
