"""A step to be estimated: model, program, mesh and sizes, and what follows from them for one device."""

import dataclasses
import functools
from typing import Literal

from gemma4_jax.config import KINDS, LayerKind, ModelConfig, Stack
from gemma4_jax.model.lora import LoraConfig
from gemma4_jax.plan.shares import Share, Sizes, along, of_layers, shares
from gemma4_jax.sharding import ACTIVATIONS, VOCABULARY

Program = Literal["sft", "qat", "lora", "prefill", "decode"]

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Job:
    """`rows` sequences of `length` tokens at a time over all devices; of decode, rows with caches of `length` slots.

    `cfg` is of the text model. `whole`: the same with towers, where it has them; they rest beside it, as they are.
    """

    cfg: ModelConfig
    program: Program
    sizes: Sizes
    rows: int
    length: int
    param_dtype: str = "float32"
    compute_dtype: str = "bfloat16"
    remat: str = "full"
    grad_accum: int = 1
    first_moment: str = "float32"
    teacher: bool = False
    lora: LoraConfig | None = None
    whole: ModelConfig | None = None

    def __post_init__(self):
        if self.cfg.is_multimodal:
            raise ValueError("cfg is of the text model; give the one with towers as `whole`")

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return self.program in ("sft", "qat", "lora")

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation."""
        return BYTES[self.compute_dtype]

    @property
    def param_bytes(self) -> int:
        """Bytes of a parameter at rest: inference holds them as layers use them."""
        return BYTES[self.param_dtype] if self.trains else self.compute_bytes

    @property
    def widths(self) -> set[int]:
        """How wide the activations of one token are on a device."""
        cfg = self.cfg
        heads = {count * cfg.head_size(kind) for kind in KINDS for count in (self.heads, self.kv_heads(kind))}
        rest = {cfg.hidden_size, cfg.head_dim, cfg.global_head_dim, self.per_layer_width} - {0}
        return heads | {self.ffw(stack) for stack in cfg.stacks} | rest

    @functools.cached_property
    def shares(self) -> tuple[Share, ...]:
        """Every parameter's share."""
        return shares(self.cfg, self.sizes, self.lora)

    @functools.cached_property
    def trained(self) -> dict[str, int]:
        """Sizes of the parameters that move, of the whole model, by name."""
        whole = shares(self.cfg, (1,) * len(self.sizes), self.lora)
        return {share.name: share.elements for share in whole if share.trainable and self.trains}

    def moves(self, name: str) -> bool:
        """Whether a parameter is trained."""
        return name in self.trained

    def devices(self, *axes: str) -> int:
        """Devices along axes; all without arguments."""
        return along(self.sizes, axes or ("data", "fsdp", "expert", "context", "tensor"))

    @functools.cached_property
    def local_rows(self) -> int:
        """Sequences of a device at a time, gradient accumulation counted."""
        rows = self.rows // self.grad_accum
        return max(1, rows // self.devices(*ACTIVATIONS["batch"]))

    @property
    def local_length(self) -> int:
        """Tokens of a sequence on a device."""
        return 1 if self.program == "decode" else self.length // self.devices("context")

    @functools.cached_property
    def tokens(self) -> int:
        """Tokens of a device at a time."""
        return self.local_rows * self.local_length

    @property
    def heads(self) -> int:
        """Query heads of a device."""
        return self.cfg.num_attention_heads // self.devices("tensor")

    def kv_heads(self, kind: LayerKind) -> int:
        """Key/value heads of a device: whole where `tensor` does not divide them."""
        heads, tensor = self.cfg.kv_heads(kind), self.devices("tensor")
        return heads // tensor if heads % tensor == 0 else heads

    def ffw(self, stack: Stack) -> int:
        """Feed-forward columns of a device."""
        return stack.ffw // self.devices("tensor")

    @property
    def vocabulary(self) -> int:
        """Rows of the token table of a device."""
        return self.cfg.vocab_size // self.devices(*VOCABULARY)

    @property
    def sharers(self) -> int:
        """Devices that share a table and have tokens of their own."""
        return self.devices("fsdp", "expert", "context")

    @property
    def per_layer_width(self) -> int:
        """Numbers of all per-layer inputs of a token."""
        return self.cfg.num_hidden_layers * self.cfg.hidden_size_per_layer_input

    @functools.cached_property
    def layer_kinds(self) -> list[tuple[Stack, LayerKind, int]]:
        """(stack, kind, number of layers)."""
        return [
            (stack, kind, stack.blocks * (stack.sliding if kind == "sliding" else 1))
            for stack in self.cfg.stacks
            for kind in ("sliding", "full")
        ]

    def of_layer(self, stack: Stack, kind: LayerKind) -> tuple[Share, ...]:
        """The parameters of one kind of layer."""
        return of_layers(self.cfg, self.sizes, self.lora)[f"{stack.name}.{kind}"]

    @property
    def experts_route(self) -> str:
        """How tokens and experts meet, as `kernels.experts.Cut.route` decides; nothing without experts."""
        if not self.cfg.num_experts:
            return ""
        ranks = self.devices("expert")
        if ranks == 1:
            return "whole"
        return "gather" if ranks <= self.cfg.top_k_experts else "exchange"
