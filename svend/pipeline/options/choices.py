"""What an option of a few named values may be."""

from __future__ import annotations

from enum import Enum


class Schedule(Enum):
    """How the learning rate moves over a run."""

    COSINE = "cosine"
    WSD = "wsd"
    CONSTANT = "constant"


class Optimizer(Enum):
    """What updates the weights."""

    ADAMW = "adamw"
    MUON = "muon"  # the blocks' matrices; AdamW the rest


class Parametrisation(Enum):
    """How init, learning rates and multipliers depend on width and depth."""

    STANDARD = "standard"
    COMPLETEP = "completep"  # what is best for a small model is best for a large one


class Precision(Enum):
    """The number format of the forward and backward pass; of the weights see WeightPrecision.

    AUTO is BF16 on a device that multiplies in it, else FP16 on CUDA and FP32 on a CPU.
    """

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class Parallel(Enum):
    """How several processes share a run; AUTO is DDP where the model fits whole, else FSDP."""

    AUTO = "auto"
    DDP = "ddp"  # each holds the whole model
    FSDP = "fsdp"  # each holds a part of weights, gradients and moments


class WeightPrecision(Enum):
    """The number format that the weights are kept in between steps."""

    FP32 = "fp32"
    BF16 = "bf16"  # the matrices, rounded stochastically after each step


class MomentPrecision(Enum):
    """The number format that AdamW's moments are kept in between steps."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


class CheckpointingPolicy(Enum):
    """What gradient checkpointing computes again in the backward pass."""

    FULL = "full"  # the whole block
    SELECTIVE = "selective"  # what lies between matrix products and attention


class FullDisk(Enum):
    """What a run does whose checkpoint does not fit on the disk."""

    STOP = "stop"  # after saying what is missing; the last checkpoint stays
    PRUNE = "prune"  # remove old checkpoints, but for the last valid and the best one


class Compile(Enum):
    """Whether blocks are compiled; AUTO compiles runs that are long enough to gain from it."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class MicroBatch(Enum):
    """Whether a step is cut as it is set; AUTO has a GPU take at once what it can hold."""

    AUTO = "auto"
    FIXED = "fixed"


class Device(Enum):
    """Where the model trains; AUTO is CUDA where there is a CUDA device."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class LongDocuments(Enum):
    """What happens to a document longer than a training sequence."""

    SPLIT = "split"
    DROP = "drop"


class LossOn(Enum):
    """Which tokens training learns to predict."""

    ALL = "all"
    ANSWERS = "answers"  # what the model says: answers, calls, and running text


class Exhausted(Enum):
    """What happens when a kind of the mix has no more documents."""

    STOP = "stop"  # the epoch ends
    REPEAT = "repeat"  # the kind begins anew, until every kind has been seen whole


class BrokenRows(Enum):
    """What happens to a row that cannot be read, is not in its source's schema, or is empty."""

    FAIL = "fail"
    DROP = "drop"  # and is counted, and named in the data report


class Duplicates(Enum):
    """Which repeated documents are left out of the train part."""

    KEEP = "keep"
    EXACT = "exact"
    NEAR = "near"  # also what shares most of its five-word sequences (MinHash)


class ToolScore(Enum):
    """Which score of the benchmark tool_accuracy the gates read under its name."""

    EXECUTION = "execution"  # problems answered right through a valid call
    STRUCTURE = "structure"  # calls as BFCL accepts them


class HealthAction(Enum):
    """What a run does when a look at its health shows a problem."""

    WARN = "warn"
    FAIL = "fail"  # after as many looks in a row as health.patience says
