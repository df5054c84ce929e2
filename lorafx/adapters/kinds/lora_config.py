"""LoraConfig: the fields of `peft.LoraConfig`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from ...errors import ConfigError, nearest, warn
from ..config import (
    AdapterConfig,
    defaults_of,
    is_count,
    is_number,
    require,
    require_bias,
    require_counts,
    require_dropouts,
    require_flags,
    require_regexes,
)
from .lora_from_data import FROM_DATA
from .lora_start import is_taken
from .lora_subconfigs import OF_DATA, check_subconfigs, fields_of, whole

# Fields that hold a config of their own.
_CONFIGS = (
    *("megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("monteclora_config", "use_bdlora", "arrow_config", "kasa_config"),
)


def _check_numbers(config: LoraConfig) -> None:
    require_counts(config, "r")
    require(is_number(config.lora_alpha), "lora_alpha", config.lora_alpha, "a number")
    require_dropouts(config, "lora_dropout")


def _check_flags(config: LoraConfig) -> None:
    require_flags(config, "use_rslora", "lora_bias", "fan_in_fan_out", "use_dora", "use_qalora")
    init = config.init_lora_weights
    require(isinstance(init, (bool, str)), "init_lora_weights", init, "True, False or a name")
    if config.lora_bias and not isinstance(init, bool):
        raise ConfigError(f"`lora_bias` needs `init_lora_weights` True or False, not {init!r}, as in PEFT")
    require_bias(config, "lora_only")


def check_patterns(config: Any) -> None:
    """Raise `ConfigError` for a `rank_pattern` or `alpha_pattern` that is none."""
    for name, valid, expected in (
        ("rank_pattern", is_count, "a dict of module names to positive ints"),
        ("alpha_pattern", is_number, "a dict of module names to numbers"),
    ):
        value = getattr(config, name)
        fits = isinstance(value, Mapping) and all(isinstance(k, str) and valid(v) for k, v in value.items())
        require(fits, name, value, expected)
    require_regexes(config, "rank_pattern", "alpha_pattern")


def _check_forms(config: LoraConfig) -> None:
    """Fields that are mostly unset, those too that `compile` refuses or that have no effect here, must make sense."""
    for names, fits, expected in (
        (_CONFIGS, lambda v: isinstance(v, Mapping), "a dict or None"),
        (("megatron_core",), lambda v: isinstance(v, str), "a string or None"),
        (("target_parameters",), _list_of(str), "a list of strings or None"),
        (("alora_invocation_tokens",), _list_of(int), "a list of ints or None"),
        (("trainable_token_indices",), _tokens, "a list of ints, a dict of such by module name, or None"),
        (("layer_replication",), _ranges, "a list of pairs of ints or None"),
    ):
        for name in names:
            value = getattr(config, name)
            # In PEFT's files an empty list, too, means that a field is not set.
            require(value is None or value in ([], ()) or fits(value), name, value, expected)
    require_counts(config, "qalora_group_size")
    require_flags(config, "ensure_weight_tying")


def _check_loftq(config: LoraConfig) -> None:
    if config.init_lora_weights != "loftq":
        return
    given = fields_of(config.loftq_config)
    if not given:
        raise ConfigError('`init_lora_weights="loftq"` needs a `loftq_config`, such as {"loftq_bits": 4}')
    known = given.keys() <= {"loftq_bits", "loftq_iter"}
    require(known, "loftq_config", given, 'a dict of "loftq_bits" and "loftq_iter"')
    require(given.get("loftq_bits", 4) in (4, 8), "loftq_bits", given.get("loftq_bits"), "4 or 8, as in PEFT 0.21")
    require(is_count(given.get("loftq_iter", 1)), "loftq_iter", given.get("loftq_iter"), "a positive int")


def _list_of(kind: type) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)

    return fits


def _tokens(value: Any) -> bool:
    of_modules = value.items() if isinstance(value, Mapping) else [("", value)]
    return all(isinstance(name, str) and _list_of(int)(tokens) for name, tokens in of_modules)


def _ranges(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(_list_of(int)(pair) and len(pair) == 2 for pair in value)


@dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """What to adapt and how: the fields of `peft.LoraConfig`, with its names and defaults.

    Lists are kept as tuples. Fields that lorafx does not implement yet are accepted, so that any PEFT config can be
    read and written back; `compile` refuses a config that sets one. `extra` holds fields that lorafx does not know;
    they are written back unchanged.

    Raises `ConfigError` for a value of the wrong type or range, naming the field.

    Attributes:
        r: the rank: A is (r, in), B (out, r).
        lora_alpha: α; what B A x gives is multiplied by α / r.
        lora_dropout: the probability with which an entry of what A multiplies is dropped in training.
        use_rslora: multiply by α / √r instead.
        bias: which of the base's biases train: "none", "all", or "lora_only", those of the adapted layers.
        lora_bias: whether B has a bias, too.
        init_lora_weights: the start values. True: A at random, B zero. False: both at random, so that the adapter acts
            at once. "gaussian": A normal. "orthogonal": both at random, with B A zero. "eva": A is what
            `initialize_lora_eva_weights` finds. "pissa", "pissa_niter_4", "olora", "loftq": taken out of the base's
            weight; so are "corda" and "lora_ga", after `preprocess_corda` and `preprocess_loraga`. "mica": B is what
            the base's weight uses least, and stays so; A trains.
        rank_pattern: other ranks, by a regex that a module's name ends in.
        alpha_pattern: other α, so too.
        use_dora: train the norms of the weight's rows as well.
        use_bdlora: have A, or B, be `nblocks` diagonal blocks where a module's name contains one of these strings:
            {"target_modules_bd_a": [...], "target_modules_bd_b": [...], "nblocks": 2, "match_strict": True}.
        use_qalora: have A read groups of `qalora_group_size` inputs.
        kasa_config: take the r smallest singular values out of the base's weight, and train others: {"beta": 1e-4,
            "gamma": 1e-3}, which weigh what `get_penalty` gives.
        monteclora_config: have training add noise to A, whose spread trains, too: {"num_samples": 8, "use_entropy":
            False, "dirichlet_prior": 0.1, "sample_scaler": 1e-4, "kl_loss_weight": 1e-5}; `get_penalty` goes with it.
        velora_config: keep a compressed x for the gradient of A: {"num_groups": 64, "scale": 1.0, "init_type":
            "batch_average"}, or "random".
        loftq_config: {"loftq_bits": 4, "loftq_iter": 1}, of "loftq".
        eva_config, corda_config, lora_ga_config: numbers of start values from data, as dicts; see these functions.
        trainable_token_indices: tokens whose embeddings train, as a list, or as lists by module name.
        target_parameters: parameters to adapt besides, by their names or endings of these, as "experts.down_proj":
            weights that stack experts, and matrices of modules that are no linear layers.
        ensure_weight_tying: where other modules have the input embedding's weight, an adapter of one of them is the
            embedding's and acts in all, and so does a copy (`modules_to_save`); files have it for each, as PEFT's.
        layer_replication: ranges of the layers that the model has instead of its own, as [[0, 4], [2, 5]]: those that
            are there twice share their weights, and each has adapters of its own.
        alora_invocation_tokens: tokens from whose last occurrence in a row on the adapter acts; rows without are the
            base's.
    """

    peft_type: str = "LORA"
    # what
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    # for some modules
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    use_dora: bool = False
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    trainable_token_indices: Any = None
    target_parameters: Sequence[str] | None = None
    use_bdlora: Any = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    kasa_config: Any = None
    monteclora_config: Any = None
    velora_config: Any = None
    ensure_weight_tying: bool = False
    layer_replication: Any = None
    alora_invocation_tokens: Any = None
    # not implemented yet: listed by `unsupported` if set
    megatron_config: Any = None
    megatron_core: str | None = "megatron.core"
    arrow_config: Any = None

    # Those that also hold for a kind whose config has these fields, and uses them in a way of its own.
    common_checks: ClassVar[tuple[Callable[[Any], None], ...]] = (_check_numbers, _check_flags, _check_forms)
    checks = (*common_checks, check_patterns, _check_loftq, check_subconfigs)
    tuples = (*AdapterConfig.tuples, "target_parameters")
    null_is_default: ClassVar[tuple[str, ...]] = "rank_pattern", "alpha_pattern", "loftq_config"
    takes_parameters = True

    @property
    def loftq(self) -> dict[str, int]:
        """The numbers of `loftq_config`, with PEFT's defaults."""
        return {"loftq_bits": 4, "loftq_iter": 1} | fields_of(self.loftq_config)

    @property
    def idle(self) -> list[str]:
        """The fields for start values from data that have no effect, as `init_lora_weights` asks for others."""
        return [name for name in OF_DATA if getattr(self, name) and f"{self.init_lora_weights}_config" != name]

    @property
    def start(self) -> dict[str, Any]:
        """The numbers of start values from data, with PEFT's defaults: of "eva", "corda" or "lora_ga"."""
        name = f"{self.init_lora_weights}_config"
        return whole(name, getattr(self, name))

    @property
    def variants(self) -> tuple[str, ...]:
        """What the config asks for that changes LoRA's equation, or what of it trains: fields, as in PEFT one at most.

        In PEFT's files an empty list, too, means that a field is not set.
        """
        asked = [name for name in VARIANTS if getattr(self, name) not in (None, False, [], ())]
        return (*asked, *(["mica"] if self.init_lora_weights == "mica" else []))

    @property
    def variant(self) -> str:
        """The first of `variants`, "" for LoRA itself."""
        return next(iter(self.variants), "")

    def subconfig(self, name: str) -> dict[str, Any]:
        """All that the config in a field says, with PEFT's defaults: `subconfig("use_bdlora")`."""
        return whole(name, getattr(self, name))

    def with_values(self) -> Self:
        """Values that came out of data cannot be found again: the base has to be the one that was left by that."""
        init = self.init_lora_weights
        if init in FROM_DATA:
            warn(
                f"the adapter started from values that `init_lora_weights={init!r}` took out of its base's weights: it "
                "fits the base as that left it, or has to be saved with `path_initial_model_for_weight_conversion`"
            )
            return self.replace(init_lora_weights=True, corda_config=None, lora_ga_config=None)
        return self

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.target_parameters or ())

    @property
    def ties(self) -> bool:
        return self.ensure_weight_tying

    @property
    def replicates(self) -> tuple[tuple[int, int], ...]:
        return tuple((start, end) for start, end in self.layer_replication or ())

    def besides(self, embedding: str) -> tuple[str, ...]:
        """The modules of which some tokens train."""
        tokens = self.trainable_token_indices
        if tokens and not isinstance(tokens, Mapping) and not embedding:
            raise ConfigError(
                "`trainable_token_indices` is a list, of the input embedding's tokens, and the model has no "
                "`get_input_embeddings` to tell which that is; give a dict of lists by module name"
            )
        return tuple(tokens) if isinstance(tokens, Mapping) else (embedding,) if tokens else ()

    @property
    def unsupported(self) -> dict[str, Any]:
        """The fields that ask for something lorafx does not implement yet, with their values.

        Raises `ConfigError` for a start value that nobody has.
        """
        defaults = defaults_of(LoraConfig)
        asked = {
            name: value  # in PEFT's files an empty list, too, means that a field is not set
            for name in NOT_YET
            if (value := getattr(self, name)) != defaults[name] and value not in ([], {}, ())
        }
        init = self.init_lora_weights
        if not (isinstance(init, bool) or init in STARTS or is_taken(init)):
            known = nearest(str(init), STARTS, f"there are {', '.join(STARTS)}, True and False")
            raise ConfigError(f"init_lora_weights={init!r} is no start value; {known}")
        return asked


# Fields that ask for another equation than LoRA's, or for another way to train it.
VARIANTS = (
    *("alora_invocation_tokens", "use_dora", "use_bdlora", "use_qalora"),
    *("kasa_config", "monteclora_config", "velora_config"),
)

# Start values that have a name in PEFT; the last says what trains, too.
STARTS = ("gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "loftq", "eva", *FROM_DATA, "mica")

# Known to PEFT, refused by `compile` unless they hold their default.
NOT_YET = (
    "megatron_config",
    "arrow_config",
)
