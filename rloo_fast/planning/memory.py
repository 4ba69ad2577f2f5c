"""Memory per GPU and traffic per step of a run, on paper.

Letters: P parameters, T those trained (all, or LoRA's), n GPUs that share the weights, m GPUs of a
node, c bytes of the compute dtype (2 in bf16), D hidden size, L layers, H heads of queries and G of
keys, h their size, I intermediate size, V vocabulary, N tokens run per micro-batch and GPU.

Bytes per GPU that stay from step to step, AdamW:

              weights              gradients   optimizer   fp32 master   reference
    fsdp2     (c (P-T) + 4 T)/n    4 T/n       8 T/n       they are      c P/n
    zero3     c P/n                c T/n       8 T/n       4 T/n         c P/n
    zero2     c P                  c T/n       8 T/n       4 T/n         c P
    ddp       c (P-T) + 4 T        4 T + 4 T   8 T         they are      c P

ddp's gradients are 4 T, and as much in the buckets they are reduced in. Those buckets, and the
buffer that is zero3's gradients, are never freed; gradients else are, after each step. No reference
where beta = 0; with adapters it is a second copy of T, as it was at the start. Not counted: what an
optimizer without fused=True takes while it steps (activations are gone by then), what shards are
padded by, to whole rows, and the rest of a gradient that zero2's border cuts.
"""

from __future__ import annotations

from dataclasses import dataclass

from .shapes import ALL, Shape

GIB = 1 << 30
MIB = 1 << 20
ENGINES = ("fsdp2", "zero3", "zero2", "ddp")
SPLITS_WEIGHTS = ("fsdp2", "zero3")
DTYPES = {"bf16": 2, "fp32": 4}
PIECE = {2: 768 * MIB, 4: 384 * MIB}  # of logits, by c: rloo_kernels.lm_head.piece
RESERVE = 2 * GIB  # rloo_fast.offload.engine_room
BUCKET = 256 * MIB  # weight_sync_bucket_mib
LIVE = 10**9  # DeepSpeed's stage3_max_live_parameters, and stage3_max_reuse_distance


@dataclass(frozen=True)
class Setup:
    """A run to plan. Raises ValueError for values that are out of range or do not fit together."""

    shape: Shape
    gpus: int
    engine: str = "fsdp2"
    gpus_per_node: int = 8
    hybrid: bool = False  # fsdp2: split inside a node, a copy on each node
    tokens: int = 16384  # run per micro-batch and GPU: every prompt once, completions, no padding
    micro_batches: int = 4  # of an optimizer step
    beta: float = 0.05
    lora: int = 0  # rank
    lora_targets: tuple[str, ...] = (ALL,)  # as `rloo-fast train --use_peft`
    dtype: str = "bf16"
    checkpointing: bool = True
    reduce_every_micro_batch: bool = True  # fsdp2; False: whole gradients until the last one
    vllm_share: float = 0.3  # of the GPU, for an engine in the same processes; 0: none
    tp: int = 1  # GPUs that share one engine
    gpu_memory_gib: float = 139.0  # what torch reports of an H200, sold as 141 GB

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node", "tokens", "micro_batches", "tp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}.")
        for name, known in (("engine", ENGINES), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}."
                )
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(
                f"gpus must be at most gpus_per_node={self.gpus_per_node} or a multiple of it, "
                f"got {self.gpus}."
            )
        if self.hybrid and (self.engine != "fsdp2" or self.nodes == 1):
            raise ValueError(
                "hybrid splits inside a node and copies across nodes: it needs engine fsdp2 and "
                f"more than a node of {self.gpus_per_node}, got {self.engine} on {self.gpus} GPUs."
            )
        if self.lora < 0 or self.beta < 0 or self.gpu_memory_gib <= 0:
            raise ValueError(
                "lora and beta must be >= 0 and gpu_memory_gib > 0, got "
                f"{self.lora}, {self.beta} and {self.gpu_memory_gib}."
            )
        if self.lora and not self.trained:
            known = ", ".join(dict.fromkeys(name for name, *_ in self.shape.linears))
            raise ValueError(
                f"lora_targets must be {ALL} or of {known}, got {', '.join(self.lora_targets)}."
            )
        if not 0 <= self.vllm_share < 1:
            raise ValueError(f"vllm_share must be in [0, 1), got {self.vllm_share}.")
        if self.tp > self.gpus or self.gpus % self.tp or self.shape.heads % self.tp:
            raise ValueError(
                f"tp must divide the {self.gpus} GPUs and the {self.shape.heads} attention heads, "
                f"got {self.tp}."
            )

    @property
    def nodes(self) -> int:
        return max(1, self.gpus // self.gpus_per_node)

    @property
    def shards(self) -> int:
        """n"""
        return self.gpus_per_node if self.hybrid else self.gpus

    @property
    def width(self) -> int:
        """c"""
        return DTYPES[self.dtype]

    @property
    def trained(self) -> int:
        """T"""
        shape = self.shape
        return shape.adapters(self.lora, self.lora_targets) if self.lora else shape.params

    @property
    def params(self) -> int:
        """P, adapters included."""
        return self.shape.params + (self.trained if self.lora else 0)

    @property
    def has_reference(self) -> bool:
        return self.beta > 0 and not self.lora


def held(s: Setup) -> dict[str, float]:
    """Bytes per GPU from step to step: the table above."""
    c, n, trained, frozen = s.width, s.shards, s.trained, s.params - s.trained
    weights_n = n if s.engine in SPLITS_WEIGHTS else 1
    if s.engine in ("fsdp2", "ddp"):  # float32 weights, cast where they are used
        parts = {
            "policy weights": (c * frozen + 4 * trained) / weights_n,
            "gradients": 4 * trained / weights_n,
            "optimizer state": 8 * trained / weights_n,
        }
        if s.engine == "ddp":
            parts["gradient buffers"] = 4 * trained
    else:
        parts = {
            "policy weights": c * s.params / weights_n,
            "gradient buffers" if s.engine == "zero3" else "gradients": c * trained / n,
            "optimizer state": 8 * trained / n,
            "float32 master weights": 4 * trained / n,
        }
    if s.has_reference:
        parts["reference"] = c * s.params / weights_n
    if s.beta > 0 and s.lora:
        width = 4 if s.engine in ("fsdp2", "ddp") else c
        parts["adapters at the start"] = width * trained / weights_n
    return parts


# Activations


def layer_bytes(s: Setup) -> int:
    """Bytes per token that a layer keeps for its backward pass.

    Each norm: its float32 input (4 D), the normalised and the scaled one (c D each), a float32
    factor. Attention, called once (for a shared prefix it is twice): q, k, v and the output, a
    float32 log-sum per head. MLP: gate, what its activation makes of it, up, their product.
    """
    shape, c = s.shape, s.width
    norms = 2 * (4 + 2 * c) * shape.hidden + 8
    attention = c * 2 * (shape.heads + shape.kv_heads) * shape.head_size + 4 * shape.heads
    return norms + attention + 4 * c * shape.intermediate


def activations(s: Setup) -> int:
    """N L times a layer's bytes, or with checkpointing its input's alone, c D."""
    per_layer = s.width * s.shape.hidden if s.checkpointing else layer_bytes(s)
    return s.tokens * s.shape.layers * per_layer


def at_the_loss(s: Setup) -> dict[str, float]:
    """Bytes while the fused loss runs, in the forward pass.

    Its logits: one piece, never [N, V] (kernels/README.md). With more than one piece the lm_head's
    gradient is summed in float32, and rounded at the end. One GPU's whole lm_head is gathered.
    These are the least: while more is free, a piece takes up to a quarter of that, at most 8 GiB.
    """
    c, head = s.width, s.shape.head
    logits = s.tokens * s.shape.vocab * c
    parts: dict[str, float] = {"logits of a piece": min(PIECE[c], logits)}
    if not s.lora:
        grows = c == 2 and logits > PIECE[c]
        parts["lm_head's gradient"] = head * (c + 4 if grows else c)
    if s.engine in SPLITS_WEIGHTS:
        parts["lm_head, gathered"] = head * c
    parts["last hidden states, gradient"] = 2 * s.tokens * s.shape.hidden * c
    return parts


def in_backward(s: Setup) -> dict[str, float]:
    """Bytes while the backward pass runs.

    fsdp2 gathers the next layer while one runs, through a buffer: 3 of them. zero3 gathers ahead up
    to `LIVE` parameters. Gradients on their way: fsdp2's of the largest unit, as made and in the
    float32 input of the reduce-scatter; ZeRO's bucket of D^2, or the largest matrix, twice.
    Temporaries: three gradients of [N, I].
    """
    c, shape = s.width, s.shape
    parts: dict[str, float] = {}
    if s.engine == "fsdp2":
        unit = max(shape.block, shape.tail, shape.embeddings)
        moving = s.trained // shape.layers if s.lora else unit
        parts["layers, gathered"] = 3 * c * shape.block
        parts["gradients on their way"] = (c + 4) * moving
    elif s.engine != "ddp":
        bucket = max(shape.hidden**2, shape.largest_matrix)
        moving = shape.hidden**2 if s.lora else bucket
        if s.engine == "zero3":
            parts["layers, gathered"] = c * min(s.params, max(LIVE, bucket))
        parts["gradients on their way"] = 2 * c * moving
    elif c < 4:
        parts["autocast's copies of weights"] = c * s.trained
    if s.engine == "fsdp2" and not s.reduce_every_micro_batch:
        parts["whole gradients, not reduced yet"] = 4 * s.trained
    if s.checkpointing:
        parts["a layer, run again"] = s.tokens * layer_bytes(s)
    parts["temporaries of a layer"] = 3 * s.tokens * shape.intermediate * c
    return parts


def update_peak(s: Setup) -> float:
    """Bytes per GPU at the update's fullest moment: the loss, or the backward pass."""
    moment = max(sum(at_the_loss(s).values()), sum(in_backward(s).values()))
    return RESERVE + sum(held(s).values()) + activations(s) + moment


# The rollout engine


def engine_weights(s: Setup) -> float:
    """Bytes per GPU of the engine's own weights, without adapters, split over tp GPUs."""
    return s.width * s.shape.params / s.tp


def cache_bytes(s: Setup) -> float:
    """Bytes per GPU and token of KV cache: 2 L G h c, over tp GPUs as far as there are heads."""
    shape = s.shape
    whole = 2 * shape.layers * shape.kv_heads * shape.head_size * s.width
    return whole / min(s.tp, shape.kv_heads)


def engine_cache(s: Setup) -> float:
    """Bytes per GPU that `vllm_share` leaves for the cache beside the weights; < 0: none."""
    return s.vllm_share * s.gpu_memory_gib * GIB - engine_weights(s)


def in_rollout(s: Setup) -> dict[str, float]:
    """Bytes per GPU while the engine is awake, before anything is moved out of its way.

    "gradients" are gone. The engine takes its share whatever it needs; a bucket of weights and
    three times the largest of them (see `weight_buckets`) are in flight when it is synced.
    """
    parts = {name: size for name, size in held(s).items() if name != "gradients"}
    parts["rollout engine"] = s.vllm_share * s.gpu_memory_gib * GIB
    parts["weights in flight"] = BUCKET + 3 * s.width * s.shape.largest_matrix
    return parts


def movable(s: Setup) -> float:
    """Bytes per GPU that go to the host, if need be, while the engine is awake."""
    names = ("optimizer state", "float32 master weights", "reference")
    return sum(size for name, size in held(s).items() if name in names)


def rollout_peak(s: Setup) -> float:
    """Bytes per GPU while the engine is awake, with everything movable on the host."""
    return RESERVE + sum(in_rollout(s).values()) - movable(s)
