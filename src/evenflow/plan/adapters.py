"""An estimate of fine-tuning with adapters: what a chain costs if only LoRA beside its matrices trains.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
"""

import math
from dataclasses import replace

from evenflow.plan.chain import Chain, Parameter, Seconds

LORA_RANK = 16  # of the adapters that advice is about
_ELEMENT_BYTES = 4  # of an adapter in float32, whatever the matrix is in


def with_adapters(chain: Chain, rank: int) -> Chain:
    """The chain with frozen parameters, and an adapter of a rank beside each matrix that was trained.

    Matrices are taken to be square. Weight gradients take no time worth counting any more. What a forward
    keeps stays as it is: an adapter's gradient needs the same input.

    >>> matrix = Parameter("w", 100 * 100, 20_000, True, (0,))
    >>> seconds = {"cpu": Seconds((1.0,), (1.0,), (1.0,))}
    >>> chain = Chain(("a",), 1, (1.0,), seconds, parameters=(matrix,))
    >>> frozen, adapter = with_adapters(chain, 8).parameters
    >>> frozen.trains, adapter.num_elements, adapter.num_bytes
    (False, 1600, 6400)
    """
    adapters = []
    for each in chain.parameters:
        if each.trains and each.is_matrix:
            elements = 2 * rank * math.ceil(math.sqrt(each.num_elements))
            name = f"{each.name} (adapter)"
            adapters.append(
                Parameter(name, elements, _ELEMENT_BYTES * elements, True, each.nodes, each.is_expert)
            )
    frozen = [replace(each, trains=False) for each in chain.parameters]
    seconds = {
        kind: Seconds(each.forward, each.input_grad, (0.0,) * chain.num_nodes)
        for kind, each in chain.seconds.items()
    }
    return replace(chain, parameters=(*frozen, *adapters), seconds=seconds)
