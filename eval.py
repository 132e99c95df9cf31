"""How good are the features? kNN, linear probe and fine-tuning of a pretrained backbone.

    python eval.py runs/textures/checkpoint.pt              # kNN and linear probe
    python eval.py random --data textures                   # the same for an untrained network, to compare
    python eval.py runs/textures/checkpoint.pt finetune --labels-per-class 10
    python eval.py pixels knn --data fashion-mnist          # no network at all

CHECKPOINT is a file of train.py, one that the authors of SimSiam released, a state_dict of torchvision's
names, or one of the words "random" and "pixels". Features are the backbone's, in eval mode, frozen: a probe
that leaves BatchNorm in training mode changes the network that it measures. Every test image counts, and the
last epoch is reported: the best one on the test set would be chosen with the test set.
In reading order: from a file to a frozen backbone, the protocols, the whole, flags.
"""

import argparse
import math
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.transforms import v2

from simsiam import ARCHS, build_backbone, crop_and_flip, knn_predict, unit
from train import (
    Images, extract_features, fail, in_range, learning_rate, load_data, make_loader, one_line_errors,
    read_checkpoint, recipe_of, schedule, start_parser, to_flags, whole_file,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------
# From a file to a frozen backbone


def backbone_weights(content: dict[str, Any]) -> dict[str, Tensor]:
    """The backbone's part of any of the formats, under torchvision's names.

    train.py: {"model": backbone.*, projector.*, predictor.*}; the authors': {"state_dict": module.encoder.*
    with the projector as encoder.fc.*, module.predictor.*}; a state_dict: the names themselves.
    """
    weights = content.get("model", content.get("state_dict", content))
    if not isinstance(weights, dict):
        return {}
    found = {}
    for name, value in weights.items():
        bare = re.sub(r"^(module\.)?(encoder\.|backbone\.)?", "", str(name))
        if not re.match(r"(fc|projector|predictor)\.", bare):
            found[bare] = value
    return found


def load_backbone(args: argparse.Namespace, content: dict[str, Any]) -> nn.Module:
    """In eval mode, frozen. Strict: every tensor comes from the file, and all of the file's fit."""
    if args.checkpoint == "pixels":
        return nn.Flatten(1)
    torch.manual_seed(args.seed)
    backbone, _ = build_backbone(args.arch, args.stem, args.width)
    if args.checkpoint != "random":
        weights = backbone_weights(content)
        try:
            backbone.load_state_dict(weights, strict=True)
        except (RuntimeError, AttributeError, TypeError) as error:
            reason = re.sub(r"\s+", " ", str(error)).split(": ", 1)[-1][:200]
            fail(f"{args.checkpoint} does not fit --arch {args.arch} --stem {args.stem}: {reason}")
        print(f"{args.checkpoint}: all {len(weights)} tensors of {args.arch} loaded")
    return backbone.eval().requires_grad_(False).to(args.device, memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------
# The protocols: training on labels


def few_labels(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Indices of per_class images of each class, drawn at random. Stops where a class has fewer."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in labels.unique():
        mine = order[labels[order] == label][:per_class]
        if len(mine) < per_class:
            fail(f"--labels-per-class {per_class}: class {label} has only {len(mine)} images: take fewer")
        chosen.append(mine)
    return torch.cat(chosen)


def plan(n: int, batch: int, epochs: int, seed: int) -> list[tuple[str, Tensor]]:
    """A key and the indices, (batch,), of every step. Few images come several times in an epoch."""
    rows = torch.arange(n).repeat(math.ceil(batch / n))
    steps = range(len(rows) // batch * epochs)
    return [(key, rows[i]) for key, i in schedule(len(rows), batch, seed, steps)]


def crops(
    images: Images, steps: list[tuple[str, Tensor]], crop_min: float, device: str, workers: int
) -> Iterator[Tensor]:
    """For each step, randomly cropped and flipped images, standardized: as in supervised training."""
    for batch, _ in make_loader(images, steps, workers):
        x = batch.to(device, non_blocking=True).float() / 255
        # Of files, the loader has cut two crops already.
        x = x[:, 0] if x.ndim == 5 else crop_and_flip(x, images.size, crop_min)
        yield v2.functional.normalize(x, images.mean, images.std)


def fit(
    model: nn.Module, batches: Iterable[Tensor], targets: Iterable[Tensor], steps: int, peak: float,
    clip: float = math.inf,
) -> None:  # fmt: skip
    """SGD on the cross-entropy: momentum 0.9, no weight decay, half a cosine.

    App. A names SGD as the alternative to LARS; that its lr falls by a cosine, as that of LARS, is ours.
    """
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=peak, momentum=0.9)
    for step, (x, target) in enumerate(zip(batches, targets)):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak, warmup=0)
        loss = F.cross_entropy(model(x), target.to(x.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()


def new_classifier(bank: Tensor, classes: int, seed: int) -> nn.Sequential:
    """Standardization by the training features, bank (N, D), then a linear layer: (N, D) to (N, classes)."""
    # Standardizing changes nothing that a linear classifier can express, but makes one lr fit all networks:
    # an untrained one's features are hundreds of times smaller, and at lr 30 its probe would hardly move.
    standardize = nn.BatchNorm1d(bank.shape[1], affine=False, eps=1e-12).eval()
    variance, mean = torch.var_mean(bank, dim=0, correction=0)
    standardize.running_mean = mean.cpu()
    # Bounded from below, for a channel that is constant on the training set has no variance.
    standardize.running_var = variance.clamp_min(variance.mean() / 100).cpu()
    torch.manual_seed(seed)
    linear = nn.Linear(bank.shape[1], classes)
    linear.weight.data.normal_(0, 0.01)  # as the authors' code begins; App. D has no recipe for its probe
    linear.bias.data.zero_()
    return nn.Sequential(standardize, linear).to(bank.device)


def linear_probe(
    backbone: nn.Module, train: Images, bank: Tensor, features: Tensor, args: argparse.Namespace
) -> tuple[Tensor, str]:
    """Predicted labels of the test features, and a word on how; the backbone stays as it is.

    By default on features computed once, standardized. --official: on those of new crops every epoch, as the
    authors' code, and raw; lr 30 is App. A's.
    """
    classes, positions = train.labels.unique(return_inverse=True)  # any labels, not just 0 to C - 1
    batch = args.batch_size or 256
    steps = plan(len(train), batch, args.epochs, args.seed)
    model = new_classifier(bank, len(classes), args.seed)
    if args.official:
        model = model[1]
        how, base_lr = "crops and flips", 30.0
        cut = crops(train, steps, args.crop_min, args.device, args.workers)
        batches = (backbone(x) for x in cut)
    else:
        how, base_lr = "features computed once, standardized", 1.0
        batches = (bank[i] for _, i in steps)
    base_lr = base_lr if args.base_lr is None else args.base_lr
    fit(model, batches, (positions[i] for _, i in steps), len(steps), base_lr * batch / 256)
    with torch.no_grad():
        predicted = classes[model(features).argmax(dim=1).cpu()]
    return predicted, f"{how}; {recipe(base_lr, batch, args.epochs, steps)}"


def finetune(
    backbone: nn.Module, train: Images, test: Images, bank: Tensor, args: argparse.Namespace
) -> tuple[Tensor, str]:
    """Predicted labels of the test images by all weights, tuned on labels, and a word on how."""
    classes, positions = train.labels.unique(return_inverse=True)
    batch = args.batch_size or 64
    base_lr = 0.1 if args.base_lr is None else args.base_lr
    steps = plan(len(train), batch, args.epochs, args.seed)
    targets = [positions[i] for _, i in steps]
    head = new_classifier(bank, len(classes), args.seed)
    # First the head alone: the gradients of an untrained one would ruin the backbone.
    fit(head, (bank[i] for _, i in steps), targets, len(steps), batch / 256)
    model = nn.Sequential(backbone.requires_grad_(True), head)
    # BN keeps the statistics of the pretraining, for ten labelled images give worse; an untrained network
    # has none to keep.
    model.train(args.checkpoint == "random")
    # Clipped, for pretraining leaves weights so small that a usual lr would be far too large for them.
    cut = crops(train, steps, args.crop_min, args.device, args.workers)
    fit(model, cut, targets, len(steps), base_lr * batch / 256, clip=1.0)
    logits = extract_features(model, test, args.device, workers=args.workers)
    return classes[logits.argmax(dim=1).cpu()], f"all weights; {recipe(base_lr, batch, args.epochs, steps)}"


def recipe(base_lr: float, batch: int, epochs: int, steps: list[Any]) -> str:
    return f"SGD, lr {base_lr:g} * {batch} / 256, {epochs} epochs of {len(steps) // epochs} steps"


# ------------------------------------------------------------------------------------------------
# The whole


def evaluate(args: argparse.Namespace, content: dict[str, Any]) -> None:
    """Loads, and prints a line for each task."""
    backbone = load_backbone(args, content)
    train, test = load_data(args)
    if train.labels is None:
        fail(f"{args.data} has no labels: kNN and probes need train/ and val/ with a folder for each class")
    if args.labels_per_class:
        train = train.subset(few_labels(train.labels, args.labels_per_class, args.seed))
    bank = extract_features(backbone, train, args.device, workers=args.workers)  # (M, D)
    features = extract_features(backbone, test, args.device, workers=args.workers)  # (N, D)
    if args.features:
        save_features(args.features, train=(bank, train.labels), test=(features, test.labels))
    n, d = bank.shape
    print(f"{args.data}: {n} labelled images, {len(test)} test images, features of length {d}")

    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    for task in [args.task] if args.task else ["knn", "linear"]:
        if task == "knn":
            predicted = knn_predict(features, bank, train.labels.to(bank.device), args.k, args.temperature)
            how = f"k={args.k}, T={args.temperature}"
        elif task == "linear":
            predicted, how = linear_probe(backbone, train, bank, features, args)
        else:
            predicted, how = finetune(backbone, train, test, bank, args)
        correct = (predicted.cpu() == test.labels).sum().item()
        print(f"{task} ({how}): top-1 {correct / len(test):.2%} ({correct} of {len(test)})", flush=True)
        unchanged = all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
        assert unchanged or task == "finetune", "the probe changed the backbone"
    if args.checkpoint not in ("random", "pixels"):
        save_neighbors(train, test, bank, features, Path(args.checkpoint).with_name("neighbors.png"))


def save_features(path: str, **parts: tuple[Tensor, Tensor]) -> None:
    """{"train": {"features": (M, D), "labels": (M,)}, "test": ...} into a new file."""
    content = {name: dict(features=x.cpu(), labels=labels) for name, (x, labels) in parts.items()}
    if os.path.lexists(path):  # it may have come up since
        fail(f"--features {path} exists already: name a new file")
    with whole_file(Path(path)) as file:
        torch.save(content, file)


def save_neighbors(train: Images, test: Images, bank: Tensor, features: Tensor, path: Path) -> None:
    """A picture: ten test images in the left column, and beside each its nine nearest training images."""
    if path.exists() and not path.with_name("metrics.jsonl").exists():
        return print(f"no picture: {path} is there, and not in the folder of a run")
    shown = torch.linspace(0, len(test) - 1, min(10, len(test))).long()
    nearest = (unit(features[shown]) @ unit(bank).T).topk(min(9, len(bank)), dim=1).indices.cpu()
    tiles = []
    for query, neighbours in zip(shown, nearest):
        tiles += [test[None, query[None]][0], train[None, neighbours][0]]
    with whole_file(path) as file:
        torchvision.utils.save_image(torch.cat(tiles) / 255, file, format="png", nrow=nearest.shape[1] + 1)


# ------------------------------------------------------------------------------------------------
# Flags

# What a checkpoint determines: another value would feed the network images that it does not know.
FIXED = ("arch", "stem", "width", "mean", "std")
IGNORED = {  # flags that a task does not look at
    "knn": ["--epochs", "--base-lr", "--batch-size", "--official", "--crop-min"],
    "linear": ["--k", "--temperature"],
    "finetune": ["--k", "--temperature", "--official"],
}


def build_parser() -> argparse.ArgumentParser:
    parser = start_parser("Evaluate a backbone by kNN, linear probe or fine-tuning.")
    flag = parser.add_argument
    many = in_range(int, 1, 10**6)
    rate = in_range(float, 0, 10**4)
    flag("checkpoint", metavar="CHECKPOINT", help="a file, or 'random' (untrained), or 'pixels' (no network)")
    flag("task", nargs="?", choices=[*IGNORED], help="default: knn, then linear")
    flag("--data", help="as in train.py (default: what the checkpoint was trained on)")
    flag("--labels-per-class", type=many, metavar="N", help="use so many of the labels only")
    flag("--k", type=many, default=200, help="neighbours (default: 200)")
    flag("--temperature", type=in_range(float, 0.001, 100), default=0.2, help="of their votes (default: 0.2)")
    flag("--official", action="store_true", help="linear: crop and flip each epoch, like the authors; SGD")
    flag("--epochs", type=many, default=90, help="of linear and finetune (default: 90)")
    flag("--batch-size", type=in_range(int, 2, 10**6), help="default: linear 256, finetune 64")
    flag("--base-lr", type=rate, help="for a batch of 256 (default: linear 1, --official 30, finetune 0.1)")
    crop = in_range(float, 0.01, 1)
    flag("--crop-min", type=crop, help="of crops (default: as pretrained; --official 0.08)")
    # for files that do not say it, and for 'random'
    flag("--arch", choices=ARCHS, metavar="ARCH")
    flag("--stem", choices=["imagenet", "cifar"])
    flag("--width", type=in_range(int, 1, 1024), default=16)
    flag("--image-size", type=in_range(int, 8, 4096))
    flag("--mean", type=in_range(float, 0, 1), nargs=3)
    flag("--std", type=in_range(float, 1e-3, 1), nargs=3)
    flag("--features", metavar="FILE", help="write features and labels of both splits")
    return parser


def get_args(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Arguments completed by what the checkpoint says, and its content ({} for 'random' and 'pixels')."""
    words = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_intermixed_args(words)
    content: dict[str, Any] = {}
    if args.checkpoint not in ("random", "pixels"):
        content = read_checkpoint(Path(args.checkpoint))
    saved = content.get("args", {"arch": content["arch"]} if "arch" in content else {})
    if not isinstance(saved, dict):
        fail(f"{args.checkpoint} is not a checkpoint of train.py or the authors' code")
    data = (args.data or str(saved.get("data", ""))).replace("\0", "?")
    if not data:
        fail(f"which images? {args.checkpoint} does not say: add --data")

    kept = [*FIXED, "data_dir", "image_size", "crop_min"]  # the run's own seed and the like are not ours
    parser.set_defaults(**{name: value for name, value in recipe_of(data).items() if name in kept})
    official = ["--crop-min=0.08"] if args.official else []  # torchvision's default, which the authors use
    parser.error = lambda message: fail(f"{args.checkpoint} is damaged ({message}): take another one")
    trained = to_flags(saved, kept)
    args = parser.parse_intermixed_args([*trained, *official, *words])
    args.data = data
    check_args(args, saved, {word.split("=")[0] for word in words})
    return args, content


def check_args(args: argparse.Namespace, saved: dict[str, Any], given: set[str]) -> None:
    """Stops on flags that contradict the checkpoint, and on those that would change nothing."""
    for name in FIXED:
        now = getattr(args, name)
        if f"--{name}" in given and saved.get(name, now) != now:
            fail(f"--{name} {now}, but the checkpoint has {saved[name]}: leave the flag out")
    if len({"--mean", "--std"} & given) == 1:
        fail("--mean and --std go together: give both or none")
    if args.checkpoint == "pixels" and (given & {"--arch", "--stem", "--width"} or args.task == "finetune"):
        fail("'pixels' is no network: leave out finetune, --arch, --stem and --width")
    for flag in IGNORED.get(args.task, []):
        if flag in given:
            fail(f"{flag} changes nothing in {args.task}: leave it out")
    if "--crop-min" in given and args.task != "finetune" and not args.official:
        fail("--crop-min changes nothing without crops: add --official, or leave it out")
    if args.features:
        path = Path(args.features).absolute()
        if os.path.lexists(path) or not path.parent.is_dir():
            fail(f"--features {args.features} exists already, or its folder does not: name a new file")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        fail("eval.py runs in one process: start it without torchrun")


def main(argv: list[str] | None = None) -> None:
    """The whole command, for a shell, a notebook or a test."""
    with one_line_errors():
        evaluate(*get_args(argv))


if __name__ == "__main__":
    main()
