"""The four roles that models play: base, SFT, policy and critic.

A role is a model and the adapter that must be active in it. With LoRA on an SFT adapter all four share one frozen base,
so the memory is that of one model; with full fine-tuning each is a model of its own. The rest of the trainer sees roles
only, and asks two things of them: the hidden states under a completion, and the head that turns them into logits.

Facts about peft that this file guards against: its own switches set ``requires_grad`` of all adapters, too, so adapters
are switched here (:func:`switched`), and what learns is a list made once; gradient checkpointing runs a forward again
under the adapter that is on by then, so a backward is done before the next one is; LoRA on the head would be invisible
to the fused ops, which read the head's weight, so it is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from srppo import sharding
from srppo.errors import UserError
from srppo.models import (
    Head,
    adapter_base,
    adapter_layers,
    attach_adapter,
    check_adapter,
    check_read_back,
    check_same_vocabulary,
    choose_device,
    disable_dropout,
    first_line,
    freeze,
    from_tokens_alone,
    has_adapter_layers,
    head_of,
    is_adapter_folder,
    is_peft,
    keep_unpacked,
    load_model,
    lora_config,
    merged,
    recompute_activations,
    require_full_precision,
    require_no_float64,
    trunk_of,
    warn_of_another_base,
)
from srppo.packing import Layout, attention_of, layout_of, pack, widest_row, widest_tree
from srppo.prefixes import tree_mask
from srppo_kernels import linear_logprob

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from srppo.config import SRPPOConfig
    from srppo.rollout import Rollout


@dataclass(frozen=True, slots=True)
class Role:
    """A model with the adapter that is active when it plays this role; ``adapter=None`` means with adapters off."""

    name: str
    model: nn.Module  # a transformers causal LM, or a peft model around one
    adapter: str | None = None
    trainable: bool = False
    value_head: nn.Linear | None = None  # of the critic: [D] -> 1, fp32
    layout: Layout = Layout.PADDED  # of the sequences in a forward

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model inside, with the adapter layers in place."""
        model = self.model.get_base_model() if is_peft(self.model) else self.model  # type: ignore[operator]
        return model

    @property
    def source(self) -> str:
        """Where the transformers model was loaded from."""
        return getattr(self.causal_lm.config, "_name_or_path", "") or "a model in memory"

    @property
    def device(self) -> torch.device:
        return self.causal_lm.device

    @property
    def head(self) -> Head:
        """The LM head. Of a sharded model, read it after the hidden states: their forward is what gathers it."""
        head = head_of(self.causal_lm)
        assert not sharding.is_cut(head.weight), "a sharded head is whole only after the hidden states were computed"
        return head

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """The transformers model with this role's adapter on; what was on before comes back at the end.

        Entering the same role again inside costs nothing.
        """
        if not is_peft(self.model):
            try:
                yield self.causal_lm
            finally:
                sharding.release(self.causal_lm)
            return
        on, outer = (self.adapter,), getattr(self.model, "role_on", None)
        if on == outer:
            yield self.causal_lm
            return
        self.model.role_on = on  # type: ignore[assignment]
        try:
            with switched(self.model, self.adapter):
                yield self.causal_lm
        finally:
            self.model.role_on = outer  # type: ignore[assignment]

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """This role's own parameters, by name: its adapter's, or all of a model that it has to itself, and its value
        head."""
        named = list(self.model.named_parameters())
        if is_peft(self.model):
            own = re.compile(rf"\.(lora_\w+|modules_to_save)\.{self.adapter}(\.|$)")
            named = [(name, p) for name, p in named if own.search(name)]
        elif self.value_head is not None:  # a critic never uses the head of its language model
            backbone = {id(p) for p in trunk_of(self.causal_lm).parameters()}
            named = [(name, p) for name, p in named if id(p) in backbone]
        if self.value_head is not None:
            named += [(f"value_head.{name}", p) for name, p in self.value_head.named_parameters()]
        return named

    def hidden(self, rollout: Rollout) -> Tensor:
        """Hidden states that predict ``rollout.tokens``, ``[N, D]``. Call it inside :meth:`active`."""
        touched = hasattr(self.model, "peft_config") and not is_peft(self.model)  # peft leaves the attribute behind
        if touched and has_adapter_layers(self.model):
            raise UserError(
                f"adapters were put into the model that plays {self.name}, by another trainer or SelfReward over the "
                "same object, and they are on: give each of them a model of its own, or folders"
            )
        return self.packed_states(rollout) if self.layout >= Layout.PACKED else self.padded_states(rollout)

    def padded_states(self, rollout: Rollout) -> Tensor:
        states = sharding.states_of(
            self.causal_lm,
            input_ids=rollout.input_ids,
            attention_mask=rollout.attention_mask,
            position_ids=rollout.position_ids,
            use_cache=False,
        )
        return states[rollout.predicting]

    def packed_states(self, rollout: Rollout, *, one_row: bool | None = None) -> Tensor:
        """The same without padding; ``one_row``: all sequences in one row, absent where flash-attn is in use."""
        config = self.causal_lm.config
        attention = attention_of(config)
        packed = pack(
            rollout,
            config.get_text_config().hidden_size,
            one_row="flash" in attention if one_row is None else one_row,
            widest_tree=widest_tree(config) if self.layout == Layout.SHARED else 0,
            widest_row=widest_row(config),
        )
        mask = None if packed.attends is None else tree_mask(packed.attends, self.causal_lm.dtype, attention)
        states = sharding.states_of(
            self.causal_lm,
            input_ids=packed.input_ids,
            attention_mask=mask,
            position_ids=packed.position_ids,
            use_cache=False,
        )
        return states.flatten(0, 1)[packed.predicting]

    def values(self, rollout: Rollout) -> Tensor:
        """The critic's value of every state in which a completion token was taken, ``[N]`` fp32."""
        assert self.value_head is not None, f"{self.name} has no value head"
        return self.value_head(self.hidden(rollout).float()).squeeze(-1)


@contextmanager
def switched(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """One adapter alone is on in a peft model's layers, or none; what was on before comes back, layer by layer.

    peft's own switches go through the parameters of all adapters for their ``requires_grad``, and look through the
    model several times: to an adapter of 210 layers, of three each, and back they take 28 ms of CPU time, to none and
    back 70, and this 3 either way.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = list(adapter_layers(model))
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            tuned = isinstance(layer, BaseTunerLayer)
            if tuned and layer.merged:
                layer.unmerge()
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter] if tuned or adapter in layer.modules_to_save else []
            assert layer.disable_adapters == (adapter is None), "this peft keeps elsewhere what is on"
        yield
    finally:
        for layer, active, disabled in before:
            layer._active_adapter, layer._disable_adapters = active, disabled


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, without dropout; module by module as before outside."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True, slots=True)
class Roles:
    base: Role
    sft: Role
    policy: Role
    critic: Role

    def __iter__(self) -> Iterator[Role]:
        return iter((self.base, self.sft, self.policy, self.critic))

    @torch.no_grad()
    def frozen_bits(self) -> int:
        """The sum of all frozen weights, read as integers: it changes if a bit of one of them does, by all but
        accident. A sharded weight counts with this rank's part."""
        learning = {id(p) for role in (self.policy, self.critic) for _, p in role.parameters()}
        frozen = {id(p): p for role in self for p in role.model.parameters() if id(p) not in learning}
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        parts = [sharding.local(p.detach()) for p in frozen.values()]
        return sum(int(p.contiguous().view(integers[p.itemsize]).sum(dtype=torch.int64)) for p in parts)

    def describe(self) -> list[str]:
        """A line per role: which weights it uses and how many of them learn."""
        lines = []
        for role in self:
            source = role.source
            if is_peft(role.model):
                source += ", adapters off" if role.adapter is None else f", adapter {role.adapter!r}"
            learns = f"{sum(p.numel() for _, p in role.parameters()):,} trainable" if role.trainable else "frozen"
            lines.append(f"{role.name}: {source} ({learns})")
        return lines


@torch.no_grad()
def check_head(role: Role) -> None:
    """Stops if hidden states and head do not give the model's own log-probs, as in an architecture unknown to us, or if
    a state depends on tokens behind it, as in an encoder.

    The logits of a model that was not trained are so small that a cap on them would not show: they are made as large as
    those of one that was.
    """
    with role.active() as model:
        module: Any = model.get_output_embeddings()
        if "weight" in vars(module):  # and no parameter
            raise UserError(
                "the LM head's weight is computed by a hook when the head is called (weight_norm, pruning), which the "
                "fused ops do not do: use torch.nn.utils.parametrizations, or make it permanent"
            )
        rows = torch.arange(8, device=role.device).repeat(2, 1)
        rows[1, 4:] += 1  # the same four tokens, and others behind them
        rows = rows.remainder(model.config.get_text_config().vocab_size)
        trunk = trunk_of(model)
        with from_tokens_alone(model):
            states = trunk(input_ids=rows, use_cache=False).last_hidden_state
        head = role.head
        one, other = states[:, :4].cpu().double()  # not every device has float64
        # in 16 bit, tokens behind may change how experts round; an encoder's states change by more
        if (other - one).norm() > (1e-4 if states.dtype.itemsize >= 4 else 0.2) * one.norm():
            raise UserError(
                f"{type(model).__name__} reads the tokens behind a token, too, as an encoder does, so that a log-prob "
                "would be one of a token that the model has seen: take a causal model, or set is_decoder or the like "
                "in its configuration"
            )
        ids, hidden = rows[:1], states[:1].to(head.weight.dtype)
        if hidden.shape[-1] != head.weight.shape[1]:
            raise UserError(
                f"{type(model).__name__} has a layer under its head that changes the width: not supported yet"
            )
        largest = (hidden @ head.weight.T).abs().max().item() * abs(head.logit_scale)
        factor = 1.0  # a power of two, which is exact in 16 bit beside a head in 32
        while factor * max(largest, 1e-3) < 16:
            factor *= 2
        hook = module.register_forward_pre_hook(lambda _, rows: (rows[0] * factor,))
        try:
            logits = model(input_ids=ids, use_cache=False).logits.float()
        finally:
            hook.remove()
        ours = linear_logprob(hidden * factor, head.weight, ids, **head.options).logprob
    theirs = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    worst = (ours - theirs).abs().max().item()
    tolerance = 1e-3 if role.head.weight.dtype == torch.float32 else 0.25  # theirs come from logits rounded to 16 bits
    if not worst <= tolerance:
        raise UserError(
            f"{type(model).__name__} computes its logits in a way that the fused head does not reproduce (log-probs "
            f"differ by {worst:.3g}): this architecture is not supported yet"
        )


def frozen_roles(
    args: SRPPOConfig, base: str | PreTrainedModel, sft: str | PreTrainedModel, *, share: bool = True
) -> tuple[Role, Role]:
    """Base and SFT: over one model where SFT is an adapter folder and ``share``, else a model each."""
    base_path = base if isinstance(base, str) else None
    sft_path = sft if isinstance(sft, str) else None
    adapter = sft_path if sft_path is not None and is_adapter_folder(sft_path) else None
    shares = adapter is not None and share
    for name, model in (("base", base), ("SFT model", sft)):
        if isinstance(model, str):
            continue
        if is_peft(model):
            raise UserError(f"the {name} is a peft model in memory: give its adapter folder, or merge_and_unload() it")
        if not shares and has_adapter_layers(model):
            raise UserError(
                f"the {name} has adapter layers in it, of peft, an earlier run or a SelfReward, and they would be on: "
                "load it again, or give its folder"
            )
        require_no_float64(f"the {name}", model)
        keep_unpacked(f"the {name}", model)
        model.eval()  # what trained it may have left it in training mode, where a router's noise is no dropout
    base_model = load_model(base, args) if isinstance(base, str) else base
    freeze(base_model)
    if adapter is not None:
        warn_of_another_base(adapter, base_path)
    if adapter is not None and share:
        check_same_vocabulary(args, base_model, base_model, base_path, sft_path)
        shared = attach_adapter(base_model, adapter, "sft")
        roles = Role("base", shared), Role("sft", shared, "sft")
    else:
        if adapter is not None:  # onto the base that is given, which need not be where it was made
            sft_model = merged(attach_adapter(copy.deepcopy(base_model), adapter, "default"))
        else:
            sft_model = load_model(sft, args) if isinstance(sft, str) else sft
        freeze(sft_model)
        check_same_vocabulary(args, base_model, sft_model, base_path, sft_path)
        roles = Role("base", base_model), Role("sft", sft_model)
    require_one_device(*roles)
    for role in roles:
        disable_dropout(role.model)
        check_head(role)
    return laid_out_alike(*roles)


def require_one_device(base: Role, sft: Role) -> None:
    """Stops where one was given in memory and lies elsewhere than what was loaded, as on a Mac's GPU."""
    if base.device != sft.device:
        raise UserError(
            f"base is on {base.device} and SFT on {sft.device}: move one to the other's device; what is given by its "
            f"name is loaded to {choose_device()}"
        )


def laid_out_alike(base: Role, sft: Role) -> tuple[Role, Role]:
    """Two roles that are compared, so in one layout: the best that both models take."""
    with evaluating(base.model), evaluating(sft.model):
        layout = min(layout_of(base), layout_of(sft))
    return dataclasses.replace(base, layout=layout), dataclasses.replace(sft, layout=layout)


def policy_to_judge(args: SRPPOConfig, base: Role, sft: Role, path: str) -> tuple[Role, Role, Role]:
    """Base, SFT and a model to evaluate; an adapter is loaded onto the base that is there, or onto a full SFT model
    where PPO made it on that.

    Raises:
        UserError: base and SFT are a model each, and the adapter was made on neither.
    """
    if not is_adapter_folder(path):
        model = load_model(path, args)
        paths = args.base_model_name_or_path, path
        check_same_vocabulary(args, base.causal_lm, model, *paths, name=f"the model in {path}")
        policy = Role("policy", model)
    elif is_peft(base.model):
        policy = Role("policy", attach_adapter(base.model, path, "policy"), "policy")
    else:
        candidates = {args.sft_model_name_or_path: sft, args.base_model_name_or_path: base}
        under = made_on(path, candidates)
        shared = attach_adapter(under.causal_lm, path, "policy")
        base, sft = (dataclasses.replace(role, model=shared) if role is under else role for role in (base, sft))
        policy = Role("policy", shared, "policy")
    disable_dropout(policy.model)
    check_head(policy)
    return base, sft, dataclasses.replace(policy, layout=min(base.layout, layout_of(policy)))


def made_on(adapter: str, models: Mapping[str | None, Role]) -> Role:
    """The one of some full models, by their paths, on which an adapter folder says it was made. Its shapes, which fit
    all of them, do not tell."""
    named = adapter_base(adapter)
    place = None if named is None else Path(named).resolve()
    found = next((role for path, role in models.items() if path and Path(path).resolve() == place), None)
    if found is None:
        made = f"was made on {named}, which is neither the base nor the SFT model given"
        raise UserError(
            f"the adapter in {adapter} {made if named else 'names no model that it was made on'}: if base or SFT is "
            "that model, write its path to base_model_name_or_path in adapter_config.json"
        )
    return found


def build_roles(
    args: SRPPOConfig, base: str | PreTrainedModel, sft: str | PreTrainedModel, peft_config: Any = None
) -> Roles:
    """Loads what is given as a path and assigns the roles; the policy and the critic start as copies of SFT.

    ==================  ============================================  ==================================
    SFT model is        with ``use_peft``                             without
    ==================  ============================================  ==================================
    an adapter folder   one base; adapters sft, policy, critic        merged; policy and critic copied
    a full model        base; SFT with adapters policy, critic on it  policy and critic copied
    ==================  ============================================  ==================================
    """
    value_model = {"auto": "adapter" if args.use_peft else "separate"}.get(args.value_model, args.value_model)
    if peft_config is not None and not args.use_peft:
        raise UserError("peft_config is for adapters: set use_peft=true, or leave it out to train all weights")
    quantized = any(getattr(model, "is_quantized", False) for model in (base, sft))
    if quantized and (not args.use_peft or value_model == "separate"):
        raise UserError(
            "base or SFT is a quantized model in memory, whose weights cannot be trained: set use_peft=true and "
            "value_model=adapter, or give it in full precision"
        )
    base_role, sft_role = frozen_roles(args, base, sft, share=args.use_peft)
    if not args.use_peft:
        policy = Role("policy", thawed(copy.deepcopy(sft_role.causal_lm)), trainable=True)
        trunk = Role("critic", thawed(copy.deepcopy(sft_role.causal_lm)), trainable=True)
    else:
        # peft's save_pretrained leaves out whatever has another adapter's name in its own, as BERT's "value" projection
        names = ["policy", "critic"] if value_model == "adapter" else ["policy"]
        if value_model == "separate":
            own = copy.deepcopy(sft_role.model)
            own = own if sft_role.adapter is None else merged(own)
            trunk = Role("critic", thawed(own.float()), trainable=True)
        if sft_role.adapter is not None:
            if peft_config is not None:
                raise UserError("peft_config is for a full SFT model: here the policy's adapter is a copy of SFT's")
            shared = sft_role.model
            for name in names:
                attach_adapter(shared, str(sft), name)
        else:
            shared = new_adapter(sft_role.causal_lm, args, peft_config, names[0])
            for name in names[1:]:
                shared.add_adapter(name, shared.peft_config[names[0]])
            sft_role = dataclasses.replace(sft_role, model=shared)
        policy = Role("policy", shared, "policy", trainable=True)
        if value_model == "adapter":
            trunk = Role("critic", shared, "critic", trainable=True)
    policy = dataclasses.replace(policy, layout=sft_role.layout)
    critic = dataclasses.replace(trunk, layout=sft_role.layout, value_head=new_value_head(policy.causal_lm))
    roles = Roles(base_role, sft_role, policy, critic)
    settle(args, roles)
    return roles


def new_adapter(model: PreTrainedModel, args: SRPPOConfig, peft_config: Any, name: str) -> Any:
    """A peft model with a new LoRA adapter, whose B starts at 0: the model computes exactly what it did."""
    from peft import get_peft_model

    config = peft_config or lora_config(args, model)
    check_adapter("peft_config", config)
    try:
        adapted = get_peft_model(model, config, adapter_name=name)
    except ValueError as error:
        raise UserError(f"no adapter could be made, check lora_target_modules: {first_line(error)}") from None
    check_read_back(adapted, name)
    return adapted


def thawed(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def new_value_head(model: PreTrainedModel) -> nn.Linear:
    """Zero weights and bias: the first values are 0, so the first advantages are those of the rewards alone.

    A bias at the first rollout's mean return was tried where returns are large (the demo's world with rewards and beta
    times 20, so returns of 13 nats, value rate 1e-3, 40 iterations, two seeds): the critic explained more (0.09 of the
    variance at the end, 0.01 without), and the objective of the last 20 iterations did not rise (1.32 and 1.28 with it,
    1.33 and 1.33 without). So it is left out.
    """
    head = nn.Linear(model.get_output_embeddings().weight.shape[1], 1, device=model.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def settle(args: SRPPOConfig, roles: Roles) -> None:
    """The last checks and modes of what learns: the head as the fused ops take it, no dropout, checkpointing if
    asked."""
    check_head(roles.policy)
    policy, critic = ({id(p) for _, p in role.parameters()} for role in (roles.policy, roles.critic))
    frozen = {id(p) for role in (roles.base, roles.sft) for _, p in role.parameters()}
    assert not policy & critic and not frozen & (policy | critic), "a weight has two roles, of which one learns"
    for role in (roles.policy, roles.critic):
        for _, parameter in role.parameters():
            parameter.requires_grad_(True)
        require_full_precision(role.name, (parameter for _, parameter in role.parameters()))
        disable_dropout(role.model)
        if not role.parameters():
            raise UserError(f"the {role.name} has no trainable parameters: check lora_target_modules")
        if args.gradient_checkpointing:
            recompute_activations(role.causal_lm)
            role.model.train()
