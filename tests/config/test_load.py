import orjson
import pytest

from megatron_exp.config.load import load_config
from megatron_exp.errors import UserError
from megatron_exp.experiments.loading import load_experiment
from megatron_exp.experiments.texts import Texts

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
        (MINIMAL.replace("steps: 3", "steps: {{ steps }}"), r"line 3: a key is a list or a group"),
        (MINIMAL + "? [a]\n: 1\n", "line 4: a key is a list or a group"),
        (MINIMAL + "model: {preset: a\x07}\n", r"line 4: the control character U\+0007"),
        (MINIMAL + "pool: {slots: !!int foo}\n", "line 4: 'foo' is not a whole number"),
        (MINIMAL + "pool: {slots: !!float foo}\n", "line 4: 'foo' is not a number"),
        (MINIMAL + "pool: {slots: !!bool foo}\n", "line 4: the value is not of the type"),
        (MINIMAL + f"pool: {{slots: {'9' * 6000}}}\n", r"line 4: '9+\.\.\. \(6,000 characters\)' is not a whole number"),
        (MINIMAL + f"pool: {'[' * 3000}\n", "nested too deeply"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        load(tmp_path, text)


@pytest.mark.parametrize("value", ["{{ a }}", "{? [a] : 1}", "\x07", "!!int foo", "9" * 6000, "[" * 3000, "[1", "!!timestamp x"])
def test_a_value_of_set_that_is_no_yaml_is_refused_by_name(tmp_path, value):
    with pytest.raises(UserError, match=r"^--set pool\.slots="):
        load(tmp_path, MINIMAL, [f"pool.slots={value}"])


@pytest.mark.parametrize(
    "setting",
    [
        "corpus.sources={src: .inf}",
        "training.schedule.peak_lr=.nan",
        "training.schedule.horizon_tokens=.inf",
        "training.optimizer.weight_decay=.inf",
        "experiments=[{name: a, type: texts, deep: {er: [1, .nan]}}]",
        "experiments=[{name: a, type: texts, huge: 18446744073709551616}]",
        "seeds.order=18446744073709551616",
        "seeds.init=-1",
        "geometry.steps=9223372036854775808",
        "training.optimizer.beta1=2",
        "training.optimizer.beta2=1",
        "training.optimizer.eps=-1",
        "training.optimizer.clip=-1",
    ],
)
def test_a_number_that_json_or_the_optimizer_does_not_take_is_refused(tmp_path, setting):
    with pytest.raises(UserError, match=setting.partition("=")[0].replace("experiments", r"experiments\.0\.parameters")):
        load(tmp_path, MINIMAL, [setting])


def test_the_largest_numbers_are_kept_exactly(tmp_path):
    config = load(tmp_path, MINIMAL, ["seeds.order=18446744073709551615", "geometry.steps=9223372036854775807"])
    assert orjson.loads(orjson.dumps(config.model_dump(mode="json")))["seeds"]["order"] == 2**64 - 1 == config.seeds.order


def test_the_three_experiments_of_the_first_design_load_once_licences_are_named(tmp_path):
    text = MINIMAL + (
        "experiments:\n"
        "- {name: knowledge-acquisition, type: knowledge_acquisition, paraphrases: data/ka.jsonl, interval: 1000, target: 0.08}\n"
        "- {name: mathematical-reasoning, type: mathematical_reasoning, problems: 500000, max_ops: 10}\n"
        "- {name: my-texts, type: texts, file: data/mine.jsonl, copies: [0, 1, 4, 16], window: [0.1, 0.9], metric: loss}\n"
    )
    facts, problems, texts = load(tmp_path, text).experiments
    assert load_experiment(problems).problems == 500_000
    for entry in (facts, texts):
        with pytest.raises(UserError, match="licence is (missing|needed)") as refused:
            load_experiment(entry)
        assert "mine.jsonl" not in str(refused.value), "the whole entry is no value of the missing key"
        load_experiment(entry.model_copy(update={"parameters": entry.parameters | {"licence": "CC0-1.0"}}))


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


def test_an_experiment_refuses_infinity_whoever_makes_it():
    with pytest.raises(ValueError, match="finite number"):
        Texts(file="mine.jsonl", licence="CC0-1.0", smallest_effect=float("inf"))
