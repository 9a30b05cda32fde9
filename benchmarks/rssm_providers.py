"""Everyone who can do the rollout, each made ready for one case: () -> (outputs_TEPO, h_EPH, z_EPZ)."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType

import torch
from scale_kernels.rssm import RssmWeights, rollout
from scale_kernels.rssm.cpu import rollout_cpu
from scale_kernels.rssm.reference import gru, heads, rollout_reference
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from benchmarks.rssm_work import Given

Results = tuple[Tensor, ...]
Ready = Callable[[], Results]


def reference(given: Given) -> Ready:
    """The plain loop, as training runs it."""
    return lambda: rollout_reference(*given)


def scale(given: Given) -> Ready:
    """The op: on a CPU its torch path, on a GPU the Triton kernel."""
    return lambda: rollout(*given)


def scale_bf16(given: Given) -> Ready:
    """The kernel with bf16 weights."""
    return scale((given[0].to(torch.bfloat16), *given[1:]))


def compiled(given: Given) -> Ready:
    """torch.compile of one step in a Python loop; on a GPU with CUDA graphs ("reduce-overhead").

    There results of a step lie in memory that the next one reuses, so they are cloned.
    """
    weights, h0_EPH, z0_EPZ, actions, eps_TEPZ = given
    on_gpu = h0_EPH.is_cuda
    own = FunctionType(_step.__code__.replace(), _step.__globals__)  # or all shapes would share one cache of 8 entries
    step = torch.compile(own, fullgraph=True, dynamic=False, mode="reduce-overhead" if on_gpu else None)

    def run() -> Results:
        h_EPH, z_EPZ, outputs = h0_EPH, z0_EPZ, []
        for action, eps_EPZ in zip(actions, eps_TEPZ, strict=True):
            results = step(weights, h_EPH, z_EPZ, action, eps_EPZ)
            out_EPO, h_EPH, z_EPZ = (x.clone() for x in results) if on_gpu else results
            outputs.append(out_EPO)
        return torch.stack(outputs), h_EPH, z_EPZ

    return run


def _step(
    weights: RssmWeights, h_EPH: Tensor, z_EPZ: Tensor, action: Tensor, eps_EPZ: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    h_EPH = gru(weights, h_EPH, z_EPZ, action)
    prior_EPQ = h_EPH @ weights.prior_weight.mT + weights.prior_bias[:, None]
    mean_EPZ, raw_EPZ = prior_EPQ.chunk(2, -1)
    z_EPZ = mean_EPZ + (softplus(raw_EPZ) + weights.min_std) * eps_EPZ
    return heads(weights, h_EPH, z_EPZ), h_EPH, z_EPZ


def graph_grucell(given: Given) -> Ready:
    """torch.nn.GRUCell member by member, the whole horizon in one CUDA graph."""
    return _captured(lambda: grucell_loop(given))


def graph_batched(given: Given) -> Ready:
    """The CPU path's batched products, the whole horizon in one CUDA graph."""
    return _captured(lambda: rollout_cpu(*given))


def _captured(work: Ready) -> Ready:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()

    def run() -> Results:
        graph.replay()
        return results

    return run


def grucell_loop(given: Given) -> Results:
    """torch's fused cell, one member after the other in every step."""
    w, h0_EPH, z0_EPZ, actions, eps_TEPZ = given
    T, E, P, _ = eps_TEPZ.shape
    h, z = list(h0_EPH.unbind()), list(z0_EPZ.unbind())
    outputs_TEPO = eps_TEPZ.new_empty(T, E, P, w.outputs)
    for t in range(T):
        for e in range(E):
            action = actions[t].expand(P, -1) if actions.ndim == 2 else actions[t, e]
            x = torch.cat((z[e], action), -1)
            h[e] = torch.gru_cell(x, h[e], w.w_ih[e], w.w_hh[e], w.b_ih[e], w.b_hh[e])
            mean, raw = linear(h[e], w.prior_weight[e], w.prior_bias[e]).chunk(2, -1)
            z[e] = torch.addcmul(mean, softplus(raw) + w.min_std, eps_TEPZ[t, e])
            outputs_TEPO[t, e] = linear(torch.cat((h[e], z[e]), -1), w.head_weight[e], w.head_bias[e])
    return outputs_TEPO, torch.stack(h), torch.stack(z)


def known_inputs(given: Given, latents_TEPZ: Tensor, kind: type[nn.GRU] | type[nn.LSTM]) -> tuple[Ready, Ready]:
    """cuDNN over inputs that are all known beforehand, one network per member: an easier task, the recurrence alone.

    Returns the runner of hidden states (T, E, P, H) and the same networks in float64 on the CPU. A GRU holds the
    members' weights, an LSTM its own.
    """
    weights, h0_EPH, z0_EPZ, actions, _ = given
    T, E, P, _ = latents_TEPZ.shape
    shown = actions[:, None, None].expand(T, E, P, -1) if actions.ndim == 2 else actions
    before = torch.cat((z0_EPZ[None], latents_TEPZ[:-1]))
    x_TEPI = torch.cat((before, shown), -1)
    nets = [kind(x_TEPI.shape[-1], weights.hidden, dtype=torch.float64) for _ in range(E)]
    if kind is nn.GRU:
        for e, net in enumerate(nets):
            for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
                torch_name = f"{'weight' if name[0] == 'w' else 'bias'}_{name[2:]}_l0"
                getattr(net, torch_name).data.copy_(getattr(weights, name)[e])

    def runner(device: torch.device, dtype: torch.dtype) -> Ready:
        ours = [kind(net.input_size, net.hidden_size, device=device, dtype=dtype) for net in nets]
        for mine, net in zip(ours, nets, strict=True):
            mine.load_state_dict(net.state_dict())
        inputs, h0 = x_TEPI.to(device, dtype), h0_EPH.to(device, dtype)
        starts = [h[None] if kind is nn.GRU else (h[None], torch.zeros_like(h)[None]) for h in h0]
        columns = [inputs[:, e].contiguous() for e in range(E)]
        return lambda: (torch.stack([net(x, s)[0] for net, x, s in zip(ours, columns, starts, strict=True)], 1),)

    return runner(h0_EPH.device, h0_EPH.dtype), runner(torch.device("cpu"), torch.float64)


ON_CPU = {"reference": reference, "scale": scale, "compiled": compiled}
ON_GPU = {**ON_CPU, "scale_bf16": scale_bf16, "graph_grucell": graph_grucell, "graph_batched": graph_batched}
KNOWN_INPUTS = {"cudnn_gru": nn.GRU, "cudnn_lstm": nn.LSTM}
