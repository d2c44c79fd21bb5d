"""Loading models and tokenizers, and reading a model's head as the fused ops take it."""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from srppo.errors import UserError
from srppo.modules import is_plain_linear

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from srppo.config import SRPPOConfig
    from srppo.data import Example

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Head:
    """The LM head as the fused ops take it: ``softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)``."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None

    @property
    def options(self) -> dict[str, Any]:
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


def is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def adapter_layers(module: nn.Module) -> Iterator[Any]:
    """The layers of a model that have adapters, or whole modules of adapters, in place of weights of their own."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
        yield module
    for child in [module.base_layer] if isinstance(module, BaseTunerLayer) else module.children():
        yield from adapter_layers(child)


def has_adapter_layers(model: nn.Module) -> bool:
    """Whether adapters lie in a model, as they stay in one that a peft model was made around."""
    return next(adapter_layers(model), None) is not None


def path_as_text(model: T | Path) -> T | str:
    """A path as the text that names a folder; a model or a tokenizer in memory as it is."""
    return str(model) if isinstance(model, Path) else model


def is_adapter_folder(path: str | Path) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def trunk_of(model: PreTrainedModel) -> nn.Module:
    """What is under the head; ``base_model`` is the model itself where its prefix is another class's, as in Llama 4."""
    trunk = model.base_model if model.base_model is not model else getattr(model, "model", None)
    if trunk is None:
        raise UserError(f"{type(model).__name__} does not say what is under its head: it is not supported yet")
    return trunk


@contextmanager
def from_tokens_alone(model: nn.Module) -> Iterator[None]:
    """Tells of a model whose forward fails, as one that is half of another model or has a bug, in words."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        what = "with its adapter (see lora_target_modules) " if has_adapter_layers(model) else ""
        raise UserError(
            f"{type(model).__name__} {what}fails on a few tokens and nothing else ({type(error).__name__}: "
            f"{first_line(error)}): this architecture is not supported yet"
        ) from error


# -- the head ---------------------------------------------------------------------------------------------------------


def head_of(model: PreTrainedModel) -> Head:
    """The head of a transformers causal LM with what its architecture does to the logits.

    Known: factors of Cohere (``logit_scale``) and Falcon-H1 (``lm_head_multiplier``), ``logits_scaling``, a divisor of
    Granite's and a factor of HyperCLOVA's, and the caps of Gemma, RecurrentGemma and xLSTM. Whatever else an
    architecture does is caught by :func:`srppo.roles.check_head`.
    """
    linear, config = model.get_output_embeddings(), model.config.get_text_config()
    if not is_plain_linear(linear):
        kind = type(linear).__name__
        raise UserError(
            f"the LM head is a {kind}, not a plain linear layer: the fused ops read its weight, so an adapter or a "
            "modules_to_save on lm_head is not supported, nor is a head that computes more; train an adapter without it"
        )

    def setting(*names: str) -> float | None:
        return next((float(value) for name in names if (value := getattr(config, name, None))), None)

    scale = (setting("logit_scale") or 1.0) * (setting("lm_head_multiplier") or 1.0)
    scaling = setting("logits_scaling") or 1.0
    scale = scale * scaling if config.model_type.startswith("hyperclovax") else scale / scaling
    softcap = setting("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return Head(linear.weight, linear.bias, scale, softcap)


# -- loading ----------------------------------------------------------------------------------------------------------


def choose_device() -> torch.device:
    """A CUDA device, or the CPU: on a Mac, too, whose GPU (mps) was never tried here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(args: SRPPOConfig, device: torch.device) -> torch.dtype:
    if args.dtype == "nf4":
        return torch.bfloat16  # of what is not in 4 bit, and of the arithmetic
    if args.dtype == "auto":
        return torch.bfloat16 if args.use_peft and device.type == "cuda" else torch.float32
    return getattr(torch, args.dtype)


def four_bit(args: SRPPOConfig, device: torch.device) -> dict[str, Any]:
    """What loads a frozen model's linear layers in 4 bit (QLoRA's NF4), where ``dtype=nf4`` asks for it.

    The head stays in 16 bit: the fused ops read its weight.

    Raises:
        UserError: the weights are to be trained, or there is no bitsandbytes.
    """
    if args.dtype != "nf4":
        return {}
    if not args.use_peft:
        raise UserError("dtype=nf4 is for frozen weights under adapters: it needs use_peft=true")
    if args.value_model == "separate":
        raise UserError("dtype=nf4 is for frozen weights, and value_model=separate trains all of the critic's")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("dtype=nf4 needs a package that is not installed: pip install 'bitsandbytes>=0.46.1'")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=choose_dtype(args, device)
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_unpacked(what: str, model: nn.Module) -> None:
    """Keeps 4-bit layers as they are on a CPU with BF16 instructions, where bitsandbytes repacks them at their first
    forward in evaluation mode: gradients do not go through what is packed (0.50 warns and computes others), and its
    scales are rounded.

    Raises:
        UserError: a layer is packed already.
    """
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise UserError(
                    f"{what} was used in 4 bit on the CPU, for which bitsandbytes packs the weights so that no "
                    "gradient goes through them: load it again, or give its folder and dtype=nf4"
                )
            layer.support_avx512bf16_for_cpu = False


def require_full_precision(name: str, parameters: Iterable[nn.Parameter]) -> None:
    """Stops before weights in 16 bit are trained; adapters on a 16-bit model are float32 themselves."""
    low = next((p.dtype for p in parameters if p.dtype.itemsize < 4), None)
    if low is not None:
        raise UserError(
            f"the {name} would be trained in {str(low).removeprefix('torch.')} and lose most updates to rounding: "
            "use dtype=float32, or use_peft=true without modules_to_save"
        )


def require_no_float64(what: str, model: nn.Module) -> None:
    """Stops before a model in float64 is scored: log-probs, values and what is computed of them are float32 here."""
    if any(p.dtype == torch.float64 for p in model.parameters()):
        raise UserError(
            f"{what} has weights in float64, and log-probs are float32 here, exact to a few 1e-6 whatever the weights: "
            "give model.float(), or its folder"
        )


def vocabulary_size(model: PreTrainedModel) -> int:
    """Tokens that the model has an embedding for; an adapter on the embedding leaves it only its weight."""
    size: int = model.get_input_embeddings().weight.shape[0]
    return size


def check_tokens(model: PreTrainedModel, examples: Iterable[Example], others: Sequence[int] = ()) -> None:
    """Stops before a token is looked up that the model has no embedding for, as where the tokenizer is another's.

    Args:
        examples: rows of the data; the error names the first that does not fit.
        others: the stop tokens and what padding is filled with.
    """
    size = vocabulary_size(model)
    rows = itertools.chain(  # one by one: together they would be a copy of all data, 8 bytes a token
        [("a stop token or the pad token", others)],
        ((e.where, [*e.prompt_ids, *(e.completion_ids or ())]) for e in examples),
    )
    for where, ids in rows:
        if max(ids, default=0) >= size:
            raise UserError(
                f"{where}: token {max(ids)} is outside of the model's vocabulary of {size} tokens: is the tokenizer "
                "that of another model, or was it given tokens without resizing the model's embedding?"
            )


def config_of(path: str, args: SRPPOConfig) -> PretrainedConfig | None:
    """The configuration of a model that is not loaded yet; None where it cannot be read, which loading the model tells
    better."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError):
        return None


def check_positions(config: PretrainedConfig, lengths: Iterable[int]) -> None:
    """Stops before a sequence runs past the positions that a model knows, which fails or degrades midway; and before
    short and long ones meet in a batch of a model that rotates all of it as its longest (longrope).

    Args:
        lengths: of sequences, prompt and completion; the shortest and the longest will do.
    """
    text, lengths = config.get_text_config(), list(lengths)
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise UserError(
            f"the longest prompt and completion together may reach {longest} tokens, and the model has {positions} "
            "positions: lower max_completion_length, or drop the longest prompts"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    for settings in (rope, *rope.values()):  # of some models by the type of layer
        if isinstance(settings, dict) and settings.get("rope_type") == "longrope":
            switch = getattr(text, "original_max_position_embeddings", None)
            switch = switch or settings.get("original_max_position_embeddings", positions)
            if switch is not None and shortest <= switch < longest:
                raise UserError(
                    f"prompt and completion together may have from {shortest} to {longest} tokens, and the model "
                    f"(longrope) computes short sequences otherwise where one of their batch has more than {switch}, "
                    f"so that log-probs would depend on the batch: stay below with max_completion_length and without "
                    "the longest prompts, or above it with all of them"
                )


def check_prompts(config: PretrainedConfig, examples: Sequence[Example], args: SRPPOConfig) -> None:
    """:func:`check_positions` of what may be sampled after these prompts."""
    prompts = [len(example.prompt_ids) for example in examples]
    check_positions(config, [min(prompts) + 1, max(prompts) + args.max_completion_length])


def require_there(what: str, path: str | Path, args: SRPPOConfig | None = None) -> None:
    """Stops where a path can only be a folder's and the folder is not there. The hub would be asked for it otherwise,
    for half a minute where it is out of reach."""
    name = str(path)
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"no {what} could be loaded from {path}: there is no such folder{named_by(path, args)}")


def named_by(path: str | Path, args: SRPPOConfig | None) -> str:
    """Which option holds a path, in brackets; nothing where none does."""
    names = ("base_model_name_or_path", "sft_model_name_or_path")
    return next((f" ({name})" for name in names if getattr(args, name, None) == str(path)), "")


def not_loaded(what: str, path: str | Path, error: Exception, args: SRPPOConfig | None) -> UserError:
    """What transformers raised, in one line. A path that is no folder here may be misspelt, so that is said with the
    option that holds it."""
    told = first_line(error)
    if not Path(path).is_dir():
        told = f"it is no folder here{named_by(path, args)}, and from the hub: {told}"
    return UserError(f"no {what} could be loaded from {path}: {told}")


def load_tokenizer(path: str | Path, args: SRPPOConfig | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder, as it is: a tuned model is written with it. One without a pad token needs none,
    see :func:`srppo.data.filler_token`. Errors name the option of ``args`` that holds the path; without ``args`` no
    code that comes with it is run."""
    from transformers import AutoTokenizer

    require_there("tokenizer", path, args)
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=args is not None and args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise not_loaded("tokenizer", path, error, args) from None


def tokenizer_for(
    sft: str | PreTrainedModel | None, base: str | PreTrainedModel | None, args: SRPPOConfig
) -> PreTrainedTokenizerBase:
    """The SFT model's tokenizer where its folder has one, else the base model's."""
    paths = [path for path in (sft, base) if isinstance(path, str)]
    if not paths:
        raise UserError("give processing_class: the tokenizer cannot be found from models in memory")
    with_tokenizer = [path for path in paths if (Path(path) / "tokenizer_config.json").is_file()]
    return load_tokenizer((with_tokenizer or paths[-1:])[0], args)


def load_model(path: str | Path, args: SRPPOConfig) -> PreTrainedModel:
    """A causal LM from a folder or the hub, in safetensors only; an adapter folder is merged into its base."""
    from transformers import AutoModelForCausalLM

    device = choose_device()
    quantized = four_bit(args, device)
    if is_adapter_folder(path):
        under = args.base_model_name_or_path or adapter_base(path)
        if under is None:
            raise UserError(
                f"the adapter in {path} does not say which model it was made on: give it as base_model_name_or_path"
            )
        if quantized:
            raise UserError(
                f"the adapter in {path} would be merged into weights in 4 bit, and most of it lost to their rounding: "
                "merge it where it was made and give the full model, or give the model under it as the base and the "
                "adapter as sft_model_name_or_path"
            )
        if is_adapter_folder(under):
            raise UserError(
                f"the base model {under} is an adapter: give the model that it stands on, or merge the two first"
            )
        warn_of_another_base(path, under)
        return merged(attach_adapter(load_model(under, args), path, "default"))
    require_there("causal language model", path, args)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=choose_dtype(args, device),
            attn_implementation=args.attn_implementation,
            trust_remote_code=args.trust_remote_code,
            use_safetensors=True,
            **quantized,
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise not_loaded("causal language model", path, error, args) from None
    keep_unpacked(f"the model in {path}", model)
    return (model if quantized else model.to(device)).eval()


def attach_adapter(model: nn.Module, path: str | Path, name: str) -> Any:
    """Loads a LoRA adapter folder onto a model (or onto a peft model that has others) under ``name``, frozen."""
    from peft import PeftModelForCausalLM

    if name in getattr(model, "peft_config", {}) and has_adapter_layers(model):  # peft would mix the two
        raise UserError(
            f"the base has an adapter {name!r} in it, of an earlier run or reward: load it again, or give its folder"
        )
    config = adapter_config(path)
    check_adapter(f"the adapter in {path}", config)
    config.inference_mode = True
    try:
        adapted: Any = model if is_peft(model) else PeftModelForCausalLM(model, config, name)
        found = adapted.load_adapter(str(path), name)  # what it lacks, PeftModel.from_pretrained only warns of
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"the adapter in {path} could not be loaded onto the base model, is it for another one? "
            f"({first_line(error)})"
        ) from None
    if found.missing_keys:
        raise UserError(
            f"the adapter in {path} could not be loaded onto the base model whole, as its folder lacks weights or peft "
            f"seeks them under other names, first {found.missing_keys[0]}: merge it where it was made and give the "
            "full model"
        )
    return adapted


def check_read_back(adapted: Any, name: str) -> None:
    """Stops before an adapter is trained that peft would not load again as it was: it renames some models' weights on
    the way in (laguna's, Inkling's) and not on the way out."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    own = {n: p.detach().clone() for n, p in adapted.named_parameters() if f".{name}." in f"{n}." and "lora_" in n}
    state = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    found = set_peft_model_state_dict(adapted, state, adapter_name=name)
    lost = [n for n, p in adapted.named_parameters() if n in own and (n in found.missing_keys or (p != own[n]).any())]
    if lost:
        raise UserError(
            f"peft would not load an adapter on {type(adapted.get_base_model()).__name__} again as it was saved, first "
            f"{lost[0]}: name other lora_target_modules, or train all weights (use_peft=false)"
        )


def check_adapter(what: str, config: Any) -> None:
    """Only what can be switched off again may be put on a base that all roles share: LoRA, without the biases of the
    base (which peft overwrites), single rows of its embedding, layers used again, or PiSSA's, KaSA's and other starts
    that alter the base's weights; nor one that is on behind some tokens only, which peft's forward finds."""
    kind = config.peft_type
    if kind != "LORA":
        raise UserError(f"{what} is of type {getattr(kind, 'value', kind)}: only LoRA is supported")
    for option, *supported in (
        ("bias", "none"),
        ("trainable_token_indices", None),
        ("layer_replication", None),
        ("kasa_config", None),
        ("alora_invocation_tokens", None),
        ("init_lora_weights", True, False, "gaussian", "orthogonal", "eva"),
    ):
        value = getattr(config, option, supported[0])
        if value not in supported:
            raise UserError(
                f"{what} has {option}={value!r}: only LoRA on whole layers is supported that leaves the base as it is; "
                f"make one with {option}={supported[0]!r}, or merge it and give the full model"
            )


def merged(adapted: Any) -> PreTrainedModel:
    """The transformers model in a peft model, with its adapter added to the weights."""
    untie_adapted(adapted.get_base_model())
    model: PreTrainedModel = adapted.merge_and_unload()
    return model


def untie_adapted(model: PreTrainedModel) -> None:
    """Makes embedding and head two weights where they are one and an adapter is on either: merged, it would be on
    both."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is head.weight and (has_adapter_layers(embedding) or has_adapter_layers(head)):
        layer = getattr(head, "base_layer", head)
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False


def adapter_config(adapter: str | Path) -> Any:
    """What an adapter folder says of itself."""
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(adapter))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"adapter_config.json of {adapter} cannot be read: {first_line(error)}") from None


def adapter_base(adapter: str | Path) -> str | None:
    """The model that an adapter folder says it was made on; None, or in older pefts "", of one in memory."""
    named = adapter_config(adapter).base_model_name_or_path
    return str(named) if named else None


def warn_of_another_base(adapter: str | Path, base: str | Path | None) -> None:
    """Warns where an adapter was made on a model in another folder than the base's, which may be a copy of it."""
    named = adapter_base(adapter)
    if base is None or named is None or not Path(named).is_dir() or not Path(base).is_dir():
        return
    if Path(named).resolve() != Path(base).resolve():
        warnings.warn(
            f"the adapter in {adapter} was made on {named} and is loaded onto the base {base}: unless the two are "
            "copies of one model, what it adds up to is neither, and rewards are wrong",
            stacklevel=2,
        )


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]


def lora_config(args: SRPPOConfig, model: PreTrainedModel) -> Any:
    """The LoRA configuration of ``args``; one that touches the head is refused."""
    from peft import LoraConfig

    targets: list[str] | str = args.lora_target_modules or "all-linear"  # peft leaves the head out of all-linear
    if targets == ["all-linear"]:
        targets = "all-linear"
    output = model.get_output_embeddings()
    head_name = next((name for name, module in model.named_modules() if module is output), "lm_head")
    if isinstance(targets, list) and any(head_name == t or head_name.endswith("." + t) for t in targets):
        raise UserError(
            f"lora_target_modules has {head_name!r}, the LM head: the fused ops read its weight, so an adapter there "
            "would be ignored; leave it out"
        )
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


def check_same_vocabulary(
    args: SRPPOConfig,
    base: PreTrainedModel,
    sft: PreTrainedModel,
    base_path: str | Path | None,
    sft_path: str | Path | None,
    *,
    name: str = "SFT model",
) -> None:
    """Base and SFT must give probabilities to the same tokens, or their difference is no reward."""
    sizes = [head_of(model).weight.shape[0] for model in (base, sft)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"base and {name} have different vocabularies ({sizes[0]} and {sizes[1]} tokens): the reward compares "
            f"them token by token"
        )
    folders = [Path(p) for p in (base_path, sft_path) if p is not None]
    if len(folders) == 2 and all((f / "tokenizer_config.json").is_file() for f in folders):
        check_same_tokenizer(
            *(load_tokenizer(f, args) for f in folders),
            what=f"the tokenizers of base and {name} differ",
            why="the reward compares the two models token by token, so they must share one vocabulary",
        )


def check_same_tokenizer(
    first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, *, what: str, why: str
) -> None:
    """Two tokenizers must give every token the same number; the error names the first that has another one."""
    one, other = first.get_vocab(), second.get_vocab()
    if one != other:
        token, index = min(set(one.items()) ^ set(other.items()), key=lambda item: item[1])
        raise UserError(f"{what}, first at token {index} ({token!r}): {why}")


def freeze(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def recompute_activations(model: PreTrainedModel) -> None:
    """Activation checkpointing, which transformers renamed; an error where a model has none."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"gradient_checkpointing is not for this model, leave it out: {first_line(error)}") from None


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout to 0, so that a model may be in training mode, as gradient checkpointing wants, and exact."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):  # attention_dropout, hidden_dropout, layerdrop, ...
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
