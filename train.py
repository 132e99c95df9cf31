"""Pretrain SimSiam, on a laptop's CPU, one GPU or many.

    python train.py                                 # textures, built in: about two minutes on two CPU cores
    python train.py --no-stop-gradient              # without the stop-gradient: watch it collapse
    python train.py cifar10                         # App. D, for one GPU
    torchrun --nproc_per_node=8 train.py PHOTOS     # a folder of images, the ImageNet recipe, eight GPUs
    python train.py --resume                        # go on with the latest run exactly where it stopped

Every epoch prints a line: loss (-1 is its minimum), spread (1 healthy, 0 collapsed), effective rank of the
backbone's features, and every few epochs their kNN top-1. OUT, by default runs/DATA, receives checkpoint.pt,
metrics.jsonl and views.png. Every random number follows from --seed and the place where it is used, such as the
step, the rank and the image; nothing depends on what ran before: that is what makes --resume exact.
"""

import argparse
import collections
import contextlib
import copy
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NoReturn, TextIO

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms import v2

from simsiam import SimSiam, build_backbone, effective_rank, knn_predict, simsiam_loss, spread

# ------------------------------------------------------------------------------------------------
# Recipes and arguments

# The recipe of a data set holds the defaults of its flags. lr = base_lr * batch_size / 256.
# fmt: off
IMAGENET = dict(
    arch="resnet50", stem="imagenet", width=16, image_size=224, layers=3, hidden=2048, dim=2048,  # Sec. 3
    epochs=100, batch_size=512, base_lr=0.05, weight_decay=1e-4,  # Sec. 3
    crop_min=0.2,  # App. A: RandomResizedCrop with scale in [0.2, 1]
    blur=0.5,  # App. A has the blur's sigma; its probability stands in the authors' code only
    knn_every=10,  # ours: each time costs one more pass over the training set
    # ImageNet's customary ones; the std is not that of its pixels (torchvision's issue 1439). None: measure them.
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
# fmt: on
RECIPES = {"textures": TEXTURES, "cifar10": CIFAR, "cifar100": CIFAR, "fashion-mnist": FASHION}
COST = "cifar10, cifar100: 3e17 floating-point operations, 2 hours at 40 TFLOP/s; an estimate, not run by us."

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
# Flags that count only where they are given: what a checkpoint says of them does not.
ONLY_GIVEN = ["resume", "export", "compile", "tensorboard", "device", "benchmark"]
# What a resumed run may change, for it does not define the training (amp and compile only round differently).
MAY_CHANGE = [*ONLY_GIVEN, "data_dir", "out", "knn_every", "save_every", "amp", "workers"]


def process() -> tuple[int, int]:
    """Rank and world size, as torchrun set them. What is left of an earlier torchrun counts for nothing."""
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    several = rank.isdecimal() and world.isdecimal() and int(world) > 1
    return (int(rank), int(world)) if several else (0, 1)


def say(message: str, file: TextIO | None = None, end: str = "\n") -> None:
    """Prints once, however many processes there are."""
    if process()[0] == 0:
        code = getattr(file or sys.stdout, "encoding", None) or "utf-8"
        message = message.encode(code, "backslashreplace").decode(code)  # file names may be any bytes
        with contextlib.suppress(OSError, ValueError):  # a closed terminal or pipe does not end a training
            print(message, file=file, end=end, flush=True)


def stop(message: str, status: int = 2) -> NoReturn:
    """Ends the program for something the user can mend: one line on stderr, no traceback."""
    # A mistake is made on all ranks, and told once a machine; a fault happens on one of them.
    if status == 1 or process()[1] == 1 or os.environ.get("LOCAL_RANK", "0") == "0":
        print("error:", *message.splitlines(), file=sys.stderr, flush=True)
    sys.exit(status)


def reason(error: Exception, line: int = 0) -> str:
    """One line of what an error says, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[line]


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from low to high."""

    def parse(text: str) -> float:
        if not low <= (value := kind(text)) <= high:  # nan neither
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} from {low} to {high}"  # argparse says: invalid ... value
    return parse


def command_line(description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser whose every complaint is one line."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given is not there
        allow_abbrev=False,
    )
    parser.error = lambda message: stop(f"{message}; see --help")
    return parser


def devices() -> list[str]:
    """What --device may be here, the best first."""
    if not torch.accelerator.is_available():
        return ["cpu"]
    kind = torch.accelerator.current_accelerator().type
    return [kind, *(f"{kind}:{i}" for i in range(torch.accelerator.device_count())), "cpu"]


def build_parser() -> argparse.ArgumentParser:
    recipes = (RECIPES | {"a folder": IMAGENET}).items()
    lines = [f"{name}: " + " ".join(f"{k}={v}" for k, v in recipe.items()) for name, recipe in recipes]
    title = "Pretrain SimSiam. The defaults depend on DATA and stand at the end."
    parser = command_line(title, "\n".join([*lines, COST]))
    flag, switch = parser.add_argument, dict(action="store_true")
    size, share, rate = number(int, 1, 65536), number(float, 0, 1), number(float, 0, 1000)
    flag("data", nargs="?", metavar="DATA", help=f"{', '.join(RECIPES)}, or a folder (default: textures)")
    flag("--data-dir", help="for downloaded data sets (default: data)")
    flag("--holdout", **switch, help="test on a tenth of the training set kept apart, not on the test set")
    flag("--out", help="for the results (default: runs/DATA, or the next free runs/DATA-2, ...)")
    flag("--resume", **switch, help="continue the run in --out, or the latest one, by its own flags")
    flag("--export", metavar="FILE", help="at the end write the backbone alone, for plain torchvision")
    # model
    flag("--arch", help="convnet, or a ResNet of torchvision by name")
    flag("--stem", choices=["imagenet", "cifar"], help="of a ResNet, for 224 or for 32 pixels")
    flag("--width", type=number(int, 1, 1024), help="of the convnet's first layer")
    flag("--dim", type=size, help="output dimension d (App. B)")
    flag("--hidden", type=size, help="width of the projector's hidden layers (Sec. 3)")
    flag("--layers", type=number(int, 1, 16), help="of the projector: 3 (Sec. 3), 2 (App. D)")
    # optimization
    flag("--epochs", type=number(int, 1, 10**6))
    flag("--batch-size", type=number(int, 2, 10**6), help="TOTAL over all processes (Table 2)")
    flag("--base-lr", type=rate, help="for a batch of 256; lr = base lr * batch / 256 (Sec. 3)")
    flag("--weight-decay", type=rate, help="on all parameters, BN and biases too (App. A)")
    flag("--warmup-epochs", type=number(int, 0, 10**6), help="default: 10 from batch 1024 on (Table 2)")
    flag("--decay-predictor-lr", **switch, help="cosine for h too (Table 1, baseline)")
    flag("--seed", type=number(int, 0, 2**63 - 1), help="default: 0")
    # images and augmentation
    flag("--image-size", type=number(int, 8, 4096), help="side of a view in pixels")
    flag("--mean", type=share, nargs=3, help="of the pixels (default: measured; folders: ImageNet's)")
    flag("--std", type=number(float, 1e-3, 1), nargs=3)
    flag("--crop-min", type=number(float, 0.01, 1), help="smallest area of a crop, as a share (App. A)")
    flag("--blur", type=share, help="probability of the Gaussian blur (0.5 in the authors' code)")
    # ablations: all off by default
    flag("--no-stop-gradient", **switch, help="Fig. 2: it collapses")
    flag("--predictor", choices=["mlp", "none", "fixed"], help="Table 1a, b")
    flag("--predictor-hidden", type=size, help="default: a quarter of --dim (App. B)")
    flag("--bn", choices=["none", "hidden", "default", "all"], help="in the heads: Table 3a (with 10 epochs of warmup), b, c, d")
    flag("--affine", **switch, help="scale and shift in the BN on z (Sec. 4.4)")
    flag("--similarity", choices=["cosine", "cross-entropy"], help="Sec. 4.5")
    flag("--asymmetric", **switch, help="predict one way only (Sec. 4.6)")
    flag("--pairs", type=number(int, 1, 16), help="of views an image; 2: the asymmetric 2x of Sec. 4.6")
    flag("--alternate", type=number(int, 1, 10**6), help="steps that share target weights (Sec. 5.2)")
    flag("--eta-momentum", type=number(float, 0, 0.999), help="of targets (Sec. 5.2: 0.8, without h)")
    # system
    flag("--knn-every", type=number(int, 0, 10**6), help="epochs between kNN evaluations; 0: none")
    flag("--save-every", type=number(int, 1, 10**6), help="epochs between checkpoints (default: 1)")
    flag("--amp", choices=["auto", "off", "bf16", "fp16"], help="auto: bf16 where hardware has it")
    flag("--compile", **switch, help="torch.compile: slow to start; no faster on our CPU, not tried on a GPU")
    flag("--device", choices=devices(), help="default: the first of these")
    flag("--workers", type=number(int, 0, 256), help="that decode a folder's images (default: up to 4)")
    flag("--tensorboard", **switch, help="write the metrics for TensorBoard too")
    flag("--benchmark", type=number(int, 1, 10**6), metavar="N", help="time N steps and exit")
    return parser


def get_args(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """Checked arguments, and the checkpoint to resume from or None. Flags over checkpoint over recipe."""
    given = vars(build_parser().parse_args(argv))
    for name in ("data", "out"):
        if given.get(name) == "":
            stop(f"{name.upper()} is empty: name a data set or a folder")
    if "data" in given and given["data"] not in RECIPES:
        given["data"] = os.path.realpath(given["data"])  # to be found again from another folder
    out, checkpoint = choose_run(given)
    saved = {k: v for k, v in checkpoint["args"].items() if k not in ONLY_GIVEN} if checkpoint else {}
    data = str(given.get("data", saved.get("data", "textures")))
    recipe = RECIPES.get(data, IMAGENET) | dict(
        data=data, data_dir="data", holdout=False, export=None, seed=0, warmup_epochs=None,
        decay_predictor_lr=False, no_stop_gradient=False, predictor="mlp", predictor_hidden=None,
        bn="default", affine=False, similarity="cosine", asymmetric=False, pairs=1, alternate=1,
        eta_momentum=0.0, save_every=1, amp="auto", compile=False, tensorboard=False, benchmark=0,
        workers=min(4, os.cpu_count() or 1), device=devices()[0],
    )  # fmt: skip
    for name, value in saved.items():
        if recipe.get(name) is not None and type(value) is not type(recipe[name]):
            stop(f"{out}/checkpoint.pt is damaged, its {name} is {value!r}: name another --out")
    for name in given.keys() & saved.keys() - set(MAY_CHANGE):
        was, now = saved[name], given[name]
        if was != now and name == "data" and not {was, now} & RECIPES.keys():
            say(f"warning: {out} ran on {was}, and goes on with {now}", sys.stderr)
        elif was != now:
            stop(f"--resume: {out} runs with {name} {was}, not {now}: leave it out or choose another --out")
    fixed = dict(out=str(out), launch=os.environ.get("TORCHELASTIC_RUN_ID", "none"))
    args = argparse.Namespace(**(recipe | saved | given | fixed))
    if args.warmup_epochs is None:
        args.warmup_epochs = 10 if args.batch_size >= 1024 else 0
    check_args(args, given)
    return args, checkpoint


def check_args(args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Stops on values that are each right by themselves, but not together or not here."""
    world, kind = process()[1], args.device.split(":")[0]
    compilers = [os.environ.get("CXX", "c++"), "g++", "clang++", "cl"]
    for wrong, message in (
        (args.batch_size % world or args.batch_size < 2 * world,
         f"--batch-size {args.batch_size} is the total of {world} processes: take two or more for each"),
        (args.warmup_epochs >= args.epochs,
         f"--warmup-epochs {args.warmup_epochs} leaves nothing of --epochs {args.epochs}: take fewer"),
        (args.amp == "fp16" and kind != "cuda",
         f"--amp fp16 needs CUDA, and this is {kind}: choose bf16 or off"),
        (args.compile and kind == "cpu" and not any(map(shutil.which, compilers)),
         "--compile needs a C++ compiler here: install g++, or leave it out"),
        (args.arch == "convnet" and "stem" in given,
         "--stem is for ResNets, and --arch is convnet: drop one"),
        (args.arch != "convnet" and "width" in given,
         f"--width is convnet's, and --arch is {args.arch}: drop one"),
        (("mean" in given) != ("std" in given),
         "--mean and --std go together: give both or none"),
        (args.eta_momentum and (world, args.alternate, args.pairs, args.similarity) != (1, 1, 1, "cosine"),
         "--eta-momentum is for one process: leave out --alternate, --pairs, --similarity and torchrun"),
        (args.no_stop_gradient and (args.eta_momentum or args.alternate > 1),
         "--no-stop-gradient: targets of --alternate and --eta-momentum have no gradient; drop one"),
        (args.tensorboard and not importlib.util.find_spec("tensorboard"),
         "--tensorboard needs a package: pip install tensorboard, or leave it out"),
        (args.benchmark and {"out", "resume", "export"} & given.keys(),
         "--benchmark writes nothing: leave out --out, --resume and --export"),
    ):  # fmt: skip
        if wrong:
            stop(message)
    check_new_file("--export", args.export)


def check_new_file(flag: str, path: str | None) -> None:
    if path is not None and (Path(path).exists() or not Path(path).absolute().parent.is_dir()):
        stop(f"{flag} {path} exists already, or its folder does not: name a new file")


def choose_run(given: dict[str, Any]) -> tuple[Path, dict[str, Any] | None]:
    """OUT, and its checkpoint if that run is to go on.

    OUT is --out; or else the first free one of runs/DATA, runs/DATA-2, ..., or with --resume the latest one.
    """
    name = Path(given.get("data", "textures")).name or "data"
    pattern = re.escape(name) + r"(-\d+)?" if "data" in given else ".*"
    found = [path for path in Path("runs").glob("*/checkpoint.pt") if re.fullmatch(pattern, path.parent.name)]
    latest = max(found, key=lambda path: path.stat().st_mtime).parent if found else Path("runs", name)
    again = Path(given["out"]) if "out" in given else latest
    # torchrun --max-restarts gives the same command again after a crash: go on with what it began itself.
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if "resume" in given or restarted and (again / "checkpoint.pt").exists():
        checkpoint = read_checkpoint(again / "checkpoint.pt")
        parts = {"model", "optimizer", "step"} <= checkpoint.keys()
        if not (parts and isinstance(checkpoint.get("args"), dict)):
            stop(f"{again / 'checkpoint.pt'} is not a checkpoint of train.py: name another --out")
        launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # "none" is torchrun's word for no --rdzv-id
        if "resume" in given or launch != "none" and checkpoint["args"].get("launch") == launch:
            return again, checkpoint

    def used(out: Path) -> bool:
        return out.exists() and (not out.is_dir() or any(path.name[0] != "." for path in out.iterdir()))

    if "out" not in given:
        names = (f"{name}-{i}" if i > 1 else name for i in range(1, 10**6))
        return next(out for out in (Path("runs", name) for name in names) if not used(out)), None
    if used(again):
        hint = " (restarts do so only with --standalone or --rdzv-id)" if restarted else ""
        stop(f"--out {again} is in use: add --resume to continue that run{hint}, or name a new folder")
    return again, None


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
# Data: uint8 until it is on the device


class Images(torch.utils.data.Dataset):
    """source: images (N, 3, H, W) uint8 in memory, or a list of N files to be decoded when asked for."""

    def __init__(self, source: Tensor | list[str], labels: Tensor | None, size: int = 0, crop_min: float = 1):
        self.source, self.labels = source, labels
        # For files. Crops are cut here and not on the device, so that images of all sizes fit one tensor.
        resize = v2.RandomResizedCrop(size, scale=(crop_min, 1.0), antialias=True)
        self.crop = v2.Compose([resize, v2.RandomHorizontalFlip()])
        self.centre = v2.Compose([v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, request: tuple[str, Tensor]) -> Tensor:
        """(B, 3, H, W) uint8 at the B indices; of files, if there is a key, two crops: (B, 2, 3, S, S)."""
        key, indices = request
        if isinstance(self.source, Tensor):
            return self.source[indices]
        images = []
        for place, index in enumerate(indices.tolist()):
            image = decode(self.source[index])
            torch.manual_seed(seed_of(key, place, index))  # so the number of workers changes nothing
            images.append(torch.stack([self.crop(image), self.crop(image)]) if key else self.centre(image))
        return torch.stack(images)

    def subset(self, indices: Tensor) -> "Images":
        part, in_memory = copy.copy(self), isinstance(self.source, Tensor)
        part.source = self.source[indices] if in_memory else [self.source[i] for i in indices.tolist()]
        part.labels = None if self.labels is None else self.labels[indices]
        return part


def decode(path: str) -> Tensor:
    """uint8 RGB (3, H, W), upright, from whatever the file holds: gray, palette, CMYK, 16 bits, alpha."""
    with Image.open(path) as file:
        try:
            image = ImageOps.exif_transpose(file)
        except OSError:  # the file can't be read
            raise
        except Exception:  # its EXIF data can't
            image = file.copy()
        if image.mode.startswith("I"):  # 16 bits; converted as they are, all above 255 would turn white
            image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        return v2.functional.pil_to_tensor(image.convert("RGB"))


def complaint(path: str) -> str | None:
    """What is wrong with an image file, or None."""
    try:
        with Image.open(path) as file:
            file.draft("RGB", (8, 8))  # reads all of a JPEG, but decodes it at an eighth: quicker by far
            file.load()
    except Exception as error:  # Pillow's plugins raise all kinds
        return f"{path} ({type(error).__name__})"


def load_data(args: argparse.Namespace) -> tuple[Images, Images | None]:
    """Training and test images of args.data. Sets args.mean and args.std, if None, to what they are."""
    if args.data == "textures":
        train, test = Images(*textures(5000, seed=0)), Images(*textures(2000, seed=1))
    elif args.data in RECIPES:
        train, test = (load_torchvision(args.data, args.data_dir, is_train) for is_train in (True, False))
    else:
        train, test = load_folder(args)
    if args.holdout:
        if len(train) < 20:
            stop(f"--holdout: a tenth of {len(train)} images is too few; leave it out")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))  # whatever the seed
        test, train = train.subset(order[: len(train) // 10]), train.subset(order[len(train) // 10 :])
    if args.mean is None or args.std is None:
        # Per pixel, over the training set. For CIFAR-10's std that gives (0.2470, 0.2435, 0.2616); the often
        # copied (0.2023, 0.1994, 0.2010) is the mean over images of each one's own.
        stats = [torch.std_mean(train.source[:, c].float() / 255, correction=0) for c in range(3)]
        args.std, args.mean = ([value.item() for value in column] for column in zip(*stats))
    return train, test


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
    angle, period = draw(-0.3, 0.3), draw(4.5, 7.5)  # radians, pixels
    u = (x * angle.cos() + y * angle.sin()) / period + draw(0, 1)  # (count, size, size), in periods
    v = (y * angle.cos() - x * angle.sin()) / period + draw(0, 1)
    radius = torch.hypot(u + draw(-1, 1), v + draw(-1, 1))
    turn = torch.atan2(v + draw(-0.5, 0.5), u + draw(-0.5, 0.5)) / (2 * math.pi) * (period + 4).round()
    coarse = draw(-2, 2, 1, 12, 12), draw(-2, 2, 1, 4, 16)
    noise, streaks = (F.interpolate(grid, size=size, mode="bicubic")[:, 0] for grid in coarse)
    patterns = [  # for the images i; positive inside the pattern
        lambda i: wave(u[i]),  # stripes
        lambda i: wave(u[i]) * wave(v[i]),  # checks
        lambda i: 0.6 - torch.hypot(saw(0.6 * u[i] + (0.6 * v[i]).floor() % 2 / 2), saw(0.6 * v[i])),  # dots
        lambda i: wave(radius[i]),  # rings
        lambda i: torch.maximum(line(u[i]), line(v[i])),  # grids
        lambda i: noise[i],  # grains
        lambda i: wave(u[i] + 0.35 * (1 - 2 * saw(v[i]).abs())),  # zigzags
        lambda i: torch.maximum(line(2 * v[i]) / 2, line(u[i] + (2 * v[i]).floor() % 2 / 2)),  # bricks
        lambda i: streaks[i],  # streaks
        lambda i: wave(turn[i]),  # rays
    ]
    labels, pattern = torch.arange(count) % len(patterns), torch.empty(count, size, size)
    for label, function in enumerate(patterns):
        pattern[labels == label] = torch.tanh(4 * function(labels == label))  # soft edges
    shade = (draw(-0.3, 0.3) * x + draw(-0.3, 0.3) * y) / size + draw(0.4, 0.6)
    tint = draw(0.7, 1.3, 3, 1, 1) * draw(0.2, 0.4, 1, 1, 1)
    images = shade.unsqueeze(1) + draw(-0.04, 0.04, 3, 1, 1) + pattern.unsqueeze(1) * tint
    images += 0.03 * torch.randn(images.shape, generator=generator)
    return (images.clamp(0, 1) * 255).to(torch.uint8), labels


def load_torchvision(name: str, root: str, is_train: bool) -> Images:
    """A data set of torchvision, as RGB."""
    sets = torchvision.datasets
    kind = {"cifar10": sets.CIFAR10, "cifar100": sets.CIFAR100, "fashion-mnist": sets.FashionMNIST}[name]
    later = dist.is_initialized() and os.environ["LOCAL_RANK"] != "0"
    if later:  # one process of each machine downloads, and the others come after it
        dist.barrier()
    try:
        # torchvision unpacks only archives with its own mirror's checksums; others hold the same content.
        for archive in Path(root, "FashionMNIST", "raw").glob("*.gz"):
            if name == "fashion-mnist" and not (whole := archive.with_suffix("")).exists():
                try:
                    sets.utils.extract_archive(str(archive))
                except Exception:  # a damaged archive leaves a part, which would pass for the whole
                    whole.unlink(missing_ok=True)
                    raise
        dataset = kind(root, train=is_train, download=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:  # no network, no space, damaged
        gz = "FashionMNIST/raw, with the four .gz files in it,"
        archive = gz if name == "fashion-mnist" else Path(kind.url).name
        why = f"{name} is not in {root}, and no download ({reason(error)})"
        stop(f"{why}: put {archive} into --data-dir {root}")
    if dist.is_initialized() and not later:
        dist.barrier()
    images = torch.as_tensor(dataset.data)  # (N, H, W) or (N, H, W, 3)
    images = images.unsqueeze(1).expand(-1, 3, -1, -1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return Images(images.contiguous(), torch.as_tensor(dataset.targets))


def unreadable(error: OSError) -> NoReturn:
    stop(f"{error.filename}: {error.strerror}; make it readable, or move it away", status=1)


def load_folder(args: argparse.Namespace) -> tuple[Images, Images | None]:
    """DATA/train and DATA/val with a subfolder a class; or images anywhere below DATA, then without labels.

    All files are read once before the training starts. Those that can't be are named, and left out.
    """
    root, extensions = Path(args.data), torchvision.datasets.folder.IMG_EXTENSIONS
    if not root.is_dir():
        stop(f"no data set and no folder is called {args.data!r}: choose {', '.join(RECIPES)}, or a folder")
    parts = [root / "train", root / "val"]
    parts = parts if all(part.is_dir() for part in parts) else [root]
    files = []
    for part in parts:
        found, seen = [], set()
        for folder, folders, names in os.walk(part, onerror=unreadable, followlinks=True):
            real = os.path.realpath(folder)
            folders.sort()  # the same order everywhere
            if real in seen or {"checkpoint.pt", "views.png"} <= set(names):  # a loop, or a run's OUT
                folders.clear()
            else:
                seen.add(real)
                paths = [os.path.join(folder, name) for name in names if name.lower().endswith(extensions)]
                found += filter(os.path.isfile, paths)
        files.append(sorted(found))
    rank, world = process()
    mine = sum(files, [])[rank::world]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside of Python's lock
        found = [(path, why) for path, why in zip(mine, pool.map(complaint, mine)) if why]
    if bad := dict(sum(gather(found), [])):
        some = ", ".join([*bad.values()][:5])
        say(f"warning: {len(bad)} files can't be read and are left out: {some}", sys.stderr)
    files = [[path for path in paths if path not in bad] for paths in files]
    for part, paths in zip(parts, files):
        if not paths:
            stop(f"no readable image below {part}: looked for {' '.join(extensions)}")
    if len(parts) == 1:
        return Images(files[0], None, args.image_size, args.crop_min), None
    places = [[Path(path).relative_to(part).parts for path in paths] for part, paths in zip(parts, files)]
    if loose := [place for place in sum(places, []) if len(place) == 1]:
        stop(f"{loose[0][0]} is in {root}/train or val, but in no class folder there: move it into one")
    names = [[place[0] for place in column] for column in places]
    if differing := sorted(set(names[0]) ^ set(names[1])):
        say(f"warning: only one of train and val has images of {', '.join(differing[:5])}", sys.stderr)
    classes = {name: label for label, name in enumerate(sorted({*names[0], *names[1]}))}
    labels = [torch.tensor([classes[name] for name in column]) for column in names]
    return tuple(Images(*pair, args.image_size, args.crop_min) for pair in zip(files, labels))


def seed_of(*parts: Any) -> int:
    """32 bits, which is all that the CPU's generator uses, from anything that prints."""
    return zlib.crc32(repr(parts).encode())


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
        yield f"{seed} {epoch}", order[position * batch :][:batch][rank::world].repeat(pairs)


def load(images: Images, requests: Iterable[tuple[str, Tensor]], workers: int) -> torch.utils.data.DataLoader:
    """uint8 batches in the order of the requests, from one set of workers."""
    return torch.utils.data.DataLoader(
        images,
        sampler=requests,
        batch_size=None,  # a request is a batch already
        num_workers=0 if isinstance(images.source, Tensor) else workers,  # from memory a gather is quicker
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_group,
    )


def leave_group(worker: int) -> None:
    """Ctrl-C and the like reach the whole process group. What to do about it is the trainer's business."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


# ------------------------------------------------------------------------------------------------
# Augmentation (App. A): a batch at a time, on the device, with parameters drawn per image. All of it works on
# x (N, 3, H, W) float in [0, 1]. Parameters are drawn on the CPU: the same ones for every device.


def crop_boxes(n: int, height: int, width: int, crop_min: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """top, left, height, width, each (N,), as RandomResizedCrop draws them, but for its fallback.

    After ten tries that do not fit, ours is the whole image, theirs the largest centre of an allowed shape.
    """
    area = height * width * torch.empty(n, 10).uniform_(crop_min, 1)
    ratio = torch.empty(n, 10).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)  # of ten tries; if none fits, the whole image
    w = torch.where(fits.any(dim=1), w.gather(1, first)[:, 0], width)
    h = torch.where(fits.any(dim=1), h.gather(1, first)[:, 0], height)
    return (torch.rand(n) * (height - h + 1)).floor(), (torch.rand(n) * (width - w + 1)).floor(), h, w


def resize_matrix(start: Tensor, length: Tensor, size_in: int, size_out: int) -> Tensor:
    """(N, size_out, size_in): cuts `length` pixels from `start` and resizes them, bilinear, antialiased."""
    # Resizing is linear and separable. As a matrix for the rows and one for the columns, a whole batch of
    # different crops is two batched products, the crop itself costs nothing, and nor does a flip.
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    scale = length / size_out
    centre = start + (torch.arange(size_out).view(1, -1, 1) + 0.5) * scale
    pixel = torch.arange(size_in) + 0.5
    weight = (1 - (pixel - centre).abs() / scale.clamp_min(1)).clamp_min(0)  # a triangle
    weight = weight * ((pixel > start) & (pixel < start + length))  # nothing from outside the crop
    return weight / weight.sum(dim=-1, keepdim=True)


def separable(rows: Tensor, x: Tensor, columns: Tensor) -> Tensor:
    """(N, 3, S, T): every image of x, (N, 3, H, W), times its rows (N, S, H) and its columns (N, T, W)."""
    n, channels, height, width = x.shape
    return rows.unsqueeze(1) @ (x.reshape(n, -1, width) @ columns.mT).view(n, channels, height, -1)


def crop_and_flip(x: Tensor, size: int, crop_min: float) -> Tensor:
    """RandomResizedCrop, then a flip with probability 1/2: (N, 3, size, size)."""
    n, _, height, width = x.shape
    top, left, h, w = crop_boxes(n, height, width, crop_min)
    columns = resize_matrix(left, w, width, size)
    columns = torch.where(torch.rand(n, 1, 1) < 0.5, columns.flip(1), columns)
    return separable(resize_matrix(top, h, height, size).to(x.device), x, columns.to(x.device))


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
    # A channel is at its maximum over a third of the circle, at its minimum over another, linear between.
    offset = torch.tensor([5 / 6, 3 / 6, 1 / 6], device=x.device).view(1, 3, 1, 1)
    below = (turn + offset).frac_().mul_(6).sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
    return torch.addcmul(value.unsqueeze(1), below, chroma.unsqueeze(1), value=-1)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with a sigma, (N, 1, 1, 1) in pixels, up to 2; reflecting at the border."""
    n, channels, height, width = x.shape
    radius = 6  # three standard deviations of the widest
    taps = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-taps.square() / (2 * sigma.view(n, 1).square()))
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    # One group a channel of each image, so that every image has its own kernel.
    x = F.pad(x.reshape(1, -1, height, width), [radius] * 4, mode="reflect")
    x = F.conv2d(x, kernel[:, None, :, None], groups=n * channels)
    return F.conv2d(x, kernel[:, None, None, :], groups=n * channels).view(n, channels, height, width)


def two_views(images: Tensor, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Two augmented views of each image: x1 and x2, (N, 3, S, S) float, normalized, channels last.

    images: uint8, (N, 3, H, W), or (N, 2, 3, S, S) where two crops of each were cut already.
    """
    if images.ndim == 5:
        x = images.transpose(0, 1).flatten(0, 1).float() / 255
    else:
        x = crop_and_flip(images.float().div_(255).repeat(2, 1, 1, 1), args.image_size, args.crop_min)
    n, device = len(x), x.device  # n is twice N: first the one view of each image, then the other

    def some(p: float) -> Tensor:
        return (torch.rand(n) < p).nonzero()[:, 0].to(device)

    def draw(count: int, low: float, high: float) -> Tensor:
        return torch.empty(count, 1, 1, 1).uniform_(low, high).to(device)

    chosen = some(0.8)  # ColorJitter(0.4, 0.4, 0.4, 0.1) in a random order, which one batch shares
    jitter = [(brightness, 0.6, 1.4), (contrast, 0.6, 1.4), (saturation, 0.6, 1.4), (hue, -0.1, 0.1)]
    jittered = x[chosen]
    for i in torch.randperm(4).tolist():
        operation, low, high = jitter[i]
        jittered = operation(jittered, draw(len(chosen), low, high))
    x[chosen] = jittered
    chosen = some(0.2)
    x[chosen] = to_gray(x[chosen]).expand(-1, 3, -1, -1)
    if len(chosen := some(args.blur)):
        x[chosen] = blur(x[chosen], draw(len(chosen), 0.1, 2.0))
    x1, x2 = normalize(x, args).chunk(2)
    return x1, x2


def normalize(x: Tensor, args: argparse.Namespace) -> Tensor:
    """x (N, 3, H, W) in [0, 1], standardized as the network expects it, channels last."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (args.mean, args.std))
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------
# Monitors


@torch.no_grad()
def extract_features(
    backbone: nn.Module, images: Images, args: argparse.Namespace, amp: torch.dtype | None = None
) -> Tensor:
    """Features (N, D) float32 of all images, not augmented, by the backbone in eval mode.

    Processes share the work, and each returns all of it. Every image counts once: no last batch is dropped.
    """
    rank, world = process()
    device, mode, n = torch.device(args.device), backbone.training, len(images)
    mine = (torch.arange(math.ceil(n / world) * world) % n)[rank::world]  # as many on every rank
    backbone.eval()
    features = []
    for batch in load(images, [("", indices) for indices in mine.split(250)], args.workers):
        x = batch.to(device, non_blocking=True).float() / 255
        if x.shape[-2:] != (args.image_size, args.image_size):
            x = F.interpolate(x, [args.image_size] * 2, mode="bilinear", antialias=True)
        x = normalize(x, args)
        with torch.autocast(device.type, amp, enabled=amp is not None):
            features.append(backbone(x).float())
    backbone.train(mode)
    mine = torch.cat(features)
    if world == 1:
        return mine
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine)
    return torch.stack(parts, dim=1).flatten(0, 1)[:n]  # in order again


def advice(history: list[dict[str, Any]]) -> str:
    """What to do about a run that has gone wrong, or "". `history` holds a row an epoch: step, loss, spread.

    Drawn through the runs of the README's table, three seeds each, `textures`. Accuracy alone could not tell
    a collapse from a loss that stays high (footnote 4).
    """
    if not history:
        return ""
    loss, spread_, half = history[-1]["loss"], history[-1]["spread"], history[len(history) // 2]
    if loss < -0.8 and spread_ < 0.55:  # 0.30 to 0.44 without the stop-gradient; with it and BN, 0.61 or more
        return (
            "collapse: the z grow alike (low loss, low spread). Is the stop-gradient there, does each prediction "
            "meet the OTHER view, has every hidden layer its BN? Then App. A's augmentations, a lower --base-lr"
        )
    if loss < -0.96 and spread_ < 0.8:  # -0.97 at 0.6 to 0.7 without h; -0.95 at 0.9 or more for the recipe
        return (
            "partial collapse: the loss is near -1 because z1 and z2 are easy to match, not because h predicts well. "
            "Is the predictor there, with its BN, and does it learn?"
        )
    if history[-1]["step"] >= 300 and loss > -0.5 and loss > half["loss"] - 0.02:  # no lower than halfway
        return "not learning, which is no collapse (the loss stays high): another --base-lr, --warmup-epochs"
    return ""


# ------------------------------------------------------------------------------------------------
# Plumbing: processes, files, signals


def setup_distributed(device: str) -> torch.device:
    """Joins the other processes, if torchrun's environment tells of any. The device of this one."""
    if process()[1] == 1:
        return torch.device(device)
    if missing := {"LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        stop(f"RANK and WORLD_SIZE are set, but not {', '.join(sorted(missing))}: start it with torchrun")
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        if device not in devices():
            stop(f"{device} is not there: start no more processes than there are GPUs")
        torch.cuda.set_device(device)
    # gloo beside nccl: the ranks agree on when to stop without waiting for their GPUs.
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    try:
        store, rank, world = next(dist.rendezvous("env://"))
        # On a restart, torchrun 2.14's store was seen to hold the addresses of the processes that had died.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    except (RuntimeError, ValueError, OSError) as error:
        stop(f"cannot reach the other processes ({reason(error)}): check MASTER_ADDR, MASTER_PORT", status=1)
    return torch.device(device)


def gather(mine: Any) -> list[Any]:
    """One object from each rank, in order."""
    everyone = [mine]
    if dist.is_initialized():
        everyone *= dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    return everyone


def replace_file(path: Path, content: Any) -> None:
    """torch.save, which leaves at path the old file or the new one, whole, whatever happens."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save turns one into the other
        stop(f"cannot write {path} ({reason(error)}); what was there before is untouched", status=1)
    finally:
        beside.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dict that torch.save wrote there. Never runs code from the file."""
    try:
        if zipfile.is_zipfile(path) and (broken := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"checksum of {broken}")  # torch.load does not look at the checksums
        return dict(torch.load(path, map_location="cpu", weights_only=True).items())
    except OSError as error:
        stop(f"{path} can't be opened ({error.strerror}): check the path")
    except Exception as error:  # what a damaged file raises has no common type
        kind = type(error).__name__
        stop(f"{path} is damaged or not a checkpoint ({kind}); take another one, or start anew")


def export_backbone(backbone: nn.Module, path: str) -> None:
    """The weights alone, under torchvision's names."""
    check_new_file("--export", path)  # it may have come up since
    weights = {name: value.cpu().contiguous() for name, value in backbone.state_dict().items()}
    replace_file(Path(path), weights)


def save_views(images: Images, args: argparse.Namespace) -> None:
    """A picture of what the network sees: eight images, and below each of them its two views."""
    key, indices = next(schedule(len(images), args.batch_size, args.seed, range(1)))
    indices = indices[:8]
    torch.manual_seed(args.seed)
    views = torch.cat(two_views(images[key, indices], args))
    mean, std = torch.tensor(args.mean).view(3, 1, 1), torch.tensor(args.std).view(3, 1, 1)
    originals = F.interpolate(images["", indices] / 255, args.image_size, mode="bilinear", antialias=True)
    picture = torch.cat([originals, (views * std + mean).clamp(0, 1)])
    torchvision.utils.save_image(picture, Path(args.out, "views.png"), nrow=len(indices))


def claim(out: Path) -> BinaryIO:
    """Makes OUT this process's own, as long as the returned file is open."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "ab")
    except OSError as error:
        stop(f"--out {out} can't be made ({error.strerror}): name another folder")
    try:
        import fcntl  # Windows has none, and there two runs in one folder are not noticed

        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        stop(f"--out {out} is in use by another process: name another folder")
    except (ImportError, OSError):  # nor have some network file systems
        pass
    return lock


@contextlib.contextmanager
def noted_signals() -> Iterator[Callable[[], int]]:
    """Inside, the first SIGINT, SIGTERM or SIGHUP is only noted, and a second one kills.

    Yields a function: the signal's number, 0 for none, once any rank has one, for all must stop together.
    """
    noted, before = torch.zeros((), dtype=torch.int64), {}

    def note(number: int, frame: FrameType | None) -> None:
        noted.fill_(number)
        # torchrun passes on what the terminal has sent to all already; it kills by itself if need be.
        second = signal.SIG_IGN if dist.is_initialized() else signal.SIG_DFL
        for each in before:
            signal.signal(each, second)

    def agreed() -> int:
        number = noted.clone()
        if dist.is_initialized():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    try:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup's wish
                with contextlib.suppress(ValueError):  # not in the main thread, as in some notebooks
                    before[number] = signal.signal(number, note)
        yield agreed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------
# Optimization


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """lr of update `step` of `steps`: linear to the peak in `warmup` updates, then half a cosine to zero.

    To be set before the update: the first one runs at the peak (or peak / warmup), the last just above zero.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


class Targets(nn.Module):
    """What the predictions have to meet: z itself, unless one of the two variants of Sec. 5.2 is on."""

    def __init__(self, model: SimSiam, n: int, args: argparse.Namespace):
        super().__init__()
        self.every, self.momentum = args.alternate, args.eta_momentum
        # k-step alternation: the targets of k steps come from the weights before the first of them. (The
        # paper computes them ahead and keeps them. To keep the weights gives the same ones.)
        self.model = copy.deepcopy(model).requires_grad_(False) if self.every > 1 else None
        # In place of the expectation over augmentations, a running average over an image's visits; that both
        # views update it is ours, and so is its start at zero. On the first visit zero only scales the target,
        # and D sees no scale; on the second the older view has 44 % of the weight, and not yet 80.
        self.register_buffer("eta", torch.zeros(n, args.dim) if self.momentum else None)

    def forward(
        self, step: int, indices: Tensor, model: SimSiam, x1: Tensor, x2: Tensor, z1: Tensor, z2: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.model is not None:
            if step % self.every == 0:
                self.model.load_state_dict(model.state_dict())
            with torch.no_grad():
                z1, z2 = self.model(x1, x2)[2:]
        if self.eta is not None:
            z1, z2 = (torch.lerp(z.detach().float(), self.eta[indices], self.momentum) for z in (z1, z2))
            self.eta[indices] = (z1 + z2) / 2
        return z1, z2


PARTS = ("model", "targets", "optimizer", "scaler")  # of a Trainer, each with a state of its own


class Trainer:
    """The model and all that changes with it. `update` is one step, `state_dict` all that a resume needs."""

    def __init__(self, args: argparse.Namespace, images: Images, test: Images | None, device: torch.device):
        self.args, self.images, self.test, self.device = args, images, test, device
        (self.rank, self.world), self.amp = process(), amp_dtype(args.amp, device)
        self.step, self.per_epoch = 0, len(images) // args.batch_size
        self.steps, self.warmup = args.epochs * self.per_epoch, args.warmup_epochs * self.per_epoch
        self.sums = torch.zeros(2, device=device)  # of loss and spread, over the epoch so far
        self.history: list[dict[str, Any]] = []  # a row for each epoch
        self.began, self.tensorboard = time.time(), None
        files = [] if isinstance(images.source, Tensor) else images.source
        self.names = seed_of([path.removeprefix(args.data) for path in files])  # to notice another order
        torch.manual_seed(args.seed)  # the same weights on every rank
        try:
            backbone, feature_dim = build_backbone(args.arch, args.stem, args.width)
        except ValueError as error:
            stop(f"--arch {args.arch}: {error}")
        heads = {k: vars(args)[k] for k in "dim hidden layers predictor_hidden predictor bn affine".split()}
        model = SimSiam(backbone, feature_dim, **heads)
        if self.world > 1 and device.type == "cuda":
            # BN over the whole batch. It is for CUDA only: on the CPU every process normalizes its own part.
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        # `model` stays the bare model, and that is what is saved: no "module." in its keys.
        self.model = model.to(device, memory_format=torch.channels_last)
        self.targets = Targets(self.model, len(images), args).to(device)
        # Two groups: the encoder's lr decays, the predictor's is constant (Table 1c), without a warmup too,
        # which is not in the paper (the authors, in issue 11 of their repository).
        encoder = [*self.model.backbone.parameters(), *self.model.projector.parameters()]
        groups = [dict(params=encoder, constant=False)]
        if predictor := list(self.model.predictor.parameters()):
            groups.append(dict(params=predictor, constant=not args.decay_predictor_lr))
        self.peak = args.base_lr * args.batch_size / 256
        # Weight decay is on everything, on the scale and bias of BN too (App. A).
        self.optimizer = torch.optim.SGD(groups, lr=self.peak, momentum=0.9, weight_decay=args.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == torch.float16)
        self.wrapped: nn.Module = self.model
        if self.world > 1:
            devices = [device] if device.type == "cuda" else None
            self.wrapped = nn.parallel.DistributedDataParallel(self.model, device_ids=devices)
        self.wrapped = torch.compile(self.wrapped, disable=not args.compile)

    def __str__(self) -> str:
        return f"{self.world} x {self.device.type}, {self.amp or torch.float32}"

    def batches(self, steps: range) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 images, their indices) of this rank for each step."""
        n, args = len(self.images), self.args
        mine = self.rank, self.world, args.pairs
        requests = partial(schedule, n, args.batch_size, args.seed, steps, *mine)
        return zip(load(self.images, requests(), args.workers), (indices for _, indices in requests()))

    def update(self, batch: Tensor, indices: Tensor, mark: Callable[[str], Any] = lambda phase: None) -> None:
        """One step on this rank's images. `mark` is told the end of every phase."""
        args = self.args
        torch.manual_seed(seed_of(args.seed, self.step, self.rank))  # for the views, and dropout if any
        x1, x2 = two_views(batch.to(self.device, non_blocking=True), args)
        mark("augmentation")
        for group in self.optimizer.param_groups:
            decayed = learning_rate(self.step, self.steps, self.peak, self.warmup)
            group["lr"] = self.peak if group["constant"] else decayed
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            p1, p2, z1, z2 = self.wrapped(x1, x2)
            t1, t2 = self.targets(self.step, indices, self.model, x1, x2, z1, z2)
        options = dict(stop_gradient=not args.no_stop_gradient, similarity=args.similarity)
        loss = simsiam_loss(p1, p2, t1, t2, symmetric=not args.asymmetric, **options)
        mark("forward")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        mark("backward")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        mark("optimizer")
        self.sums += torch.stack([loss.detach(), spread(z1)])
        self.step += 1
        mark("spread")

    def check(self, values: Iterable[Tensor]) -> None:
        """Stops on nan and infinity, and so keeps them out of the checkpoint."""
        if not all(value.isfinite().all() for value in values):
            lr, file = self.optimizer.param_groups[0]["lr"], Path(self.args.out, "checkpoint.pt")
            where = f"step {self.step}, lr {lr:.4g}, amp {self.amp or 'off'}"
            remedy = f"lower --base-lr or --weight-decay, or --amp off. {file} is from before"
            stop(f"loss or weights are not finite at {where}: {remedy}", status=1)

    def monitor(self, knn: bool) -> tuple[float, float | None]:
        """Effective rank of 256 images' features; and kNN top-1 over all test images, a fraction, or None.

        The classifier is that of simsiam.py, on backbone features, with the whole training set as its bank.
        """
        backbone, images, test = self.model.backbone, self.images, self.test
        for buffer in backbone.buffers() if self.world > 1 else ():
            dist.broadcast(buffer, 0)  # one network: without SyncBN the ranks' running means differ
        features_of = partial(extract_features, backbone, args=self.args, amp=self.amp)
        shown = test or images
        some = torch.linspace(0, len(shown) - 1, min(256, len(shown))).long()  # spread over all classes
        if not knn or images.labels is None:  # then the test images have none either
            return effective_rank(features_of(shown.subset(some))).item(), None
        bank, features = features_of(images), features_of(test)
        predicted = knn_predict(features, bank, images.labels.to(bank.device)).cpu()
        return effective_rank(features[some]).item(), (predicted == test.labels).sum().item() / len(test)

    def report(self, rate: float) -> None:
        """Measures, prints and writes the row of the epoch that ends here, and empties the sums."""
        args, epoch, seconds = self.args, self.step // self.per_epoch, time.time() - self.began
        loss, spread_ = (sum(gather((self.sums / self.per_epoch).cpu())) / self.world).tolist()
        self.sums.zero_()
        knn_now = args.knn_every > 0 and (epoch % args.knn_every == 0 or epoch == args.epochs)
        rank, knn = self.monitor(knn_now)
        row = dict(epoch=epoch, step=self.step, loss=loss, spread=spread_, rank=rank, knn=knn)
        row |= dict(lr=self.optimizer.param_groups[0]["lr"], images_per_second=rate, seconds=seconds)
        self.history.append(row)
        if self.rank == 0:
            with open(Path(args.out, "metrics.jsonl"), "a") as file:
                file.write(json.dumps(row) + "\n")
        for name, value in row.items() if self.tensorboard else ():
            if value is not None:
                self.tensorboard.add_scalar(name, value, self.step)
        say(
            f"epoch {epoch:3d}/{args.epochs}  loss {loss:6.3f}  spread {spread_:.3f}  rank {rank:5.1f}  "
            f"lr {row['lr']:.4f}  {rate:5.0f} images/s  {seconds * (args.epochs / epoch - 1):.0f} s left"
            f"{percent(knn)}"
        )
        text = advice(self.history) if args.similarity == "cosine" else ""
        if text and text != advice(self.history[:-1]):  # once, and not every epoch
            say(f"warning: {text}", sys.stderr)

    def save(self) -> None:
        state = self.state_dict()
        if self.rank == 0:
            replace_file(Path(self.args.out, "checkpoint.pt"), state)

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        plain = dict(step=self.step, n=len(self.images), names=self.names, world=self.world)
        plain |= dict(history=self.history, seconds=time.time() - self.began, args=vars(self.args))
        return parts | plain | dict(sums=gather(self.sums.tolist()))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stops where it does not fit. All or nothing: what was loaded by then is not used."""
        try:
            for name in PARTS:
                getattr(self, name).load_state_dict(state[name])
            n, names, world = (state[name] for name in ("n", "names", "world"))
            self.history = [dict(row) for row in state["history"]]
            self.step, self.began = int(state["step"]), self.began - state["seconds"]
            sums = torch.tensor(state["sums"])  # (processes, 2)
            self.sums.copy_(sums[self.rank] if world == self.world else sums.mean(dim=0))
        except Exception as error:  # whatever a file of the right form may hold
            kind = type(error).__name__
            stop(f"{self.args.out}/checkpoint.pt does not fit this run ({kind}): name another --out")
        now = len(self.images)
        if (n, names) != (now, self.names) or not 0 <= self.step <= self.steps:
            had = f"{n} images, and now {now}" if n != now else "images of other names, or another length"
            stop(f"--resume: {self.args.data} had {had}: restore them, or start anew")
        if world != self.world:
            say(f"warning: {world} processes before, {self.world} now: other bits", sys.stderr)


def percent(knn: float | None) -> str:
    return "" if knn is None else f"  kNN {knn:.1%}"


# ------------------------------------------------------------------------------------------------
# The training


def train(args: argparse.Namespace, checkpoint: dict[str, Any] | None) -> None:
    """From wherever the checkpoint stands to the end; a signal ends it earlier, and is saved too."""
    device, out = setup_distributed(args.device), Path(args.out)
    chief, args.device = process()[0] == 0, str(device)  # the chief alone writes
    images, test = load_data(args)
    if len(images) < args.batch_size:
        stop(f"--batch-size {args.batch_size}, but {args.data} has {len(images)} images: take a smaller one")
    trainer = Trainer(args, images, test, device)
    if args.benchmark:
        return benchmark(trainer)
    lock = claim(out) if chief else None  # noqa: F841 (held until the end)
    if chief and not checkpoint and (out / "checkpoint.pt").exists():
        stop(f"--out {out} was taken by another run in the meantime: name another folder")
    if checkpoint:
        trainer.load_state_dict(checkpoint)
    if len(set(gather(trainer.step))) > 1:
        stop(f"not all processes see {out}/checkpoint.pt: put --out where all nodes can read it", status=1)
    if trainer.step == trainer.steps:
        say(f"the run in {out} is already finished")
    say(
        f"{args.data}: {len(images)} images, {trainer.steps} steps of {args.batch_size}; "
        f"lr {args.base_lr} * {args.batch_size} / 256 = {trainer.peak:.4g}; {trainer}; into {out}\n"
        f"loss: -1 is the minimum; spread: 1 healthy, 0 collapsed; rank: of the features; kNN: k=200, T=0.2"
        + ("" if images.labels is not None else "; no labels, so no kNN")
    )
    if trainer.step == 0:
        trainer.save()  # now there is always something to resume, and a full disk shows at once
        if chief:
            save_views(images, args)
        rank, knn = trainer.monitor(knn=args.knn_every > 0)
        say(f"untrained: rank {rank:.1f}{percent(knn)}")
    if chief:  # rows that a killed run wrote after its last checkpoint go
        Path(out, "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trainer.history))
    if chief and args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        trainer.tensorboard = SummaryWriter(out, purge_step=trainer.step)
    with noted_signals() as signalled:
        run(trainer, signalled)
    if args.export and chief:
        export_backbone(trainer.model.backbone, args.export)


def run(trainer: Trainer, signalled: Callable[[], int]) -> None:
    """The loop over the steps that are left."""
    args, terminal = trainer.args, sys.stdout and not sys.stdout.closed and sys.stdout.isatty()
    trainer.model.train()
    began, first = time.time(), trainer.step
    for batch, indices in trainer.batches(range(trainer.step, trainer.steps)):
        trainer.update(batch, indices)
        epoch, position = divmod(trainer.step, trainer.per_epoch)
        number, ended = signalled(), position == 0
        # To read a number makes a GPU finish its work first: there, only now and then.
        if trainer.device.type == "cpu" or ended or number or trainer.step % 50 == 0:
            trainer.check([trainer.sums])
        if terminal:
            say(f"\rstep {position}/{trainer.per_epoch} \r", end="")
        if ended or number:
            trainer.check(trainer.model.state_dict().values())
        if ended:
            trainer.report((trainer.step - first) * args.batch_size / (time.time() - began))
        if number or ended and (epoch % args.save_every == 0 or epoch == args.epochs):
            trainer.save()
        if ended:
            began, first = time.time(), trainer.step
        if number:
            name = signal.Signals(number).name
            say(f"{name} at step {trainer.step}: saved; go on with python train.py --resume --out {args.out}")
            sys.exit(128 + number)


def benchmark(trainer: Trainer) -> None:
    """Times --benchmark steps after three others, and says what share each part of a step takes."""
    args, cuda, warm = trainer.args, trainer.device.type == "cuda", 3
    spent, last = collections.Counter(), time.perf_counter()

    def mark(phase: str) -> None:
        nonlocal last
        if cuda:
            torch.cuda.synchronize()  # kernels run behind Python's back
        now = time.perf_counter()
        spent[phase] += now - last
        last = now

    trainer.model.train()
    for batch, indices in trainer.batches(range(warm + args.benchmark)):
        mark("loading")
        trainer.update(batch, indices, mark)
        if trainer.step == warm:
            spent.clear()
    step = spent.total() / args.benchmark
    knn = trainer.images.labels is not None and args.knn_every > 0
    for phase, every in [("rank", 1), ("kNN", args.knn_every)][: 1 + knn]:
        trainer.monitor(knn=phase == "kNN")
        mark(phase)
        spent[phase] *= args.benchmark / trainer.per_epoch / every  # of an epoch, spread over its steps
    if cuda:
        memory = f"{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
    else:
        memory = "unknown"
        with contextlib.suppress(ImportError):
            import resource  # Windows has none

            unit = 2**20 if sys.platform == "darwin" else 2**10
            memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.0f} MiB"
    say(
        f"{args.data}, {args.arch}, batch {args.batch_size}, {trainer}: "
        f"{args.batch_size / step:.1f} images/s, {1000 * step:.1f} ms a step, peak memory {memory}\n"
        + "  ".join(f"{phase} {seconds / spent.total():.1%}" for phase, seconds in spent.items())
    )


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What the machine, and not the code, is to blame for ends in one line too."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, RuntimeError) as error:
        text = reason(error, line=-1)  # a worker's comes behind its traceback
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):  # GPU, CPU
            text = "out of memory: take a smaller --batch-size or --image-size"
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            text = "another process has ended; the last checkpoint is whole"
        elif not isinstance(error, OSError) and "DataLoader worker" not in str(error):
            raise
        stop(text, status=1)


def main(argv: list[str] | None = None) -> None:
    """The whole command, for a shell, a notebook or a test. SystemExit on a mistake and on a signal."""
    try:
        with one_line_errors():
            train(*get_args(argv))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
