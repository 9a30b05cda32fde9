"""The rollout as one launch: a program keeps one block of paths of one member through all steps.

States and products are laid out (features, paths), so that weights are the left operand, whose rows tensor cores
spread over warps: every warp holds its own rows and none is kept twice. Features are padded to powers of two with
zeros, which stay zero: a padded hidden unit has new gate 0 and state 0, a padded latent has mean 0 and noise 0.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    return 2.0 * _sigmoid(2.0 * x) - 1.0


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _matrix(base, first, M, rows, K, columns, stride):
    """Weights [rows, columns] of a matrix with M rows from `first` on and K columns; 0 outside."""
    at = base + (first + rows)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=(rows < M)[:, None] & (columns < K)[None, :], other=0.0)


@triton.jit
def _column(base, M, rows):
    return tl.load(base + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _known(base, M, rows, paths, stride, mask):
    """Values [rows, paths] given for every path (`stride` 0: the same ones)."""
    return tl.load(base + paths[None, :] * stride + rows[:, None], mask=(rows < M)[:, None] & mask[None, :], other=0.0)


@triton.jit
def _keep(base, M, rows, paths, x, mask):
    tl.store(base + paths[None, :] * M + rows[:, None], x, mask=(rows < M)[:, None] & mask[None, :])


@triton.jit
def _dot(weight, x, total, PRECISION: tl.constexpr):
    return tl.dot(weight, x.to(weight.dtype), total, input_precision=PRECISION)


@triton.jit
def _new_hidden(reset, update, new_in, new_hidden, h):
    new = _tanh(new_in + _sigmoid(reset) * new_hidden)
    return new + _sigmoid(update) * (h - new)


@triton.jit
def rollout_resident(
    gates, w_ih, w_hh, b_hh, w_prior, b_prior, w_head, b_head, h0, z0, eps, outputs, h_out, z_out, scratch,
    steps, members, paths, input_width, gate_step, gate_member, gate_path, min_std,
    H: tl.constexpr, Z: tl.constexpr, O: tl.constexpr, HP: tl.constexpr, ZP: tl.constexpr, OP: tl.constexpr,  # noqa: E741
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All weights are loaded before the first step and stay in registers and shared memory."""
    member = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = p < paths
    i, j, k = tl.arange(0, HP), tl.arange(0, ZP), tl.arange(0, OP)
    w_ih += member * 3 * H * input_width
    w_hh += member * 3 * H * H
    w_prior += member * 2 * Z * H
    w_head += member * O * (H + Z)
    w_rz = _matrix(w_ih, 0, H, i, Z, j, input_width)
    w_uz = _matrix(w_ih, H, H, i, Z, j, input_width)
    w_nz = _matrix(w_ih, 2 * H, H, i, Z, j, input_width)
    w_rh = _matrix(w_hh, 0, H, i, H, i, H)
    w_uh = _matrix(w_hh, H, H, i, H, i, H)
    w_nh = _matrix(w_hh, 2 * H, H, i, H, i, H)
    w_mean = _matrix(w_prior, 0, Z, j, H, i, H)
    w_raw = _matrix(w_prior, Z, Z, j, H, i, H)
    w_oh = _matrix(w_head, 0, O, k, H, i, H + Z)
    w_oz = _matrix(w_head + H, 0, O, k, Z, j, H + Z)
    b_nh = _column(b_hh + member * 3 * H + 2 * H, H, i)
    b_mean = _column(b_prior + member * 2 * Z, Z, j)
    b_raw = _column(b_prior + member * 2 * Z + Z, Z, j)
    b_out = _column(b_head + member * O, O, k)
    h = _known(h0 + member * paths * H, H, i, p, H, real)
    z = _known(z0 + member * paths * Z, Z, j, p, Z, real)
    gates += member * gate_member
    eps += member * paths * Z
    outputs += member * paths * O
    none_h = tl.zeros([HP, BLOCK], tl.float32)
    for _ in range(steps):
        noise = _known(eps, Z, j, p, Z, real)
        reset = _known(gates, H, i, p, gate_path, real)
        update = _known(gates + H, H, i, p, gate_path, real)
        new_in = _known(gates + 2 * H, H, i, p, gate_path, real)
        reset = _dot(w_rh, h, _dot(w_rz, z, reset, PRECISION), PRECISION)
        update = _dot(w_uh, h, _dot(w_uz, z, update, PRECISION), PRECISION)
        new_in = _dot(w_nz, z, new_in, PRECISION)
        h = _new_hidden(reset, update, new_in, _dot(w_nh, h, none_h + b_nh, PRECISION), h)
        mean = _dot(w_mean, h, tl.zeros([ZP, BLOCK], tl.float32) + b_mean, PRECISION)
        raw = _dot(w_raw, h, tl.zeros([ZP, BLOCK], tl.float32) + b_raw, PRECISION)
        z = mean + (_softplus(raw) + min_std) * noise
        out = _dot(w_oh, h, tl.zeros([OP, BLOCK], tl.float32) + b_out, PRECISION)
        _keep(outputs, O, k, p, _dot(w_oz, z, out, PRECISION), real)
        gates += gate_step
        eps += members * paths * Z
        outputs += members * paths * O
    _keep(h_out + member * paths * H, H, i, p, h, real)
    _keep(z_out + member * paths * Z, Z, j, p, z, real)


@triton.jit
def rollout_streaming(
    gates, w_ih, w_hh, b_hh, w_prior, b_prior, w_head, b_head, h0, z0, eps, outputs, h_out, z_out, scratch,
    steps, members, paths, input_width, gate_step, gate_member, gate_path, min_std,
    H: tl.constexpr, Z: tl.constexpr, O: tl.constexpr, HP: tl.constexpr, ZP: tl.constexpr, OP: tl.constexpr,  # noqa: E741
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights are read again in every step, `CHUNK` by `CHUNK` of them at a time, from L2.

    Two copies of the state take turns in `scratch`, (programs, 2, BLOCK, H): the units of a step are computed from one
    and written into the other, and a barrier stands between the last write and the first read.
    """
    member = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = p < paths
    j, k, lane = tl.arange(0, ZP), tl.arange(0, OP), tl.arange(0, BLOCK)
    every = lane < BLOCK
    w_ih += member * 3 * H * input_width
    w_hh += member * 3 * H * H
    w_prior += member * 2 * Z * H
    w_head += member * O * (H + Z)
    b_nh = b_hh + member * 3 * H + 2 * H
    b_mean = _column(b_prior + member * 2 * Z, Z, j)
    b_raw = _column(b_prior + member * 2 * Z + Z, Z, j)
    b_out = _column(b_head + member * O, O, k)
    old = scratch + (member * tl.num_programs(1) + tl.program_id(1)) * 2 * BLOCK * H
    fresh = old + BLOCK * H
    z = _known(z0 + member * paths * Z, Z, j, p, Z, real)
    h0 += member * paths * H
    for start in range(0, HP, CHUNK):
        i = start + tl.arange(0, CHUNK)
        _keep(old, H, i, lane, _known(h0, H, i, p, H, real), every)
    tl.debug_barrier()
    gates += member * gate_member
    eps += member * paths * Z
    outputs += member * paths * O
    for _ in range(steps):
        noise = _known(eps, Z, j, p, Z, real)
        for first in range(0, HP, CHUNK):
            i = first + tl.arange(0, CHUNK)
            reset = _known(gates, H, i, p, gate_path, real)
            update = _known(gates + H, H, i, p, gate_path, real)
            new_in = _known(gates + 2 * H, H, i, p, gate_path, real)
            reset = _dot(_matrix(w_ih, 0, H, i, Z, j, input_width), z, reset, PRECISION)
            update = _dot(_matrix(w_ih, H, H, i, Z, j, input_width), z, update, PRECISION)
            new_in = _dot(_matrix(w_ih, 2 * H, H, i, Z, j, input_width), z, new_in, PRECISION)
            new_h = tl.zeros([CHUNK, BLOCK], tl.float32) + _column(b_nh, H, i)
            for start in range(0, HP, CHUNK):
                c = start + tl.arange(0, CHUNK)
                h = _known(old, H, c, lane, H, every)
                reset = _dot(_matrix(w_hh, 0, H, i, H, c, H), h, reset, PRECISION)
                update = _dot(_matrix(w_hh, H, H, i, H, c, H), h, update, PRECISION)
                new_h = _dot(_matrix(w_hh, 2 * H, H, i, H, c, H), h, new_h, PRECISION)
            h = _known(old, H, i, lane, H, every)
            _keep(fresh, H, i, lane, _new_hidden(reset, update, new_in, new_h, h), every)
        tl.debug_barrier()
        old, fresh = fresh, old
        mean = tl.zeros([ZP, BLOCK], tl.float32) + b_mean
        raw = tl.zeros([ZP, BLOCK], tl.float32) + b_raw
        out = tl.zeros([OP, BLOCK], tl.float32) + b_out
        for start in range(0, HP, CHUNK):
            c = start + tl.arange(0, CHUNK)
            h = _known(old, H, c, lane, H, every)
            mean = _dot(_matrix(w_prior, 0, Z, j, H, c, H), h, mean, PRECISION)
            raw = _dot(_matrix(w_prior, Z, Z, j, H, c, H), h, raw, PRECISION)
            out = _dot(_matrix(w_head, 0, O, k, H, c, H + Z), h, out, PRECISION)
        z = mean + (_softplus(raw) + min_std) * noise
        _keep(outputs, O, k, p, _dot(_matrix(w_head + H, 0, O, k, Z, j, H + Z), z, out, PRECISION), real)
        gates += gate_step
        eps += members * paths * Z
        outputs += members * paths * O
    h_out += member * paths * H
    for start in range(0, HP, CHUNK):
        i = start + tl.arange(0, CHUNK)
        _keep(h_out, H, i, p, _known(old, H, i, lane, H, every), real)
    _keep(z_out + member * paths * Z, Z, j, p, z, real)
