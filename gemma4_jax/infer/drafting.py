"""How many tokens to guess at a time, and how the guesses fared."""

import dataclasses

import jax
import numpy as np

from gemma4_jax.config import KINDS, ModelConfig
from gemma4_jax.errors import UserError
from gemma4_jax.infer.speculate import Verdict
from gemma4_jax.infer.steps import STEPS
from gemma4_jax.infer.weights import placed
from gemma4_jax.model.attend import check_heads
from gemma4_jax.model.decode import Decoder
from gemma4_jax.model.drafter import Drafter
from gemma4_jax.model.parameters import in_compute_dtype
from gemma4_jax.sharding import current_mesh

MOST = 16
"""Guesses of a round beyond which no drafter is worth asking."""

HOPE = 0.7, 20.0
"""The share of guesses that hold before anything is known, and how many guesses it counts for."""

MEMORY = 0.95
"""What a verdict still counts after the next one."""

JUDGING = 0.05
"""What judging one more token costs, in forward passes over one token: the weights are read anyway, attention is not."""

TRY_AGAIN = 16
"""Calls without guesses after which some are made again: texts differ."""


@dataclasses.dataclass
class Drafting:
    """A drafter at work: how many guesses a round makes, and what became of all of them.

    Attributes:
        tokens: most guesses of a round.
        drafted, accepted: guesses made, and those that held.
        rounds, given: forward passes of the model per slot, and the tokens they gave.
    """

    module: Drafter
    tokens: int
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    given: int = 0

    def __post_init__(self) -> None:
        self._held, self._weighed = HOPE[0] * HOPE[1], HOPE[1]
        self._idle_calls = 0
        self._cost = 0.1
        self._ready = self.module

    @classmethod
    def of(cls, drafter: Drafter, target: ModelConfig, tokens: int) -> "Drafting":
        """UserError for a drafter of another model or with too few heads for the mesh, or guesses outside 1 to MOST."""
        check_tokens(tokens, "draft_tokens")
        drafter.cfg.check_target(target)
        mesh, text = current_mesh(), drafter.cfg.text
        tensor = 1 if mesh is None else mesh.shape["tensor"]
        for kind in KINDS:
            try:
                check_heads(tensor, text.num_attention_heads, text.kv_heads(kind))
            except UserError as error:
                raise UserError(f"The drafter does not go with this mesh: {error}") from None
        return cls(drafter, tokens)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The numbers of guesses there are programs for."""
        return tuple(sorted({0, (self.tokens + 1) // 2, self.tokens}))

    @property
    def ahead(self) -> int:
        """For what the cache must have room: a round's tokens, all but the first of which may be taken back, and one more that
        only the drafter looks at."""
        return self.tokens + 2

    @property
    def rate(self) -> float:
        """The share of guesses that held, of all since the engine was made."""
        return self.accepted / max(1, self.drafted)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens of a request that one forward pass gave it."""
        return self.given / max(1, self.rounds)

    def use(self, decoder: Decoder) -> None:
        """Guesses for this model from now on, in its dtype."""
        self._ready = placed(in_compute_dtype(self.module, decoder.compute_dtype))
        self._cost = read_bytes(self._ready) / max(1, _decoder_bytes(decoder))

    def rest(self) -> None:
        """Lets go of the weights in another dtype than the drafter's own."""
        self._ready = self.module

    @property
    def ready(self) -> Drafter:
        """The drafter in the dtype of the model it is used with."""
        return self._ready

    def length(self) -> int:
        """How many tokens to guess next: what promises most tokens for the time, by the guesses of late and the bytes read."""
        share = self._held / self._weighed

        def speed(count: int) -> float:
            tokens = sum(share**place for place in range(count + 1))
            return tokens / (1 + count * (self._cost + JUDGING))

        best = max(self.lengths, key=speed)
        self._idle_calls = 0 if best else self._idle_calls + 1
        if self._idle_calls > TRY_AGAIN:
            self._idle_calls = 0
            return self.lengths[1]
        return best

    def rounds_of(self, steps: int, count: int) -> int:
        """Rounds of a call that shall give about `steps` tokens."""
        return min(STEPS, max(1, -(-steps // (count + 1))))

    def learn(self, tokens: np.ndarray, verdict: Verdict) -> None:
        """Takes note of a call's tokens [P, STEPS, count + 1] and their verdict."""
        drafted, accepted, rejected = (int(np.asarray(x).sum()) for x in verdict)
        self.drafted += drafted
        self.accepted += accepted
        self.given += int((tokens >= 0).sum())
        self.rounds += int((tokens[:, :, 0] >= 0).sum())
        if accepted + rejected:
            self._held = MEMORY * self._held + accepted
            self._weighed = MEMORY * self._weighed + accepted + rejected

    def report(self) -> str:
        """`61 % of 812 guesses held, 2.4 tokens a pass`."""
        return f"{self.rate:.0%} of {self.drafted} guesses held, {self.tokens_per_pass:.1f} tokens a pass"


def check_tokens(tokens: int, name: str) -> None:
    """UserError for a number of guesses that no round makes."""
    if not 1 <= tokens <= MOST:
        raise UserError(f"{name} lies in 1 to {MOST}, got {tokens}.")


def read_bytes(drafter: Drafter) -> float:
    """Bytes of weights that one guess reads: of the head's table only the clusters that are scored."""
    cfg, total = drafter.cfg, sum(x.nbytes for x in jax.tree.leaves(drafter))
    if not cfg.num_centroids:
        return total
    table = drafter.embed.w.get_value().nbytes
    return total - table * (1 - cfg.centroid_intermediate_top_k / cfg.num_centroids)


def _decoder_bytes(decoder: Decoder) -> float:
    """Bytes of weights that one token reads: of experts only the chosen ones."""
    cfg, total = decoder.cfg, float(decoder.embed.w.get_value().nbytes)
    for layer in decoder.layers:
        total += sum(x.nbytes for x in jax.tree.leaves(layer))
        if layer.sparse is not None:
            experts = sum(x.nbytes for x in jax.tree.leaves(layer.sparse.experts))
            total -= experts * (1 - cfg.top_k_experts / cfg.num_experts)
    return total
