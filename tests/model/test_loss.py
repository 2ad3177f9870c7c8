import pytest
import torch
import torch.distributed as dist

from megatron_exp.model import loss
from tests.model.tiny import running


@pytest.fixture(scope="module", autouse=True)
def layout():
    with running() as layout:
        yield layout


@pytest.mark.parametrize("in_one_pass", [False, True], ids=["in place", "as compiled on a GPU"])
def test_losses_and_gradients_are_those_of_torch_across_chunks(monkeypatch, in_one_pass):
    monkeypatch.setattr(loss, "compiles", lambda logits: in_one_pass)
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS_COMPILED" if in_one_pass else "_CHUNK_ELEMENTS_CPU", 3 * 50)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(5, 4, 50, generator=generator)).requires_grad_()
    labels = torch.randint(0, 50, (5, 4), generator=generator)
    weight = torch.rand(5, 4, generator=generator)

    losses, normalizers = loss.token_losses(logits, labels, dist.group.WORLD)
    (weight * (losses + 0.1 * normalizers**2)).sum().backward()
    made, logits.grad = logits.grad, None

    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(5, 4)
    (weight * (expected + 0.1 * logits.logsumexp(-1) ** 2)).sum().backward()
    assert torch.allclose(losses, expected, atol=1e-5)
    assert torch.allclose(made, logits.grad, atol=1e-5)


def test_16_bit_logits_are_summed_in_fp32():
    logits = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    losses, _ = loss.token_losses(logits, torch.tensor([7]), dist.group.WORLD)
    assert losses.item() == pytest.approx(torch.tensor(4096.0).log().item(), abs=1e-5)


def test_the_most_likely_label_is_the_lowest_of_equals():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]]).expand(4, 4)
    assert loss.is_most_likely(logits, torch.arange(4), dist.group.WORLD).tolist() == [False, True, False, False]
