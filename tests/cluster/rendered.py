"""The examples in launch/slurm, rendered from examples/paper.yaml and launch/clusters/h100.yaml: `python -m tests.cluster.rendered` writes them."""

from pathlib import Path

from megatron_exp.cluster.profile import load_cluster
from megatron_exp.cluster.render import render
from megatron_exp.cluster.stages import Folders, chain
from megatron_exp.config.load import load_config

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "launch/slurm"


def rendered() -> dict[str, str]:
    """File name to content, as if everything lay below /data."""
    config = load_config(ROOT / "examples/paper.yaml")
    cluster = load_cluster(ROOT / "launch/clusters/h100.yaml").model_copy(update={"python": "python3"})
    folders = Folders(Path("/data/toaa-1b"), Path("/data/corpus"))
    stages = chain(config, cluster, folders)
    names = [f"{number:02d}-{stage.name}.sbatch" for number, stage in enumerate(stages, start=1)]
    return {name: render(stage, config.name, cluster, folders, name) for name, stage in zip(names, stages, strict=True)}


if __name__ == "__main__":
    for old in EXAMPLES.glob("*.sbatch"):
        old.unlink()
    for name, text in rendered().items():
        (EXAMPLES / name).write_text(text, encoding="utf-8")
