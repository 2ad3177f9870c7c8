"""Everything that only a GPU can show, on one Hopper GPU: correctness first, then speed and where it goes.

Usage: python benchmarks/gpu/run.py --out results.jsonl [--only PART...] [--minutes M]
       python benchmarks/gpu/run.py --show results.jsonl

Each part runs in a process of its own, so that one that fails takes nothing with it, and its line is in the file as soon as it is known:
`name`, `state` (ok, failed, not run), `seconds`, and `result`, or `reason` where there is none. A part whose line is `ok` is not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PART_MINUTES = 15
EXPERIMENTS = {
    "179m": ("olmo2-179m", 16, ["geometry.global_batch_size=32", "geometry.steps=250", "pool.slots=3000", "training.schedule.decay_start=200"]),
    "1b": ("olmo2-1b", 4, ["geometry.global_batch_size=8", "geometry.steps=1000", "pool.slots=1400"]),
}
"""Models that are also trained by the whole trainer, with all experiments of examples/ten-small.yaml, beside a bare loop: preset, size of a
micro-batch, settings. Two micro-batches make an update, as many tokens each as keep the GPU busy."""


def part_names() -> Iterator[str]:
    """All parts in order; known without torch, so that `--show` and a machine without GPU need nothing."""
    yield from ("machine", "bf16-local", "engine-against-local")
    yield from (f"fp8-{recipe}" for recipe in ("tensorwise", "blockwise", "delayed", "mxfp8"))
    yield from ("deterministic", "deterministic-off")
    for model in ("179m", "1b", "7b-shaped"):
        yield from (f"throughput-{model}-{precision}" for precision in ("bf16", "tensorwise", "blockwise"))
        if model in EXPERIMENTS:
            yield f"experiments-{model}-bf16"


def reason_not_to_run() -> str | None:
    """Why no part can run here, or None."""
    try:
        import torch
    except ImportError:
        return "no PyTorch"
    if not torch.cuda.is_available():
        return "no CUDA: " + ("this PyTorch is a CPU build" if torch.version.cuda is None else "PyTorch sees no GPU")
    return None


def reason_not_to_run_part(part: str) -> str | None:
    """Why this part cannot run on this GPU, or None."""
    from megatron_exp.model import precision
    from megatron_exp.parallel.device import compute_capability

    recipe = next((name for name in precision.RECIPES if part.endswith(name)), None)
    needs_engine = recipe is not None or part == "engine-against-local"
    version = precision.engine_version()
    if needs_engine and version is None:
        return f"no Transformer Engine: {precision.INSTALL_ENGINE}"
    if version is not None and not precision.is_tested_engine(version) and part not in ("machine", "bf16-local"):
        return f"Transformer Engine {version} is outside the range this megatron-core is made for"
    if recipe is not None:
        known = precision.RECIPES[recipe]
        if not known.lowest <= compute_capability() < known.highest:
            return f"{recipe} needs {known.needs}"
    return None


def command_of(part: str) -> list[str]:
    """The process of a part; its last line is JSON."""
    kind, _, rest = part.partition("-")
    if kind != "experiments":
        return [sys.executable, str(HERE / "run.py"), "--part", part]
    preset, rows, settings = EXPERIMENTS[rest.partition("-")[0]]
    words = [word for setting in (*settings, "geometry.sequence_length=4096", "model.vocabulary_size=100352") for word in ("--set", setting)]
    arguments = ["--device", "cuda", "--preset", preset, "--micro-batch-size", str(rows), "--pairs", "10", "--made-up-tokens", "60000000"]
    return [sys.executable, str(HERE.parent / "train.py"), *arguments, "--without-plain", "--update-alone", *words]


def run_part(part: str, minutes: float) -> dict[str, Any]:
    """One line of the results."""
    begin = time.monotonic()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{HERE}:{HERE.parent}", "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(command_of(part), capture_output=True, text=True, env=environment, timeout=60 * minutes, check=False)
    except subprocess.TimeoutExpired:
        return {"name": part, "state": "failed", "seconds": round(time.monotonic() - begin, 1), "reason": f"not done after {minutes:g} minutes"}
    line: dict[str, Any] = {"name": part, "state": "failed", "seconds": round(time.monotonic() - begin, 1)}
    if done.returncode:
        return line | {"reason": done.stderr[-2000:]}
    return line | {"state": "ok", "result": json.loads(done.stdout.splitlines()[-1])}


def append(path: Path, line: dict[str, Any]) -> None:
    """Write a line so that it is there whatever happens next."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The last line of every part, in order of parts."""
    found = {line["name"]: line for text in path.read_text(encoding="utf-8").splitlines() if (line := json.loads(text))} if path.exists() else {}
    return [found[name] for name in part_names() if name in found]


def run(out: Path, only: list[str], minutes: float) -> None:
    """Run what has not been run; nothing is run again."""
    nowhere = reason_not_to_run()
    done = {line["name"] for line in lines_of(out) if line["state"] == "ok"}
    for part in part_names():
        if part in done or (only and part not in only):
            continue
        reason = nowhere or reason_not_to_run_part(part)
        line = {"name": part, "state": "not run", "reason": reason} if reason else run_part(part, minutes)
        append(out, line)
        print(summary(line), flush=True)


def summary(line: dict[str, Any]) -> str:
    """One line for people."""
    text = f"{line['name']:32} {line['state']:8}"
    if line["state"] != "ok":
        return f"{text} {line['reason'].strip().splitlines()[-1] if line['reason'].strip() else ''}"
    shown = {key: value for key, value in line["result"].items() if isinstance(value, str | int | float | bool)}
    return text + " " + ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items())


def main() -> None:
    """Run, show, or be the process of one part."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="results file; parts are added to it")
    parser.add_argument("--only", nargs="*", default=[], choices=list(part_names()), help="only these parts")
    parser.add_argument("--minutes", type=float, default=PART_MINUTES, help="most time for one part")
    parser.add_argument("--show", type=Path, help="print a results file")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        from parts import measure

        print(json.dumps(measure(options.part)))
    elif options.show:
        for line in lines_of(options.show):
            print(summary(line))
    elif options.out:
        run(options.out, options.only, options.minutes)
    else:
        parser.error("give --out or --show")


if __name__ == "__main__":
    main()
