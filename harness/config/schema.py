"""Everything that can be set about a run, as frozen dataclasses. The defaults are the quickstart run.

Each class checks what it can decide alone when it is made; rules that span several classes are in
`TrainConfig.__post_init__`, and those that need the world's size in `check_world`. A `ConfigError` names
the key as it is written on the command line.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from harness.errors import ConfigError

__all__ = [
    "AlertConfig",
    "CheckpointConfig",
    "DataConfig",
    "FaultConfig",
    "GuardConfig",
    "LoopConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "ScheduleConfig",
    "TrackingConfig",
    "TrainConfig",
]


SpikeRuleName = Literal["robust", "zclip", "persistent", "sigma"]
"""The rules of `harness.stability.detectors`."""


def require(condition: bool, key: str, value: Any, rule: str, remedy: str = "") -> None:
    """Raises `ConfigError` naming `key` and `value` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key} is {value!r}", rule=rule, remedy=remedy)


def require_positive(section: str, config: object, names: Collection[str]) -> None:
    """Each of the fields `names` of `config` has to be greater than zero."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name}", value, "it has to be greater than 0")


def require_not_negative(section: str, config: object, names: Collection[str]) -> None:
    """Each of the fields `names` of `config` has to be zero or more."""
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{section}.{name}", value, "it has to be 0 or more")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    paths: tuple[str, ...] = ()
    """Files or folders of text (task text), or one .npz with `images` and `labels` (task images). Empty: the
    Python standard library's source, or scikit-learn's handwritten digits."""
    sequence_length: int = 256
    """Bytes that the model sees at once (task text)."""
    val_frac: float = 0.05
    """Share of the files (text) or samples (images) held out, chosen by a hash of their content."""
    cache_dir: str | None = None
    """Where prepared data is kept. Default: $HARNESS_CACHE or the user's cache directory."""
    num_workers: int = 0
    """Loader processes per rank; 0 loads in the training process."""
    allow_change: bool = False
    """Go on with a run whose data is not what it was when its checkpoint was written; otherwise an error."""

    def __post_init__(self) -> None:
        require_positive("data", self, ["sequence_length"])
        require_not_negative("data", self, ["num_workers"])
        require(0 < self.val_frac < 1, "data.val_frac", self.val_frac, "it has to lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The bundled models' shape. A task of your own builds its own model and ignores this."""

    kind: Literal["decoder", "cnn", "mlp"] = "decoder"
    """decoder for text; cnn or mlp for images."""
    num_layers: int = 4
    """Decoder blocks, convolution stages or hidden layers."""
    dim: int = 128
    """Width of the residual stream, of the first convolution, or of the hidden layers."""
    num_heads: int = 4
    """Attention heads; has to divide dim."""
    num_kv_heads: int | None = None
    """Key and value heads (grouped-query attention); default: as many as num_heads."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward kind."""
    mlp_dim: int | None = None
    """Hidden width of the feed-forward; default: 4 x dim (gelu) or 8/3 x dim rounded up to 64 (swiglu)."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (Llama) or LayerNorm (GPT-2)."""
    positions: Literal["rotary", "learned"] = "rotary"
    """Rotary position embedding (Llama) or a learned table (GPT-2)."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    bias: bool = False
    """Biases in the linear layers (GPT-2)."""
    tie_embeddings: bool = True
    """The output projection is the transposed input embedding."""
    vocab_size: int = 256
    """Rows of the embedding; the text task uses the first 256."""
    dropout: float = 0.0
    """Dropout probability in the residual branches."""

    def __post_init__(self) -> None:
        require_positive("model", self, ["num_layers", "dim", "num_heads", "vocab_size", "rope_theta"])
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "it has to lie in [0, 1)")
        if self.kind == "decoder":
            self._check_heads()

    def _check_heads(self) -> None:
        require(
            self.dim % (2 * self.num_heads) == 0,
            "model.dim",
            self.dim,
            f"it has to be a multiple of 2 x model.num_heads = {2 * self.num_heads} (even width per head)",
        )
        if self.num_kv_heads is not None:
            require(
                self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0,
                "model.num_kv_heads",
                self.num_kv_heads,
                f"it has to divide model.num_heads = {self.num_heads}",
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer. Norms, biases and other one-dimensional parameters are never decayed."""

    name: Literal["adamw", "adam", "sgd", "adagrad"] = "adamw"
    """All four run fused and take the guard's verdict on the device."""
    lr: float = 3e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates."""
    eps: float = 1e-8
    """Adam's and Adagrad's denominator offset."""
    weight_decay: float = 0.1
    """Decay of matrices; decoupled for adamw."""
    momentum: float = 0.9
    """SGD's momentum."""

    def __post_init__(self) -> None:
        require_positive("optim", self, ["lr", "eps"])
        require_not_negative("optim", self, ["weight_decay", "momentum"])
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "both have to lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the run, as a share of optim.lr."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine, warm-up-stable-decay (linear at the end), or constant; each after a linear warm-up."""
    warmup_steps: int = 20
    """Steps of linear warm-up from 0."""
    decay_frac: float = 0.2
    """Share of the schedule (`steps`) that the decay of wsd takes."""
    min_lr_frac: float = 0.1
    """Where the decay ends, as a share of the peak."""
    steps: int | None = None
    """Steps after which cosine and wsd have decayed; from there on the rate stays. Default: loop.steps of the
    run's first attempt, whatever loop.steps is later. Another number for a run that goes on is another rate
    from that step on, and is said."""

    def __post_init__(self) -> None:
        require_not_negative("schedule", self, ["warmup_steps"])
        if self.steps is not None:
            require_positive("schedule", self, ["steps"])
        require(0 <= self.decay_frac <= 1, "schedule.decay_frac", self.decay_frac, "it has to lie in [0, 1]")
        require(
            0 <= self.min_lr_frac <= 1, "schedule.min_lr_frac", self.min_lr_frac, "it has to lie in [0, 1]"
        )


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how much at once, in which precision, and how often to look."""

    steps: int = 400
    """Optimizer steps of the whole run. A finished run goes on when this is raised, at the learning rate that
    it ended with; see schedule.steps."""
    global_batch: int = 16
    """Samples per optimizer step, over all ranks and micro-batches."""
    micro_batch: int | None = None
    """Samples per forward pass and rank; default: all of a rank's share at once."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of forward and backward; parameters stay fp32. auto: what accelerate was told, else bf16 on
    CUDA and fp32 on CPU."""
    compile: bool = False
    """Compile the model with torch.compile."""
    eval_every: int = 100
    """Steps between evaluations; 0: only at the end."""
    eval_samples: int = 256
    """Held-out samples per evaluation, always the same ones."""

    def __post_init__(self) -> None:
        require_positive("loop", self, ["steps", "global_batch", "eval_samples"])
        require_not_negative("loop", self, ["eval_every"])
        if self.micro_batch is not None:
            require_positive("loop", self, ["micro_batch"])


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over the processes."""

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """auto: plain in one process, ddp in several. fsdp (FSDP2) shards all of its state."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is one."""
    threads: int = 0
    """Threads that each process computes with on the CPU. 0: its share of the cores that it may use (affinity
    and quota, over the processes on the machine), unless you, and not a launcher, set OMP_NUM_THREADS.
    Another number may change the last bits of results."""
    bucket_cap_mb: int = 25
    """Size of DDP's gradient buckets in MiB."""
    find_unused: bool = False
    """DDP looks in every step for parameters that the loss does not depend on, which costs a walk through the
    graph; without it such a parameter ends the run with an error that names it. FSDP needs no such search."""
    timeout_s: float = 300.0
    """How long a collective may wait before the run is ended."""

    def __post_init__(self) -> None:
        require_positive("parallel", self, ["bucket_cap_mb", "timeout_s"])
        require_not_negative("parallel", self, ["threads"])


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What the stability guard measures and what it does about it."""

    max_norm: float | None = 1.0
    """Gradients are scaled down to this L2 norm; null: never."""
    nonfinite: Literal["skip", "stop"] = "skip"
    """On a NaN or Inf in any rank's loss or gradient: leave the step out, or end the run."""
    spike: Literal["off", "warn", "clip", "skip"] = "warn"
    """On a finite but extraordinary loss or gradient norm: say so, clip to the usual norm, leave it out."""
    spike_rule: SpikeRuleName = "robust"
    """What counts as extraordinary; docs/stability.md has the rules. The three settings that follow are the
    robust rule's; the others keep the values of their papers."""
    spike_threshold: float = 7.0
    """Robust z-score from which a step counts as a spike."""
    spike_window: int = 128
    """Unflagged steps that the spike rule looks back on."""
    spike_warmup: int = 64
    """Steps before the spike rule speaks."""
    absurd_norm_ratio: float | None = 1e4
    """A finite gradient of more than this many times the usual norm is left out, whatever `spike` says; null
    or 0: never."""
    max_consecutive_skips: int = 3
    """More skipped steps in a row than this roll the run back where that is possible, else end it."""
    max_skip_frac: float = 0.25
    """Largest share of skipped steps among the last 100 that is borne."""
    max_rollbacks: int = 3
    """Rollbacks that a run may take before it is ended."""
    rollback_skip_steps: int = 200
    """Steps' worth of data that a rollback steps over, from its checkpoint on; at least up to the step that
    caused it. PaLM (arXiv 2204.02311) took 200 to 500."""
    rollback_cooldown_steps: int = 50
    """Applied steps that have to follow a rollback before the next one; trouble sooner ends the run."""
    replicas: Literal["off", "warn", "stop"] = "warn"
    """On replicas that are not the same: in the reduced gradient's norm, compared every step, or in a
    checksum of parameters and optimizer state."""
    replicas_every: int = 101
    """Steps between checksums; 0: never. Odd, because an even cadence misses an error of period two."""
    lag_steps: int = 2
    """Steps after which a verdict is read back; the device itself acts at once. 0 synchronises every step."""
    extremes_every: int = 1
    """Steps between measurements of max-abs and zeros; norm, NaN and Inf are measured every step. On CUDA the
    two come free with the others."""
    per_parameter_every: int = 10
    """Steps between records with a row per parameter; 0: never. An incident always has them."""
    sample_every: int = 100
    """Steps between samples of weights and updates (norms, update / weight, Adam's second moments, gradient
    underflow); 0: never."""
    init_loss_scale: float = 65536.0
    """Loss scale at the start of an fp16 run."""
    loss_scale_growth_steps: int = 2000
    """Clean fp16 steps after which the loss scale is doubled."""

    def __post_init__(self) -> None:
        self._check_spikes()
        require_positive("guard", self, ["init_loss_scale"])
        require_positive(
            "guard", self, ["max_consecutive_skips", "loss_scale_growth_steps", "extremes_every"]
        )
        require_not_negative("guard", self, ["lag_steps", "per_parameter_every"])
        require_not_negative("guard", self, ["max_rollbacks", "rollback_skip_steps"])
        require_not_negative("guard", self, ["rollback_cooldown_steps", "sample_every"])
        require(0 < self.max_skip_frac <= 1, "guard.max_skip_frac", self.max_skip_frac, "it lies in (0, 1]")
        require(
            self.replicas_every == 0 or (self.replicas_every > 0 and self.replicas_every % 2 == 1),
            "guard.replicas_every",
            self.replicas_every,
            "it has to be odd, or 0 for never: an even cadence misses an error of period two",
        )
        if self.max_norm is not None:
            require_positive("guard", self, ["max_norm"])

    def _check_spikes(self) -> None:
        require(
            self.spike_rule in get_args(SpikeRuleName),
            "guard.spike_rule",
            self.spike_rule,
            f"the rules are {', '.join(get_args(SpikeRuleName))}",
        )
        require_positive("guard", self, ["spike_threshold", "spike_window"])
        require(
            0 <= self.spike_warmup <= self.spike_window,
            "guard.spike_warmup",
            self.spike_warmup,
            f"it has to lie between 0 and guard.spike_window = {self.spike_window}",
        )
        require(
            not self.absurd_norm_ratio or 1 < self.absurd_norm_ratio < float("inf"),
            "guard.absurd_norm_ratio",
            self.absurd_norm_ratio,
            "it has to be greater than 1",
            "set it to null or 0 to apply every finite gradient",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int = 100
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = 3
    """Newest checkpoints to keep; the last healthy one is kept whatever this says."""
    keep_best: int = 0
    """Checkpoints with the lowest validation loss to keep besides."""
    keep_every: int = 0
    """Steps whose multiples are kept for ever; 0: none."""
    healthy_after: int = 20
    """Steps without incident after which a checkpoint counts as healthy."""
    when_busy: Literal["wait", "drop"] = "wait"
    """What happens to a checkpoint that is due while the one before is still being written."""
    give_up_after_s: float = 3600.0
    """A run that could save nothing for this long is ended."""
    in_memory: bool = False
    """Keep a copy of the last healthy state in host memory, so that a rollback needs no disk."""

    def __post_init__(self) -> None:
        require_not_negative("checkpoint", self, ["every", "keep_best", "keep_every"])
        require_positive("checkpoint", self, ["keep_last", "healthy_after", "give_up_after_s"])


@dataclass(frozen=True, kw_only=True)
class AlertConfig:
    """One rule: what has to happen for people to be told."""

    kind: Literal["nonfinite", "above", "below", "spike", "drop", "plateau", "stall", "event"]
    """nonfinite: a NaN or an infinity; above, below: crosses `value`; spike, drop: more than `value` times,
    or less than `value` times, the median of the last `window` points; plateau: the smallest value has not
    fallen by the fraction `value` in `window` points; stall: nothing logged for `value` seconds; event: it
    happened."""
    metric: str = "train/loss"
    """Metric, or name of the event; `*` matches anything (`val/*`)."""
    value: float = 0.0
    """What the kind compares with."""
    window: int = 100
    """Points looked back at; spike and drop wait for a quarter of them."""
    cooldown_s: float = 600.0
    """Seconds for which the rule stays silent after it spoke; what it keeps to itself then is counted, and
    said afterwards."""

    def __post_init__(self) -> None:
        require_positive("tracking.alerts", self, ["window"])
        require_not_negative("tracking.alerts", self, ["cooldown_s"])
        if self.kind in ("spike", "drop", "plateau", "stall"):
            require_positive("tracking.alerts", self, ["value"])


DEFAULT_ALERTS = (
    AlertConfig(kind="nonfinite", metric="*"),
    AlertConfig(kind="event", metric="incident"),
    AlertConfig(kind="stall", value=600.0),
    AlertConfig(kind="below", metric="system/*disk_free_gb", value=1.0),
)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What is written down and where it is mirrored."""

    log_every: int = 10
    """Steps between printed lines. The log has every step."""
    tensorboard: bool = True
    """Mirror the log to TensorBoard."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Mirror the log to Weights & Biases; online falls back to offline, and says so, without an account."""
    project: str = "harness"
    """W&B project."""
    group: str | None = None
    """Name that related runs share."""
    tags: tuple[str, ...] = ()
    """Labels to find the run by."""
    notes: str = ""
    """Free text about the run."""
    progress: Literal["auto", "bar", "lines", "off"] = "auto"
    """auto: a bar on a terminal, lines otherwise."""
    histograms_every: int = 100
    """Steps between histograms of rank 0's gradients and parameters, counted on the device; 0: never."""
    system_every_s: float = 10.0
    """Seconds between samples of processor, memory, disk and GPUs on each node; 0: none."""
    alerts: tuple[AlertConfig, ...] = DEFAULT_ALERTS
    """When people are told: on the terminal, in the log, at W&B and at the webhook."""
    webhook: str | None = None
    """Address that each alert is sent to as JSON by HTTP POST."""

    def __post_init__(self) -> None:
        require_positive("tracking", self, ["log_every"])
        require_not_negative("tracking", self, ["system_every_s", "histograms_every"])
        require(
            self.webhook is None or self.webhook.startswith(("http://", "https://")),
            "tracking.webhook",
            self.webhook,
            "it has to begin with http:// or https://",
        )


@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """One rehearsed fault."""

    step: int
    """Step at which it strikes, counted from 0."""
    rank: int = 0
    """Rank that it strikes."""
    kind: Literal["nan", "inf", "-inf", "overflow", "spike", "slow", "kill", "hang"] = "nan"
    """A value to inject (overflow: finite, but its square is not; spike: `scale` times too large), or what
    happens to the process: slow sleeps `seconds`, kill ends it by SIGKILL, hang sleeps for ever."""
    target: Literal["gradient", "activation", "loss", "batch"] = "gradient"
    """Where a value is injected; a batch has to hold floating-point numbers for it."""
    parameter: str | None = None
    """Parameter (gradient) or module (activation) that is struck; default: the first one. Under loop.compile
    the micro-batch that is struck there runs uncompiled."""
    micro_batch: int = 0
    """Micro-batch of the step in which it strikes, counted from 0."""
    scale: float = 1000.0
    """Factor of a spike."""
    seconds: float = 5.0
    """Length of a slow step."""

    def __post_init__(self) -> None:
        require_not_negative("faults", self, ["step", "rank", "micro_batch", "seconds"])


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One complete run. Without any setting: a small decoder on the Python standard library's source."""

    name: str = "quickstart"
    """Name of the run; its directory is `runs_dir`/`name`."""
    runs_dir: str = "runs"
    """Folder in which runs are kept."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: go on with the run if its directory holds one, else start it; must, never: an error otherwise."""
    seed: int = 1234
    """Seed of initialisation, data order, augmentation and dropout, for torch, numpy and Python alike."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time."""
    debug: bool = False
    """One process, synchronous, anomaly detection on, every check every step, a debugger on an incident."""
    task: str = "text"
    """text, images, or `package.module:function` for a task of your own."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning-rate schedule."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Loop."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Parallelism."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Stability guard."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Tracking."""
    faults: tuple[FaultConfig, ...] = ()
    """Faults to inject; loud when there are any."""

    def __post_init__(self) -> None:
        require(bool(self.name), "name", self.name, "a run needs a name")
        require(
            self.name not in (".", "..") and not set(self.name) & set("/\\\0\n\r\t"),
            "name",
            self.name,
            "it is one folder's name, without slashes or control characters",
            "use --runs_dir for the folder that it lies in",
        )
        require(0 <= self.seed < 2**63, "seed", self.seed, "it has to be a whole number in [0, 2^63)")
        require(
            self.task in ("text", "images") or ":" in self.task,
            "task",
            self.task,
            "it has to be text, images, or package.module:function",
        )
        self._check_model_fits_task()

    def _check_model_fits_task(self) -> None:
        wanted = {"text": ("decoder",), "images": ("cnn", "mlp")}.get(self.task)
        if wanted is None:
            return
        require(
            self.model.kind in wanted,
            "model.kind",
            self.model.kind,
            f"task {self.task} needs one of {', '.join(wanted)}",
        )
        require(
            self.task != "text" or self.model.vocab_size >= 256,
            "model.vocab_size",
            self.model.vocab_size,
            "task text needs a row for each of the 256 bytes",
        )

    def check_world(self, world_size: int) -> None:
        """Checks the rules that depend on how many processes there are, and what holds at the start only.

        Raises:
            ConfigError: the global batch cannot be split, a fault strikes a step, rank or micro-batch that
                does not exist, or the debug mode is asked for in several processes.
        """
        micro_batch = self.loop.micro_batch or 1
        share = world_size * micro_batch
        require(
            self.loop.global_batch % share == 0,
            "loop.global_batch",
            self.loop.global_batch,
            f"it has to be a multiple of world size x loop.micro_batch = {world_size} x {micro_batch}",
            f"try --loop.global_batch {-(-self.loop.global_batch // share) * share}",
        )
        num_micro_batches = self.loop.global_batch // (
            world_size * (self.loop.micro_batch or self.loop.global_batch // world_size)
        )
        for fault in self.faults:
            last_step = self.loop.steps - 1
            require(
                fault.step <= last_step, "faults.step", fault.step, f"the run's steps are 0 to {last_step}"
            )
            require(fault.rank < world_size, "faults.rank", fault.rank, f"there are only {world_size} ranks")
            require(
                fault.micro_batch < num_micro_batches,
                "faults.micro_batch",
                fault.micro_batch,
                f"a step has {num_micro_batches} on each rank, counted from 0",
            )
        require(
            not (self.debug and world_size > 1),
            "debug",
            self.debug,
            f"it runs in one process, and there are {world_size}",
            "start it with `python harness/train.py`",
        )

    @classmethod
    def from_file(cls, path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """Reads a YAML file; `overrides` are `section.key=value`, as on the command line.

        Raises:
            ConfigError: the file cannot be read, or a key or value is wrong.
        """
        from harness.config.load import parse_arguments  # the loader needs this schema

        return parse_arguments(["--config", str(path), *(f"--{override}" for override in overrides)])
