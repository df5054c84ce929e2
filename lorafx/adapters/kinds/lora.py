"""LoRA (Hu et al., 2021, arXiv 2106.09685, section 4.1).

    y = x Wᵀ + b + s · (dropout(x) Aᵀ) Bᵀ        s = α / r, or α / √r with `use_rslora` (arXiv 2312.03732)

A is (r, in) and B is (out, r), so ΔW = s · B A. An embedding looks up columns of A. In a convolution A has the base
layer's kernel size, stride, padding and dilation, and B a kernel of size 1 and the base layer's groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import AdapterError, ConfigError, MergeError
from ...ops import lora_linear
from ...ops.modes import autocast_dtype
from ..combining import Combination
from ..config import is_pattern_of
from ..low_rank import LowRank
from ..notes import noted
from ..readings import CONV1D, IN_PROJ, LINEAR
from ..readings.linear import narrow, wide
from ..site import Selection, Site
from .kind import Kind, Operands, Spec
from .lora_combined import combined, rank_of
from .lora_config import LoraConfig
from .lora_from_data import FROM_DATA, from_data
from .lora_start import is_random, is_taken, low_rank, taken

aten = torch.ops.aten


class Lora(Kind):
    """The LoRA kind; see the module's docstring for its equation."""

    config = LoraConfig
    additive = True
    variant: ClassVar[str] = ""  # what of the config asks for the kind, if it is not LoRA itself

    def serves(self, config: LoraConfig) -> bool:
        return config.variant == self.variant

    def after(self, y: Any, x: Any, at: Operands) -> Any:
        update = at.wide(self.hidden(x, at), at.lora_B, at.tensors.get("lora_bias"))
        return aten.add.Tensor(y, aten.mul.Tensor(update, at.scaling))

    def hidden(self, x: Any, at: Operands) -> Any:
        """What B is given: (…, in) -> (…, r)."""
        return at.narrow(at.dropout(x, at.config.lora_dropout), at.lora_A)

    def fused(self, x: Any, at: Operands) -> Any | None:
        tensors, bound = at.tensors, at.bound  # each call of each site comes here
        is_turned = at.operator is CONV1D.operators[0]
        if (at.operator is not LINEAR.operators[0] and not is_turned) or "lora_bias" in tensors:
            return None
        weight = bound["weight"].t() if is_turned else bound["weight"]
        a, b, s = tensors["lora_A"], tensors["lora_B"], at.numbers["scaling"]
        if not x.dtype == weight.dtype == a.dtype == b.dtype or autocast_dtype(x.device.type) not in (None, x.dtype):
            return None
        if isinstance(s, Tensor):
            b, s = b * s, 1.0
        return lora_linear(x, weight, bound["bias"], None, a, b, s, at.config.lora_dropout if at.training else 0.0)

    def by_row(self, y: Any, x: Any, rows: Any, numbers: tuple[int, ...], ats: tuple[Operands, ...]) -> Any | None:
        if not all(_is_linear(at) for at in ats):
            return None
        scaled = [isinstance(at.scaling, (int, float)) for at in ats]
        bs = [at.lora_B if is_number else aten.mul.Tensor(at.lora_B, at.scaling) for at, is_number in zip(ats, scaled)]
        scalings = [float(at.scaling) if is_number else 1.0 for at, is_number in zip(ats, scaled)]
        dropouts = [float(at.config.lora_dropout) if at.training else 0.0 for at in ats]
        given = list(numbers), [at.lora_A for at in ats], bs, scalings, dropouts
        return torch.ops.lorafx.lora_by_row.default(y, x, rows, *given)

    def delta(self, name: str, at: Operands) -> LowRank | Tensor:
        return (at.product(at.lora_A, at.lora_B) if name == "weight" else at.lora_bias) * at.scaling

    def changes(self, site: Site, config: LoraConfig) -> tuple[str, ...]:
        if site.groups > 1:
            raise MergeError(
                f"{site.name} is a convolution with groups={site.groups}: A mixes what its groups keep apart, so the "
                "adapter is no change of its weight and cannot be merged"
            )
        return ("weight", "bias") if config.lora_bias else ("weight",)

    def transposed(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """(B A)ᵀ = Aᵀ Bᵀ: A and B trade places; there is no bias, which belongs to the weight as it is stored."""
        return {"lora_A": aten.t.default(tensors["lora_B"]), "lora_B": aten.t.default(tensors["lora_A"])}

    def tensors(self, site: Site, config: LoraConfig) -> dict[str, Spec]:
        a, b = site.reading.factors(site.weight_shape, site.groups, rank(site, config))
        if site.reading.lookup:
            return {"lora_A": Spec("lora_embedding_A", a), "lora_B": Spec("lora_embedding_B", b)}
        specs = {"lora_A": Spec("lora_A.weight", a), "lora_B": Spec("lora_B.weight", b)}
        return specs | (
            {"lora_bias": Spec("lora_B.bias", (site.out_features,), of_bias=True)} if config.lora_bias else {}
        )

    def numbers(self, site: Site, config: LoraConfig) -> dict[str, float]:
        r, alpha = rank(site, config), pattern_value(config.alpha_pattern, site.named, config.lora_alpha)
        return {"scaling": alpha / (math.sqrt(r) if config.use_rslora else r)}

    def repeats(self, site: Site, config: LoraConfig) -> bool:
        return config.ties and site.reading.lookup

    def check(self, site: Site, config: LoraConfig) -> None:
        if len(config.variants) > 1:
            both = " and ".join(f"`{name}`" for name in config.variants)
            raise ConfigError(f"{both} are variants of LoRA of which an adapter can be one, as in PEFT; leave one out")
        if config.ties:
            _require_one_size(site, config)
        if site.reading.lookup and config.lora_bias:
            raise ConfigError(f"{site.name} is an embedding, which has no `lora_bias`; exclude it or leave it False")
        if site.reading == IN_PROJ and config.lora_bias:
            raise ConfigError(
                f"{site.name} packs three weights, which have no `lora_bias`; exclude it or leave it False"
            )
        if site.is_parameter:
            _require_plain(site, config)
        if rank(site, config) % site.groups:
            raise ConfigError(
                f"{site.name} has groups={site.groups}, and rank {rank(site, config)} is no multiple of it; "
                "choose another `r` or a `rank_pattern` for it"
            )
        if config.loftq_config and config.init_lora_weights != "loftq":
            raise ConfigError('`loftq_config` needs `init_lora_weights="loftq"`; set that, or leave the config out')
        if (_is_taken(config) and not site.reading.lookup) or config.init_lora_weights == "loftq":
            _require_takable(site, config, self.numbers(site, config)["scaling"])
        if config.init_lora_weights == "orthogonal" and rank(site, config) % 2:
            raise ConfigError(f'{site.name}: `init_lora_weights="orthogonal"` halves the rank, which is odd there')

    def remarks(self, selection: Selection, config: LoraConfig) -> Iterator[str]:
        names = [site.named for site in selection]
        for field in ("rank_pattern", "alpha_pattern"):
            idle = [key for key in getattr(config, field) if not any(is_pattern_of(key, name) for name in names)]
            if idle:
                shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
                yield f"`{field}` keys that match no adapted module: {idle} (they are regexes for the ends of {shown})"
        for field in config.idle:
            yield f'`{field}` has no effect without `init_lora_weights="{field.removesuffix("_config")}"`'
        if is_random(config.init_lora_weights):
            yield (
                f"{config.init_lora_weights!r} takes other start values out of the base each time: what is saved fits "
                "this base alone, unless it is saved with `path_initial_model_for_weight_conversion`"
            )
        if _is_taken(config) and (rows := [site.name for site in selection if site.reading.lookup]):
            yield f"embeddings start as ever, not by {config.init_lora_weights!r}, as in PEFT: {', '.join(rows)}"
        if bare := [site.name for site in selection if config.lora_bias and not site.has_bias]:
            yield (
                f"`lora_bias` adds a bias to {len(bare)} layers without one, such as {bare[0]}: the adapter acts "
                "there, and cannot be merged"
            )

    def takes_from_base(self, site: Site, config: LoraConfig) -> bool:
        return _is_taken(config) and not site.reading.lookup

    def init(
        self,
        site: Site,
        config: LoraConfig,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator | None,
        weight: Tensor | None,
    ) -> Tensor | None:
        if not self.takes_from_base(site, config):
            fill(site, config, tensors, rng)
            return None
        assert weight is not None, "what takes from the base is given it"
        matrix = weight.t() if site.reading.transposed else weight
        r, scaling, init = rank(site, config), self.numbers(site, config)["scaling"], str(config.init_lora_weights)
        if init in FROM_DATA:
            a, b = from_data(matrix, _found(site, init, weight), r, scaling, init, config.start, rng)
            if not (a.isfinite().all() and b.isfinite().all()):
                raise AdapterError(f"{site.name}: what data says of it gives no finite start values; exclude it")
            rest = matrix - scaling * b @ a
        else:
            a, b, rest = taken(matrix, r, scaling, init, config.loftq, rng)
        tensors["lora_A"].copy_(a)
        tensors["lora_B"].copy_(b)
        return rest.t() if site.reading.transposed else rest

    def approach(self, site: Site, config: LoraConfig, tensors: Mapping[str, Tensor], delta: Tensor) -> None:
        """By the largest singular values, whatever the scaling is: as PEFT's LoftQ does."""
        a, b = low_rank(delta.t() if site.reading.transposed else delta, rank(site, config))
        tensors["lora_A"].copy_(a)
        tensors["lora_B"].copy_(b)

    def since(
        self, config: LoraConfig, tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]
    ) -> tuple[LoraConfig, dict[str, Tensor]]:
        """B A - B₀ A₀ = [B, -B₀] [A; A₀]: of twice the rank, and the same scaling."""
        if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
            raise ConfigError("`use_rslora` with `rank_pattern` or `alpha_pattern` cannot be converted, as in PEFT")
        joined = dict(tensors)
        for key, tensor in tensors.items():
            if key.endswith(("lora_A.weight", "lora_embedding_A")):
                joined[key] = torch.cat([tensor, start[key]])
            elif key.endswith(("lora_B.weight", "lora_embedding_B")):
                joined[key] = torch.cat([tensor, -start[key]], 1)
        factor = math.sqrt(2) if config.use_rslora else 2
        changes: dict[str, Any] = {
            "r": 2 * config.r,
            "lora_alpha": factor * config.lora_alpha,
            "rank_pattern": {key: 2 * r for key, r in config.rank_pattern.items()},
            "alpha_pattern": {key: 2 * alpha for key, alpha in config.alpha_pattern.items()},
        }
        of_start: dict[str, Any] = {"loftq_config": {}, "corda_config": None, "lora_ga_config": None}
        return config.replace(init_lora_weights=True, **of_start, **changes), joined

    def combined_config(
        self, configs: Sequence[LoraConfig], selections: Sequence[Selection], how: Combination
    ) -> LoraConfig:
        if any(config.use_dora for config in configs):
            raise ConfigError("adapters with `use_dora` rescale whole weights, and cannot be combined into one")
        if varied := [config.variant for config in configs if config.variant not in ("", "mica")]:
            raise ConfigError(f"adapters with `{varied[0]}` cannot be combined into one")
        if any(config.parameters for config in configs):
            raise ConfigError("adapters with `target_parameters` cannot be combined into one, as in PEFT")
        r = rank_of([max(rank(site, c) for site in sites) for c, sites in zip(configs, selections)], how)
        return self.of_rank(configs[0], r).replace(
            lora_alpha=r,
            use_rslora=False,
            alpha_pattern={},
            lora_bias=any(config.lora_bias for config in configs),
            init_lora_weights=True,
        )

    def combined(
        self,
        site: Site,
        config: LoraConfig,
        parts: Sequence[tuple[float, Operands]],
        how: Combination,
        rng: torch.Generator | None,
    ) -> dict[str, Tensor]:
        return combined(parts, how, self.tensors(site, config), rng)

    def sized(self, config: LoraConfig) -> tuple[str, ...]:
        return () if config.parameters else ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")

    def blocks(self, site: Site) -> int:
        return site.groups

    def of_rank(self, config: LoraConfig, r: int) -> LoraConfig:
        return config.replace(r=r, rank_pattern={})


def _require_one_size(site: Site, config: LoraConfig) -> None:
    """Raise `ConfigError` if modules of a tied weight, which have one adapter, are to have several ranks or α."""
    for field, plain in (("rank_pattern", config.r), ("alpha_pattern", config.lora_alpha)):
        names = (site.named, *site.tied)
        if len({pattern_value(getattr(config, field), name, plain) for name in names}) > 1:
            raise ConfigError(
                f"{' and '.join(names)} are tied, and `{field}` has other numbers for these: give them the same one"
            )


def _require_plain(site: Site, config: LoraConfig) -> None:
    """Raise `ConfigError` for what an update of a parameter itself cannot have: nothing but A, B and a number."""
    asked = [name for name in ("lora_dropout", "lora_bias") if getattr(config, name)]
    for name in (*asked, *config.variants):
        raise ConfigError(
            f"{site.weight} is one of `target_parameters`, for which there is no `{name}`, as in PEFT: leave that out, "
            "give the parameter an adapter of its own, or, if `target_modules` means it, add it to `exclude_modules`"
        )


def _is_linear(at: Operands) -> bool:
    """Whether the update is two products, with nothing else to it."""
    assert at.operator is not None
    return at.operator.narrow is narrow and at.operator.wide is wide and "lora_bias" not in at.tensors


def _is_taken(config: LoraConfig) -> bool:
    """Whether start values are taken out of the base's weights."""
    return is_taken(config.init_lora_weights) or config.init_lora_weights in FROM_DATA


def _found(site: Site, init: str, weight: Tensor) -> Tensor:
    """What data said of a weight; `ConfigError` if nobody has asked it."""
    found = noted(weight, init)
    if found is None:
        raise ConfigError(
            f"{site.name}: `init_lora_weights={init!r}` starts from what data says of this weight as it is now: call "
            f"`lorafx.{FROM_DATA[init]}` first"
        )
    return found


def fill(site: Site, config: LoraConfig, tensors: Mapping[str, Tensor], rng: torch.Generator | None) -> None:
    """Start values that the base has no part in."""
    a, b = tensors["lora_A"], tensors["lora_B"]
    if config.ties and site.tied and site.reading.lookup and config.init_lora_weights:
        a, b = b.t(), a.t()  # of a tied head, which PEFT starts last
    elif site.reading.lookup:
        nn.init.normal_(b, generator=rng)
        _ = nn.init.zeros_(a) if config.init_lora_weights else nn.init.normal_(a, generator=rng)
        return
    if config.init_lora_weights == "orthogonal" and site.reading in (LINEAR, CONV1D):
        _fill_orthogonal(a, b, rng)
        return
    if config.init_lora_weights == "gaussian":
        nn.init.normal_(a, std=1 / rank(site, config), generator=rng)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=rng)
    bound = 1 / math.sqrt(b[0].numel())
    for tensor in (b, tensors["lora_bias"]) if "lora_bias" in tensors else (b,):
        if config.init_lora_weights:
            nn.init.zeros_(tensor)
        else:
            nn.init.uniform_(tensor, -bound, bound, generator=rng)


def _fill_orthogonal(a: Tensor, b: Tensor, rng: torch.Generator | None) -> None:
    """B A = 0 with neither zero: A's rows mix one half of an orthogonal basis of the rank, B's columns the other."""
    basis = nn.init.orthogonal_(a.new_empty(len(a), len(a)), generator=rng)
    half = len(a) // 2
    a.copy_(basis[::2].t() @ torch.randn(half, a.shape[1], dtype=a.dtype, generator=rng) / 10)
    b.copy_(torch.randn(len(b), half, dtype=b.dtype, generator=rng) @ basis[1::2] / 10)


def _require_takable(site: Site, config: LoraConfig, scaling: float) -> None:
    """Raise `ConfigError` where no start values can be taken out of the weight; embeddings have ordinary ones."""
    init, sizes = config.init_lora_weights, (site.in_features, site.out_features)
    if site.reading.lookup and init != "loftq":
        return
    if site.reading not in (LINEAR, CONV1D):
        raise ConfigError(f"{site.name}: `init_lora_weights={init!r}` is for linear layers; exclude it")
    if site.storage.lossy and init != "olora":
        raise ConfigError(
            f"{site.name}: `init_lora_weights={init!r}` starts from a weight that is not quantised, not one stored as "
            f"{site.storage}; initialise on the full base, quantise what is left of it, and load the adapter there "
            "with a config of `init_lora_weights=True`; or call `lorafx.replace_lora_weights_loftq`"
        )
    if scaling <= 0:
        raise ConfigError(f"{site.name}: `init_lora_weights={init!r}` needs a `lora_alpha` above 0")
    most = min(sizes) // 2 if init == "lora_ga" else min(sizes)  # A and B of LoRA-GA are of different directions
    if rank(site, config) > most:
        raise ConfigError(f"{site.name}: `init_lora_weights={init!r}` gives at most rank {most} there")


def rank(site: Site, config: Any) -> int:
    """The rank at a site: the first match in `rank_pattern`, else the config's `r`."""
    return int(pattern_value(config.rank_pattern, site.named, config.r))


def pattern_value(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first pattern that matches the end of `name`, as PEFT matches them; else `default`."""
    return next((v for key, v in patterns.items() if is_pattern_of(key, name)), default)
