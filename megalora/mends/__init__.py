"""What Megatron lacks on every device: layers without TransformerEngine, equal sums on all layouts.

Nothing happens on import. `install` changes Megatron's classes in place, for this process; it may
come before or after the first import of megatron, but before a model is built.
"""

from megalora import replace


def install() -> None:
    """Mend Megatron for this process; a second call does nothing."""
    replace.install(patches())


def patches() -> tuple[replace.Patch, ...]:
    """Return the table of what is mended here."""
    # They import megatron, which must see the facade of `megalora.cpu` where that is wanted.
    from megalora.mends import (
        attention,
        dataset_helpers,
        delta_net,
        expert_biases,
        hybrid,
        latent_attention,
        latent_experts,
        layers,
        losses,
        optimizer,
        router,
    )

    return (
        *dataset_helpers.patches(),
        *layers.PATCHES,
        *latent_attention.PATCHES,
        *latent_experts.PATCHES,
        *attention.PATCHES,
        *delta_net.PATCHES,
        *expert_biases.PATCHES,
        *hybrid.PATCHES,
        *losses.PATCHES,
        *optimizer.PATCHES,
        *router.PATCHES,
    )
