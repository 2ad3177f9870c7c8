"""A methods paragraph for a paper's appendix, every number of it from the run's own records."""

from megatron_exp.display.numbers import count, counted, measured, percent
from megatron_exp.manifest.rewritten import rewritten
from megatron_exp.report.gather import Inputs

_PRECISIONS = {
    "fp32": "32-bit floating point",
    "bf16": "bfloat16 with 32-bit master weights",
    "fp8": "FP8 matrix products with 32-bit master weights",
}


def methods(inputs: Inputs) -> list[str]:
    """Paragraphs: model and data, insertions, inference."""
    return [_training(inputs), _insertions(inputs), _inference(inputs)]


def _training(inputs: Inputs) -> str:
    run = inputs.run.record
    config, model, geometry = run["config"], run["model"], inputs.manifest.geometry
    training = config["training"]
    schedule = training["schedule"]
    order = {"keyed": "a keyed permutation of all samples", "olmo": "AI2's order of the first epoch, replayed"}[config["corpus"]["order"]]
    twin = " A twin with the same initial weights, data order and schedule was trained without the insertions." if inputs.twin else ""
    state = "" if inputs.finished else f" (the run described here stands at step {count(inputs.last_step)})"
    return (
        f"We trained an OLMo-2-style decoder ({model['layers']} layers, hidden size {count(model['hidden'])}, {model['heads']} "
        f"heads) for {count(geometry.steps)} steps of {count(geometry.global_batch_size)} samples of "
        f"{count(geometry.sequence_length)} tokens, {count(geometry.num_tokens)} tokens in all{state}, in "
        f"{_PRECISIONS[training['precision']]}, with AdamW (beta {training['optimizer']['beta1']:g} and "
        f"{training['optimizer']['beta2']:g}, weight decay {training['optimizer']['weight_decay']:g}, gradients clipped at "
        f"{training['optimizer']['clip']:g}) and a {schedule['kind']} learning rate schedule after "
        f"{count(schedule['warmup_steps'])} warm-up steps. The data order is {order} (seed {config['seeds']['order']}).{twin}"
    )


def _insertions(inputs: Inputs) -> str:
    manifest = inputs.manifest
    planned = rewritten(inputs.insertions, manifest.geometry)
    names = ", ".join(manifest.analyses[name]["title"].lower() for name in manifest.experiments)
    return (
        f"The training data carry {counted(len(manifest.experiments), 'experiment')} ({names}). Their insertions overwrite, "
        f"replace or perturb {percent(planned.tokens / manifest.geometry.num_tokens)} of the tokens, in "
        f"{percent(planned.slots / manifest.geometry.num_slots)} of the training samples; all "
        f"{count(inputs.insertions.num_rows)} were placed as requested, at places that depend on a seed and on names only. "
        "Items were assigned to conditions and to controls that are never inserted by key within strata. Shards, plan and "
        f"every sample as it was fed to the model are covered by hashes (manifest {manifest.fingerprint[:12]})."
    )


def _inference(inputs: Inputs) -> str:
    primaries = [
        outcome
        for name in inputs.manifest.experiments
        for outcome in inputs.manifest.analyses[name]["outcomes"]
        if outcome["family"] == "primary"
    ]
    twin = ", with the twin's value on the same item as covariate" if inputs.twin else ""
    margins = ", ".join(dict.fromkeys(f"{measured(outcome['margin'])} {outcome['unit']}" for outcome in primaries))
    return (
        f"{counted(len(primaries), 'primary outcome')} with test, side, state and margin were fixed in the manifest before "
        "training. Inference is within the run: treated against control items by re-randomisation of the recorded assignment "
        f"or an equivalent, clusters respected{twin}. Primary p-values of all experiments form one family corrected by Holm's "
        f"method at a level of 5%; an outcome whose 95% interval lies inside its margin ({margins}) counts as equivalent to "
        "none, and one that could not be scored as such, never as zero. Claims are about this run unless stated otherwise."
    )
