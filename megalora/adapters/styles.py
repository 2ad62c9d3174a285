"""Which adapter goes around which style of base, by how the base is called."""

from megalora.adapters.adapter import LoRAAdapter
from megalora.adapters.bases import Style
from megalora.adapters.experts import GroupedAdapter, SequentialAdapter
from megalora.adapters.linear import LayerNormLinearAdapter, LinearAdapter, RouterAdapter

ADAPTERS: dict[Style, type[LoRAAdapter]] = {
    Style.LINEAR: LinearAdapter,
    Style.LAYERNORM_LINEAR: LayerNormLinearAdapter,
    Style.GROUPED: GroupedAdapter,
    Style.SEQUENTIAL: SequentialAdapter,
    Style.ROUTER: RouterAdapter,
}
