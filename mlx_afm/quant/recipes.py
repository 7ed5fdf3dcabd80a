"""Which matrix takes which form: one scheme for all, a named mixture, or a function of the caller's.

Names are module paths (`model.layers.0.mlp.up_proj`). Only matrices are ever quantized: projections and the
embedding, which is also the head. Norms and the steps of the key and value quantizers stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_afm.errors import ConfigError, SettingError
from mlx_afm.quant.scheme import BALANCED, GROUP_SIZES, Scheme

Shapes = Mapping[str, tuple[int, int]]  # module path -> (rows, columns)
Predicate = Callable[[str, tuple[int, int]], "Scheme | bool"]
Recipe = Callable[[Shapes], dict[str, Scheme]]

EMBEDDING = "model.embedding"
FOUR_BITS = Scheme(bits=4)
_LAYER = re.compile(r"model\.(?P<kind>layers|kv_reuse_layers)\.(?P<number>\d+)\.")


def _apple(shapes: Shapes) -> dict[str, Scheme]:
    """Balanced 2-bit projections and a 4-bit embedding, what the model ships as."""
    return {path: FOUR_BITS if path == EMBEDDING else Scheme(mode=BALANCED) for path in shapes}


def _mixed(low: int, high: int) -> Recipe:
    """mlx-lm's mixtures: more bits for what loses most, in the outer layers and every third between."""

    def recipe(shapes: Shapes) -> dict[str, Scheme]:
        layers = sorted({_layer_of(path) for path in shapes} - {None})  # type: ignore[type-var]
        count = len(layers)
        chosen = {
            layer
            for place, layer in enumerate(layers)
            if place < count // 8 or place >= 7 * count // 8 or (place - count // 8) % 3 == 2
        }
        schemes = {}
        for path in shapes:
            sensitive = path.endswith(("qkv_proj", "down_proj")) and _layer_of(path) in chosen
            schemes[path] = Scheme(bits=high if sensitive or path == EMBEDDING else low)
        return schemes

    return recipe


def _layer_of(path: str) -> tuple[int, int] | None:
    match = _LAYER.match(path)
    return None if match is None else (int(match["kind"] == "kv_reuse_layers"), int(match["number"]))


RECIPES: dict[str, Recipe] = {
    "apple": _apple,
    "mixed_2_6": _mixed(2, 6),
    "mixed_3_4": _mixed(3, 4),
    "mixed_3_6": _mixed(3, 6),
    "mixed_4_6": _mixed(4, 6),
}


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How a model is to be quantized.

    Attributes:
        mode, bits, group_size: one scheme for all matrices, see `Scheme`. Below 4 bits, and with balanced, the
            embedding takes 4-bit affine: it is looked up and multiplied with, and errors in it hurt twice.
            Groups that nobody asked for are narrowed where they do not divide a width.
        recipe: a named mixture instead: apple, mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6.
        predicate: asked for each matrix by module path and shape: True for the scheme above, False to leave
            it dense, or a scheme of its own.
        column_weights: by module path, the mean square of each input over calibration data; a balanced
            scale then minimises the error of the outputs rather than of the weights.

    Raises:
        SettingError: settings out of range, or a recipe with settings that it fixes itself.
    """

    mode: str | None = None
    bits: int | None = None
    group_size: int | None = None
    recipe: str | None = None
    predicate: Predicate | None = None
    column_weights: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.recipe is None:
            _ = self.scheme
            return
        if self.recipe not in RECIPES:
            raise SettingError("unknown recipe", expected=" or ".join(RECIPES), found=self.recipe)
        given = [name for name in ("mode", "bits", "group_size", "predicate") if getattr(self, name) is not None]
        if given:
            advice = "Give the recipe, or these settings, not both."
            raise SettingError(f"recipe {self.recipe} already sets {', '.join(given)}", advice=advice)

    @property
    def scheme(self) -> Scheme:
        """The scheme for all matrices."""
        return Scheme(mode=self.mode or "affine", bits=self.bits, group_size=self.group_size)  # type: ignore[arg-type]


@dataclass(frozen=True)
class QuantizationPlan:
    """Which matrix takes which form.

    Attributes:
        default: the commonest scheme, or the one asked for; stands first in `config.json`.
        schemes: by module path.
        left_dense: matrices that no group size cuts evenly.
    """

    default: Scheme
    schemes: dict[str, Scheme]
    left_dense: tuple[str, ...]


def plan_schemes(config: QuantConfig, shapes: Shapes) -> QuantizationPlan:
    """The form of each matrix.

    Raises:
        ConfigError: nothing can be quantized.
    """
    wanted = _wanted(config, shapes)
    fitted = {path: _fitted(scheme, shapes[path][1], config.group_size is None) for path, scheme in wanted.items()}
    schemes = {path: scheme for path, scheme in fitted.items() if scheme is not None}
    if not schemes:
        advice = "Choose a group size that divides the widths of the model."
        raise ConfigError("no matrix can be quantized like that", advice=advice, details=_widths(shapes))
    left_dense = tuple(path for path in wanted if path not in schemes)
    if config.recipe is None:
        return QuantizationPlan(config.scheme, schemes, left_dense)
    kinds = list(schemes.values())
    return QuantizationPlan(max(set(kinds), key=kinds.count), schemes, left_dense)


def _wanted(config: QuantConfig, shapes: Shapes) -> dict[str, Scheme]:
    if config.recipe is not None:
        return RECIPES[config.recipe](shapes)
    scheme, wanted = config.scheme, {}
    coarse = scheme.bits < 4
    for path, shape in shapes.items():
        chosen = True if config.predicate is None else config.predicate(path, shape)
        if isinstance(chosen, Scheme):
            wanted[path] = chosen
        elif chosen:
            wanted[path] = FOUR_BITS if coarse and path == EMBEDDING else scheme
    return wanted


def _fitted(scheme: Scheme, columns: int, free: bool) -> Scheme | None:
    """The scheme if it fits; if its groups were not asked for, or mean nothing, with the widest narrower ones."""
    if scheme.fits(columns):
        return scheme
    narrower = [size for size in GROUP_SIZES[scheme.mode] if columns % size == 0 and size < scheme.group_size]
    if narrower and (free or scheme.mode == BALANCED):
        return replace(scheme, group_size=max(narrower))
    return None


def _widths(shapes: Shapes) -> list[str]:
    return [f"{columns} columns" for columns in sorted({columns for _, columns in shapes.values()})]
