import pytest

from megatron_exp.config.load import load_config
from megatron_exp.errors import UserError

MINIMAL = "name: toy\ncorpus: {path: corpus}\ngeometry: {sequence_length: 8, global_batch_size: 2, steps: 3}\n"


def load(tmp_path, text, overrides=()):
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, list(overrides))


def test_a_minimal_config_has_documented_defaults(tmp_path):
    config = load(tmp_path, MINIMAL)
    assert config.seeds.order == 6198 and config.training.precision == "fp32" and config.experiments == ()
    assert config.corpus.path == tmp_path / "corpus"


def test_numbers_and_booleans_follow_yaml_1_2(tmp_path):
    config = load(
        tmp_path,
        MINIMAL
        + "training: {schedule: {peak_lr: 4e-4, horizon_tokens: 5e12}}\nexperiments:\n- {name: off, type: texts, no: yes, on: true}\n",
    )
    assert config.training.schedule.peak_lr == 4e-4
    assert config.experiments[0].name == "off"
    assert config.experiments[0].parameters == {"no": "yes", "on": True}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL + "name: again\n", r"line 4: the key 'name' is given twice"),
        (MINIMAL + "trainig: {}\n", r"unknown key trainig \(line 4\), did you mean training\?"),
        (MINIMAL + "training:\n  micro_batch: 2\n", r"line 5\), did you mean micro_batch_size\?"),
        (MINIMAL.replace("steps: 3", "steps: 0"), r"geometry.steps \(line 3\): .* greater than 0, found 0"),
        (MINIMAL.replace("steps: 3", "steps: many"), r"geometry.steps \(line 3\).*'many'"),
        ("name: toy\n", "missing key corpus"),
        ("[1, 2]\n", "expected keys and values"),
        ("", "holds nothing"),
        ("name: {\n", "line 2"),
        (MINIMAL + "experiments:\n- {name: a, type: texts}\n- {name: a, type: texts}\n", "used twice: a"),
        (MINIMAL + "experiments:\n- {name: ../a, type: texts}\n", "experiments.0.name"),
        (MINIMAL + "experiments:\n- {name: a, type: 'os;system'}\n", "not a module name"),
        (MINIMAL + "seeds: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        load(tmp_path, text)


def test_set_replaces_single_values_and_is_checked_like_the_file(tmp_path):
    assert load(tmp_path, MINIMAL, ["geometry.steps=7", "training.schedule.peak_lr=1e-3"]).geometry.steps == 7
    with pytest.raises(UserError, match="unknown key geometry.stepz"):
        load(tmp_path, MINIMAL, ["geometry.stepz=7"])
    with pytest.raises(UserError, match="key.subkey=value"):
        load(tmp_path, MINIMAL, ["geometry"])
    with pytest.raises(UserError, match="not a group"):
        load(tmp_path, MINIMAL, ["name.x=1"])


def test_a_missing_file_and_wrong_encoding_are_clear(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: é\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_files_of_an_experiment_are_found_beside_the_configuration(tmp_path):
    text = (
        MINIMAL
        + "experiments:\n- {name: a, type: muse, files: {forget: data/a.jsonl, retain1: /else/b.jsonl}}\n- {name: b, type: texts, file: c.jsonl}\n"
    )
    articles, texts = load(tmp_path, text).experiments
    assert articles.parameters["files"] == {"forget": str(tmp_path / "data/a.jsonl"), "retain1": "/else/b.jsonl"}
    assert texts.parameters["file"] == str(tmp_path / "c.jsonl")
