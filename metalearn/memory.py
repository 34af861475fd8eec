"""Settings of the process's memory allocator."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory(threshold: int = 2**30) -> bool:
    """Let glibc reuse freed blocks instead of returning each large tensor to the system.

    Otherwise every large activation is a fresh mapping whose pages are faulted in one by one, which costs up to a
    third of a meta-step on CPU. Elsewhere than on glibc nothing is done.

    Args:
        threshold: bytes of free memory at the top of the heap that are kept.

    Returns:
        Whether it was done.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, threshold))
