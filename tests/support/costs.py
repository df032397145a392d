"""Costs of code: FLOPs including attention, operations, and memory saved for the backward pass."""

from collections.abc import Callable
from unittest import mock

import torch
from small import encode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

VIEWS = {
    *("_unsafe_view", "alias", "as_strided", "detach", "expand", "narrow", "permute", "select", "slice", "split"),
    *("split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "view_as_complex"),
}


class Operations(TorchDispatchMode):
    """Records the `names` of all operations except views, and the number of elements of the `largest` new tensor."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.names += [name] if name not in VIEWS else []
        given = {
            each.untyped_storage().data_ptr()
            for each in (*args, *(kwargs or {}).values())
            if isinstance(each, torch.Tensor)
        }
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.numel())
        return out


def attention_by_product(q, k, v, attn_mask=None, is_causal=False, dropout_p=0.0):
    """Attention by matrix products. The FLOP counter misses the fused kernel on a CPU."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    return scores.softmax(-1) @ v


def flops(run: Callable[[], object]) -> int:
    """FLOPs of a call without gradients."""
    with (
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attention_by_product),
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
    ):
        run()
    return counter.get_total_flops()


def saved_elements(run):
    """Number of elements that a call saves for the backward pass; a shared storage counts once."""
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return sum(found.values())


def all_steps(model, tokens, labels=None, order=None, *, condition=None):
    """Logits `(B, N, V)` on `tokens` by cached steps, in an order (default: the model's own)."""
    path, blocks = model.to_partition(order)
    walked = tokens.flatten(1).gather(1, path.expand(len(tokens), -1)).split(blocks, 1)
    state = model.start(encode(model, len(tokens), labels, condition), order)
    return torch.cat([model.next_logits(state, last) for last in (None, *walked[:-1])], 1)
