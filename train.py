"""Pretrain SimSiam. In about two minutes on two CPU cores, kNN accuracy on textures rises from 47 % to 98 %.

    python train.py                                 # ten classes of generated textures, no labels used
    python train.py --no-stop-gradient              # watch it collapse
    python train.py cifar10                         # the paper's CIFAR-10 recipe (App. D), for one GPU
    python train.py PHOTOS --recipe small           # your own small images, on a laptop
    torchrun --nproc_per_node=8 train.py IMAGENET   # the paper's ImageNet recipe, on eight GPUs
    python train.py --resume runs/textures          # continue an interrupted run

Reading order: recipes, one training step, the loop and its monitoring, two variants from Sec. 5.2, data,
command line, plumbing. The first four are the method; the rest is found in every training script.

Three names appear everywhere. `args`: the flags; --help explains each, and a recipe gives the defaults.
`images`: usually a data set, of class Images from the section "Data". `rank`: the number of this process,
which is 0 unless torchrun starts several. We have not run any of this on a GPU yet.
"""

import argparse
import copy
import datetime
import itertools
import json
import math
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.utils import save_image

from simsiam import (
    ARCHS, SimSiam, augment, build_backbone, cross_entropy, effective_rank, knn_predict, negative_cosine,
    recolor, simsiam_loss, spread,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------
# Recipes: the default flags for each data set. The learning rate is base_lr * batch_size / 256.

IMAGENET = dict(  # Sec. 3
    arch="resnet50", stem="imagenet", width=16, image_size=224,  # width: only for our two small networks
    layers=3, hidden=2048, dim=2048,  # of the projector
    epochs=100, batch_size=512, base_lr=0.05, weight_decay=1e-4,
    min_scale=0.2,  # smallest crop, as a fraction of the image's area (App. A)
    blur=0.5,  # its probability, from the authors' code; App. A gives only sigma
    view_scale=1.0,  # side of a view / image_size
    knn_every=10,  # epochs
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
)  # fmt: skip
CIFAR = IMAGENET | dict(  # App. D
    arch="resnet18", stem="cifar", image_size=32, layers=2,
    epochs=800, base_lr=0.03, weight_decay=5e-4, blur=0.0,
    mean=None, std=None,  # measured on the training images
)  # fmt: skip
TEXTURES = CIFAR | dict(  # ours: two minutes on two CPU cores
    arch="convnet", hidden=512, dim=512, epochs=20, batch_size=64, base_lr=0.4, knn_every=5,
)  # fmt: skip
SMALL = TEXTURES | dict(  # ours: small photographs on a laptop; tuned on CIFAR-10 with --holdout
    arch="small-resnet", width=32, epochs=80, base_lr=0.24, knn_every=10,
    # RandomResizedCrop magnifies objects. In views of 24 pixels, objects are about as large as in a test
    # image of 32 pixels (arXiv 1906.06423). Smaller views also cost half as much.
    view_scale=0.75,
)  # fmt: skip
RECIPES = {"textures": TEXTURES, "cifar10": CIFAR, "cifar100": CIFAR, "imagenet": IMAGENET, "small": SMALL}


# ------------------------------------------------------------------------------------------------
# One training step, and all the state that it changes


class Trainer:
    """Model, optimizer and counters. `update` takes a step; `state_dict` returns what --resume needs."""

    def __init__(self, args: argparse.Namespace, images: "Images"):
        self.args = args
        self.images = images
        self.fingerprint = images.fingerprint()
        self.device = torch.device(args.device)
        self.amp = amp_dtype(args.amp, self.device)
        self.rank, self.world_size = rank_and_world_size()
        self.steps_per_epoch = len(images) // args.batch_size  # the last, incomplete batch is dropped
        self.total_steps = args.epochs * self.steps_per_epoch
        self.warmup_steps = args.warmup_epochs * self.steps_per_epoch
        self.peak_lr = args.base_lr * args.batch_size / 256  # batch_size is the total over all processes
        self.step = 0
        self.sums = torch.zeros(2, device=self.device)  # sums of loss and spread over the current epoch
        self.history: list[dict[str, Any]] = []  # one row per epoch
        self.writer: Any = None  # TensorBoard's SummaryWriter, with --tensorboard

        torch.manual_seed(args.seed)  # the same initial weights in every process
        model = build_model(args)
        if self.world_size > 1 and self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # Sec. 3; it exists for GPUs only
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.targets = Targets(self.model, len(images), args).to(self.device)
        self.optimizer = build_optimizer(self.model, self.peak_lr, args)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)
        # The same parameters twice: `parallel` averages gradients over the processes, and `model` is saved,
        # because DDP would add "module." to every name.
        self.parallel = nn.parallel.DistributedDataParallel(self.model) if self.world_size > 1 else self.model

    def update(self, batch: Tensor, indices: Tensor) -> None:
        """Takes one step on this process's part of a batch: uint8 images (see two_views) and indices."""
        args = self.args
        # The random numbers drawn here depend only on these three values, so a resumed run repeats them.
        torch.manual_seed(seed_of(args.seed, self.step, self.rank))
        x1, x2 = two_views(batch.to(self.device, non_blocking=batch.is_pinned()), self.images.view_size, args)
        x1 = normalize(x1, self.images)
        x2 = normalize(x2, self.images)

        lr = learning_rate(self.step, self.total_steps, self.peak_lr, self.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_lr if group["constant"] else lr  # constant for h (Table 1c)

        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            p1, p2, z1, z2 = self.parallel(x1, x2)
            # The targets: z1 and z2 in plain SimSiam, something else in the two variants of Sec. 5.2.
            target1, target2 = self.targets(self.step, indices, self.model, x1, x2, z1, z2)
        # Without ablations: simsiam_loss(p1, p2, z1, z2).
        loss = simsiam_loss(
            p1, p2, target1, target2,
            symmetric=not args.asymmetric,
            stop_gradient=not args.no_stop_gradient,
            similarity=negative_cosine if args.similarity == "cosine" else cross_entropy,
        )  # fmt: skip

        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

        self.sums += torch.stack([loss.detach(), spread(z1)])
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Returns only tensors and plain types, so that torch.load(weights_only=True) can read the file."""
        return dict(
            model=self.model.state_dict(),
            backbone=self.model.backbone.state_dict(),  # for users; shares its tensors with `model`
            targets=self.targets.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            step=self.step,
            history=self.history,
            fingerprint=self.fingerprint,
            # NOT_SAVED: paths, the device and the like, which may differ when the run resumes.
            args={name: value for name, value in vars(self.args).items() if name not in NOT_SAVED},
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state_dict, which is always saved between epochs. Exits if the data has changed."""
        if state["fingerprint"] != self.fingerprint:
            fail(f"{self.args.data} has changed since the run started: restore it, or start a new run")
        self.model.load_state_dict(state["model"])
        self.targets.load_state_dict(state["targets"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty unless the run used fp16
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.history = state["history"]


def two_views(batch: Tensor, size: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Returns two views of each image, (N, 3, size, size) each, in [0, 1].

    batch: uint8, (N, 3, H, W); or (N, 2, 3, size, size), where the data loader has already cut two crops,
    because the files differ in size.
    """
    x = batch.float() / 255
    if x.ndim == 5:
        views = recolor(x.transpose(0, 1).flatten(0, 1), args.blur)
    else:
        # One call for both views is faster than two. The parameters are random for every image anyway.
        views = augment(torch.cat([x, x]), size, args.min_scale, args.blur)
    return views.chunk(2)


def normalize(x: Tensor, images: "Images") -> Tensor:
    """Returns x, (N, 3, H, W) in [0, 1], standardized per channel and in channels-last layout."""
    mean, std = torch.tensor([images.mean, images.std]).to(x.device).view(2, 3, 1, 1)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def seed_of(*parts: Any) -> int:
    """A 32-bit seed from anything that can be printed."""
    return zlib.crc32(repr(parts).encode())


def learning_rate(step: int, total_steps: int, peak: float, warmup_steps: int) -> float:
    """Learning rate of step 0, 1, ...: linear warmup to the peak, then cosine decay towards zero."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2


def build_optimizer(model: SimSiam, peak_lr: float, args: argparse.Namespace) -> torch.optim.SGD:
    """SGD with momentum (Sec. 3). The encoder's lr decays; the predictor's does not (Table 1c)."""
    # Weight decay applies to everything, including biases and BN (App. A).
    encoder = [*model.backbone.parameters(), *model.projector.parameters()]
    groups = [
        dict(params=encoder, constant=False),
        dict(params=model.predictor.parameters(), constant=not args.decay_predictor_lr),
    ]
    return torch.optim.SGD(groups, lr=peak_lr, momentum=0.9, weight_decay=args.weight_decay)


def build_model(args: argparse.Namespace) -> SimSiam:
    """The network that the flags describe, including the paper's ablations of the predictor."""
    backbone, feature_dim = build_backbone(args.arch, args.stem, args.width)
    model = SimSiam(
        backbone, feature_dim, dim=args.dim, hidden=args.hidden, layers=args.layers,
        predictor_hidden=args.predictor_hidden, bn=args.bn, affine=args.affine,
    )  # fmt: skip
    if args.predictor == "none":
        model.predictor = nn.Identity()  # Table 1a
    model.predictor.requires_grad_(args.predictor != "fixed")  # Table 1b
    return model


# ------------------------------------------------------------------------------------------------
# The loop


def pretrain(args: argparse.Namespace, checkpoint: dict[str, Any] | None) -> None:
    """Trains from the checkpoint or from scratch. Exits if a batch is larger than the data set."""
    images, test = load_data(args)
    if len(images) < args.batch_size:
        fail(f"found {len(images)} training images, fewer than --batch-size {args.batch_size}: lower it")
    args.mean, args.std = images.mean, images.std  # measured unless given; saved with the checkpoint
    trainer = Trainer(args, images)
    check_shared_memory(images, args.pairs * args.batch_size // trainer.world_size, args.workers)
    prepare(trainer, test, checkpoint)

    steps = range(trainer.step, trainer.total_steps)
    requests = schedule(len(images), args.batch_size, args.seed, steps, args.pairs)
    loader = iter(make_loader(images, requests, args.workers))  # uint8 images and their indices
    for epoch in range(trainer.step // trainer.steps_per_epoch + 1, args.epochs + 1):
        began = time.monotonic()
        for done in range(1, trainer.steps_per_epoch + 1):
            batch, indices = next(loader)
            trainer.update(batch, indices)
            show_progress(f"epoch {epoch}", done, trainer.steps_per_epoch, began)
        report(trainer, test, epoch, seconds=time.monotonic() - began)
        save_checkpoints(trainer)
    flag = " --features FILE" if images.labels is None else "" if test else " --holdout"
    log(f"done; next: python eval.py {args.out}{flag}")


def prepare(trainer: Trainer, test: "Images | None", checkpoint: dict[str, Any] | None) -> None:
    """Restores the checkpoint or creates a new run's folder. Prints settings; evaluates before step 0."""
    args = trainer.args
    if checkpoint:
        trainer.load_state_dict(checkpoint)
    else:
        if args.init:
            load_backbone_weights(trainer.model.backbone, args.init)
        if trainer.rank == 0:
            os.makedirs(args.out, exist_ok=bool(args.resume))  # fails if another run has just created it
    if args.tensorboard and trainer.rank == 0:
        from torch.utils.tensorboard import SummaryWriter  # needs: pip install tensorboard

        trainer.writer = SummaryWriter(args.out, purge_step=len(trainer.history) + 1)
    kind = "without labels" if trainer.images.labels is None else f"in {len(trainer.images.classes)} classes"
    log(
        f"{args.data}: {len(trainer.images)} images {kind}, {len(test) if test else 'no'} test images; "
        f"{trainer.total_steps} steps of {args.batch_size}; "
        f"lr {args.base_lr} * {args.batch_size} / 256 = {trainer.peak_lr:.4g}; "
        f"{trainer.world_size} x {args.device}, {trainer.amp or torch.float32}; results in {args.out}"
    )
    log("loss: at best -1; spread: near 1 healthy, low if collapsed; erank: effective rank of features")
    if trainer.step == 0:
        save(trainer)
        save_views(trainer)
        erank, knn = monitor(trainer, test, knn=args.knn_every > 0)
        log(f"before training: erank {erank:.1f}" + ("" if knn is None else f"  kNN {knn:.1%}"))


def report(trainer: Trainer, test: "Images | None", epoch: int, seconds: float) -> None:
    """Prints a line about the epoch that has just ended and took `seconds`; adds a row to the history.

    Exits before anything is saved if the loss or a weight is nan or infinite.
    """
    args = trainer.args
    sums = trainer.sums.cpu()
    if trainer.world_size > 1:
        dist.all_reduce(sums)
    loss, spread_ = (sums / trainer.world_size / trainer.steps_per_epoch).tolist()  # means over the epoch
    trainer.sums.zero_()
    weights = trainer.model.state_dict().values()
    if not (math.isfinite(loss) and all(x.isfinite().all() for x in weights)):
        fail(f"loss or weights are not finite in epoch {epoch}: use a lower --base-lr, or --amp off")
    knn_due = args.knn_every > 0 and (epoch % args.knn_every == 0 or epoch == args.epochs)
    erank, knn = monitor(trainer, test, knn_due)
    lr = trainer.optimizer.param_groups[0]["lr"]  # the encoder's
    speed = trainer.steps_per_epoch * args.batch_size / seconds
    row = dict(epoch=epoch, loss=loss, spread=spread_, erank=erank, knn=knn, lr=lr, images_per_second=speed)
    trainer.history.append(row)
    left = datetime.timedelta(seconds=round(seconds * (args.epochs - epoch)))
    log(
        f"epoch {epoch:3d}/{args.epochs}  loss {loss:6.3f}  spread {spread_:.3f}  erank {erank:5.1f}  "
        f"lr {lr:.4f}  {speed:5.0f} images/s  {left} left" + ("" if knn is None else f"  kNN {knn:.1%}")
    )
    if trainer.writer:
        for name, value in row.items():
            if value is not None:
                trainer.writer.add_scalar(name, value, epoch)
    warning = diagnose(trainer.history)
    if warning and warning != diagnose(trainer.history[:-1]) and args.similarity == "cosine":  # say it once
        log(f"warning: {warning}")


def diagnose(history: list[dict[str, Any]]) -> str:
    """Returns a warning if a run looks unhealthy, else "". The thresholds come from the README's runs."""
    if not history:
        return ""
    loss, spread_ = history[-1]["loss"], history[-1]["spread"]
    halfway = history[(len(history) - 1) // 2]["loss"]  # in the middle of the run so far
    if loss < -0.8 and spread_ < 0.55:
        return "collapse (low loss, low spread): check stop-gradient, predictor and BN; or lower --base-lr"
    if loss < -0.96 and spread_ < 0.8:
        return "partial collapse (very low loss, reduced spread): check the predictor and BN in the heads"
    if len(history) >= 4 and loss > -0.5 and loss > halfway - 0.02:
        return "the loss stopped falling, which is not collapse: try another --base-lr or --warmup-epochs"
    return ""


def monitor(trainer: Trainer, test: "Images | None", knn: bool) -> tuple[float, float | None]:
    """Returns the effective rank of up to 256 feature vectors; and kNN top-1 on test images, or None.

    Both use the features of the backbone and not z, because only the backbone is kept after training.
    """
    backbone = trainer.model.backbone
    options = dict(device=trainer.device, amp=trainer.amp, workers=trainer.args.workers)
    shown = test or trainer.images
    # 256 images, evenly spaced, because images are often sorted by class.
    sample = torch.linspace(0, len(shown) - 1, min(256, len(shown))).long()
    if not knn or test is None:
        return effective_rank(extract_features(backbone, shown.subset(sample), **options)).item(), None
    bank = extract_features(backbone, trainer.images, **options)
    features = extract_features(backbone, test, **options)
    labels = trainer.images.labels.to(bank.device)
    correct = knn_predict(features, bank, labels, default_k(labels)).cpu() == test.labels
    return effective_rank(features[sample]).item(), correct.float().mean().item()


def default_k(labels: Tensor) -> int:
    """k of kNN: 200, but at most the size of the smallest class, which would otherwise be outvoted."""
    return min(200, int(labels.unique(return_counts=True)[1].min()))


@torch.no_grad()
def extract_features(
    backbone: nn.Module, images: "Images", device: torch.device,
    amp: torch.dtype | None = None, workers: int = 0,
) -> Tensor:  # fmt: skip
    """Returns float32 features (N, D) of all images, in order, without augmentation and in eval mode.

    The processes share the work, and each returns the features of all images.
    """
    rank, world_size = rank_and_world_size()
    per_rank = math.ceil(len(images) / world_size)
    # Padded by repeating the first images, so that all processes gather the same number.
    mine = (torch.arange(per_rank * world_size) % len(images))[rank::world_size]
    was_training = backbone.training
    backbone.eval()
    features = []
    for batch, _ in make_loader(images, [(indices, None) for indices in mine.split(250)], workers):
        x = normalize(batch.to(device).float() / 255, images)
        with torch.autocast(x.device.type, amp, enabled=amp is not None):
            features.append(backbone(x).float())
    backbone.train(was_training)
    features = torch.cat(features)
    if world_size > 1:
        parts = [torch.empty_like(features) for _ in range(world_size)]
        dist.all_gather(parts, features)
        features = torch.stack(parts, dim=1).flatten(0, 1)[: len(images)]
    return features


# ------------------------------------------------------------------------------------------------
# Two variants from Sec. 5.2, in which the targets of the predictions are not z itself


class Targets(nn.Module):
    """Returns z1 and z2 as they are, unless --alternate or --eta-momentum is given."""

    def __init__(self, model: SimSiam, n: int, args: argparse.Namespace):
        super().__init__()
        # --alternate N: the targets of N steps come from a copy of the model made before these steps.
        self.every = args.alternate
        self.old = copy.deepcopy(model).requires_grad_(False) if self.every > 1 else None
        # --eta-momentum: a moving average of an image's projections over epochs approximates their
        # expectation over augmentations. In the paper it replaces h: add --predictor none. It can start
        # at zero, because the cosine ignores the length of a target.
        self.momentum = args.eta_momentum
        self.register_buffer("eta", torch.zeros(n, args.dim) if self.momentum else None)

    def forward(
        self, step: int, indices: Tensor, model: SimSiam, x1: Tensor, x2: Tensor, z1: Tensor, z2: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the targets that replace z1 and z2, (N, d) each. indices: image indices, (N,)."""
        if self.old is not None:
            if step % self.every == 0:
                self.old.load_state_dict(model.state_dict())
            with torch.no_grad():
                _, _, z1, z2 = self.old(x1, x2)
        if self.eta is not None:
            z1 = torch.lerp(z1.detach().float(), self.eta[indices], self.momentum)
            z2 = torch.lerp(z2.detach().float(), self.eta[indices], self.momentum)
            self.eta[indices] = (z1 + z2) / 2
        return z1, z2


# ------------------------------------------------------------------------------------------------
# Data

Source = Tensor | list[str]  # uint8 (N, 3, H, W) in memory, or N paths of files that are decoded when needed
Part = tuple[Source, Tensor | None, list[str]]  # training or test images, their labels, and class names


class Images(torch.utils.data.Dataset):
    """A data set of images, in memory or on disk, with optional labels, (N,).

    size: side in pixels of an image without augmentation. view_size: side of a view.
    """

    def __init__(self, source: Source, labels: Tensor | None, classes: list[str], args: argparse.Namespace):
        self.source = source
        self.labels = labels if len(classes) > 1 else None  # with one class, kNN is always right
        self.classes = classes
        self.mean = args.mean
        self.std = args.std
        self.size = args.image_size
        self.view_size = round(args.image_size * args.view_scale)
        crop = v2.RandomResizedCrop(self.view_size, scale=(args.min_scale, 1), antialias=True)
        self.crop = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.source)

    def plain(self, indices: Tensor) -> Tensor:
        """Returns uint8 (N, 3, size, size), without augmentation."""
        if isinstance(self.source, Tensor):
            return center_crop(self.source[indices], self.size)
        return torch.stack([center_crop(decode(self.source[i]), self.size) for i in indices.tolist()])

    def raw(self, indices: Tensor, seed: str) -> Tensor:
        """Returns the input of `two_views`: uint8 (N, 3, H, W), or two crops per file, (N, 2, 3, V, V).

        V is view_size. Files differ in size, so the loader's workers crop them here.
        """
        if isinstance(self.source, Tensor):
            return self.source[indices]
        pairs = []
        for position, i in enumerate(indices.tolist()):
            image = decode(self.source[i])
            torch.manual_seed(seed_of(seed, position, i))  # independent of the number of workers
            pairs.append(torch.stack([self.crop(image), self.crop(image)]))
        return torch.stack(pairs)

    def __getitem__(self, request: tuple[Tensor, str | None]) -> tuple[Tensor, Tensor]:
        """Returns a batch and its indices. request: indices, and a seed or None (no augmentation)."""
        indices, seed = request
        return (self.plain(indices) if seed is None else self.raw(indices, seed)), indices

    def subset(self, indices: Tensor) -> "Images":
        """The images at these indices, (M,), with their labels."""
        part = copy.copy(self)
        in_memory = isinstance(self.source, Tensor)
        part.source = self.source[indices] if in_memory else [self.source[i] for i in indices.tolist()]
        part.labels = None if self.labels is None else self.labels[indices]
        return part

    def fingerprint(self) -> list[int]:
        """The number of images and a checksum of pixels or file names; --resume compares them."""
        if isinstance(self.source, Tensor):
            return [len(self), zlib.crc32(self.source.numpy())]
        return [len(self), seed_of([Path(path).name for path in self.source])]


def load_data(args: argparse.Namespace) -> tuple[Images, Images | None]:
    """The training images of args.data, perhaps without labels, and the labeled test images or None."""
    if args.data == "textures":
        parts = [(*textures(5000, seed=0), PATTERNS), (*textures(2000, seed=1), PATTERNS)]
    elif args.data in ("cifar10", "cifar100"):
        parts = [load_cifar(args.data, args.data_dir, train) for train in (True, False)]
    elif args.data.endswith(".npz") and os.path.isfile(args.data):
        parts = load_npz(args.data)
    else:
        parts = load_folder(Path(args.data), args.image_size)
    images, test = ([Images(*part, args) for part in parts] + [None])[:2]
    if args.holdout and images.labels is not None:
        # The same split for every --seed.
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        tenth = max(1, len(images) // 10)
        images, test = images.subset(order[tenth:]), images.subset(order[:tenth])
    if test and (images.labels is None or test.labels is None):
        test = None  # both kNN and the linear probe need labels
    if None in (images.mean, images.std):
        mean, std = channel_statistics(images)
        images.mean, images.std = images.mean or mean, images.std or std
    if test:
        test.mean, test.std = images.mean, images.std
    return images, test


def channel_statistics(images: Images) -> tuple[list[float], list[float]]:
    """Channel means and stds, in [0, 1], of images in memory or 1,000 files. Exits if all stds are 0."""
    sample = torch.linspace(0, len(images) - 1, min(1000, len(images))).long()
    pixels = images.source if isinstance(images.source, Tensor) else images.plain(sample)
    stats = [torch.std_mean(pixels[:, channel].float() / 255, correction=0) for channel in range(3)]
    stds, means = ([x.item() for x in column] for column in zip(*stats))
    if max(stds) == 0:
        fail("all images have one and the same color, so there is nothing to learn: check the files")
    return means, [max(std, 1e-3) for std in stds]  # a constant channel has a standard deviation of 0


def load_cifar(name: str, root: str, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    """Images uint8 (N, 3, 32, 32), labels (N,) and class names. Exits if the download fails."""
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    if rank_and_world_size()[0] == 0:
        try:
            kind(root, download=True)
        except (OSError, RuntimeError) as error:
            fail(f"{name} cannot be downloaded ({error}): put {kind.filename} into --data-dir {root}")
    from_rank_0(None)  # the other processes wait
    data = kind(root, train=train)
    images = torch.from_numpy(data.data).movedim(-1, 1).contiguous()
    return images, torch.tensor(data.targets), data.classes


def load_npz(path: str) -> list[Part]:
    """Reads MedMNIST's format: train_images and, optionally, train_labels, test_images and test_labels.

    Images are uint8, (N, H, W) or (N, H, W, 3); labels are integers, (N,) or (N, 1), one per image.
    Exits if images are not uint8, or if a label is negative (in STL-10, -1 means unlabeled).
    """
    parts = []
    with np.load(path) as arrays:  # does not load pickles
        for split in ("train", "test"):
            if split == "test" and "test_images" not in arrays:
                continue
            images = torch.from_numpy(arrays[f"{split}_images"])
            if images.dtype != torch.uint8:
                fail(f"{path}: {split}_images are {images.dtype}: convert them to uint8, from 0 to 255")
            images = images.unsqueeze(1) if images.ndim == 3 else images.movedim(-1, 1)
            labels = arrays.get(f"{split}_labels")
            labels = None if labels is None else torch.from_numpy(labels).long().reshape(len(images))
            if labels is not None and labels.min() < 0:
                fail(f"{path}: {split}_labels has the negative label {labels.min()}: leave these images out")
            names = [] if labels is None else [str(i) for i in range(int(labels.max()) + 1)]
            parts.append((images.expand(-1, 3, -1, -1).contiguous(), labels, names))
    return parts


def load_folder(root: Path, size: int) -> list[Part]:
    """Reads images from root/train/CLASS/ and root/val/CLASS/ (or test/); or root/CLASS/; or root/.

    If images are directly in root/train/ (or in root/ if train/ is missing), no labels are used.
    Unreadable files are skipped, and so is a test folder with other classes. Exits if no image is found.
    """
    if not root.is_dir():
        fail(f"{root} is not a folder, an .npz file or one of {', '.join(DATASETS)}: check the path")
    training = root / "train" if (root / "train").is_dir() else root
    loose = [path.name for path in training.iterdir() if datasets.folder.is_image_file(path.name)]
    if loose:
        log(f"{training}: {loose[0]} is outside a class folder, so all images are used without labels")
        files = sorted(training.rglob("*"))
        paths = [str(path) for path in files if datasets.folder.is_image_file(path.name)]
        return [(read_files(paths, size)[0], None, [])]
    tests = [root / name for name in ("val", "test") if training != root and (root / name).is_dir()]
    parts = []
    for folder in (training, *tests[:1]):  # val/ is preferred to test/
        try:
            found = datasets.ImageFolder(str(folder))
            if parts and found.classes != parts[0][2]:
                differ = {*found.classes} ^ {*parts[0][2]}
                raise FileNotFoundError(f"its classes differ from those of {training}: {sorted(differ)[:5]}")
        except FileNotFoundError as error:  # also raised if there are no class folders, or an empty one
            if folder == training:
                fail(f"{folder} or one of its folders contains no .jpg, .png or similar file: {error}")
            log(f"{folder} is not used as the test set: {error}")
            continue
        source, good = read_files([path for path, _ in found.samples], size)
        parts.append((source, torch.tensor(found.targets)[good], found.classes))
    return parts


def read_files(paths: list[str], size: int) -> tuple[Source, Tensor]:
    """Reads N files. Returns the M readable images, (M, 3, size, size), or their paths if size > 64.

    Also returns a mask (N,) of the readable files. Exits if no file is readable. All files are decoded
    at the start, because a damaged one would otherwise end the training later.
    """
    in_memory = size <= 64

    def read(path: str) -> Tensor | str | Exception:
        try:
            image = decode(path, draft=not in_memory)
        except Exception as error:  # Pillow raises all kinds of errors for damaged files
            return error
        return center_crop(image, size) if in_memory else path

    results = []
    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        for result in pool.map(read, paths):
            results.append(result)
            show_progress("reading images", len(results), len(paths), began)
    good = torch.tensor([not isinstance(result, Exception) for result in results])
    readable = [result for result in results if not isinstance(result, Exception)]
    bad = [f"{path} ({result})" for path, result in zip(paths, results) if isinstance(result, Exception)]
    if bad:
        names = ", ".join(bad[:5])
        log(f"warning: skipped {len(bad)} of {len(paths)} files as unreadable: {names}", file=sys.stderr)
    if not readable:
        fail(f"no readable image was found among {len(paths)} files: check the files")
    return (torch.stack(readable) if in_memory else readable), good


def decode(path: str, draft: bool = False) -> Tensor:
    """Reads an image file as uint8 (3, H, W), turned upright, with transparent pixels white.

    Gray images of 9 to 32 bits keep the eight highest bits in use. This scaling differs between files, so
    their brightness is not comparable. Raises an error for damaged files and floating-point pixels.
    draft: decodes a JPEG at an eighth of its size, which is fast but still reads the whole file.
    """
    with Image.open(path) as file:
        if draft:
            file.draft("RGB", (8, 8))
        image = ImageOps.exif_transpose(file)
        if image.mode == "F":
            raise ValueError("floating-point pixels, whose range is unknown")
        if image.mode.startswith("I"):
            shift = max(0, image.getextrema()[1].bit_length() - 8)
            image = image.convert("I").point(lambda value: value * 2.0**-shift).convert("L")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return v2.functional.pil_to_tensor(image.convert("RGB"))


def center_crop(images: Tensor, size: int) -> Tensor:
    """The center, (..., 3, size, size). As on ImageNet, larger images are resized to size * 256 / 224."""
    side = min(images.shape[-2:])
    images = v2.functional.center_crop(images, [side, side])
    side = round(size * 256 / 224) if side > size else size
    images = v2.functional.resize(images, [side, side], antialias=True)
    return v2.functional.center_crop(images, [size, size])


def schedule(n: int, batch: int, seed: int, steps: range, pairs: int = 1) -> Iterator[tuple[Tensor, str]]:
    """Yields this process's indices for each step, (pairs * batch / world_size,), and a seed for the crops.

    An epoch is a permutation of all n images, the same in every process. The last n % batch are dropped.
    """
    rank, world_size = rank_and_world_size()
    for step in steps:
        epoch, position = divmod(step, n // batch)
        if position == 0 or step == steps.start:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))
        mine = order[position * batch : (position + 1) * batch][rank::world_size]
        yield mine.repeat(pairs), f"{seed} {epoch}"


def make_loader(images: Images, requests: Any, workers: int) -> torch.utils.data.DataLoader:
    """A loader of (uint8 batch, indices) for each of the requests, in their order."""
    return torch.utils.data.DataLoader(
        images,
        sampler=requests,  # each request is passed to __getitem__
        batch_size=None,  # because each request is already for a whole batch
        num_workers=0 if isinstance(images.source, Tensor) else workers,
        pin_memory=torch.cuda.is_available(),
    )


PATTERNS = "stripes checks dots rings grids grains zigzags bricks streaks rays".split()


def textures(count: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Ten classes of procedural patterns: images (count, 3, size, size) uint8, and labels (count,).

    The class is the pattern alone. Phase, period, a small rotation, color, contrast, shading and pixel
    noise are random and independent of it. (Skip the formulas: only the list of patterns matters.)
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(count, *(shape or (1, 1))).uniform_(low, high, generator=generator)

    def wave(t: Tensor) -> Tensor:
        return (2 * math.pi * t).sin()

    def saw(t: Tensor) -> Tensor:  # from -1 to 1 in each period
        return 2 * (t - t.floor()) - 1

    def line(t: Tensor) -> Tensor:  # positive on a fifth of each period
        return saw(t).abs() - 0.78

    axis = torch.arange(size) - (size - 1) / 2
    y, x = axis.view(1, -1, 1), axis.view(1, 1, -1)
    angle = draw(-0.3, 0.3)  # radians
    period = draw(4.5, 7.5)  # pixels
    u = (x * angle.cos() + y * angle.sin()) / period + draw(0, 1)  # (count, size, size), in periods
    v = (y * angle.cos() - x * angle.sin()) / period + draw(0, 1)
    radius = torch.hypot(u + draw(-1, 1), v + draw(-1, 1))
    turn = torch.atan2(v + draw(-0.5, 0.5), u + draw(-0.5, 0.5)) / (2 * math.pi) * (period + 4).round()
    noise = F.interpolate(draw(-2, 2, 1, 12, 12), size=size, mode="bicubic")[:, 0]
    streaks = F.interpolate(draw(-2, 2, 1, 4, 16), size=size, mode="bicubic")[:, 0]
    patterns = [  # each (count, size, size), positive inside the pattern
        wave(u),  # stripes
        wave(u) * wave(v),  # checks
        0.6 - torch.hypot(saw(0.6 * u + (0.6 * v).floor() % 2 / 2), saw(0.6 * v)),  # dots
        wave(radius),  # rings
        torch.maximum(line(u), line(v)),  # grids
        noise,  # grains
        wave(u + 0.35 * (1 - 2 * saw(v).abs())),  # zigzags
        torch.maximum(line(2 * v) / 2, line(u + (2 * v).floor() % 2 / 2)),  # bricks
        streaks,  # streaks
        wave(turn),  # rays
    ]
    labels = torch.arange(count) % len(PATTERNS)
    pattern = torch.tanh(4 * torch.stack(patterns)[labels, torch.arange(count)])  # soft edges
    shade = (draw(-0.3, 0.3) * x + draw(-0.3, 0.3) * y) / size + draw(0.4, 0.6)
    tint = draw(0.7, 1.3, 3, 1, 1) * draw(0.2, 0.4, 1, 1, 1)
    images = shade.unsqueeze(1) + draw(-0.04, 0.04, 3, 1, 1) + pattern.unsqueeze(1) * tint
    images += 0.03 * torch.randn(images.shape, generator=generator)
    return (images.clamp(0, 1) * 255).to(torch.uint8), labels


# ------------------------------------------------------------------------------------------------
# Command line

DATASETS = ["textures", "cifar10", "cifar100"]
NOT_SAVED = ["data_dir", "device", "init", "out", "resume", "tensorboard", "workers"]
MAY_CHANGE = [*NOT_SAVED, "amp", "data", "keep_best", "keep_every", "knn_every"]  # when a run resumes


def build_parser(description: str, add_own_flags: Callable[..., None]) -> argparse.ArgumentParser:
    """A parser with a script's own flags, then those that train.py and eval.py share."""
    usage = "%(prog)s [arguments] [flags]"
    parser = argparse.ArgumentParser(usage=usage, description=description, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")
    recipes = "default: the recipe named like the data set; imagenet for folders, small for .npz"
    parser.add_argument("--recipe", choices=RECIPES, metavar="|".join(RECIPES), help=recipes)
    add_own_flags(parser)

    flag = parser.add_argument_group("images and backbone").add_argument
    flag("--arch", choices=ARCHS, metavar="ARCH", help="convnet, small-resnet or any torchvision ResNet")
    flag("--stem", choices=["imagenet", "cifar"], help="ResNet stem: imagenet for 224 pixels, cifar for 32")
    flag("--width", type=number(int, 1), metavar="N", help="first-layer channels: convnet, small-resnet")
    flag("--image-size", type=number(int, 8), metavar="PIXELS", help="side of an image")
    flag("--mean", type=float, nargs=3, metavar="X", help="channel means (default: measured, or ImageNet's)")
    flag("--std", type=float, nargs=3, metavar="X", help="channel standard deviations")
    flag("--data-dir", default="data", metavar="FOLDER", help="where to download CIFAR (default: data)")
    holdout = "hold out a tenth of the training images for testing (default in eval.py: as in the run)"
    flag("--holdout", action=argparse.BooleanOptionalAction, default=False, help=holdout)

    flag = parser.add_argument_group("machine").add_argument
    devices = ["cuda"] if torch.cuda.is_available() else []
    flag("--seed", type=number(int, 0), default=0, metavar="N", help="random seed (default: 0)")
    flag("--device", choices=[*devices, "cpu"], default=[*devices, "cpu"][0])
    workers = min(4, os.cpu_count() or 1)
    flag("--workers", type=number(int, 0), default=workers, metavar="N", help="processes that decode files")
    return parser


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of train.py, the most important first."""
    flag = parser.add_argument
    data = "a folder, FILE.npz, textures (the default), cifar10 or cifar100"
    flag("data", nargs="?", type=full_name, metavar="DATA", help=data)
    flag("--epochs", type=number(int, 1), metavar="N")
    flag("--out", metavar="RUN", help="a new folder for the run (default: runs/DATA)")
    flag("--resume", metavar="RUN", help="continue this run; with DATA, start it if it does not exist")
    flag("--init", metavar="FILE", help="initialize the backbone from any checkpoint that eval.py reads")

    flag = parser.add_argument_group("heads and optimization").add_argument
    flag("--dim", type=number(int, 1), metavar="N", help="output dimension d (App. B)")
    flag("--hidden", type=number(int, 1), metavar="N", help="width of the projector's hidden layers (Sec. 3)")
    flag("--layers", type=number(int, 1), metavar="N", help="projector layers: 3 (Sec. 3) or 2 (App. D)")
    flag("--batch-size", type=number(int, 2), metavar="N", help="total over all processes (Table 2)")
    flag("--base-lr", type=number(float, 0), metavar="X", help="lr = base_lr * batch_size / 256 (Sec. 3)")
    flag("--weight-decay", type=number(float, 0), metavar="X")
    flag("--warmup-epochs", type=number(int, 0), metavar="N", help="default: 0; 10 if batch >= 1024")
    flag("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="auto: bf16 where supported")

    flag = parser.add_argument_group("augmentation").add_argument
    flag("--min-scale", type=number(float, 0.01), metavar="X", help="smallest crop / image area (App. A)")
    flag("--view-scale", type=number(float, 0.25), metavar="X", help="side of a view, relative to the image")
    flag("--blur", type=number(float, 0), metavar="P", help="probability of Gaussian blur")

    flag = parser.add_argument_group("the paper's ablations, all off by default").add_argument
    flag("--no-stop-gradient", action="store_true", help="remove the stop-gradient: collapse (Fig. 2)")
    flag("--predictor", choices=["mlp", "none", "fixed"], default="mlp", help="the predictor h (Table 1a, b)")
    flag("--decay-predictor-lr", action="store_true", help="cosine decay for the predictor too (Table 1)")
    flag("--predictor-hidden", type=number(int, 1), metavar="N", help="default: --dim / 4 (App. B)")
    flag("--bn", choices=["none", "hidden", "default", "all"], default="default", help="heads (Table 3)")
    flag("--affine", action="store_true", help="learn scale and shift in the BN on z (Sec. 4.4)")
    flag("--similarity", choices=["cosine", "cross-entropy"], default="cosine", help="loss (Sec. 4.5)")
    flag("--asymmetric", action="store_true", help="use one direction only, D(p1, z2) (Sec. 4.6)")
    flag("--pairs", type=number(int, 1), default=1, metavar="N", help="view pairs per image (Sec. 4.6)")
    flag("--alternate", type=number(int, 1), default=1, metavar="N", help="steps per target net (Sec. 5.2)")
    flag("--eta-momentum", type=number(float, 0), default=0.0, metavar="M", help="EMA of targets (Sec. 5.2)")

    flag = parser.add_argument_group("reports and checkpoints").add_argument
    flag("--knn-every", type=number(int, 0), metavar="N", help="epochs between kNN evaluations; 0: never")
    flag("--keep-every", type=number(int, 0), default=0, metavar="N", help="epochs between kept checkpoints")
    flag("--keep-best", action="store_true", help="keep the checkpoint with the best kNN; needs --holdout")
    flag("--tensorboard", action="store_true", help="also log to TensorBoard (pip install tensorboard)")


def number(kind: type, minimum: float) -> Callable[[str], float]:
    """An argparse type: a finite number that is not below the minimum."""

    def parse(text: str) -> float:
        value = kind(text)
        if not minimum <= value < math.inf:
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} >= {minimum}"  # for argparse's error message
    return parse


def get_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """Returns flags and the checkpoint or None. Defaults come from the checkpoint, else the recipe."""
    about = "Pretrain SimSiam. Defaults not shown here come from the recipe: see the top of train.py."
    parser = build_parser(about, add_training_flags)
    # Parsed twice: first to find the checkpoint and the recipe, then with their values as defaults.
    args = parser.parse_args(argv)
    found = args.resume and Path(args.resume, "checkpoint.pt").exists()
    checkpoint = from_rank_0(read_checkpoint(args.resume) if found else None)
    saved = checkpoint["args"] if checkpoint else {}
    if args.resume and not (checkpoint or args.data):
        fail(f"--resume {args.resume} is not the folder of a run: check the path, or add DATA to start one")
    data = args.data or saved.get("data", "textures")
    parser.set_defaults(**recipe_of(args.recipe, data) | saved | dict(data=data))
    args = parser.parse_args(argv)
    for name in saved.keys() - {*MAY_CHANGE}:
        now = getattr(args, name)
        if now != saved[name]:
            fail(f"--resume: the run has {name} = {saved[name]}, not {now}: omit it, or use --init")
    args.out = args.resume or args.out or next_run(data)
    if not args.resume and Path(args.out).exists():
        fail(f"{args.out} exists: continue it with --resume {args.out}, or choose another --out")
    if args.warmup_epochs is None:
        args.warmup_epochs = 10 if args.batch_size >= 1024 else 0
    check_args(args)
    return args, checkpoint


def check_shared_memory(images: Images, batch: int, workers: int) -> None:
    """Exits if /dev/shm cannot hold the workers' batches, because the workers would wait forever.

    Each loader prepares two batches per worker: up to 250 images for features, `batch` pairs of crops for
    training. Containers have 64 MB by default; 512 pairs of crops of 224 pixels take 154 MB.
    """
    if isinstance(images.source, Tensor) or not workers or not os.path.isdir("/dev/shm"):
        return
    workers *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # all processes on this machine share /dev/shm
    needed = 2 * workers * (min(250, len(images)) + 2 * batch) * 3 * images.size**2  # bytes
    if needed > shutil.disk_usage("/dev/shm").free:
        fail(f"/dev/shm is too small for {needed / 2**20:.0f} MB: use docker run --ipc=host, or --workers 0")


def check_args(args: argparse.Namespace) -> None:
    """Exits if flags are incompatible; warns of flags that are probably unintended."""
    world_size = rank_and_world_size()[1]
    if args.batch_size % world_size or args.batch_size < 2 * world_size:
        fail(f"--batch-size {args.batch_size}: use a multiple of {world_size}, with 2 or more per process")
    if args.warmup_epochs >= args.epochs:
        fail(f"--warmup-epochs {args.warmup_epochs} (default: 10 if batch >= 1024) must be below --epochs")
    if args.device == "cpu" and args.image_size > 64:
        log(f"warning: {args.image_size} pixels are very slow on a CPU: consider --recipe small")
    if args.keep_best and not (args.holdout and args.knn_every):
        fail("--keep-best needs --holdout and --knn-every: use both, to select without the test images")
    if args.eta_momentum and (world_size, args.alternate, args.pairs, args.similarity) != (1, 1, 1, "cosine"):
        fail("--eta-momentum works only in one process, without --alternate, --pairs or --similarity")


def full_name(data: str) -> str:
    """The absolute path of a folder or file, so that eval.py finds it from anywhere."""
    return data if data in DATASETS else os.path.realpath(data)


def recipe_of(name: str | None, data: str) -> dict[str, Any]:
    """The recipe of that name, or by default the one for the data."""
    default = data if data in DATASETS else "small" if data.endswith(".npz") else "imagenet"
    return RECIPES[name or default]


def next_run(data: str) -> str:
    """runs/DATA, or the first of runs/DATA-2, runs/DATA-3, ... that does not exist."""
    base = f"runs/{Path(data).name.removesuffix('.npz').replace(' ', '-')}"
    names = (base if i == 1 else f"{base}-{i}" for i in itertools.count(1))
    return next(name for name in names if not Path(name).exists())


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype for autocast, None for float32. "auto" is bfloat16 where the hardware supports it."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = getattr(torch.cpu, "get_capabilities", dict)()
        native = cpu.get("amx_bf16") or cpu.get("avx512_bf16")
    auto = torch.bfloat16 if native else None
    return {"auto": auto, "off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


# ------------------------------------------------------------------------------------------------
# Plumbing: processes, output, checkpoints


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes: 0 and 1 without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def setup_distributed() -> None:
    """Joins the other processes, if torchrun has started any."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    # A prefix per restart, because torchrun 2.14 leaves the addresses of dead processes in the store.
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def from_rank_0(value: Any) -> Any:
    """Broadcasts the value of rank 0, because only that process needs access to the run's folder."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def log(message: str, **options: Any) -> None:
    """Prints from rank 0 only."""
    if rank_and_world_size()[0] == 0:
        print(message, flush=True, **options)


def fail(message: str) -> NoReturn:
    """Exits with status 2 and one line instead of a traceback: for user errors."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def show_progress(what: str, done: int, total: int, began: float) -> None:
    """On a terminal, shows progress and time left on one line, 100 times at most. began: monotonic time."""
    if sys.stdout.isatty() and done % math.ceil(total / 100) == 0:
        left = datetime.timedelta(seconds=round((time.monotonic() - began) * (total - done) / done))
        log(f"{what}: {done}/{total}, {left} left", end=" \r")


def save(trainer: Trainer, name: str = "checkpoint.pt") -> None:
    """Writes a checkpoint and metrics.jsonl. A crash leaves the old or the new checkpoint intact."""
    if trainer.rank > 0:
        return
    out = Path(trainer.args.out)
    with open(out / "unfinished.tmp", "wb") as file:
        torch.save(trainer.state_dict(), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(out / "unfinished.tmp", out / name)
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trainer.history))


def save_checkpoints(trainer: Trainer) -> None:
    """Saves the checkpoints at the end of an epoch: those to keep, then the one to resume from."""
    args = trainer.args
    epoch = trainer.history[-1]["epoch"]
    if args.keep_every and epoch % args.keep_every == 0:
        save(trainer, f"checkpoint-{epoch:04}.pt")
    knn = trainer.history[-1]["knn"]
    if args.keep_best and knn is not None and knn == max(row["knn"] or 0 for row in trainer.history):
        save(trainer, "checkpoint-best.pt")
    save(trainer)


def load_backbone_weights(backbone: nn.Module, path: str) -> None:
    """Loads weights from train.py, the authors or torchvision. Exits if they do not fit the backbone."""
    checkpoint = read_checkpoint(path)
    weights = {}
    for name, value in checkpoint.get("backbone", checkpoint.get("state_dict", checkpoint)).items():
        # In the authors' files, module.encoder is the backbone, and module.encoder.fc is the projector.
        name = name.removeprefix("module.").removeprefix("encoder.")
        if not name.startswith(("fc.", "predictor.")):
            weights[name] = value
    try:
        backbone.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:
        fail(f"{path} does not fit --arch, --stem and --width: {' '.join(str(error).split())[:300]}")


def read_checkpoint(path: str) -> dict[str, Any]:
    """Reads a checkpoint file, or checkpoint.pt in a run's folder. Never executes code from the file."""
    file = Path(path, "checkpoint.pt") if os.path.isdir(path) else Path(path)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds of errors for damaged files
        fail(f"{file} cannot be read as a checkpoint ({type(error).__name__}): give the folder of a run")


def save_views(trainer: Trainer) -> None:
    """Writes views.png: eight images, and below each its two views."""
    if trainer.rank > 0:
        return
    images = trainer.images
    torch.manual_seed(trainer.args.seed)
    indices = torch.randperm(len(images))[:8]
    x1, x2 = two_views(images.raw(indices, seed="views.png"), images.view_size, trainer.args)
    rows = [images.plain(indices) / 255, x1, x2]
    tiles = torch.cat([F.interpolate(row, max(96, images.size), mode="nearest") for row in rows])
    save_image(tiles, Path(trainer.args.out, "views.png"), nrow=len(indices), padding=6, pad_value=1)


def main(argv: list[str] | None = None) -> None:
    """Runs the command. From a notebook or a test, pass the flags as a list."""
    setup_distributed()
    args, checkpoint = get_args(argv)
    try:
        pretrain(args, checkpoint)
    except torch.OutOfMemoryError:
        fail("out of memory: use a smaller --batch-size or --image-size, or --knn-every 0")
    except KeyboardInterrupt:
        fail(f"interrupted: repeat the command with --resume {args.out} to continue")
    if dist.is_initialized():  # not after an error: it would wait for processes that wait for this one
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
