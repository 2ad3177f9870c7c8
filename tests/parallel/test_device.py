import pytest
import torch

from megatron_exp.errors import InterruptedRunError, UserError
from megatron_exp.parallel import device as devices
from megatron_exp.parallel.device import _with_cpu_names, choose_device, has_cuda
from tests.model.tiny import running

needs_cpu = pytest.mark.skipif(has_cuda(), reason="nothing is adapted where there is CUDA")


@needs_cpu
def test_torch_itself_stays_as_it_is_after_adapting_megatron():
    with running() as layout:
        assert layout.device == torch.device("cpu")
        from megatron.core.tensor_parallel import mappings

        assert mappings.torch.cuda.current_device() == torch.device("cpu")
        assert mappings.torch.nn is torch.nn
        assert mappings.torch.Tensor is torch.Tensor
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_cuda_names_are_replaced_wherever_a_function_holds_them_and_nothing_else():
    def function(kind):
        def inner():
            return kind in ["torch.cuda.FloatTensor", "cuda"], "cudagraph"

        return inner()

    assert function("torch.FloatTensor") == (False, "cudagraph")
    function.__code__ = _with_cpu_names(function.__code__)
    assert function("torch.FloatTensor") == (True, "cudagraph")
    assert function("cpu") == (True, "cudagraph")


@pytest.mark.parametrize(
    ("name", "teraflops"), [("NVIDIA H200", 989.4), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA GeForce", None)]
)
def test_what_a_gpu_could_do_is_known_by_its_name(monkeypatch, name, teraflops):
    monkeypatch.setattr(devices, "describe_device", lambda device: name)
    found = devices.peak_flops(torch.device("cuda", 0))
    assert found == (None if teraflops is None else pytest.approx(teraflops * 1e12))
    assert devices.peak_flops(torch.device("cpu")) is None


def test_processes_alone_can_start_again_after_stopping():
    for _ in range(2):
        with running() as layout:
            assert (layout.rank, layout.world_size, layout.is_main, layout.is_first_stage, layout.is_last_stage) == (0, 1, True, True, True)
            assert layout.broadcast("value") == "value"
            assert layout.gather_replicas(3) == [3]


@pytest.mark.parametrize(("job", "error"), [(None, UserError), ("7", InterruptedRunError)])
def test_more_processes_than_gpus_are_refused_with_both_numbers_and_a_job_may_start_again(monkeypatch, job, error):
    monkeypatch.setenv("SLURM_JOB_ID", job) if job else monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    made_current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    assert choose_device(1) == torch.device("cuda", 1)
    with pytest.raises(error, match="At least 4 processes.*sees 2 GPUs"):
        choose_device(3)
    assert made_current == [1]
