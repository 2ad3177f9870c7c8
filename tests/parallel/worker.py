"""What each of two processes does in `test_two_processes`: the same short run in several layouts, one after the other.

Usage: worker.py DIRECTORY, with the variables that torchrun sets. Leaves DIRECTORY/<layout>.pt and checkpoints.
"""

import sys
from pathlib import Path

import torch

from megatron_exp.checkpoint.state import load_checkpoint, save_checkpoint
from megatron_exp.config.schema import ParallelConfig
from megatron_exp.model.scoring import embedding_gradients, next_token_logits, token_scores
from megatron_exp.parallel.layout import Layout
from megatron_exp.stream.base import NoiseSpec
from tests.model.tiny import ROWS, mask_of, running, same_weights, tokens_of, train, trainable

LAYOUTS = {
    "tp2": ParallelConfig(tp=2),
    "tp2-sp": ParallelConfig(tp=2, sequence_parallel=True),
    "dp2": ParallelConfig(),
    "pp2": ParallelConfig(pp=2),
    "cp2": ParallelConfig(cp=2),
}
NOISE = [[NoiseSpec(1, row, 0.05)] if row % 2 else [] for row in range(ROWS)]
"""Rows 1 and 3 are noised, so that every replica of dp2 has one."""
STEPS = range(3)


def short_run(layout: Layout, directory: Path, name: str) -> dict:
    """Initial weights, three noised updates, scores, and what a checkpoint gives back; equal on every rank."""
    model, optimizer = trainable(layout, kv_groups=2)
    save_checkpoint(directory / f"{name}-initial", model, None, {})
    updates = train(model, optimizer, STEPS, micro_batch_size=2 if layout.dp_size == 1 else 1, noise=NOISE)
    save_checkpoint(directory / f"{name}-trained", model, optimizer, {"steps": len(STEPS)})
    going_on = train(model, optimizer, [3])
    resumed, its_optimizer = trainable(layout, seed=1, kv_groups=2)
    extra = load_checkpoint(directory / f"{name}-trained", resumed, its_optimizer)
    is_bitwise = train(resumed, its_optimizer, [3]) == going_on and same_weights(resumed, model)
    moved, its_optimizer = trainable(layout, seed=1, kv_groups=2)
    load_checkpoint(directory / "single-trained", moved, its_optimizer)
    tokens, mask = tokens_of(7)[:, :30], mask_of(7)[:, :29]
    return {
        "losses": [update.loss for update in updates],
        "z_losses": [update.z_loss for update in updates],
        "grad_norms": [update.grad_norm for update in updates],
        "resume": (extra, all(layout.gather_replicas(is_bitwise)), is_bitwise),
        "moved": train(moved, its_optimizer, [3])[0].loss,
        "scores": token_scores(model, tokens),
        "next_logits": next_token_logits(model, tokens, torch.tensor([0, 17, 29, 5])),
        "gradients": embedding_gradients(model, tokens, mask),
    }


def main() -> None:
    directory = Path(sys.argv[1])
    for name, parallel in LAYOUTS.items():
        with running(parallel) as layout:
            result = short_run(layout, directory, name)
            torch.save(result, directory / f"{name}.{layout.rank}.pt")


if __name__ == "__main__":
    main()
