"""Every number of the cost model that no formula gives, with where it comes from.

[pub] published by others, [doc] the maker's documentation, [aot] counted in machine code that
Triton 3.9 makes for sm_90, [code] a decision of this project's code, assumed: nobody has looked. A
measurement on a GPU that disagrees with a prediction points at one of these.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """What a GPU does in a second."""

    name: str
    num_processors: int  # [doc]
    flops_per_s: float  # of the library's product at large sizes, bf16: the floor's rate,
    rate_depth: float  # which holds where products are that deep
    bytes_per_s: float  # of a copy: loaded + stored
    clock_hz: float  # while products run
    l2_bytes: int  # what of a factor stays in the L2 cache between waves


DEVICES = {
    # 42 ms for three products of 8192 x 4096 x 151936 [pub, TRL #7244], whose depths' reciprocals
    # have a mean of 1 / 8052; 90 % of 3.35 TB/s [doc]; clock and share of the 50 MB cache assumed
    "H100": Device("H100", 132, 728e12, 8052, 3.0e12, 1.7e9, 30 << 20),
    # 790 TFLOP/s and 4.3 TB/s [pub, the floors of the project's plan]; the rest as above
    "H200": Device("H200", 132, 790e12, 8052, 4.3e12, 1.7e9, 30 << 20),
}
TENSOR_FLOPS_PER_CLOCK = 4096  # of a processor, bf16 [doc: 989 TFLOP/s = 132 x 4096 x 1.83 GHz]
SCHEDULERS = 4  # of a processor: each issues one instruction of one warp a clock [doc]
CLOCKS_PER_MUFU = 8  # a warp's exponentials take a scheduler's unit that long [doc: 16 / clock]

# --- the head's kernels


@dataclass(frozen=True)
class HeadKernel:
    """One design of the kernel that makes the exponentials: tiles of 128 x 256, 64 deep."""

    name: str
    instructions: int  # of a warp and tile, outside the products
    exponentials: int  # MUFU.EX2 among them
    num_warps: int  # that run them
    product_rate: float  # of the products, relative to the library's
    hidden_steps: int  # of depth that the next tile's products may run beside them
    groups_rows: bool  # row tiles take turns in groups whose X stays in the L2 cache


# Before the first and after the last HGMMA of `_head_kernel`, D = 3584, V = 152064, with its store
# [aot]: 381 + 1,890 instructions, 255 registers. It loads by pointers: descriptors are 13 % faster
# [pub, triton #5461].
TODAY = HeadKernel("today", 2271, 128, 8, 1 / 1.13, 0, False)
# 413 + 1,241, without a maximum, 182 registers [aot, after item 2]; the rest as today
NO_MAXIMUM = HeadKernel("no row maximum", 1654, 128, 8, 1 / 1.13, 0, False)
# TMA and warp specialisation: a producer and two consumers, which may drift apart by the four
# stages they share, so that one's exponentials run beside the other's products (assumed); 989
# instructions from a tile's last product to the next tile's first [aot, after item 3: 232 registers
# for a consumer]. Products at 640 / 646 of cuBLAS [pub, the same tutorial's persistent kernel].
SPECIALISED = HeadKernel("TMA, warp specialised", 989, 128, 8, 640 / 646, 4 * 64, True)
# QuACK's product, two tiles in turn ("pingpong"): the exponentials of one run beside the other's
# products for as long as those take. Its speed with another epilogue than its own is assumed.
LIBRARY_EPILOGUE = HeadKernel("library product", 989, 128, 8, 1.0, 1 << 30, True)
GROUP_BYTES = 12 << 20  # of X, where row tiles take turns in groups [code, item 3]

# Today's combine: a thread for each row walks its tiles, 0.09 ms for 594 of them; and a redo
# launch of which every program exits, 0.1 ms for 11,286 [est, from latencies: nobody measured].
COMBINE_S_PER_TILE = 0.09e-3 / 594
REDO_S_PER_PROGRAM = 0.1e-3 / 11286
# Between two dependent launches of one stream the processors idle that long (assumed).
LAUNCH_S = 3e-6
LAUNCHES = {"today": 6, "new": 7}  # of a piece: label, head, combine, redo; c X, dX's scaling
LAUNCHES_OF_A_CALL = 15  # the objective, copies of inputs, zeros, backward's scaling (assumed)

# --- peers, of the floor of 6 N D V [est], for the text

PEERS = {"Liger SM90, 8 N D V": 1.34, "QuACK, a scalar loss alone, 6 N D V": 1.0}

# --- dW added in memory (`weight_triton.py`)

# Not specialised, but by TMA and flattened: assumed of the library's rate; 154 registers [aot].
REDUCE_ADD_RATE = 0.92
