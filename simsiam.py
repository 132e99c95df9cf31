"""SimSiam: views, model, loss and monitors in one file. Copy it; it needs only torch and torchvision.

"Exploring Simple Siamese Representation Learning", Xinlei Chen and Kaiming He, CVPR 2021
(arXiv 2011.10566; sections, equations and tables below are those of the arXiv version).

The idea. Take two random views of one image, say two crops with different colours. An encoder f maps
both to vectors; a small predictor h must predict the other view's vector from this one's. Doing that
well needs what the views share, the content of the picture, and so f learns features without a single
label. An encoder that only had to agree with itself could map every image to one constant. What keeps
training away from that solution is the stop-gradient: the side that is predicted is taken as given
(Fig. 2). The predictor has to be there as well (Table 1a).

Algorithm 1 of the paper:

    for x in loader:
        x1, x2 = augment(x), augment(x)          two views of every image
        z1, z2 = f(x1), f(x2)                    projections, (N, d)
        p1, p2 = h(z1), h(z2)                    predictions, (N, d)
        L = D(p1, z2) / 2 + D(p2, z1) / 2        D: negative cosine similarity, z held constant
        L.backward(); update f and h

Symbols:  x  a view, (N, 3, H, W)        f  encoder = backbone, then projector
          z  projection f(x), (N, d)     h  predictor
          p  prediction h(z), (N, d)     d  output dimension, 2048
What users keep in the end is the backbone alone. Projector and predictor serve only the training.

Where this file departs from the authors' released code or from the paper's text, and why:
  - The stop-gradient stands inside D, as in Eq. 3, and not in forward(): whoever copies only the loss
    copies the method.
  - The projector's width is an argument, 2048 by default as in the paper, and not the backbone's:
    on a ResNet-18 that would be 512. The predictor's is d / 4 for every d, 512 for the paper's 2048.
  - The cosine is computed in float32 at least, also under autocast.
  - The Linear before the BN on z has no bias. Theirs has one, frozen: BN subtracts it again.
  - The BN on z has no learned scale and shift, as in their code and in Sec. 4.4, but not in Sec. 3.

Use it like this. The example runs as it stands, on 32 images of noise:

    import torch
    from simsiam import SimSiam, augment, build_backbone, simsiam_loss

    loader = torch.rand(2, 16, 3, 32, 32)                            # batches of images in [0, 1]
    backbone, feature_dim = build_backbone("resnet18", stem="cifar")
    model = SimSiam(backbone, feature_dim, layers=2)                 # App. D
    lr = 0.03 * 16 / 256                                             # of App. D, for a batch of 16
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    for x in loader:
        x1, x2 = augment(x, 32, blurred=0), augment(x, 32, blurred=0)  # then (x - mean) / std
        loss = simsiam_loss(*model(x1, x2))                          # p1, p2, z1, z2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    features = model.backbone.eval()(x)                              # (16, 512): what you keep
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock

Similarity = Callable[[Tensor, Tensor], Tensor]  # of p and z, both (N, d): a scalar to be minimized
RESNETS = models.list_models(models, include=["resnet*", "resnext*", "wide_resnet*"])
ARCHS = ["convnet", "small-resnet", *RESNETS]

# ------------------------------------------------------------------------------------------------
# The loss


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Eq. 1: minus the cosine of p and z, both (N, d), averaged over N: a scalar in [-1, 1].

    The minimum is -1, so a negative loss is right. Computed in float32 at least, whatever comes in.
    """
    # In terms of unit vectors, -cos(p, z) = |p - z|^2 / 2 - 1: a squared error, up to scale and shift.
    return -(unit(p) * unit(z)).sum(dim=-1).mean()


def D(
    p: Tensor, z: Tensor, stop_gradient: bool = True, similarity: Similarity = negative_cosine
) -> Tensor:
    """How far the predictions p are from the targets z, both (N, d): a scalar. Eq. 3: z is held constant."""
    # THE line of the paper. z is the target, and a target is given, not adjusted: gradient flows into
    # the encoder through p only. Take the detach away and both sides move towards each other; the
    # fastest way to meet is to map every image to one vector. The loss is soon -1 and the features
    # are worthless: 67.7 % ImageNet top-1 with this line, 0.1 % without (Fig. 2). Negatives, a momentum
    # encoder or a large batch are not needed. A predictor is: without one, the symmetrized loss has the
    # same gradient with the detach as without it, only half as large, and collapses. The asymmetric loss
    # is another one with the detach, but without h it fails too (Sec. 4.2, Table 1a).
    # Sec. 5 offers a hypothesis of what is optimized: as in k-means or EM, two sets of unknowns in turn,
    # the weights and one target vector an image, each solved for with the other held fixed. The detach is
    # then natural. Why this alternation does not end in a constant, the paper leaves open (Sec. 5.3).
    if stop_gradient:
        z = z.detach()
    return similarity(p, z)


def simsiam_loss(
    p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, symmetric: bool = True,
    stop_gradient: bool = True, similarity: Similarity = negative_cosine,
) -> Tensor:  # fmt: skip
    """The symmetrized loss of Eq. 4: a scalar. All of p1, p2, z1, z2 are (N, d).

    Note the crossing: the prediction from view 1 meets the projection of view 2. D(p1, z1) would
    compare a view with itself, h could learn the identity, and the loss would fall for no reason.
    """
    # Each view serves once as the source and once as the target. One direction alone also works, at
    # 64.8 instead of 68.1 %: it makes only half as many predictions per image (Sec. 4.6).
    if not symmetric:
        return D(p1, z2, stop_gradient, similarity)
    return D(p1, z2, stop_gradient, similarity) / 2 + D(p2, z1, stop_gradient, similarity) / 2


def cross_entropy(p: Tensor, z: Tensor) -> Tensor:
    """Another similarity, in [0, inf): the d channels as d classes, z saying how likely each is (Sec. 4.5).

    It works too, at 63.2 %, so it is not the cosine that prevents collapse.
    """
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return -(z.softmax(dim=-1) * p.log_softmax(dim=-1)).sum(dim=-1).mean()


def unit(x: Tensor) -> Tensor:
    """Rows of x, (..., d), divided by their length. Computed and returned in float32 at least.

    A zero row stays zero, and its gradient stays finite. Never returns float16 or bfloat16: their
    11 or 8 bits of precision are not enough for a cosine near 1, which is where training lives.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # Dividing by the largest entry first keeps the sum of squares from overflow (float32 ends at 3e38,
    # so 1e20 squared is infinite) and from underflow. The cosine does not change when its argument
    # is scaled, so autograd may take this factor as a constant, and the gradient is still exact.
    scale = x.detach().abs().amax(dim=-1, keepdim=True)
    x = x / torch.where(scale > 0, scale, 1)
    # The largest entry is now 1, so the length is 1 or more and the bound is for rows of zeros alone. It is
    # 0.5 and not 1: where a length equals the bound, as a one-hot row's would, clamp_min has no gradient.
    return x / x.norm(dim=-1, keepdim=True).clamp_min(0.5)


# ------------------------------------------------------------------------------------------------
# The encoder f = backbone + projector, and the predictor h


def convnet(width: int) -> nn.Sequential:
    """A small six-layer network for 32x32 images: (N, 3, H, W) to (N, 8 * width).

    Ours, not the paper's: it lets the whole method run on a laptop's CPU in about two minutes.
    """
    layers: list[nn.Module] = []
    channels = 3
    for out, stride in [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1)]:
        layers += conv_bn_relu(channels, out * width, kernel_size=3, stride=stride)
        channels = out * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(1))


def small_resnet(width: int) -> nn.Sequential:
    """A ResNet for 32x32 photographs and a laptop: (N, 3, H, W) to (N, 8 * width).

    Ours as well. Three times a convolution that halves the map and a residual block, then a wide 1x1.
    """
    layers: list[nn.Module] = []
    for channels, out in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
        block = BasicBlock(out, out)
        nn.init.zeros_(block.bn2.weight)  # as zero_init_residual below
        layers += [*conv_bn_relu(channels, out, kernel_size=3, stride=2), block]
    layers += conv_bn_relu(4 * width, 8 * width, kernel_size=1, stride=1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(1))


def conv_bn_relu(channels: int, out: int, kernel_size: int, stride: int) -> list[nn.Module]:
    """(N, channels, H, W) to (N, out, H / stride, W / stride), rounded up."""
    conv = nn.Conv2d(channels, out, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return [conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]


def build_backbone(arch: str, stem: str = "imagenet", width: int = 16) -> tuple[nn.Module, int]:
    """A backbone without its classifier, and the length of its feature vector.

    arch: "convnet" or "small-resnet" (of that `width`), or the name of any ResNet in torchvision.
    stem: of a ResNet; "imagenet" for images of about 224 pixels, "cifar" for about 32.
    The ResNets keep torchvision's parameter names, so plain torchvision loads their state_dict, and
    only `fc` is missing (and with the CIFAR stem conv1 has its own shape). Raises ValueError on an
    unknown arch or stem.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}: choose from {', '.join(ARCHS)}")
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"unknown stem {stem!r}: choose imagenet or cifar")
    if arch == "convnet":
        return convnet(width), 8 * width
    if arch == "small-resnet":
        return small_resnet(width), 8 * width

    # zero_init_residual: the last BN of each block starts at 0, so each block starts as its shortcut
    # alone (App. A). It matters for stability, the authors say in issue 28 of their repository.
    net = models.get_model(arch, weights=None, zero_init_residual=True)
    if stem == "cifar":
        # The ImageNet stem, 7x7 with stride 2 and then a max-pool, leaves 8x8 of 32x32 pixels before the
        # first block. CIFAR's keeps all of them; App. D says "the CIFAR variant of ResNet-18", no more. With
        # a padding of 2, as some code has it, the maps grow to 34x34, and the same state_dict still fits.
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    feature_dim = net.fc.in_features
    net.fc = nn.Identity()
    return net, feature_dim


def linear_bn_relu(
    fan_in: int, fan_out: int, bn: bool, affine: bool = True, relu: bool = True
) -> list[nn.Module]:
    """One layer of a head, (N, fan_in) to (N, fan_out): Linear, BN or not, ReLU or not."""
    # A bias before BN would be subtracted again with the mean. The Linears keep PyTorch's default
    # initialization, U(-sqrt k, sqrt k) with k = 1 / fan_in: drawn with a fixed standard deviation of
    # 0.01 instead, training may not converge (App. A).
    layer: list[nn.Module] = [nn.Linear(fan_in, fan_out, bias=not bn)]
    if bn:
        layer.append(nn.BatchNorm1d(fan_out, affine=affine))
    if relu:
        layer.append(nn.ReLU(inplace=True))
    return layer


def build_projector(
    feature_dim: int, hidden: int, dim: int, layers: int, bn: str = "default", affine: bool = False
) -> nn.Sequential:
    """The projection MLP of Sec. 3: (N, feature_dim) to (N, dim) in `layers` layers. `bn` as in SimSiam."""
    mlp: list[nn.Module] = []
    fan_in = feature_dim
    for _ in range(layers - 1):
        # Hidden BN is what makes training easy: 34.6 % without any BN, 67.4 % with this one (Table 3a, b).
        mlp += linear_bn_relu(fan_in, hidden, bn=bn != "none")  # (N, hidden)
        fan_in = hidden
    # BN on the output as well: 68.1 % (Table 3c). Its learned scale and shift are not needed, 68.2 % without
    # (Sec. 4.4), and z is then exactly centred. No ReLU: z may point in any direction.
    mlp += linear_bn_relu(fan_in, dim, bn=bn in ("default", "all"), affine=affine, relu=False)  # (N, d)
    return nn.Sequential(*mlp)


def build_predictor(dim: int, hidden: int, bn: str = "default") -> nn.Sequential:
    """The prediction MLP h of Sec. 3: (N, dim) to (N, dim) through a bottleneck. `bn` as in SimSiam."""
    # What h is for: the best target of an image would be the mean of z over all augmentations, of which a
    # step sees one. h learns to fill the gap, says Sec. 5.1. And why its learning rate is best constant:
    # it has to follow the latest representations (Sec. 4.2, Table 1c).
    return nn.Sequential(
        # A bottleneck. As wide as its output, h can be less stable (App. B).
        *linear_bn_relu(dim, hidden, bn=bn != "none"),  # (N, hidden)
        # Neither BN nor ReLU here: with BN on this output training is unstable and the loss oscillates,
        # though nothing collapses (Table 3d). Our reading: h regresses a target that may be anywhere.
        *linear_bn_relu(hidden, dim, bn=bn == "all", relu=False),  # (N, d)
    )


class SimSiam(nn.Module):
    """Encoder f = projector(backbone(x)) and predictor h, for two views at a time (Sec. 3).

    backbone: any module that maps images to (N, feature_dim): `build_backbone`, timm, a ViT, yours.
    dim: d, the length of z and p; 2048 beats 1024 (67.5), 512 (67.2) and 256 (65.3 %) (App. B).
    hidden: width of the projector's hidden layers, whatever the backbone's width.
    layers: 3 on ImageNet (Sec. 3), 2 on CIFAR-10 (App. D).
    predictor_hidden: the bottleneck of h, by default dim // 4 (App. B).

    For the paper's ablations:
    bn: BN in the heads, row by row of Table 3: "none", "hidden", "default" (all but h's output), "all".
    affine: scale and shift in the BN on z (Sec. 4.4).
    Raises ValueError on another bn.
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
        """Views x1 and x2, both (N, 3, H, W), to (p1, p2, z1, z2), each (N, d). N > 1 in training: BN."""
        # Two calls and not one on torch.cat([x1, x2]): BN normalizes each call by its own mean and variance,
        # so the two ways are different functions. The authors' code does it in two, and so do we.
        # Both happen inside this one forward because DDP wants one wrapped call per backward.
        z1 = self.projector(self.backbone(x1))  # (N, d)
        z2 = self.projector(self.backbone(x2))  # (N, d)
        # z1 and z2 are returned with their gradient: holding them constant is the loss's business (see D).
        return self.predictor(z1), self.predictor(z2), z1, z2


# ------------------------------------------------------------------------------------------------
# Views (App. A): a whole batch at a time, on its device, with parameters drawn for every image. All of it
# takes x, (N, 3, H, W) float in [0, 1]. Parameters are drawn on the CPU, the same ones for every device. They
# go over in two pieces, for crop and colours, and none is waited for: a GPU is busy with the step before.


def augment(x: Tensor, size: int, crop_min: float = 0.2, blurred: float = 0.5) -> Tensor:
    """A random view of each image, (N, 3, size, size) in [0, 1]; for the second view, call it again.

    crop_min: the smallest crop, as a share of the area. blurred: the share of images that are; 0.5 is
    in the authors' code, not in the paper; 0 for CIFAR-10 (App. D).
    """
    return recolor(crop_and_flip(x, size, crop_min), blurred)


def recolor(x: Tensor, blurred: float = 0.5) -> Tensor:
    """What follows the crop: color jitter, gray and blur, each in some images. Changes x, and returns it."""

    def some(probability: float) -> Tensor:
        return (torch.rand(len(x)) < probability).nonzero()[:, 0]

    def factors(count: int, low: float, high: float) -> Tensor:
        return torch.empty(count).uniform_(low, high)

    # ColorJitter(0.4, 0.4, 0.4, 0.1) in 80 % of the images, in a random order that one batch shares.
    jitter = [(brightness, 0.6, 1.4), (contrast, 0.6, 1.4), (saturation, 0.6, 1.4), (hue, -0.1, 0.1)]
    colored = some(0.8)
    operations = [jitter[i] for i in torch.randperm(4).tolist()]
    strengths = [factors(len(colored), low, high) for _, low, high in operations]
    grayed = some(0.2)
    soft = some(blurred)
    sigma = factors(len(soft), 0.1, 2.0)
    drawn = [colored, grayed, soft, sigma, *strengths]
    colored, grayed, soft, sigma, *strengths = in_one_copy(drawn, x.device)

    jittered = x[colored]
    for (operation, _, _), strength in zip(operations, strengths):
        jittered = operation(jittered, strength.view(-1, 1, 1, 1))
    x[colored] = jittered
    x[grayed] = to_gray(x[grayed]).expand(-1, 3, -1, -1)
    if len(soft):
        x[soft] = blur(x[soft], sigma)
    return x


def in_one_copy(parts: list[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors (n,), each of its own length and dtype, on a device, in the time that a copy of one takes."""
    whole = torch.cat([part.float() for part in parts])  # float32 is exact for indices, up to 2**24 of them
    pieces = to_device(whole, device).split([len(part) for part in parts])
    return [piece.to(part.dtype) for piece, part in zip(pieces, parts)]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on a device, without waiting for the copy."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()  # from other memory, CUDA may wait
    # On Apple's GPUs such a copy may read memory that is free again by then (torch's issue 139550).
    return x.to(device, non_blocking=device.type != "mps")


def crop_and_flip(x: Tensor, size: int, crop_min: float) -> Tensor:
    """RandomResizedCrop, then a flip with probability 1/2: (N, 3, size, size)."""
    n, _, height, width = x.shape
    boxes = crop_boxes(n, height, width, crop_min)
    top, left, h, w, flipped = in_one_copy([*boxes, torch.rand(n) < 0.5], x.device)
    columns = resize_matrix(left, w, width, size)
    columns = torch.where(flipped.view(-1, 1, 1), columns.flip(1), columns)
    return crop_and_resize(x, resize_matrix(top, h, height, size), columns)


def crop_boxes(n: int, height: int, width: int, crop_min: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """top, left, height, width, each (N,), as RandomResizedCrop draws them, but for its fallback.

    After ten tries that do not fit, this one takes the whole image, torchvision's the largest centre of an
    allowed shape.
    """
    area = height * width * torch.empty(n, 10).uniform_(crop_min, 1)
    ratio = torch.empty(n, 10).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    w = (area * ratio).sqrt().round()
    h = (area / ratio).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)  # of the ten tries
    w = torch.where(fits.any(dim=1), w.gather(1, first)[:, 0], width)
    h = torch.where(fits.any(dim=1), h.gather(1, first)[:, 0], height)
    top = (torch.rand(n) * (height - h + 1)).floor()
    left = (torch.rand(n) * (width - w + 1)).floor()
    return top, left, h, w


def resize_matrix(start: Tensor, length: Tensor, size_in: int, size_out: int) -> Tensor:
    """(N, size_out, size_in): cuts `length` pixels from `start` and resizes them, bilinear, antialiased."""
    # Resizing is linear and separable. As a matrix for the rows and one for the columns, a whole batch of
    # different crops is two batched products, the crop itself costs nothing, and nor does a flip.
    start = start.view(-1, 1, 1)
    length = length.view(-1, 1, 1)
    scale = length / size_out
    centre = start + (torch.arange(size_out, device=start.device).view(1, -1, 1) + 0.5) * scale
    pixel = torch.arange(size_in, device=start.device) + 0.5
    weight = (1 - (pixel - centre).abs() / scale.clamp_min(1)).clamp_min(0)  # a triangle
    weight = weight * ((pixel > start) & (pixel < start + length))  # nothing from outside the crop
    return weight / weight.sum(dim=-1, keepdim=True)


def crop_and_resize(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(N, 3, S, T): every image of x, (N, 3, H, W), times its rows (N, S, H) and its columns (N, T, W)."""
    n, channels, height, width = x.shape
    return rows.unsqueeze(1) @ (x.reshape(n, -1, width) @ columns.mT).view(n, channels, height, -1)


def to_gray(x: Tensor) -> Tensor:
    """(N, 1, H, W), the luma of ITU-R 601 as in torchvision."""
    return 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


# The four of ColorJitter. f, (N, 1, 1, 1), is one factor an image.
def brightness(x: Tensor, f: Tensor) -> Tensor:
    return (x * f).clamp_(0, 1)


def contrast(x: Tensor, f: Tensor) -> Tensor:
    return torch.lerp(to_gray(x).mean(dim=(1, 2, 3), keepdim=True), x, f).clamp_(0, 1)


def saturation(x: Tensor, f: Tensor) -> Tensor:
    return torch.lerp(to_gray(x), x, f).clamp_(0, 1)


def hue(x: Tensor, f: Tensor) -> Tensor:
    """Turns the hue by f of a full circle, as through HSV and back."""
    red, green, blue = x.unbind(dim=1)  # (N, H, W)
    value = x.amax(dim=1)
    chroma = value - x.amin(dim=1)
    divisor = chroma.clamp_min(1e-6)  # gray has no hue, and with chroma 0 none is used below
    sector = torch.where(
        value == red,
        (green - blue).div_(divisor),
        torch.where(value == green, (blue - red).div_(divisor).add_(2), (red - green).div_(divisor).add_(4)),
    )
    turn = sector.div_(6).add_(f.view(-1, 1, 1) + 1).unsqueeze(1)  # (N, 1, H, W), positive
    # A channel is at its maximum over a third of the circle, at its minimum over another, linear between;
    # red, green and blue peak a third of a circle apart, which these offsets say.
    offset = (5 - 2 * torch.arange(3, device=x.device).view(1, 3, 1, 1)) / 6  # 5/6, 3/6, 1/6
    below = (turn + offset).frac_().mul_(6).sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
    return torch.addcmul(value.unsqueeze(1), below, chroma.unsqueeze(1), value=-1)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with a sigma, (N,) in pixels, up to 2; reflecting at the border."""
    n, channels, height, width = x.shape
    radius = 6  # three standard deviations of the widest
    taps = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-taps.square() / (2 * sigma.view(n, 1).square()))
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    # One group a channel of each image, so that every image has its own kernel.
    x = F.pad(x.reshape(1, -1, height, width), [radius] * 4, mode="reflect")
    x = F.conv2d(x, kernel[:, None, :, None], groups=n * channels)
    return F.conv2d(x, kernel[:, None, None, :], groups=n * channels).view(n, channels, height, width)


# ------------------------------------------------------------------------------------------------
# Monitors: is it learning? The loss alone cannot tell, for a collapsed run has the best loss of all.


@torch.no_grad()
def spread(z: Tensor) -> Tensor:
    """Standard deviation of the unit vectors z / |z|, (N, d), times sqrt(d): a scalar in [0, 1].

    1: directions as spread out as random ones. 0: all alike, collapsed (Sec. 4.1, Fig. 2 middle); but with
    BN on z a collapsed batch keeps about 2 sqrt(N - 1) / N: 0.25 for 64 images, 0.09 for 512.
    """
    # Where the 1 comes from (footnote 3): d independent Gaussian entries over their length sqrt(d)
    # leave each with a standard deviation of 1 / sqrt(d). Measure it on z, not on p.
    # Why BN keeps it from 0: the mean of the z is zero, so they cannot all point one way. At the nearest, all
    # but one do, and that one points the opposite way. Runs without the stop-gradient end close to that.
    # correction=0, so that one sample alone gives 0 and not nan.
    return unit(z).std(dim=0, correction=0).mean() * z.shape[1] ** 0.5


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """In how many directions do unit features, (N, D), vary? A scalar from 1 to min(N - 1, D); 1 for one row.

    nan where a feature is not finite.
    The exponential of the entropy of the normalized singular values (Roy and Vetterli, 2007), taken
    around the mean. Spread can look healthy while half of the dimensions are dead, which is called
    dimensional collapse (arXiv 2110.09348; for SimSiam 2209.15007). This number sees it.
    """
    x = unit(features)  # (N, D)
    if not x.isfinite().all():  # svdvals would raise
        return x.new_tensor(math.nan)
    s = torch.linalg.svdvals(x - x.mean(dim=0))  # (min(N, D),)
    share = s / s.sum().clamp_min(torch.finfo(s.dtype).tiny)
    return torch.special.entr(share).sum().exp()  # entr(x) = -x ln x, and 0 at 0


@torch.no_grad()
def knn_predict(
    features: Tensor, bank: Tensor, bank_labels: Tensor, k: int = 200, temperature: float = 0.2,
    chunk_elements: int = 2**25,
) -> Tensor:  # fmt: skip
    """Labels, (N,), of features (N, D), voted by their nearest neighbours in bank (M, D).

    Each of the k nearest by cosine votes for its label with weight exp(cosine / temperature), as in
    InstDisc (Wu et al., 2018); k = 200 and T = 0.2 are not in the paper, but named by its authors (issue
    10 of their repository). Take the backbone's features, not z, and the whole training set as the bank.
    bank_labels (M,) may be any integers. A k larger than the bank means all of it.
    """
    # Any set of labels, {3, 7, -1} too: vote on positions in `classes`, then translate back.
    classes, positions = bank_labels.unique(return_inverse=True)  # (C,), (M,)
    bank = unit(bank)  # (M, D)
    k = min(k, len(bank))
    predictions = []
    # A chunk of queries at a time: the whole table of similarities of 50,000 queries with ImageNet's
    # 1.28 million would be 256 GB. 2**25 entries of float32 are 128 MiB.
    for query in unit(features).split(max(1, chunk_elements // len(bank))):
        similarity, index = (query @ bank.T).topk(k, dim=1)  # (B, k), (B, k)
        # Subtracting the best similarity scales all votes alike, and keeps exp from overflow.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()  # (B, k)
        votes = weight.new_zeros(len(query), len(classes))  # (B, C)
        votes.scatter_add_(1, positions[index], weight)
        predictions.append(classes[votes.argmax(dim=1)])  # (B,)
    return torch.cat(predictions)


# ------------------------------------------------------------------------------------------------
# A demonstration: images of noise, more noise as the augmentation, with the stop-gradient and without.

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
                print(f"step {step:3d}  loss {loss:6.3f}  spread {spread(z1):.3f}  rank {erank:4.1f} of 64")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
