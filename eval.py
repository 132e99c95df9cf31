"""Evaluate a pretrained backbone by kNN, linear probe or fine-tuning; save and use a classifier.

    python eval.py runs/textures                             # kNN and linear probe
    python eval.py runs/textures --untrained                 # the same network, randomly initialized
    python eval.py runs/textures finetune --labels-per-class 10 --save classifier.pt
    python eval.py classifier.pt predict IMAGE ...           # use the classifier
    python eval.py checkpoint_0099.pth.tar --data IMAGENET   # the SimSiam authors' released checkpoints
    python eval.py pixels --data cifar10 knn                 # raw pixels, for comparison

Features come from the frozen backbone in eval mode, because BatchNorm in training mode would change the
network that is measured. Accuracy is over all test images after the last epoch; reporting the best epoch
would mean selecting on the test set. `bank` is always the features of the training images, (M, D).
"""

import argparse
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.utils import save_image

from simsiam import build_backbone, crop_and_flip, knn_predict, unit
from train import (
    Images, build_parser, check_shared_memory, default_k, extract_features, fail, full_name, learning_rate,
    load_backbone_weights, load_data, make_loader, normalize, number, read_checkpoint, read_files, recipe_of,
    schedule,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------
# From a checkpoint to a frozen backbone


def load_backbone(args: argparse.Namespace) -> nn.Module:
    """The backbone, frozen and in eval mode. Exits unless the checkpoint has all its tensors."""
    if args.checkpoint == "pixels":
        return nn.Flatten(1)  # the features are the pixels
    torch.manual_seed(args.seed)
    backbone, _ = build_backbone(args.arch, args.stem, args.width)
    if not args.untrained:
        load_backbone_weights(backbone, args.checkpoint)
    return backbone.eval().requires_grad_(False).to(args.device, memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------
# Protocols that train on labels


def few_labels(train: Images, per_class: int, seed: int) -> Tensor:
    """Indices of per_class random images of each class. Exits if a class is too small."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in train.labels.unique():
        of_class = order[train.labels[order] == label]
        if len(of_class) < per_class:
            fail(f"--labels-per-class {per_class}: {train.classes[label]} has only {len(of_class)} images")
        chosen.append(of_class[:per_class])
    return torch.cat(chosen)


def plan(
    train: Images, batch: int, args: argparse.Namespace
) -> tuple[list[tuple[Tensor, str]], list[Tensor]]:
    """Requests (see Images) and labels, (batch,), for all steps. Sets smaller than a batch are repeated."""
    repeated = torch.arange(len(train)).repeat(math.ceil(batch / len(train)))
    steps = range(args.epochs * (len(repeated) // batch))
    requests = [(repeated[i], seed) for i, seed in schedule(len(repeated), batch, args.seed, steps)]
    return requests, [train.labels[indices] for indices, _ in requests]


def cropped_batches(
    images: Images, requests: list[tuple[Tensor, str]], args: argparse.Namespace
) -> Iterator[Tensor]:
    """Yields randomly cropped, flipped and normalized images for every step, (batch, 3, size, size)."""
    for batch, _ in make_loader(images, requests, args.workers):
        x = batch.to(args.device).float() / 255
        # From files, the loader has already cut two crops; the first is enough here.
        x = x[:, 0] if x.ndim == 5 else crop_and_flip(x, images.size, args.min_scale)
        yield normalize(x, images)


def fit(
    model: nn.Module, batches: Iterable[Tensor], labels: list[Tensor], peak_lr: float,
    clip: float = math.inf, after_step: Callable[[int], None] = lambda step: None,
) -> None:  # fmt: skip
    """Trains the model on batches and their labels, (B,) each, by SGD with cosine decay of the lr.

    No weight decay. clip: maximum gradient norm. after_step: called with the number of steps done.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=peak_lr, momentum=0.9)
    for step, (x, label) in enumerate(zip(batches, labels)):
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(labels), peak_lr, warmup_steps=0)
        loss = F.cross_entropy(model(x), label.to(x.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()
        after_step(step + 1)


def new_head(bank: Tensor, classes: int, seed: int) -> nn.Sequential:
    """A linear classifier, (N, D) to (N, classes), on features standardized like the bank, (M, D)."""
    # Standardizing does not make a linear classifier more expressive, but lets one learning rate suit
    # every network. An untrained network's features are hundreds of times smaller, so eps is tiny too.
    standardize = nn.BatchNorm1d(bank.shape[1], affine=False, eps=1e-12).eval()
    variance, mean = torch.var_mean(bank, dim=0, correction=0)
    standardize.running_mean = mean.cpu()
    # Clamped at a hundredth of the mean variance, because constant features have zero variance.
    standardize.running_var = variance.clamp_min(variance.mean() / 100).cpu()
    torch.manual_seed(seed)
    linear = nn.Linear(bank.shape[1], classes)
    linear.weight.data.normal_(0, 0.01)  # as in the authors' code
    linear.bias.data.zero_()
    return nn.Sequential(standardize, linear).to(bank.device)


def linear_probe(backbone: nn.Module, train: Images, bank: Tensor, args: argparse.Namespace) -> nn.Module:
    """Trains a linear classifier on the bank, whose features were computed once without augmentation.

    --augment instead draws random crops in every epoch and uses SGD with lr 30 on raw features (App. A).
    """
    batch = args.batch_size or 256
    requests, labels = plan(train, batch, args)
    head = new_head(bank, len(train.classes), args.seed)
    base_lr = 1.0
    batches: Iterable[Tensor] = (bank[indices] for indices, _ in requests)
    if args.augment:
        head[0] = nn.Identity()
        base_lr = 30.0
        batches = (backbone(x) for x in cropped_batches(train, requests, args))
    if args.base_lr is not None:
        base_lr = args.base_lr
    fit(head, batches, labels, base_lr * batch / 256)
    return head


def finetune(
    backbone: nn.Module, train: Images, bank: Tensor, test: Images, args: argparse.Namespace
) -> nn.Module:
    """Trains the backbone in place and a linear classifier on top of it. Returns the classifier."""
    batch = args.batch_size or 64
    base_lr = 0.1 if args.base_lr is None else args.base_lr
    requests, labels = plan(train, batch, args)
    head = new_head(bank, len(train.classes), args.seed)
    # First the head alone: the gradients of an untrained head would damage the backbone.
    fit(head, (bank[indices] for indices, _ in requests), labels, batch / 256)

    model = nn.Sequential(backbone.requires_grad_(True), head)
    # BN keeps its statistics from pretraining, because few labeled images give worse ones. An untrained
    # network has none to keep, and the head's standardization has to follow its changing features.
    model.train(mode=args.untrained)

    def report(step: int) -> None:
        if step * 10 // len(labels) > (step - 1) * 10 // len(labels):  # ten times
            scores = extract_features(model, test, args.device, workers=args.workers)  # (N, classes)
            accuracy = (scores.argmax(dim=1).cpu() == test.labels).float().mean()
            epoch = round(step * args.epochs / len(labels))
            print(f"  epoch {epoch}/{args.epochs}: top-1 {accuracy:.2%}", flush=True)

    # Gradients are clipped, because this lr would be far too large for the small pretrained weights.
    crops = cropped_batches(train, requests, args)
    fit(model, crops, labels, base_lr * batch / 256, clip=1.0, after_step=report)
    model.eval().requires_grad_(False)
    return head


# ------------------------------------------------------------------------------------------------
# Everything together


def evaluate(args: argparse.Namespace) -> None:
    """Runs the tasks and prints their accuracy. Exits if labels are needed and there are none."""
    train, test = load_data(args)
    check_shared_memory(train, args.batch_size or 256, args.workers)
    backbone = load_backbone(args)
    options = dict(device=args.device, workers=args.workers)
    if test is None:
        if not args.features or args.task:
            fail(f"{args.data} has no labeled test images: use --holdout if labeled, else --features alone")
        torch.save(dict(train=extract_features(backbone, train, **options).cpu()), args.features)
        return
    if args.labels_per_class:
        train = train.subset(few_labels(train, args.labels_per_class, args.seed))
    bank = extract_features(backbone, train, **options)  # (M, D)
    features = extract_features(backbone, test, **options)  # (N, D)
    print(f"{args.data}: {len(train)} training and {len(test)} test images, {bank.shape[1]} features")
    if Path(args.checkpoint).is_dir() and not (args.untrained or args.labels_per_class):
        save_neighbors(Path(args.checkpoint, "neighbors.png"), train, test, bank, features)
    for task in [args.task] if args.task else ["knn", "linear"]:
        name = task
        if task == "knn":
            k = args.k or default_k(train.labels)
            predicted = knn_predict(features, bank, train.labels.to(bank.device), k, args.temperature)
            name = f"knn (k={k}, temperature={args.temperature})"
        elif task == "linear":
            head = linear_probe(backbone, train, bank, args)
            predicted = head(features).argmax(dim=1)
        else:
            head = finetune(backbone, train, bank, test, args)
            bank = extract_features(backbone, train, **options)
            features = extract_features(backbone, test, **options)
            predicted = head(features).argmax(dim=1)
        print_accuracy(name, predicted.cpu() == test.labels, test)
        if args.save and task != "knn":
            save_classifier(args, backbone, head, train)
    if args.features:
        labels = dict(train_labels=train.labels, test_labels=test.labels)
        torch.save(dict(train=bank.cpu(), test=features.cpu(), **labels), args.features)


def print_accuracy(name: str, correct: Tensor, test: Images) -> None:
    """Prints the accuracy over all test images and that of the ten worst classes; correct: bool, (N,)."""
    print(f"{name}: top-1 {correct.float().mean():.2%} of {len(test)} test images")
    by_class = {
        test.classes[label]: correct[test.labels == label].float().mean().item()
        for label in test.labels.unique()
    }
    worst = sorted(by_class, key=by_class.get)[:10]
    print("  worst classes: " + ", ".join(f"{label} {by_class[label]:.1%}" for label in worst))


def save_neighbors(path: Path, train: Images, test: Images, bank: Tensor, features: Tensor) -> None:
    """Draws ten test images, and their eight nearest training images framed green (same class) or red."""
    shown = torch.linspace(0, len(test) - 1, min(10, len(test))).long()
    nearest = (unit(features[shown]) @ unit(bank).T).topk(min(8, len(bank)), dim=1).indices.cpu()
    tiles = []
    for i, neighbors in zip(shown, nearest):
        tiles.append(framed(test.plain(i[None])[0], "white"))
        for image, label in zip(train.plain(neighbors), train.labels[neighbors]):
            tiles.append(framed(image, "green" if label == test.labels[i] else "red"))
    try:
        save_image(torch.stack(tiles), path, nrow=nearest.shape[1] + 1, pad_value=1)
        print(f"wrote {path}")
    except OSError as error:  # the folder may be read-only; the accuracy is still printed
        print(f"{path} cannot be written ({error})")


def framed(image: Tensor, color: str) -> Tensor:
    """Maps uint8 (3, S, S) to float (3, 104, 104) in [0, 1], with a frame of that color."""
    rgb = torch.tensor(dict(white=(1.0, 1.0, 1.0), green=(0.2, 0.6, 0.3), red=(0.7, 0.1, 0.1))[color])
    tile = rgb.view(3, 1, 1).expand(3, 104, 104).clone()
    tile[:, 4:-4, 4:-4] = F.interpolate(image[None] / 255, 96, mode="nearest")[0]
    return tile


# ------------------------------------------------------------------------------------------------
# Saving and using a classifier


def save_classifier(args: argparse.Namespace, backbone: nn.Module, head: nn.Module, train: Images) -> None:
    """Saves everything that `predict` needs."""
    kept = {name: getattr(args, name) for name in ("arch", "stem", "width", "image_size", "data", "holdout")}
    content = dict(
        args=kept | dict(mean=train.mean, std=train.std), classes=train.classes,
        backbone=backbone.state_dict(), head=head.state_dict(),
    )  # fmt: skip
    torch.save(content, args.save)
    print(f"wrote {args.save}; next: python eval.py {args.save} predict IMAGE ...")


def predict(args: argparse.Namespace, checkpoint: dict[str, Any]) -> None:
    """Prints path, class and probability of each image, separated by tabs. Skips unreadable files."""
    if "head" not in checkpoint:
        fail(f"{args.checkpoint} is not a classifier: create one with linear --save or finetune --save")
    classes = checkpoint["classes"]
    feature_dim = checkpoint["head"]["1.weight"].shape[1]
    head = new_head(torch.zeros(2, feature_dim), len(classes), seed=0)  # its values are loaded below
    if "0.running_mean" not in checkpoint["head"]:
        head[0] = nn.Identity()  # trained with --augment
    head.load_state_dict(checkpoint["head"])
    model = nn.Sequential(load_backbone(args), head.to(args.device))
    source, good = read_files(args.images, args.image_size)
    paths = [path for path, is_good in zip(args.images, good) if is_good]
    images = Images(source, None, classes, args)
    check_shared_memory(images, 0, args.workers)
    probabilities = extract_features(model, images, args.device, workers=args.workers).softmax(dim=1)
    for path, row in zip(paths, probabilities):
        print(f"{path}\t{classes[row.argmax()]}\t{row.max():.1%}")


# ------------------------------------------------------------------------------------------------
# Command line

FROM_CHECKPOINT = ("arch", "stem", "width", "image_size", "mean", "std", "min_scale", "holdout")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of eval.py, the most important first."""
    flag = parser.add_argument
    flag("checkpoint", metavar="CHECKPOINT", help="a run's folder, a checkpoint file, or 'pixels'")
    tasks = ["knn", "linear", "finetune", "predict"]
    flag("task", nargs="?", choices=tasks, help="default: knn, then linear")
    flag("images", nargs="*", metavar="IMAGE", help="for predict: image files")
    flag("--data", type=full_name, help="data set, as in train.py (default: the run's data set)")
    flag("--untrained", action="store_true", help="the same network, randomly initialized from --seed")
    flag("--labels-per-class", type=number(int, 1), metavar="N", help="use only N labeled images per class")
    flag("--save", metavar="FILE", help="write the classifier of linear or finetune, for predict")
    flag("--features", metavar="FILE", help="write features and any labels (finetune: after fine-tuning)")

    flag = parser.add_argument_group("protocols").add_argument
    flag("--k", type=number(int, 1), metavar="N", help="neighbors (default: 200, at most the smallest class)")
    flag("--temperature", type=number(float, 0.001), default=0.2, metavar="T", help="kNN (default: 0.2)")
    flag("--augment", action="store_true", help="linear probe with random crops and SGD, lr 30 (App. A)")
    flag("--epochs", type=number(int, 1), default=90, metavar="N", help="training epochs (default: 90)")
    flag("--batch-size", type=number(int, 2), metavar="N", help="default: 256 for linear, 64 for finetune")
    flag("--base-lr", type=number(float, 0), metavar="X", help="lr at batch 256 (linear 1, finetune 0.1)")
    flag("--min-scale", type=number(float, 0.01), metavar="X", help="smallest crop (--augment: 0.08)")


def get_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Returns the arguments, with defaults from the checkpoint, and the checkpoint's contents."""
    parser = build_parser("Evaluate features by kNN, linear probe or fine-tuning.", add_flags)
    args = parser.parse_intermixed_args(argv)
    checkpoint = {} if args.checkpoint == "pixels" else read_checkpoint(args.checkpoint)
    saved = checkpoint.get("args", {"arch": checkpoint["arch"]} if "arch" in checkpoint else {})
    data = args.data or saved.get("data")
    if not data:
        fail(f"{args.checkpoint} does not name its data set: add --data")
    usual = recipe_of(args.recipe, data) | saved
    if args.augment:
        usual["min_scale"] = 0.08  # torchvision's default, which the authors use
    defaults = {name: usual[name] for name in FROM_CHECKPOINT if name in usual}
    parser.set_defaults(**defaults, data=data, view_scale=1.0)  # crops here have the size of an image
    args = parser.parse_intermixed_args(argv)
    for file in (args.save, args.features):
        if file and (os.path.exists(file) or not Path(file).absolute().parent.is_dir()):
            fail(f"{file} exists, or its folder does not: choose a new file in an existing folder")
    if args.save and (args.checkpoint == "pixels" or args.task == "knn"):
        fail("--save needs a network and a classifier: use a checkpoint, with linear or finetune")
    if (args.task == "predict") != bool(args.images):
        fail("predict needs image files; other tasks take none")
    return args, checkpoint


def main(argv: list[str] | None = None) -> None:
    """Runs the command. From a notebook or a test, pass the arguments as a list."""
    args, checkpoint = get_args(argv)
    if args.task == "predict":
        predict(args, checkpoint)
    else:
        evaluate(args)


if __name__ == "__main__":
    main()
