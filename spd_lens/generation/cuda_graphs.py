"""CUDA graphs: all kernels of a step in one launch, where launching each by itself takes longer than running it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class CudaGraphs:
    """A function of sizes, run as a CUDA graph from the second call with the same sizes on. Its inputs lie in tensors
    that stay where they are.

    A result is overwritten by the next call. What cannot be captured (a model that reads values in between, as the
    routing of experts may) runs as it is.
    """

    def __init__(self, function: Callable[[int, int], Tensor]) -> None:
        self._function = function
        self._called: set[tuple[int, int]] = set()
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()  # one after the other, all can use the same memory
        self._captures = True

    def __call__(self, *sizes: int) -> Tensor:
        n, length = sizes
        if (n, length) in self._graphs:
            graph, output = self._graphs[n, length]
            graph.replay()
            return output
        if not self._captures or (n, length) not in self._called:  # the first call also sets up what kernels need
            self._called.add((n, length))
            return self._function(n, length)
        return self._captured(n, length)

    def _captured(self, n: int, length: int) -> Tensor:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                output = self._function(n, length)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log.info("no CUDA graph of this model's steps (%s): they run kernel by kernel", str(error).splitlines()[0])
            self._captures = False
            return self._function(n, length)
        self._graphs[n, length] = graph, output
        graph.replay()  # capturing computes nothing
        return output
