"""A training step of this trainer with all its hooks and experiments, of a bare megatron-core loop, and of plain PyTorch, in turn.

Usage: python benchmarks/train.py [--pairs P] [--steps-per-block K] [--device cpu|cuda] [--preset NAME] [--config FILE] [--threads N] [--update-alone]

Goals: at most 2% over the bare loop and 10% over plain PyTorch, under 1% of the time spent waiting for data. Scheduled probes, validation and
decisions of controllers are left out of the steps and listed (`longest_step`: what one of them takes). No checkpoint is written.
Two figures without other processes' waiting in them: `cpu_share`, CPU seconds of all hooks and of reading data for each CPU second of a bare
step (each in one thread), and `cpu_over_bare` (`_plain`), CPU seconds of this process in the trainer's steps over those in the rival's. On a GPU
the denominator is wall time and the second is left out.
"""

import argparse
import dataclasses
import logging
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import torch
from measuring import ratios, show, spread
from rivals import BareLoop, MicroBatches, PlainLoop

from megatron_exp.cli.quickstart import standard_library
from megatron_exp.config.load import load_config
from megatron_exp.model.step import MicroBatch, train_step
from megatron_exp.parallel.layout import Layout, start_parallel
from megatron_exp.preparation.bpe import train_bpe
from megatron_exp.preparation.plan import plan
from megatron_exp.preparation.preprocess import preprocess
from megatron_exp.preparation.texts import texts_of
from megatron_exp.seeding import Words
from megatron_exp.training.hooks.base import Hook
from megatron_exp.training.hooks.checkpoint import CheckpointHook
from megatron_exp.training.hooks.record import RecordHook
from megatron_exp.training.hooks.stop import StopHook
from megatron_exp.training.loop import train_loop
from megatron_exp.training.resume import Beginning
from megatron_exp.training.run import Run
from megatron_exp.training.train import assemble, make_hooks, make_plan, open_directory

ROOT = Path(__file__).parents[1]
SCHEDULED = {"ProbeHook", "ValidationHook", "ControlHook"}
"""Hooks that work in scheduled steps only, where that work is what was asked for; listed by themselves."""


@dataclasses.dataclass
class Cost:
    """Of one hook so far."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    calls: int = 0
    longest: float = 0.0

    def clear(self) -> None:
        """Forget what was counted."""
        self.__init__()  # type: ignore[misc]


class Clock(NamedTuple):
    """Wall time, and CPU time of this process."""

    seconds: float
    cpu_seconds: float

    @classmethod
    def now(cls) -> "Clock":
        """Since some moment."""
        return cls(time.perf_counter(), time.process_time())

    def __sub__(self, other: "Clock") -> "Clock":
        return Clock(self.seconds - other.seconds, self.cpu_seconds - other.cpu_seconds)


class Timed(Hook):
    """A hook whose work after steps is timed."""

    def __init__(self, hook: Hook, costs: dict[str, Cost]):
        self.name = hook.name
        self._hook = hook
        self._cost = costs[type(hook).__name__]
        self.on_start, self.on_end, self.on_error = hook.on_start, hook.on_end, hook.on_error  # type: ignore[method-assign]

    def on_step(self, run: Run) -> None:
        """The hook's own, timed."""
        begin, cpu = time.perf_counter(), time.thread_time()
        self._hook.on_step(run)
        seconds = time.perf_counter() - begin
        self._cost.seconds += seconds
        self._cost.cpu_seconds += time.thread_time() - cpu
        self._cost.calls += 1
        self._cost.longest = max(self._cost.longest, seconds)


class Pacer(Hook):
    """The last hook: after every block of the trainer's steps the rivals do as many, on the trainer's own batches."""

    def __init__(self, block: int, pairs: int, costs: dict[str, Cost], rivals: dict[str, Callable[[MicroBatches], object]]):
        self._block, self._pairs, self._costs, self._rivals = block, pairs, costs, rivals
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.cpu_seconds: dict[str, list[float]] = defaultdict(list)
        self.wait = 0.0
        self._is_warm = False
        self._batches: list[MicroBatches] = []
        self._begin = self._scheduled = Clock(0.0, 0.0)

    def on_start(self, run: Run, state: Any) -> None:
        """The first block begins."""
        del run, state
        self._restart()

    def on_step(self, run: Run) -> None:
        """At the end of a block: its time, then the rivals'."""
        assert run.last is not None
        device = run.layout.device
        self._batches.append([(part.tokens.to(device), part.loss_mask.to(device)) for part in run.last.batch.micro_batches])
        self.wait += run.last.wait_seconds
        if len(self._batches) < self._block:
            return
        synchronize(run.layout)
        self._note("trainer", Clock.now() - self._begin - (self._of_scheduled() - self._scheduled))
        for name, step in self._rivals.items():
            self._note(name, timed(run.layout, step, self._batches))
        if not self._is_warm:  # the first block warms all of them up
            self._is_warm, self.wait = True, 0.0
            self.seconds.clear()
            self.cpu_seconds.clear()
            for name in self._costs:
                self._costs[name].clear()
        run.stop = len(self.seconds["trainer"]) == self._pairs
        self._restart()

    def _restart(self) -> None:
        self._batches = []
        self._scheduled = self._of_scheduled()
        self._begin = Clock.now()

    def _note(self, name: str, spent: "Clock") -> None:
        self.seconds[name].append(spent.seconds)
        self.cpu_seconds[name].append(spent.cpu_seconds)

    def _of_scheduled(self) -> "Clock":
        costs = [cost for name, cost in self._costs.items() if name in SCHEDULED]
        return Clock(sum(cost.seconds for cost in costs), sum(cost.cpu_seconds for cost in costs))


def synchronize(layout: Layout) -> None:
    """Wait for the device."""
    if layout.device.type == "cuda":
        torch.cuda.synchronize()


def timed(layout: Layout, step: Callable[[MicroBatches], object], batches: list[MicroBatches]) -> Clock:
    """What a block of a rival takes."""
    begin = Clock.now()
    for batch in batches:
        step(batch)
    synchronize(layout)
    return Clock.now() - begin


def prepare(directory: Path, options: argparse.Namespace) -> Path:
    """A corpus of Python's standard library, or larger of made-up words, and the manifest of a configuration on it."""
    sources = [f"python-stdlib={path}" for path in standard_library()]
    directory.mkdir(parents=True, exist_ok=True)
    train_bpe(texts_of(sources), options.vocabulary, directory / "tokenizer.json")
    if options.made_up_tokens:
        sources = [str(made_up(directory / "texts.jsonl", options.made_up_tokens))]
    preprocess(sources, directory / "tokenizer.json", directory / "corpus")
    config = load_config(options.config, [f"corpus.path={directory / 'corpus'}", *options.set])
    plan(config, directory / "manifest")
    return directory / "manifest"


def made_up(path: Path, num_tokens: int) -> Path:
    """JSON lines with at least so many tokens: two letters or more make one."""
    words = [f"{a}{b}" for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "ai", "on", "er")]
    with open(path, "wb") as file:
        for number in range(num_tokens // 2000 + 1):
            drawn = Words.of(0, "benchmark", number).integers(2000, len(words))
            file.write(orjson.dumps({"text": " ".join(words[index] for index in drawn)}) + b"\n")
    return path


class TimedFeed:
    """CPU seconds of the thread that reads data."""

    def __init__(self, run: Run):
        self.cpu_seconds = 0.0
        read = run.feed._read

        def timed_read(step: int) -> Any:
            begin = time.thread_time()
            batch = read(step)
            self.cpu_seconds += time.thread_time() - begin
            return batch

        run.feed._read = timed_read  # type: ignore[method-assign]


def measure(manifest: Path, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train until enough pairs of blocks are measured."""
    overrides = [f"training.micro_batch_size={options.micro_batch_size}", f"training.precision={options.precision}", f"model.preset={options.preset}"]
    plan_of_run = make_plan(manifest, directory / "run", False, frozenset(), overrides)
    layout = start_parallel(plan_of_run.config.training.parallel, options.threads)
    run = assemble(plan_of_run, layout, Beginning(1, 0, None))
    shape, precision = run.model.shape, run.model.precision
    bare = BareLoop(shape, layout, precision)
    rivals: dict[str, Callable[[MicroBatches], object]] = {"bare": bare.step}
    if not options.without_plain:
        rivals["plain"] = PlainLoop(shape, layout.device, run.model.dtype).step
    if options.update_alone:
        rivals["update"] = lambda batches: train_step(run.model, run.optimizer, [MicroBatch(*part) for part in batches])
    costs: dict[str, Cost] = defaultdict(Cost)
    pacer, feed = Pacer(options.steps_per_block, options.pairs, costs, rivals), TimedFeed(run)
    try:
        with open_directory(run) as written:
            made = make_hooks(run, written, RecordHook([], None), StopHook(), ())
            hooks: list[Hook] = [Timed(hook, costs) for hook in made if not isinstance(hook, CheckpointHook)]
            train_loop(run, [*hooks, pacer])
    finally:
        run.feed.close()
        layout.stop()
    return summary(run, pacer, costs, feed, options)


def summary(run: Run, pacer: Pacer, costs: dict[str, Cost], feed: TimedFeed, options: argparse.Namespace) -> dict[str, Any]:
    """What is printed."""
    steps = options.pairs * options.steps_per_block
    seconds = {name: [value / options.steps_per_block for value in values] for name, values in pacer.seconds.items()}
    on_gpu = run.layout.device.type == "cuda"
    bare_total = sum((pacer.seconds if on_gpu else pacer.cpu_seconds)["bare"])
    always = {name: cost for name, cost in costs.items() if name not in SCHEDULED}
    reading = feed.cpu_seconds * steps / run.step
    return {
        "model": run.model.shape.preset,
        "parameters": run.model.shape.num_parameters,
        "experiments": len(run.plan.manifest.experiments),
        "seconds_per_step": {name: spread(values) for name, values in seconds.items()},
        "trainer_over_bare": ratios(seconds["trainer"], seconds["bare"]),
        "goal_trainer_over_bare": 1.02,
        **({"trainer_over_plain": ratios(seconds["trainer"], seconds["plain"]), "goal_trainer_over_plain": 1.1} if "plain" in seconds else {}),
        **({"update_over_bare": ratios(seconds["update"], seconds["bare"])} if "update" in seconds else {}),
        **({} if on_gpu else {f"cpu_over_{name}": ratios(pacer.cpu_seconds["trainer"], values) for name, values in rivals_of(pacer).items()}),
        "cpu_share": round((sum(cost.cpu_seconds for cost in always.values()) + reading) / bare_total, 4),
        "cpu_share_of": {"reading": round(reading / bare_total, 4)} | {name: round(cost.cpu_seconds / bare_total, 4) for name, cost in always.items()},
        "waiting_for_data": round(pacer.wait / sum(pacer.seconds["trainer"]), 4),
        "left_out": {
            name: {"seconds": round(cost.seconds, 3), "longest_step": round(cost.longest, 3)} for name, cost in costs.items() if name in SCHEDULED
        },
        "device": str(run.layout.device),
        "threads": run.layout.threads,
    }


def rivals_of(pacer: Pacer) -> dict[str, list[float]]:
    """CPU seconds of each rival's blocks."""
    return {name: values for name, values in pacer.cpu_seconds.items() if name != "trainer"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps-per-block", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp8"], default=None, help="default: fp32 on CPU, bf16 on CUDA")
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "ten-small.yaml")
    parser.add_argument("--set", action="append", default=[], help="a.b=value over the configuration; repeatable")
    parser.add_argument("--made-up-tokens", type=int, default=0, help="size of a made-up corpus, where the standard library's 5M tokens are too few")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--update-alone", action="store_true", help="also time the trainer's update on batches on the device, without hooks, reading and noise")
    parser.add_argument("--prepared", type=Path, help="where corpus and manifest are kept, and used if they are there already (default: a temporary directory)")
    parser.add_argument("--without-plain", action="store_true", help="where three models do not fit on the device")
    options = parser.parse_args()
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "fp32")
    if (options.device == "cuda") != torch.cuda.is_available():
        parser.error(f"--device {options.device}, but CUDA is {'' if torch.cuda.is_available() else 'not '}available: the trainer computes where it is.")
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        prepared = options.prepared or Path(folder)
        manifest = prepared / "manifest" if (prepared / "manifest").exists() else prepare(prepared, options)
        result = measure(manifest, Path(folder), options)
    show("train", **result)


if __name__ == "__main__":
    main()
