"""The usual way, to compare with `train.py --benchmark`: PIL transforms in a DataLoader, float32, eager, contiguous.

    python .github/usual.py resnet18 128 8      # architecture, batch, steps; the faster of 0 and 2 workers counts
    python .github/usual.py convnet 64 40
"""

import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
from simsiam import SimSiam, build_backbone, simsiam_loss  # noqa: E402
from train import TEXTURES, textures  # noqa: E402

AUGMENT = transforms.Compose([
    transforms.RandomResizedCrop(32, scale=(0.2, 1.0)),
    transforms.RandomHorizontalFlip(),
    transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
    transforms.RandomGrayscale(p=0.2),
    transforms.ToTensor(),
    transforms.Normalize([0.5] * 3, [0.25] * 3),
])  # fmt: skip


class TwoViews(Dataset):
    def __init__(self) -> None:
        self.images = [transforms.functional.to_pil_image(x) for x in textures(5000, seed=0)[0]]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return AUGMENT(self.images[i]), AUGMENT(self.images[i])


def main() -> None:
    arch, batch, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    dataset = TwoViews()
    began = time.process_time()
    for i in range(500):
        dataset[i]
    print(f"one view by PIL: {1e6 * (time.process_time() - began) / 1000:.0f} us of CPU time")
    for workers in (0, 2):
        width = {} if arch != "convnet" else dict(dim=TEXTURES["dim"], hidden=TEXTURES["hidden"])
        model = SimSiam(*build_backbone(arch, "cifar"), layers=2, **width)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=5e-4)
        loader = DataLoader(dataset, batch_size=batch, shuffle=True, drop_last=True, num_workers=workers)
        for step, (x1, x2) in enumerate(loader):
            if step == 2:  # after a warm-up
                began = time.perf_counter()
            loss = simsiam_loss(*model(x1, x2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step == steps + 1:
                break
        print(f"{arch}, batch {batch}, {workers} workers: {batch * steps / (time.perf_counter() - began):.1f} images/s")


if __name__ == "__main__":
    main()
