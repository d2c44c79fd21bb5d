"""Weights cut over the ranks (FSDP2, ``fully_shard``), for full fine-tuning of models that one device cannot hold.

Without it every rank holds four models, two of them with gradients and AdamW's moments in fp32: 40 bytes a parameter.
Cut over N ranks that is 40 / N, and whole weights are there only while they are used: a decoder layer's during its
forward and backward, those of the embedding and the head from the hidden states to the end of the backward. The fused
ops therefore read the head as a plain tensor after the hidden states were computed, and its gradient is reduced with
the others'; gathering it a second time (``srppo_kernels.parallel.full_head``) would be for heads that no forward
gathers.

Gradients are summed over ranks by FSDP's reduce-scatter in each backward, not averaged: losses are divided by the token
count of all ranks already. The critic's value head is small, whole on every rank, and summed as without sharding.

Every forward is a collective: all ranks do as many (:func:`srppo.ppo.split_micro_batches`). Sampling would be one per
token; instead the policy is gathered whole for the length of a rollout (:func:`whole`), 4 bytes a parameter.

Each rank loads its models whole before they are cut, and LoRA is not sharded: its base is frozen and shared by all
roles, with ``dtype=bfloat16`` 2 bytes a parameter.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from srppo import distributed
from srppo.errors import UserError
from srppo.models import trunk_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from srppo.roles import Roles


def require_ranks(*, adapters: bool) -> None:
    """Stops where there is nothing to cut.

    Raises:
        UserError: there is one process, or adapters are what learns.
    """
    if distributed.size() == 1:
        raise UserError("fsdp cuts weights over processes, and there is one: launch with torchrun, or leave it out")
    if adapters:
        raise UserError("fsdp is for full fine-tuning (use_peft=false): with LoRA all roles share one frozen model")


def shard_roles(roles: Roles) -> None:
    """Cuts the models of all roles, in place; optimizers are made after this.

    Raises:
        UserError: there is one process, the roles share a model (LoRA), or a model does not say what its layers are.
    """
    models = [role.causal_lm for role in roles]
    require_ranks(adapters=len({id(model) for model in models}) < len(models))
    for model in models:
        shard(model)


def shard(model: PreTrainedModel) -> None:
    """Cuts a transformers model: each decoder layer apart, what is outside of them together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    layers = [module for module in model.modules() if type(module).__name__ in set(model._no_split_modules or ())]
    if not layers:
        raise UserError(f"fsdp: {type(model).__name__} does not say which of its modules are layers")
    mesh = init_device_mesh(model.device.type, (distributed.size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)

    def states(self: PreTrainedModel, **inputs: Any) -> Tensor:
        hidden: Tensor = trunk_of(self)(**inputs).last_hidden_state
        return hidden

    model.states = types.MethodType(states, model)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "states")  # gathers embedding and head, which calling base_model would not
    for part in parts(model):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # a plain sum: what gloo can do


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "set_reshard_after_forward")


def parts(model: nn.Module) -> list[Any]:
    """The model and its layers, each of which is gathered and let go as one."""
    return [module for module in model.modules() if is_sharded(module)]


def states_of(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """The last hidden states, ``[B, T, D]``."""
    forward: Any = model.states if is_sharded(model) else None
    states: Tensor = forward(**inputs) if forward is not None else trunk_of(model)(**inputs).last_hidden_state
    return states


def release(model: nn.Module) -> None:
    """Lets go of the embedding and the head, where a forward without a backward left them whole."""
    if is_sharded(model):
        model.reshard()  # type: ignore[operator]


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """All weights gathered on every rank for the length of the block, in which a forward is no collective."""
    gathered = parts(model) if is_sharded(model) else []
    try:
        for part in gathered:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        yield
    finally:
        for part in gathered:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


# -- tensors ----------------------------------------------------------------------------------------------------------


def is_cut(tensor: Any) -> bool:
    return type(tensor).__name__ == "DTensor"


def gathered(value: Any) -> Any:
    """A tensor put together from all ranks, on the CPU; collective. What is not cut comes back as it is."""
    return value.full_tensor().cpu() if is_cut(value) else value


def cut_like(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, cut as ``like`` is."""
    if not is_cut(like) or is_cut(value) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    return distribute_tensor(value.to(mesh.device_type), mesh, like.placements)  # type: ignore[attr-defined]


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The state dict of a sharded model, put together, for ``save_pretrained``; None where the model is not sharded."""
    if not is_sharded(model):
        return None
    made: dict[int, Tensor] = {}  # tied weights stay one tensor
    return {
        name: made.setdefault(local(value).data_ptr(), gathered(value)) for name, value in model.state_dict().items()
    }


def whole_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state with whole tensors."""
    state = optimizer.state_dict()
    moments = {i: {name: gathered(v) for name, v in of.items()} for i, of in state["state"].items()}
    return {**state, "state": moments}


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Puts back what :func:`whole_optimizer` gave."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        i: {name: cut_like(v, parameters[i]) if isinstance(v, Tensor) else v for name, v in of.items()}
        for i, of in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def local(tensor: Any) -> Tensor:
    """What this rank has of a tensor."""
    own: Tensor = tensor.to_local() if is_cut(tensor) else tensor
    return own


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """``clip_grad_norm_`` for gradients of which some are cut over the ranks; returns the norm of the whole before."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(map(is_cut, gradients)):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    squares = torch.zeros(2, dtype=torch.float64, device=gradients[0].device)
    for gradient in gradients:
        squares[int(is_cut(gradient))] += local(gradient).double().square().sum()
    norm = (squares[0] + distributed.summed(squares[1])).sqrt().item()
    factor = min(max_norm / (norm + 1e-6), 1.0)
    for gradient in gradients:
        local(gradient).mul_(factor)
    return norm
