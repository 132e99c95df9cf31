"""SimSiam: the model, the loss and the monitors in one file. Copy it; it needs only torch and torchvision.

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

Where this file departs from the authors' released code, and why:
  - The stop-gradient stands inside D, as in Eq. 3, and not in forward(): whoever copies only the loss
    copies the method.
  - The projector's width is an argument, 2048 by default as in the paper, and not the backbone's:
    on a ResNet-18 that would be 512. The predictor's is d / 4 for every d, 512 for the paper's 2048.
  - The cosine is computed in float32 at least, also under autocast.
  - The Linear before the BN on z has no bias. Theirs has one, frozen: BN subtracts it again.
  - The BN on z has no learned scale and shift, as in their code; Sec. 3 does not say so (Sec. 4.4).

In a project of yours:

    from simsiam import SimSiam, build_backbone, simsiam_loss
    model = SimSiam(*build_backbone("resnet18", stem="cifar"))
    p1, p2, z1, z2 = model(x1, x2)               # x1, x2: augmented views, float (N, 3, 32, 32)
    simsiam_loss(p1, p2, z1, z2).backward()
"""

import torch
from torch import Tensor, nn
from torchvision import models

# ------------------------------------------------------------------------------------------------
# The loss


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
    # The largest entry is now 1 and so the length 1 or more: the bound is for rows of zeros alone. It stays
    # clear of 1, for clamp_min passes only a part of the gradient where the length equals the bound.
    return x / x.norm(dim=-1, keepdim=True).clamp_min(0.5)


def D(p: Tensor, z: Tensor, stop_gradient: bool = True, similarity: str = "cosine") -> Tensor:
    """Negative cosine similarity of p and z, both (N, d), averaged over N: a scalar in [-1, 1].

    Eq. 1, with the stop-gradient of Eq. 3 on z. The minimum is -1, so a negative loss is right.
    Computed in float32 at least, whatever comes in. similarity="cross-entropy", in [0, inf): Sec. 4.5.
    Raises ValueError on another similarity.
    """
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
    if similarity == "cross-entropy":
        # The d channels taken as d classes, z saying how likely each is. It works too, at 63.2 %, so it is
        # not the cosine that prevents collapse (Sec. 4.5).
        p, z = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (p, z))
        return -(z.softmax(dim=-1) * p.log_softmax(dim=-1)).sum(dim=-1).mean()
    if similarity != "cosine":
        raise ValueError(f"unknown similarity {similarity!r}: choose cosine or cross-entropy")
    # In terms of unit vectors, -cos(p, z) = |p - z|^2 / 2 - 1: a squared error, up to scale and shift.
    return -(unit(p) * unit(z)).sum(dim=-1).mean()


def simsiam_loss(
    p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor, symmetric: bool = True, **options: bool | str
) -> Tensor:
    """The symmetrized loss of Eq. 4: a scalar, with the cosine in [-1, 1]. All of p1, p2, z1, z2 are (N, d).

    Note the crossing: the prediction from view 1 meets the projection of view 2. D(p1, z1) would
    compare a view with itself, h could learn the identity, and the loss would fall for no reason.
    `options` are those of D.
    """
    # Each view serves once as the source and once as the target. One direction alone also works, at
    # 64.8 instead of 68.1 %: it makes only half as many predictions per image (Sec. 4.6).
    if not symmetric:
        return D(p1, z2, **options)
    return D(p1, z2, **options) / 2 + D(p2, z1, **options) / 2


# ------------------------------------------------------------------------------------------------
# The encoder f = backbone + projector, and the predictor h


def convnet(width: int) -> nn.Sequential:
    """A small six-layer network for 32x32 images: (N, 3, H, W) to (N, 8 * width).

    Ours, not the paper's: it lets the whole method run on a laptop's CPU in about two minutes.
    """
    layers, channels = [], 3
    for out, stride in [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1)]:
        layers += [
            nn.Conv2d(channels, out * width, kernel_size=3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out * width),
            nn.ReLU(inplace=True),
        ]
        channels = out * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(1))


def build_backbone(arch: str, stem: str = "imagenet", width: int = 16) -> tuple[nn.Module, int]:
    """A backbone without its classifier, and the length of its feature vector.

    arch: "convnet" (of that `width`) or the name of any ResNet in torchvision ("resnet18", "resnet50").
    stem: of a ResNet; "imagenet" for images of about 224 pixels, "cifar" for about 32.
    The ResNets keep torchvision's parameter names, so plain torchvision loads their state_dict, and
    only `fc` is missing (and with the CIFAR stem conv1 has its own shape). Raises ValueError on an
    unknown arch or stem.
    """
    resnets = models.list_models(models, include=["resnet*", "resnext*", "wide_resnet*"])
    if arch not in ["convnet", *resnets]:
        raise ValueError(f"unknown arch {arch!r}: choose from convnet, {', '.join(resnets)}")
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"unknown stem {stem!r}: choose imagenet or cifar")
    if arch == "convnet":
        return convnet(width), 8 * width

    # zero_init_residual: the last BN of each block starts at 0, so each block starts as its shortcut
    # alone (App. A). It matters for stability, the authors say in issue 28 of their repository.
    net = models.get_model(arch, weights=None, zero_init_residual=True)
    if stem == "cifar":
        # The ImageNet stem, 7x7 with stride 2 and then a max-pool, leaves 8x8 of 32x32 pixels before the
        # first block. CIFAR's keeps all of them; App. D says "the CIFAR variant of ResNet-18" and no more. With
        # a padding of 2, as some code has it, the maps grow to 34x34, and the same state_dict still fits.
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    feature_dim = net.fc.in_features
    net.fc = nn.Identity()
    return net, feature_dim


def fc(fan_in: int, fan_out: int, bn: bool, affine: bool = True, relu: bool = True) -> list[nn.Module]:
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
    """The projection MLP of Sec. 3: (N, feature_dim) to (N, dim) in 2 or 3 layers. `bn` as in SimSiam."""
    mlp, fan_in = [], feature_dim
    for _ in range(layers - 1):
        # Hidden BN is what makes training easy: 34.6 % without any BN, 67.4 % with this one (Table 3a, b).
        mlp += fc(fan_in, hidden, bn=bn != "none")  # (N, hidden)
        fan_in = hidden
    # BN on the output as well: 68.1 % (Table 3c). Its learned scale and shift are not needed, 68.2 % without
    # (Sec. 4.4), and z is then exactly centred. No ReLU: z may point in any direction.
    mlp += fc(fan_in, dim, bn=bn in ("default", "all"), affine=affine, relu=False)  # (N, d)
    return nn.Sequential(*mlp)


def build_predictor(dim: int, hidden: int, bn: str = "default") -> nn.Sequential:
    """The prediction MLP h of Sec. 3: (N, dim) to (N, dim) through a bottleneck. `bn` as in SimSiam."""
    # What h is for: the best target of an image would be the mean of z over all augmentations, of which a
    # step sees one. h learns to fill the gap, says Sec. 5.1. And why its learning rate is best constant:
    # it has to follow the latest representations (Sec. 4.2, Table 1c).
    return nn.Sequential(
        # A bottleneck. As wide as its output, h can be less stable (App. B).
        *fc(dim, hidden, bn=bn != "none"),  # (N, d/4)
        # Neither BN nor ReLU here: with BN on this output training is unstable and the loss oscillates,
        # though nothing collapses (Table 3d). Our reading: h regresses a target that may be anywhere.
        *fc(hidden, dim, bn=bn == "all", relu=False),  # (N, d)
    )


class SimSiam(nn.Module):
    """Encoder f = projector(backbone(x)) and predictor h, for two views at a time (Sec. 3).

    backbone: any module that maps images to (N, feature_dim): `build_backbone`, timm, a ViT, yours.
    dim: d, the length of z and p; 2048 beats 1024 (67.5), 512 (67.2) and 256 (65.3 %) (App. B).
    hidden: width of the projector's hidden layers, whatever the backbone's width.
    layers: 3 on ImageNet (Sec. 3), 2 on CIFAR-10 (App. D).
    predictor_hidden: the bottleneck of h, by default dim // 4 (App. B).

    The last three repeat the paper's ablations:
    predictor: "mlp"; "none", h is the identity, and in the paper all collapses (Table 1a); "fixed", h keeps
        its random first weights, and in the paper the loss stays high: no collapse, no learning (Table 1b).
    bn: BN in the heads, row by row of Table 3: "none", "hidden", "default" (all but h's output), "all".
    affine: scale and shift in the BN on z (Sec. 4.4).
    Raises ValueError on another predictor or bn.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        dim: int = 2048,
        hidden: int = 2048,
        layers: int = 3,
        predictor_hidden: int | None = None,
        predictor: str = "mlp",
        bn: str = "default",
        affine: bool = False,
    ):
        super().__init__()
        if predictor not in ("mlp", "none", "fixed"):
            raise ValueError(f"unknown predictor {predictor!r}: choose mlp, none or fixed")
        if bn not in ("none", "hidden", "default", "all"):
            raise ValueError(f"unknown bn {bn!r}: choose none, hidden, default or all")
        self.backbone = backbone
        self.projector = build_projector(feature_dim, hidden, dim, layers, bn, affine)
        self.predictor = build_predictor(dim, predictor_hidden or max(1, dim // 4), bn)
        if predictor == "none":
            self.predictor = nn.Identity()
        self.predictor.requires_grad_(predictor != "fixed")

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
# Monitors: is it learning? The loss alone cannot tell, for a collapsed run has the best loss of all.


@torch.no_grad()
def spread(z: Tensor) -> Tensor:
    """Standard deviation of the unit vectors z / |z|, (N, d), times sqrt(d): a scalar in [0, 1].

    1: directions as spread out as random ones. 0: all alike, collapsed (Sec. 4.1, Fig. 2 middle).
    """
    # Where the 1 comes from (footnote 3): d independent Gaussian entries over their length sqrt(d)
    # leave each with a standard deviation of 1 / sqrt(d). Measure it on z, not on p.
    # correction=0, so that one sample alone gives 0 and not nan.
    return unit(z).std(dim=0, correction=0).mean() * z.shape[1] ** 0.5


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """In how many directions do unit features, (N, D), vary? A scalar from 1 to min(N - 1, D); 1 for one row.

    The exponential of the entropy of the normalized singular values (Roy and Vetterli, 2007), taken
    around the mean. Spread can look healthy while half of the dimensions are dead, which is called
    dimensional collapse (arXiv 2110.09348; for SimSiam 2209.15007). This number sees it.
    """
    x = unit(features)
    s = torch.linalg.svdvals(x - x.mean(dim=0))  # (min(N, D),)
    share = s / s.sum().clamp_min(torch.finfo(s.dtype).tiny)
    return torch.special.entr(share).sum().exp()  # entr(x) = -x ln x, and 0 at 0


@torch.no_grad()
def knn_predict(
    features: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    k: int = 200,
    temperature: float = 0.2,
    chunk_elements: int = 2**25,
) -> Tensor:
    """Labels, (N,), of features (N, D), voted by their nearest neighbours in bank (M, D).

    Each of the k nearest by cosine votes for its label with weight exp(cosine / temperature), as in
    InstDisc (Wu et al., 2018); k = 200 and T = 0.2 are not in the paper, but named by its authors (issue
    10 of their repository). Take the backbone's features, not z, and the whole training set as the bank.
    bank_labels (M,) may be any integers. A k larger than the bank means all of it.
    """
    # Any set of labels, {3, 7, -1} too: vote on positions in `classes`, then translate back.
    classes, positions = bank_labels.unique(return_inverse=True)  # (C,), (M,)
    bank = torch.cat([unit(part) for part in bank.split(2**14)])
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
        model = SimSiam(*build_backbone("convnet", width=8), dim=64, hidden=64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        images = torch.randn(512, 3, 16, 16)
        print(f"\n{'with' if stop_gradient else 'WITHOUT'} the stop-gradient")
        for step in range(101):
            batch = images[torch.randperm(512)[:64]]
            x1, x2 = (batch + torch.randn_like(batch) / 2 for _ in range(2))
            p1, p2, z1, z2 = model(x1, x2)
            loss = simsiam_loss(p1, p2, z1, z2, stop_gradient=stop_gradient)
            if step % 25 == 0:
                rank = effective_rank(z1)
                print(f"step {step:3d}  loss {loss:6.3f}  spread {spread(z1):.3f}  rank {rank:4.1f} of 64")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
