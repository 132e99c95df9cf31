"""Is it any good? kNN, linear probe and fine-tuning of a pretrained backbone.

    python eval.py runs/textures/checkpoint.pt              # kNN and linear probe
    python eval.py random --data textures                   # the same for an untrained network, to compare
    python eval.py runs/textures/checkpoint.pt finetune --labels-per-class 10
    python eval.py pixels knn --data fashion-mnist          # no network at all

CHECKPOINT is a file of train.py (checkpoint.pt or --export's) or one of those that the authors of SimSiam
released, or one of the words "random" and "pixels". Features are the backbone's, in eval mode, frozen: a
probe that leaves BatchNorm in training mode changes the network that it measures. Every test image counts,
and the last epoch is reported: the best one on the test set would be chosen with the test set.
"""

import argparse
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from simsiam import build_backbone, knn_predict, unit
from train import (
    IMAGENET,
    RECIPES,
    Images,
    check_new_file,
    command_line,
    crop_and_flip,
    devices,
    export_backbone,
    extract_features,
    learning_rate,
    load,
    load_data,
    normalize,
    number,
    one_line_errors,
    process,
    read_checkpoint,
    replace_file,
    say,
    schedule,
    stop,
)

# ------------------------------------------------------------------------------------------------
# Arguments

# What a checkpoint determines: another value would feed the network images that it does not know.
FIXED = ("arch", "stem", "width", "mean", "std")


def build_parser() -> argparse.ArgumentParser:
    parser = command_line("Evaluate a backbone by kNN, linear probe or fine-tuning.")
    flag, rate = parser.add_argument, number(float, 0, 10**4)
    flag("checkpoint", metavar="CHECKPOINT", help="a file, or 'random' (untrained), or 'pixels' (no network)")
    flag("task", nargs="?", choices=["knn", "linear", "finetune"], default=None, help="default: knn, linear")
    flag("--data", help="as in train.py (default: what the checkpoint was trained on)")
    flag("--data-dir", help="for downloaded data sets (default: data)")
    flag("--holdout", action="store_true", help="test on a tenth of the training set")
    flag("--labels-per-class", type=number(int, 1, 10**6), metavar="N", help="use so many of the labels only")
    flag("--seed", type=number(int, 0, 2**63 - 1), help="of labels, probe and 'random' (default: 0)")
    flag("--k", type=number(int, 1, 10**6), default=200, help="neighbours (default: 200)")
    flag("--temperature", type=number(float, 0.001, 100), default=0.2, help="of their votes (default: 0.2)")
    flag("--official", action="store_true", help="linear: crop and flip each epoch, like the authors; SGD")
    flag("--epochs", type=number(int, 1, 10**5), default=90, help="of linear and finetune (default: 90)")
    flag("--batch-size", type=number(int, 2, 10**6), help="default: linear 256, finetune 64")
    flag("--base-lr", type=rate, help="for a batch of 256 (default: linear 1, --official 30, finetune 0.1)")
    flag("--crop-min", type=number(float, 0.01, 1), help="of crops (default: as pretrained; --official 0.08)")
    # for files that do not say it, and for 'random'
    flag("--arch")
    flag("--stem", choices=["imagenet", "cifar"])
    flag("--width", type=number(int, 1, 1024))
    flag("--image-size", type=number(int, 8, 4096))
    flag("--mean", type=number(float, 0, 1), nargs=3)
    flag("--std", type=number(float, 1e-3, 1), nargs=3)
    flag("--features", metavar="FILE", help="write features and labels of both splits")
    flag("--export", metavar="FILE", help="write the backbone alone, for plain torchvision")
    flag("--device", choices=devices(), help="default: the first of these")
    flag("--workers", type=number(int, 0, 256), help="that decode a folder's images (default: up to 4)")
    return parser


def get_args(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Arguments completed by what the checkpoint says, and its content ({} for 'random' and 'pixels')."""
    given = vars(build_parser().parse_intermixed_args(argv))
    name, content = given["checkpoint"], {}
    if name not in ("random", "pixels"):
        content = read_checkpoint(Path(name))
    saved = content.get("args", {"arch": content["arch"]} if "arch" in content else {})
    if not isinstance(saved, dict):
        stop(f"{name} is not a checkpoint of train.py or the authors' code")
    network = {"arch", "stem", "width", "export"} & given.keys() or given["task"] == "finetune"
    if name == "pixels" and network:
        stop("'pixels' is no network: leave out finetune, --arch, --stem, --width and --export")
    for name in FIXED:
        if name in given and saved.get(name, given[name]) != given[name]:
            stop(f"--{name} {given[name]}, but the checkpoint has {saved[name]}: leave the flag out")
    if ("mean" in given) != ("std" in given):
        stop("--mean and --std go together: give both or none")
    data = given.get("data", saved.get("data"))
    if not data:
        stop(f"which images? {given['checkpoint']} does not say: add --data")
    recipe = RECIPES.get(data, IMAGENET) | dict(
        data=data, data_dir="data", holdout=False, seed=0, labels_per_class=None,
        workers=min(4, os.cpu_count() or 1),
        official=False, features=None, export=None, batch_size=None, base_lr=None, device=devices()[0],
    )  # fmt: skip
    # The run's own seed, device and the like are not the evaluation's.
    kept = "data data_dir image_size crop_min".split()
    saved = {name: value for name, value in saved.items() if name in (*FIXED, *kept)}
    args = argparse.Namespace(**(recipe | saved | given))
    if args.official and "crop_min" not in given:
        args.crop_min = 0.08  # torchvision's default, which the authors' probe uses
    check_new_file("--features", args.features)
    check_new_file("--export", args.export)
    if args.export and args.features and os.path.realpath(args.export) == os.path.realpath(args.features):
        stop(f"--export and --features are both {args.export}: name two files")
    return args, content


# ------------------------------------------------------------------------------------------------
# From a file to a frozen backbone


def backbone_weights(content: dict[str, Any]) -> dict[str, Tensor]:
    """The backbone's part of any of the formats, under torchvision's names.

    train.py: {"model": backbone.*, projector.*, predictor.*}; the authors': {"state_dict": module.encoder.*
    with the projector as encoder.fc.*, module.predictor.*}; an export: the names themselves.
    """
    weights = content.get("model", content.get("state_dict", content))
    found = {}
    for name, value in weights.items() if isinstance(weights, dict) else ():
        name = re.sub(r"^(module\.)?(encoder\.|backbone\.)?", "", str(name))
        if not re.match(r"(fc|projector|predictor)\.", name):
            found[name] = value
    return found


def load_backbone(args: argparse.Namespace, content: dict[str, Any]) -> nn.Module:
    """In eval mode, frozen. Strict: every tensor comes from the file, and all of the file's fit."""
    if args.checkpoint == "pixels":
        return nn.Flatten(1)
    torch.manual_seed(args.seed)
    try:
        backbone, _ = build_backbone(args.arch, args.stem, args.width)
    except ValueError as error:
        stop(f"--arch {args.arch}: {error}")
    if args.checkpoint != "random":
        weights = backbone_weights(content)
        try:
            backbone.load_state_dict(weights, strict=True)
        except (RuntimeError, AttributeError, TypeError) as error:
            reason = re.sub(r"\s+", " ", str(error)).split(": ", 1)[-1][:200]
            stop(f"{args.checkpoint} does not fit --arch {args.arch} --stem {args.stem}: {reason}")
        say(f"{args.checkpoint}: all {len(weights)} tensors of {args.arch} loaded")
    return backbone.eval().requires_grad_(False).to(args.device, memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------
# Training on labels


def few_labels(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Indices of per_class images of each class, drawn at random; ValueError where a class has fewer."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in labels.unique():
        mine = order[labels[order] == label][:per_class]
        if len(mine) < per_class:
            raise ValueError(f"class {label} has only {len(mine)} images")
        chosen.append(mine)
    return torch.cat(chosen)


def crops(
    images: Images, requests: Iterable[tuple[str, Tensor]], args: argparse.Namespace
) -> Iterable[Tensor]:
    """Batches of randomly cropped and flipped images, normalized: the augmentation of supervised training."""
    for batch in load(images, requests, args.workers):
        x = batch.to(args.device, non_blocking=True).float() / 255
        # Of files, the workers have cut two crops already.
        x = x[:, 0] if x.ndim == 5 else crop_and_flip(x, args.image_size, args.crop_min)
        yield normalize(x, args)


def top1(predicted: Tensor, test: Images) -> str:
    correct = (predicted.cpu() == test.labels).sum().item()
    return f"top-1 {correct / len(test):.2%} ({correct} of {len(test)})"


def probe(
    backbone: nn.Module, train: Images, test: Images, bank: Tensor, features: Tensor, args: argparse.Namespace
) -> str:
    """Linear probe or fine-tuning, as args.task says: a line with the result."""
    tuning = args.task == "finetune"
    batch = args.batch_size or (64 if tuning else 256)
    scratch = args.checkpoint == "random"
    base_lr = (0.1 if tuning else 30 if args.official else 1) if args.base_lr is None else args.base_lr
    classes, positions = train.labels.unique(return_inverse=True)  # any labels, not just 0 to C - 1
    # Fewer labels than a batch: each image several times, in other crops.
    rows = torch.arange(len(train)).repeat(math.ceil(batch / len(train)))
    steps = len(rows) // batch * args.epochs

    def requests() -> Iterable[tuple[str, Tensor]]:
        return ((key, rows[i]) for key, i in schedule(len(rows), batch, args.seed, range(steps)))

    def fit(model: nn.Module, batches: Iterable[Tensor], base_lr: float, clip: float = math.inf) -> None:
        """SGD on the cross-entropy: momentum 0.9, no weight decay. App. A names it, with lr 30, as the
        alternative to LARS; that its lr falls by a cosine, as that of LARS does, is ours."""
        weights, peak = [w for w in model.parameters() if w.requires_grad], base_lr * batch / 256
        optimizer = torch.optim.SGD(weights, lr=peak, momentum=0.9)
        for step, (x, (_, i)) in enumerate(zip(batches, requests())):
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak, warmup=0)
            loss = F.cross_entropy(model(x), positions[i].to(args.device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, clip)
            optimizer.step()

    torch.manual_seed(args.seed)
    linear = nn.Linear(bank.shape[1], len(classes))
    # As the authors' code begins. App. D has no recipe for its probe: "similar to ImageNet".
    linear.weight.data.normal_(0, 0.01), linear.bias.data.zero_()
    # Standardizing changes nothing that a linear classifier can express, but makes one lr fit all networks:
    # an untrained one's features are hundreds of times smaller, and at lr 30 its probe would hardly move.
    standardize = nn.BatchNorm1d(bank.shape[1], affine=False, eps=1e-12).eval()
    var, standardize.running_mean = (x.cpu() for x in torch.var_mean(bank, dim=0, correction=0))
    standardize.running_var = var.clamp_min(var.mean() / 100)  # of a channel that only the test set uses
    head = nn.Sequential(standardize, linear).to(args.device)
    cached = (bank[i] for _, i in requests())
    model, how = head, "features computed once, standardized"
    if tuning:
        # First the head alone: the gradients of an untrained one would ruin the backbone. BN keeps the
        # statistics of the pretraining, for ten labelled images give worse; an untrained network has none.
        fit(head, cached, 1)
        model, how = nn.Sequential(backbone.requires_grad_(True), head), "all weights"
        model.train(scratch)
        # Clipped, for pretraining leaves weights so small that a usual lr would be far too large for them.
        fit(model, crops(train, requests(), args), base_lr, clip=1)
    elif args.official:
        model, how = linear.to(args.device), "crops and flips"
        fit(model, (backbone(x) for x in crops(train, requests(), args)), base_lr)
    else:
        fit(head, cached, base_lr)
    with torch.no_grad():
        logits = extract_features(model, test, args) if tuning else model.eval()(features)
    recipe = f"SGD, lr {base_lr:g} * {batch} / 256, {args.epochs} epochs of {steps // args.epochs} steps"
    return f"{args.task} ({how}; {recipe}): {top1(classes[logits.argmax(dim=1).cpu()], test)}"


# ------------------------------------------------------------------------------------------------
# The whole


def save_neighbors(train: Images, test: Images, bank: Tensor, features: Tensor, path: Path) -> None:
    """A picture: ten test images in the left column, and beside each its nine nearest training images."""
    rows = torch.linspace(0, len(test) - 1, min(10, len(test))).long()
    nearest = (unit(features[rows]) @ unit(bank).T).topk(min(9, len(bank)), dim=1).indices.cpu()
    pictures = [torch.cat([test[("", row[None])], train[("", near)]]) for row, near in zip(rows, nearest)]
    torchvision.utils.save_image(torch.cat(pictures) / 255, path, nrow=len(nearest[0]) + 1)


def evaluate(args: argparse.Namespace, content: dict[str, Any]) -> None:
    """Loads, and prints a line for each task."""
    backbone = load_backbone(args, content)
    if args.export:
        export_backbone(backbone, args.export)
    train, test = load_data(args)
    if train.labels is None:
        stop(f"{args.data} has no labels: kNN and probes need train/ and val/ with a folder for each class")
    if args.labels_per_class:
        try:
            train = train.subset(few_labels(train.labels, args.labels_per_class, args.seed))
        except ValueError as error:
            stop(f"--labels-per-class {args.labels_per_class}: {error}: take fewer")
    bank, features = (extract_features(backbone, images, args) for images in (train, test))
    if args.features:
        both = dict(train=(bank, train.labels), test=(features, test.labels))
        written = {name: dict(features=x.cpu(), labels=labels) for name, (x, labels) in both.items()}
        replace_file(Path(args.features), written)
    n, d = bank.shape
    say(f"{args.data}: {n} labelled images, {len(test)} test images, features of length {d}")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    for args.task in [args.task] if args.task else ["knn", "linear"]:
        if args.task == "knn":
            labels = knn_predict(features, bank, train.labels.to(bank.device), args.k, args.temperature)
            say(f"knn (k={args.k}, T={args.temperature}): {top1(labels, test)}")
        else:
            say(probe(backbone, train, test, bank, features, args))
        unchanged = all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
        assert unchanged or args.task == "finetune", "the probe changed the backbone"
    if args.checkpoint not in ("random", "pixels"):
        path = Path(args.checkpoint).with_name("neighbors.png")
        try:
            save_neighbors(train, test, bank, features, path)
        except OSError as error:
            say(f"no picture in {path} ({error.strerror})")


def main(argv: list[str] | None = None) -> None:
    """The whole command, for a shell, a notebook or a test."""
    if process()[1] > 1:
        stop("eval.py runs in one process: start it without torchrun")
    with one_line_errors():
        evaluate(*get_args(argv))


if __name__ == "__main__":
    main()
