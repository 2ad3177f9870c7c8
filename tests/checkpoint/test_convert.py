"""Checkpoints to Hugging Face and back; transformers itself says whether it is the same model."""

import orjson
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_exp.checkpoint.catalogue import list_checkpoints, read_record, verify_checkpoint
from megatron_exp.checkpoint.convert import from_huggingface, to_huggingface
from megatron_exp.checkpoint.saving import save_checkpoint
from megatron_exp.checkpoint.state import load_checkpoint
from megatron_exp.checkpoint.stored import StoredTensors
from megatron_exp.model.build import build_model
from megatron_exp.model.presets import ModelShape
from megatron_exp.shards.corpus import Corpus
from megatron_exp.training.train import train
from tests.model.tiny import randomize, running, same_weights, tiny_model, tokens_of
from tests.training.toy import make_manifest


@pytest.fixture
def layout():
    with running() as layout:
        yield layout


def saved(layout, directory, precision="fp32", **overrides):
    """A model with weights of its own, and its checkpoint."""
    model = tiny_model(layout, precision, **overrides)
    randomize(model)
    save_checkpoint(directory, model, None, {"step": 3})
    return model


@pytest.mark.parametrize("kv_groups", [4, 2])
def test_transformers_computes_the_same_and_what_it_saves_comes_back_bitwise(layout, tmp_path, kv_groups):
    model = saved(layout, tmp_path / "step-00000003", kv_groups=kv_groups)
    to_huggingface(tmp_path / "step-00000003", tmp_path / "hf")
    theirs, problems = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(theirs).__name__ == "Olmo2ForCausalLM" and theirs.dtype == torch.float32
    assert not any(problems.values())
    tokens = tokens_of(0)
    expected = model.chunks[0](tokens, None, None)
    assert expected.std() > 0.5
    assert torch.allclose(theirs(tokens).logits, expected, atol=1e-5)

    theirs.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    converted = from_huggingface(tmp_path / "again", tmp_path / "back")
    assert converted.shape.kv_groups == kv_groups and verify_checkpoint(tmp_path / "back") == []
    loaded = tiny_model(layout, seed=1, kv_groups=kv_groups)
    assert load_checkpoint(tmp_path / "back", loaded, None)["step"] == 3
    assert same_weights(loaded, model)


def test_bf16_stays_bf16_and_fp32_of_it_loses_nothing(layout, tmp_path):
    model = saved(layout, tmp_path / "saved", "bf16")
    to_huggingface(tmp_path / "saved", tmp_path / "hf")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16
    assert from_huggingface(tmp_path / "hf", tmp_path / "back").precision == "bf16"

    to_huggingface(tmp_path / "saved", tmp_path / "wide", precision="fp32")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").dtype == torch.float32
    from_huggingface(tmp_path / "wide", tmp_path / "narrow", precision="bf16")
    for name in ("back", "narrow"):
        loaded = tiny_model(layout, "bf16", seed=1)
        load_checkpoint(tmp_path / name, loaded, None)
        assert same_weights(loaded, model)


def test_shards_hold_what_the_single_file_holds(layout, tmp_path):
    saved(layout, tmp_path / "saved")
    to_huggingface(tmp_path / "saved", tmp_path / "one")
    to_huggingface(tmp_path / "saved", tmp_path / "many", shard_bytes=20_000)
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)


def test_a_converted_checkpoint_holds_the_very_tensors_of_a_saved_one(layout, tmp_path):
    saved(layout, tmp_path / "saved")
    to_huggingface(tmp_path / "saved", tmp_path / "hf")
    from_huggingface(tmp_path / "hf", tmp_path / "back")
    assert StoredTensors(tmp_path / "back").sizes == StoredTensors(tmp_path / "saved").sizes
    records = [read_record(tmp_path / name) for name in ("saved", "back")]
    sizes = [{name: value for name, value in record["shape"].items() if name != "preset"} for record in records]
    assert sizes[0] == sizes[1] and records[1]["optimizer"] is None


def test_a_run_goes_to_hugging_face_and_back_with_its_tokenizer(tmp_path):
    manifest = make_manifest(tmp_path, steps=4, experiments=[])
    assert train(manifest, tmp_path / "run", baseline=True) == 0
    (_, checkpoint) = list_checkpoints(tmp_path / "run")[-1]
    converted = to_huggingface(tmp_path / "run", tmp_path / "hf")
    tokenizer = Corpus.open(tmp_path / "corpus").tokenizer()
    assert (converted.source, converted.vocabulary_size) == (checkpoint, tokenizer.vocabulary_size)
    config = orjson.loads((tmp_path / "hf" / "config.json").read_bytes())
    assert config["vocab_size"] == converted.shape.vocabulary_size > tokenizer.vocabulary_size
    assert config["megatron_exp"] == {"vocabulary_size": tokenizer.vocabulary_size, "step": 4}

    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "The old Lamp runs under  a river,\n with 17 stones."
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text).tolist()
    assert theirs.eos_token_id == tokenizer.eos_id == config["eos_token_id"]

    from_huggingface(tmp_path / "hf", tmp_path / "back")
    to_huggingface(tmp_path / "back", tmp_path / "hf-again")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf-again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name
    with running() as layout:
        models = []
        for directory in (checkpoint, tmp_path / "back"):
            models.append(build_model(ModelShape(**read_record(checkpoint)["shape"]), layout, "fp32", init_seed=len(models)))
            load_checkpoint(directory, models[-1], None)
        assert same_weights(*models)
