"""What each process of `test_layouts` does: the same run in several layouts, one after the other.

Usage: worker.py DIRECTORY LAYOUTS, with the variables that torchrun sets. Leaves DIRECTORY/<layout>.<rank>.pt and checkpoints.
"""

import sys
from pathlib import Path

import torch

from megatron_exp.checkpoint.saving import save_checkpoint
from megatron_exp.checkpoint.state import load_checkpoint
from megatron_exp.config.schema import OptimizerConfig, ParallelConfig
from megatron_exp.model.build import LanguageModel
from megatron_exp.model.noise import applied_noise
from megatron_exp.model.optimizer import Optimizer, build_optimizer
from megatron_exp.model.scoring import embedding_gradients, next_token_logits, token_scores
from megatron_exp.model.step import MicroBatch, micro_batch_rows, train_step
from megatron_exp.parallel.layout import Layout
from megatron_exp.parallel.slices import batch_positions, embedding_positions
from megatron_exp.scoring.engine import Scorer
from megatron_exp.seeding import key
from megatron_exp.stream.base import NoiseSpec
from tests.model.tiny import LENGTH, ROWS, mask_of, running, same_weights, tiny_model, tokens_of, train, trainable, weights

LAYOUTS = {
    "two": {
        "tp2": ParallelConfig(tp=2),
        "tp2-sp": ParallelConfig(tp=2, sequence_parallel=True),
        "dp2": ParallelConfig(),
        "pp2": ParallelConfig(pp=2),
        "pp2-interleaved": ParallelConfig(pp=2, virtual=2),
        "cp2": ParallelConfig(cp=2),
    },
    "four": {
        "tp2-dp2": ParallelConfig(tp=2, sequence_parallel=True),
        "tp2-pp2": ParallelConfig(tp=2, pp=2),
        "pp2-interleaved-dp2": ParallelConfig(pp=2, virtual=2),
        "pp4": ParallelConfig(pp=4),
        "tp2-cp2": ParallelConfig(tp=2, cp=2),
    },
}
KV_GROUPS = (4, 2)
LAYERS = 4
PROMPTS = [tokens_of(9)[row, :size].numpy() for row, size in enumerate((3, 12, 12, 7))]
NOISE = [[NoiseSpec(1, row, 0.05)] if row % 2 else [] for row in range(ROWS)]
"""Rows 1 and 3 are noised, so that every replica of dp2 has one."""
STEPS = range(20)


def micro_batch_size(layout: Layout) -> int:
    """Two micro-batches a step in every layout."""
    return ROWS // layout.dp_size // 2


def model_of(layout: Layout, seed: int = 0, kv_groups: int = 2) -> tuple[LanguageModel, Optimizer]:
    return trainable(layout, seed=seed, kv_groups=kv_groups, layers=LAYERS)


def logits_and_gradients(layout: Layout, directory: Path, name: str, kv_groups: int) -> torch.Tensor:
    """fp32 [S, V] logits after each position of a text, by the weights of `random-<kv_groups>`; leaves the gradients of one batch.

    Those are the first moments of the optimizer in the checkpoint `<name>-gradients-<kv_groups>`: they forget nothing and are not clipped.
    """
    model = tiny_model(layout, seed=1, kv_groups=kv_groups, layers=LAYERS)
    load_checkpoint(directory / f"random-{kv_groups}", model, None)
    text = tokens_of(0)[:1, :-1].expand(LENGTH, -1)
    logits = next_token_logits(model, text, torch.arange(LENGTH))
    optimizer = build_optimizer(model, OptimizerConfig(beta1=0.0, weight_decay=0.0, clip=0.0))
    optimizer.set_learning_rate(0.0)
    step(model, optimizer, 0)
    save_checkpoint(directory / f"{name}-gradients-{kv_groups}", model, optimizer, {})
    return logits


def step(model: LanguageModel, optimizer: Optimizer, number: int) -> None:
    rows = micro_batch_rows(model.layout, ROWS, micro_batch_size(model.layout))
    train_step(model, optimizer, [MicroBatch(tokens_of(number)[list(part)], mask_of(number)[list(part)]) for part in rows])


def noise_is_added(layout: Layout) -> bool:
    """Whether the embeddings this process holds are the clean ones plus its part of the noise, bit for bit."""
    model = tiny_model(layout, layers=LAYERS)
    if not layout.is_first_stage:
        return True
    embedding, positions = model.chunks[0].embedding, embedding_positions(layout, LENGTH)
    inputs = tokens_of(0)[:, :-1][:, batch_positions(layout, LENGTH)]
    clean = embedding(input_ids=inputs, position_ids=None)
    model.noise.set(NOISE)
    noised = embedding(input_ids=inputs, position_ids=None)
    rows = [clean[:, row] + applied_noise(specs, LENGTH, 32, model.dtype, positions=positions) if specs else clean[:, row] for row, specs in enumerate(NOISE)]
    return torch.equal(noised, torch.stack(rows, dim=1))


def overlap_changes_nothing(layout: Layout) -> bool:
    """Whether sending gradients and weights while others are computed gives bitwise the same scores and weights."""
    made = []
    for overlap in (False, True):
        model = tiny_model(layout, layers=LAYERS)
        optimizer = build_optimizer(model, OptimizerConfig(), overlap=overlap)
        results = train(model, optimizer, range(2), micro_batch_size(layout))
        scores = token_scores(model, tokens_of(7)).losses
        results += train(model, optimizer, [2], micro_batch_size(layout))
        model.complete_weights()
        made.append((results, scores, weights(model)))
    (one, scores, ours), (other, other_scores, theirs) = made
    return one == other and torch.equal(scores, other_scores) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def short_run(layout: Layout, directory: Path, name: str) -> dict:
    """Initial weights, noised updates, scores, and what a checkpoint gives back; equal on every rank."""
    model, optimizer = model_of(layout)
    save_checkpoint(directory / f"{name}-initial", model, None, {})
    at_once = micro_batch_size(layout)
    updates = train(model, optimizer, STEPS, at_once, noise=NOISE)
    save_checkpoint(directory / f"{name}-trained", model, optimizer, {"steps": len(STEPS)})
    save_checkpoint(directory / f"{name}-parallel", model, optimizer, {"steps": len(STEPS)}, is_portable=False)
    going_on = train(model, optimizer, [3], at_once)
    bitwise = []
    for form in ("trained", "parallel"):
        resumed, its_optimizer = model_of(layout, seed=1)
        extra = load_checkpoint(directory / f"{name}-{form}", resumed, its_optimizer)
        bitwise.append(train(resumed, its_optimizer, [3], at_once) == going_on and same_weights(resumed, model))
    is_bitwise = all(bitwise)
    moved, its_optimizer = model_of(layout, seed=1)
    load_checkpoint(directory / "single-trained", moved, its_optimizer)
    resharded, that_optimizer = model_of(layout, seed=1)
    if (directory / "tp2-trained").exists():  # the first of the pairs is tp2, and what it saved is loaded by all
        load_checkpoint(directory / "tp2-trained", resharded, that_optimizer)
    tokens, mask = tokens_of(7)[:, :30], mask_of(7)[:, :29]
    scorer = Scorer(model)
    return {
        "logits": {kv_groups: logits_and_gradients(layout, directory, name, kv_groups) for kv_groups in KV_GROUPS},
        "noise": noise_is_added(layout),
        "overlap": overlap_changes_nothing(layout),
        "greedy": scorer.greedy(PROMPTS, 5),
        "sample": scorer.sample(PROMPTS, 5, 1.0, [key(0, number) for number in range(len(PROMPTS))]),
        "losses": [update.loss for update in updates],
        "z_losses": [update.z_loss for update in updates],
        "grad_norms": [update.grad_norm for update in updates],
        "resume": (extra, all(layout.gather_replicas(is_bitwise)), is_bitwise),
        "going_on": going_on[0].loss,
        "moved": train(moved, its_optimizer, [3], at_once)[0].loss,
        "resharded": train(resharded, that_optimizer, [3], at_once)[0].loss,
        "scores": token_scores(model, tokens),
        "odd": [token_scores(model, tokens[:rows]).losses for rows in (1, 3)] + [embedding_gradients(model, tokens[:3], mask[:3])],
        "next_logits": next_token_logits(model, tokens, torch.tensor([0, 17, 29, 5])),
        "gradients": embedding_gradients(model, tokens, mask),
    }


def main() -> None:
    directory = Path(sys.argv[1])
    for name, parallel in LAYOUTS[sys.argv[2]].items():
        with running(parallel) as layout:
            result = short_run(layout, directory, name)
            torch.save(result, directory / f"{name}.{layout.rank}.pt")


if __name__ == "__main__":
    main()
