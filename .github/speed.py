"""How fast is a step, and what takes its time? Beside it the usual way: PIL transforms in a DataLoader, float32.

    python .github/speed.py 40                                       # 40 steps of the `textures` recipe
    python .github/speed.py 4 --arch resnet18 --dim 2048 --hidden 2048 --batch-size 128
    python .github/speed.py 40 --usual                               # the usual way; the faster of 0 and 2 workers counts

After the number of steps come flags of train.py. A speed is a ratio: run the two in turns on one machine.
"""

import collections
import itertools
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
import train  # noqa: E402
from simsiam import simsiam_loss, spread  # noqa: E402

WARM = 3  # steps that are not counted


class TwoViews(Dataset):
    def __init__(self, images: train.Images) -> None:
        self.images = [transforms.functional.to_pil_image(x) for x in images.source]
        self.augment = transforms.Compose([
            transforms.RandomResizedCrop(images.size, scale=(0.2, 1.0)),
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
    loader = DataLoader(TwoViews(trainer.images), batch, shuffle=True, drop_last=True, num_workers=workers)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    model = train.build_model(trainer.args)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)
    for step, (x1, x2) in enumerate(itertools.islice(batches, WARM + steps)):
        if step == WARM:
            began = time.perf_counter()
        loss = simsiam_loss(*model(x1, x2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"the usual way, {workers} workers: {batch * steps / (time.perf_counter() - began):.1f} images/s")


def parts(trainer: train.Trainer, steps: int) -> None:
    """The same calls as in Trainer.update, one after the other, each with its time."""
    args = trainer.args
    cuda = trainer.device.type == "cuda"
    spent: collections.Counter[str] = collections.Counter()
    last = time.perf_counter()

    def mark(part: str) -> None:
        nonlocal last
        if cuda:
            torch.cuda.synchronize()  # kernels run behind Python's back
        now = time.perf_counter()
        spent[part] += now - last
        last = now

    for step, (batch, _) in enumerate(itertools.islice(trainer.batches(), WARM + steps)):
        if step == WARM:
            spent.clear()
        mark("loading")
        views = train.two_views(batch.to(trainer.device), args.image_size, args.crop_min, args.blur)
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
    words = sys.argv[1:]
    is_usual = "--usual" in words
    steps, *flags = [word for word in words if word != "--usual"]
    args, _ = train.get_args([*flags, "--epochs", "1000000"])
    images, _ = train.load_data(args)
    args.mean, args.std = images.mean, images.std
    trainer = train.Trainer(args, images, torch.device(args.device))
    trainer.model.train()
    if is_usual:
        for workers in (0, 2):
            usual(trainer, int(steps), workers)
        return
    for step, (batch, indices) in enumerate(itertools.islice(trainer.batches(), WARM + int(steps))):
        if step == WARM:
            began = time.perf_counter()
        trainer.update(batch, indices)
    float(trainer.sums[0])  # waits for a GPU
    rate = args.batch_size * int(steps) / (time.perf_counter() - began)
    memory = f", {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB" if args.device == "cuda" else ""
    print(f"{args.data}, {args.arch}, batch {args.batch_size}, {trainer.amp or torch.float32}: {rate:.1f} images/s{memory}")
    trainer.step = 0
    parts(trainer, int(steps))


if __name__ == "__main__":
    main()
