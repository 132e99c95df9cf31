"""All that needs a GPU, on one card: prints a table. Half an hour, or several calls, each of which goes on.

    python .github/gpu.py WORK                            # CIFAR-10 by torchvision, downloaded into WORK/data
    python .github/gpu.py WORK --data FOLDER              # or a folder with its images
    python .github/gpu.py WORK --minutes 9 --epochs 800   # for nine minutes; CIFAR-10 longer

WORK receives runs, a log, and results.jsonl with the rows. A row that is there is not measured again; one
that failed is. On one card NCCL and SyncBN have nothing to do: they need two. With --device cpu and --quick
the script itself can be tried; that is all we could do.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision

HERE = Path(__file__).resolve().parent.parent
SPEED = HERE / ".github/speed.py"
TRAIN = HERE / "train.py"


class Rows:
    """The table, on disk: a row is measured once."""

    def __init__(self, work: Path, minutes: float):
        self.work = work
        self.ends = time.monotonic() + 60 * minutes
        self.file = work / "results.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.done = dict(json.loads(line) for line in lines)

    def measure(self, name: str, call: Callable[[], str]) -> None:
        """Prints the row; measures it if need and time are there."""
        if name not in self.done and time.monotonic() < self.ends:
            try:
                self.done[name] = call()
                with self.file.open("a") as file:
                    print(json.dumps([name, self.done[name]]), file=file)
            except (RuntimeError, OSError, ValueError) as error:  # shown, not kept: the next call tries again
                return print(f"| {name} | {error} |", flush=True)
        print(f"| {name} | {self.done.get(name, 'not yet')} |", flush=True)

    def command(self, name: str, *words: object, lines: int = 1) -> None:
        self.measure(name, lambda: "; ".join(self.run(*words)[-lines:]))

    def run(self, *words: object, env: dict[str, str] | None = None, stop_at: str = "\n") -> list[str]:
        """What `python WORDS` prints. SIGTERM after a line that begins with stop_at, or when the time
        is over.

        Raises RuntimeError if it failed or had no time.
        """
        command = [sys.executable, *map(str, words)]
        out = []
        with open(self.work / "log", "a") as log:
            print("$", *command, file=log, flush=True)
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=self.work,
                env=os.environ | (env or {}),
            )  # fmt: skip
            signal.signal(signal.SIGALRM, lambda *_: process.terminate())  # train.py saves
            signal.setitimer(signal.ITIMER_REAL, max(1, self.ends - time.monotonic()))
            for line in process.stdout:
                print(line, end="", file=log, flush=True)
                out.append(line.rstrip())
                if line.startswith(stop_at):
                    process.terminate()
            status = process.wait()
            signal.setitimer(signal.ITIMER_REAL, 0)
        if time.monotonic() > self.ends:
            raise RuntimeError("not yet: the time was over")
        if status and not (stop_at != "\n" and status == 128 + signal.SIGTERM):
            raise RuntimeError(f"exit status {status}: {' '.join(out[-1:])}; see {self.work}/log")
        return out


def last_epoch(run: Path) -> str:
    metrics = run / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    if not rows:
        return "no epoch yet"
    row = rows[-1]
    knn = [f"{row['epoch']}: {row['knn']:.1%}" for row in rows if row["knn"] is not None]
    state = f"loss {row['loss']:.3f}, spread {row['spread']:.2f}, rank {row['rank']:.0f}"
    return f"epoch {row['epoch']}, {state}, {row['images_per_second']:.0f} images/s; kNN {', '.join(knn)}"


def check_tests(rows: Rows) -> str:
    return rows.run("-m", "pytest", "-q", HERE / "test_simsiam.py", env={"CUDA_VISIBLE_DEVICES": "0"})[-1]


def check_resume(rows: Rows, flags: list[str]) -> str:
    """A run in one piece against the same run stopped in the middle."""
    whole = rows.work / "whole"
    parts = rows.work / "parts"
    for run in (whole, parts):
        shutil.rmtree(run, ignore_errors=True)  # of a call that was cut short
    rows.run(TRAIN, *flags, "--epochs", "4", "--out", whole)
    rows.run(TRAIN, *flags, "--epochs", "4", "--out", parts, stop_at="epoch   2/")
    rows.run(TRAIN, *flags, "--epochs", "4", "--out", parts, "--resume")
    a, b = (torch.load(run / "checkpoint.pt", "cpu", weights_only=True)["model"] for run in (whole, parts))
    off = max((a[name].double() - b[name].double()).abs().max().item() for name in a)
    return "exact" if off == 0 else f"not exact: weights differ by {off:.1e} at most"


def train_textures(rows: Rows, name: str, flags: list[str]) -> str:
    rows.run(TRAIN, *flags, "--resume", "--out", rows.work / name)
    return last_epoch(rows.work / name)


def write_images(work: Path, count: int) -> str:
    """Smooth ones, for ImageNet's recipe: JPEGs of 500 x 375 pixels, and an array of 224 x 224."""
    import numpy as np

    folder = work / "jpegs"
    folder.mkdir(exist_ok=True)
    small = torch.rand(count, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    for i, image in enumerate(small):
        large = torch.nn.functional.interpolate(image[None], (375, 500), mode="bicubic")[0].clamp(0, 1)
        torchvision.io.write_jpeg((large * 255).byte(), str(folder / f"{i:05}.jpg"))
    array = torch.nn.functional.interpolate(small, (224, 224), mode="bicubic").clamp(0, 1)
    np.savez(work / "noise.npz", train_images=(array * 255).byte().permute(0, 2, 3, 1).numpy())
    return f"{count} written"


def measure_speed(rows: Rows, device: list[str], quick: bool) -> None:
    tiny = "--arch convnet --width 2 --dim 16 --hidden 16 --batch-size 16".split() if quick else []
    steps = "2" if quick else "40"
    cpus = os.cpu_count() or 1
    cifar = ["--recipe", "cifar10", *device, *tiny, "--warmup-epochs", "0"]  # on textures: as many pixels
    for batch in ["16"] if quick else ["128", "512", "1024"]:
        words = [SPEED, steps, *cifar, "--batch-size", batch]
        rows.command(f"CIFAR ResNet-18, batch {batch}", *words, lines=2)
    cifar += ["--batch-size", "16" if quick else "512"]
    modes = ["eager"] if quick else ["eager", "default", "reduce-overhead"]
    for amp in ("off", "auto"):
        words = [SPEED, steps, *cifar, "--amp", amp, "--alone", *modes]
        rows.command(f"the step alone, --amp {amp}", *words, lines=3)
    rows.command("the usual way", SPEED, steps, *cifar, "--usual", min(16, cpus))
    rows.measure("images for ImageNet's recipe", lambda: write_images(rows.work, 64 if quick else 2048))
    for source in ("noise.npz", "jpegs"):
        for amp in ("off", "auto"):
            words = [SPEED, steps, rows.work / source, "--recipe", "imagenet", *device, "--amp", amp]
            words += tiny or ["--batch-size", "256", "--workers", min(16, cpus)]
            rows.command(f"ImageNet ResNet-50, {source}, --amp {amp}", *words, lines=2)


def train_cifar(rows: Rows, flags: list[str], epochs: int) -> None:
    out = rows.work / f"cifar10-{epochs}"
    name = f"CIFAR-10, App. D, {epochs} epochs"

    def train() -> str:
        rows.run(TRAIN, *flags, "--recipe", "cifar10", "--epochs", epochs, "--resume", "--out", out)
        return last_epoch(out)

    rows.measure(name, train)
    if name in rows.done:
        rows.command(f"{name}: kNN and linear probe", HERE / "eval.py", out, *flags[1:3], lines=5)
    else:
        print(f"| {name}, on its way | {last_epoch(out)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", default="cifar10", help="cifar10, or a folder with train/ and test/")
    parser.add_argument("--minutes", type=float, default=28)
    parser.add_argument("--epochs", type=int, default=200, help="of CIFAR-10")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny networks and no tests, to try this script")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    rows = Rows(work, args.minutes)
    device = ["--device", args.device]
    few = "--epochs 4 --width 2 --dim 16 --hidden 16 --batch-size 500".split() if args.quick else []
    data = args.data if args.data == "cifar10" else str(Path(args.data).resolve())

    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}, torchvision {torchvision.__version__}\n\n| | |\n|---|---|")
    if not args.quick:
        rows.measure("tests, on the card", lambda: check_tests(rows))
    rows.measure("resume", lambda: check_resume(rows, [*device, *few]))
    for amp in ("off", "bf16", "fp16") if args.device == "cuda" else ("off", "bf16"):
        flags = [*device, "--amp", amp, *few]
        rows.measure(f"textures, --amp {amp}", lambda: train_textures(rows, f"textures-{amp}", flags))
    flags = ["--device", "cpu", "--amp", "off", *few]
    rows.measure("textures, on this CPU, float32", lambda: train_textures(rows, "textures-cpu", flags))
    count = torch.cuda.device_count()
    if count > 1:
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", TRAIN]
        rows.command(f"torchrun, {count} cards", *words, "--resume", "--out", work / "torchrun", lines=2)
    measure_speed(rows, device, args.quick)
    tiny = "--arch convnet --width 2 --dim 16 --hidden 16 --batch-size 16".split()
    train_cifar(rows, [data, *device, *(tiny if args.quick else ["--batch-size", "512"])], args.epochs)


if __name__ == "__main__":
    main()
