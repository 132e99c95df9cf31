"""Measures everything that needs a GPU, on one card, and prints a table.

    python .github/gpu.py WORK --minutes 9                 # CIFAR-10 is downloaded into WORK/data
    python .github/gpu.py WORK --minutes 9 --data FOLDER   # or a folder with its images

WORK receives runs, a log, and results.jsonl with the rows. A second call measures only missing rows and
repeats the comparison of a resumed run. NCCL and SyncBN need two cards and are not tested. With --device
cpu --tiny, the script itself can be tested on a CPU; we have not run it on a GPU.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent
TINY = "--arch convnet --width 2 --dim 16 --hidden 16 --batch-size 16 --warmup-epochs 0".split()


class Table:
    def __init__(self, work: Path, minutes: float):
        self.work = work
        self.deadline = time.monotonic() + 60 * minutes
        self.file = work / "results.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.done = dict(json.loads(line) for line in lines)

    def row(self, name: str, *words: object, lines: int = 1) -> None:
        """Measures a row, unless it is already known or the time is up, and prints it."""
        if name not in self.done and time.monotonic() < self.deadline:
            try:
                self.done[name] = "; ".join(self.run(*words)[-lines:])
                with self.file.open("a") as file:
                    print(json.dumps([name, self.done[name]]), file=file)
            except subprocess.SubprocessError as error:  # the next call tries again
                print(error, file=sys.stderr)
        print(f"| {name} | {self.done.get(name, 'not yet')} |", flush=True)

    def run(self, *words: object) -> list[str]:
        """Returns the output lines of `python WORDS`. Raises an error if it fails or times out."""
        left = self.deadline - time.monotonic()
        with open(self.work / "log", "a") as log:
            command = [sys.executable, *map(str, words)]
            options = dict(stderr=log, text=True, cwd=self.work, timeout=left)
            return subprocess.check_output(command, **options).splitlines()


def compare_resumed(table: Table, flags: list[str]) -> None:
    """Prints the largest difference between the weights of a whole run and of a resumed one."""
    for run in ("whole", "parts"):
        shutil.rmtree(table.work / run, ignore_errors=True)
    table.run(HERE / "train.py", "textures", *flags, "--epochs", 4, "--keep-every", 2, "--out", "whole")
    (table.work / "parts").mkdir()
    shutil.copy(table.work / "whole/checkpoint-0002.pt", table.work / "parts/checkpoint.pt")
    table.run(HERE / "train.py", "--resume", "parts", *flags[:2])
    files = [table.work / run / "checkpoint.pt" for run in ("whole", "parts")]
    a, b = (torch.load(file, "cpu", weights_only=True)["model"] for file in files)
    difference = max((a[name].double() - b[name]).abs().max() for name in a)
    print(f"| resume, largest difference of a weight | {difference} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", default="cifar10", help="cifar10, or a folder with train/ and test/")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--epochs", type=int, default=200, help="epochs on CIFAR-10")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try this script")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    table = Table(args.work.resolve(), args.minutes)
    device = ["--device", args.device]
    tiny = TINY if args.tiny else []
    data = args.data if args.data == "cifar10" else Path(args.data).resolve()
    print(f"{args.device}, torch {torch.__version__}\n\n| | |\n|---|---|")

    compare_resumed(table, [*device, *tiny])
    for amp in ("off", "bf16", "fp16"):
        flags = [*device, "--amp", amp, *tiny, *(["--epochs", 2] if args.tiny else [])]
        words = ["textures", *flags, "--resume", f"textures-{amp}"]
        table.row(f"textures, {amp}", HERE / "train.py", *words, lines=2)
    for recipe, batch in (("cifar10", 512), ("imagenet", 64)):
        flags = ["--recipe", recipe, *device, "--batch-size", batch, *tiny]  # on textures, resized
        table.row(f"speed, recipe {recipe}", HERE / ".github/speed.py", 20, "textures", *flags, lines=2)
    flags = ["--recipe", "cifar10", "--epochs", args.epochs, *device, *tiny]
    table.row("CIFAR-10, App. D", HERE / "train.py", data, *flags, "--resume", "cifar10", lines=2)
    table.row("kNN and linear probe", HERE / "eval.py", "cifar10", *device, lines=5)


if __name__ == "__main__":
    main()
