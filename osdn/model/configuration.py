"""The configuration of an OSDN language model, in Hugging Face's form."""

import math
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, get_args

from transformers import AutoConfig, PretrainedConfig

from osdn.layers.gates import Forgetting, StateDecay
from osdn.ops.validation import check_box_holds_one, check_rule, check_sizes

MIXERS = ("osdn", "delta_net", "gated_delta_net", "attention")
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "head_dim", "head_v_dim",
         "intermediate_size", "conv_size", "max_position_embeddings")  # fmt: skip
FLAGS = ("beta_aware", "learn_initial_precond", "allow_neg_eigval", "use_output_gate",
         "tie_word_embeddings", "use_cache")  # fmt: skip


# What stands in auto_map and in the file beside a checkpoint's config.json.
IMPORT_MODULE = "modeling_osdn"
AUTO_CLASSES = {
    "AutoConfig": "OSDNConfig",
    "AutoModel": "OSDNModel",
    "AutoModelForCausalLM": "OSDNForCausalLM",
    "AutoModelForSequenceClassification": "OSDNForSequenceClassification",
    "AutoModelForTokenClassification": "OSDNForTokenClassification",
}
IMPORT_LINE = f"from osdn import {', '.join(AUTO_CLASSES.values())}  # noqa: F401\n"
MOST_LAYERS = 10_000
MOST_PARAMETERS = 10**13  # 20 TB in bfloat16: no machine holds more


class OSDNConfig(PretrainedConfig):
    """Sizes and method of an OSDN model; the defaults are the paper's 340M model with APF.

    Args:
        vocab_size: rows of the embedding.
        hidden_size: D, width of the residual stream.
        num_hidden_layers: number of blocks (mixer, then SwiGLU).
        num_heads: H, heads of every mixer.
        head_dim: K, features of a key; None means hidden_size // num_heads.
        head_v_dim: V, features of a value in all layers but attention; None means K.
        intermediate_size: width of the SwiGLU; None means 8/3 of hidden_size, rounded up to a
            multiple of 256.
        mixer: "osdn", "delta_net" (osdn with the preconditioner fixed at 1), "gated_delta_net"
            (delta_net with state decay) or "attention", for all layers, or a list with one name a
            layer.
        forgetting: "data" (Adaptive Preconditioner Forgetting; of osdn layers) or "none". Past the
            trained length only "data" was better than DeltaNet (docs/explanation/findings.md).
        state_decay: "data" (the memory of osdn layers decays as gated_delta_net's) or "none".
        eta: step size of the preconditioner's hypergradient descent, in [0, 2].
        beta_aware: let the hypergradient see the token's own write strength β. d then grows where β
            is small: give it a box (without one perplexity broke past the trained length).
        precond_min, precond_max: the box the preconditioner is kept in; both or neither; it must
            hold 1.
        learn_initial_precond: d_1 is learned, from 1; else it stays 1.
        allow_neg_eigval: β in (0, 2) instead of (0, 1).
        use_output_gate: gate each layer's output by silu(W_g x), except in attention.
        conv_size: width of the short convolutions, in tokens.
        rope_theta: base of the rotary frequencies in attention layers.
        norm_eps: of every RMSNorm.
        initializer_range: standard deviation of the initial weights.
        tie_word_embeddings: share the embedding with the output layer.
        max_position_embeddings: length in tokens the model was trained at; information for
            evaluation, not a limit.
        use_cache: keep a cache in generation by default.

    Raises:
        ValueError: a field outside its range, or one that this class does not have.
    """

    model_type = "osdn"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads"}
    number_of_conv_states: ClassVar[int] = 2  # slots a cache layer gets: S and d

    vocab_size: int = 32000
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_heads: int = 8
    head_dim: int | None = None
    head_v_dim: int | None = None
    intermediate_size: int | None = None
    mixer: str | list[str] = "osdn"
    forgetting: Forgetting = "data"
    state_decay: StateDecay = "none"
    eta: float = 1.0
    beta_aware: bool = False
    precond_min: float | None = None
    precond_max: float | None = None
    learn_initial_precond: bool = True
    allow_neg_eigval: bool = False
    use_output_gate: bool = False
    conv_size: int = 4
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # transformers takes any keyword as an attribute, so a misspelt field would be lost.
        fields = [name for name in type(self).__annotations__ if name not in vars(PretrainedConfig)]
        for name in kwargs:
            if close := get_close_matches(name, fields, n=1, cutoff=0.75):
                raise ValueError(f"{name}: OSDNConfig has no such field; did you mean {close[0]}?")
        before = set(vars(self))
        super().__post_init__(**kwargs)
        unknown = sorted((set(vars(self)) - before) & set(kwargs))
        if unknown and "model_type" not in kwargs:  # a file may hold what other versions wrote
            raise ValueError(f"{unknown[0]}: OSDNConfig has no such field")
        self._validate()

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As transformers does, with a file that imports the classes beside config.json.

        With it trust_remote_code=True loads the model in a process that has not imported osdn, and
        where osdn is not installed the error says so. It holds no other code.
        """
        os.makedirs(save_directory, exist_ok=True)
        Path(save_directory, f"{IMPORT_MODULE}.py").write_text(IMPORT_LINE)
        # transformers imports what stands here, after it has asked for trust_remote_code.
        self.auto_map = {name: f"{IMPORT_MODULE}.{one}" for name, one in AUTO_CLASSES.items()}
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers would copy this file's source beside each checkpoint."""

    def _validate(self) -> None:
        """ValueError where a field is outside its range; a model asks once more when it is made."""
        # 8/3 of the width, so that three matrices have the parameters of two of 4; 256 for tiles.
        if self.intermediate_size is None:
            self.intermediate_size = 256 * -(-int(self.hidden_size * 8 / 3) // 256)
        check_sizes(**{name: getattr(self, name) for name in SIZES})
        self._check_scale()
        for name in ("norm_eps", "rope_theta", "initializer_range", "eta"):
            value = getattr(self, name)
            if (
                not isinstance(value, int | float)
                or isinstance(value, bool)
                or not 0 <= value < math.inf
                or (name == "rope_theta" and value == 0)
            ):
                least = "above 0" if name == "rope_theta" else "of at least 0"
                raise ValueError(f"{name}: expected a finite number {least}, got {value!r}")
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            some = value if name == "eos_token_id" and isinstance(value, list) else [value]
            if value is not None and not all(
                type(one) is int and 0 <= one < self.vocab_size for one in some
            ):
                raise ValueError(
                    f"{name}: expected None, or an integer from 0 to less than vocab_size = "
                    f"{self.vocab_size}, got {value!r}"
                )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of hidden_size = {self.hidden_size}, "
                f"got {self.num_heads}; or give head_dim"
            )
        if self.forgetting not in get_args(Forgetting):
            raise ValueError(
                f"forgetting: expected one of {get_args(Forgetting)}, got {self.forgetting!r}"
            )
        if self.state_decay not in get_args(StateDecay):
            raise ValueError(
                f"state_decay: expected one of {get_args(StateDecay)}, got {self.state_decay!r}"
            )
        for name in self.mixers:
            if name not in MIXERS:
                raise ValueError(f"mixer: expected one of {MIXERS}, got {name!r}")
        K = self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim
        if "attention" in self.mixers and K % 2:
            raise ValueError(f"head_dim: expected an even number for attention layers, got {K}")
        if len(self.mixers) != self.num_hidden_layers:
            raise ValueError(
                f"mixer: expected {self.num_hidden_layers} names, one a layer, "
                f"got {len(self.mixers)}"
            )
        check_rule(self.eta, self.precond_min, self.precond_max)
        check_box_holds_one(self.precond_min, self.precond_max)

    def _check_scale(self) -> None:
        """Refuse what no machine holds, before minutes go into building it."""
        if self.num_hidden_layers > MOST_LAYERS:
            raise ValueError(
                f"num_hidden_layers: expected at most {MOST_LAYERS}, got {self.num_hidden_layers}"
            )
        K = self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim
        V = K if self.head_v_dim is None else self.head_v_dim
        assert self.intermediate_size is not None
        # Four projections and three of the MLP. Norms and gates are too small to count.
        block = 2 * self.num_heads * (K + V) + 3 * self.intermediate_size  # times hidden_size
        total = self.hidden_size * (self.num_hidden_layers * block + 2 * self.vocab_size)
        if max(total, K * V * self.num_heads, self.conv_size * block) > MOST_PARAMETERS:
            raise ValueError(
                "hidden_size, num_heads, head_dim, head_v_dim, intermediate_size, vocab_size, "
                f"conv_size: expected a model of at most {MOST_PARAMETERS:.0e} parameters, got "
                f"about {max(total, K * V * self.num_heads, self.conv_size * block):.1e}"
            )

    @property
    def mixers(self) -> list[str]:
        """The mixer of every layer."""
        if not isinstance(self.mixer, str | list | tuple):
            raise ValueError(f"mixer: expected one of {MIXERS} or a list, got {self.mixer!r}")
        if isinstance(self.mixer, str):
            return [self.mixer] * self.num_hidden_layers
        return list(self.mixer)

    @property
    def layer_types(self) -> list[str]:
        """What transformers' caches and masks call the layers."""
        return [
            "full_attention" if name == "attention" else "linear_attention" for name in self.mixers
        ]


AutoConfig.register(OSDNConfig.model_type, OSDNConfig)
