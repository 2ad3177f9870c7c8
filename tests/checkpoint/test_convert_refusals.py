"""What `convert` does not convert, and says so."""

import errno
import resource
import shutil

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_exp.checkpoint import catalogue
from megatron_exp.checkpoint.convert import from_huggingface, to_huggingface
from megatron_exp.checkpoint.saving import save_checkpoint
from megatron_exp.errors import UserError
from tests.model.tiny import running, tiny_model

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A directory with a checkpoint, and the models `single` and `sharded` made of it."""
    directory = tmp_path_factory.mktemp("originals")
    with running() as layout:
        save_checkpoint(directory / "checkpoint", tiny_model(layout), None, {})
    to_huggingface(directory / "checkpoint", directory / "single")
    to_huggingface(directory / "checkpoint", directory / "sharded", shard_bytes=30_000)
    return directory


@pytest.fixture
def copies(originals, tmp_path):
    """Copies of all three that a test may damage."""
    return shutil.copytree(originals, tmp_path / "copies")


def change_json(path, change):
    content = orjson.loads(path.read_bytes())
    change(content)
    path.write_bytes(orjson.dumps(content))


def change_weights(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


CONFIGS = {
    "another architecture": ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM.*only Olmo2ForCausalLM"),
    "biases": ({"attention_bias": True}, "attention_bias is True and must be False"),
    "a tied head": ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    "another epsilon": ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05 and must be 1e-06"),
    "other positions": ({"rope_theta": 10_000}, "rope_theta is 10000 and must be 500000"),
    "stretched positions": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 500_000, "factor": 2}}, "type 'yarn'"),
    "heads that do not divide": ({"num_attention_heads": 5}, "give no heads of one even width"),
    "no size": ({"hidden_size": None}, "gives hidden_size as None"),
    "a width the weights do not have": (
        {"intermediate_size": 64},
        r"mlp.* has the size \[48, 32\].*\[64, 32\]|mlp.* has the size \[32, 48\]",
    ),
    "a layer the weights do not have": ({"num_hidden_layers": 3}, r"missing: model\.layers\.2\.mlp\.down_proj\.weight.* and 6 more"),
    "fewer layers than weights": ({"num_hidden_layers": 1}, r"unexpected: model\.layers\.1\.mlp\.down_proj\.weight"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_configuration_of_another_model_is_refused(copies, what):
    changes, complaint = CONFIGS[what]
    change_json(copies / "single" / "config.json", lambda config: config.update(changes))
    with pytest.raises(UserError, match=complaint):
        from_huggingface(copies / "single", copies / "made")
    assert not list(copies.glob("made*"))


WEIGHTS = {
    "a missing tensor": (lambda tensors: tensors.pop(Q_PROJ), f"missing: {Q_PROJ}"),
    "a tensor of no place": (lambda tensors: tensors.update(extra=torch.zeros(2)), "unexpected: extra"),
    "a wrong shape": (lambda tensors: tensors.update({Q_PROJ: torch.zeros(32, 16)}), rf"{Q_PROJ} has the size \[32, 16\].*\[32, 32\]"),
    "a mixture of types": (lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].bfloat16()}), "bfloat16, float32.*--dtype"),
    "quantised weights": (lambda tensors: tensors.update({Q_PROJ: torch.zeros(32, 32, dtype=torch.int8)}), "--dtype"),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_weights_that_are_not_the_configured_ones_are_refused_by_name(copies, what):
    change, complaint = WEIGHTS[what]
    change_weights(copies / "single", change)
    with pytest.raises(UserError, match=complaint):
        from_huggingface(copies / "single", copies / "made")


def test_quantised_weights_are_refused_whatever_type_is_wanted(copies):
    change_weights(copies / "single", lambda tensors: tensors.update({Q_PROJ: torch.zeros(32, 32, dtype=torch.int8)}))
    with pytest.raises(UserError, match="quantised"):
        from_huggingface(copies / "single", copies / "made", precision="fp32")


def test_pickles_are_not_read(copies):
    (copies / "single" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="neither model.safetensors"):
        from_huggingface(copies / "single", copies / "made")
    torch.save({}, copies / "single" / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickles"):
        from_huggingface(copies / "single", copies / "made")


@pytest.mark.parametrize("name", ["../single/model.safetensors", "/etc/passwd"])
def test_an_index_that_leads_out_of_its_directory_is_refused(copies, name):
    change_json(copies / "sharded" / "model.safetensors.index.json", lambda index: index["weight_map"].update({Q_PROJ: name}))
    with pytest.raises(UserError, match="leads out of"):
        from_huggingface(copies / "sharded", copies / "made")


def test_a_model_of_links_as_in_the_hub_s_cache_is_read(copies):
    (copies / "blobs").mkdir()
    for number, path in enumerate((copies / "sharded").iterdir()):
        path.rename(copies / "blobs" / str(number))
        path.symlink_to(f"../blobs/{number}")
    from_huggingface(copies / "sharded", copies / "made")
    assert catalogue.verify_checkpoint(copies / "made") == []


def test_a_shard_that_is_missing_cut_short_or_of_another_model_is_named(copies):
    shards = sorted((copies / "sharded").glob("*.safetensors"))
    index = copies / "sharded" / "model.safetensors.index.json"
    whole = index.read_bytes()
    change_json(index, lambda content: content["weight_map"].update({Q_PROJ: shards[0].name}))
    with pytest.raises(UserError, match=f"disagree about {Q_PROJ}"):
        from_huggingface(copies / "sharded", copies / "made")
    index.write_bytes(whole)
    shards[0].write_bytes(shards[0].read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{shards[0].name} is not a readable safetensors file"):
        from_huggingface(copies / "sharded", copies / "made")
    shards[0].unlink()
    with pytest.raises(UserError, match=f"{shards[0].name} does not exist"):
        from_huggingface(copies / "sharded", copies / "made")
    index.write_bytes(b'{"weight_map": [1]}')
    with pytest.raises(UserError, match="no readable `weight_map`"):
        from_huggingface(copies / "sharded", copies / "made")


def test_a_damaged_checkpoint_is_refused(copies):
    data = next((copies / "checkpoint").glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(UserError, match=f"{data.name} is damaged"):
        to_huggingface(copies / "checkpoint", copies / "made")
    assert not list(copies.glob("made*"))


def test_a_checkpoint_that_holds_another_model_than_its_record_says_is_refused(copies):
    checkpoint = copies / "checkpoint"
    change_json(checkpoint / "checkpoint.json", lambda record: record["shape"].update(layers=3))
    listed = orjson.loads((checkpoint / "files.json").read_bytes())["files"]
    hashes = {name: one["sha256"] for name, one in listed.items()}
    hashes["checkpoint.json"] = catalogue.files.sha256_file(checkpoint / "checkpoint.json")
    catalogue.seal(checkpoint, hashes)
    with pytest.raises(UserError, match="does not hold the model"):
        to_huggingface(checkpoint, copies / "made")


def test_places_without_a_checkpoint_and_places_taken_are_refused(copies, tmp_path):
    with pytest.raises(UserError, match="neither a checkpoint nor a run"):
        to_huggingface(tmp_path / "nothing", copies / "made")
    with pytest.raises(UserError, match="already exists"):
        to_huggingface(copies / "checkpoint", copies / "single")
    with pytest.raises(UserError, match="already exists"):
        from_huggingface(copies / "single", copies / "checkpoint")


@pytest.mark.parametrize(("convert", "source"), [(to_huggingface, "checkpoint"), (from_huggingface, "single")])
def test_a_disk_that_refuses_the_weights_is_an_error_of_the_system_and_nothing_remains(originals, tmp_path, convert, source):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError) as refused:
            convert(originals / source, tmp_path / "converted")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refused.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []
