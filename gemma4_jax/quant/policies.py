"""Which group of weights stands on which grid, by the name of what ships.

| group                | q4_0      | w4a16         | mobile       | int8         |
| attention            | q4_0_bf16 | int4_sym7_g32 | int4_channel | int8_channel |
| ffw                  | q4_0_bf16 | int4_sym7_g32 | int4_channel | int8_channel |
| ffw_shared           | q4_0_bf16 | int4_sym7_g32 | int2_channel | int8_channel |
| experts              | q4_0_bf16 | int4_sym7_g32 | refused      | int8_channel |
| embedding            | q4_0_bf16 | float         | int2_channel | float        |
| per_layer_embedding  | q4_0_bf16 | float         | int4_bP      | float        |
| per_layer            | q4_0_bf16 | int4_sym7_g32 | int8_channel | int8_channel |
| per_layer_projection | float     | int4_sym7_g32 | int8_channel | int8_channel |
| router               | float     | float         | refused      | float        |
| vision               | float     | float         | float        | float        |
| audio                | float     | float         | float        | float        |
| audio_conv           | float     | float         | float        | float        |
| projector            | float     | float         | float        | float        |
| activations          | float     | float         | static int8  | float        |
| keys and values      | float     | float         | int8         | float        |

q4_0: GGUF Q4_0 and the bfloat16 checkpoint beside it. Its grid is `q4_0_bf16` and not `q4_0`, ggml's rule on any weights: the
error is a little smaller (8.56 % against 8.60 %), and the values are exact in bfloat16, so that both files hold the same
numbers and every converter finds the same bytes. Of `q4_0` bfloat16 keeps the codes and 12 % of the scales.
w4a16: compressed-tensors pack-quantized; vLLM's kernels want positive scales, which rules the grids of q4_0 out.
mobile: E2B and E4B with int2 in half of the layers. P is the width of one layer's part of a row: 256 in both.
int8: compressed-tensors with int8 weights, what 26B-A4B ships in place of w4a16.

Towers and projectors are left float, as the released checkpoints have them; all policies but mobile have a grid for those that
`quant.cover` names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from gemma4_jax.errors import UserError

PolicyName = Literal["q4_0", "w4a16", "mobile", "int8"]
Activations = Literal["none", "dynamic", "static"]
KeysValues = Literal["none", "int8"]

ROLES = {
    "attention": "q, k, v and output projections",
    "ffw": "dense feed-forward layers",
    "ffw_shared": "dense feed-forward layers of E2B's and E4B's layers that read other layers' keys and values",
    "experts": "feed-forward layers of the experts",
    "embedding": "token embedding, which is the output head too",
    "per_layer_embedding": "per-layer embedding table of E2B and E4B",
    "per_layer": "per-layer gates and projections of E2B and E4B",
    "per_layer_projection": "the one projection that makes all per-layer inputs of E2B and E4B",
    "router": "the choice of experts",
    "vision": "vision tower",
    "audio": "audio tower of E2B and E4B",
    "audio_conv": "convolutions of the audio tower",
    "projector": "projections of soft tokens to the text's width",
}
"""Groups of weights, by the name that modules carry."""

NEVER = ("router",)
ROUTER = "never quantised: rounding changes which experts run"
PER_LAYER_BLOCKS = "int4_bP"
"""int4 with a scale for each layer's part of a row."""

_LINEAR = ("attention", "ffw", "ffw_shared", "experts", "per_layer", "per_layer_projection")
_SEEN_AND_HEARD = ("vision", "audio", "projector")
_TOWERS = dict.fromkeys(_SEEN_AND_HEARD, "towers stay float unless quant.cover names them")
_TOWERS |= {"audio_conv": "too few inputs for a block"}
_TABLES = dict.fromkeys(("embedding", "per_layer_embedding"), "the files this policy is for keep tables in bfloat16")


@dataclasses.dataclass(frozen=True)
class Policy:
    """What ships under one name: a grid for groups of weights, a reason for those that stay float.

    A model with a group that is in neither is refused, as is one without the groups in `needs`. `asked` has grids for groups that
    stay float unless they are named.
    """

    name: str
    grids: Mapping[str, str]
    stays: Mapping[str, str]
    asked: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()
    activations: Activations = "none"
    kv_cache: KeysValues = "none"

    def check(self, roles: set[str]) -> None:
        """UserError unless a model with these groups can ship so."""
        absent = [role for role in self.needs if role not in roles]
        foreign = sorted(roles - self.grids.keys() - self.stays.keys())
        if absent or foreign:
            what = f"it has no {' or '.join(absent)}" if absent else f"it has {' and '.join(foreign)}"
            raise UserError(
                f"quant.policy={self.name} is a format of E2B and E4B alone; this model is another one, for {what}. "
                "Choose q4_0, w4a16 or int8."
            )


POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy(
            "q4_0",
            {role: "q4_0_bf16" for role in ROLES if role not in ("router", "per_layer_projection", *_TOWERS)},
            {"per_layer_projection": "llama.cpp leaves it at the source's type", "router": ROUTER, **_TOWERS},
            dict.fromkeys(_SEEN_AND_HEARD, "q4_0_bf16"),
        ),
        Policy(
            "w4a16",
            dict.fromkeys(_LINEAR, "int4_sym7_g32"),
            {**_TABLES, "router": ROUTER, **_TOWERS},
            dict.fromkeys(_SEEN_AND_HEARD, "int4_sym7_g32"),
        ),
        Policy(
            "mobile",
            {
                "attention": "int4_channel",
                "ffw": "int4_channel",
                "ffw_shared": "int2_channel",
                "embedding": "int2_channel",
                "per_layer_embedding": PER_LAYER_BLOCKS,
                "per_layer": "int8_channel",
                "per_layer_projection": "int8_channel",
            },
            dict.fromkeys(_TOWERS, "this policy leaves towers float"),
            needs=("ffw_shared", "per_layer_embedding"),
            activations="static",
            kv_cache="int8",
        ),
        Policy(
            "int8",
            dict.fromkeys(_LINEAR, "int8_channel"),
            {**_TABLES, "router": ROUTER, **_TOWERS},
            dict.fromkeys(_SEEN_AND_HEARD, "int8_channel"),
        ),
    )
}
"""Every policy by name."""
