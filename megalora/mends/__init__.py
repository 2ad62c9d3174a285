"""What Megatron lacks on every device: layers without TransformerEngine, equal sums on all layouts.

Nothing happens on import. `install` changes Megatron's classes in place, for this process; it may
come before or after the first import of megatron, but before a model is built.
"""

import functools


@functools.cache
def install() -> None:
    """Mend Megatron for this process; a second call does nothing."""
    # They import megatron, which must see the facade of `megalora.cpu` where that is wanted.
    from megalora.mends import (
        attention,
        dataset_helpers,
        latent_attention,
        layers,
        losses,
        optimizer,
        router,
    )

    dataset_helpers.install()
    layers.install()
    latent_attention.install()
    attention.install()
    losses.install()
    optimizer.install()
    router.install()
