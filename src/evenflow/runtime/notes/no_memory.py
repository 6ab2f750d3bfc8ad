"""How torch, CUDA and the host say that there is no memory left."""

import errno

import torch

# Plain RuntimeErrors, of the CPU's allocator and of CUDA's libraries.
_PHRASES = ("DefaultCPUAllocator: can't allocate", "DefaultCPUAllocator: not enough memory")
_CUDA_PHRASES = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a GPU or on the host.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(ValueError("memory"))
    (True, False)
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = str(error) if isinstance(error, RuntimeError) else ""
    known = any(phrase in said for phrase in (*_PHRASES, *_CUDA_PHRASES))
    return known or isinstance(error, torch.OutOfMemoryError | MemoryError)
