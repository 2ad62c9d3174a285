"""Which pipeline stage Megatron gives each layer of a decoder."""

import argparse


def even_stages(num_layers: int, stages: int) -> tuple[int, ...]:
    """Return each layer's stage where all stages have as many layers, within one."""
    return tuple(layer * stages // num_layers for layer in range(num_layers))


def stages_of_layers(args: argparse.Namespace) -> tuple[int, ...]:
    """Return each layer's stage by Megatron's parsed arguments, as its transformer_block.py does.

    Empty for hybrid models, whose layers a pattern counts otherwise.
    """
    if getattr(args, "hybrid_layer_pattern", None):
        return ()
    layout = getattr(getattr(args, "pipeline_model_parallel_layout", None), "layout", None)
    chunks = _uneven(args) if layout is None else [[_decoders(c) for c in s] for s in layout]
    return tuple(
        stage
        for chunk in range(len(chunks[0]))
        for stage, own in enumerate(chunks)
        for _ in range(own[chunk])
    )


def _decoders(chunk: list) -> int:
    """Count the layers of the decoder in a chunk of --pipeline-model-parallel-layout."""
    return sum(layer.name == "decoder" for layer in chunk)


def _uneven(args: argparse.Namespace) -> list[list[int]]:
    """Return how many layers each chunk of each stage has."""

    def given(name: str) -> int | None:
        return getattr(args, name, None)

    num_layers: int = args.num_layers
    stages: int = args.pipeline_model_parallel_size
    virtual = given("virtual_pipeline_model_parallel_size") or 1
    ends = {
        0: given("decoder_first_pipeline_num_layers"),
        stages - 1: given("decoder_last_pipeline_num_layers"),
    }
    told = {stage: number for stage, number in ends.items() if number is not None}
    if told:
        each = (num_layers - sum(told.values())) // max(1, stages - len(told))
        return [[told.get(stage, each) // virtual] * virtual for stage in range(stages)]
    embedding = int(bool(given("account_for_embedding_in_pipeline_split")))
    loss = int(bool(given("account_for_loss_in_pipeline_split")))
    each = (num_layers + embedding + loss) // stages // virtual
    chunks = [[each] * virtual for _ in range(stages)]
    chunks[0][0] -= embedding
    chunks[-1][-1] -= loss
    return chunks
