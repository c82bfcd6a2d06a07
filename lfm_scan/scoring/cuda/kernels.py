"""Triton kernels of LFM's forward pass: from uint8 pixels to logits in five launches.

    npr_conv_pool   uint8 -> NPR -> layer1 -> max-pool        the 255x255x64 map is never written
    conv_pool       layer2 and layer3 with their max-pool     the conv maps are never written
    conv_project    layer4 and the 1x1 projection             the 30x30x512 map is never written
    topk_head       top-k pooling and the linear head         no sort

Maps are channels-last, (B, H, W, C), in the precision of the weights; products are summed in fp32. Every row of a
product depends on its own row of the input alone, and each image's top values are summed by one program: a logit
does not depend on its neighbours in a batch.

ReLU and bias come after the max-pool: both are monotone and the bias is one number a channel, so the maximum may be
taken first. LIMIT is the largest number of the precision: values past it saturate, as an infinity would end in NaN.

Importing this needs Triton, and TRITON_INTERPRET=1 in the environment before runs the kernels on a CPU.
"""

# The language of kernels has its own types, and its arguments are named as its users write them.
# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator,no-untyped-def,no-untyped-call,misc"
# ruff: noqa: ANN001, D417, N803, N806, PLR0917

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def npr_conv_pool(
    pixels_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """NPR, conv 2x2 from 3 channels, max-pool 2x2, bias, ReLU.

    A pooling window reads 3x3 pixels, of which the corners are top-left pixels of their blocks, where NPR is 0. The
    other five pixels' 15 values, and a zero, are one row of a product with the weights of each of the four outputs.

    Args:
        pixels_ptr: (B, HEIGHT, WIDTH, 3) uint8.
        weight_ptr: (4, 16, CHANNELS): output of the window, value, channel; for values of NPR * 255 / 256.
        bias_ptr: (CHANNELS,) fp32.
        out_ptr: (num_rows, CHANNELS), rows B * (HEIGHT - 1) // 2 * (WIDTH - 1) // 2.
    """
    OUT_HEIGHT: tl.constexpr = (HEIGHT - 1) // 2
    OUT_WIDTH: tl.constexpr = (WIDTH - 1) // 2
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    kept = tl.minimum(rows, num_rows - 1)
    image = kept // (OUT_HEIGHT * OUT_WIDTH)
    place = kept % (OUT_HEIGHT * OUT_WIDTH)
    top_left = ((place // OUT_WIDTH) * WIDTH + place % OUT_WIDTH) * 6
    base = image.to(tl.int64) * (HEIGHT * WIDTH * 3) + top_left

    values = tl.arange(0, 16)
    pixel = values // 3  # of the window, from the top: (0, 1), (1, 0), (1, 1), (1, 2), (2, 1)
    dy = tl.where(pixel == 0, 0, tl.where(pixel >= 4, 2, 1))
    dx = tl.where((pixel == 0) | (pixel >= 4), 1, pixel - 1)
    offset = (dy * WIDTH + dx) * 3 + values % 3
    corner = ((dy // 2 * 2) * WIDTH + dx // 2 * 2) * 3 + values % 3
    used = (values < 15)[None, :]
    x = tl.load(pixels_ptr + base[:, None] + offset[None, :], mask=used, other=0).to(tl.int32)
    x_corner = tl.load(pixels_ptr + base[:, None] + corner[None, :], mask=used, other=0).to(tl.int32)
    # Whole numbers up to 255 have 8 bits, and dividing by 256 moves the exponent: exact in bf16 as in fp16.
    npr = (tl.abs(x - x_corner).to(tl.float32) * 0.00390625).to(weight_ptr.dtype.element_ty)

    channels = tl.arange(0, CHANNELS)
    weight_ptrs = weight_ptr + values[:, None] * CHANNELS + channels[None, :]
    best = tl.dot(npr, tl.load(weight_ptrs))
    for output in tl.static_range(1, 4):
        best = tl.maximum(best, tl.dot(npr, tl.load(weight_ptrs + output * 16 * CHANNELS)))
    best = tl.minimum(tl.maximum(best + tl.load(bias_ptr + channels)[None, :], 0.0), LIMIT)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * CHANNELS + channels[None, :]
    tl.store(out_ptrs, best.to(out_ptr.dtype.element_ty), mask=(rows < num_rows)[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def conv_pool(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    IN_CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    QUAD: tl.constexpr,
) -> None:
    """Conv 2x2, max-pool 2x2, bias, ReLU, as an implicit matrix product.

    The four outputs of a pooling window are either four products with the same weights, whose maximum is taken
    register by register (QUAD), or four neighbouring rows of one product, whose maximum is taken across threads.

    Args:
        x_ptr: (B, HEIGHT, WIDTH, IN_CHANNELS).
        weight_ptr: (4 * IN_CHANNELS, OUT_CHANNELS): taps in the order (0, 0), (0, 1), (1, 0), (1, 1), then channels.
        bias_ptr: (OUT_CHANNELS,) fp32.
        out_ptr: (num_rows, OUT_CHANNELS), rows B * (HEIGHT - 1) // 2 * (WIDTH - 1) // 2.
        BLOCK_M: Pooled rows a program.
    """
    OUT_HEIGHT: tl.constexpr = (HEIGHT - 1) // 2
    OUT_WIDTH: tl.constexpr = (WIDTH - 1) // 2
    STEPS_PER_TAP: tl.constexpr = IN_CHANNELS // BLOCK_K
    NUM_BLOCKS_N: tl.constexpr = OUT_CHANNELS // BLOCK_N
    # Programs that share rows of the input run next to each other and find it in the L2 cache.
    first_row = tl.program_id(0) // NUM_BLOCKS_N * BLOCK_M
    channels = tl.program_id(0) % NUM_BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + depth[:, None] * OUT_CHANNELS + channels[None, :]

    if QUAD:
        kept = tl.minimum(first_row + tl.arange(0, BLOCK_M), num_rows - 1)
        place = kept % (OUT_HEIGHT * OUT_WIDTH)
        window = (place // OUT_WIDTH) * 2 * WIDTH + place % OUT_WIDTH * 2
        position = (kept // (OUT_HEIGHT * OUT_WIDTH)).to(tl.int64) * (HEIGHT * WIDTH) + window
        x_ptrs = x_ptr + position[:, None] * IN_CHANNELS + depth[None, :]
        acc_00 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc_01 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc_10 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc_11 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(4 * STEPS_PER_TAP):
            tap = step // STEPS_PER_TAP
            tap_ptrs = x_ptrs + (tap // 2 * WIDTH + tap % 2) * IN_CHANNELS + step % STEPS_PER_TAP * BLOCK_K
            weight = tl.load(weight_ptrs + step * BLOCK_K * OUT_CHANNELS)
            acc_00 = tl.dot(tl.load(tap_ptrs), weight, acc_00)
            acc_01 = tl.dot(tl.load(tap_ptrs + IN_CHANNELS), weight, acc_01)
            acc_10 = tl.dot(tl.load(tap_ptrs + WIDTH * IN_CHANNELS), weight, acc_10)
            acc_11 = tl.dot(tl.load(tap_ptrs + (WIDTH + 1) * IN_CHANNELS), weight, acc_11)
        best = tl.maximum(tl.maximum(acc_00, acc_01), tl.maximum(acc_10, acc_11))
    else:
        lines = tl.arange(0, 4 * BLOCK_M)
        kept = tl.minimum(first_row + lines // 4, num_rows - 1)
        place = kept % (OUT_HEIGHT * OUT_WIDTH)
        window = (place // OUT_WIDTH * 2 + lines % 4 // 2) * WIDTH + place % OUT_WIDTH * 2 + lines % 2
        position = (kept // (OUT_HEIGHT * OUT_WIDTH)).to(tl.int64) * (HEIGHT * WIDTH) + window
        x_ptrs = x_ptr + position[:, None] * IN_CHANNELS + depth[None, :]
        acc = tl.zeros((4 * BLOCK_M, BLOCK_N), tl.float32)
        for step in range(4 * STEPS_PER_TAP):
            tap = step // STEPS_PER_TAP
            shift = (tap // 2 * WIDTH + tap % 2) * IN_CHANNELS + step % STEPS_PER_TAP * BLOCK_K
            acc = tl.dot(tl.load(x_ptrs + shift), tl.load(weight_ptrs + step * BLOCK_K * OUT_CHANNELS), acc)
        best = tl.max(tl.reshape(acc, (BLOCK_M, 4, BLOCK_N)), axis=1)

    best = tl.minimum(tl.maximum(best + tl.load(bias_ptr + channels)[None, :], 0.0), LIMIT)
    rows = first_row + tl.arange(0, BLOCK_M)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * OUT_CHANNELS + channels[None, :]
    tl.store(out_ptrs, best.to(out_ptr.dtype.element_ty), mask=(rows < num_rows)[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def conv_project(
    x_ptr,
    weight_ptr,
    bias_ptr,
    projection_ptr,
    out_ptr,
    num_rows,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    IN_CHANNELS: tl.constexpr,
    MID_CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Conv 2x2, bias, ReLU, then a 1x1 conv without bias, BLOCK_N of the channels between them at a time.

    Args:
        x_ptr: (B, HEIGHT, WIDTH, IN_CHANNELS).
        weight_ptr: (4 * IN_CHANNELS, MID_CHANNELS), rows as in `conv_pool`.
        bias_ptr: (MID_CHANNELS,) fp32.
        projection_ptr: (MID_CHANNELS, OUT_CHANNELS).
        out_ptr: (num_rows, OUT_CHANNELS) fp32, rows B * (HEIGHT - 1) * (WIDTH - 1).
    """
    OUT_HEIGHT: tl.constexpr = HEIGHT - 1
    OUT_WIDTH: tl.constexpr = WIDTH - 1
    STEPS_PER_TAP: tl.constexpr = IN_CHANNELS // BLOCK_K
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    kept = tl.minimum(rows, num_rows - 1)
    place = kept % (OUT_HEIGHT * OUT_WIDTH)
    window = (place // OUT_WIDTH) * WIDTH + place % OUT_WIDTH
    position = (kept // (OUT_HEIGHT * OUT_WIDTH)).to(tl.int64) * (HEIGHT * WIDTH) + window
    depth = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + position[:, None] * IN_CHANNELS + depth[None, :]
    projected = tl.arange(0, OUT_CHANNELS)
    total = tl.zeros((BLOCK_M, OUT_CHANNELS), tl.float32)
    for block in range(MID_CHANNELS // BLOCK_N):
        channels = block * BLOCK_N + tl.arange(0, BLOCK_N)
        weight_ptrs = weight_ptr + depth[:, None] * MID_CHANNELS + channels[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(4 * STEPS_PER_TAP):
            tap = step // STEPS_PER_TAP
            shift = (tap // 2 * WIDTH + tap % 2) * IN_CHANNELS + step % STEPS_PER_TAP * BLOCK_K
            acc = tl.dot(tl.load(x_ptrs + shift), tl.load(weight_ptrs + step * BLOCK_K * MID_CHANNELS), acc)
        acc = tl.minimum(tl.maximum(acc + tl.load(bias_ptr + channels)[None, :], 0.0), LIMIT)
        projection = tl.load(projection_ptr + channels[:, None] * OUT_CHANNELS + projected[None, :])
        total = tl.dot(acc.to(projection_ptr.dtype.element_ty), projection, total)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * OUT_CHANNELS + projected[None, :]
    tl.store(out_ptrs, total, mask=(rows < num_rows)[:, None])


@triton.jit
def topk_head(
    map_ptr,
    head_ptr,
    out_ptr,
    head_bias,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Sum of the K largest values of each channel, in descending order, each times its weight. A program an image.

    K times the maximum is taken out: for 16 of 900 that is a fraction of what a sort costs.

    Args:
        map_ptr: (B, POSITIONS, CHANNELS) fp32.
        head_ptr: (CHANNELS, K) fp32.
        out_ptr: (B,) fp32.
        head_bias: Added to every sum.
        BLOCK_P: A power of two, at least POSITIONS.
    """
    image = tl.program_id(0)
    positions = tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for block in range(CHANNELS // BLOCK_C):
        channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
        ptrs = map_ptr + image.to(tl.int64) * (POSITIONS * CHANNELS) + positions[:, None] * CHANNELS + channels[None, :]
        values = tl.load(ptrs, mask=(positions < POSITIONS)[:, None], other=float("-inf"))
        for rank in range(K):
            largest, index = tl.max(values, axis=0, return_indices=True)
            total += largest * tl.load(head_ptr + channels * K + rank)
            values = tl.where(positions[:, None] == index[None, :], float("-inf"), values)
    tl.store(out_ptr + image, tl.sum(total, axis=0) + head_bias)
