"""Which documents a run sees."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from svend.pipeline.groups import default_tree
from svend.pipeline.options.choices import BrokenRows, Duplicates, Exhausted, LongDocuments, LossOn
from svend.pipeline.options.defaults import default, default_dict, default_enum, require


@dataclass(kw_only=True)
class OwnSource:
    """A data set of the user's: its kind, its place, and the function that reads a record."""

    name: str
    kind: str
    to_document: str
    path: str | None = None
    repository: str | None = None
    subset: str | None = None
    revision: str = "main"
    heldout_split: str | None = None


@dataclass(kw_only=True)
class DataConfig:
    """Which documents a run sees, in which proportions, and how long its sequences are."""

    recipe: str = "custom"
    purpose: str = "own sources"
    sources: list[str] = default("training.data.sources")
    mix_ratios: dict[str, float] = default_dict("training.data.mix_ratios")
    max_seq_length: int | None = default("training.data.max_seq_length")
    num_samples: int | None = default("training.data.num_samples")
    seed: int | None = default("training.data.seed")
    path: str | None = default("training.data.path")
    heldout_path: str | None = default("training.data.heldout_path")
    heldout_fraction: float = default("training.data.heldout_fraction")
    tokenizer: str = default("training.data.tokenizer")
    long_documents: LongDocuments = default_enum("training.data.long_documents", LongDocuments)
    loss_on: LossOn = default_enum("training.data.loss_on", LossOn)
    exhausted: Exhausted = default_enum("training.data.exhausted", Exhausted)
    broken_rows: BrokenRows = default_enum("training.data.broken_rows", BrokenRows)
    duplicates: Duplicates = default_enum("training.data.duplicates", Duplicates)
    leak_words: int = default("training.data.leak_words")
    evaluation_sets: list[str] = default("training.data.evaluation_sets")
    own_sources: list[OwnSource] = field(default_factory=list)
    revisions: dict[str, str] = default_dict("training.data.revisions")
    processes: int | None = default("training.data.processes")
    cache_dir: str = default("training.data.cache_dir")

    def check(self) -> None:
        """Raise ConfigError for a mix that cannot be made."""
        where = "training.data"
        require(bool(self.sources), f"{where}.sources", self.sources, "at least one source")
        ratios = self.mix_ratios
        require(
            bool(ratios)
            and all(math.isfinite(r) and r >= 0 for r in ratios.values())
            and math.isclose(sum(ratios.values()), 1.0, abs_tol=1e-6),
            f"{where}.mix_ratios",
            ratios,
            "ratios of at least 0 that sum to 1",
        )
        length = self.max_seq_length
        require(length is None or length >= 8, f"{where}.max_seq_length", length, "at least 8")
        samples = self.num_samples
        require(samples is None or samples >= 1, f"{where}.num_samples", samples, "at least 1")
        fraction = self.heldout_fraction
        require(0 < fraction < 1, f"{where}.heldout_fraction", fraction, "between 0 and 1")
        seed = self.seed
        require(seed is None or 0 <= seed < 2**63, f"{where}.seed", seed,
                "null, or at least 0 and below 2^63")
        require(self.leak_words >= 0, f"{where}.leak_words", self.leak_words, "at least 0")
        processes = self.processes
        require(processes is None or processes >= 1, f"{where}.processes", processes,
                "null, or at least 1")


def default_data() -> DataConfig:
    """Return the default recipe, by its name."""
    data = default_tree()["training"]["data"]
    return DataConfig(recipe=data["recipe"], purpose=data["purpose"])
