"""One attempt at a run, as the loop and its hooks see it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_exp.config.schema import Config
from megatron_exp.control.chain import Chain
from megatron_exp.manifest.reader import Manifest
from megatron_exp.model.build import LanguageModel
from megatron_exp.model.optimizer import Optimizer
from megatron_exp.model.schedule import Schedule
from megatron_exp.model.step import StepResult
from megatron_exp.parallel.layout import Layout
from megatron_exp.scoring.engine import Scorer
from megatron_exp.stream.base import Stream as BaseStream
from megatron_exp.training.data import Batch, Feed, Stream
from megatron_exp.training.origin import Origin


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """What is trained on, fixed before any process of the run is joined. base: the stream without overlay; stream: what the model reads."""

    directory: Path
    manifest: Manifest
    config: Config
    base: BaseStream
    stream: Stream
    baseline: bool
    masked: frozenset[str]
    identity: dict[str, str]
    """Name to fingerprint of everything that must be the same for two attempts to be one run."""
    origin: Origin | None = None
    """Whose weights it begins with, where not with initial ones."""
    chain: Chain | None = None
    """The decisions of controllers so far; None for a baseline and where there are none to make."""

    @property
    def num_steps(self) -> int:
        return self.base.geometry.steps

    @property
    def frontier(self) -> int:
        """Steps before it may be read: what is inserted there is decided."""
        return self.chain.decided.frontier if self.chain else self.num_steps

    @property
    def shard_names(self) -> list[str]:
        """What the corpus calls its shards, for messages."""
        return [shard.name for shard in self.base.corpus.shards]


@dataclass(frozen=True, eq=False, kw_only=True)
class Update:
    """The update just made. seconds: of the whole step, waiting for data included, hooks not."""

    batch: Batch
    result: StepResult
    learning_rate: float
    seconds: float
    wait_seconds: float


@dataclass(eq=False, kw_only=True)
class Run:
    """The state that the loop advances. step: updates done, which names the model's state. last: the newest update of this attempt.

    stop: set by a hook that wants the run to end after this step, to go on later from its checkpoint.
    """

    plan: Plan
    layout: Layout
    model: LanguageModel
    optimizer: Optimizer
    schedule: Schedule
    feed: Feed
    scorer: Scorer
    attempt: int
    step: int
    hook_states: dict[str, Any] = field(default_factory=dict)
    """What each hook left in the checkpoint that this attempt goes on from."""
    resumed_from: Path | None = None
    """That checkpoint, which was found sound; None at the start of a run."""
    last: Update | None = None
    validation: tuple[int, float] | None = None
    """State and loss of the newest validation of this attempt."""
    stop: bool = False

    @property
    def is_over(self) -> bool:
        """Whether the last planned update is done."""
        return self.step >= self.plan.num_steps
