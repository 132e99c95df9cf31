"""How fast is a step, and what takes its time? Beside it the usual way: PIL and DataLoader, float32.

    python .github/speed.py 40                                       # 40 steps of the `textures` recipe
    python .github/speed.py 4 --arch resnet18 --dim 2048 --hidden 2048 --batch-size 128
    python .github/speed.py 40 --usual 0 2                            # the usual way, with 0 and 2 workers
    python .github/speed.py 40 --alone eager default reduce-overhead  # the model's step alone: eager,
                                                                      # compiled, and with CUDA graphs

Other words are flags of train.py. A speed is a ratio: run the two in turns on one machine.
"""

import argparse
import collections
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
import train  # noqa: E402
from simsiam import simsiam_loss, spread  # noqa: E402

WARM = 3  # steps that are not counted


class TwoViews(Dataset):
    def __init__(self, images: train.Images) -> None:
        self.images = [transforms.functional.to_pil_image(x.cpu()) for x in images.source]
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


def usual(trainer: train.Trainer, steps: int, workers: int) -> None:
    batch = trainer.args.batch_size
    loader = DataLoader(
        TwoViews(trainer.images), batch, shuffle=True, drop_last=True,
        num_workers=workers, persistent_workers=workers > 0,
    )  # fmt: skip
    warm = WARM + 2 * workers  # what the workers have made ahead does not count
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    model = train.build_model(trainer.args).to(trainer.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)
    for step, (x1, x2) in enumerate(itertools.islice(batches, warm + steps)):
        if step == warm:
            wait_for_gpu()
            began = time.perf_counter()
        loss = simsiam_loss(*model(x1.to(trainer.device), x2.to(trainer.device)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wait_for_gpu()
    print(f"the usual way, {workers} workers: {batch * steps / (time.perf_counter() - began):.1f} images/s")


def alone(trainer: train.Trainer, steps: int, mode: str) -> None:
    """Forward, backward and optimizer on views that are there already: what no data path can be
    faster than."""
    args = trainer.args
    shape = (args.batch_size, 3, trainer.images.view_size, trainer.images.view_size)
    x1 = torch.randn(shape, device=args.device).contiguous(memory_format=torch.channels_last)
    x2 = torch.randn(shape, device=args.device).contiguous(memory_format=torch.channels_last)
    model = trainer.model if mode == "eager" else torch.compile(trainer.model, mode=mode)

    def step() -> None:
        with torch.autocast(args.device, trainer.amp, enabled=trainer.amp is not None):
            outputs = model(x1, x2)
        trainer.optimizer.zero_grad()
        simsiam_loss(*outputs).backward()
        trainer.optimizer.step()

    with FlopCounterMode(display=False) as counter:
        simsiam_loss(*trainer.model(x1[:4], x2[:4])).backward()
    work = counter.get_total_flops() / 4 * args.batch_size
    seconds = timed(step, steps)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as the convolutions
    size = (4096 if args.device == "cuda" else 1024, 4096)
    a = torch.randn(size, device=args.device, dtype=trainer.amp or torch.float32)
    product = 2 * a.shape[0] ** 2 * a.shape[1] / timed(lambda: a @ a.T, 20)
    share = work / seconds / product
    rate = args.batch_size / seconds
    print(f"alone, {mode}: {rate:.1f} images/s, {share:.0%} of a product's {product / 1e12:.2f} TFLOP/s")


def timed(call: Callable[[], object], count: int, warm: int = WARM) -> float:
    """Seconds a call."""
    for _ in range(warm):
        call()
    wait_for_gpu()
    began = time.perf_counter()
    for _ in range(count):
        call()
    wait_for_gpu()
    return (time.perf_counter() - began) / count


def wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def parts(trainer: train.Trainer, steps: int) -> None:
    """The same calls as in Trainer.update, one after the other, each with its time."""
    args = trainer.args
    spent: collections.Counter[str] = collections.Counter()
    last = time.perf_counter()

    def mark(part: str) -> None:
        nonlocal last
        wait_for_gpu()  # kernels run behind Python's back
        now = time.perf_counter()
        spent[part] += now - last
        last = now

    for step, (batch, _) in enumerate(itertools.islice(trainer.batches(), WARM + steps)):
        if step == WARM:
            spent.clear()
        mark("loading")
        size = trainer.images.view_size
        views = train.two_views(batch.to(trainer.device), size, args.crop_min, args.blur)
        x1, x2 = (train.normalize(x, args.mean, args.std) for x in views)
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
    whole = spent.total()
    print("  ".join(f"{part} {seconds / whole:.1%}" for part, seconds in spent.items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", type=int)
    parser.add_argument("--usual", type=int, nargs="+", default=[], metavar="WORKERS")
    parser.add_argument("--alone", nargs="+", default=[], metavar="MODE")
    own, flags = parser.parse_known_args()
    args, _ = train.get_args([*flags, "--epochs", "1000000"])
    images, _ = train.load_data(args)
    args.mean, args.std = images.mean, images.std
    trainer = train.Trainer(args, images, torch.device(args.device))
    images.move_to(trainer.device)
    trainer.model.train()
    for workers in own.usual:
        usual(trainer, own.steps, workers)
    for mode in own.alone:
        alone(trainer, own.steps, mode)
    if own.usual or own.alone:
        return
    batches = trainer.batches()
    ahead = 0 if images.in_memory else 2 * args.workers  # batches that the workers have made
    seconds = timed(lambda: trainer.update(*next(batches)), own.steps, WARM + ahead)
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GB" if args.device == "cuda" else ""
    dtype = trainer.amp or torch.float32
    what = f"{Path(args.data).name}, {args.arch}, batch {args.batch_size}, {dtype}"
    print(f"{what}: {args.batch_size / seconds:.1f} images/s{memory}")
    trainer.step = 0
    parts(trainer, own.steps)


if __name__ == "__main__":
    main()
