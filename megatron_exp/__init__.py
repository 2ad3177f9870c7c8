"""megatron-exp: many controlled pretraining experiments in one training run.

The manifest is the only thing that crosses the stages:

    corpus --plan--> MANIFEST --train--> RUN --eval--> results --report--> one HTML file
                        |                 ^
                        +--- overlay -----+   base shards are immutable; a rewrite is applied when a slot is read

- `shards`, `stream`: tokenised text as Megatron indexed datasets, and the order in which training consumes it.
- `experiments`: one file each: items with controls, insertions, probes, pre-registered analysis, scores.
- `placement`, `manifest`, `overlay`: where every copy goes, the record of it, and the stream as trained on.
- `training`, `scoring`, `evaluation`, `report`: the loop on megatron-core, questions to a model, verdicts, a page to read.
"""

__version__ = "0.1.0"
