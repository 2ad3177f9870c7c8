"""One screen about a corpus, a manifest or a run."""

from dataclasses import dataclass
from typing import Any

from megatron_exp.inspection.status import RunStatus, status
from megatron_exp.inspection.targets import Target


@dataclass(frozen=True)
class SourceSummary:
    """One source of a corpus."""

    source: str
    shards: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class CorpusSummary:
    """What a corpus holds."""

    path: str
    fingerprint: str
    vocabulary_size: int
    tokenizer_fingerprint: str
    sources: tuple[SourceSummary, ...]


@dataclass(frozen=True)
class ConditionSummary:
    """One condition of one experiment, as planned. tokens: rewritten positions."""

    experiment: str
    condition: str
    items: int
    controls: int
    insertions: int
    tokens: int
    slots: int


@dataclass(frozen=True)
class ManifestSummary:
    """What a manifest plans. keep_steps: model states that must be kept as checkpoints."""

    path: str
    name: str
    fingerprints: dict[str, str]
    geometry: dict[str, int]
    budget: dict[str, Any]
    conditions: tuple[ConditionSummary, ...]
    keep_steps: tuple[int, ...]


@dataclass(frozen=True)
class RunSummary:
    """Where a run stands, and its manifest."""

    status: RunStatus
    manifest: ManifestSummary


def summarise(target: Target) -> CorpusSummary | ManifestSummary | RunSummary:
    """The summary that fits the target."""
    if target.kind == "corpus":
        return _corpus(target)
    manifest = _manifest(target)
    return RunSummary(status(target.path), manifest) if target.run else manifest


def _corpus(target: Target) -> CorpusSummary:
    corpus = target.corpus
    names = sorted({shard.source for shard in corpus.shards})
    members = {name: [shard for shard in corpus.shards if shard.source == name] for name in names}
    sources = tuple(
        SourceSummary(name, len(shards), sum(shard.num_documents for shard in shards), sum(shard.num_tokens for shard in shards))
        for name, shards in members.items()
    )
    return CorpusSummary(str(target.path), corpus.fingerprint, corpus.vocabulary_size, corpus.tokenizer_fingerprint, sources)


def _manifest(target: Target) -> ManifestSummary:
    manifest = target.manifest
    record = manifest.record
    conditions = tuple(
        ConditionSummary(experiment, condition, **{name: cell[name] for name in ("items", "controls", "insertions", "tokens", "slots")})
        for experiment, cells in manifest.counts.items()
        for condition, cell in cells.items()
    )
    return ManifestSummary(
        str(manifest.path),
        manifest.config.name,
        record["fingerprints"],
        record["geometry"],
        record["budget"],
        conditions,
        tuple(manifest.keep_steps),
    )
