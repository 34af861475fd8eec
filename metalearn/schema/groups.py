"""Keys of the run itself and of the groups that have one schema: trainer, evaluation, logger."""

from dataclasses import dataclass
from typing import ClassVar

from metalearn.schema.keys import key

BN_MODES = ("batch", "support_plus_one", "support_only", "running")
LONG_RUN = 10_000
"""Meta-steps of a run from which compiling them earns the compiler's time back."""


@dataclass
class Run:
    """The keys outside all groups; the epoch is the engine's, raised when its numbers may change."""

    epoch: ClassVar[int] = 1

    seed: int = key(0, "seed of every training draw and of the initial parameters", ge=0, lt=2**31)
    rerun: bool = key(False, "run a finished cell again; its old result is archived beside the new", touches="none")
    output_dir: str = key("outputs", "folder that holds runs/<cell_id>/ and Hydra's own folders", touches="none")


@dataclass
class Trainer:
    """How long to train, on what, and how often to look."""

    epoch: ClassVar[int] = 1

    max_steps: int = key(500, "meta-steps (outer updates)", ge=0)
    meta_batch_size: int = key(16, "tasks of one meta-step (B), over all ranks", ge=1)
    val_every: int = key(100, "meta-steps between validations; 0 for none (then the last checkpoint is tested)", ge=0)
    val_episodes: int = key(100, "frozen validation episodes", ge=1)
    test_episodes: int = key(600, "frozen test episodes", ge=2, touches="test")
    precision: str = key(
        "32",
        "bits of floating-point numbers; tf32: 32, but matrices and convolutions multiply TF32 (GPU only); bf16: 32, "
        "but convolutions multiply bfloat16",
        choices=("32", "64", "tf32", "bf16"),
    )
    accelerator: str = key("auto", "auto, cpu or cuda", touches="none", choices=("auto", "cpu", "cuda"))
    devices: int = key(
        1, "processes, one device each; the tasks of a meta-step are divided among them", ge=1, touches="none"
    )
    threads: int = key(0, "CPU threads of a process; 0 leaves the library's choice", ge=0, touches="none")
    chunk_mib: float = key(
        0.0,
        "activations (MiB) of the tasks that are computed at once; 0 for 12 on a CPU and 2048 on a GPU",
        ge=0,
        touches="none",
    )
    recompute: bool = key(
        False, "compute inner steps again instead of keeping them: memory that does not grow with them", touches="none"
    )
    compile: str = key(
        "auto",
        "whether meta-steps are compiled (seconds to half a minute at the start): auto for long runs of tiny networks",
        choices=("auto", "always", "never"),
        touches="none",
    )
    meta_steps_per_call: int = key(
        0, "meta-steps in one call of Lightning's training_step; 0 for a tenth of a second", ge=0, touches="none"
    )
    log_every: int = key(
        10, "meta-steps between lines of metrics.jsonl; a running alpha has one of each", ge=1, touches="none"
    )
    save_seconds: float = key(
        60.0, "seconds between checkpoints (besides one after each validation)", gt=0, touches="none"
    )


@dataclass
class Evaluation:
    """How trained parameters are judged, on frozen episodes."""

    epoch: ClassVar[int] = 1

    bn_modes: list[str] = key(
        ["batch", "support_plus_one"],
        "batch-norm modes of prediction; the first is the headline and guides selection",
        choices=BN_MODES,
        touches="test",
        first_touches="train",
    )
    steps: str = key(
        "headline",
        "adaptation steps to report: all for the headline mode and the last for others, all, or only the last",
        choices=("headline", "all", "last"),
        touches="test",
    )
    seed: int = key(0, "seed of the frozen validation and test episodes", ge=0, lt=2**31)
    checkpoint: str = key(
        "best", "parameters to test: best on validation classes, or last", choices=("best", "last"), touches="test"
    )


@dataclass
class Logger:
    """A mirror of the training log; metrics.jsonl is always written."""

    epoch: ClassVar[int] = 1

    name: str = key(
        "wandb",
        "wandb (offline unless WANDB_MODE says otherwise), csv or none",
        touches="none",
        choices=("wandb", "csv", "none"),
    )
    project: str = key("metalearn", "W&B project", touches="none")
    group: str | None = key(None, "W&B group; null for the experiment's name, if there is one", touches="none")
    tags: list[str] = key([], "further W&B tags", touches="none")
