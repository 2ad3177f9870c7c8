"""What a precision needs is asked before the first step, and what runs in it is said."""

import dataclasses
import sys
import types
from pathlib import Path

import pytest
import torch

from megatron_exp.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_exp.errors import UserError
from megatron_exp.model import build, generation, olmo2, precision, scoring
from megatron_exp.model.fp8_scaling import preserved_scaling
from megatron_exp.model.optimizer import buffer_config, build_optimizer, megatron_optimizer_config, overlaps
from megatron_exp.model.precision import RECIPES, check_fp8, choose_implementation, effective_precision, is_tested_engine
from megatron_exp.model.presets import resolve_shape
from megatron_exp.parallel import layout as layouts
from tests.model.test_step import layout_of
from tests.model.tiny import running, tiny_model, tiny_shape, train, weights

SHAPE = resolve_shape(ModelConfig(preset="olmo2-1b"), 100_278, 4096)


def on_gpu(**numbers):
    return dataclasses.replace(layout_of(**numbers), device=torch.device("cuda", 0))


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(precision.devices, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(precision.devices, "describe_device", lambda device: "a Hopper GPU")


@pytest.fixture
def engine(monkeypatch):
    """Pretends that Transformer Engine of some version is installed."""
    return lambda version: monkeypatch.setattr(precision, "engine_version", lambda: version)


def test_an_untested_transformer_engine_is_refused_and_a_tested_one_taken(engine):
    for version in ("2.9.0", "2.9.1+abc", "2.11.3"):
        engine(version)
        assert choose_implementation(on_gpu(), "bf16") == "transformer-engine"
    for version in ("1.14", "2.8.9", "2.12.0", "3.0", "unknown"):
        engine(version)
        assert not is_tested_engine(version)
        with pytest.raises(UserError, match=rf"Transformer Engine {version} is installed.*2.9 up to, not including, 2.12.*pip install"):
            choose_implementation(on_gpu(), "bf16")


def test_the_engine_is_not_looked_at_on_cpu(engine):
    engine("1.0")
    assert choose_implementation(layout_of(), "bf16") == "torch"


def test_fp8_without_the_engine_says_what_is_missing(engine):
    engine(None)
    with pytest.raises(UserError, match="no Transformer Engine is installed.*set training.precision to bf16"):
        choose_implementation(on_gpu(), "fp8")
    with pytest.raises(UserError, match="computes on the CPU"):
        choose_implementation(layout_of(), "fp8")
    assert choose_implementation(on_gpu(), "bf16") == "torch"


@pytest.mark.parametrize(
    ("capability", "possible"),
    [((8, 0), []), ((8, 9), ["delayed"]), ((9, 0), ["delayed", "tensorwise", "blockwise"]), ((10, 0), ["delayed", "tensorwise", "mxfp8"])],
)
def test_a_recipe_that_the_gpu_lacks_is_refused_with_those_it_has(monkeypatch, capability, possible):
    monkeypatch.setattr(precision.devices, "compute_capability", lambda: capability)
    monkeypatch.setattr(precision.devices, "describe_device", lambda device: "a GPU")
    for recipe in RECIPES:
        if recipe in possible:
            check_fp8(SHAPE, on_gpu(), recipe)
            continue
        with pytest.raises(UserError, match=f"fp8_recipe is {recipe}, which needs") as refused:
            check_fp8(SHAPE, on_gpu(), recipe)
        assert all(name in str(refused.value) for name in possible or ["precision to bf16"])


@pytest.mark.parametrize(
    ("numbers", "layout", "named"),
    [
        ({"ffn": 8200}, {}, "model.ffn / training.parallel.tp is 8200"),
        ({"hidden": 2056, "heads": 4}, {}, "model.hidden is 2056"),
        ({"hidden": 160, "heads": 4}, {"tp_size": 4}, "model.hidden / training.parallel.tp is 40"),
        ({"hidden": 144, "heads": 12, "kv_groups": 1}, {}, "the width of queries, keys and values together"),
    ],
)
def test_a_side_that_does_not_divide_is_named_with_its_setting(hopper, numbers, layout, named):
    shape = resolve_shape(ModelConfig(preset="olmo2-1b", **numbers), 100_278, 4096)
    with pytest.raises(UserError, match=f"multiples of 16, but {named}"):
        check_fp8(shape, on_gpu(**layout), "tensorwise")


def test_short_pieces_of_a_sequence_are_refused(hopper):
    shape = resolve_shape(ModelConfig(preset="olmo2-1b"), 100_278, 72)
    with pytest.raises(UserError, match=r"geometry.sequence_length / training.parallel.cp .* is 36"):
        check_fp8(shape, on_gpu(cp_size=2), "blockwise")


def test_blocks_of_128_are_asked_for_where_ranks_gather_them(hopper):
    divided = dataclasses.replace(on_gpu(tp_size=2), sequence_parallel=True)
    check_fp8(SHAPE, divided, "blockwise")
    short = dataclasses.replace(SHAPE, sequence_length=128)
    check_fp8(short, on_gpu(tp_size=2), "blockwise")
    check_fp8(short, divided, "tensorwise")
    with pytest.raises(UserError, match=r"multiples of 128, but geometry.sequence_length .* is 64"):
        check_fp8(short, divided, "blockwise")
    with pytest.raises(UserError, match=r"multiples of 128, but model.hidden is 192"):
        check_fp8(dataclasses.replace(SHAPE, hidden=192), divided, "blockwise")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("sequence_parallel", "cp_size"), [(False, 1), (True, 1), (True, 2)])
def test_what_is_scored_is_padded_to_the_sides_that_the_recipe_multiplies(recipe, sequence_parallel, cp_size):
    layout = dataclasses.replace(on_gpu(tp_size=2, cp_size=cp_size), sequence_parallel=sequence_parallel)
    model = types.SimpleNamespace(layout=layout, fp8_recipe=recipe)
    needed = {"mxfp8": 32, "blockwise": 128 if sequence_parallel else 16}.get(recipe, 16)
    for length in (1, 17, 300):
        padded = scoring._padded_length(model, length)
        assert padded >= length and padded // cp_size // (2 if sequence_parallel else 1) % needed == 0


def test_rows_that_are_continued_are_filled_up_to_the_multiple_of_the_recipe(monkeypatch):
    monkeypatch.setattr(generation, "StaticInferenceContext", lambda rows, positions: rows)
    for recipe, rows in (("tensorwise", 16), ("mxfp8", 32), (None, 3)):
        assert generation.CachedReader(types.SimpleNamespace(layout=layout_of(), fp8_recipe=recipe), 3, 8)._read == rows


def test_the_precision_of_every_kind_of_product_is_read_off_the_layers(monkeypatch):
    with running() as layout:
        model = tiny_model(layout, "bf16")
        plain = effective_precision(model.chunks[0], None)
        assert set(plain.values()) == {"bf16", "fp32", "fp32 inside, bf16 out"}
        monkeypatch.setattr(precision, "_is_engine", lambda module: module is not model.chunks[0].decoder.layers[0].mlp.linear_fc2)
        made = effective_precision(model.chunks[0], "tensorwise")
        assert made["attention.qkv"] == "fp8 tensorwise: e4m3 forward, e5m2 gradients"
        assert (made["mlp.down"], made["head"], made["master_weights_and_moments"]) == ("bf16", "bf16", "fp32")


def test_16_bit_weights_keep_updates_too_small_for_them():
    """Master weights in fp32: forty updates of a tenth of the last place add up."""
    with running() as layout:
        model = tiny_model(layout, "bf16")
        optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.0))
        start = weights(model)
        norm = next(index for index, (name, _) in enumerate(model.chunks[0].named_parameters()) if name.endswith("final_layernorm.weight"))
        changed = []
        for _ in range(40):
            train(model, optimizer, [0], rate=2.0**-7 / 10)  # bf16 at 1: 2**-7 above, 2**-8 below
            changed.append(not torch.equal(weights(model)[norm], start[norm]))
        assert not changed[0]
        assert changed[-1]


def test_recomputation_gives_bitwise_the_same_weights_and_noise():
    from tests.model.test_noise import spec

    noise = [[spec(1, row, 0.1)] for row in range(4)]
    with running() as layout:
        made = []
        for recompute in (False, True):
            model = build.build_model(tiny_shape(), layout, "fp32", 0, recompute=recompute)
            assert (model.config.recompute_granularity == "full") == recompute
            results = train(model, build_optimizer(model, OptimizerConfig()), range(3), micro_batch_size=2, noise=noise)
            made.append((results, weights(model)))
    assert made[0][0] == made[1][0]
    assert all(torch.equal(one, other) for one, other in zip(made[0][1], made[1][1], strict=True))


def test_flags_of_a_gpu_and_of_a_cpu(monkeypatch):
    def flags(layout, **options):
        return olmo2.transformer_config(SHAPE, layout, torch.bfloat16, **options)

    cpu = flags(layout_of(), fp8_recipe=None)
    assert not (cpu.bias_activation_fusion or cpu.apply_rope_fusion or cpu.gradient_accumulation_fusion or cpu.deterministic_mode or cpu.fp8)
    monkeypatch.setattr("megatron.core.transformer.transformer_config.fused_apply_rotary_pos_emb", object(), raising=False)
    monkeypatch.setattr("megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb", object())
    gpu = dataclasses.replace(on_gpu(), deterministic=True)
    for fused in (False, True):
        monkeypatch.setattr(olmo2, "has_fused_gradient_sums", lambda fused=fused: fused)
        config = flags(gpu, fp8_recipe="tensorwise", with_engine=True)
        assert config.gradient_accumulation_fusion == fused
        assert (config.fp8, config.fp8_recipe, config.fp8_amax_history_len) == ("hybrid", "tensorwise", 1)
        assert config.bias_activation_fusion and config.apply_rope_fusion and config.deterministic_mode
    delayed = flags(gpu, fp8_recipe="delayed", with_engine=True)
    assert (delayed.fp8_amax_history_len, delayed.fp8_amax_compute_algo) == (1024, "max")


def test_gradients_and_weights_travel_while_others_are_computed_between_gpus_only():
    assert not overlaps(layout_of(dp_size=8))
    assert not overlaps(on_gpu())
    assert overlaps(on_gpu(dp_size=8)) and overlaps(on_gpu(cp_size=2))
    for overlap in (False, True):
        config = buffer_config(overlap)
        assert config.overlap_grad_reduce == config.overlap_param_gather == overlap
        assert config.grad_reduce_in_fp32 and config.use_distributed_optimizer and not config.check_for_nan_in_grad
        assert not config.average_in_collective
    with running() as layout:
        numbers = megatron_optimizer_config(tiny_model(layout, "bf16"), OptimizerConfig(), overlap=True)
    assert numbers.overlap_param_gather and numbers.bf16 and numbers.use_distributed_optimizer and numbers.fp8_recipe is None


def test_the_layers_of_a_gpu_are_those_of_transformer_engine(monkeypatch):
    names = ("TEColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention", "TENorm")
    engine = types.SimpleNamespace(**{name: type(name, (), {}) for name in names})
    with running() as layout:
        config = tiny_model(layout).config
        monkeypatch.setitem(sys.modules, "megatron.core.extensions.transformer_engine", engine)
        block = olmo2.layer_specs(config, with_engine=True)
    layer = block.layer_specs[0].submodules
    attention, mlp = layer.self_attention.submodules, layer.mlp.submodules
    assert (attention.linear_qkv, mlp.linear_fc1) == (engine.TEColumnParallelLinear,) * 2
    assert (attention.linear_proj, mlp.linear_fc2) == (engine.TERowParallelLinear,) * 2
    assert attention.core_attention is engine.TEDotProductAttention
    assert block.layer_norm is layer.mlp_bda.params["norm"] is layer.self_attn_bda.params["norm"] is engine.TENorm


class FakeLayer(torch.nn.Module):
    """Holds what a layer under delayed scaling holds."""

    def __init__(self):
        super().__init__()
        self.fp8_meta = {"scaling_fwd": types.SimpleNamespace(amax_history=torch.rand(4, 3), scale=torch.rand(3))}


def test_reading_leaves_what_fp8_remembers_of_training_untouched():
    model = torch.nn.Sequential(FakeLayer(), torch.nn.Linear(2, 2), FakeLayer())
    forward = [layer.fp8_meta["scaling_fwd"] for layer in (model[0], model[2])]
    before = [(meta.amax_history.clone(), meta.scale.clone()) for meta in forward]
    with preserved_scaling([model]):
        for meta in forward:
            meta.amax_history.fill_(7)
            meta.scale.mul_(2)
        model[2].fp8_meta["scaling_bwd"] = types.SimpleNamespace(amax_history=torch.ones(4, 3), scale=torch.full((3,), 5.0))
    assert all(torch.equal(meta.amax_history, old) and torch.equal(meta.scale, scale) for meta, (old, scale) in zip(forward, before, strict=True))
    made = model[2].fp8_meta["scaling_bwd"]
    assert made.amax_history.eq(0).all() and made.scale.eq(1).all()


def test_determinism_is_asked_for_in_the_environment_and_never_against_it(monkeypatch):
    monkeypatch.setattr(layouts.torch, "use_deterministic_algorithms", lambda on: None)
    monkeypatch.setattr(layouts.os, "environ", {"NCCL_ALGO": "Ring"})
    layouts._require_determinism()
    assert layouts.os.environ == {"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    layouts.os.environ["NCCL_ALGO"] = "Tree"
    with pytest.raises(UserError, match="NCCL_ALGO=Tree; only Ring"):
        layouts._require_determinism()


def test_layers_that_do_not_divide_into_the_parts_of_stages_are_refused():
    with pytest.raises(UserError, match=r"layers \(model.layers\) = 6 cannot be divided into 4"):
        build.build_model(tiny_shape(layers=6), layout_of(pp_size=2, virtual_size=2), "fp32", 0)
    with pytest.raises(UserError, match=r"virtual = 2 divides each pipeline stage"), running(ParallelConfig(virtual=2)):
        pass


def test_what_is_installed_is_what_is_accepted():
    lowest, highest = (".".join(map(str, version)) for version in precision.ENGINE_VERSIONS)
    wanted = f"transformer-engine[pytorch]>={lowest},<{highest}"
    assert wanted in precision.INSTALL_ENGINE
    assert wanted in (Path(__file__).parents[2] / "setup.py").read_text()
