"""Measures the speed of a training step, and each part's share of the time.

    python .github/speed.py 40                        # 40 steps of the recipe textures
    python .github/speed.py 40 --amp off --baseline 0 2   # and with PIL transforms, 0 or 2 workers

All other arguments are flags of train.py. Compare two versions by alternating their runs on one machine.
"""

import argparse
import collections
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
import train  # noqa: E402
from simsiam import simsiam_loss, spread  # noqa: E402


class TwoViews(Dataset):
    """The baseline: each image is augmented by torchvision's PIL transforms, one at a time."""

    def __init__(self, images: train.Images):
        self.images = [transforms.functional.to_pil_image(x) for x in images.source]
        self.augment = transforms.Compose([
            transforms.RandomResizedCrop(images.view_size, scale=(0.2, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.ToTensor(),
            transforms.Normalize(images.mean, images.std),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.augment(self.images[i]), self.augment(self.images[i])


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # because GPU kernels run asynchronously


def images_per_second(step: Callable[[], None], trainer: train.Trainer, steps: int) -> str:
    for _ in range(12):  # warmup, not timed, because workers have prefetched some batches
        step()
    synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    return f"{steps * trainer.args.batch_size / (time.perf_counter() - began):.1f} images/s"


def measure_baseline(trainer: train.Trainer, steps: int, workers: int) -> str:
    args = trainer.args
    loader = DataLoader(
        TwoViews(trainer.images), args.batch_size, shuffle=True, drop_last=True,
        num_workers=workers, persistent_workers=workers > 0,
    )  # fmt: skip
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> None:
        x1, x2 = next(batches)
        loss = simsiam_loss(*trainer.model(x1.to(trainer.device), x2.to(trainer.device)))
        trainer.optimizer.zero_grad()
        loss.backward()
        trainer.optimizer.step()

    return images_per_second(step, trainer, steps)


def measure_parts(trainer: train.Trainer, batches: Iterator, steps: int) -> str:
    """Runs the parts of Trainer.update one by one. Returns each part's share of the time."""
    spent: collections.Counter[str] = collections.Counter()
    last = time.perf_counter()

    def mark(part: str) -> None:
        nonlocal last
        synchronize()
        now = time.perf_counter()
        spent[part] += now - last
        last = now

    for batch, _ in itertools.islice(batches, steps):
        mark("loading")
        x1, x2 = train.two_views(batch.to(trainer.device), trainer.images.view_size, trainer.args)
        x1 = train.normalize(x1, trainer.images)
        x2 = train.normalize(x2, trainer.images)
        mark("views")
        with torch.autocast(trainer.device.type, trainer.amp, enabled=trainer.amp is not None):
            p1, p2, z1, z2 = trainer.model(x1, x2)
        loss = simsiam_loss(p1, p2, z1, z2)
        mark("forward")
        trainer.optimizer.zero_grad()
        loss.backward()
        mark("backward")
        trainer.optimizer.step()
        mark("optimizer")
        trainer.sums += torch.stack([loss.detach(), spread(z1)])
        mark("spread")
    return "  ".join(f"{part} {seconds / spent.total():.1%}" for part, seconds in spent.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("steps", type=int)
    parser.add_argument("--baseline", type=int, nargs="+", metavar="WORKERS")
    own, flags = parser.parse_known_args()
    args, _ = train.get_args([*flags, "--epochs", "1000000"])
    images, _ = train.load_data(args)
    args.mean, args.std = images.mean, images.std
    trainer = train.Trainer(args, images)
    requests = train.schedule(len(images), args.batch_size, args.seed, range(10**6), args.pairs)
    batches = iter(train.make_loader(images, requests, args.workers))
    for workers in own.baseline or []:
        print(f"PIL transforms, {workers} workers: {measure_baseline(trainer, own.steps, workers)}")
    speed = images_per_second(lambda: trainer.update(*next(batches)), trainer, own.steps)
    print(f"{args.arch}, batch {args.batch_size}, {trainer.amp or torch.float32}: {speed}")
    print(measure_parts(trainer, batches, own.steps))


if __name__ == "__main__":
    main()
