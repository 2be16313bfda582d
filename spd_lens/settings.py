"""Settings that functions take whole or by keyword. Each is declared once: `SPDConfig` is made of the same groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypedDict, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from spd_lens.errors import SPDError, plain, whole
from spd_lens.sites import KINDS, LAYER_WORDS

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Small enough for a laptop, Apache-2.0, Llama architecture with grouped-query attention."""


class Settings(BaseModel):
    """Settings whose numbers may be numpy's or torch's, and in which true and false are no numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    panel: ClassVar[str | None] = None
    """The heading under which `--help` lists the flags of a group; None: that of a command's own."""

    @model_validator(mode="before")
    @classmethod
    def _plain_numbers(cls, given: Any) -> Any:
        return plain(dict(given)) if isinstance(given, dict) else given

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take true for 1."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        numbers = int in kinds or float in kinds
        if numbers and bool not in kinds and any(type(part) is bool for part in (value, *_parts(value))):
            raise ValueError("true and false are no numbers")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """An annotation's types, and those of the values in its lists and mappings."""
    return {annotation}.union(*map(_kinds, get_args(annotation)))


def _parts(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else list(value.values()) if isinstance(value, dict) else ()


COMMAS = BeforeValidator(
    lambda value: [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
)
"""A list may be written as text with commas between its parts."""


class CallSettings(Settings):
    """Settings of one function, which also takes each of them by keyword."""

    keywords: ClassVar[Mapping[str, str]]
    """The function's keywords, and the setting that each of them is."""
    _protocol: str = PrivateAttr("")

    @property
    def label(self) -> dict[str, str]:
        """What an artefact records of where its settings come from: the protocol, where one was named."""
        return {"protocol": self._protocol} if self._protocol else {}

    def labelled(self, protocol: str) -> Self:
        """The same settings as those of a protocol; `"paper"`, which are the defaults, leaves no label."""
        other = self.model_copy()
        other._protocol = "" if protocol == "paper" else protocol
        return other

    @classmethod
    def given(cls, settings: Self | None, keywords: Mapping[str, Any], caller: str) -> Self:
        """The settings that a function was given whole, or the defaults, with its keywords over them.

        Nothing is validated here, as in `model_copy`: the function says what it cannot work with.

        Raises:
            TypeError: There is no such keyword.
            SPDError: `settings` are not of this class.
        """
        if unknown := [name for name in keywords if name not in cls.keywords]:
            raise TypeError(f"{caller}() got an unexpected keyword argument {unknown[0]!r}")
        if not (settings is None or isinstance(settings, cls)):
            raise SPDError(f"{caller} takes settings of class {cls.__name__}, not a {type(settings).__name__}")
        over = {cls.keywords[name]: value for name, value in keywords.items()}
        settings = settings or cls()
        return cls.model_construct(**plain(dict(settings) | over)).labelled(settings._protocol)

    @classmethod
    def of(cls, config: Settings) -> Self:
        """What a config says of these settings."""
        own = cls.model_construct(**{name: value for name, value in config if name in cls.model_fields})
        return own.labelled(getattr(config, "protocol", ""))

    def by_keyword(self) -> dict[str, Any]:
        """The values by the function's keywords."""
        return {name: getattr(self, field) for name, field in self.keywords.items()}


class SeedGroup(Settings):
    """The seed of everything random but the draws of examples."""

    panel = "Evaluation and seeds"

    seed: int = Field(42, ge=0, lt=2**32, description="Seed of sampling, training and random subspaces.")


class SiteGroup(Settings):
    """Where gradients are captured, and what is projected."""

    panel = "Subspace"

    layers: str | list[int] = Field(
        "last_mid", description=f"{', '.join(LAYER_WORDS)}, or block indices such as 14,29."
    )
    kinds: Annotated[list[str], COMMAS] = Field(
        ["k", "v"], min_length=1, description="Activations to project: k, v, q, z, resid."
    )

    @field_validator("kinds")
    @classmethod
    def _known_kinds(cls, kinds: list[str]) -> list[str]:
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"unknown kind {kind!r}; choose from {', '.join(KINDS)}")
        return kinds

    @field_validator("layers", mode="before")
    @classmethod
    def _one_spelling(cls, value: Any) -> Any:
        """`14`, `"14,29"` and `[14, 29]` are block indices; a run resumed with another spelling is the same run."""
        if isinstance(value, str) and value in LAYER_WORDS:
            return value
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        if not parts or not all(
            type(part) is int or isinstance(part, str) and part.strip().isdecimal() for part in parts
        ):
            raise ValueError(f"write {', '.join(LAYER_WORDS)} or block indices such as 14,29")
        return sorted({int(part) for part in parts})


class GradientGroup(Settings):
    """Which gradients are captured, and on which of the two models."""

    panel = "Subspace"

    loss: Literal["aligned", "full"] = Field("aligned", description="Score correctness tokens or whole completions.")
    engine: Literal["lens", "twin"] = Field("lens", description="Where gradients are captured.")
    max_calibration_tokens: int | None = Field(
        None, ge=2, description="Tokens behind which a calibration text is cut; else it is taken whole."
    )
    across_heads: bool = Field(True, description="Keep sums of products across heads, which joint subspaces need.")


class ExtractionKeywords(TypedDict, total=False):
    """Keywords of `extract` that are settings."""

    layers: str | int | Iterable[int]
    kinds: str | Sequence[str]
    loss: Literal["aligned", "full"]
    engine: str
    max_calibration_tokens: int | None
    across_heads: bool
    keep: str | Sequence[str]
    sinks: str
    labels: str
    seed: int


class Extraction(GradientGroup, SiteGroup, SeedGroup, CallSettings):
    """Settings of `extract`.

    With the loss `"aligned"` the tokens of the spans are scored (Eq. 6), with `"full"` every token of the completion
    (table 5). The engine `"lens"` captures at `hook_k`/`hook_v` of the lens model, `"twin"` at the projections of the
    Hugging Face model, which saves holding the weights twice. Both give the same moments: the lens model is compared
    with the twin on a text as long as the longest example first. Where none agrees, `backend="auto"` captures on the
    twin, which is logged, and any other backend is an error. With `max_calibration_tokens` a text ends behind so many
    tokens, prompt included: rows of `G`, scored tokens and loss are those of what is left.

    Without `across_heads`, moments hold each head's sums alone. They take the memory divided by the number of heads,
    give the same subspaces per head, and no joint ones.

    Moments always keep `Σ gᵀg` and `Σ xᵀx` over all positions. With `keep="classes"` they also keep them over each
    class of positions (sink, prompt, completion, scored) for `region`, with `"cross"` also `Σ gᵀx` for `attribution`.
    The sink `"first"` is the first token, `"attended"` the position that receives most attention at the layers whose
    gradients are captured, for which each example passes the twin once more. With the labels `"sampled"` the target at
    each scored position is drawn from the model's own distribution there (Kunstner et al. 2019): on the mean over draws
    `Σ gᵀg` is then the Fisher information, and the loss the model's entropy. The seed is that of the draws.
    """

    keywords = {name: name for name in ExtractionKeywords.__annotations__}

    keep: Annotated[list[Literal["classes", "cross"]], COMMAS] = Field(
        [], description="What moments keep beside the plain sums: classes of positions, cross products."
    )
    sinks: Literal["first", "attended"] = Field(
        "first", description="The sink among the classes: the first token, or the one that receives most attention."
    )
    labels: Literal["gold", "sampled"] = Field(
        "gold", description="Targets of the loss: the example's own, or drawn from the model's distribution."
    )


class CompletionGroup(Settings):
    """How completions are sampled."""

    panel = "Self-generation"

    max_new_tokens: int = Field(256, ge=1, description="Token limit of a self-generated completion.")
    temperature: float | None = Field(None, ge=0, description="Sampling temperature; else the model's own, else 0.7.")
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus mass; else the model's own, else 0.95.")
    top_k: int | None = Field(None, ge=0, description="Tokens kept; else the model's own, else all (0).")
    generation_batch_size: int | None = Field(None, ge=1, description="Completions at once; else what memory holds.")
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="Tokens behind which a prompt is cut; else it is taken whole."
    )


class SamplingKeywords(TypedDict, total=False):
    """Keywords of `generate` that are settings."""

    max_new_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    batch_size: int | None
    samples_per_prompt: int
    seed: int
    max_prompt_tokens: int | None


class SamplingSettings(CompletionGroup, SeedGroup, CallSettings):
    """What is asked of `generate`; `Sampling.resolve` fills in what the model's own generation config decides.

    Prompt and completion must fit the context. A temperature of 0 is greedy; a `top_p` of 1 and a `top_k` of 0 keep
    every token. The batch size does not change the completions: as one ends, the next prompt takes its place. By itself
    it is what memory allows, at most 32 on a CPU and 256 on CUDA, and it is halved where memory runs out.
    """

    keywords = {name: name for name in SamplingKeywords.__annotations__} | {"batch_size": "generation_batch_size"}

    samples_per_prompt: int = Field(1, ge=1, description="How many completions of each prompt.")

    def check(self) -> None:
        """Raise `SPDError` if a count or the seed is no such number. `Sampling.resolve` checks the others."""
        whole("max_new_tokens", self.max_new_tokens)
        whole("samples_per_prompt", self.samples_per_prompt)
        for name, value in (("batch_size", self.generation_batch_size), ("max_prompt_tokens", self.max_prompt_tokens)):
            if value is not None:
                whole(name, value)
        whole("seed", self.seed, least=None)


class EngineSettings(Settings):
    """Where completions are generated, and how the engine is reached. Each engine says which settings it reads."""

    panel = "Self-generation"

    generation_engine: str = Field("twin", description="What generates corpora: twin, lens, openai, vllm or ray.")
    engine_url: str | None = Field(
        None,
        description="Address of the engine's server, such as http://localhost:8000/v1 for openai, or of a Ray cluster.",
    )
    engine_model: str | None = Field(None, description="Name under which the server has the model; else its only one.")
    engine_concurrency: int | None = Field(None, ge=1, description="Requests in flight at most; by default 32.")
    engine_timeout: float | None = Field(None, gt=0, description="Seconds that a request may take; by default 600.")
    engine_retries: int | None = Field(None, ge=0, description="How often a request is tried again; by default 5.")
    engine_workers: int | None = Field(None, ge=1, description="Processes of ray, each with the model; by default 2.")
    engine_python: str | None = Field(None, description="Python that has vLLM; by default the one that runs this.")
    engine_tensor_parallel: int | None = Field(None, ge=1, description="GPUs that share vLLM's model; by default 1.")

    @property
    def given(self) -> list[str]:
        """The settings of an engine that are set, by name."""
        return [name for name, value in self if name.startswith("engine_") and value is not None]


class OptimisationGroup(Settings):
    """How a corpus is distilled into the model. The defaults are the paper's (appendix A.3)."""

    panel = "Training"

    method: Literal["lora", "full"] = Field("lora", description="LoRA adapter or full fine-tuning.")
    epochs: int = Field(5, ge=1, description="Passes over the corpus.")
    lr: float = Field(1e-5, gt=0, allow_inf_nan=False, description="Peak learning rate, cosine schedule.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay.")
    train_batch_size: int = Field(8, ge=1, description="Sequences per optimiser step.")
    lora_rank: int = Field(8, ge=1, description="LoRA rank.")
    lora_alpha: int | float = Field(8, gt=0, description="LoRA alpha.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="LoRA dropout.")
    lora_targets: Annotated[list[str], COMMAS] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1, description="Modules with LoRA."
    )
    loss_on: Literal["all", "completion"] = Field("all", description="Train on prompt and completion, or completion.")
    warmup_epochs: float = Field(0.0, ge=0, description="Epochs, or a part of one, of linear warm-up.")
    early_stop: bool = Field(
        False, description="Stop after an epoch without a lower training loss, and take the best epoch's weights."
    )
    retokenise: bool = Field(
        False, description="Train on the text of prompt and completion, tokenised again, instead of the sampled ids."
    )
    max_length: int | None = Field(
        None, ge=2, description="Tokens behind which a training text is cut, prompt included; else it is taken whole."
    )
    loss_on_padding: bool = Field(
        False, description="Pad every training text to max_length, and train on the padding too."
    )


class TrainingKeywords(TypedDict, total=False):
    """Keywords of `finetune` that are settings, in the order in which `training.json` records them."""

    method: str
    rank: int
    alpha: float
    dropout: float
    targets: str | Sequence[str]
    lr: float
    weight_decay: float
    epochs: int
    batch_size: int
    gradient_accumulation: int
    loss_on: str
    seed: int
    warmup_epochs: float
    early_stop: bool
    retokenise: bool
    max_length: int | None
    loss_on_padding: bool


class TrainingSettings(OptimisationGroup, SeedGroup, CallSettings):
    """Everything that decides the result of `finetune` beside the model and the corpus.

    With the method `"lora"` the result is a standard PEFT adapter. With `"full"` all weights are trained, on a float32
    copy of the twin (16 bytes per weight), and the result is a checkpoint in float32. LoRA's scale is alpha / rank. The
    default targets stand for the attention's projections under whatever names the architecture has for them. With
    gradient accumulation, `train_batch_size` sequences go through each forward pass, and the tokens of all passes of a
    step count as one batch. The seed decides LoRA's first weights, the order of the sequences and dropout.

    Warm-up takes `warmup_epochs` times the steps of an epoch, rounded down; the learning rate rises from 0 to `lr` over
    them, and falls to 0 over the rest of all epochs. With `early_stop` the loss of an epoch is the mean of its steps'
    losses; training ends with the first epoch that is not below the best so far, and the result is the weights at the
    end of the best. `retokenise` decodes a prompt as the model was given it, and of the completion everything but
    special tokens; the tokenizer then adds what it adds to any text. With `loss_on_padding` every text is padded on the
    right with the tokenizer's own padding token, which is masked in the attention and scored like any other.
    """

    keywords = {name: name for name in TrainingKeywords.__annotations__} | {
        "rank": "lora_rank",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "targets": "lora_targets",
        "batch_size": "train_batch_size",
    }

    gradient_accumulation: int = Field(1, ge=1, description="Forward passes per step.")

    def recorded(self) -> dict[str, Any]:
        """The values by keyword, as `training.json` has them: of `LATER` only those that are not at their default."""
        return {name: value for name, value in self.by_keyword().items() if name not in LATER or value != LATER[name]}

    @property
    def full(self) -> bool:
        """Whether all weights are trained, instead of LoRA matrices."""
        return self.method == "full"

    def check(self) -> None:
        """Raise `SPDError` if a setting is out of range. The targets are left to the model, which may not have them."""
        try:
            self.model_validate({name: value for name, value in self if name != "lora_targets"}, strict=True)
        except ValidationError as error:
            problem = error.errors()[0]
            name = next(name for name, field in self.keywords.items() if field == problem["loc"][0])
            rule = _RULES.get(name, "a whole number of at least 1")
            if problem["type"] in ("int_type", "float_type", "value_error"):
                rule = {"seed": "a whole number"}.get(name, "a number" if name in _REAL else rule)
            raise SPDError(f"{name} is {problem['input']!r}; it must be {rule}") from error
        if self.loss_on_padding and self.max_length is None:
            raise SPDError("loss_on_padding has no length to pad to; set max_length, in tokens, too")
        if self.warmup_epochs > self.epochs:
            raise SPDError(
                f"warmup_epochs is {self.warmup_epochs:g}, more than the {self.epochs} epochs that there are; lower it"
            )


LATER: Mapping[str, Any] = {
    name: TrainingSettings.model_fields[name].default
    for name in ("warmup_epochs", "early_stop", "retokenise", "max_length", "loss_on_padding")
}
"""Keywords of `finetune` that the first version did not have, with their defaults: what is trained without them has the
same `training.json` in every version."""

_REAL = ("alpha", "dropout", "lr", "weight_decay", "warmup_epochs")
_RULES = {
    "method": "'lora' or 'full'",
    "loss_on": "'all' (prompt and completion) or 'completion'",
    "seed": "from 0 to 4294967295",
    "alpha": "above 0",
    "dropout": "at least 0 and below 1",
    "lr": "a number above 0",
    "weight_decay": "at least 0",
    "warmup_epochs": "at least 0",
    "max_length": "a whole number of at least 2, or None",
    **dict.fromkeys(("early_stop", "retokenise", "loss_on_padding"), "True or False"),
}
"""What `finetune` says of a value that is out of range."""
