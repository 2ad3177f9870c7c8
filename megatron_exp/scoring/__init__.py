"""Asking a model: one scoring engine for live and loaded megatron-core models and for Hugging Face models.

    probes of a manifest -> score_probes -> Scorer (packs by length, shares equal sequences) -> forward passes -> answers

`batched` holds the engine without a model, `engine` and `huggingface` the two kinds of models, `probes` the way from a manifest's
probes to answers.
"""
