"""Pretrain SimSiam: in two minutes on two CPU cores, kNN on ten kinds of textures goes from 47 % to 96 %.

    python train.py                                 # that claim (float32, seed 0); no label is trained on
    python train.py --no-stop-gradient              # without the stop-gradient: watch it collapse
    python train.py PHOTOS --recipe small           # a folder of small images, on a laptop
    python train.py cifar10                         # App. D, for one GPU
    torchrun --nproc_per_node=8 train.py PHOTOS     # a folder of images, the ImageNet recipe, eight GPUs
    python train.py --resume                        # go on with the latest run exactly where it stopped

Every epoch prints loss (-1 is its minimum), spread (1 healthy, 0 collapsed), effective rank of the
backbone's features, and every few epochs their kNN top-1. OUT, by default runs/DATA, receives checkpoint.pt,
metrics.jsonl and views.png. In reading order: recipes, one step, the loop and what it reports, the two
variants of Sec. 5.2, data, flags, plumbing. What the first parts call stands below them.
"""

import argparse
import collections
import contextlib
import copy
import datetime
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before the training ends it without a traceback

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torchvision.transforms import v2

from simsiam import (
    ARCHS, RESNETS, SimSiam, augment, build_backbone, cross_entropy, effective_rank, knn_predict,
    negative_cosine, recolor, simsiam_loss, spread, to_device,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------
# Recipes: what a flag is by default on each data set. lr = base_lr * batch_size / 256.

IMAGENET = dict(
    arch="resnet50", stem="imagenet", image_size=224, layers=3, hidden=2048, dim=2048,  # Sec. 3
    epochs=100, batch_size=512, base_lr=0.05, weight_decay=1e-4,  # Sec. 3
    view_scale=1.0,  # views as large as what is tested
    crop_min=0.2,  # App. A: RandomResizedCrop with scale in [0.2, 1]
    blur=0.5,  # App. A has the blur's sigma; its probability stands in the authors' code only
    knn_every=10,  # ours: each time costs one more pass over the training set
    # The customary ones; this std is not that of ImageNet's pixels (torchvision's issue 1439). None: measure.
    mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
)
CIFAR = IMAGENET | dict(  # App. D; the stem's form and h's width, d / 4 as in Sec. 3, are not printed there
    arch="resnet18", stem="cifar", image_size=32, layers=2, mean=None, std=None,
    epochs=800, base_lr=0.03, weight_decay=5e-4, blur=0.0,
)
TEXTURES = CIFAR | dict(  # ours, for two minutes on two CPU cores
    arch="convnet", hidden=512, dim=512, epochs=20, batch_size=64, base_lr=0.4, knn_every=5,
)
FASHION = TEXTURES | dict(  # ours, for 40 minutes on two CPU cores
    image_size=28, epochs=30, knn_every=10,
    crop_min=0.4,  # the best of 0.2, 0.4 and 0.7 after two epochs with --holdout: kNN 78.2, 79.7, 78.4 %
)
SMALL = TEXTURES | dict(  # ours, for photographs of about 32 pixels on a laptop's CPU
    # Chosen on CIFAR-10 re-encoded as JPEG with a tenth held out, by kNN after about 400 s on one core
    # (bf16, seed 0): convnet 48.0 %, small-resnet 48.2, convnet on views of 24 pixels 53.2, both 54.6.
    # RandomResizedCrop enlarges what it shows; smaller views bring it back to the size that it has in a
    # test image (arXiv 1906.06423), and cost half.
    arch="small-resnet", width=32, view_scale=0.75, epochs=50, base_lr=0.24, knn_every=10,
)
RECIPES = {
    "textures": TEXTURES, "cifar10": CIFAR, "cifar100": CIFAR, "fashion-mnist": FASHION,
    "imagenet": IMAGENET, "small": SMALL,
}  # fmt: skip
DATASETS = ["textures", "cifar10", "cifar100", "fashion-mnist"]  # a recipe each; a folder has imagenet


# ------------------------------------------------------------------------------------------------
# One step of SimSiam, and all that it changes


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """lr of update `step` of `steps`: linear to the peak in `warmup` updates, then half a cosine to zero.

    To be set before the update: the first one runs at the peak (or peak / warmup), the last just above zero.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


class Trainer:
    """The model and all that changes with it. `update` is one step, `state_dict` all that a resume needs."""

    def __init__(self, args: argparse.Namespace, images: "Images", device: torch.device):
        self.args = args
        self.images = images
        self.fingerprint = images.fingerprint()  # a resume compares it
        self.device = device
        self.amp = amp_dtype(args.amp, device)
        self.rank, self.world = rank_and_world()
        self.per_epoch = len(images) // args.batch_size  # steps
        self.steps = args.epochs * self.per_epoch
        self.warmup = args.warmup_epochs * self.per_epoch
        self.peak = args.base_lr * args.batch_size / 256  # the lr's; batch_size is that of all ranks together
        self.step = 0
        self.seconds = 0.0
        self.sums = torch.zeros(2, device=device)  # of loss and spread, over the epoch so far
        self.history: list[dict[str, Any]] = []  # a row for each epoch
        self.tensorboard: Any = None

        torch.manual_seed(args.seed)  # the same weights on every rank
        model = build_model(args)
        if self.world > 1 and device.type == "cuda":
            # BN over the whole batch. It is for CUDA only: on the CPU every process normalizes its own part.
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        # `model` stays the bare model, and that is what is saved: no "module." in its keys.
        self.model = model.to(device, memory_format=torch.channels_last)
        self.targets = Targets(self.model, len(images), args.dim, args.alternate, args.eta_momentum)
        self.targets.to(device)
        self.optimizer = build_optimizer(self.model, self.peak, args.weight_decay, args.decay_predictor_lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == torch.float16)
        self.wrapped: nn.Module = self.model
        if self.world > 1:
            devices = [torch.cuda.current_device()] if device.type == "cuda" else None
            self.wrapped = nn.parallel.DistributedDataParallel(self.model, device_ids=devices)

    def update(self, batch: Tensor, indices: Tensor) -> None:
        """One step on this rank's uint8 images, whose places in the data set are `indices`, (N,)."""
        args = self.args
        # All random numbers of a step follow from these three, whatever ran before: a resume is exact.
        torch.manual_seed(seed_of(args.seed, self.step, self.rank))
        batch = to_device(batch, self.device)
        x1, x2 = two_views(batch, self.images.view_size, args.crop_min, args.blur)
        x1 = normalize(x1, args.mean, args.std)
        x2 = normalize(x2, args.mean, args.std)

        lr = learning_rate(self.step, self.steps, self.peak, self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak if group["constant"] else lr

        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            p1, p2, z1, z2 = self.wrapped(x1, x2)
            # t1 and t2 are z1 and z2 themselves, but for the two variants of Sec. 5.2.
            t1, t2 = self.targets(self.step, indices, self.model, x1, x2, z1, z2)
        similarity = negative_cosine if args.similarity == "cosine" else cross_entropy
        loss = simsiam_loss(
            p1, p2, t1, t2, symmetric=not args.asymmetric, stop_gradient=not args.no_stop_gradient,
            similarity=similarity,
        )  # fmt: skip

        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

        self.sums += torch.stack([loss.detach(), spread(z1)])
        self.step += 1

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 images, indices) of this rank for each step that is left."""
        args = self.args
        n = len(self.images)
        left = range(self.step, self.steps)
        requests = schedule(n, args.batch_size, args.seed, left, self.rank, self.world, args.pairs)
        return iter(make_loader(self.images, requests, args.workers))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types only. "backbone" repeats a part of "model", for plain torchvision."""
        return dict(
            model=self.model.state_dict(), backbone=self.model.backbone.state_dict(),
            targets=self.targets.state_dict(), optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(), sums=over_ranks(self.sums) / self.world, step=self.step,
            seconds=self.seconds, history=self.history, data=self.fingerprint,
            args={name: value for name, value in vars(self.args).items() if name not in NOT_SAVED},
        )  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stops where the state does not fit. All or nothing: what was loaded by then is not used."""
        try:
            count, _ = state["data"]
            if state["data"] != self.fingerprint:
                now = f"{self.fingerprint[0]} images, not the same {count} that the run began with"
                fail(f"--resume: {self.args.data} has {now}: restore them, or name another --out")
            load_weights(self.model, state["model"])
            self.targets.load_state_dict(state["targets"])
            self.scaler.load_state_dict(state["scaler"])
            groups = self.optimizer.state_dict()["param_groups"]  # the flags', not the file's
            self.optimizer.load_state_dict(dict(state=state["optimizer"]["state"], param_groups=groups))
            for weight, held in self.optimizer.state.items():
                if held["momentum_buffer"].shape != weight.shape:
                    raise ValueError("momentum of another shape")
            self.sums.copy_(state["sums"])
            self.step = range(self.steps + 1).index(state["step"])  # refuses 2.5, and more than there are
            self.seconds = float(state["seconds"])
            self.history = json.loads(json.dumps(state["history"]))  # refuses what JSON does not hold
            sum(row["loss"] + row["spread"] + row["step"] for row in self.history)  # are there, and numbers
        except Exception as error:  # whatever a file of the right form may hold
            kind = type(error).__name__
            fail(f"{self.args.out}/checkpoint.pt does not fit this run ({kind}: {error}): name another --out")


def two_views(images: Tensor, size: int, crop_min: float, blurred: float) -> tuple[Tensor, Tensor]:
    """Two views x1, x2 of each image, (N, 3, size, size) in [0, 1].

    images: uint8, (N, 3, H, W), or of files two crops of each, (N, 2, 3, size, size), cut by the loader.
    """
    x = images.float() / 255
    if x.ndim == 5:
        both = recolor(x.transpose(0, 1).flatten(0, 1), blurred)
    else:
        both = augment(torch.cat([x, x]), size, crop_min, blurred)
    x1, x2 = both.chunk(2)  # in one call, which halves the overhead: every image has parameters of its own
    return x1, x2


def build_optimizer(
    model: SimSiam, peak: float, weight_decay: float, decay_predictor_lr: bool
) -> torch.optim.SGD:
    """SGD (Sec. 3) in two groups: the encoder's lr decays, the predictor's is constant (Table 1c)."""
    # That the constant one knows no warmup either is not in the paper (the authors, in issue 11 of their
    # repository). Weight decay is on everything, on the scale and bias of BN too (App. A).
    encoder = [*model.backbone.parameters(), *model.projector.parameters()]
    groups = [
        dict(params=encoder, constant=False),
        dict(params=model.predictor.parameters(), constant=not decay_predictor_lr),
    ]
    return torch.optim.SGD(groups, lr=peak, momentum=0.9, weight_decay=weight_decay)


def build_model(args: argparse.Namespace) -> SimSiam:
    """The network as the flags say, with the paper's ablations of h."""
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


def pretrain(
    args: argparse.Namespace, checkpoint: dict[str, Any] | None, arrays: dict[str, Any] | None = None
) -> None:
    """From wherever the checkpoint stands to the end; a signal ends it earlier, and is saved too."""
    trainer, test = prepare(args, checkpoint, arrays)
    begin(trainer, test)

    with noted_signals() as noted:
        trainer.model.train()
        progress = Progress()
        began = time.monotonic()  # of what the next report calls its speed
        since = trainer.step
        stop = 0  # the number of the signal that ends the training
        for batch, indices in until_signal(trainer.batches(), noted):
            trainer.update(batch, indices)

            epoch, position = divmod(trainer.step, trainer.per_epoch)
            ended = position == 0
            # All ranks stop at the same step: a signal that one of them has noted counts for all.
            stop = int(over_ranks(torch.tensor(max(noted, default=0)), dist.ReduceOp.MAX))
            # To read a number makes a GPU finish its work first, so this comes rarely.
            if ended or trainer.step % 50 == 0:
                check_finite(trainer)
            if ended or stop:
                seconds = max(time.monotonic() - began, 1e-9)  # a clock may stand still
                trainer.seconds += seconds
            if not ended:
                progress(f"epoch {epoch + 1}: step", position, trainer.per_epoch)
            else:
                report(trainer, test, (trainer.step - since) * args.batch_size / seconds)
                began = time.monotonic()
                since = trainer.step
                keep_copies(trainer, epoch)  # before `save`: a run killed between the two repeats this epoch
            if stop:
                break
            if ended and (epoch % args.save_every == 0 or epoch == args.epochs):
                save(trainer)
        if stop or trainer.step < trainer.steps:  # the latter: a signal killed a worker
            check_finite(trainer)
            save(trainer)
            leave(trainer, stop or max(noted))
    following = shlex.join(["python", "eval.py", args.out]) + (" --data FILE.npz" if arrays else "")
    following += " --holdout" if args.holdout else ""
    print0(f"checkpoint.pt, metrics.jsonl and views.png are in {args.out}; next: {following}")


def prepare(
    args: argparse.Namespace, checkpoint: dict[str, Any] | None, arrays: dict[str, Any] | None
) -> tuple[Trainer, "Images | None"]:
    """Data, network and whatever the checkpoint holds, all in place, and two lines that say so."""
    images, test = load_data(args, arrays)
    has_knn = test is not None and test.labels is not None
    if len(images) < args.batch_size:
        fail(f"--batch-size {args.batch_size}, but {args.data} has {len(images)} images: take a smaller one")
    if args.keep_best and not has_knn:
        fail(f"--keep-best needs kNN, and {args.data} has no labels for it: leave it out")
    args.mean = images.mean  # of the training images, if no flag said other ones
    args.std = images.std
    trainer = Trainer(args, images, torch.device(args.device))
    if checkpoint:
        trainer.load_state_dict(checkpoint)
    elif args.init:
        load_init(trainer.model, args.init)
    need = check_memory(trainer)
    images.move_to(trainer.device, need)
    if test is not None:
        test.move_to(trainer.device, need)
    introduce(trainer, has_knn)
    return trainer, test


def leave(trainer: Trainer, stop: int) -> NoReturn:
    """Ends the program as a shell expects it of one that a signal has ended."""
    go_on = f"python train.py --resume --out {shlex.quote(trainer.args.out)}"
    print0(f"{signal.Signals(stop).name} at step {trainer.step}: saved; go on with {go_on}")
    sys.exit(128 + stop)


def introduce(trainer: Trainer, has_knn: bool) -> None:
    """What is going to run, and how to read what follows."""
    args = trainer.args
    print0(
        f"{args.data}: {len(trainer.images)} images, {trainer.steps} steps of {args.batch_size}; "
        f"lr {args.base_lr} * {args.batch_size} / 256 = {trainer.peak:.4g}; "
        f"{trainer.world} x {args.device}, {trainer.amp or torch.float32}; into {args.out}"
    )
    knn = f"k={min(200, len(trainer.images))}, T=0.2" if has_knn else "no labelled test images, so no kNN"
    print0(f"loss: -1 is the minimum; spread: 1 healthy, 0 collapsed; rank: of the features; kNN: {knn}")
    if trainer.step == trainer.steps:
        print0(f"the run in {args.out} is already finished")
    elif args.resume and trainer.step == 0:
        print0(f"nothing to resume in {args.out}: the run begins")


def report(trainer: Trainer, test: "Images | None", rate: float) -> None:
    """Measures, prints and writes the row of the epoch that ends here, and empties the sums."""
    args = trainer.args
    epoch = trainer.step // trainer.per_epoch
    # Every rank has summed over its own part of the batches.
    loss, spread_ = (over_ranks(trainer.sums) / trainer.world / trainer.per_epoch).tolist()
    trainer.sums.zero_()
    knn_now = args.knn_every > 0 and (epoch % args.knn_every == 0 or epoch == args.epochs)
    erank, knn = monitor(trainer, test, knn_now)
    row = dict(
        epoch=epoch, step=trainer.step, loss=loss, spread=spread_, rank=erank, knn=knn,
        lr=trainer.optimizer.param_groups[0]["lr"], images_per_second=rate, seconds=trainer.seconds,
    )  # fmt: skip
    trainer.history.append(row)
    write_metrics(trainer)
    if trainer.tensorboard:
        for name, value in row.items():
            if value is not None:
                trainer.tensorboard.add_scalar(name, value, trainer.step)
    left = datetime.timedelta(seconds=round(trainer.seconds * (args.epochs / epoch - 1)))
    percent = "" if knn is None else f"  kNN {knn:.1%}"
    print0(
        f"epoch {epoch:3d}/{args.epochs}  loss {loss:6.3f}  spread {spread_:.3f}  rank {erank:5.1f}  "
        f"lr {row['lr']:.4f}  {rate:5.0f} images/s  {left} left{percent}"
    )
    if args.similarity == "cosine":
        text = advice(trainer.history)
        if text and text != advice(trainer.history[:-1]):  # once, and not every epoch
            print0(f"warning: {text}", sys.stderr)


def advice(history: list[dict[str, Any]]) -> str:
    """What to do about a run that has gone wrong, or "". A row an epoch: step, loss, spread.

    The bounds are drawn through the runs of the README's tables, three seeds each. Accuracy alone could not
    tell a collapse from a loss that stays high (footnote 4).
    """
    if not history:
        return ""
    loss = history[-1]["loss"]
    spread_ = history[-1]["spread"]
    # 0.25 to 0.44 without the stop-gradient, and without h on photographs; 0.74 or more with all parts.
    if loss < -0.8 and spread_ < 0.55:
        return (
            "collapse: the z grow alike (low loss, low spread). Are stop-gradient and predictor there, does"
            " each prediction meet the OTHER view, have the heads their BN? Then App. A's views, a lower"
            " --base-lr"
        )
    # -0.97 at 0.6 to 0.7 without h on textures; -0.95 at 0.9 or more for the recipe.
    if loss < -0.96 and spread_ < 0.8:
        return (
            "partial collapse: the loss is near -1 because z1 and z2 are easy to match, not because h"
            " predicts well. Is the predictor there, have the heads their BN?"
        )
    falls = loss < history[(len(history) - 1) // 2]["loss"] - 0.02  # since halfway
    if len(history) > 1 and history[-1]["step"] >= 300 and loss > -0.5 and not falls:
        return "not learning, which is no collapse (the loss stays high): another --base-lr, --warmup-epochs"
    return ""


def monitor(trainer: Trainer, test: "Images | None", knn: bool) -> tuple[float, float | None]:
    """Effective rank of 256 images' features; and kNN top-1 over all test images, a fraction, or None.

    The classifier is that of simsiam.py, on backbone features, with the whole training set as its bank.
    """
    images = trainer.images
    backbone = trainer.model.backbone
    if trainer.world > 1:
        for buffer in backbone.buffers():
            dist.broadcast(buffer, 0)  # one network: without SyncBN the ranks' running means differ

    # Backbone features, not z: the projector is trained to forget what the two views do not share.
    options = dict(device=trainer.device, amp=trainer.amp, workers=trainer.args.workers)
    shown = images if test is None else test
    some = torch.linspace(0, len(shown) - 1, min(256, len(shown))).long()  # spread over all classes
    if not knn or test is None or test.labels is None:
        return effective_rank(extract_features(backbone, shown.subset(some), **options)).item(), None
    bank = extract_features(backbone, images, **options)
    features = extract_features(backbone, test, **options)
    predicted = knn_predict(features, bank, images.labels.to(bank.device)).cpu()
    # One number for all ranks, which may act on it: on GPUs, votes that are nearly equal round either way.
    hits = over_ranks((predicted == test.labels).sum(), dist.ReduceOp.MAX).item()
    return effective_rank(features[some]).item(), hits / len(test)


@torch.no_grad()
def extract_features(
    backbone: nn.Module, images: "Images", device: torch.device | str,
    amp: torch.dtype | None = None, workers: int = 0,
) -> Tensor:  # fmt: skip
    """Features (N, D) float32 of all images, not augmented, by the backbone in eval mode.

    Processes share the work, and each returns all of it. Every image counts once: no last batch is dropped.
    """
    rank, world = rank_and_world()
    n = len(images)
    # Wraps around at the end, so that every rank has equally many to gather.
    mine = (torch.arange(math.ceil(n / world) * world) % n)[rank::world]
    mode = backbone.training
    backbone.eval()
    parts = []
    progress = Progress()
    for batch, _ in make_loader(images, ((None, indices) for indices in mine.split(250)), workers):
        x = normalize(to_device(batch, torch.device(device)).float() / 255, images.mean, images.std)
        with torch.autocast(x.device.type, amp, enabled=amp is not None):
            parts.append(backbone(x).float())
        progress("features: batch", len(parts), math.ceil(len(mine) / 250))
    backbone.train(mode)
    features = torch.cat(parts)
    if world == 1:
        return features
    shares = [torch.empty_like(features) for _ in range(world)]
    dist.all_gather(shares, features)
    return torch.stack(shares, dim=1).flatten(0, 1)[:n]  # in order again


# ------------------------------------------------------------------------------------------------
# Two variants of Sec. 5.2: what the predictions have to meet, if not z itself


class Targets(nn.Module):
    """--alternate and --eta-momentum. With both off, it returns z1 and z2 as they are."""

    def __init__(self, model: SimSiam, n: int, dim: int, alternate: int, eta_momentum: float):
        super().__init__()
        self.every = alternate
        self.momentum = eta_momentum
        # k-step alternation: the targets of k steps come from the weights before the first of them. (The
        # paper computes them ahead and keeps them. To keep the weights gives the same ones.)
        self.model = copy.deepcopy(model).requires_grad_(False) if self.every > 1 else None
        # In place of the expectation over augmentations, a running average over an image's visits; that both
        # views update it is ours, and so is its start at zero. On the first visit zero only scales the
        # target, and D sees no scale; on the second the older view has 44 % of the weight, not yet 80.
        self.register_buffer("eta", torch.zeros(n, dim) if self.momentum else None)

    def forward(
        self, step: int, indices: Tensor, model: SimSiam, x1: Tensor, x2: Tensor, z1: Tensor, z2: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.model is not None:
            if step % self.every == 0:
                self.model.load_state_dict(model.state_dict())
            with torch.no_grad():
                z1, z2 = self.model(x1, x2)[2:]
        if self.eta is not None:
            z1 = torch.lerp(z1.detach().float(), self.eta[indices], self.momentum)
            z2 = torch.lerp(z2.detach().float(), self.eta[indices], self.momentum)
            self.eta[indices] = (z1 + z2) / 2
        return z1, z2


# ------------------------------------------------------------------------------------------------
# Data: uint8 until it is on the device

ARRAYS = "arrays"  # DATA's name where a program brings its own
FORMATS = ["JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP"]  # whatever a file's name, no other decoder sees it
TEST_FOLDERS = ["val", "valid", "validation", "test", "testing"]  # beside train/: the first counts
IN_MEMORY = 2**29  # bytes: up to 512 MiB of small pictures are kept decoded; CIFAR-10 takes 184 MB
Part = tuple[Tensor | list[str], Tensor | None, list[str]]  # source, labels and files of Images


class Images(torch.utils.data.Dataset):
    """Images, their labels or None, and how a network is fed with them.

    source: (N, 3, H, W) uint8 in memory, or N files to be decoded when asked for; labels: (N,).
    size, view_size: sides of what is not augmented and of a view (default: the same), in pixels.
    mean, std: of the three channels, from 0 to 1.
    files: their names, below `root`, if they come from files. classes: the names of the labels 0, 1, ...
    """

    def __init__(
        self, source: Tensor | list[str], labels: Tensor | None, size: int, crop_min: float = 1.0,
        mean: list[float] | None = None, std: list[float] | None = None,
        files: Sequence[str] = (), root: str = "", classes: Sequence[str] = (),
        view_size: int | None = None,
    ):  # fmt: skip
        self.source = source
        self.labels = labels
        self.size = size
        self.view_size = view_size or size
        self.mean = mean
        self.std = std
        self.files = list(files)
        self.root = root
        self.classes = list(classes)
        self.in_memory = isinstance(source, Tensor)
        # For files. Crops are cut here and not on the device, so that images of all sizes fit one tensor.
        resize = v2.RandomResizedCrop(self.view_size, scale=(crop_min, 1.0), antialias=True)
        self.crop = v2.Compose([resize, v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, request: tuple[str | None, Tensor]) -> tuple[Tensor, Tensor]:
        """For a key and B indices: uint8 images (B, 3, H, W), where the source lies, and the indices again.

        Of files two random crops of each, (B, 2, 3, view_size, view_size): the same for the same key. For
        None instead of a key, what is not augmented, (B, 3, size, size).
        """
        key, indices = request
        if self.in_memory:
            images = self.source[to_device(indices, self.source.device)]
            return images if key else centre(images, self.size), indices
        images = []
        for place, index in enumerate(indices.tolist()):
            image = decode(self.source[index])
            if key is None:
                images.append(centre(image, self.size))
            else:
                torch.manual_seed(seed_of(key, place, index))  # so the number of workers changes nothing
                images.append(torch.stack([self.crop(image), self.crop(image)]))
        return torch.stack(images), indices

    def subset(self, indices: Tensor) -> "Images":
        part = copy.copy(self)
        part.source = self.source[indices] if self.in_memory else [self.source[i] for i in indices.tolist()]
        part.labels = None if self.labels is None else self.labels[indices]
        part.files = [self.files[i] for i in indices.tolist()] if self.files else []
        return part

    def move_to(self, device: torch.device, need: float = 0.0) -> None:
        """Moves images in memory, if they fit beside `need` bytes: then a step moves indices, not images."""
        if self.in_memory and device.type != "cpu" and need + 2 * self.source.nbytes < free_memory(device):
            self.source = self.source.to(device)

    def fingerprint(self) -> list[int]:
        """How many images, and a hash of them or of their files' names: a resume notices a change."""
        if self.in_memory and not self.files and self.root not in DATASETS:
            return [len(self), zlib.crc32(self.source.cpu().numpy())]
        names = [file.removeprefix(self.root).replace(os.sep, "/") for file in self.files]
        return [len(self), seed_of(names)]

    def class_name(self, label: int) -> str:
        return self.classes[label] if 0 <= label < len(self.classes) else str(label)


def centre(images: Tensor, size: int) -> Tensor:
    """(..., 3, size, size): what is not augmented is seen like this. The middle square of (..., 3, H, W).

    Of larger images the border is left out, as on ImageNet, where 256 pixels are cut to 224.
    """
    side = min(images.shape[-2:])
    images = v2.functional.center_crop(images, [side, side])  # first: a thin image, resized, would be huge
    side = round(size * 256 / 224) if side > size else size
    images = v2.functional.resize(images, [side, side], antialias=True)
    return v2.functional.center_crop(images, [size, size])


def load_data(
    args: argparse.Namespace, arrays: dict[str, Any] | None = None
) -> tuple[Images, Images | None]:
    """Training and test images of args.data, or of `arrays` (see `from_arrays`). No test images: None."""
    if arrays is None and is_npz(args.data):
        arrays = read_npz(args.data)
    classes: Sequence[str] = ()
    if arrays is not None:
        sources = from_arrays(arrays, args.holdout)
    elif args.data == "textures":
        sources = [(*textures(5000, seed=0), []), (*textures(2000, seed=1), [])]
        classes = PATTERNS
    elif args.data in DATASETS:
        sources, classes = load_torchvision(args.data, args.data_dir)
    else:
        sources, classes = load_folder(Path(args.data), args.holdout)
    view_size = round(args.image_size * args.view_scale)
    options = dict(
        size=args.image_size, view_size=view_size, crop_min=args.crop_min, mean=args.mean, std=args.std
    )
    parts = [
        Images(source, labels, files=files, root=args.data, classes=classes, **options)
        for source, labels, files in sources
    ]
    images = parts[0]
    test = parts[1] if len(parts) == 2 else None
    if args.holdout and not (arrays and "val_images" in arrays):
        if len(images) < 10:
            fail(f"--holdout: a tenth of {len(images)} images is too few; leave it out")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # whatever the seed
        tenth = len(images) // 10
        test = images.subset(order[:tenth])
        images = images.subset(order[tenth:])
    if test is not None and images.labels is None:
        test.labels = None  # kNN needs both
    if images.mean is None:
        mean, std = measure_pixels(images)
        for part in (images, test) if test is not None else (images,):
            part.mean = mean
            part.std = std
    return images, test


def measure_pixels(images: Images) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the three channels, from 0 to 1, over all pixels.

    Of files, over those of a thousand images, as they are seen without augmentation.
    For CIFAR-10's std that gives (0.2470, 0.2435, 0.2616); the often copied (0.2023, 0.1994, 0.2010) is the
    mean over images of each one's own.
    """
    some = torch.linspace(0, len(images) - 1, min(1000, len(images))).long()  # of files, a thousand will do
    pixels = images.source if images.in_memory else images[None, some][0]
    stats = [torch.std_mean(pixels[:, c].float() / 255, correction=0) for c in range(3)]
    # A channel may be empty: the bound is that of --std.
    return [mean.item() for _, mean in stats], [max(std.item(), 1e-3) for std, _ in stats]


def from_arrays(arrays: dict[str, Any], holdout: bool) -> list[Part]:
    """train_images, train_labels, test_images, test_labels: arrays or tensors, as in the files of MedMNIST.

    Images are uint8: (N, H, W), (N, H, W, 3) or (N, 3, H, W). Labels, whole numbers (N,) or (N, 1), may be
    missing, and so may the test images. With holdout, val_images and val_labels, if they are there, are the
    test images.
    """
    if not isinstance(arrays, dict):
        fail(f"arrays are a dict, such as dict(train_images=x), and not {type(arrays).__name__}")
    known = [f"{part}_{kind}" for part in ("train", "val", "test") for kind in ("images", "labels")]
    if unknown := sorted(map(str, set(arrays) - set(known))):
        print0(f"warning: not used: {', '.join(unknown)}; known: {', '.join(known)}", sys.stderr)
    test = "val" if holdout and "val_images" in arrays else "test"
    parts = []
    for split in ("train", test) if f"{test}_images" in arrays else ("train",):
        try:
            images = to_rgb(arrays[f"{split}_images"])
            labels = None
            if f"{split}_labels" in arrays:
                labels = to_labels(arrays[f"{split}_labels"], len(images))
        except Exception as error:  # whatever a value may be
            fail(f"{split}_images or {split}_labels can't be used ({type(error).__name__}: {error})")
        parts.append((images, labels, []))
    return parts


def to_rgb(array: Any) -> Tensor:
    """(N, 3, H, W) uint8 of gray or RGB images, the channels last, first or none. Raises ValueError."""
    images = torch.from_numpy(np.ascontiguousarray(array))
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.ndim == 4 and images.shape[-1] in (1, 3):
        images = images.movedim(-1, 1)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        found = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images are uint8, (N, H, W) or (N, H, W, 3), and not {found}")
    return images.expand(-1, 3, -1, -1).contiguous()


def to_labels(array: Any, n: int) -> Tensor | None:
    """(n,) of whole numbers (n,) or (n, 1). Of several for each image, None. Raises ValueError."""
    labels = np.asarray(array)
    if labels.ndim not in (1, 2) or len(labels) != n or (labels != np.floor(labels)).any():
        raise ValueError(f"labels are {n} whole numbers, and not {labels.dtype} {labels.shape}")
    if labels.size != n:
        print0("warning: several labels for each image: not used", sys.stderr)
        return None
    return torch.from_numpy(labels.reshape(n).astype("int64"))


def is_npz(data: str) -> bool:
    return data.lower().endswith(".npz") and not os.path.isdir(data)


def read_npz(path: str) -> dict[str, Any]:
    try:
        return dict(np.load(path).items())  # refuses pickles, which could run code
    except Exception as error:  # whatever a damaged file raises
        fail(f"{path} can't be read as .npz ({type(error).__name__}: {error}): check the file")


PATTERNS = "stripes checks dots rings grids grains zigzags bricks streaks rays".split()


def textures(count: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Ten classes of procedural patterns: images (count, 3, size, size) uint8, and labels (count,).

    Only the pattern is the class. Phase, period, a little rotation, colour, contrast, shading and pixel
    noise are drawn for each image and say nothing about it.
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


def load_torchvision(name: str, root: str) -> tuple[list[Part], list[str]]:
    """Training and test images of a data set of torchvision, and its classes."""
    sets = torchvision.datasets
    kind = {"cifar10": sets.CIFAR10, "cifar100": sets.CIFAR100, "fashion-mnist": sets.FashionMNIST}[name]
    # One process of each machine downloads, and the others wait for it in over_ranks.
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        if not first:
            over_ranks(torch.zeros(1))
        parts = [kind(root, train=is_train, download=True) for is_train in (True, False)]
    except Exception as error:  # no network, no space, damaged: torchvision raises all kinds
        archive = getattr(kind, "filename", "FashionMNIST/raw with its four files, unpacked,")
        fail(f"{name} can't be read or downloaded ({error}): put {archive} into --data-dir {root}")
    if first:
        over_ranks(torch.zeros(1))
    return [(to_rgb(part.data), torch.as_tensor(part.targets), []) for part in parts], parts[0].classes


def load_folder(root: Path, holdout: bool) -> tuple[list[Part], list[str]]:
    """Training images and, if there are any, test images below root; and the classes.

    Training images are those of root/train/, test images those of the first of val/, valid/, validation/,
    test/ and testing/. Without any of these, all below root are training images. The folders in there are
    the classes, unless some image lies outside of them: then there are no labels. All files are read once
    before the training starts. Those that can't be are counted, five of them named, and left out.
    """
    if not root.is_dir():
        kinds = f"{', '.join(DATASETS)}, a folder, or a .npz file"
        fail(f"no data set and no folder is called {str(root)!r}: choose {kinds}")
    inside = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    training = [inside[name] for name in ("train", "training") if name in inside][:1]
    testing = [inside[name] for name in TEST_FOLDERS if name in inside][:1]
    used = [*training, *testing]
    unused = [str(path) for path in inside.values() if path not in used and path.name[0] != "."]
    if training and unused:
        print0(f"beside {training[0]}, not used: {', '.join(unused[:5])}")
    if testing and not training:
        fail(f"{testing[0]} is for test images, and there is no {root}/train to train on")

    first = training[0] if training else root
    found = []
    names: list[list[str]] = []  # of the training images' classes, then of the test images'
    for folder in (first, *testing):
        source, files = find_images(folder)
        column = class_folders(files, folder)
        if "" in column:
            loose = files[column.index("")]
            if folder is not first or (training and any(column)):
                fail(f"{loose} is in no class folder, and others are: move it into one")
            print0(f"{first}: no labels, for {loose} is in no class folder")
            return [(source, None, files)], []
        found.append((source, files))
        names.append(column)
    if differing := sorted({*names[0]} ^ {*names[-1]}):
        few = ", ".join(differing[:5])
        print0(f"warning: only one of train/ and {testing[0].name}/ has images of {few}", sys.stderr)
    classes = sorted({name for column in names for name in column})  # one numbering for both
    tests = f"tests on {testing[0].name}/" if testing else "has nothing to test on"
    if holdout:
        tests = "tests on a tenth of it"
    few = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
    print0(f"trains on {first}, {tests}; {len(classes)} classes: {few}")
    number = {name: label for label, name in enumerate(classes)}
    labels = [torch.tensor([number[name] for name in column]) for column in names]
    return [(source, own, files) for (source, files), own in zip(found, labels)], classes


def class_folders(files: list[str], root: Path) -> list[str]:
    """Of each file the name of the folder in `root` that it is in, or "" if it is in none."""
    places = [Path(file).relative_to(root).parts for file in files]
    return [place[0] if len(place) > 1 else "" for place in places]


def find_images(part: Path) -> tuple[Tensor | list[str], list[str]]:
    """The readable images below a folder, links followed, hidden ones left out; and their file names.

    Small pictures of one size that fit in memory are kept as uint8 (N, 3, H, W), of others only the names.
    Ranks share the reading.
    """
    extensions = torchvision.datasets.folder.IMG_EXTENSIONS
    files = []
    ignored: collections.Counter[str] = collections.Counter()
    walked = set()
    for folder, folders, names in os.walk(part, followlinks=True, onerror=warn_of_folder):
        place = os.path.realpath(folder)
        is_run = "checkpoint.pt" in names and folder != str(part)  # a run's OUT has pictures of its own
        if is_run or place in walked:  # or the links go round in a circle
            folders.clear()
            continue
        walked.add(place)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted(name for name in names if name[0] != "."):
            if name.lower().endswith(extensions):
                files.append(os.path.join(folder, name))
            else:
                ignored[os.path.splitext(name)[1].lower() or name] += 1
    files.sort()  # the same order everywhere
    if ignored:
        kinds = " ".join(kind for kind, _ in ignored.most_common(5))
        print0(f"{part}: {ignored.total()} files ignored: {kinds}")

    # One bad file among a million would end the training hours later; to look at all of them takes minutes.
    rank, world = rank_and_world()
    limit = min(IN_MEMORY // max(len(files), 1), 3 * 128 * 128)  # of larger ones, workers cut crops faster
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock
        read = list(pool.map(lambda file: try_reading(file, limit), files[rank::world]))
    fine = torch.zeros(len(files), dtype=torch.uint8)
    fine[rank::world] = torch.tensor([image is not None for image in read], dtype=torch.uint8)
    fine = over_ranks(fine).bool()
    bad = [file for file, good in zip(files, fine) if not good]
    if bad:
        print0(f"warning: {len(bad)} files can't be read, and are left out: {', '.join(bad[:5])}", sys.stderr)
    if len(bad) == len(files):
        fail(f"no readable image below {part}: looked for {' '.join(extensions)}")
    files = list(itertools.compress(files, fine))
    images = join_images(read, fine)
    return (files if images is None else images), files


def warn_of_folder(error: OSError) -> None:
    print0(f"warning: {error.filename} can't be read ({error.strerror}), and is left out", sys.stderr)


def try_reading(path: str, limit: int) -> Tensor | None:
    """The image, (3, H, W), if it has no more than `limit` bytes; else nothing, (0,). Unreadable: None."""
    if not os.path.isfile(path):  # a pipe would never end
        return None
    try:
        with Image.open(path, formats=FORMATS) as file:
            if file.mode == "F":  # floats have no known range: they would turn black
                return None
            if 3 * file.width * file.height <= limit:
                return upright_rgb(file)
            file.draft("RGB", (8, 8))  # reads all of a JPEG, but decodes it at an eighth: quicker by far
            ImageOps.exif_transpose(file)
            return torch.empty(0, dtype=torch.uint8)
    except Exception:  # Pillow's plugins raise all kinds
        return None


def join_images(read: list[Tensor | None], fine: Tensor) -> Tensor | None:
    """All images of all ranks that are `fine`, (N, 3, H, W), if they were kept and have one size."""
    kept = [image.shape for image in read if image is not None and image.ndim == 3]
    shape = over_ranks(torch.tensor(kept[0] if kept else [0, 0, 0]), dist.ReduceOp.MAX).tolist()
    same = all(image is None or [*image.shape] == shape for image in read)
    if not over_ranks(torch.tensor(int(same)), dist.ReduceOp.MIN):
        return None
    rank, world = rank_and_world()
    images = torch.zeros(len(fine), *shape, dtype=torch.uint8)
    for place, image in zip(range(rank, len(fine), world), read):
        if image is not None:
            images[place] = image
    return over_ranks(images)[fine]


def upright_rgb(file: Image.Image) -> Tensor:
    """uint8 (3, H, W) from whatever a file holds: gray, palette, CMYK, 16 bits. White shines through."""
    image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # 16 bits; converted as they are, all above 255 would turn white
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return v2.functional.pil_to_tensor(image.convert("RGB"))


def decode(path: str) -> Tensor:
    """The same from a path that was readable when the training began. Raises OSError if it is no more."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            return upright_rgb(file)
    except Exception as error:  # Pillow's plugins raise all kinds
        raise OSError(f"{path} can't be read any more ({error})") from error


def seed_of(*parts: Any) -> int:
    """32 bits, which is all that the CPU's generator uses, from anything that prints."""
    return zlib.crc32(repr(parts).encode(errors="surrogateescape"))


def schedule(
    n: int, batch: int, seed: int, steps: range, rank: int = 0, world: int = 1, pairs: int = 1
) -> Iterator[tuple[str, Tensor]]:
    """For each step the epoch's key, and the indices of this rank's part, (pairs * batch / world,).

    An epoch is a new permutation of all n images, the same one on every rank, cut into n // batch batches.
    What is left over is another handful each time.
    """
    for step in steps:
        epoch, position = divmod(step, n // batch)
        if position == 0 or step == steps.start:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))
        mine = order[position * batch : (position + 1) * batch][rank::world]
        yield f"{seed} {epoch}", mine.repeat(pairs)


def make_loader(
    images: Images, requests: Iterable[tuple[str | None, Tensor]], workers: int
) -> torch.utils.data.DataLoader:
    """(uint8 batch, indices) in the order of the requests, from one set of workers."""
    return torch.utils.data.DataLoader(
        images,
        sampler=requests,
        batch_size=None,  # a request is a batch already
        num_workers=0 if images.in_memory else workers,  # from memory a gather is quicker
        # Copies from pinned memory need not be waited for.
        pin_memory=torch.cuda.is_available() and not (images.in_memory and images.source.is_cuda),
        worker_init_fn=leave_group,
    )


def leave_group(worker: int) -> None:
    """Ctrl-C and the like reach the whole process group. What to do about it is the trainer's business."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def normalize(x: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """x (N, 3, H, W) in [0, 1], standardized as the network expects it, channels last."""
    mean_, std_ = to_device(torch.tensor([mean, std]), x.device).view(2, 3, 1, 1)
    return ((x - mean_) / std_).contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------
# Flags

COST = "cifar10, cifar100: 3e17 floating-point operations, 2 hours at 40 TFLOP/s; an estimate, not run by us."
NOT_SAVED = ["resume", "out", "device", "workers", "tensorboard"]  # of the machine or the call
# At a resume: they do not define the training; and another machine may lack bfloat16.
MAY_CHANGE = ["data_dir", "knn_every", "save_every", "keep_every", "keep_best", "amp"]


def full_name(data: str) -> str:
    """DATA as a run saves it: a folder or a file is found again from anywhere."""
    return data if data in (*DATASETS, ARRAYS) else os.path.realpath(data.replace("\0", "?"))


def recipe_of(data: str, recipe: str | None) -> dict[str, Any]:
    usual = "small" if is_npz(data) or data == ARRAYS else "imagenet"
    return RECIPES[recipe or (data if data in DATASETS else usual)]


def build_parser() -> argparse.ArgumentParser:
    lines = [f"{name}: " + " ".join(f"{k}={v}" for k, v in flags.items()) for name, flags in RECIPES.items()]
    title = "Pretrain SimSiam. Flags without a default here have one in each recipe: see the end."
    parser = start_parser(title, "\n".join([*lines, COST]))
    flag = parser.add_argument
    size = in_range(int, 1, 65536)
    share = in_range(float, 0, 1)
    rate = in_range(float, 0, 1000)
    count = in_range(int, 0, 10**6)
    many = in_range(int, 1, 10**6)
    names = f"{', '.join(DATASETS)}, a folder, or a .npz file (default: textures)"
    flag("data", nargs="?", metavar="DATA", help=names)
    flag("--out", help="for the results (default: runs/DATA, or the next free runs/DATA-2, ...)")
    flag("--resume", action="store_true", help="go on with the run in --out, or the latest; else begin it")
    flag("--init", metavar="CHECKPOINT", help="begin with the weights of another run, a folder or file")
    # model
    flag("--dim", type=size, help="output dimension d (App. B)")
    flag("--hidden", type=size, help="width of the projector's hidden layers (Sec. 3)")
    flag("--layers", type=in_range(int, 1, 16), help="of the projector: 3 (Sec. 3), 2 (App. D)")
    # optimization
    flag("--epochs", type=many)
    flag("--batch-size", type=in_range(int, 2, 10**6), help="TOTAL over all processes (Table 2)")
    flag("--base-lr", type=rate, help="for a batch of 256; lr = base lr * batch / 256 (Sec. 3)")
    flag("--weight-decay", type=rate, help="on all parameters, BN and biases too (App. A)")
    flag("--warmup-epochs", type=count, help="default: 10 from batch 1024 on (Table 2)")
    flag("--decay-predictor-lr", action="store_true", help="cosine for h too (Table 1, baseline)")
    # images and augmentation
    flag("--crop-min", type=in_range(float, 0.01, 1), help="smallest area of a crop, as a share (App. A)")
    flag("--view-scale", type=in_range(float, 0.25, 1), help="side of a view, as a share of --image-size")
    flag("--blur", type=share, help="probability of the Gaussian blur (0.5 in the authors' code)")
    # the paper's ablations: all off by default
    flag("--no-stop-gradient", action="store_true", help="Fig. 2: it collapses")
    flag("--predictor", choices=["mlp", "none", "fixed"], default="mlp", help="Table 1a, b")
    flag("--predictor-hidden", type=size, help="default: a quarter of --dim (App. B)")
    where = "in the heads: Table 3a (there with 10 epochs of warmup), b, c, d"
    flag("--bn", choices=["none", "hidden", "default", "all"], default="default", help=where)
    flag("--affine", action="store_true", help="scale and shift in the BN on z (Sec. 4.4)")
    flag("--similarity", choices=["cosine", "cross-entropy"], default="cosine", help="Sec. 4.5")
    flag("--asymmetric", action="store_true", help="predict one way only (Sec. 4.6)")
    flag("--pairs", type=in_range(int, 1, 16), default=1, help="of views an image; 2: Sec. 4.6's 2x")
    flag("--alternate", type=many, default=1, help="steps that share target weights (Sec. 5.2)")
    eta = in_range(float, 0, 0.999)
    flag("--eta-momentum", type=eta, default=0.0, help="of targets (Sec. 5.2: 0.8, without h)")
    # system
    flag("--knn-every", type=count, help="epochs between kNN evaluations; 0: none")
    flag("--save-every", type=many, default=1, help="epochs between checkpoints (default: 1)")
    flag("--keep-every", type=count, default=0, help="epochs between copies that stay (default: 0, none)")
    best = "keep the best by kNN as checkpoint-best.pt; with --holdout, for the test images must not choose"
    flag("--keep-best", action="store_true", help=best)
    kinds = ["auto", "off", "bf16", "fp16"]
    flag("--amp", choices=kinds, default="auto", help="auto: bf16 where the hardware has it")
    flag("--tensorboard", action="store_true", help="write the metrics for TensorBoard too")
    return parser


def start_parser(title: str, epilog: str = "") -> argparse.ArgumentParser:
    """What the command lines of train.py and eval.py share. Every complaint is one line."""
    parser = argparse.ArgumentParser(
        description=title,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: fail(f"{message}{suggestion(parser, message)}; see --help")
    devices = ["cpu"]
    if torch.accelerator.is_available():
        devices.insert(0, torch.accelerator.current_accelerator().type)

    def device(name: str) -> str:
        if name not in devices:
            raise argparse.ArgumentTypeError(f"no {name} device was found: choose {' or '.join(devices)}")
        return name

    flag = parser.add_argument
    usual = "default: DATA's own; a folder's: imagenet, a .npz file's: small"
    flag("--recipe", choices=[*RECIPES], help=usual)
    flag("--arch", choices=ARCHS, metavar="ARCH", help="convnet, small-resnet, or a ResNet of torchvision")
    flag("--stem", choices=["imagenet", "cifar"], help="of a ResNet, for 224 or for 32 pixels")
    flag("--width", type=in_range(int, 1, 1024), default=16, help="of our own networks; 16, small: 32")
    flag("--image-size", type=in_range(int, 8, 4096), help="side in pixels; of views, times --view-scale")
    measured = "of the pixels (default: measured; recipe imagenet: ImageNet's)"
    flag("--mean", type=in_range(float, 0, 1), nargs=3, help=measured)
    flag("--std", type=in_range(float, 1e-3, 1), nargs=3)
    flag("--data-dir", default="data", help="for downloaded data sets (default: data)")
    flag("--holdout", action="store_true", help="test on a tenth of the training set, kept apart")
    flag("--seed", type=in_range(int, 0, 2**63 - 1), default=0, help="default: 0")
    flag("--device", type=device, default=devices[0], help=f"{' or '.join(devices)} (default: {devices[0]})")
    workers = min(4, os.cpu_count() or 1)
    flag("--workers", type=in_range(int, 0, 256), default=workers, help="that decode a folder's images")
    return parser


def suggestion(parser: argparse.ArgumentParser, message: str) -> str:
    """For an unknown flag, as --lr, the shortest known one that contains it."""
    unknown = re.match("unrecognized arguments: --([^ =]+)", message)
    flags = re.findall(r"--[\w-]+", parser.format_usage())
    near = [flag for flag in flags if unknown and unknown[1] in flag]
    return f": do you mean {min(near, key=len)}?" if near else ""


def in_range(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from low to high."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:  # nan neither
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} from {low} to {high}"  # argparse prints this name in its error
    return parse


def get_args(
    argv: list[str] | None, arrays: bool = False
) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """Checked arguments, and the checkpoint to go on from or None. Flags over checkpoint over recipe."""
    words = sys.argv[1:] if argv is None else argv
    if arrays:
        words = [ARRAYS, *words]
    parser = build_parser()
    # First as typed, for that says where the run is; then once more, over what its checkpoint says.
    args = parser.parse_args(words)
    if "" in (args.data, args.out, args.init):
        fail("DATA, --out or --init is empty: name one, or leave it out")
    if args.data in RECIPES.keys() - set(DATASETS) and not os.path.exists(args.data):
        fail(f"{args.data} is a recipe: name a folder, and add --recipe {args.data}")
    out = choose_out(args.data, args.out, args.resume)
    checkpoint = None
    if args.resume and os.path.lexists(out / "checkpoint.pt"):  # a link that leads nowhere is an error
        checkpoint = read_checkpoint(out / "checkpoint.pt")
        step = checkpoint.get("step")
        if type(checkpoint.get("args")) is not dict or type(step) is not int or not 0 <= step < 2**62:
            fail(f"{out}/checkpoint.pt is not one of train.py: name another --out")
    # On two hosts that share no files one would go on and the other begin, and each wait for the other.
    found = torch.tensor(checkpoint["step"] if checkpoint else -1)
    if over_ranks(found, dist.ReduceOp.MIN) != over_ranks(found, dist.ReduceOp.MAX):
        fail(f"not all processes see {out}/checkpoint.pt: put --out where all nodes can read it", status=1)

    saved = checkpoint["args"] if checkpoint else {}
    data = full_name(args.data or str(saved.get("data", "textures")))
    if data == ARRAYS and not arrays:
        again = f"train.main(['--resume', '--out', {str(out)!r}], arrays)"
        fail(f"the images of {out} came from a program: go on there with {again}")
    parser.set_defaults(**recipe_of(data, args.recipe))
    # What was saved comes first on the command line, and what was typed behind it: the last one counts.
    names = vars(args).keys() - {*NOT_SAVED, "data"}
    flags = to_flags(saved, names)
    parser.error = lambda message: fail(f"{out}/checkpoint.pt is damaged ({message}): name another --out")
    before = parser.parse_args(flags)
    args = parser.parse_args([*flags, *words])
    args.data = data
    args.out = str(out)
    if checkpoint:
        before.data = str(saved.get("data"))
        compare(before, args)
    if args.warmup_epochs is None:
        args.warmup_epochs = 10 if args.batch_size >= 1024 else 0
    check_args(args, {word.split("=")[0] for word in words})
    return args, checkpoint


def to_flags(saved: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Saved arguments as a command line, so that they pass through the flags' own types and choices."""
    words = []
    for name in sorted(saved.keys() & set(names)):
        flag = "--" + name.replace("_", "-")
        value = saved[name]
        if value is True:
            words.append(flag)
        elif type(value) is list and [type(item) for item in value] == [float] * 3:  # mean and std
            words += [flag, *map(str, value)]
        elif type(value) in (int, float, str):
            words.append(f"{flag}={value}")
        elif value is not None and value is not False:
            words.append(f"{flag}=?")  # which no flag takes
    return words


def compare(before: argparse.Namespace, args: argparse.Namespace) -> None:
    """Stops where a resumed run would not be the same training."""
    for name, was in vars(before).items():
        now = getattr(args, name)
        if was == now or name in [*NOT_SAVED, *MAY_CHANGE]:
            continue
        if name == "data" and not {was, now} & {*DATASETS, ARRAYS}:  # may move; its files are compared
            print0(f"warning: {args.out} ran on {was}, and goes on with {now}", sys.stderr)
        else:
            remedy = "leave it out, or name another --out"
            fail(f"--resume: {args.out} runs with {name} {was}, not {now}: {remedy}")


def check_args(args: argparse.Namespace, given: set[str]) -> None:
    """Stops on values that are right one by one, but not together or not here. `given`: flags as typed."""
    world = rank_and_world()[1]
    if args.batch_size % world or args.batch_size < 2 * world:
        fail(f"--batch-size {args.batch_size} is the total of {world} processes: take two or more for each")
    view_size = round(args.image_size * args.view_scale)
    if view_size < 8:  # the blur reflects at six pixels, and a bfloat16 convolution needs more than one
        fail(f"--image-size {args.image_size} * --view-scale {args.view_scale} gives views of {view_size} "
             "pixels: take 8 or more")  # fmt: skip
    if args.warmup_epochs >= args.epochs:
        fail(f"--warmup-epochs {args.warmup_epochs} leaves nothing of --epochs {args.epochs}: take fewer")
    if args.amp == "fp16" and args.device != "cuda":
        fail(f"--amp fp16 needs CUDA, and this is {args.device}: choose bf16 or off")
    if len({"--mean", "--std"} & given) == 1:
        fail("--mean and --std go together: give both or none")
    if args.keep_best and not (args.holdout and args.knn_every):
        fail("--keep-best chooses by kNN, and not with the test images: add --holdout, and --knn-every N")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        fail("--tensorboard needs a package: pip install tensorboard, or leave it out")
    if args.eta_momentum and (world, args.alternate, args.pairs, args.similarity) != (1, 1, 1, "cosine"):
        fail("--eta-momentum is for one process: leave out --alternate, --pairs, --similarity and torchrun")
    if args.no_stop_gradient and (args.eta_momentum or args.alternate > 1):
        fail("--no-stop-gradient: targets of --alternate and --eta-momentum have no gradient; use only one")
    # A flag that would change nothing is a misunderstanding: better to hear of it than to wait for it.
    for flag, ignored, because in (
        ("--width", args.arch in RESNETS, f"--arch {args.arch}"),
        ("--stem", args.arch not in RESNETS, f"--arch {args.arch}"),
        ("--hidden", args.layers == 1, f"--layers {args.layers}"),
        ("--affine", args.bn in ("none", "hidden"), f"--bn {args.bn}"),
        ("--predictor-hidden", args.predictor == "none", f"--predictor {args.predictor}"),
        ("--decay-predictor-lr", args.predictor != "mlp", f"--predictor {args.predictor}"),
    ):
        if ignored and flag in given:
            fail(f"{flag} changes nothing with {because}: use only one")


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype for autocast, or None for float32. "auto" takes bfloat16 where the hardware multiplies it."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # emulated in software, bfloat16 is far slower than float32
        cpu = getattr(torch.cpu, "get_capabilities", dict)()
        native = device.type == "cpu" and (cpu.get("amx_bf16") or cpu.get("avx512_bf16"))
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "auto": torch.bfloat16 if native else None}
    return dtypes.get(amp)


# ------------------------------------------------------------------------------------------------
# Plumbing: processes, files, signals, errors

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def rank_and_world() -> tuple[int, int]:
    """This process's rank and how many there are, as torchrun set them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def print0(message: str, file: Any = None, end: str = "\n") -> None:
    """Prints once, however many processes there are."""
    if rank_and_world()[0] == 0:
        encoding = getattr(file or sys.stdout, "encoding", None) or "utf-8"  # file names may be any bytes
        message = message.encode(encoding, errors="backslashreplace").decode(encoding)
        with contextlib.suppress(OSError, ValueError):  # a closed terminal or pipe does not end a training
            print(message, file=file, end=end, flush=True)


def fail(message: str, status: int = 2) -> NoReturn:
    """Ends in one line, without a traceback: status 2 for a user's mistake, 1 for a fault of the machine."""
    print("error:", *message.splitlines(), file=sys.stderr, flush=True)
    sys.exit(status)


def setup_distributed() -> None:
    """Joins the other processes, if torchrun's environment tells of any."""
    rank, world = rank_and_world()
    if world == 1:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        gpu = int(os.environ.get("LOCAL_RANK", 0))
        if gpu >= torch.cuda.device_count():
            fail(f"there is no GPU {gpu}: start no more processes than there are GPUs")
        torch.cuda.set_device(gpu)
        backend = "cpu:gloo,cuda:nccl"  # gloo too: ranks agree on when to stop without their GPUs
    try:
        store, _, _ = next(dist.rendezvous("env://"))
        # On a restart, torchrun 2.14's store was seen to hold the addresses of the processes that had died.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        patience = datetime.timedelta(minutes=30)  # with a rank that downloads, or a network that is cut
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        fail(f"cannot reach the other processes ({reason}): start them with torchrun", status=1)


def over_ranks(x: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    """x, summed or otherwise combined over all processes, on the CPU. Waits for all of them."""
    x = x.detach().cpu().clone()
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


def choose_out(data: str | None, out: str | None, resume: bool) -> Path:
    """--out; else with --resume the latest run of DATA or at all, without the next free runs/DATA-2, ..."""
    if out is None:
        name = Path(data or "textures").resolve().name or "data"
        runs = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
        if data:
            runs = [path for path in runs if re.fullmatch(re.escape(name) + r"(-\d+)?", path.parent.name)]
        if resume and runs:
            return runs[-1].parent
        names = (f"{name}-{i}" if i > 1 else name for i in itertools.count(1))
        return next(Path("runs", name) for name in names if not Path("runs", name).exists())
    if os.path.lexists(out) and not Path(out).is_dir():
        fail(f"--out {out} is no folder: name another one")
    there = {path.name: path.lstat().st_size for path in Path(out).glob("[!.]*")}
    resumable = "checkpoint.pt" in there or there == {"metrics.jsonl": 0}  # the latter: killed as it began
    if there and not (resume and resumable):
        fail(f"--out {out} is in use: add --resume to go on with a run of its own, or name a new folder")
    return Path(out)


def begin(trainer: Trainer, test: Images | None) -> None:
    """Makes OUT, and what a run starts with."""
    args = trainer.args
    out = Path(args.out)
    if trainer.rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            if not args.resume:
                open(out / "metrics.jsonl", "x").close()  # of two runs that begin here at once, one gets it
            for left in out.glob(".*.[0-9]*.tmp"):  # by a run that was killed as it wrote
                left.unlink()
        except OSError as error:
            there = (out / "metrics.jsonl").exists()
            why = "was taken by another run in the meantime" if there else f"can't be made ({error.strerror})"
            fail(f"--out {out} {why}: name another folder")
    write_metrics(trainer)  # the rows that a killed run wrote after its last checkpoint go
    if trainer.step == 0:
        save(trainer)  # now there is always something to resume, and a full disk shows at once
        save_views(trainer)
        erank, knn = monitor(trainer, test, knn=args.knn_every > 0)
        percent = "" if knn is None else f"  kNN {knn:.1%}"
        print0(f"{'to begin with' if args.init else 'untrained'}: rank {erank:.1f}{percent}")
    if args.tensorboard and trainer.rank == 0:
        from torch.utils.tensorboard import SummaryWriter  # needs a package of its own: tensorboard

        trainer.tensorboard = SummaryWriter(args.out, purge_step=trainer.step)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Leaves at path the old file or the new one, whole, whatever happens. A link there is not followed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # of two runs in one OUT each has its own
    try:
        beside.unlink(missing_ok=True)
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save turns one into the other
        fail(f"cannot write {path} ({error}); what was there before is untouched", status=1)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def save(trainer: Trainer, name: str = "checkpoint.pt") -> None:
    state = trainer.state_dict()  # on every rank, for it sums over them
    if trainer.rank == 0:
        with whole_file(Path(trainer.args.out, name)) as file:
            torch.save(state, file)


def keep_copies(trainer: Trainer, epoch: int) -> None:
    """--keep-every and --keep-best: checkpoints that the next ones do not replace."""
    args = trainer.args
    if args.keep_every and epoch % args.keep_every == 0:
        save(trainer, f"checkpoint-{epoch:04}.pt")
    knn = [row["knn"] for row in trainer.history if row["knn"] is not None]
    if args.keep_best and trainer.history[-1]["knn"] and knn[-1] > max(knn[:-1], default=0):
        save(trainer, "checkpoint-best.pt")


def load_init(model: SimSiam, path: str) -> None:
    """--init: all weights of another run, to begin with."""
    try:
        load_weights(model, read_checkpoint(path_of(path))["model"])
    except Exception as error:  # whatever a file of the right form may hold
        reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:200]
        fail(f"--init {path} does not fit ({reason}): give --arch, --dim and the like as that run had them")


def load_weights(model: SimSiam, weights: dict[str, Tensor]) -> None:
    """All of them. Raises ValueError on nan and infinity, and what torch raises where they do not fit."""
    model.load_state_dict(weights)
    if not all_finite(weights.values()):
        raise ValueError("nan or infinity")


def write_metrics(trainer: Trainer) -> None:
    if trainer.rank == 0:
        with whole_file(Path(trainer.args.out, "metrics.jsonl")) as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in trainer.history)


def save_views(trainer: Trainer) -> None:
    """A picture of what the network sees: eight images, and below each of them its two views."""
    args = trainer.args
    images = trainer.images
    key, indices = next(schedule(len(images), args.batch_size, args.seed, range(1)))
    torch.manual_seed(args.seed)
    batch, _ = images[key, indices[:8]]
    plain, _ = images[None, indices[:8]]
    x1, x2 = two_views(batch, images.view_size, args.crop_min, args.blur)
    if trainer.rank == 0:
        rows = [plain, *((x * 255).byte() for x in (x1, x2))]
        save_picture(Path(args.out, "views.png"), dict(zip(["image", "view 1", "view 2"], rows)))


def save_picture(path: Path, rows: dict[str, Tensor], frames: list[list[str]] | None = None) -> None:
    """Rows of images, (N, 3, S, S) uint8, each under its name; each image in a frame of a colour, or white.

    Small images are enlarged, pixel by pixel, to 96 pixels at least. The first row's size counts for all.
    """
    size = next(iter(rows.values())).shape[-1]
    side = size * math.ceil(96 / size)
    step = side + 12
    columns = max(map(len, rows.values()))
    picture = Image.new("RGB", (step * columns + 8, (step + 16) * len(rows) + 8), "white")
    draw = ImageDraw.Draw(picture)
    for i, (name, images) in enumerate(rows.items()):
        top = i * (step + 16)
        draw.text((8, top + 4), name.encode("ascii", "replace").decode(), fill="black")
        for j, image in enumerate(images):
            left = step * j
            if frames:
                draw.rectangle((left + 4, top + 20, left + side + 11, top + side + 27), fill=frames[i][j])
            tile = v2.functional.to_pil_image(image.cpu()).resize((side, side), Image.Resampling.NEAREST)
            picture.paste(tile, (left + 8, top + 24))
    with whole_file(path) as file:
        picture.save(file, format="png")


def path_of(checkpoint: str) -> Path:
    """The file itself, or the one in a run's folder."""
    return Path(checkpoint, "checkpoint.pt") if os.path.isdir(checkpoint) else Path(checkpoint)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dict that torch.save wrote there. Never runs code from the file."""
    if not path.is_file():
        fail(f"{path} is not there, or no file: check the path")
    if not os.access(path, os.R_OK):
        fail(f"{path} can't be opened (permission denied): check the path")
    try:
        if zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(path)
            # torch.save stores; what is packed could unpack to any size.
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("compressed")
            if archive.testzip():  # torch.load does not look at the checksums
                raise ValueError("checksum")
        return dict(torch.load(path, map_location="cpu", weights_only=True).items())
    except Exception as error:  # what a damaged file raises has no common type
        kind = type(error).__name__
        fail(f"{path} is damaged or not a checkpoint ({kind}): take another one, or start anew")


def check_finite(trainer: Trainer) -> None:
    """Stops on nan and infinity, and so keeps them out of the checkpoint."""
    if not all_finite([trainer.sums, *trainer.model.state_dict().values()]):
        lr = trainer.optimizer.param_groups[0]["lr"]
        where = f"step {trainer.step}, lr {lr:.4g}, amp {trainer.amp or 'off'}"
        remedy = "lower --base-lr or --weight-decay, or --amp off. The checkpoint is from before"
        fail(f"loss or weights are not finite at {where}: {remedy}", status=1)


def all_finite(values: Iterable[Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in values)


class Progress:
    """How far a loop is: on a terminal in place and every second, elsewhere a line every three minutes.

    The first time comes early, after ten seconds: to know soon how long an epoch will take.
    """

    def __init__(self) -> None:
        self.terminal = bool(sys.stdout) and sys.stdout.isatty()
        self.wait = 1 if self.terminal else 10  # seconds
        self.told = time.monotonic()
        self.first = math.inf

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done <= self.first:  # of a new epoch, or after a resume; it is slower than the others
            self.first = done
            self.began = now
        elif now - self.told >= self.wait:
            self.told = now
            self.wait = 1 if self.terminal else 180
            each = (now - self.began) / (done - self.first)
            whole = datetime.timedelta(seconds=round(each * total))
            print0(f"{what} {done} of {total}, about {whole} in all", end="  \r" if self.terminal else "\n")


def check_memory(trainer: Trainer) -> float:
    """Bytes that a step needs. Stops where there are not so many: the step would be killed without a word."""
    need = memory_of_a_step(trainer)
    free = free_memory(trainer.device)
    if trainer.device.type == "cpu":
        free /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if need > free:
        world = trainer.world
        batch = world * 2 ** int(math.log2(max(2, free / need * trainer.args.batch_size / world)))
        fail(
            f"a step needs about {need / 2**30:.1f} GB of memory, and {free / 2**30:.1f} are free: "
            f"take --batch-size {batch} or a smaller --image-size, or for small pictures --recipe small"
        )
    return need


def memory_of_a_step(trainer: Trainer) -> float:
    """Bytes for the forward and backward pass of this rank's batch, measured on a few images."""
    args = trainer.args
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    counts = []
    for n in (2, 4):
        kept.clear()
        size = trainer.images.view_size
        x = torch.zeros(n, 3, size, size, device=trainer.device)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            with torch.autocast(trainer.device.type, trainer.amp, enabled=trainer.amp is not None):
                trainer.model.eval()(x, x.clone())
        counts.append(sum(kept.values()))
    an_image = (counts[1] - counts[0]) / 2  # without the weights, which are kept once
    # A fifth more for gradients on their way: ResNet-50 at batch 16 keeps 2.6 GB, and grew by 3.1.
    return 1.2 * an_image * args.batch_size * args.pairs / trainer.world


def free_memory(device: torch.device) -> float:
    """Bytes; where nobody tells, infinitely many."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [math.inf]
    with contextlib.suppress(OSError, ValueError, LookupError):
        limits.append(1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1]))
    with contextlib.suppress(OSError, ValueError):  # a container's limit, of which some is used already
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits) if device.type == "cpu" else math.inf


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Inside, SIGINT, SIGTERM and SIGHUP are only noted, in the list; a second one kills."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        # torchrun passes on what the terminal has sent to all already; it kills by itself if need be.
        second = signal.SIG_IGN if dist.is_initialized() else signal.SIG_DFL
        for each in before:
            signal.signal(each, second)

    heeded = [each for each in SIGNALS if signal.getsignal(each) != signal.SIG_IGN]  # nohup ignores: so do we
    before = {each: signal.signal(each, note) for each in heeded}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def until_signal(batches: Iterator[Any], noted: list[int]) -> Iterator[Any]:
    """The batches. Where a worker dies of the very signal that was noted, they end without an error.

    For the while, torch's handler of SIGCHLD is off: it would raise wherever an update stands. Without it the
    death of a worker shows here, between two updates.
    """
    child = getattr(signal, "SIGCHLD", None)  # Windows has none
    before = signal.signal(child, signal.SIG_DFL) if child else None
    try:
        yield from batches
    except (OSError, RuntimeError):
        if not noted:
            raise
    finally:
        if child:
            signal.signal(child, before)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Faults of the machine, too, end in one line."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[-1]  # a worker's has a traceback
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
            text = "out of memory: take a smaller --batch-size or --image-size, or (in kNN) --knn-every 0"
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            text = "another process has ended, or the network is cut; the last checkpoint is whole"
        elif not isinstance(error, OSError) and "DataLoader worker" not in str(error):
            raise
        fail(text, status=1)


def main(argv: list[str] | None = None, arrays: dict[str, Any] | None = None) -> None:
    """The whole command, for a shell, a notebook or a test. SystemExit on a mistake and on a signal.

    arrays: your own images instead of DATA, for example dict(train_images=x) with x uint8 (N, 3, H, W);
    labels and test images as in `from_arrays`.
    """
    try:
        with one_line_errors():
            setup_distributed()
            pretrain(*get_args(argv, arrays is not None), arrays)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
