"""What a run is: frozen dataclasses, checked when they are built.

A recipe (a file in `configs/`) is a function that returns a complete `Run`; the command line
overrides single fields of it. Nothing here touches a device.
"""

from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

Gate = Literal["softmax", "sigmoid"]
Selection = Literal["greedy", "group_limited_greedy", "noaux_tc"]
Precision = Literal["fp32", "bf16", "fp8"]
Remat = Literal["none", "dots", "v3", "layer"]
MomentDtype = Literal["float32", "bfloat16"]
Transport = Literal["auto", "dense", "ragged", "nvlink"]
Zero = Literal[1, 2, 3]


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(value > 0 and isfinite(value), f"{name} is {value}: it must be greater than 0")


def _at_least_zero(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(value >= 0 and isfinite(value), f"{name} is {value}: it must be 0 or more")


def _one_of(owner: object, name: str, kind: Any) -> None:
    value, choices = getattr(owner, name), get_args(kind)
    _require(value in choices, f"{name} is {value!r}: use one of {', '.join(map(str, choices))}")


def _fraction(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(0.0 <= value <= 1.0, f"{name} is {value}: it must lie between 0 and 1")


@dataclass(frozen=True)
class Yarn:
    """Context extension by YaRN (arXiv 2309.00071); always active once it is set."""

    factor: float = 40.0
    original_context: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        _require(self.factor >= 1, f"yarn factor is {self.factor}: it must be at least 1")
        _positive(self, "original_context", "beta_fast", "beta_slow")


@dataclass(frozen=True)
class Model:
    """A DeepSeek-V2/V3 transformer: MLA, DeepSeekMoE and multi-token prediction."""

    vocab_size: int = 129280
    dim: int = 7168
    layers: int = 61
    dense_layers: int = 3
    heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_dim: int = 128
    qk_rope_dim: int = 64
    v_dim: int = 128
    dense_hidden: int = 18432
    expert_hidden: int = 2048
    experts: int = 256
    shared_experts: int = 1
    top_k: int = 8
    groups: int = 8
    """Expert groups; with one group a node this is V3's node-limited routing."""
    top_groups: int = 4
    gate: Gate = "sigmoid"
    selection: Selection = "noaux_tc"
    norm_topk: bool = True
    route_scale: float = 2.5
    context: int = 163840
    rope_theta: float = 10000.0
    yarn: Yarn | None = Yarn()
    norm_eps: float = 1e-6
    mtp_depth: int = 1
    init_std: float = 0.006

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "dim", "layers", "heads", "kv_lora_rank", "qk_nope_dim")
        _positive(self, "qk_rope_dim", "v_dim", "dense_hidden", "context", "rope_theta", "norm_eps")
        _positive(self, "init_std")
        _at_least_zero(self, "route_scale", "mtp_depth")
        _one_of(self, "gate", Gate)
        _one_of(self, "selection", Selection)
        _require(
            0 <= self.dense_layers <= self.layers,
            f"dense_layers is {self.dense_layers}: it must lie between 0 and layers={self.layers}",
        )
        _require(
            self.q_lora_rank is None or self.q_lora_rank > 0,
            f"q_lora_rank is {self.q_lora_rank}: give a positive rank, or None for no q-LoRA",
        )
        _require(
            self.qk_rope_dim % 2 == 0,
            f"qk_rope_dim is {self.qk_rope_dim}: RoPE turns pairs, so it must be even",
        )
        if self.dense_layers < self.layers or self.mtp_depth:
            self._check_experts()

    def _check_experts(self) -> None:
        _positive(self, "experts", "expert_hidden", "top_k", "groups", "top_groups")
        _at_least_zero(self, "shared_experts")
        _require(
            self.experts % self.groups == 0,
            f"groups={self.groups} does not divide experts={self.experts}",
        )
        _require(
            self.top_groups <= self.groups,
            f"top_groups={self.top_groups} exceeds groups={self.groups}",
        )
        reachable = self.experts // self.groups * self.top_groups
        if self.selection == "greedy":
            reachable = self.experts
        _require(
            self.top_k <= reachable,
            f"top_k={self.top_k} exceeds the {reachable} experts a token can reach",
        )
        _require(
            self.selection != "noaux_tc" or self.experts // self.groups >= 2,
            f"noaux_tc ranks groups by their two best experts: groups={self.groups} leaves "
            f"fewer than two of experts={self.experts} in a group",
        )

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def qk_dim(self) -> int:
        return self.qk_nope_dim + self.qk_rope_dim

    @property
    def latent_dim(self) -> int:
        """Width of the cache: the normalised latent and the rotated shared key."""
        return self.kv_lora_rank + self.qk_rope_dim


@dataclass(frozen=True)
class Data:
    """Where the text comes from and how it becomes sequences."""

    paths: tuple[str, ...] = ()
    """Files, folders or globs of text, code or JSONL; empty means Python's standard library."""
    tokenizer: str = "bytes"
    """`bytes`, or the path of a tokenizer.json."""
    text_field: str = "text"
    """The field of a JSONL record that holds its text."""
    seq_len: int = 4096
    held_out: float = 0.05
    """Share of files kept for evaluation, chosen by a hash of their content."""
    fim_rate: float = 0.0
    """Share of training documents rearranged for fill-in-the-middle (PSM); V3 used 0.1."""
    seed: int | None = None
    """Of the text's order; None takes train.seed, which draws the first weights too."""

    def __post_init__(self) -> None:
        _require(self.seq_len >= 2, f"seq_len is {self.seq_len}: it must be at least 2")
        _fraction(self, "held_out", "fim_rate")
        _require(
            0 < self.held_out < 1, f"held_out is {self.held_out}: keep some files on each side"
        )


@dataclass(frozen=True)
class Optimizer:
    """AdamW with DeepSeek-V3's constants (arXiv 2412.19437, section 4.2)."""

    peak_lr: float = 2.2e-4
    final_lr: float = 2.2e-5
    last_lr: float = 7.3e-6
    """Learning rate of the second constant phase at the very end."""
    warmup_fraction: float = 0.02
    constant_fraction: float = 0.66
    cosine_fraction: float = 0.29
    last_fraction: float = 0.011
    """Shares of the steps; what is left between cosine and last runs at `final_lr`."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moment_dtype: MomentDtype = "float32"
    """bfloat16 stores both Adam moments in 16 bits, as V3 does."""

    def __post_init__(self) -> None:
        _positive(self, "peak_lr", "eps", "clip_norm")
        _at_least_zero(self, "final_lr", "last_lr", "weight_decay")
        _one_of(self, "moment_dtype", MomentDtype)
        _require(self.b1 < 1 and self.b2 < 1, f"b1={self.b1}, b2={self.b2}: both must be below 1")
        _fraction(
            self,
            "warmup_fraction",
            "constant_fraction",
            "cosine_fraction",
            "last_fraction",
            "b1",
            "b2",
        )
        total = (
            self.warmup_fraction
            + self.constant_fraction
            + self.cosine_fraction
            + self.last_fraction
        )
        _require(total <= 1 + 1e-9, f"the schedule's fractions add up to {total}: at most 1")


@dataclass(frozen=True)
class Balance:
    """How the load of experts is kept even (arXiv 2408.15664; V3 sections 2.1.2 and 4.2)."""

    bias_speed: float = 1e-3
    """Step u of the router bias: auxiliary-loss-free balancing; 0 switches it off."""
    bias_until: float = 0.966
    """Share of the steps after which the bias rests (V3: 14.3T of 14.8T tokens)."""
    sequence_aux: float = 1e-4
    """Weight of the sequence-wise auxiliary loss."""
    batch_aux: float = 0.0
    """Weight of the classic auxiliary loss over the whole batch, for comparison."""

    def __post_init__(self) -> None:
        _fraction(self, "bias_until")
        _at_least_zero(self, "bias_speed", "sequence_aux", "batch_aux")


@dataclass(frozen=True)
class Mtp:
    """Weight of the multi-token-prediction loss; V3: 0.3 for 10T of 14.8T tokens, then 0.1."""

    weight: float = 0.3
    late_weight: float = 0.1
    late_from: float = 0.676

    def __post_init__(self) -> None:
        _fraction(self, "late_from")
        _at_least_zero(self, "weight", "late_weight")


@dataclass(frozen=True)
class Fp8:
    """Departures from DeepSeek-V3's FP8 recipe that its report warns of, to see what they cost."""

    sum_bits: int | None = None
    """Fraction bits that sums of products keep from one 128 of K to the next; 13 is what they have
    in the tensor core's accumulator, without promotion (report, section 3.3.2)."""
    gradient_blocks: bool = False
    """Cast gradients with a scale for 128 x 128, not for 1 x 128 and 128 x 1 (appendix B.2)."""

    def __post_init__(self) -> None:
        _require(
            self.sum_bits is None or 1 <= self.sum_bits <= 23,
            f"sum_bits is {self.sum_bits}: use 1 to 23, or None for all that float32 has",
        )


@dataclass(frozen=True)
class Train:
    steps: int = 1000
    batch: int = 8
    """Sequences a step, over all devices."""
    micro_batches: int = 1
    """Gradient accumulation: the batch is worked through in this many parts."""
    ramp_from: int | None = None
    """Batch size of the first steps; it grows linearly to `batch` (V3: 3072 to 15360)."""
    ramp_fraction: float = 0.0
    seed: int = 0
    save_every: int = 500
    keep: int = 3
    """Checkpoints kept, the newest ones."""
    eval_every: int = 500
    eval_batches: int = 16
    """Held-out batches of an evaluation along the way; the one at the end reads them all."""
    remat: Remat = "none"

    def __post_init__(self) -> None:
        _positive(
            self,
            "steps",
            "batch",
            "micro_batches",
            "save_every",
            "keep",
            "eval_every",
            "eval_batches",
        )
        _one_of(self, "remat", Remat)
        _fraction(self, "ramp_fraction")
        _require(
            self.batch % self.micro_batches == 0,
            f"micro_batches={self.micro_batches} does not divide batch={self.batch}",
        )
        micro = self.batch // self.micro_batches
        ramp = self.ramp_from
        _require(
            ramp is None or (0 < ramp <= self.batch and ramp % micro == 0),
            f"ramp_from is {ramp}: it must be a multiple of the micro-batch {micro} and at "
            f"most batch={self.batch}",
        )


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 takes all that are left. Every axis divides the batch."""

    data: int = 1
    """Repeats the state."""
    fsdp: int = -1
    """Divides the state."""
    host: int = 1
    """Hosts that share the experts out among them: a token crosses to each of them once."""
    expert: int = 1
    """Devices of a host that share its experts out; the rest of the state they divide, too."""
    zero: Zero = 3
    """When a divided state is brought together: by layers (ZeRO-3) or once a step; gradients are
    divided again after every micro-batch (2) or after the last one (1). In FP8 ZeRO-3 casts each
    layer's weights anew and wants a `train.remat` other than none, which would keep them all."""

    def __post_init__(self) -> None:
        free = []
        for name in ("data", "fsdp", "host", "expert"):
            value = getattr(self, name)
            _require(
                value == -1 or value > 0, f"mesh {name} is {value}: use -1 or a positive number"
            )
            free += [name] * (value == -1)
        _require(len(free) < 2, f"mesh {' and '.join(free)} are -1: only one axis can be")
        _one_of(self, "zero", Zero)


@dataclass(frozen=True)
class Exchange:
    """How tokens reach experts on other devices, and their results come back (DeepEP's job)."""

    transport: Transport = "auto"
    """`dense`: all_to_all of as many rows as there can be, anywhere; `ragged`: of those there are,
    GPUs only; `nvlink`: kernels between the Hopper GPUs of one process. `auto` takes nvlink where
    it can and else dense."""
    fp8: bool = False
    """Tokens cross in e4m3 with a power of two for 128 columns, as DeepSeek-V3's do, also where
    experts compute in another format; results cross in the model's."""
    room: float | None = None
    """Rows that a device has room for, in its even share of them. A batch that needs more makes
    its results NaN, and the run stops. None is room for whatever may come."""

    def __post_init__(self) -> None:
        _one_of(self, "transport", Transport)
        _require(
            self.room is None or self.room >= 1,
            f"exchange room is {self.room}: it must be 1 (the even share) or more, or None",
        )


@dataclass(frozen=True)
class Run:
    """A complete run: what a recipe returns and a checkpoint records."""

    name: str
    model: Model
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    optimizer: Optimizer = field(default_factory=Optimizer)
    balance: Balance = field(default_factory=Balance)
    mtp: Mtp = field(default_factory=Mtp)
    mesh: Mesh = field(default_factory=Mesh)
    exchange: Exchange = field(default_factory=Exchange)
    precision: Precision = "bf16"
    fp8: Fp8 = field(default_factory=Fp8)

    @property
    def data_seed(self) -> int:
        return self.train.seed if self.data.seed is None else self.data.seed

    def __post_init__(self) -> None:
        _one_of(self, "precision", Precision)
        _require(
            bool(self.name) and Path(self.name).name == self.name,
            f"name is {self.name!r}: give a plain word, it names the output folder",
        )
        _require(
            self.data.seq_len <= self.model.context,
            f"seq_len={self.data.seq_len} exceeds the model's context={self.model.context}",
        )
