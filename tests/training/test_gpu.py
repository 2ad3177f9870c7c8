"""What only a CUDA device can show; run by `make test-gpu`. benchmarks/gpu/run.py measures the rest."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_exp.checkpoint.saving import save_checkpoint
from megatron_exp.checkpoint.state import load_checkpoint
from megatron_exp.config.schema import OptimizerConfig
from megatron_exp.errors import UserError
from megatron_exp.inspection.findings import is_sound
from megatron_exp.inspection.verify import verify
from megatron_exp.model import precision
from megatron_exp.model.build import build_model
from megatron_exp.model.loss import token_losses
from megatron_exp.model.optimizer import build_optimizer
from megatron_exp.model.precision import RECIPES
from megatron_exp.model.random import grid_normals, grid_truncated_normals, grid_words
from megatron_exp.parallel.device import has_cuda
from megatron_exp.scoring.engine import Scorer
from tests.model.tiny import running, same_weights, tiny_shape, tokens_of, train
from tests.scoring.test_generation import PROMPTS, Rereading

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")]

WIDE = {"hidden": 64, "heads": 4, "ffn": 128}


@pytest.fixture
def layout():
    with running() as layout:
        yield layout


def test_words_are_bitwise_those_of_the_cpu_and_normals_equal_to_a_millionth():
    rows = torch.arange(300)
    assert torch.equal(grid_words(7, rows.cuda(), range(101), stream=5).cpu(), grid_words(7, rows, range(101), stream=5))
    assert torch.allclose(grid_normals(7, rows.cuda(), 101).cpu(), grid_normals(7, rows, 101), rtol=0, atol=1e-6)
    truncated = grid_truncated_normals(7, rows.cuda(), range(101), 3.0).cpu()
    assert torch.allclose(truncated, grid_truncated_normals(7, rows, range(101), 3.0), rtol=0, atol=1e-6)


def trained(layout, kind, recipe="tensorwise", steps=range(8)):
    model = build_model(tiny_shape(**WIDE), layout, kind, 0, recipe)
    optimizer = build_optimizer(model, OptimizerConfig())
    return model, optimizer, train(model, optimizer, [0 for _ in steps])


def test_compiled_losses_and_gradients_are_those_of_the_cpu(layout):
    logits = (4 * grid_normals(7, torch.arange(300), 501)).bfloat16()
    labels = torch.arange(300) % 501
    found = []
    for device in ("cpu", "cuda"):
        wanted = logits.to(device).clone().requires_grad_()
        losses, normalizers = token_losses(wanted, labels.to(device), dist.group.WORLD)
        (losses + 0.1 * normalizers**2).sum().backward()
        found.append((losses.detach().cpu(), wanted.grad.float().cpu()))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_a_model_learns(layout, kind):
    _, _, results = trained(layout, kind)
    assert results[-1].loss < results[0].loss - 1


@pytest.mark.skipif(precision.engine_version() is None, reason="needs Transformer Engine")
def test_weights_go_from_pytorchs_layers_to_transformer_engines_and_back(layout, tmp_path, monkeypatch):
    engine = trained(layout, "bf16")
    monkeypatch.setattr(precision, "engine_version", lambda: None)
    local = trained(layout, "bf16")
    assert (engine[0].implementation, local[0].implementation) == ("transformer-engine", "torch")
    for (model, optimizer, _), other, name in ((engine, local, "engine"), (local, engine, "local")):
        save_checkpoint(tmp_path / name, model, optimizer, {})
        load_checkpoint(tmp_path / name, other[0], other[1])
        assert same_weights(model, other[0])
        train(model, optimizer, [9])


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_an_fp8_recipe_learns_and_resumes_or_is_refused(layout, tmp_path, recipe):
    try:
        model, optimizer, results = trained(layout, "fp8", recipe)
    except UserError as refused:
        pytest.skip(str(refused))
    assert results[-1].loss < results[0].loss - 1
    save_checkpoint(tmp_path / "checkpoint", model, optimizer, {})
    going_on = train(model, optimizer, [1, 2])
    resumed = build_model(tiny_shape(**WIDE), layout, "fp8", 1, recipe)
    its_optimizer = build_optimizer(resumed, OptimizerConfig())
    load_checkpoint(tmp_path / "checkpoint", resumed, its_optimizer)
    assert [result.loss for result in train(resumed, its_optimizer, [1, 2])] == pytest.approx([result.loss for result in going_on], rel=1e-3)


def test_scoring_between_steps_changes_no_weight(layout):
    scored, silent = trained(layout, "bf16"), trained(layout, "bf16")
    for step in range(2):
        scorer = Scorer(scored[0])
        scorer.greedy(PROMPTS, 4)
        scorer.slot_losses(tokens_of(9).numpy(), torch.ones((4, 32)).numpy())
        train(*scored[:2], [step])
        train(*silent[:2], [step])
    assert same_weights(scored[0], silent[0])


def test_continuations_are_those_of_reading_everything_again(layout):
    model, _, _ = trained(layout, "fp32")
    assert (Scorer(model).greedy(PROMPTS, 6) == Rereading(model).greedy(PROMPTS, 6)).all()


def test_a_whole_run_ends_sound(manifest: Path, run: Path) -> None:
    from megatron_exp.training.train import train as train_run

    assert train_run(manifest, run, overrides=["training.precision=bf16"]) == 0
    assert is_sound(verify(run))
