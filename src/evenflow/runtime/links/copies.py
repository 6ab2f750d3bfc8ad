"""Copies between the devices of one process, on streams of their own, beside what the devices compute.

As in Kim et al., "torchgpipe: On-the-fly Pipeline Parallelism for Training Giant Models", 2020. A copy waits
for what its device has computed so far, and what is computed from it waits for the copy; nobody else waits.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import torch

from evenflow.runtime.links.layout import Layout, pack, unpack


@dataclass(frozen=True, slots=True)
class Copied:
    """A tensor on its way to another device: `block` is there when `done` is reached."""

    block: torch.Tensor
    layout: Layout
    done: torch.cuda.Event

    def taken(self) -> torch.Tensor:
        """The tensor where it was sent, as it lay; a GPU's current stream waits for it, a CPU here."""
        if self.block.is_cuda:
            stream = torch.cuda.current_stream(self.block.device)
            stream.wait_event(self.done)
            self.block.record_stream(stream)  # it lives in the copying stream's memory
        else:
            self.done.synchronize()
        return unpack(self.block, self.layout)


class Copies:
    """The streams that copy: for each pair of devices and direction one on each GPU of the two."""

    def __init__(self) -> None:
        self._streams: dict[tuple[torch.device, torch.device], tuple[torch.cuda.Stream, ...]] = {}

    def begin(self, tensor: torch.Tensor, target: torch.device) -> torch.Tensor | Copied:
        """Send a tensor to a device; where it is there already, or neither is a GPU, that is all.

        The tensor's memory stays until the copy is done.
        """
        source = tensor.device
        ends = [device for device in (source, target) if device.type == "cuda"]
        if source == target or not ends:
            return tensor.to(target)
        if (source, target) not in self._streams:
            self._streams[source, target] = tuple(torch.cuda.Stream(device) for device in ends)
        streams = self._streams[source, target]
        with ExitStack() as stack:
            for stream in streams:
                if stream.device == source:
                    stream.wait_stream(torch.cuda.current_stream(source))
                    tensor.record_stream(stream)
                stack.enter_context(torch.cuda.stream(stream))
            layout = Layout.of(tensor)
            # To a CPU this allocates pinned memory, which a GPU fills while the host goes on.
            block = pack(tensor, layout).to(target, non_blocking=True)
            done = streams[-1].record_event()
        return Copied(block, layout, done)
