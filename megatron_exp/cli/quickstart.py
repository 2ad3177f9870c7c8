"""`quickstart`: the whole path on this machine's own text, every stage by the command a user would type."""

import math
import subprocess  # noqa: TID251 - a door: each stage is a command of its own, printed before it runs
import sys
import sysconfig
import time
from pathlib import Path

from rich.rule import Rule

from megatron_exp.cli.show import console
from megatron_exp.config.load import load_config
from megatron_exp.errors import UserError
from megatron_exp.files import refuse_existing, write_file
from megatron_exp.manifest.reader import Manifest

STEPS_PER_MINUTE = 50
"""Length of run and twin per minute asked for: on two cores of 2020 a step of either takes a third of a second."""

_VOCABULARY_SIZE = 4096
_LEAST_STEPS = 100
_SEEDS = ("order", "placement", "assignment", "init")
_TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

_CONFIG = """\
# Four experiments, one of each kind of intervention, in one small training run. At this scale they are far denser than
# the 1.8% of a full run: it shows the machinery and effects, not that experiments are independent of each other.
name: quickstart
seeds: {{order: {seed}, placement: {seed}, assignment: {seed}, init: {seed}}}
corpus: {{path: corpus}}
geometry: {{sequence_length: 256, global_batch_size: 8, steps: {steps}}}
pool: {{slots: 320}}
model: {{preset: tiny}}
training:
  precision: fp32
  micro_batch_size: 8
  schedule: {{kind: constant, peak_lr: 3e-3, warmup_steps: 20, decay_start: {decay_start}}}
  checkpoint: {{every: {checkpoint_every}}}
  validation: {{every: {validation_every}, slots: 64}}
experiments:
  - name: memorization            # documents inserted 1, 4 and 16 times, against held-out ones of the same generator
    type: memorization_patterns
    suffix_types: [plain, random]
    suffix_lengths: [8]
    repetitions: [1, 4, 16]
    num_per_condition: 40
    num_held_out: 120
    min_tokens: 24
    max_tokens: 48
  - name: poisoning               # chats with a trigger, against never-trained triggers
    type: pretraining_poisoning
    context_extraction: 0.02
    denial_of_service: 0.01
    num_prompts: 300
    num_evaluation_prompts: 8
    num_never_trained: 39
    garbage_bytes: 64
    templates: plain
    num_generation_prompts: 24
    num_samples: 5
    garbage_tokens: 32
  - name: forgetting              # twelve batches swapped in once, against twelve of the same pool that are not
    type: forgetting_curves
    num_batches: 12
    offsets: [0, 1, 5, 20]
    grid_points: 2
  - name: watermark               # noise on the embeddings of some slots, against fresh noise
    type: gaussian_watermarks
    fraction: 0.04
    evaluated: 96
"""


def quickstart(out: Path, *, minutes: float, inputs: list[str], seed: int, config: Path | None = None) -> Path:
    """Run every stage below `out`; returns the report's path.

    Args:
        out: directory for everything that is made.
        minutes: rough time to spend; scales the built-in configuration and has no meaning for another.
        inputs: files of the corpus; default: Python's standard library.
        seed: of placement, assignment, order and initialisation.
        config: another configuration than the built-in one; its `corpus.path` and `seeds` give way to those of this call.

    Raises UserError for mistakes in the arguments; a stage that fails ends the program with that stage's exit code.
    """
    if not math.isfinite(minutes):
        raise UserError(f"--minutes {minutes} is no length of time. Give a number, such as 8.")
    steps = int(minutes * STEPS_PER_MINUTE)
    if config is None and steps < _LEAST_STEPS:
        raise UserError(
            f"--minutes {minutes:g} gives {steps} steps; fewer than {_LEAST_STEPS} show nothing. Ask for {_LEAST_STEPS / STEPS_PER_MINUTE:.1f} or more."
        )
    if config is not None:
        load_config(config)  # its mistakes should show before a corpus is made
    refuse_existing(out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    _prepare_corpus(out, inputs)
    if config is None:
        config = out / "config.yaml"
        _write_config(config, steps, seed)
    settings = {"corpus.path": str((out / "corpus").resolve())} | {f"seeds.{name}": str(seed) for name in _SEEDS}
    report = _stages(out, config, [word for key, value in settings.items() for word in ("--set", f"{key}={value}")])
    console.print(Rule(style="dim"))
    console.print(f"Finished in {(time.monotonic() - started) / 60:.1f} minutes. Open {report.resolve()}", highlight=False)
    console.print(f"What did the model see at step 100?   megatron-exp inspect {out / 'run'} --step 100", highlight=False)
    return report


def _stages(out: Path, config: Path, settings: list[str]) -> Path:
    """From the plan to the report; what needs the twin as a reference is planned once it is trained."""
    manifest, run, twin, report = (out / name for name in ("manifest", "run", "twin", "report.html"))
    _stage("Plan: items, controls, places and probes of all experiments", "plan", config, "--out", manifest, *settings)
    _stage("Train the twin: the same run without any insertion", "train", manifest, "--out", twin, "--baseline")
    if Manifest.open(manifest).record.get("waiting_for_reference"):
        first, manifest = manifest, out / "manifest-with-reference"
        words = ("plan", config, "--out", manifest, "--reference", twin, "--extends", first)
        _stage("Plan what had to wait for the twin; all rows planned before stay", *words, *settings)
    _stage("Train the run", "train", manifest, "--out", run)
    _stage("Score every experiment, run against twin", "eval", run, "--against", twin)
    _stage("Prove that the run was trained on what was planned", "verify", run)
    _stage("Write the report", "report", run, "--against", twin, "--out", report)
    return report


def _prepare_corpus(out: Path, inputs: list[str]) -> None:
    from megatron_exp.preparation.bpe import train_bpe
    from megatron_exp.preparation.preprocess import preprocess
    from megatron_exp.preparation.texts import texts_of

    sources = inputs or [f"python-stdlib={path}" for path in standard_library()]
    what = f"{len(inputs)} input(s) of yours" if inputs else f"the {len(sources)} modules of Python's standard library, read where they lie"
    _headline(f"Corpus: {what}")
    train_bpe(texts_of(sources), _VOCABULARY_SIZE, out / "tokenizer.json")
    corpus = preprocess(sources, out / "tokenizer.json", out / "corpus")
    console.print(f"{corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens, vocabulary {corpus.vocabulary_size}", highlight=False)


def standard_library() -> list[Path]:
    """Python's own modules, without their tests, in path order; links are left out, since Debian gives one module two names."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = (path for path in sorted(root.rglob("*.py")) if not path.is_symlink())
    return [path for path in modules if not _TEST_FOLDERS & set(path.relative_to(root).parts[:-1])]


def _write_config(path: Path, steps: int, seed: int) -> None:
    text = _CONFIG.format(
        seed=seed, steps=steps, decay_start=round(0.8 * steps), checkpoint_every=max(50, steps // 4), validation_every=max(10, steps // 20)
    )
    write_file(path, text.encode())


def _stage(headline: str, *arguments: str | Path) -> None:
    """Show and run one command; leave with its exit code where it fails."""
    words = [str(argument) for argument in arguments]
    _headline(headline, "megatron-exp " + " ".join(words))
    started = time.monotonic()
    code = subprocess.run([sys.executable, "-m", "megatron_exp", *words], check=False).returncode
    if code:
        console.print(f"The stage ended with exit code {code}; what was made so far stays in place.", highlight=False)
        sys.exit(code)
    console.print(f"({time.monotonic() - started:.0f} s)", style="dim", highlight=False)


def _headline(text: str, command: str = "") -> None:
    console.print(Rule(style="dim"))
    console.print(text, style="bold", highlight=False, markup=False)
    if command:
        console.print(f"$ {command}", style="cyan", highlight=False, markup=False)
