import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_exp.cluster.profile import Cluster, load_cluster
from megatron_exp.errors import UserError

HOSTILE = [
    "main\n#SBATCH --uid=0",
    "$(touch /tmp/pwned)",
    "`id`",
    "a b",
    "'; rm -rf /; '",
    '"quoted"',
    "a\u2028b",
    "prtïtion",
    "\u202emain",
    "main\x00",
    "-o/etc/passwd",
    "",
    "main\n",
]


def load(tmp_path, **keys):
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(keys, allow_unicode=False), encoding="utf-8")
    return load_cluster(file)


@pytest.mark.parametrize(
    "key", ["partition", "account", "qos", "reservation", "constraint", "time", "memory_per_node", "gpu_type", "scratch", "python"]
)
@pytest.mark.parametrize("value", HOSTILE)
def test_a_value_that_a_shell_or_slurm_could_take_for_more_is_refused_by_name(tmp_path, key, value):
    with pytest.raises(UserError, match=key):
        load(tmp_path, **{key: value})


@pytest.mark.parametrize("value", HOSTILE)
def test_modules_images_and_mounts_are_refused_likewise(tmp_path, value):
    for keys in (
        {"modules": [value]},
        {"container": {"kind": "pyxis", "image": value}},
        {"container": {"kind": "pyxis", "image": "a", "mounts": [value]}},
    ):
        with pytest.raises(UserError, match="not a valid cluster profile"):
            load(tmp_path, **keys)


@pytest.mark.parametrize(
    "name",
    [
        "PATH",
        "LD_PRELOAD",
        "BASH_ENV",
        "IFS",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "NCCL_SECRET",
        "A;B",
        "NCCL_A\n",
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",
    ],
)
def test_only_listed_variables_may_be_set_and_no_secret(tmp_path, name):
    with pytest.raises(UserError, match="not one that a profile may set"):
        load(tmp_path, environment={name: "1"})


@pytest.mark.parametrize("value", ["a\nb", "\x1b[0m", "é", "x" * 4097])
def test_values_of_variables_are_printable(tmp_path, value):
    with pytest.raises(UserError, match="printable"):
        load(tmp_path, environment={"NCCL_DEBUG": value})


def test_unknown_keys_and_stages_are_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean partition"):
        load(tmp_path, partion="main")
    with pytest.raises(UserError, match="stages"):
        load(tmp_path, stages={"trian": {"nodes": 2}})


def test_a_container_without_an_image_is_refused(tmp_path):
    with pytest.raises(UserError, match="image"):
        load(tmp_path, container={"kind": "apptainer"})


def test_inputs_are_found_from_the_profiles_folder_and_keep_their_source_name(tmp_path):
    cluster = load(tmp_path, preprocess={"inputs": ["dclm=data/a*.json.zst", "b.jsonl", "/abs/c.jsonl"], "tokenizer": "t.json"})
    assert cluster.preprocess.inputs == (f"dclm={tmp_path}/data/a*.json.zst", f"{tmp_path}/b.jsonl", "/abs/c.jsonl")
    assert cluster.preprocess.tokenizer == f"{tmp_path}/t.json"


@given(st.text(max_size=20))
def test_whatever_passes_as_a_partition_is_one_plain_word(text):
    try:
        cluster = Cluster(partition=text)
    except ValueError:
        return
    assert cluster.partition.isascii() and not set(cluster.partition) & set(" \t\r\n\"'`$\\;|&<>()*?[]{}!#%")
