"""What a recipe holds, and how a run is executed on a machine."""

from dataclasses import dataclass, field

from training.optimizers import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a run is executed. May change on resume: the result is the same but for rounding."""

    accumulate: int = 1  # parts that a process computes its share of a batch in, one by one
    workers: int = 0  # processes beside each training process that read clips ahead
    cache: str = "memory"  # of the encoder's states: "memory", "none", or a folder
    recompute: bool = False  # the LM's blocks in the backward pass, to save memory
    compile: bool = False  # the LM's blocks, with torch.compile
    shard: bool = False  # the LM over the processes (FSDP2)
    max_unreadable: int = 10  # clips that may be skipped


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The hyperparameters of a stage."""

    train: TrainConfig
    answer_length: int  # tokens; shorter answers are padded with the end token
    t_min: float  # noise levels are drawn from (t_min, 1]
    stratified: bool  # noise levels are spread over the batch instead of independent
    match_embedding_scale: bool  # new parts start at the size of the LM's token embeddings
    shapes: dict  # AdapterConfig fields of new adapters that differ from the paper's
    dtype: str = "float32"  # of the frozen parts and of the arithmetic; adapters are float32
    bucket_by_length: bool = False  # clips of similar length in a batch
    whiten: bool = False  # a new acoustic adapter starts on whitened states (whitening.py)
    execution: Execution = field(default_factory=Execution)
