"""What one rank computes in a step, with adapters and in full fine-tuning by the same flags."""

from collections import Counter
from dataclasses import dataclass

from megalora.plan.meter import AGAIN, FORWARD, Meter, Product
from megalora.plan.phases import MICROBATCH, Step
from megalora.plan.products import Parts, ours

_OWNER = "megalora.adapters"
# There the base's own product is taken into an op, or made by torch where only a part is asked for.
_OPENED = "megalora.adapters.opened"
# Batched products are attention's alone: linears are products of two matrices.
_BATCHED = ("bmm", "attention")
BASE, ADAPTERS, ATTENTION = "base", "adapters", "attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Products:
    """Matrix products of one size in a whole step of a rank.

    op: torch's name, as `aten.mm`. part: whose they are, `base` where one op does both its product
    and its adapter's, `adapters` or `attention`. way: of the pass. moved: bytes that they read and
    write, each operand once. calls, flops and moved are of all of them.
    """

    op: str
    part: str
    way: str
    calls: int
    flops: int
    moved: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """FLOPs of matrix products in a whole step on one rank.

    base: with frozen or trained weights of the base, forward and backward. adapters: with their
    factors. attention: of queries with keys, and of what follows with values; of the pairs that a
    mask leaves where a fused kernel computes them. recomputed: what recomputation does once more of
    all three. full: of a step of full fine-tuning, its
    recomputation included, by formula: each of the base's products three times, forward, for the
    gradient of its input and of its weight. products: all of these but full's, the most work first.
    """

    base: int
    adapters: int
    attention: int
    recomputed: int
    full: int
    products: list[Products]

    @property
    def model(self) -> int:
        """FLOPs that the step is about, without what recomputation does again."""
        return self.base + self.adapters + self.attention

    @property
    def total(self) -> int:
        """All FLOPs of the step."""
        return self.model + self.recomputed

    @property
    def ratio(self) -> float:
        """FLOPs of the step over those of full fine-tuning."""
        return self.total / self.full if self.full else 1.0


def work(meter: Meter, step: Step) -> Work:
    """Return the FLOPs of a whole step of a rank."""
    sums: Counter[str] = Counter()
    sizes: dict[object, Counter[str]] = {}
    for product, counted in meter.products.items():
        flops, moved, calls = (
            _in_a_step(number, product, step)
            for number in (meter.flops[product], meter.moved[product], counted)
        )
        parts = _parts(product, flops)
        sums.update(_sums(product, flops, parts))
        name = ATTENTION if parts is None else BASE if parts.base else ADAPTERS
        key = product.op, name, product.way, product.shapes, product.dtype
        sizes.setdefault(key, Counter()).update(calls=calls, flops=flops, moved=moved)
    found = [
        Products(op=op, part=part, way=way, **counts)
        for (op, part, way, *_), counts in sizes.items()  # type: ignore[misc]
    ]
    return Work(
        base=sums["base"],
        adapters=sums["adapters"],
        attention=sums["attention"],
        recomputed=sums["recomputed"],
        full=3 * sums["forward"] + sums["attention"] + sums["recomputed base"],
        products=sorted(found, key=lambda one: -one.flops),
    )


def _sums(product: Product, flops: int, parts: Parts | None) -> dict[str, int]:
    """Return what a product adds to the sums of a step."""
    if product.way == AGAIN:
        return {"recomputed": flops, "recomputed base": parts.base if parts else flops}
    if parts is None:
        return {"attention": flops}
    forward = parts.base if product.way == FORWARD else 0
    return {"base": parts.base, "adapters": parts.adapter, "forward": forward}


def _in_a_step(counted: int, product: Product, step: Step) -> int:
    if product.phase != MICROBATCH:
        return counted
    each, rest = divmod(counted, step.microbatches)
    assert not rest, f"{product}: {counted} in {step.microbatches} microbatches"
    return each * step.all_microbatches


def _parts(product: Product, flops: int) -> Parts | None:
    """Return base's and adapter's part of a product's FLOPs, None of attention's."""
    inside = ours(product.op, product.shapes)
    if inside is not None:
        base = flops * inside.base // max(1, sum(inside))
        return Parts(base, flops - base)
    if any(name in product.op for name in _BATCHED):
        return None
    is_adapter = product.owner.startswith(_OWNER) and product.owner != _OPENED
    return Parts(0, flops) if is_adapter else Parts(flops, 0)
