"""How good are the features? kNN, linear probe and fine-tuning of a pretrained backbone.

    python eval.py runs/textures                            # kNN and linear probe
    python eval.py runs/textures --untrained                # the same network untrained, to compare
    python eval.py runs/textures finetune --labels-per-class 10 --save classifier.pt
    python eval.py classifier.pt predict PICTURE ...        # with a classifier that was saved
    python eval.py runs/textures neighbors PICTURE ...      # the training images most like them
    python eval.py pixels knn --data fashion-mnist          # no network at all

CHECKPOINT is a run's folder, a file of train.py or of --save, one that the authors of SimSiam released, a
state_dict of torchvision's names, or one of the words "random" and "pixels". Features are the backbone's, in
eval mode, frozen: a probe that leaves BatchNorm in training mode changes the network that it measures. Every
test image counts, and the last epoch is reported: the best one would be chosen with the test set.
In reading order: from a file to a frozen backbone, the protocols, the whole, what stays, flags.
"""

import argparse
import json
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
from torch import Tensor, nn

from simsiam import build_backbone, crop_and_flip, knn_predict, to_device, unit
from train import (
    ARRAYS, Images, Progress, all_finite, extract_features, fail, find_images, full_name, in_range,
    learning_rate, load_data, make_loader, normalize, one_line_errors, path_of, print0, read_checkpoint,
    recipe_of, save_picture, schedule, start_parser, to_flags, try_reading, whole_file,
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
    if not args.untrained:
        weights = backbone_weights(content)
        try:
            backbone.load_state_dict(weights, strict=True)
        except (RuntimeError, AttributeError, TypeError) as error:
            reason = re.sub(r"\s+", " ", str(error)).split(": ", 1)[-1][:200]
            fail(f"{args.checkpoint} does not fit --arch {args.arch} --stem {args.stem}: {reason}")
        print0(f"{args.checkpoint}: all {len(weights)} tensors of {args.arch} loaded")
    return backbone.eval().requires_grad_(False).to(args.device, memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------
# The protocols: training on labels


def few_labels(train: Images, per_class: int, seed: int) -> Tensor:
    """Indices of per_class images of each class, drawn at random. Stops where there are too few."""
    if train.labels is None:
        fail(f"--labels-per-class: {train.root} has no labels: leave it out")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in train.labels.unique():
        mine = order[train.labels[order] == label][:per_class]
        if len(mine) < per_class:
            name = train.class_name(int(label))
            fail(f"--labels-per-class {per_class}: class {name} has only {len(mine)} images: take fewer")
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
        x = to_device(batch, torch.device(device)).float() / 255
        # Of files, the loader has cut two crops already.
        x = x[:, 0] if x.ndim == 5 else crop_and_flip(x, images.size, crop_min)
        yield normalize(x, images.mean, images.std)


def fit(
    model: nn.Module, batches: Iterable[Tensor], targets: Iterable[Tensor], steps: int, peak: float,
    clip: float = math.inf,
) -> None:  # fmt: skip
    """SGD on the cross-entropy: momentum 0.9, no weight decay, half a cosine.

    App. A names SGD as the alternative to LARS. The cosine is that of the authors' code, here set every step.
    """
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=peak, momentum=0.9)
    progress = Progress()
    for step, (x, target) in enumerate(zip(batches, targets)):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak, warmup=0)
        loss = F.cross_entropy(model(x), target.to(x.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()
        progress("training on labels: step", step + 1, steps)


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
    backbone: nn.Module, train: Images, bank: Tensor, args: argparse.Namespace
) -> tuple[nn.Sequential, str]:
    """The head for the backbone's features, and a word on how it was trained; the backbone stays as it is.

    By default on features computed once, standardized. --official: on those of new crops every epoch, as the
    authors' code, and raw; lr 30 is App. A's.
    """
    classes, positions = train.labels.unique(return_inverse=True)  # any labels, not just 0 to C - 1
    batch = args.batch_size or 256
    steps = plan(len(train), batch, args.epochs, args.seed)
    model = new_classifier(bank, len(classes), args.seed)
    if args.official:
        model[0] = nn.Identity()
        how, base_lr = "crops and flips", 30.0
        cut = crops(train, steps, args.crop_min, args.device, args.workers)
        batches = (backbone(x) for x in cut)
    else:
        how, base_lr = "features computed once, standardized", 1.0
        batches = (bank[i] for _, i in steps)
    base_lr = base_lr if args.base_lr is None else args.base_lr
    fit(model, batches, (positions[i] for _, i in steps), len(steps), base_lr * batch / 256)
    return model, f"{how}; {describe_sgd(base_lr, batch, args.epochs, steps)}"


def finetune(
    backbone: nn.Module, train: Images, bank: Tensor, args: argparse.Namespace
) -> tuple[nn.Sequential, str]:
    """The head, and a word on how it was trained, with the backbone, which changes."""
    classes, positions = train.labels.unique(return_inverse=True)
    batch = args.batch_size or 64
    base_lr = 0.1 if args.base_lr is None else args.base_lr
    steps = plan(len(train), batch, args.epochs, args.seed)
    targets = [positions[i] for _, i in steps]
    head = new_classifier(bank, len(classes), args.seed)
    # First the head alone, by the linear probe's lr: gradients of an untrained one would ruin the backbone.
    fit(head, (bank[i] for _, i in steps), targets, len(steps), batch / 256)
    model = nn.Sequential(backbone.requires_grad_(True), head)
    # BN keeps the statistics of the pretraining, for ten labelled images give worse. An untrained network
    # has none to keep; the head's standardization follows it.
    model.train(args.untrained)
    # Clipped, for pretraining leaves weights so small that a usual lr would be far too large for them.
    cut = crops(train, steps, args.crop_min, args.device, args.workers)
    fit(model, cut, targets, len(steps), base_lr * batch / 256, clip=1.0)
    model.eval().requires_grad_(False)
    return head, f"all weights; {describe_sgd(base_lr, batch, args.epochs, steps)}"


def describe_sgd(base_lr: float, batch: int, epochs: int, steps: list[Any]) -> str:
    return f"SGD, lr {base_lr:g} * {batch} / 256, {epochs} epochs of {len(steps) // epochs} steps"


# ------------------------------------------------------------------------------------------------
# The whole


def evaluate(args: argparse.Namespace, content: dict[str, Any]) -> None:
    """Loads, does each task, and writes what the flags ask for."""
    backbone = load_backbone(args, content)
    pictures = open_pictures(args)
    train, test = load_data(args)
    tasks = choose_tasks(args, train, test)
    is_own = not args.untrained and content.get("args", {}).get("data") == args.data  # trained on these
    if args.holdout and is_own and content.get("data") not in (None, train.fingerprint()):
        print0("warning: trained without --holdout, so these test images are known to it", sys.stderr)
    if args.labels_per_class:
        train = train.subset(few_labels(train, args.labels_per_class, args.seed))
    shown = train if test is None else test
    for part in (train, shown):
        part.move_to(torch.device(args.device))
    options = dict(device=args.device, workers=args.workers)
    bank = extract_features(backbone, train, **options)  # (M, D)
    features = bank if test is None else extract_features(backbone, test, **options)  # (N, D)
    if not all_finite([bank, features]):
        fail(f"{args.checkpoint} gives features that are not finite: take another checkpoint", status=1)
    counts = f"{len(train)} training images, {'no' if test is None else len(test)} test images"
    print0(f"{args.data}: {counts}, features of length {bank.shape[1]}")

    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    for task in tasks:
        if task == "neighbors":
            pictures.mean, pictures.std = train.mean, train.std
            print_neighbors(pictures, extract_features(backbone, pictures, **options), train, bank)
        elif task == "knn":
            k = min(args.k, len(bank))
            predicted = knn_predict(features, bank, train.labels.to(bank.device), k, args.temperature)
            print_top1(args, task, f"k={k}, T={args.temperature}", predicted, test)
        else:
            head, how = (linear_probe if task == "linear" else finetune)(backbone, train, bank, args)
            if task == "finetune":
                bank = extract_features(backbone, train, **options) if args.features else bank
                features = extract_features(backbone, test, **options)
            with torch.no_grad():
                predicted = train.labels.unique()[head(features).argmax(dim=1).cpu()]
            print_top1(args, task, how, predicted, test)
            if args.save:
                save_classifier(args, backbone, head, train)
        unchanged = all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
        assert unchanged or task == "finetune", "the probe changed the backbone"
    if args.features:
        save_features(args.features, train=(bank, train), **({"test": (features, test)} if test else {}))
    is_run = is_own and Path(args.checkpoint).name == "checkpoint.pt"
    changed = args.task == "finetune" or args.labels_per_class
    if is_run and not changed:  # neighbours by the run's features, among all of its images
        save_neighbors(train, shown, bank, features, Path(args.checkpoint).with_name("neighbors.png"))


def choose_tasks(args: argparse.Namespace, train: Images, test: Images | None) -> list[str]:
    """The task of the command line, or kNN and the linear probe where there are labels to check them."""
    if args.task == "neighbors":
        return ["neighbors"]
    if train.labels is not None and test is not None and test.labels is not None:
        return [args.task] if args.task else ["knn", "linear"]
    missing = "labels" if train.labels is None else "test images with labels (try --holdout)"
    if args.task:
        fail(f"{args.task}: {args.data} has no {missing}; see 'Your data' in the README")
    print0(f"{args.data} has no {missing}: no kNN, no probe")
    return []


def print_top1(args: argparse.Namespace, task: str, how: str, predicted: Tensor, test: Images) -> None:
    """Top-1 over all images and for each class, printed, and with --json as a line there."""
    correct = predicted.cpu() == test.labels
    n = len(correct)
    hits = int(correct.sum())
    print0(f"{task} ({how}): top-1 {hits / n:.2%} ({hits} of {n})")
    by_class = {}
    for label in test.labels.unique():
        by_class[test.class_name(int(label))] = correct[test.labels == label].float().mean().item()
    worst = sorted(by_class, key=by_class.get)
    accuracies = ", ".join(f"{name} {by_class[name]:.1%}" for name in worst[:20])
    print0(f"  by class, the worst first: {accuracies}" + (", ..." if len(worst) > 20 else ""))
    if args.json:
        row = dict(
            checkpoint=args.checkpoint, untrained=args.untrained, data=args.data, holdout=args.holdout,
            labels_per_class=args.labels_per_class, seed=args.seed, task=task, how=how, top1=hits / n,
            images=n, by_class=by_class,
        )  # fmt: skip
        with open(args.json, "a") as file:
            print(json.dumps(row), file=file)


# ------------------------------------------------------------------------------------------------
# What stays: a classifier, features, pictures of neighbours


def save_classifier(args: argparse.Namespace, backbone: nn.Module, head: nn.Module, train: Images) -> None:
    """All that `predict` needs, tensors and plain types, in a new file."""
    known = {name: getattr(args, name) for name in ("arch", "stem", "width", "image_size")}
    content = dict(
        args=known | dict(data=args.data, mean=train.mean, std=train.std),
        classes=[train.class_name(int(label)) for label in train.labels.unique()],
        model=backbone.state_dict(),
        head=head.state_dict(),
    )
    write_new(args.save, content)


def predict(args: argparse.Namespace, content: dict[str, Any]) -> None:
    """Prints for each picture its path, class, and the class's probability, with tabs between them."""
    backbone = load_backbone(args, content)
    try:
        weights = dict(content["head"])
        classes = [str(name) for name in content["classes"]]
        head = new_classifier(torch.zeros(2, weights["1.weight"].shape[1]), len(classes), seed=0)
        if "0.running_mean" not in weights:  # of --official
            head[0] = nn.Identity()
        head.load_state_dict(weights)
        model = nn.Sequential(backbone, head.eval().to(args.device))
        model(torch.zeros(1, 3, args.image_size, args.image_size, device=args.device))
        assert {"image_size", "mean", "std"} <= content["args"].keys()
        assert all_finite(model.state_dict().values())
    except Exception as error:  # whatever a file may hold
        remedy = "write one with linear --save or finetune --save"
        fail(f"{args.checkpoint} holds no classifier ({type(error).__name__}: {error}): {remedy}")
    pictures = open_pictures(args)
    logits = extract_features(model, pictures, args.device, workers=args.workers)
    probability, label = logits.softmax(dim=1).max(dim=1)
    for file, p, i in zip(pictures.files, probability.tolist(), label.tolist()):
        print0(f"{file}\t{classes[i]}\t{p:.1%}")


def open_pictures(args: argparse.Namespace) -> Images:
    """The files of the command line; of a folder all below it. What can't be read is named, and left out."""
    files = []
    for name in args.pictures:
        if os.path.isdir(name):
            files += find_images(Path(name))[1]
        elif try_reading(name, limit=0) is not None:
            files.append(name)
        else:
            print0(f"warning: {name} can't be read, and is left out", sys.stderr)
    if args.pictures and not files:
        fail("no picture can be read: check the paths")
    return Images(files, None, args.image_size, mean=args.mean, std=args.std, files=files)


def print_neighbors(pictures: Images, features: Tensor, train: Images, bank: Tensor) -> None:
    """Of each picture the five nearest training images by cosine: file, or place among these; and class."""
    cosine, nearest = (unit(features) @ unit(bank).T).topk(min(5, len(bank)), dim=1)
    for file, values, indices in zip(pictures.files, cosine.tolist(), nearest.tolist()):
        print0(file)
        for value, i in zip(values, indices):
            name = train.files[i] if train.files else f"training image {i}"
            label = "" if train.labels is None else train.class_name(int(train.labels[i]))
            print0(f"  {value:.3f}\t{name}\t{label}")


def save_features(path: str, **parts: tuple[Tensor, Images]) -> None:
    """{"train": {"features": (M, D), "labels": (M,) or None, "files": [...]}, "test": ..., "classes": ...}"""
    content: dict[str, Any] = {}
    for name, (x, images) in parts.items():
        content[name] = dict(features=x.cpu(), labels=images.labels, files=images.files)
        content["classes"] = images.classes
    write_new(path, content)


def write_new(path: str, content: dict[str, Any]) -> None:
    if os.path.lexists(path):  # it may have come up since
        fail(f"{path} exists already: name a new file")
    with whole_file(Path(path)) as file:
        torch.save(content, file)
    print0(f"wrote {path}")


def save_neighbors(train: Images, test: Images, bank: Tensor, features: Tensor, path: Path) -> None:
    """A picture: ten test images on the left, and beside each its eight nearest training images.

    A green frame has the class of the image on the left, a red one another.
    """
    if not path.with_name("metrics.jsonl").exists():
        return print0(f"no {path}: it would not be in the folder of a run")
    shown = torch.linspace(0, len(test) - 1, min(10, len(test))).long()
    similarity = unit(features[shown]) @ unit(bank).T
    if test is train:  # without test images: each would be its own neighbour
        similarity[torch.arange(len(shown)), shown] = -2
    nearest = similarity.topk(min(8, len(bank)), dim=1).indices.cpu()
    rows = {}
    frames = []
    for row, (query, neighbours) in enumerate(zip(shown, nearest)):
        images = [test[None, query[None]][0].cpu(), train[None, neighbours][0].cpu()]
        blank = torch.full_like(images[0], 255)  # a gap
        label = None if test.labels is None else test.labels[query]
        name = "" if label is None else test.class_name(int(label))
        rows[f"{row + 1}. {name}"] = torch.cat([images[0], blank, images[1]])
        same = [False] * len(neighbours) if label is None else (train.labels[neighbours] == label).tolist()
        colour = "white" if label is None else "firebrick"
        frames.append(["white", "white", *("seagreen" if right else colour for right in same)])
    save_picture(path, rows, frames)
    print0(f"wrote {path}")


# ------------------------------------------------------------------------------------------------
# Flags

OURS = ["metrics.jsonl", "views.png", "neighbors.png"]
# What a checkpoint determines: another value would feed the network images that it does not know.
FIXED = ("arch", "stem", "width", "mean", "std")
TRAINING = ["--epochs", "--base-lr", "--batch-size", "--official", "--crop-min", "--save"]
IGNORED = {  # flags that a task does not look at
    "knn": TRAINING,
    "linear": ["--k", "--temperature"],
    "finetune": ["--k", "--temperature", "--official"],
    "neighbors": TRAINING + ["--k", "--temperature", "--json"],
    "predict": TRAINING + ["--k", "--temperature", "--json", "--data", "--labels-per-class", "--features"]
    + ["--holdout", "--seed", "--image-size", "--recipe", "--untrained"],
}


def build_parser() -> argparse.ArgumentParser:
    parser = start_parser("Evaluate a backbone by kNN, linear probe or fine-tuning.")
    flag = parser.add_argument
    many = in_range(int, 1, 10**6)
    rate = in_range(float, 0, 10**4)
    words = "'random' (untrained) or 'pixels' (no network)"
    flag("checkpoint", metavar="CHECKPOINT", help=f"a run's folder, a file, or one of the words {words}")
    flag("task", nargs="?", choices=[*IGNORED], help="default: knn, then linear")
    flag("pictures", nargs="*", metavar="PICTURE", help="of predict and neighbors: files or folders")
    flag("--untrained", action="store_true", help="the same network untrained, drawn with --seed, to compare")
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
    flag("--save", metavar="FILE", help="linear and finetune: write the classifier, for predict")
    flag("--features", metavar="FILE", help="write features, labels and file names of all images")
    flag("--json", metavar="FILE", help="append a line of JSON for each task")
    return parser


def get_args(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Arguments completed by what the checkpoint says, and its content ({} for 'random' and 'pixels')."""
    words = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    args = parser.parse_intermixed_args(words)
    content: dict[str, Any] = {}
    if args.checkpoint not in ("random", "pixels"):
        content = read_checkpoint(path_of(args.checkpoint))
    saved = content.get("args", {"arch": content["arch"]} if "arch" in content else {})
    if not isinstance(saved, dict):
        fail(f"{args.checkpoint} is not a checkpoint of train.py or the authors' code")
    data = args.data or str(saved.get("data", ""))
    if not data:
        fail(f"which images? {args.checkpoint} does not say: add --data")
    data = full_name(data)

    kept = [*FIXED, "data_dir", "image_size", "crop_min"]  # the run's own seed and the like are not ours
    usual = recipe_of(data, args.recipe).items()
    parser.set_defaults(**{name: value for name, value in usual if name in kept}, view_scale=1.0)
    official = ["--crop-min=0.08"] if args.official else []  # torchvision's default, which the authors use
    parser.error = lambda message: fail(f"{args.checkpoint} is damaged ({message}): take another one")
    trained = to_flags(saved, kept)
    args = parser.parse_intermixed_args([*trained, *official, *words])
    args.data = data
    if content:
        args.checkpoint = str(path_of(args.checkpoint))
    args.untrained |= args.checkpoint == "random"
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
    if args.data == ARRAYS:
        fail("the images came from a program: write them into a .npz file, and add --data FILE.npz")
    if "--recipe" in given and "data" in saved:
        fail(f"--recipe {args.recipe}, but the checkpoint has one: leave the flag out")
    if bool(args.pictures) != (args.task in ("predict", "neighbors")):
        fail("PICTURE is for predict and neighbors, which need one or more")
    if args.save and (args.task not in ("linear", "finetune") or args.checkpoint == "pixels"):
        fail("--save is for linear or finetune of a network: name one of them")
    check_outputs(args)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        fail("eval.py runs in one process: start it without torchrun")


def check_outputs(args: argparse.Namespace) -> None:
    """Stops where a file could not be written at the end, or would take the place of another."""
    outputs = {"--save": args.save, "--features": args.features, "--json": args.json}
    outputs = {flag: Path(path).absolute() for flag, path in outputs.items() if path is not None}
    for flag, path in outputs.items():
        if path.name in OURS or path.name.startswith("checkpoint"):
            fail(f"{flag} {path} is the name of a file of train.py: choose another name")
        if [other.resolve() for other in outputs.values()].count(path.resolve()) > 1:
            fail(f"{flag} {path} is also another output: choose another name")
        if flag != "--json" and os.path.lexists(path):
            fail(f"{flag} {path} exists already: name a new file")
        if not os.access(path.parent, os.W_OK) or path.is_dir():
            fail(f"{flag} {path} can't be written: name a file in a folder that can")
    if args.json and os.path.exists(args.json):
        if not os.path.isfile(args.json) or not os.access(args.json, os.W_OK):
            fail(f"--json {args.json} can't be appended to: name another file")
        with open(args.json, "rb") as file:
            content = file.read()
        if content and (content[:1] != b"{" or content[-1:] != b"\n"):
            fail(f"--json {args.json} is no file of JSON lines: name another one")


def main(argv: list[str] | None = None) -> None:
    """The whole command, for a shell, a notebook or a test."""
    try:
        with one_line_errors():
            args, content = get_args(argv)
            (predict if args.task == "predict" else evaluate)(args, content)
    except KeyboardInterrupt:
        fail("stopped by Ctrl-C; no file was left half written", status=130)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
