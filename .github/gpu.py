"""All that needs a GPU, on one card: prints a table. Under 30 minutes, or in several calls: each goes on.

    python .github/gpu.py WORK                          # CIFAR-10 by torchvision, downloaded into data/
    python .github/gpu.py WORK --data FOLDER            # or a folder with its images
    python .github/gpu.py WORK --minutes 9 --epochs 800 # in calls of nine minutes, longer

WORK receives runs, logs and results.jsonl, a line for each row of the table. A row that is there is not
measured again: delete its line for that. With --device cpu and --quick the script itself can be tried.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision

HERE = Path(__file__).resolve().parent.parent
SPEED = ["python", HERE / ".github/speed.py"]
TRAIN = ["python", HERE / "train.py"]


class Rows:
    """The table, on disk: a row is measured once."""

    def __init__(self, work: Path, minutes: float):
        self.work = work
        self.ends = time.monotonic() + 60 * minutes
        self.file = work / "results.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.done = dict(json.loads(line) for line in lines)

    def __call__(self, name: str, measure: Callable[[], str]) -> None:
        if name not in self.done and time.monotonic() < self.ends:
            result = measure()
            if time.monotonic() < self.ends:  # else it was cut short
                self.done[name] = result
                with self.file.open("a") as file:
                    print(json.dumps([name, result]), file=file)
        print(f"| {name} | {self.done.get(name, 'not yet')} |", flush=True)

    def run(self, *words: object, lines: int = 1, env: dict[str, str] | None = None) -> str:
        """The last lines of what a command prints, or how it failed. At the end of the time it gets SIGTERM."""
        command = [sys.executable if word == "python" else str(word) for word in words]
        with open(self.work / "log", "a") as log:
            print("$", *command, file=log, flush=True)
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=self.work, env=os.environ | (env or {})
            )
            try:
                out, _ = process.communicate(timeout=max(1, self.ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)  # train.py saves
                out, _ = process.communicate()
            print(out, file=log, flush=True)
        if process.returncode:
            return f"exit status {process.returncode}, see {self.work}/log"
        return "; ".join(out.splitlines()[-lines:])


def last_row(run: Path) -> str:
    metrics = run / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    if not rows:
        return "no epoch yet"
    knn = [f"{row['epoch']}: {row['knn']:.1%}" for row in rows if row["knn"] is not None]
    row = rows[-1]
    state = f"loss {row['loss']:.3f}, spread {row['spread']:.2f}, rank {row['rank']:.0f}"
    return f"epoch {row['epoch']}, {state}, {row['images_per_second']:.0f} images/s; kNN {', '.join(knn)}"


def resume(rows: Rows, flags: list[str]) -> str:
    """A run in one piece against the same run stopped in the middle."""
    whole, parts = rows.work / "whole", rows.work / "parts"
    rows.run(*TRAIN, *flags, "--epochs", "4", "--out", whole)
    process = subprocess.Popen(
        [sys.executable, *map(str, TRAIN[1:]), *flags, "--epochs", "4", "--out", str(parts)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("epoch   2/"):
            process.send_signal(signal.SIGTERM)
    process.wait()
    rows.run(*TRAIN, "--resume", "--out", parts)
    a, b = (torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)["model"] for run in (whole, parts))
    off = max((a[name].double() - b[name].double()).abs().max().item() for name in a)
    return f"exact (stopped with status {process.returncode})" if off == 0 else f"not exact: {off:.1e} at most"


def write_noise(work: Path, count: int) -> str:
    """Smooth images: as JPEGs of 500 x 375 pixels, and as an array of 224 x 224."""
    import numpy as np

    folder = work / "jpegs"
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, 12, 16, generator=generator)
    for i, image in enumerate(small):
        large = torch.nn.functional.interpolate(image[None], (375, 500), mode="bicubic")[0].clamp(0, 1)
        torchvision.io.write_jpeg((large * 255).byte(), str(folder / f"{i:05}.jpg"))
    arrays = torch.nn.functional.interpolate(small, (224, 224), mode="bicubic").clamp(0, 1)
    np.savez(work / "noise.npz", train_images=(arrays * 255).byte().permute(0, 2, 3, 1).numpy())
    return f"{count} written"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", default="cifar10", help="cifar10, or a folder with train/ and test/")
    parser.add_argument("--minutes", type=float, default=28)
    parser.add_argument("--epochs", type=int, default=200, help="of CIFAR-10")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny networks and no suite: to try this script")
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.work, args.minutes)
    device = ["--device", args.device]
    tiny = "--arch convnet --width 2 --dim 16 --hidden 16 --batch-size 16".split() if args.quick else []
    few = "--epochs 4 --width 2 --dim 16 --hidden 16 --batch-size 500".split() if args.quick else []
    data = args.data if args.data == "cifar10" else str(Path(args.data).resolve())

    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}, torchvision {torchvision.__version__}\n\n| | |\n|---|---|")
    if not args.quick:
        suite = ["python", "-m", "pytest", "-q", HERE / "test_simsiam.py"]
        rows("tests, device cuda", lambda: rows.run(*suite, env={"CUDA_VISIBLE_DEVICES": "0"}))
    rows("resume", lambda: resume(rows, [*device, *few]))
    for amp in ("off", "bf16", "fp16") if args.device == "cuda" else ("off", "bf16"):
        out = args.work / f"textures-{amp}"
        run = [*TRAIN, *device, *few, "--amp", amp, "--resume", "--out", out]
        rows(f"textures, --amp {amp}", lambda run=run, out=out: rows.run(*run) and last_row(out))
    run = [*TRAIN, "--device", "cpu", "--amp", "off", *few, "--resume", "--out", args.work / "textures-cpu"]
    rows("textures on this CPU, float32", lambda: rows.run(*run) and last_row(args.work / "textures-cpu"))
    for count in (1, 2):
        words = ["python", "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", HERE / "train.py"]
        words += [*device, *few, "--epochs", "2", "--resume", "--out", args.work / f"torchrun-{count}"]
        rows(f"torchrun, {count} on one card", lambda words=words: rows.run(*words))

    steps = "2" if args.quick else "40"
    resnet = ["--recipe", "cifar10", *device, *tiny]
    for batch in () if args.quick else (128, 512, 1024):
        words = [*SPEED, steps, *resnet, "--warmup-epochs", "0", "--batch-size", batch]
        rows(f"CIFAR ResNet-18, batch {batch}", lambda words=words: rows.run(*words, lines=2))
    batch = [] if args.quick else ["--batch-size", "512"]
    for amp in ("off", "auto"):
        words = [*SPEED, steps, *resnet, *batch, "--amp", amp, "--alone", "eager"]
        words += [] if args.quick else ["default", "reduce-overhead"]
        rows(f"CIFAR ResNet-18, the step alone, --amp {amp}", lambda words=words: rows.run(*words, lines=3))
    words = [*SPEED, "2" if args.quick else "10", *resnet, *batch, "--usual", min(16, os.cpu_count())]
    rows("CIFAR ResNet-18, the usual way", lambda: rows.run(*words))
    rows("images for ImageNet's recipe", lambda: write_noise(args.work, 64 if args.quick else 2048))
    for source, name in ((args.work / "noise.npz", "tensors"), (args.work / "jpegs", "JPEGs")):
        for amp in ("off", "auto"):
            words = [*SPEED, steps, source, "--recipe", "imagenet", *device, *tiny, "--amp", amp]
            words += [] if args.quick else ["--batch-size", "256", "--workers", min(16, os.cpu_count())]
            rows(f"ImageNet ResNet-50, {name}, --amp {amp}", lambda words=words: rows.run(*words, lines=2))

    cifar = args.work / "cifar10"
    words = [*TRAIN, data, "--recipe", "cifar10", *device, *tiny, "--resume", "--out", cifar]
    words += ["--epochs", args.epochs, *([] if args.quick else ["--batch-size", "512"])]
    while not last_row(cifar).startswith(f"epoch {args.epochs},") and time.monotonic() < rows.ends:
        rows.run(*words)  # at the end of the time a signal saves, and the next call goes on
    if last_row(cifar).startswith(f"epoch {args.epochs},"):
        rows(f"CIFAR-10, {args.epochs} epochs", lambda: last_row(cifar))
        words = ["python", HERE / "eval.py", cifar, *device]
        rows(f"CIFAR-10, {args.epochs} epochs, kNN and linear probe", lambda: rows.run(*words, lines=5))
    else:
        print(f"| CIFAR-10, on its way | {last_row(cifar)} |")


if __name__ == "__main__":
    main()
